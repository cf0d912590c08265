# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from PIL import Image

import degrading_photos
from degrading_photos import Step, blur, darken, summary, watch
from measurements import independent_predictions
from modeling_mevit import CalibrationTarget
from modeling_mevit.early_exit.predictions import ExitPredictions
from tests.helpers.images import noise


pytestmark = pytest.mark.one_major

CALIBRATION = {
    "target": CalibrationTarget(max_disagreement=0.02, confidence=0.95).to_dict(),
    "operating_point": {"policy": "margin", "thresholds": [0.5], "num_samples": 300, "disagreements": 1},
}


def step(name: str, disagreement: float, drop: float) -> Step:
    """Of 1,000 images, of which so many disagree and so many are harmed."""
    images = np.arange(1000)
    return Step(name, images < 1000 * disagreement, (images < 1000 * drop).astype(np.int64), 0.9, 0.6)


def test_images_get_blurred_and_darker():
    image = noise(64, 48)
    values = np.asarray(image, dtype=float)
    assert np.array_equal(np.asarray(darken(image, 0.5)), (values * 0.5).astype(np.uint8))
    deviations = [np.asarray(blur(image, share), dtype=float).std() for share in (0.01, 0.04)]
    assert values.std() > deviations[0] > deviations[1]
    # of the shorter side: a larger image is blurred as much
    large = image.resize((480, 640), Image.Resampling.NEAREST)
    assert np.asarray(blur(large, 0.02), dtype=float).std() > deviations[1]


def test_a_step_tells_harm_from_correction():
    predictions = ExitPredictions(
        [1, 2],
        np.array([0.4, 1.0]),
        labels=np.array([0, 0, 0, 0]),
        predictions=np.array([[0, 0], [1, 0], [0, 1], [2, 1]]),
        scores={"margin": np.full((4, 2), 0.1, np.float32)},
    )
    found = degrading_photos.step_of("clean", predictions, "margin", [0.5])
    assert found.differs.tolist() == [False, True, True, True] and found.lost.tolist() == [0, 1, -1, 0]
    assert (found.accuracy, found.cost) == (0.5, 0.4)


def test_a_stream_is_watched_until_the_alarm():
    steps = [step("clean", 0.0, 0.0), step("worse", 0.2, 0.1)]
    found = watch(steps, CALIBRATION, 0.1, 20_000, np.random.default_rng(0))
    assert found["step"] == 1 and 10_000 < found["alarm"] < 11_500
    assert (
        found["cost"] == found["largest"] == pytest.approx(0.1 * (found["alarm"] - 10_000) / found["alarm"], rel=0.3)
    )
    calm = watch(steps[:1], CALIBRATION, 0.1, 20_000, np.random.default_rng(0))
    assert calm["alarm"] is None and calm["cost"] == 0 and 1800 < calm["audited"] < 2200


def test_labels_tell_a_drop_that_the_disagreement_hides():
    """Where many images disagree anyway, and harm comes in the place of disagreements that lose nothing."""
    point = {**CALIBRATION["operating_point"], "disagreements": 60}
    target = CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95, bound="difference").to_dict()
    calibration = {"target": target, "operating_point": point}
    steps = [step("clean", 0.2, 0.0), step("worse", 0.2, 0.1)]
    unlabelled, labelled = (
        watch(steps, calibration, 0.1, 20_000, np.random.default_rng(0), given) for given in (False, True)
    )
    assert unlabelled["alarm"] is None and unlabelled["cost"] == pytest.approx(0.05, rel=0.1)
    assert labelled["step"] == 1 and 10_000 < labelled["alarm"] < 13_000


def test_answers_are_as_a_step_has_them():
    found = Step("any", np.array([False, True, True, True]), np.array([0, 1, -1, 0]), 0.5, 0.5)
    early, full, labels = degrading_photos.answers_of(found, np.array([3, 2, 1, 0, 1]))
    assert (early != full).tolist() == [True, True, True, False, True]
    assert (full == labels)[:3].tolist() == [False, False, True]
    assert (early == labels)[:3].tolist() == [False, True, False]


def test_alarms_are_summed_up():
    steps = [step("clean", 0.0, 0.0), step("worse", 0.2, 0.1)]
    found = [
        {"alarm": 40, "audited": 4, "step": 0, "cost": 0.0, "largest": 0.0},
        {"alarm": 80, "audited": 8, "step": 1, "cost": 0.005, "largest": 0.005},
        {"alarm": 90, "audited": 9, "step": 1, "cost": 0.008, "largest": 0.02},
        {"alarm": None, "audited": 10, "step": None, "cost": 0.05, "largest": 0.05},
    ]
    result = summary(found, steps, 100)
    assert (result["alarms"], result["clean"], result["in_time"]) == (0.75, 0.25, 0.5)
    assert (result["median_alarm"], result["median_step"], result["largest_cost"]) == (80, "worse", 0.05)


@pytest.mark.slow
def test_a_run_is_calibrated_and_watched(finished, folder, tmp_path, monkeypatch, capsys):
    targets = (CalibrationTarget(max_disagreement=0.5), CalibrationTarget(max_accuracy_drop=0.5))
    monkeypatch.setattr(degrading_photos, "TARGETS", targets)
    sources = []

    def spied(model, directory, source):
        sources.append(source)
        return independent_predictions(model, directory, source)

    monkeypatch.setattr(degrading_photos, "independent_predictions", spied)
    output = tmp_path / "degrading.json"
    options = ["--run", str(finished[0]), "--data", str(folder), "--half", "first"]
    options += ["--images", "3000", "--streams", "3"]
    results = degrading_photos.main([*options, "--audits", "0.5", "--output", str(output)])
    assert json.loads(output.read_text()) == results
    assert [source.half for source in sources] == ["second"]  # what calibrates is not watched
    of_target, of_drop = results["targets"]
    assert [row["labelled"] for row in of_drop["alarms"]] == [False, True] * 2
    assert len(of_target["steps"]) == 11 and [row["change"] for row in of_target["alarms"]] == ["blurred", "darkened"]
    assert of_target["limit"] == 0.5 and of_target["allowed"] == "was aimed at, but not promised"
    out = capsys.readouterr().out
    assert "| blurred 0.04 |" in out and "| 50%, labelled |" in out


def test_an_unknown_half_is_named():
    with pytest.raises(ValueError, match="half must be 'first' or 'second', got 'third'"):
        degrading_photos.DegradingArguments(run="run", data="data", half="third")
