# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from modeling_mevit.early_exit.predictions import ExitPredictions
from modeling_mevit.reports.figures import (
    accuracy_cost_curve,
    attention_maps,
    class_changes_figure,
    exit_accuracies,
    images_by_exit,
    training_curve,
)


pytestmark = pytest.mark.one_major


def test_the_curve_shows_loss_and_accuracy_of_each_exit():
    history = [
        {"loss": 3.0, "epoch": 0.5},
        {"loss": 2.0, "epoch": 1.0},
        {
            "eval_loss": 9.0,
            "eval_accuracy": 0.5,
            "eval_accuracy/exit_6": 0.4,
            "eval_accuracy/exit_12": 0.5,
            "epoch": 1.0,
        },
        {"train_runtime": 1.0, "epoch": 1.0},
    ]
    loss_axes, accuracy_axes = training_curve(history, [6, 12]).axes
    assert loss_axes.lines[0].get_xydata().tolist() == [[0.5, 3.0], [1.0, 2.0]]
    assert {line.get_label(): line.get_xydata().tolist() for line in accuracy_axes.lines} == {
        "exit 6": [[1.0, 40.0]],
        "exit 12": [[1.0, 50.0]],
    }


def test_policies_are_drawn_from_all_at_the_first_exit_to_all_at_the_last():
    # the first exit is right on images 0 and 1, the last one on 0, 1 and 3; each score is surest of image 0
    predictions = ExitPredictions(
        exit_layers=[6, 12],
        costs=np.array([0.5, 1.0]),
        labels=np.array([1, 1, 0, 0]),
        predictions=np.array([[1, 1], [1, 1], [1, 1], [1, 0]]),
        scores={
            "margin": np.array([[0.1, 0], [0.2, 0], [0.3, 0], [0.4, 0]], dtype=np.float32),
            "patience": np.array([[0.5, 0], [0.5, 0], [0.5, 0], [0.5, 0.5]], dtype=np.float32),
        },
    )
    figure = accuracy_cost_curve(predictions, plain_accuracy=0.7)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    expected = {
        "margin": [
            [0.5, 50],
            [0.625, 75],
            [0.75, 75],
            [0.875, 75],
            [1, 75],
        ],  # the image that is least sure goes on first
        "patience": [[0.5, 50], [1, 75]],  # one exit agrees with itself; two in a row leave at the last
        "one exit for all images": [[0.5, 50], [1, 75]],
        "oracle (knows which exits are right)": [[0.5, 50], [0.625, 75]],
    }
    for label, points in expected.items():
        np.testing.assert_allclose(lines[label].get_xydata(), points, err_msg=label)
    assert lines["plain ViT (cost 1)"].get_ydata()[0] == pytest.approx(70)
    assert (lines["patience"].get_marker(), lines["margin"].get_marker()) == ("x", "None")
    assert [text.get_text() for text in axes.texts] == ["6", "12"]


def test_exits_are_drawn_at_their_cost_with_the_plain_vit_as_a_line():
    seeds = np.array([[0.5, 0.7], [0.6, 0.8]])
    figure = exit_accuracies([6, 12], seeds, [0.44, 0.93], np.array([0.72, 0.76]), np.array([[0.5, 0.7], [0.6, 0.75]]))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["plain ViT (cost 1)"].get_ydata()[0] == pytest.approx(74)
    np.testing.assert_allclose(lines["early exit, calibrated"].get_xydata(), [[0.5, 70], [0.6, 75]])
    (points,) = axes.containers
    np.testing.assert_allclose(points[0].get_xydata(), [[0.44, 55], [0.93, 75]])
    assert [text.get_text() for text in axes.texts] == ["6", "12"]


def test_classes_are_drawn_in_ascending_order_without_those_that_have_no_images():
    figure = class_changes_figure(np.array([0.1, -0.2, np.nan, 0.0]))
    (axes,) = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], [-20, 0, 10])
    assert axes.get_xlabel() == "class (2 of 3 lose nothing)"


def test_attention_is_drawn_over_each_image():
    maps = np.random.default_rng(0).random((2, 4, 3, 3))
    figure = attention_maps(np.zeros((2, 6, 6, 3)), maps, layers=[1, 4])
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "layer 1", "layer 4"]
    drawn = figure.axes[5].images[1].get_array()  # second image, layer 4
    np.testing.assert_allclose(drawn, maps[1, 3] / maps[1, 3].max())


def test_images_stand_in_the_row_of_their_exit():
    images = np.stack([np.full((2, 2, 3), value) for value in (0.1, 0.2, 0.3)])
    figure = images_by_exit(images, np.array([12, 6, 12]), [6, 12], most=4)
    shown = [
        [axes.images[0].get_array().max() for axes in figure.axes[start : start + 4] if axes.images]
        for start in (0, 4)
    ]
    assert shown == [[0.2], [0.1, 0.3]]
    assert figure.axes[4].get_title(loc="left") == "exit 12: 2 images"
