# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported cascade in place of the model: called, calibrated and evaluated like it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_mevit import CalibrationTarget, MEViTCascade, calibrate, evaluate, export
from modeling_mevit.early_exit.predictions import predict_exits
from modeling_mevit.onnx.cascade_mevit import Cascade, run
from modeling_mevit.onnx.export import ExportError, compare_cascade
from tests.helpers.exports import run_in_parts
from tests.helpers.models import thirds_as_thresholds, tiny_model


@pytest.fixture(scope="module")
def dataset() -> list[dict]:
    pixel_values = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        labels = tiny_model()(pixel_values, early_exit=False).logits.argmax(-1)
    labels[:10] = (labels[:10] + 1) % 5  # so that exits can also be right where the last one is wrong
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixel_values, labels, strict=True)]


@pytest.mark.parametrize("batch", [0, 1, 3, 8])
@torch.no_grad()
def test_the_cascade_is_the_model(exported, calibrated_model, images, batch):
    cascade = MEViTCascade.from_pretrained(exported)
    for settings in ({}, {"early_exit": True, "exit_thresholds": 0.5}):
        expected, given = (one(images[:batch], **settings) for one in (calibrated_model, cascade))
        assert given.exit_layer.tolist() == expected.exit_layer.tolist()
        torch.testing.assert_close(given.logits, expected.logits, atol=1e-4, rtol=0)
        if batch == 8:
            assert len(expected.exit_layer.unique()) > 1  # so that compaction is seen
    given = cascade(images[:batch].half(), early_exit=False)
    assert given.exit_layer is None and given.exit_logits.shape == (batch, 3, 5)
    if not batch:  # which a ViT cannot run to its end
        return
    expected = calibrated_model(images[:batch].half(), early_exit=False)
    for name in ("logits", "exit_logits", "exit_scores", "exit_uncertainty"):
        torch.testing.assert_close(given[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 4, "exit_policy": "patience", "exit_thresholds": 1 - 1.5 / 3},  # two exits in a row
        {"exit_policy": "entropy", "exit_layers": [1, 4]},
        {"exit_policy": "confidence", "attn_implementation": "eager"},
        {"uncertainty_input": "probabilities"},
    ],
)
@torch.no_grad()
def test_policies_and_predictors(tmp_path, processor, images, settings):
    model = tiny_model(**settings)
    if model.config.exit_thresholds is None:
        model.config.exit_thresholds = thirds_as_thresholds(model, images)
    export(model, processor, tmp_path / "out", exits=[4], cascade=True)  # which turns early exit on in the export
    model.config.early_exit = True
    expected, given = model(images), MEViTCascade.from_pretrained(tmp_path / "out")(images)
    assert given.exit_layer.tolist() == expected.exit_layer.tolist()
    assert len(expected.exit_layer.unique()) > 1
    torch.testing.assert_close(given.logits, expected.logits, atol=1e-4, rtol=0)
    expected = model(images, early_exit=False)
    given = MEViTCascade.from_pretrained(tmp_path / "out")(images, early_exit=False)
    torch.testing.assert_close(given.exit_scores, expected.exit_scores, atol=1e-4, rtol=0)


def test_predictions_of_the_export_are_those_of_the_model(exported, calibrated_model, dataset):
    expected = predict_exits(calibrated_model, dataset)
    given = predict_exits(MEViTCascade.from_pretrained(exported), dataset)
    assert given.exit_layers == expected.exit_layers and given.costs.tolist() == expected.costs.tolist()
    np.testing.assert_array_equal(given.predictions, expected.predictions)
    assert set(given.scores) == set(expected.scores)
    for policy, scores in given.scores.items():
        np.testing.assert_allclose(scores, expected.scores[policy], atol=1e-4)


def test_evaluation_of_the_export_is_that_of_the_model(exported, calibrated_model, dataset):
    expected = evaluate(calibrated_model, dataset)
    given = evaluate(MEViTCascade.from_pretrained(exported), dataset)
    assert given.exits == expected.exits
    assert given.early_exit.operating_point == expected.early_exit.operating_point
    assert given.early_exit.operating_point.saves
    assert given.early_exit.relative_latency == pytest.approx(
        given.early_exit.plain_images_per_second / given.early_exit.images_per_second
    )


