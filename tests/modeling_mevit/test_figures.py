# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
from modeling_mevit.figures import training_curve


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
