# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which uncertainty predictor ranks an exit's errors best, on one trained trunk.

    python training/compare_predictors.py CHECKPOINT --data PATH [--output predictors.json]

Exits stay as they are. Predictors of every input (logits, sorted probabilities, hidden state), shared by all exits or
one each, learn equation 2 on the training images, augmented as in training; and once more on the validation images,
which the exits have not learned by heart. Measured on test: AUROC of finding each exit's errors, mean over the exits,
beside that of the scores that need no predictor. The library has what this comparison chose; the others live here.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser

from modeling_mevit import DataSource, ImageClassificationDataset, MEViTForImageClassification
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.data.datasets import load_split
from modeling_mevit.data.image_processing import train_transform
from modeling_mevit.early_exit.metrics import auroc_per_exit
from modeling_mevit.early_exit.predictions import batches
from modeling_mevit.exit_policy_mevit import exit_scores
from modeling_mevit.loss_mevit import uncertainty_loss, uncertainty_target
from modeling_mevit.reports.tables import markdown_table


INPUTS = ("probabilities", "logits", "hidden_state")
TARGETS = ("distance", "error")


@dataclass
class ComparePredictorsArguments:
    """What predictors learn from, and how."""

    data: str = field(metadata={"help": "The data set that the checkpoint was trained on."})
    seeds: int = field(default=3, metadata={"help": "Predictors of each kind."})
    epochs: int = field(default=4, metadata={"help": "Passes over the training images, each augmented anew."})
    learning_rate: float = field(default=1e-3, metadata={"help": "AdamW's, cosine to 0."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


@dataclass(frozen=True)
class ExitStates:
    """What predictors read of N images at E exits: states (N, E, d), logits (N, E, L) and labels (N,)."""

    states: Tensor
    logits: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """(N, E), bool."""
        return self.logits.argmax(-1) == self.labels[:, None]


class Predictor(nn.Module):
    """Equation 3 in every variant: `u_i = σ(wᵀ z_i + b)` of any input z, with w and b shared by the exits or one each.

    It starts as [`MEViTUncertaintyPredictor`] does.
    """

    def __init__(self, given: ExitStates, kind: str, is_shared: bool, std: float):
        super().__init__()
        self.kind = kind
        predictors, size = (
            1 if is_shared else given.logits.shape[1],
            self.features(given.states, given.logits).shape[-1],
        )
        is_probability = kind == "probabilities"
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.zeros(predictors, size), std=std))
        self.bias = nn.Parameter(torch.full((predictors,), 2.0 if is_probability else 0.0))
        if is_probability:
            self.weight.data[:, 0] -= 4

    def features(self, states: Tensor, logits: Tensor) -> Tensor:
        """(N, E, size of z), from states (N, E, d) and logits (N, E, L)."""
        probabilities = logits.softmax(-1).sort(-1, descending=True).values
        return {"probabilities": probabilities, "logits": logits, "hidden_state": states}[self.kind]

    def forward(self, states: Tensor, logits: Tensor) -> Tensor:
        """Uncertainty (N, E)."""
        weight = self.weight.expand(logits.shape[1], -1)
        return torch.sigmoid(torch.einsum("bed,ed->be", self.features(states, logits), weight) + self.bias)


@torch.no_grad()
def exit_states(model: MEViTForImageClassification, dataset: Dataset) -> ExitStates:
    """Runs the exits of a model in eval mode over a data set."""
    states, logits, labels = [], [], []
    read: dict[str, Tensor] = {}
    hooks = [
        own_exit.norm.register_forward_hook(lambda module, args, output, layer=layer: read.__setitem__(layer, output))
        for layer, own_exit in model.exits.items()
    ]
    for batch in batches(dataset, 64, 0, "exits"):
        logits.append(model(batch["pixel_values"], early_exit=False).exit_logits)
        states.append(torch.stack([read[layer] for layer in model.exits], dim=1))
        labels.append(batch["labels"])
    for hook in hooks:
        hook.remove()
    return ExitStates(torch.cat(states), torch.cat(logits), torch.cat(labels))


