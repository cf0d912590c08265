# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from modeling_mevit.early_exit.cost import dynamic_exit_costs, static_exit_costs
from modeling_mevit.early_exit.evaluation import class_changes, evaluate, plain_vit, run_early_exit
from modeling_mevit.early_exit.predictions import predict_exits
from tests.helpers.models import tiny_model


class Images(torch.utils.data.Dataset):
    def __init__(self, count: int = 30):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(count, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": index % 5}


@torch.no_grad()
def test_the_record_holds_what_the_model_says():
    model, images = tiny_model(), Images()
    record = predict_exits(model, images, batch_size=8)
    outputs = model(images.pixel_values)
    assert record.exit_layers == [2, 3, 4]
    assert record.labels.tolist() == [index % 5 for index in range(30)]
    assert record.predictions.tolist() == outputs.exit_logits.argmax(-1).tolist()
    assert set(record.scores) == {"uncertainty", "confidence", "entropy", "margin"}
    np.testing.assert_allclose(record.scores["uncertainty"], outputs.exit_uncertainty.numpy(), atol=1e-5)
    assert record.costs.tolist() == list(dynamic_exit_costs(model.config).values())


@pytest.mark.parametrize("policy", ["margin", "patience"])
@torch.no_grad()
def test_the_run_is_what_the_record_foretells(policy):
    model, images = tiny_model(exit_policy=policy), Images()
    record = predict_exits(model, images)
    setting = 2
    if policy == "margin":
        setting = [float(np.median(record.scores["margin"][:, exit_index])) + 1e-4 for exit_index in (0, 1)]
        model.config.exit_thresholds = setting
    run = run_early_exit(model, images, batch_size=8)
    places = record.places(policy, setting)
    assert len(set(places.tolist())) > 1
    assert run.exit_layer.tolist() == [record.exit_layers[place] for place in places]
    assert run.predictions.tolist() == record.predictions[np.arange(30), places].tolist()

    results = evaluate(model, record, run)
    assert results["early_exit"]["accuracy"] == record.outcome(places).accuracy
    assert results["early_exit"]["cost"] == pytest.approx(record.costs[places].mean())
    assert sum(results["early_exit"]["exit_counts"].values()) == 30
    assert results["early_exit"]["time"] == pytest.approx(run.seconds / run.plain_seconds)
    assert [row["cost"] for row in results["exits"]] == list(static_exit_costs(model.config).values())
    assert 0 <= results["policies"]["margin"]["auroc"]["2"] <= 1
    assert results["policies"]["margin"]["area"] <= results["policies"]["margin"]["oracle"]


@torch.no_grad()
def test_the_plain_vit_shares_the_weights():
    model, pixel_values = tiny_model(), Images().pixel_values
    plain = plain_vit(model)
    torch.testing.assert_close(plain(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=0)
    assert {id(p) for p in plain.parameters()} <= {id(p) for p in model.parameters()}


def test_a_model_that_gives_no_numbers_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.exits["3"].classifier.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores that are no numbers"):
        predict_exits(model, Images())
    with pytest.raises(ValueError, match="there are no images"):
        predict_exits(model, Images(0))


def test_class_changes_by_hand():
    labels = np.array([0, 0, 2, 2, 3])
    last = np.array([[0, 0, 2, 1, 0], [0, 1, 2, 2, 3]])
    early = np.array([[0, 1, 2, 2, 3], [0, 1, 2, 2, 0]])
    changes = class_changes(labels, early, last, num_labels=5)
    assert changes[[0, 2, 3]].tolist() == [-0.25, 0.25, 0.0]  # gains and losses of class 3 cancel exactly
    assert np.isnan(changes[[1, 4]]).all()
    assert class_changes(labels, early[0], last[0], num_labels=5)[2] == 0.5