def test_calibration_of_the_export_is_that_of_the_model(exported, calibrated_model, dataset, images):
    cascade = MEViTCascade.from_pretrained(exported)
    target = CalibrationTarget(max_cost=0.8)
    expected, given = calibrate(calibrated_model, dataset, target), calibrate(cascade, dataset, target)
    thresholds = given.operating_point.thresholds
    assert thresholds == pytest.approx(expected.operating_point.thresholds, abs=1e-4)
    assert replace(given.operating_point, thresholds=[]) == replace(expected.operating_point, thresholds=[])
    before = cascade(images).exit_layer.tolist()
    given.apply_to(cascade.config)
    assert cascade(images).exit_layer.tolist() == cascade(images, exit_thresholds=thresholds).exit_layer.tolist()
    assert cascade(images).exit_layer.tolist() != before


@torch.no_grad()
def test_the_last_exit_alone_is_the_plain_vit(exported, calibrated_model, images):
    plain = MEViTCascade.from_pretrained(exported).to_vit()
    torch.testing.assert_close(plain(images).logits, calibrated_model.to_vit()(images).logits, atol=1e-4, rtol=0)
    assert plain.device == torch.device("cpu")


def test_an_export_without_the_last_exit_has_no_plain_vit(exported, tmp_path):
    copied = shutil.copytree(exported, tmp_path / "copied")
    (copied / "model.onnx").unlink()
    with pytest.raises(ValueError, match="copied has no model.onnx; export the last exit too"):
        MEViTCascade.from_pretrained(copied).to_vit()


def test_what_the_export_cannot_do_is_named(exported, images):
    cascade = MEViTCascade.from_pretrained(exported)
    with pytest.raises(ValueError, match="exit_thresholds need early_exit=True"):
        cascade(images, early_exit=False, exit_thresholds=0.5)
    with pytest.raises(ValueError, match="exit_thresholds must be one number, or 2"):
        cascade(images, exit_thresholds=[0.5])
    cascade.config.exit_policy = "margin"
    with pytest.raises(ValueError, match="exit_policy must be 'uncertainty', whose score was exported, got 'margin'"):
        cascade(images)


# Exits that are combined


