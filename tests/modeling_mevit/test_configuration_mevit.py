# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from transformers import AutoConfig

from modeling_mevit import MEViTConfig
from modeling_mevit.configuration_mevit import validate_config_fields
from tests.helpers.models import TINY


def test_exits_are_on_the_later_half_by_default():
    assert MEViTConfig().exit_layers == [6, 7, 8, 9, 10, 11, 12]
    assert MEViTConfig(num_hidden_layers=4).exit_layers == [2, 3, 4]
    assert MEViTConfig(num_hidden_layers=1).exit_layers == [1]


def test_survives_saving(tmp_path):
    settings = {
        "exit_layers": [3, 4],
        "num_hidden_layers": 4,
        "share_uncertainty_predictor": False,
        "uncertainty_target": "error",
        "exit_policy": "entropy",
        "image_size": [32, 48],
        "id2label": {0: "A320", 1: "A321"},
    }
    MEViTConfig(**settings).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MEViTConfig)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.num_labels == 2


def test_names_both_auto_classes_when_saved(tmp_path):
    MEViTConfig().save_pretrained(tmp_path)
    auto_map = AutoConfig.from_pretrained(tmp_path).auto_map
    assert auto_map["AutoConfig"].endswith("configuration_mevit.MEViTConfig")
    assert auto_map["AutoModel"] == "modeling_mevit.MEViTForImageClassification"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layers": [0, 12]}, r"exit_layers=\[0, 12\] is out of range for 12 encoder layers; allowed .* 1 to 12"),
        ({"exit_layers": [6, 13]}, r"exit_layers=\[6, 13\] is out of range"),
        ({"exit_layers": [9, 6, 12]}, r"exit_layers=\[9, 6, 12\] is unsorted or names a layer twice"),
        ({"exit_layers": [6, 6, 12]}, r"unsorted or names a layer twice"),
        ({"exit_layers": [6, 9]}, r"exit_layers=\[6, 9\] lacks the last encoder layer; .* with 12 as the last"),
        ({"exit_layers": []}, r"exit_layers=\[\] lacks the last encoder layer"),
        ({"exit_layers": [6.0, 12]}, r"holds something that is no integer"),
        ({"uncertainty_target": "l2"}, r"uncertainty_target='l2' is unknown; allowed are 'distance', 'error'"),
        ({"exit_policy": "margin", "num_labels": 1}, r"exit_policy='margin' needs two labels; the model has 1"),
        ({"exit_policy": "luck"}, r"exit_policy='luck' is unknown; allowed are 'uncertainty', 'confidence'"),
        ({"image_size": 100}, r"image_size=100 cannot be cut into patches of patch_size=16 pixels"),
        ({"image_size": [224, 100]}, r"image_size=\[224, 100\] cannot be cut"),
        ({"image_size": 0}, r"image_size=0 cannot be cut"),
    ],
)
def test_what_allows_no_model_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MEViTConfig(**settings)


def test_names_that_are_no_fields_are_refused():
    validate_config_fields(MEViTConfig, ["hidden_size", "num_labels", "id2label", "exit_layers", "attn_implementation"])
    with pytest.raises(
        ValueError, match="exit_layer, hiden_size is no field of MEViTConfig; allowed are .*exit_layers"
    ):
        validate_config_fields(MEViTConfig, ["hiden_size", "exit_layer", "image_size"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_exit": True}, "early exit needs exit_thresholds"),
        ({"exit_thresholds": [0.1]}, r"exit_thresholds=\[0.1\] do not fit exits \[2, 3, 4\]"),
        ({"exit_policy": "patience", "patience": 4}, "patience=4 is out of range for 3 exits; allowed are 1 to 3"),
        ({"exit_policy": "patience", "exit_thresholds": 0.1}, "have no meaning under exit_policy='patience'"),
        ({"exit_thresholds": [None, 0.5]}, r"exit_thresholds=\[None, 0.5\] do not fit"),
        ({"exit_thresholds": "low"}, "exit_thresholds=low do not fit"),
        ({"exit_thresholds": [float("-inf"), 0.5]}, "cannot be stored, since JSON has no infinity"),
        (
            {
                "exit_policy": "entropy",
                "exit_thresholds": [0.1, 0.2],
                "calibration": {"policy": "margin", "thresholds": [0.1, 0.2]},
            },
            "were chosen for exit_policy='margin'; exit_policy='entropy' needs others",
        ),
        ({"uncertainty_input": "patches"}, "uncertainty_input='patches' is unknown"),
    ],
)
def test_early_exit_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MEViTConfig(**{**TINY, **settings})


def test_one_threshold_serves_all_early_exits():
    assert MEViTConfig(**TINY, exit_thresholds=0.25).resolve_exit_thresholds() == [0.25, 0.25]
    assert MEViTConfig(**TINY, exit_thresholds=[0.25, 0.5]).resolve_exit_thresholds() == [0.25, 0.5]
    assert MEViTConfig(**TINY).resolve_exit_thresholds([0.1, 0.2]) == [0.1, 0.2]
    assert MEViTConfig(**TINY).resolve_exit_thresholds(np.float32(0.5)) == [0.5, 0.5]
    assert MEViTConfig(**TINY).resolve_exit_thresholds(float("-inf")) == [float("-inf")] * 2
