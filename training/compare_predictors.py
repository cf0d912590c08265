# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which uncertainty predictor ranks an exit's errors best, on one trained trunk.

    python training/compare_predictors.py CHECKPOINT --data PATH [--output predictors.json]

Exits stay as they are. Predictors of every input (logits, sorted probabilities, hidden state), shared by all exits or
one each, learn equation 2 on the training photos, augmented as in training; and once more on the validation photos,
which the exits have not learned by heart. Measured on test: AUROC of finding each exit's errors, mean over the exits,
beside that of the scores that need no predictor.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, HfArgumentParser

from modeling_mevit import MEViTConfig, MEViTForImageClassification
from modeling_mevit.configuration_mevit import UNCERTAINTY_INPUTS
from modeling_mevit.data import ImageClassificationDataset, evaluation_transform, load_split, train_transform
from modeling_mevit.exit_policy_mevit import confidence_score, entropy_score, margin_score
from modeling_mevit.loss_mevit import uncertainty_loss, uncertainty_target
from modeling_mevit.early_exit.metrics import ErrorDetection
from modeling_mevit.modeling_mevit import MEViTUncertaintyPredictor


@dataclass
class CompareArguments:
    data: str = field(metadata={"help": "The data set that the checkpoint was trained on."})
    seeds: int = field(default=3, metadata={"help": "Predictors of each kind."})
    epochs: int = field(default=4, metadata={"help": "Passes over the training photos, each augmented anew."})
    learning_rate: float = field(default=1e-3, metadata={"help": "AdamW's, cosine to 0."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


@dataclass(frozen=True)
class ExitStates:
    """What predictors read of N photos at E exits: states (N, E, d), logits (N, E, L) and labels (N,)."""

    states: Tensor
    logits: Tensor
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """(N, E), bool."""
        return self.logits.argmax(-1) == self.labels[:, None]


@torch.no_grad()
def exit_states(model: MEViTForImageClassification, dataset: Dataset) -> ExitStates:
    """Runs the exits of a model in eval mode over a data set."""
    states, logits, labels = [], [], []
    read: dict[str, Tensor] = {}
    hooks = [
        own_exit.register_forward_hook(lambda module, args, output, layer=layer: read.__setitem__(layer, output[0]))
        for layer, own_exit in model.exits.items()
    ]
    for batch in tqdm(DataLoader(dataset, 64), desc="exits", unit="batch"):
        logits.append(model(batch["pixel_values"], early_exit=False).exit_logits)
        states.append(torch.stack([read[layer] for layer in model.exits], dim=1))
        labels.append(batch["labels"])
    for hook in hooks:
        hook.remove()
    return ExitStates(torch.cat(states), torch.cat(logits), torch.cat(labels))


def train_predictor(
    config: MEViTConfig, passes: list[ExitStates], learning_rate: float, seed: int
) -> MEViTUncertaintyPredictor:
    """A new predictor of the config's kind, after as many epochs as there are passes (taken in turn)."""
    torch.manual_seed(seed)
    predictor = MEViTUncertaintyPredictor(config)
    predictor.reset_parameters(config.initializer_range)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate)
    batches = [(states, rows) for states in passes for rows in torch.randperm(len(states.labels)).split(32)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for states, rows in batches:
        logits, labels = states.logits[rows], states.labels[rows]
        target = uncertainty_target(logits, labels, config.uncertainty_target)
        loss = uncertainty_loss(predictor(states.states[rows], logits), target).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return predictor


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains and measures all predictors, and prints a table. Returns what the JSON holds."""
    parser = HfArgumentParser(CompareArguments)
    parser.add_argument("checkpoint", help="Directory or Hub name of a trained model.")
    arguments, positional = parser.parse_args_into_dataclasses(argv)
    model = MEViTForImageClassification.from_pretrained(positional.checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(positional.checkpoint)
    layers = model.config.exit_layers

    def dataset(split: str, transform, seed: int | None = None) -> ImageClassificationDataset:
        return ImageClassificationDataset(load_split(model.config.label2id, arguments.data, split), transform, seed)

    augmented = dataset("train", train_transform(processor), seed=0)
    passes = []
    for epoch in range(arguments.epochs):
        augmented.set_epoch(epoch)
        passes.append(exit_states(model, augmented))
    held_out = exit_states(model, dataset("validation", evaluation_transform(processor)))
    test = exit_states(model, dataset("test", evaluation_transform(processor)))
    # as many updates as on the training photos, within one pass
    repeats = max(1, round(arguments.epochs * len(augmented) / len(held_out.labels)))
    sources = {"train": passes, "validation": [held_out] * repeats}

    def auroc(scores: Tensor) -> dict[str, float]:
        measured = ErrorDetection().compute(
            predictions=scores.numpy(), references=test.right.numpy(), exit_layers=layers
        )
        return {"mean": measured["auroc"], **{str(layer): measured[f"auroc/exit_{layer}"] for layer in layers}}

    results: dict[str, Any] = {
        "photos": {"train": len(augmented), "validation": len(held_out.labels), "test": len(test.labels)},
        "errors_on_train": {
            str(k): e for k, e in zip(layers, (~passes[-1].right).float().mean(0).tolist(), strict=True)
        },
        "without_predictor": {
            "confidence": auroc(confidence_score(test.logits)),
            "entropy": auroc(entropy_score(test.logits)),
            "margin": auroc(margin_score(test.logits)),
        },
        "predictors": [],
    }
    with torch.no_grad():
        results["without_predictor"]["the checkpoint's own predictor"] = auroc(
            model.uncertainty(test.states, test.logits)
        )
    for source, kind, share, target in product(sources, UNCERTAINTY_INPUTS, (True, False), ("distance", "error")):
        fields = {**model.config.to_dict(), "uncertainty_input": kind, "share_uncertainty_predictor": share}
        config = MEViTConfig(**{**fields, "uncertainty_target": target})
        measured = []
        for seed in range(arguments.seeds):
            predictor = train_predictor(config, sources[source], arguments.learning_rate, seed)
            with torch.no_grad():
                measured.append(auroc(predictor(test.states, test.logits)))
        means = np.array([one["mean"] for one in measured])
        results["predictors"].append(
            {
                "photos": source,
                "input": kind,
                "shared": share,
                "target": target,
                "auroc": float(means.mean()),
                "std": float(means.std(ddof=1)) if len(means) > 1 else None,
                "seeds": measured,
            }
        )

    print(table_of(results))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=1) + "\n")
    return results


def table_of(results: dict[str, Any]) -> str:
    """Markdown: mean AUROC over the exits, of every kind of predictor and of the scores without one."""
    lines = ["| score | learned on | shared | target | AUROC |", "| --- | --- | --- | --- | --- |"]
    for name, measured in results["without_predictor"].items():
        lines.append(f"| {name} | – | – | – | {measured['mean']:.3f} |")
    for row in results["predictors"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.3f}"
        shared = "yes" if row["shared"] else "no"
        lines.append(f"| {row['input']} | {row['photos']} | {shared} | {row['target']} | {row['auroc']:.3f}{spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
