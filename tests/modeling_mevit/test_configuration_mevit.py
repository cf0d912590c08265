# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import copy
import json
import warnings

import numpy as np
import pytest
from transformers import AutoConfig

from modeling_mevit import MEViTConfig
from modeling_mevit.configuration_mevit import is_certified, promise_digest, validate_config_fields
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
        "exit_combination": "mean",
        "exit_thresholds": [0.25],
        "early_exit": True,
        "calibration": {
            "operating_point": {"policy": "patience", "thresholds": [0.25]},
            "made_for": {"exit_combination": "mean"},
        },
        "training_images": "AAECAwQFCgsMDQ4P",
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
        *(
            ({"training_images": given}, f"training_images must be base64 of 6 bytes for each image.*; got {shown}")
            for given, shown in [("AAECAwQ", "'AAECAwQ'"), ("AAECAwQ!", "'AAECAwQ!'"), (3, "3"), (["A"], r"\['A'\]")]
        ),
        ({"exit_policy": "luck"}, "exit_policy must be one of 'uncertainty', .*'patience'; got 'luck'"),
        ({"exit_combination": "sum"}, "exit_combination must be one of 'none', 'mean'; got 'sum'"),
        ({"exit_combination": None}, "exit_combination must be one of 'none', 'mean'; got None"),
        (
            {"exit_combination": "mean", "uncertainty_input": "logits"},
            "exit_policy='uncertainty' needs exit_combination='none' or uncertainty_input='probabilities', .*; got "
            "exit_combination='mean' and uncertainty_input='logits'",
        ),
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
        ({**TINY, "exit_thresholds": {0.1: 2, 0.5: 3}}, "must be one number, or 2 .*; got {0.1: 2, 0.5: 3}"),
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
    assert config.exit_combination == "none"
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


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("exit_layers", "six", "a list of layer numbers"),
        ("exit_layers", 6, "a list of layer numbers"),
        ("calibration", 3, "an object as `mevit calibrate` writes it"),
        ("calibration", {"operating_point": [0.5]}, "an object as `mevit calibrate` writes it"),
        ("early_exit", "yes", "true or false"),
        ("hidden_size", "32", "a whole number above 0"),
        ("num_hidden_layers", None, "a whole number above 0"),
        ("num_attention_heads", 5, "divide hidden_size=32"),
        ("patch_size", 0, "a side in pixels"),
        ("image_size", [16, 16, 16], "a side in pixels"),
        ("hidden_act", "gulu", "the name of an activation"),
        ("layer_norm_eps", "small", "a number of at least 0"),
        ("id2label", ["teal"], "an object from class numbers to names"),
        ("dtype", "float99", "the name of a precision"),
    ],
)
def test_malformed_fields_of_a_file_are_named(tmp_path, name, value, allowed):
    with pytest.raises(ValueError, match=f"^{name} must .*{allowed}.*got") as error:
        load(tmp_path, **{name: value})
    assert "\n" not in str(error.value)


def edit_file(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-3},
        {"uncertainty_input": "logits"},
        {"num_hidden_layers": 3, "exit_layers": [2, 3]},
    ],
    ids=str,
)
def test_an_architecture_that_was_edited_by_hand_is_told(tmp_path, changes):
    config = MEViTConfig(**TINY)
    config.save_pretrained(tmp_path)
    edit_file(tmp_path, **changes)
    (name, value), *_ = changes.items()
    with pytest.warns(UserWarning, match=f"config.json were edited since .* {name}={value!r}"):
        loaded = AutoConfig.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # on purpose, now
    with warnings.catch_warnings(action="error"):
        assert AutoConfig.from_pretrained(tmp_path).to_dict()[name] == value


def test_an_architecture_that_was_changed_in_python_is_not_an_edit(tmp_path):
    with warnings.catch_warnings(action="error"):
        config = MEViTConfig(**TINY)
        config.save_pretrained(tmp_path)
        assert MEViTConfig.from_pretrained(tmp_path, num_attention_heads=8).num_attention_heads == 8
        config.num_attention_heads, config.image_size = 8, (16, 32)
        config.save_pretrained(tmp_path)
        assert MEViTConfig.from_pretrained(tmp_path).num_attention_heads == 8
        assert MEViTConfig(**{**config.to_dict(), "num_attention_heads": 4}).num_attention_heads == 4
        edit_file(tmp_path, exit_thresholds=0.5, id2label={"0": "teal"}, label2id={"teal": 0})
        assert MEViTConfig.from_pretrained(tmp_path).num_labels == 1  # weights or thresholds tell these


def test_the_default_architecture_is_bound_too(tmp_path):
    MEViTConfig().save_pretrained(tmp_path)
    edit_file(tmp_path, num_attention_heads=8)
    with pytest.warns(UserWarning, match="num_attention_heads=8"):
        MEViTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("target", "certified"),
    [
        ({"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm"}, True),  # older than `guarantee`
        ({"max_accuracy_drop": 0.01, "max_cost": None, "confidence": None, "bound": None}, False),
        ({"max_disagreement": 0.01, "confidence": 0.95, "guarantee": "probability"}, True),
        ({"max_disagreement": 0.01, "guarantee": "expectation"}, True),
        ({"max_disagreement": 0.01}, False),
        (None, False),
    ],
)
def test_what_is_certified(target, certified):
    assert is_certified({"target": target}) is certified


