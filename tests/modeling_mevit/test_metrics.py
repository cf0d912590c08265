# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np

from modeling_mevit.metrics import ExitAccuracy


def test_accuracy_of_each_exit():
    predictions = np.array([[1, 2], [0, 0], [3, 3], [1, 1]])
    metrics = ExitAccuracy().compute(predictions=predictions, references=np.array([2, 0, 3, 0]), exit_layers=[6, 12])
    assert metrics == {"accuracy": 0.75, "accuracy/exit_6": 0.5, "accuracy/exit_12": 0.75}


def test_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert ExitAccuracy().compute(predictions=[[1]], references=[1], exit_layers=[12])["accuracy"] == 1
