# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What every exit says of every image of a data set: all that calibration and evaluation need.

N images, E exits in ascending order.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..configuration_mevit import MEViTConfig
from ..exit_policy_mevit import EXIT_POLICIES, combine_exits, exit_scores, first_exit
from ..modeling_mevit import MEViTOutput
from .cost import dynamic_exit_costs


class Predictor(Protocol):
    """What can be calibrated and evaluated: a `MEViTForImageClassification`, or a `MEViTCascade` of its export."""

    config: MEViTConfig

    @property
    def device(self) -> torch.device: ...

    @property
    def precision(self) -> str: ...

    def made_for(self) -> dict[str, Any]: ...

    def __call__(self, pixel_values: Tensor, *, early_exit: bool | None = None) -> MEViTOutput: ...

    def to_vit(self) -> Any: ...


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds of early exit, and what they gave on a data set.

    Args:
        policy: exit policy.
        thresholds: E − 1, of the early exits' scores.
        num_samples: N.
        accuracy: of the exits taken; None of images without labels, as the three below that need them.
        full_model_accuracy: of the last exit, on the same images.
        cost: mean, relative to the plain ViT.
        harms: images that the last exit gets right and the exit taken wrong.
        corrections: images that the exit taken gets right and the last exit wrong.
        disagreements: images to which the exit taken gives another label than the last exit, right or wrong.
        exit_counts: exit layer → number of images that left there.
    """

    policy: str
    thresholds: list[float]
    num_samples: int
    accuracy: float | None
    full_model_accuracy: float | None
    cost: float
    harms: int | None
    corrections: int | None
    disagreements: int
    exit_counts: dict[int, int]

    @property
    def drop(self) -> float | None:
        """Accuracy lost against the last exit; negative where early exits gain, None of images without labels."""
        if self.harms is None or self.corrections is None:
            return None
        return (self.harms - self.corrections) / self.num_samples

    @property
    def disagreement(self) -> float:
        """Share of images to which the exit taken gives another label than the last exit; never below the drop."""
        return self.disagreements / self.num_samples

    @property
    def saves(self) -> bool:
        """Whether any image leaves before the last exit."""
        return self.exit_counts[max(self.exit_counts)] < self.num_samples

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, whose keys are strings."""
        return {**asdict(self), "exit_counts": {str(layer): count for layer, count in self.exit_counts.items()}}


@dataclass(frozen=True)
class ExitPredictions:
    """Labels, predictions and scores of all exits, by what they predict with (`config.exit_combination`).

    Args:
        exit_layers: E layer numbers.
        costs: (E,), of an image that leaves there ([`dynamic_exit_costs`]).
        labels: (N,), int64; None of images without labels.
        predictions: (N, E), int64.
        scores: policy → (N, E), float32, low where an exit is sure.
    """

    exit_layers: list[int]
    costs: np.ndarray
    labels: np.ndarray | None
    predictions: np.ndarray
    scores: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.predictions)

    @property
    def correct(self) -> np.ndarray:
        """(N, E), bool: whether each exit is right.

        Raises:
            ValueError: where the images have no labels.
        """
        if self.labels is None:
            raise ValueError(f"accuracy needs labels, and these {len(self)} images have none.")
        return self.predictions == self.labels[:, None]

    def select(self, samples: np.ndarray) -> "ExitPredictions":
        """Those of some of the images, by index or mask."""
        return ExitPredictions(
            self.exit_layers,
            self.costs,
            None if self.labels is None else self.labels[samples],
            self.predictions[samples],
            {policy: scores[samples] for policy, scores in self.scores.items()},
        )

    def harmed(self, indices: np.ndarray) -> np.ndarray:
        """(N,), bool: where the last exit is right and the exit of `indices`, (N,), wrong."""
        correct = self.correct
        return correct[:, -1] & ~correct[np.arange(len(self)), indices]

    def disagrees(self, indices: np.ndarray) -> np.ndarray:
        """(N,), bool: where the exit of `indices`, (N,), gives another label than the last one."""
        return self.predictions[np.arange(len(self)), indices] != self.predictions[:, -1]

    def exit_indices(self, policy: str, thresholds: Sequence[float]) -> np.ndarray:
        """(N,), int64: place of the exit that each image takes, 0 … E − 1, under E − 1 thresholds."""
        leaves = self.scores[policy][:, :-1] < np.asarray(thresholds, dtype=np.float32)
        return first_exit(torch.from_numpy(leaves)).numpy()

    def simulate(self, policy: str, thresholds: Sequence[float]) -> OperatingPoint:
        """What an early-exit run under E − 1 thresholds gives."""
        return self.operating_point(policy, thresholds, self.exit_indices(policy, thresholds))

    def operating_point(self, policy: str, thresholds: Sequence[float], indices: np.ndarray) -> OperatingPoint:
        """What a run gives in which images left at the exits of `indices`, (N,)."""
        accuracy = full_model_accuracy = harms = corrections = None
        if self.labels is not None:
            correct = self.correct
            taken, last = correct[np.arange(len(self)), indices], correct[:, -1]
            accuracy, full_model_accuracy = float(taken.mean()), float(last.mean())
            harms, corrections = int((last & ~taken).sum()), int((taken & ~last).sum())
        counts = np.bincount(indices, minlength=len(self.exit_layers)).tolist()
        return OperatingPoint(
            policy=policy,
            thresholds=list(thresholds),
            num_samples=len(self),
            accuracy=accuracy,
            full_model_accuracy=full_model_accuracy,
            cost=float(self.costs[indices].mean()),
            harms=harms,
            corrections=corrections,
            disagreements=int(self.disagrees(indices).sum()),
            exit_counts=dict(zip(self.exit_layers, counts, strict=True)),
        )


