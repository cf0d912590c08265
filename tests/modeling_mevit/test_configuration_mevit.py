# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json

import numpy as np
import pytest
from transformers import AutoConfig

from modeling_mevit import MEViTConfig
from modeling_mevit.configuration_mevit import validate_config_fields
from tests.helpers.models import TINY


# what configs held before the predictor of single exits, the error target and `patience` were retired
OLD = {
    **TINY,
    "architectures": ["MEViTForImageClassification"],
    "auto_map": {
        "AutoConfig": "configuration_mevit.MEViTConfig",
        "AutoModel": "modeling_mevit.MEViTForImageClassification",
        "AutoModelForImageClassification": "modeling_mevit.MEViTForImageClassification",
    },
    "model_type": "mevit",
    "share_uncertainty_predictor": True,
    "uncertainty_input": "probabilities",
    "uncertainty_target": "distance",
    "exit_policy": "uncertainty",
    "exit_thresholds": None,
    "patience": 2,
    "early_exit": False,
    "calibration": None,
}
OLD_CALIBRATION = {
    "policy": "uncertainty",
    "thresholds": [0.125, 0.125],
    "per_exit": False,
    "promise": {"max_accuracy_drop": 0.02, "confidence": 0.95, "bound": "harm"},
    "measured": {
        "pictures": 1248,
        "accuracy": 0.7916,
        "accuracy_of_last_exit": 0.7884,
        "cost": 0.6249,
        "harms": 15,
        "corrections": 19,
        "left_at": {"2": 555, "3": 380, "4": 313},
    },
    "data": {"name": "grocery_store", "split": "test", "half": "first", "sha256": "ec34d92f"},
}


def test_exits_are_on_the_later_half_by_default():
    assert MEViTConfig().exit_layers == [6, 7, 8, 9, 10, 11, 12]
    assert MEViTConfig(num_hidden_layers=4).exit_layers == [2, 3, 4]
    assert MEViTConfig(num_hidden_layers=1).exit_layers == [1]


def test_survives_saving(tmp_path):
    settings = {
        "exit_layers": [3, 4],
        "num_hidden_layers": 4,
        "uncertainty_input": "logits",
        "exit_policy": "patience",
        "exit_thresholds": [0.25],
        "early_exit": True,
        "calibration": {"operating_point": {"policy": "patience", "thresholds": [0.25]}},
        "image_size": [32, 48],
        "id2label": {0: "A320", 1: "A321"},
    }
    MEViTConfig(**settings).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MEViTConfig)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.num_labels == 2


def test_names_its_auto_classes_when_its_code_is_saved_beside_it(tmp_path):
    config = MEViTConfig()
    assert "auto_map" not in config.to_dict()
    config.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"].endswith("configuration_mevit.MEViTConfig")
    assert auto_map["AutoModel"] == "modeling_mevit.MEViTForImageClassification"


@pytest.mark.parametrize(
    "exit_layers", [[0, 12], [6, 13], [9, 6, 12], [6, 6, 12], [6, 9], [], [6.0, 12], [True, 12], ["6", 12]], ids=str
)
def test_exit_layers_that_allow_no_model_are_refused(exit_layers):
    with pytest.raises(
        ValueError, match="exit_layers must be ascending .* from 1 to 12, with 12 as the last; got"
    ) as e:
        MEViTConfig(exit_layers=exit_layers)
    assert str(exit_layers) in str(e.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"uncertainty_input": "patches"},
            "uncertainty_input must be one of 'probabilities', 'logits'; got 'patches'",
        ),
        ({"exit_policy": "luck"}, "exit_policy must be one of 'uncertainty', .*'patience'; got 'luck'"),
        ({"exit_policy": "margin", "num_labels": 1}, "exit_policy='margin' needs at least 2 labels, got num_labels=1"),
        ({"image_size": 100}, "image_size must be a positive multiple of patch_size=16, got 100"),
        ({"image_size": [224, 100]}, r"image_size must be .* got \[224, 100\]"),
        ({"image_size": 0}, "image_size must be .* got 0"),
        (
            {"problem_type": "multi_label_classification"},
            "problem_type must be one of None, 'single_label_classification'; got 'multi_label_classification'",
        ),
        ({"problem_type": "regression", "num_labels": 1}, "problem_type must be one of .* got 'regression'"),
        ({**TINY, "early_exit": True}, "early exit needs exit_thresholds, 2 numbers"),
        ({**TINY, "exit_thresholds": [0.1]}, r"must be one number, or 2 for exits \[2, 3, 4\].*; got \[0.1\]"),
        ({**TINY, "exit_thresholds": [None, 0.5]}, r"must be one number, or 2 .*; got \[None, 0.5\]"),
        ({**TINY, "exit_thresholds": [float("nan"), 0.5]}, r"must be one number, or 2 .*; got \[nan, 0.5\]"),
        ({**TINY, "exit_thresholds": "no"}, "must be one number, or 2 .*; got no"),
        ({**TINY, "exit_thresholds": [float("-inf"), 0.5]}, "must be finite, since JSON has no infinity"),
        (
            {
                **TINY,
                "exit_policy": "entropy",
                "exit_thresholds": [0.1, 0.2],
                "calibration": {"operating_point": {"policy": "margin", "thresholds": [0.1, 0.2]}},
            },
            "were calibrated for exit_policy='margin', got exit_policy='entropy', which needs others",
        ),
    ],
)
def test_what_allows_no_model_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MEViTConfig(**settings)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
def test_one_label_for_each_sample_is_the_problem(problem_type):
    assert MEViTConfig(**TINY, problem_type=problem_type).problem_type == problem_type


