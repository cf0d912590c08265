# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from modeling_mevit.early_exit.calibration_target import CalibrationTarget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of max_cost, max_accuracy_drop and max_disagreement, got max_cost=None, max_accuracy_drop=None and"),
        ({"max_cost": 0.5, "max_accuracy_drop": 0.1}, "got max_cost=0.5, max_accuracy_drop=0.1 and"),
        ({"max_accuracy_drop": 0.1, "max_disagreement": 0.2}, "max_accuracy_drop=0.1 and max_disagreement=0.2"),
        ({"max_cost": 0.0}, r"max_cost must be above 0 \(1 is the plain ViT's cost\), got 0.0"),
        *(({name: "0.1"}, f"{name} must be a number, got '0.1'") for name in ("max_cost", "max_accuracy_drop")),
        ({"max_disagreement": "0.1"}, "max_disagreement must be a number, got '0.1'"),
        ({"max_disagreement": True}, "max_disagreement must be a number, got True"),
        ({"max_accuracy_drop": 0.1, "confidence": "0.9"}, "confidence must be a number, got '0.9'"),
        ({"max_cost": 0.5, "confidence": 0.9}, "confidence=0.9 needs max_accuracy_drop or max_disagreement"),
        ({"max_cost": 0.5, "guarantee": "expectation"}, "guarantee='expectation' needs max_accuracy_drop or"),
        ({"max_accuracy_drop": 0.1, "bound": "harm"}, "bound='harm' needs confidence"),
        ({"max_accuracy_drop": 1.0}, "max_accuracy_drop must be at least 0 and below 1, got 1.0"),
        ({"max_accuracy_drop": 0.0, "confidence": 0.9}, "max_accuracy_drop must be between 0 and 1, got 0.0"),
        ({"max_accuracy_drop": 0.1, "confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
        ({"max_disagreement": 1.0}, "max_disagreement must be at least 0 and below 1, got 1.0"),
        ({"max_disagreement": 0.0, "confidence": 0.9}, "max_disagreement must be between 0 and 1, got 0.0"),
        (
            {"max_disagreement": 0.1, "confidence": 0.9, "bound": "harm"},
            "bound='harm' is for max_accuracy_drop; a disagreement is tested by the exact binomial tail alone",
        ),
        ({"max_accuracy_drop": 0.0, "guarantee": "expectation"}, "max_accuracy_drop must be between 0 and 1, got 0.0"),
        (
            {"max_accuracy_drop": 0.1, "guarantee": "expectation", "confidence": 0.9},
            "guarantee='expectation' has no confidence, .* got confidence=0.9",
        ),
        ({"max_accuracy_drop": 0.1, "guarantee": "expectation", "bound": "harm"}, "bound='harm' needs confidence"),
        ({"max_accuracy_drop": 0.1, "guarantee": "probability"}, "guarantee='probability' needs confidence"),
        (
            {"max_accuracy_drop": 0.1, "guarantee": "hope"},
            "guarantee must be one of 'probability', 'expectation', got 'hope'",
        ),
        (
            {"max_accuracy_drop": 0.1, "confidence": 0.9, "bound": "hoeffding"},
            "bound must be one of 'harm', 'difference', got 'hoeffding'",
        ),
    ],
)
def test_targets_check_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        CalibrationTarget(**arguments)


@pytest.mark.parametrize("exits", [[], ["6"], [True], [6.0], 6])
def test_exits_are_layer_numbers(exits):
    with pytest.raises(ValueError, match="exits must be layer numbers, at least one, got "):
        CalibrationTarget(max_cost=0.5, exits=exits)


def test_exits_survive_json_whatever_their_order():
    target = CalibrationTarget(max_cost=0.5, exits=np.array([12, 6]))
    assert target.to_dict() == {"max_cost": 0.5, "exits": [6, 12]}
    stored = json.loads(json.dumps(target.to_dict()))
    assert CalibrationTarget.from_dict(stored) == target and hash(target)


def test_a_target_tells_what_is_set():
    assert CalibrationTarget(max_cost=0.5).to_dict() == {"max_cost": 0.5}
    assert CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95).to_dict() == {
        "max_accuracy_drop": 0.01,
        "confidence": 0.95,
        "bound": "harm",
        "guarantee": "probability",
    }


@pytest.mark.parametrize(
    "stored",
    [
        {"max_cost": 0.5},
        {"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm"},  # older than the choice of guarantees
        {"max_disagreement": 0.01, "confidence": 0.95},
        {"max_disagreement": 0.01, "guarantee": "expectation"},
    ],
)
def test_a_target_comes_back_from_a_config(stored):
    target = CalibrationTarget.from_dict(stored)
    assert target.to_dict().items() >= stored.items() and CalibrationTarget.from_dict(target.to_dict()) == target
    assert target.guarantee == ("probability" if "confidence" in stored else stored.get("guarantee"))


def test_a_target_with_other_fields_is_named():
    with pytest.raises(ValueError, match=r"calibration target must be some of max_cost, .*exits; got \['risk'\]"):
        CalibrationTarget.from_dict({"max_cost": 0.5, "risk": 0.1})


def test_a_target_says_how_sure_a_certificate_is():
    certified = CalibrationTarget(max_disagreement=0.01, confidence=0.95)
    assert certified.claim == "a disagreement of at most 1.00% with probability 95%"
    on_average = CalibrationTarget(max_accuracy_drop=0.02, guarantee="expectation")
    assert on_average.claim == "a drop of at most 2.00% on average"
    with pytest.raises(ValueError, match="a bound needs max_accuracy_drop or max_disagreement, got max_cost=0.5"):
        _ = CalibrationTarget(max_cost=0.5).limit