class PredictionCollector:
    """Gathers the outputs of a run of all exits, batch by batch, into [`ExitPredictions`]."""

    def __init__(self, config: MEViTConfig):
        self.config = config
        self._labels: list[np.ndarray] = []
        self._predictions: list[np.ndarray] = []
        self._scores: dict[str, list[np.ndarray]] = {}

    def add(self, outputs: MEViTOutput, labels: Tensor | None) -> None:
        """Adds a batch; either all of them have labels or none has.

        Raises:
            ValueError: where a score is NaN.
        """
        assert outputs.exit_logits is not None and outputs.exit_scores is not None  # all exits were run
        logits = combine_exits(self.config.exit_combination, outputs.exit_logits.float().cpu())
        for policy in EXIT_POLICIES:
            if policy == self.config.exit_policy:
                scores = outputs.exit_scores.float().cpu()
            elif policy == "uncertainty" and outputs.exit_uncertainty is None:
                continue  # an export has the score of its own policy alone, and not every combination has one
            elif policy == "margin" and logits.shape[-1] < 2:
                continue
            else:
                scores = exit_scores(policy, logits, outputs.exit_uncertainty).float().cpu()
            if scores.isnan().any():
                raise ValueError(f"the scores of exit_policy={policy!r} must be numbers, and some are NaN.")
            self._scores.setdefault(policy, []).append(scores.numpy())
        if labels is not None:
            self._labels.append(labels.numpy())
        self._predictions.append(logits.argmax(-1).numpy())

    def result(self) -> ExitPredictions:
        """Everything that was added."""
        costs = dynamic_exit_costs(self.config)
        return ExitPredictions(
            exit_layers=list(self.config.exit_layers),
            costs=np.array([costs[layer] for layer in self.config.exit_layers]),
            labels=np.concatenate(self._labels) if self._labels else None,
            predictions=np.concatenate(self._predictions),
            scores={policy: np.concatenate(scores) for policy, scores in self._scores.items()},
        )


def batches(dataset: Dataset, batch_size: int, num_workers: int, description: str) -> "tqdm[dict[str, Tensor]]":
    """A data set in batches, under a progress bar.

    Raises:
        ValueError: where it has no images.
    """
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("the data set has no images; at least one is needed.")
    return tqdm(DataLoader(dataset, batch_size, num_workers=num_workers), desc=description, unit="batch")


def check_labels(dataset: Dataset, purpose: str) -> None:
    """Checks that the images of a data set have labels: as the data set says, or by its first image.

    Raises:
        ValueError: where they have none.
    """
    has_labels = getattr(dataset, "has_labels", None)
    if has_labels is None:
        has_labels = not len(dataset) or "labels" in dataset[0]  # type: ignore[arg-type]
    if not has_labels:
        raise ValueError(
            f"{purpose} needs labels, and these {len(dataset)} images have none; without labels, "  # type: ignore[arg-type]
            f"max_disagreement can be calibrated for."
        )


@torch.no_grad()
def predict_exits(
    predictor: Predictor, dataset: Dataset, *, batch_size: int = 32, num_workers: int = 0
) -> ExitPredictions:
    """Runs every exit on every image of a data set and shows a progress bar.

    Args:
        predictor: a model in eval mode, on the device to run on, or the cascade of an export.
        dataset: of `{"pixel_values": (3, H, W), "labels": int}`, or without labels.
        batch_size: images at a time.
        num_workers: processes that read images.

    Raises:
        ValueError: where there are no images, a score is NaN, or the model is in training mode.
    """
    if getattr(predictor, "training", False):
        raise ValueError("the model must be in eval mode to predict, got one in training mode; call model.eval().")
    collector = PredictionCollector(predictor.config)
    for batch in batches(dataset, batch_size, num_workers, "exits"):
        outputs = predictor(batch["pixel_values"].to(predictor.device), early_exit=False)
        collector.add(outputs, batch.get("labels"))
    return collector.result()
