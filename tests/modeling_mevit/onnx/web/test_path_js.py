# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The path that the page's slider moves thresholds along, and what is promised on it."""

import copy
from typing import Any

import numpy as np
import pytest

from modeling_mevit.early_exit.calibration import CalibrationTarget, threshold_grid


CONFIG: dict[str, Any] = {
    "exit_policy": "confidence",
    "exit_layers": [2, 3, 4],
    "exit_thresholds": [0.25, 0.25],
    "early_exit": True,
    "calibration": {
        "target": CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95).to_dict(),
        "operating_point": {"policy": "confidence", "thresholds": [0.25, 0.25], "num_samples": 300},
        "made_for": {"exit_layers": [2, 3, 4], "exit_combination": "none"},
    },
}


def changed(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONFIG), **fields}


def targeted(**target: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["calibration"]["target"] = CalibrationTarget(**target).to_dict()
    return config


def made_for(**fields: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["calibration"]["made_for"].update(fields)
    return config


@pytest.mark.parametrize("policy", ["uncertainty", "confidence", "entropy", "margin", "patience"])
def test_the_path_is_the_one_that_calibration_tries(javascript, policy):
    given = javascript("grid", policy=policy, exits=4, labels=12)
    expected = [thresholds[0] for thresholds in threshold_grid(policy, 4, 12)]
    np.testing.assert_allclose(given, expected, rtol=1e-12)


def test_it_goes_from_careful_over_calibrated_to_fast(javascript):
    path = javascript("path", config=CONFIG, exits=3, labels=5)
    stops, middle = path["stops"], path["calibrated"]
    assert stops[0]["thresholds"] is None and path["start"] == middle
    assert stops[middle] == {"thresholds": [0.25, 0.25], "calibrated": True}
    thresholds = [stop["thresholds"][0] for stop in stops[1:]]
    assert thresholds == sorted(thresholds) and thresholds[-1] == 1.0
    assert sum(stop["calibrated"] for stop in stops) == 1 and middle == 50 and len(stops) == 101
    kinds = {promise["kind"] for place, promise in enumerate(path["promises"]) if place != middle}
    assert kinds == {"none"} and path["promises"][middle]["kind"] == "certified"
    assert "The promise is gone" in path["promises"][middle - 1]["text"]
    assert "The promise is gone" in path["promises"][middle + 1]["text"]


def test_exits_that_are_left_out_stay_so(javascript):
    path = javascript("path", config=changed(exit_thresholds=[0.0, 0.25]), exits=3, labels=5)
    stops, middle = path["stops"], path["calibrated"]
    assert stops[middle] == {"thresholds": [0.0, 0.25], "calibrated": True}
    assert all(stop["thresholds"][0] == 0 for stop in stops[1:])
    thresholds = [stop["thresholds"][1] for stop in stops[1:]]
    assert thresholds == sorted(thresholds) and thresholds[0] < 0.25 < thresholds[-1]
    nobody = javascript("path", config=changed(exit_thresholds=[0.0, 0.0]), exits=3, labels=5)
    assert nobody["stops"][-1]["thresholds"] == [1.0, 1.0]


def test_where_it_starts_without_early_exit_or_thresholds(javascript):
    off = javascript("path", config=changed(early_exit=False), exits=3, labels=5)
    assert off["start"] == 0 and off["calibrated"] > 0
    none = javascript(
        "path", config=changed(early_exit=False, exit_thresholds=None, calibration=None), exits=3, labels=5
    )
    assert (none["start"], none["calibrated"]) == (0, None)
    assert none["promises"][0]["text"].startswith("Every image runs to the end")
    assert none["promises"][5]["text"] == "Nothing is promised: the model is not calibrated."


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        (CONFIG, "certified", "Promised with probability 95%: early exit loses at most 1.00% in accuracy against the"),
        (
            targeted(max_disagreement=0.02, confidence=0.9),
            "certified",
            "Promised with probability 90%: early exit gives at most 2.00% of images another label than the last exit",
        ),
        (
            targeted(max_accuracy_drop=0.01, guarantee="expectation"),
            "certified",
            "Promised on average: early exit loses at most 1.00% in accuracy",
        ),
        (
            targeted(max_accuracy_drop=0.01),
            "chosen",
            "on 300 calibration images. Nothing is promised for other images.",
        ),
        (targeted(max_cost=0.6), "chosen", "Best accuracy within a mean cost of 0.6 on 300 calibration images."),
        (changed(exit_thresholds=[0.25, 0.3]), "none", "set by hand"),
        (changed(exit_thresholds=0.3), "none", "set by hand"),
        (changed(exit_policy="margin"), "none", "set by hand"),
        (changed(exit_combination="mean"), "none", "set by hand"),
        (changed(exit_layers=[1, 2, 4]), "none", "set by hand"),
        (changed(calibration=None), "none", "set by hand"),
        (made_for(dtype="float32"), "certified", "Promised"),
        (made_for(dtype="bfloat16"), "none", "chosen in bfloat16, and nothing is promised about them in float32"),
    ],
)
def test_what_is_promised_is_what_calibration_found(javascript, config, kind, text):
    path = javascript("path", config=config, exits=3, labels=5)
    promise = path["promises"][path["calibrated"]]
    assert promise["kind"] == kind and text in promise["text"]


def test_an_image_leaves_at_the_first_exit_that_is_sure(javascript):
    scores = [[0.1, 0.1, 0.1], [0.3, 0.1, 0.9], [0.3, 0.3, 0.0], [None, 0.1, 0.1], [0.25, 0.25, 0.25]]
    taken = javascript("taken", scores=scores, stops=[None, [0.25, 0.25], [1.0, 1.0], [0.0, 0.0]])
    assert taken == [[2, 2, 2, 2, 2], [0, 1, 2, 1, 2], [0, 0, 0, 1, 0], [2, 2, 2, 2, 2]]