def certified_config() -> MEViTConfig:
    config = MEViTConfig(**TINY, exit_policy="margin", exit_thresholds=[0.25, 0.5], early_exit=True)
    config.calibration = {
        "target": {"max_accuracy_drop": 0.01, "confidence": 0.95, "bound": "harm"},
        "operating_point": {"policy": "margin", "thresholds": [0.25, 0.5]},
        "data": None,
        "made_for": {**config.made_for(), "dtype": "float32", "weights": "0" * 16},
    }
    config.calibration["made_for"]["promise"] = promise_digest(config.calibration)
    return config


CALIBRATION = {
    "target": {"max_accuracy_drop": 0.01},
    "operating_point": {"policy": "margin", "thresholds": [0.25, 0.5]},
    "data": {"name": "pets", "split": "validation", "half": None, "image_digests": ""},
    "made_for": {"dtype": "float32"},
}


@pytest.mark.parametrize(
    "calibration",
    [
        *({**CALIBRATION, name: 3} for name in CALIBRATION),
        *(
            {**CALIBRATION, "operating_point": point}
            for point in ({"a": 1}, {"policy": 1}, {"policy": "a", "thresholds": 1})
        ),
        *({**CALIBRATION, "data": data} for data in ({"a": 1}, {**CALIBRATION["data"], "image_digests": [1]})),
        *(
            {**CALIBRATION, "data": {**CALIBRATION["data"], name: value}}
            for name, value in [("name", 1), ("image_digests", "AA!A")]
        ),
        *({**CALIBRATION, "made_for": {name: []}} for name in ("dtype", "architecture", "promise")),
        *({"promise": promise, "policy": "margin", "measured": {}} for promise in (None, {}, {"a": 1})),
        *("text", 3, []),
    ],
    ids=str,
)
def test_a_calibration_that_is_malformed_is_named(tmp_path, calibration):
    certified_config().save_pretrained(tmp_path)
    MEViTConfig(**{**TINY, "calibration": CALIBRATION})
    edit_file(tmp_path, calibration=calibration)
    with pytest.raises(ValueError, match="calibration must be an object as `mevit calibrate` writes it, got"):
        MEViTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_thresholds": [0.25, 0.75]}, r"gone: exit_thresholds are \[0.25, 0.75\], not \[0.25, 0.5\]"),
        ({"exit_thresholds": None, "early_exit": False}, "gone: exit_thresholds are gone"),
        (
            {"exit_policy": "entropy", "exit_thresholds": 1.0},
            "gone: exit_policy is 'entropy', not 'margin'; exit_thresholds are",
        ),
        ({"exit_combination": "mean"}, "gone: exit_combination is 'mean', not 'none'"),
        ({"exit_layers": [1, 3, 4]}, r"gone: exit_layers are \[1, 3, 4\], not \[2, 3, 4\]"),
        ({"num_attention_heads": 8}, "gone: fields of the architecture"),
    ],
    ids=str,
)
def test_a_certificate_for_something_else_is_told_while_loading(tmp_path, changes, message):
    config = certified_config()
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        assert not MEViTConfig.from_pretrained(tmp_path).calibration_mismatches()
    edit_file(tmp_path, architecture_digest=None, **changes)
    with pytest.warns(UserWarning, match=message):
        MEViTConfig.from_pretrained(tmp_path)


def test_thresholds_that_promise_nothing_can_be_edited(tmp_path):
    config = certified_config()
    config.calibration["target"] = {"max_cost": 0.7}
    config.save_pretrained(tmp_path)
    edit_file(tmp_path, exit_thresholds=0.75)
    with warnings.catch_warnings(action="error"):
        MEViTConfig.from_pretrained(tmp_path)


def test_a_certificate_is_bound_to_how_exits_are_combined(tmp_path):
    older = certified_config()
    del older.calibration["made_for"]["exit_combination"]  # as all were written before there was a choice
    older.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        assert MEViTConfig.from_pretrained(tmp_path).exit_combination == "none"
    with pytest.warns(UserWarning, match="certificate of early exit is gone: exit_combination is 'mean', not 'none'"):
        config = MEViTConfig.from_pretrained(tmp_path, exit_combination="mean")
    config.calibration["made_for"] = config.made_for()  # as calibrating again writes it
    assert not config.calibration_mismatches()
    config.exit_combination = "none"
    assert config.calibration_mismatches() == ["exit_combination is 'none', not 'mean'"]
    assert not MEViTConfig(**TINY, exit_combination="mean").calibration_mismatches()  # nothing was calibrated


def test_thresholds_that_promise_nothing_are_of_a_combination_too(tmp_path):
    config = certified_config()
    config.calibration["target"] = {"max_cost": 0.7}
    config.save_pretrained(tmp_path)
    message = "exit_thresholds were chosen for exit_combination='none', got 'mean', .*; `mevit calibrate` chooses them"
    with pytest.warns(UserWarning, match=message):
        switched = MEViTConfig.from_pretrained(tmp_path, exit_combination="mean")
    switched.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=message):
        MEViTConfig.from_pretrained(tmp_path)
    edit_file(tmp_path, exit_thresholds=0.75)  # others than those that were calibrated
    with warnings.catch_warnings(action="error"):
        MEViTConfig.from_pretrained(tmp_path)


def test_the_combination_is_no_part_of_the_architecture(tmp_path):
    assert MEViTConfig(**TINY, exit_combination="mean").made_for() == {
        **MEViTConfig(**TINY).made_for(),
        "exit_combination": "mean",
    }
    MEViTConfig(**TINY).save_pretrained(tmp_path)
    edit_file(tmp_path, exit_combination="mean")
    with warnings.catch_warnings(action="error"):
        assert MEViTConfig.from_pretrained(tmp_path).exit_combination == "mean"
