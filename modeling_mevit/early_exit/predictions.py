# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What every exit of a model says of every image of a data set: all that calibration and evaluation need.

N images, E exits in ascending order. A setting is what decides where an image leaves: a list of E − 1 thresholds,
or, for `"patience"`, how many exits in a row must agree.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .cost import dynamic_exit_costs
from .exit_policy_mevit import SCORES, agreement, exit_scores, first_exit
from .modeling_mevit import MEViTForImageClassification


Setting = list[float] | int


@dataclass(frozen=True)
class ExitPredictions:
    """Labels, predictions and scores of all exits.

    Args:
        exit_layers: E layer numbers.
        costs: (E,), of an image that leaves there ([`dynamic_exit_costs`]).
        labels: (N,), int64.
        predictions: (N, E), int64.
        scores: policy → (N, E), float32, for every policy that has a score.
    """

    exit_layers: list[int]
    costs: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    scores: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> np.ndarray:
        """(N, E), bool: whether each exit is right."""
        return self.predictions == self.labels[:, None]

    def select(self, images: np.ndarray) -> "ExitPredictions":
        """The record of some of the images, by index or mask."""
        return ExitPredictions(
            self.exit_layers,
            self.costs,
            self.labels[images],
            self.predictions[images],
            {policy: scores[images] for policy, scores in self.scores.items()},
        )

    def places(self, policy: str, setting: Setting) -> np.ndarray:
        """(N,), int64: place of the exit that each image takes, 0 … E − 1."""
        if policy == "patience":
            leaves = agreement(torch.from_numpy(self.predictions))[:, :-1] >= setting
        else:
            leaves = torch.from_numpy(self.scores[policy][:, :-1] < np.asarray(setting, dtype=np.float32))
        return first_exit(leaves).numpy()

    def outcome(self, places: np.ndarray) -> "OperatingPoint":
        """What an early-exit run gives, from the place where each image leaves, (N,)."""
        right = self.right
        taken, last = right[np.arange(len(self)), places], right[:, -1]
        return OperatingPoint(
            images=len(self),
            accuracy=float(taken.mean()),
            full_model_accuracy=float(last.mean()),
            cost=float(self.costs[places].mean()),
            harms=int((last & ~taken).sum()),
            corrections=int((taken & ~last).sum()),
            exit_counts={
                layer: int(count)
                for layer, count in zip(
                    self.exit_layers, np.bincount(places, minlength=len(self.exit_layers)), strict=True
                )
            },
        )


@dataclass(frozen=True)
class OperatingPoint:
    """What an early-exit run gave.

    Args:
        images: N.
        accuracy: of the exits taken.
        full_model_accuracy: of the same images, run to the end.
        cost: mean, relative to the plain ViT.
        harms: images that the last exit gets right and the exit taken wrong.
        corrections: images that the exit taken gets right and the last exit wrong.
        exit_counts: exit layer → number of images that left there.
    """

    images: int
    accuracy: float
    full_model_accuracy: float
    cost: float
    harms: int
    corrections: int
    exit_counts: dict[int, int]

    @property
    def drop(self) -> float:
        """Accuracy lost against the last exit; negative where early exits gain."""
        return (self.harms - self.corrections) / self.images


@torch.no_grad()
def predict_exits(
    model: MEViTForImageClassification, dataset: Dataset, *, batch_size: int = 32, num_workers: int = 0
) -> ExitPredictions:
    """Runs every exit on every image of a data set and shows a progress bar.

    Args:
        model: in eval mode, on the device to run on.
        dataset: of `{"pixel_values": (3, H, W), "labels": int}`, as [`ImageClassificationDataset`] gives them.
        batch_size: images at a time.
        num_workers: processes that read images.

    Raises:
        ValueError: if there are no images, or a score is no number.
    """
    if not len(dataset):
        raise ValueError("there are no images to run the exits on.")
    labels, predictions = [], []
    scores: dict[str, list[np.ndarray]] = {policy: [] for policy in SCORES}
    for batch in tqdm(DataLoader(dataset, batch_size, num_workers=num_workers), desc="exits", unit="batch"):
        outputs = model(batch["pixel_values"].to(model.device), early_exit=False)
        labels.append(batch["labels"].numpy())
        predictions.append(outputs.exit_logits.argmax(-1).cpu().numpy())
        for policy in SCORES:
            given = exit_scores(policy, outputs.exit_logits, outputs.exit_uncertainty).float().cpu()
            if given.isnan().any():
                raise ValueError(f"the model gives scores that are no numbers (policy {policy!r}); is it trained?")
            scores[policy].append(given.numpy())
    config = model.config
    costs = dynamic_exit_costs(config)
    return ExitPredictions(
        exit_layers=list(config.exit_layers),
        costs=np.array([costs[layer] for layer in config.exit_layers]),
        labels=np.concatenate(labels),
        predictions=np.concatenate(predictions),
        scores={policy: np.concatenate(given) for policy, given in scores.items()},
    )