def target_of(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """(N, E): equation 4 as the library reads it, `"distance"`, or whether the exit is wrong, `"error"`."""
    if target == "error":
        return (logits.argmax(-1) != labels[:, None]).float()
    return uncertainty_target(logits, labels)


def train_predictor(
    passes: list[ExitStates], kind: str, is_shared: bool, target: str, *, std: float, learning_rate: float, seed: int
) -> Predictor:
    """A new predictor after as many epochs as there are passes (taken in turn)."""
    torch.manual_seed(seed)
    predictor = Predictor(passes[0], kind, is_shared, std)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate)
    batches = [(states, samples) for states in passes for samples in torch.randperm(len(states.labels)).split(32)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for states, samples in batches:
        logits, labels = states.logits[samples], states.labels[samples]
        loss = uncertainty_loss(predictor(states.states[samples], logits), target_of(logits, labels, target)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return predictor


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains and measures all predictors, and prints a table. Returns what the JSON holds."""
    parser = HfArgumentParser(ComparePredictorsArguments)
    parser.add_argument("checkpoint", help="Directory or Hub name of a trained model.")
    arguments, positional = parser.parse_args_into_dataclasses(argv)
    model = MEViTForImageClassification.from_pretrained(positional.checkpoint).eval()
    processor = load_image_processor(positional.checkpoint)
    layers, label2id = model.config.exit_layers, model.config.label2id

    rows = load_split(arguments.data, "train", label2id=label2id)
    augmented = ImageClassificationDataset(rows, train_transform(processor), seed=0)
    passes = []
    for epoch in range(arguments.epochs):
        augmented.set_epoch(epoch)
        passes.append(exit_states(model, augmented))
    held_out, test = (
        exit_states(model, DataSource(arguments.data, split).load(label2id, processor))
        for split in ("validation", "test")
    )
    # as many updates as on the training images, within one pass
    repeats = max(1, round(arguments.epochs * len(augmented) / len(held_out.labels)))
    sources = {"train": passes, "validation": [held_out] * repeats}

    def auroc(scores: Tensor) -> dict[str, float]:
        areas = auroc_per_exit(scores.numpy(), test.correct.numpy())
        return {"mean": float(np.nanmean(areas)), **dict(zip(map(str, layers), areas, strict=True))}

    with torch.no_grad():
        own = auroc(model.uncertainty(test.logits))
    results: dict[str, Any] = {
        "num_samples": {"train": len(augmented), "validation": len(held_out.labels), "test": len(test.labels)},
        "errors_on_train": {
            str(k): e for k, e in zip(layers, (~passes[-1].correct).float().mean(0).tolist(), strict=True)
        },
        "without_predictor": {
            **{
                policy: auroc(exit_scores(policy, test.logits, None)) for policy in ("confidence", "entropy", "margin")
            },
            "the checkpoint's own predictor": own,
        },
        "predictors": [],
    }
    for source, kind, is_shared, target in product(sources, INPUTS, (True, False), TARGETS):
        measured = []
        for seed in range(arguments.seeds):
            predictor = train_predictor(
                sources[source],
                kind,
                is_shared,
                target,
                std=model.config.initializer_range,
                learning_rate=arguments.learning_rate,
                seed=seed,
            )
            with torch.no_grad():
                measured.append(auroc(predictor(test.states, test.logits)))
        means = np.array([one["mean"] for one in measured])
        results["predictors"].append(
            {
                "learned_on": source,
                "input": kind,
                "shared": is_shared,
                "target": target,
                "auroc": float(means.mean()),
                "std": float(means.std(ddof=1)) if len(means) > 1 else None,
                "seeds": measured,
            }
        )

    print(table_of(results))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table_of(results: dict[str, Any]) -> str:
    """Markdown: mean AUROC over the exits, of every kind of predictor and of the scores without one."""
    rows: list[tuple[str | None, ...]] = [
        (name, None, None, None, f"{measured['mean']:.3f}") for name, measured in results["without_predictor"].items()
    ]
    for row in results["predictors"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
        shared = "yes" if row["shared"] else "no"
        rows.append((row["input"], row["learned_on"], shared, row["target"], f"{row['auroc']:.3f}{spread}"))
    return markdown_table(("score", "learned on", "shared", "target", "AUROC"), rows)


if __name__ == "__main__":
    main()