@pytest.mark.parametrize("policy", ["uncertainty", "margin", "patience"])  # by a predictor, of logits, over exits
@torch.no_grad()
def test_combined_exits_are_those_of_the_model(tmp_path, processor, images, dataset, policy):
    model = tiny_model(exit_policy=policy, exit_combination="mean", exit_layers=[1, 2, 4])
    model.config.exit_thresholds = [0.5] * 2 if policy == "patience" else thirds_as_thresholds(model, images)
    export(model, processor, tmp_path / "out", exits=[2, 4], cascade=True)
    cascade = MEViTCascade.from_pretrained(tmp_path / "out")
    assert cascade.config.exit_combination == "mean"
    expected, given = (one(images, early_exit=False) for one in (model, cascade))
    for name in ("logits", "exit_logits", "exit_scores"):
        torch.testing.assert_close(given[name], expected[name], atol=1e-4, rtol=0)
    at_the_end = torch.from_numpy(cascade.cascade(images.numpy(), early_exit=False).logits)  # by the last graph
    torch.testing.assert_close(at_the_end, expected.logits, atol=1e-4, rtol=0)

    model.config.early_exit = True
    early = model(images)
    assert len(early.exit_layer.unique()) > 1
    one_by_one = [cascade(image[None]) for image in images]
    for logits, exit_layer in (
        (cascade(images).logits, cascade(images).exit_layer),
        (torch.cat([one.logits for one in one_by_one]), torch.cat([one.exit_layer for one in one_by_one])),
    ):
        assert exit_layer.tolist() == early.exit_layer.tolist()
        torch.testing.assert_close(logits, early.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(cascade(images).exit_score, early.exit_score, atol=1e-4, rtol=0)
    parts = run_in_parts(tmp_path / "out", images.numpy(), [1, 2], early_exit=True)
    assert parts.exit_layer.tolist() == early.exit_layer.tolist()
    np.testing.assert_allclose(parts.logits, early.logits, atol=1e-4)
    np.testing.assert_allclose(parts.exit_score, early.exit_score, atol=1e-4)

    for file, exit_layer in (("exit_2.onnx", 2), ("model.onnx", 4)):
        cut = model.truncate(exit_layer)(images)
        answers = run(cascade.cascade.open(file), {"pixel_values": images.numpy()})
        assert set(answers) == ({"logits"} if policy == "patience" else {"logits", "score"})
        np.testing.assert_allclose(answers["logits"], cut.logits, atol=1e-4)
        if policy != "patience":
            np.testing.assert_allclose(answers["score"], cut.exit_scores[:, -1], atol=1e-4)

    predicted, by_cascade = (predict_exits(one, dataset) for one in (model, cascade))
    np.testing.assert_array_equal(by_cascade.predictions, predicted.predictions)
    for name, scores in by_cascade.scores.items():
        np.testing.assert_allclose(scores, predicted.scores[name], atol=1e-4)
    assert (
        predicted.predictions.tolist()
        != model(  # so that the test can fail
            torch.stack([one["pixel_values"] for one in dataset]), early_exit=False
        )
        .exit_logits.argmax(-1)
        .tolist()
    )


@pytest.fixture(scope="module")
def combined(tmp_path_factory, processor):
    """An export of combined exits; not to be changed."""
    model = tiny_model(exit_policy="margin", exit_combination="mean", exit_thresholds=[0.6, 0.7])
    return export(model, processor, tmp_path_factory.mktemp("combined") / "out", exits=[4], cascade=True).directory


def test_graphs_of_combined_exits_take_and_give_a_sum(combined):
    cascade = MEViTCascade.from_pretrained(combined).cascade
    for stage, query in cascade.stages:
        assert list(stage.outputs)[-3:] == ["normed", "keys", "values"]
        names = list(query.inputs)
        assert names == ["hidden_queries", "normed_queries", "keys", "values", "previous_sum"]
        outputs = {name: shape[1:] for name, shape in query.outputs.items()}
        assert list(outputs) == ["outputs", "logits", "score", "log_probability_sum", "exit_logits"]
        assert outputs["logits"] == outputs["log_probability_sum"] == outputs["exit_logits"] == [5]


def test_no_combination_with_an_image_that_is_no_number_is_sure(combined, images):
    images = images.clone()
    images[2, 0, 0, 0] = float("nan")
    output = MEViTCascade.from_pretrained(combined).cascade(images.numpy(), early_exit=True, exit_thresholds=10.0)
    assert output.exit_layer.tolist() == [2, 2, 4, 2, 2, 2, 2, 2] and np.isnan(output.logits[2]).all()


def test_another_combination_than_was_exported_is_named(exported, combined, images, tmp_path):
    for directory, computed, other in ((exported, "none", "mean"), (combined, "mean", "none")):
        cascade = MEViTCascade.from_pretrained(directory)
        cascade.config.exit_combination = other
        with pytest.raises(
            ValueError, match=f"exit_combination must be '{computed}', which was exported, got '{other}"
        ):
            cascade(images)
        copied = shutil.copytree(directory, tmp_path / other)
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, "exit_combination": other}))
        message = (
            f"exit_combination in config.json must be '{computed}', which the graphs of exit 2 compute, got '{other}"
        )
        with pytest.raises(ValueError, match=message):
            Cascade(copied)
    # older exports do not tell
    copied = shutil.copytree(exported, tmp_path / "older")
    config = json.loads((copied / "config.json").read_text())
    config.pop("exit_combination")
    (copied / "config.json").write_text(json.dumps(config))
    assert MEViTCascade.from_pretrained(copied)(images).exit_layer.shape == (8,)


def test_an_export_whose_combination_differs_is_an_error(combined, monkeypatch):
    model = tiny_model(exit_policy="margin", exit_combination="mean", exit_thresholds=[0.6, 0.7])
    compare_cascade(model, Cascade(combined))
    call = Cascade.__call__

    def shifted(self, *args, **kwargs):
        output = call(self, *args, **kwargs)
        return output._replace(logits=output.logits + 0.5)

    monkeypatch.setattr(Cascade, "__call__", shifted)
    with pytest.raises(
        ExportError, match="logits with which images leave the cascade differ from PyTorch's by 5.00e-01"
    ):
        compare_cascade(model, Cascade(combined))