def test_names_that_are_not_fields_are_refused():
    validate_config_fields(
        MEViTConfig, ["hidden_size", "num_labels", "id2label", "exit_layers", "attn_implementation"]
    )
    with pytest.raises(ValueError, match="MEViTConfig has no field exit_layer, hiden_size; allowed are .*exit_layers"):
        validate_config_fields(MEViTConfig, ["hiden_size", "exit_layer", "image_size"])
    with pytest.raises(ValueError, match="MEViTConfig has no field patience;"):
        validate_config_fields(MEViTConfig, ["patience"])


@pytest.mark.parametrize("policy", ["uncertainty", "patience"])
def test_one_threshold_serves_all_early_exits(policy):
    config = MEViTConfig(**TINY, exit_policy=policy)
    assert MEViTConfig(**TINY, exit_policy=policy, exit_thresholds=0.25).resolve_exit_thresholds() == [0.25, 0.25]
    assert MEViTConfig(**TINY, exit_policy=policy, exit_thresholds=[0.25, 1]).resolve_exit_thresholds() == [0.25, 1.0]
    assert config.resolve_exit_thresholds([0.1, 0.2]) == [0.1, 0.2]
    assert config.resolve_exit_thresholds(np.float32(0.5)) == [0.5, 0.5]
    assert config.resolve_exit_thresholds(np.array([0.5, 0.25])) == [0.5, 0.25]
    assert config.resolve_exit_thresholds(float("-inf")) == [float("-inf")] * 2


def load(tmp_path, **changes) -> MEViTConfig:
    """An old config file, read as files are."""
    (tmp_path / "config.json").write_text(json.dumps({**OLD, **changes}))
    return AutoConfig.from_pretrained(tmp_path)


def test_an_old_config_loads_without_its_retired_fields(tmp_path):
    config = load(tmp_path)
    assert config.exit_layers == [2, 3, 4] and config.exit_policy == "uncertainty" and config.exit_thresholds is None
    assert not {"patience", "share_uncertainty_predictor", "uncertainty_target"} & config.to_dict().keys()
    assert load(tmp_path, uncertainty_target="error").uncertainty_input == "probabilities"  # training alone read it
    config.save_pretrained(tmp_path)
    assert "uncertainty_target" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(("patience", "threshold"), [(1, 1 - 0.5 / 3), (2, 1 - 1.5 / 3), (3, 1 - 2.5 / 3)])
def test_an_old_patience_becomes_a_threshold(tmp_path, patience, threshold):
    config = load(tmp_path, exit_policy="patience", patience=patience, early_exit=True)
    assert config.early_exit and config.resolve_exit_thresholds() == pytest.approx([threshold] * 2)


@pytest.mark.parametrize(
    "changes", [{"share_uncertainty_predictor": False}, {"uncertainty_input": "hidden_state"}], ids=str
)
def test_an_old_predictor_that_was_retired_is_refused(tmp_path, changes):
    with pytest.raises(
        ValueError, match="predictors of single exits and on hidden states were retired; train .* again"
    ):
        load(tmp_path, **changes)


def test_an_old_calibration_is_converted(tmp_path):
    config = load(tmp_path, exit_thresholds=[0.125, 0.125], early_exit=True, calibration=OLD_CALIBRATION)
    assert config.calibration == {
        "target": {"max_accuracy_drop": 0.02, "confidence": 0.95, "bound": "harm"},
        "operating_point": {
            "policy": "uncertainty",
            "thresholds": [0.125, 0.125],
            "num_samples": 1248,
            "accuracy": 0.7916,
            "full_model_accuracy": 0.7884,
            "cost": 0.6249,
            "harms": 15,
            "corrections": 19,
            "exit_counts": {"2": 555, "3": 380, "4": 313},
        },
        "data": {
            "name": "grocery_store",
            "split": "test",
            "half": "first",
            "sha256": "ec34d92f",
            "image_digests": "",
        },
    }
    again = copy.deepcopy(config)
    again.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).calibration == config.calibration
    with pytest.raises(ValueError, match="were calibrated for exit_policy='uncertainty'"):
        config.exit_policy = "entropy"
        config.validate()


def test_an_old_calibration_of_patience_is_converted(tmp_path):
    old = {name: value for name, value in OLD_CALIBRATION.items() if name not in ("thresholds", "per_exit")}
    old |= {"policy": "patience", "patience": 2, "promise": {"max_cost": 0.7}, "data": None}
    config = load(tmp_path, exit_policy="patience", patience=2, early_exit=True, calibration=old)
    assert config.calibration["operating_point"]["thresholds"] == config.resolve_exit_thresholds() == [0.5, 0.5]
    assert config.calibration["target"] == {"max_cost": 0.7}
    assert config.calibration["data"] is None


def test_the_config_of_another_model_is_refused():
    with pytest.raises(ValueError, match="model_type of a checkpoint must be 'mevit', got 'vit'; .*from_vit starts"):
        MEViTConfig.from_dict({"model_type": "vit", "hidden_size": 32})
