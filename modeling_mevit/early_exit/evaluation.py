# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""How good a trained model is on a data set: every exit, every policy, and the early-exit run as it really runs."""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..configuration_mevit import MEViTConfig
from ..data.identity import count_known
from .cost import static_exit_costs
from .metrics import area_under, auroc_per_exit, oracle_curve, shared_threshold_curve
from .predictions import ExitPredictions, OperatingPoint, PredictionCollector, Predictor, batches, check_labels


BORDERLINE = 1e-4  # of a score to its threshold: where rounding can decide


@dataclass(frozen=True)
class ExitQuality:
    """One exit for all images.

    Args:
        exit: its layer.
        accuracy: share of images that it gets right.
        cost: of the model cut there ([`static_exit_costs`]).
    """

    exit: int
    accuracy: float
    cost: float


@dataclass(frozen=True)
class PolicyQuality:
    """How well a policy's score tells where to leave.

    Args:
        auroc: exit layer → area under the ROC curve of finding the exit's errors; None where it cannot be told.
        area: mean accuracy of early exit over all mean costs, by one threshold that all exits share.
        oracle: the same for a policy that knows which exits are right.
    """

    auroc: dict[int, float | None]
    area: float
    oracle: float


@dataclass(frozen=True)
class EarlyExitRun:
    """An early-exit run as it is calibrated, and the plain ViT with the same weights on the same batches in turn.

    Args:
        operating_point: what it gave.
        reference: `"plain ViT"`, or `"model.onnx"` for an export, which is its last exit alone.
        images_per_second: of the run, reading images not counted.
        plain_images_per_second: of the reference.
        relative_latency: time of the run relative to the reference's.
        borderline: images with a score within 1e-4 of its threshold at an exit that they reached. In another runtime
            or another batch they may leave at another exit.
    """

    operating_point: OperatingPoint
    reference: str
    images_per_second: float
    plain_images_per_second: float
    relative_latency: float
    borderline: int


@dataclass(frozen=True)
class Evaluation:
    """What [`evaluate`] measured.

    Args:
        num_samples: N.
        exits: each exit alone.
        policies: exit policy → its quality.
        early_exit: the early-exit run; None where early exit is off.
        plain_accuracy: of another model, a plain ViT, on the same images.
        calibration_images: how many of the images chose the thresholds, as far as can be told.
        data: name, split, half and SHA-256 of the images, where the data set tells them.
        exit_combination: what the exits predicted with, one of `EXIT_COMBINATIONS`.
        precision: what was computed in, such as `"float32"`.
        predictions: of every exit on every image.
    """

    num_samples: int
    exits: list[ExitQuality]
    policies: dict[str, PolicyQuality]
    early_exit: EarlyExitRun | None
    plain_accuracy: float | None
    calibration_images: int
    data: dict[str, Any] | None
    exit_combination: str
    precision: str
    predictions: ExitPredictions

    def with_plain(self, accuracy: float) -> "Evaluation":
        """The same, beside the accuracy of a plain ViT on these images."""
        return replace(self, plain_accuracy=accuracy)

    def to_dict(self) -> dict[str, Any]:
        """All but the predictions, as JSON holds it."""
        content = asdict(replace(self, early_exit=None, predictions=None))  # type: ignore[arg-type]
        del content["predictions"]
        for policy in content["policies"].values():
            policy["auroc"] = {str(layer): area for layer, area in policy["auroc"].items()}
        if self.early_exit is not None:
            content["early_exit"] = {
                **asdict(self.early_exit),
                "operating_point": self.early_exit.operating_point.to_dict(),
            }
        return content


@torch.no_grad()
def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    *,
    allow_calibration_images: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Evaluation:
    """Measures every exit, every policy and, where early exit is on, the early-exit run. Shows a progress bar.

    Args:
        predictor: a model in eval mode, on the device to run on, or the cascade of an export.
        dataset: of `{"pixel_values": (3, H, W), "labels": int}`; an [`ImageClassificationDataset`] also tells which
            images these are.
        allow_calibration_images: whether images that chose the thresholds may be among them.
        batch_size: images at a time.
        num_workers: processes that read images.

    Raises:
        ValueError: where there are no images or no labels, a score is NaN, or images chose the thresholds, as far as
            can be told.
    """
    check_labels(dataset, "evaluation")
    config = predictor.config
    calibration_images = count_calibration_images(config, dataset)
    if calibration_images and not allow_calibration_images:
        raise ValueError(
            f"{calibration_images} of these {len(dataset)} images chose the thresholds, so the result would be too "  # type: ignore[arg-type]
            f"good; evaluate on others, or allow them (--force)."
        )
    plain = predictor.to_vit() if config.early_exit else None
    collector = PredictionCollector(config)
    exit_layers: list[np.ndarray] = []
    seconds = plain_seconds = 0.0
    for batch in batches(dataset, batch_size, num_workers, "evaluation"):
        pixel_values = batch["pixel_values"].to(predictor.device)
        collector.add(predictor(pixel_values, early_exit=False), batch["labels"])
        if plain is None:
            continue
        if not exit_layers:  # what the first call of each sets up is not counted
            predictor(pixel_values, early_exit=True)
            plain(pixel_values)
        outputs, taken = _timed(predictor, pixel_values, early_exit=True)
        _, plain_taken = _timed(plain, pixel_values)
        exit_layers.append(outputs.exit_layer.cpu().numpy())
        seconds, plain_seconds = seconds + taken, plain_seconds + plain_taken

    predictions = collector.result()
    reference = "plain ViT" if isinstance(predictor, torch.nn.Module) else "model.onnx"
    describe = getattr(dataset, "describe", None)
    return Evaluation(
        num_samples=len(predictions),
        exits=_exits(predictions, config),
        policies={policy: _policy(predictions, scores) for policy, scores in predictions.scores.items()},
        early_exit=_early_exit_run(predictions, config, exit_layers, reference, seconds, plain_seconds)
        if exit_layers
        else None,
        plain_accuracy=None,
        calibration_images=calibration_images,
        data=_without_digests(describe()) if describe else None,
        exit_combination=config.exit_combination,
        precision=predictor.precision,
        predictions=predictions,
    )


@torch.no_grad()
def classifier_accuracy(
    model: torch.nn.Module, dataset: Dataset, *, batch_size: int = 32, num_workers: int = 0
) -> float:
    """Accuracy of any image classifier in eval mode, a plain ViT say: of its `logits`."""
    correct = []
    parameter = next(model.parameters())
    for batch in batches(dataset, batch_size, num_workers, type(model).__name__):
        logits = model(batch["pixel_values"].to(parameter.device, parameter.dtype)).logits
        correct.append(logits.argmax(-1).cpu() == batch["labels"])
    return torch.cat(correct).float().mean().item()


def count_calibration_images(config: MEViTConfig, dataset: Dataset) -> int:
    """How many images of a data set chose the thresholds, by the digests that the config keeps."""
    data = (config.calibration or {}).get("data")
    hashes = getattr(dataset, "image_hashes", None)
    if not data or hashes is None:
        return 0
    if data.get("image_digests"):
        return count_known(hashes, data["image_digests"])
    # calibrated before digests were kept: a split is known as a whole, and its halves hold no image of each other
    given = dataset.describe()  # type: ignore[attr-defined]
    is_same_split = all(given[name] == data[name] for name in ("name", "split"))
    overlaps = is_same_split and (given["half"] == data["half"] or None in (given["half"], data["half"]))
    return len(hashes) if overlaps or given["sha256"] == data["sha256"] else 0


def class_changes(labels: np.ndarray, predictions: np.ndarray, reference: np.ndarray, num_labels: int) -> np.ndarray:
    """Accuracy of each class by some predictions, less its accuracy by others.

    Args:
        labels: (N,).
        predictions: (..., N), of an early exit say, for one seed or several, of which the mean is taken.
        reference: (..., N), of the last exit.
        num_labels: L.

    Returns:
        (L,), in −1 … 1; NaN for a class without images.
    """
    correct, correct_at_last = (np.reshape(given == labels, (-1, len(labels))) for given in (predictions, reference))
    gained = correct.sum(0) - correct_at_last.sum(0)  # (N,), whole numbers, so that gains and losses cancel exactly
    counts = len(correct) * np.bincount(labels, minlength=num_labels)
    sums = np.bincount(labels, weights=gained, minlength=num_labels)
    return np.divide(sums, counts, out=np.full(num_labels, np.nan), where=counts > 0)


def _without_digests(data: dict[str, Any] | None) -> dict[str, Any] | None:
    return data and {name: value for name, value in data.items() if name != "image_digests"}


def _exits(predictions: ExitPredictions, config: MEViTConfig) -> list[ExitQuality]:
    costs, accuracies = static_exit_costs(config), predictions.correct.mean(0).tolist()
    return [
        ExitQuality(layer, accuracy, costs[layer])
        for layer, accuracy in zip(predictions.exit_layers, accuracies, strict=True)
    ]


def _policy(predictions: ExitPredictions, scores: np.ndarray) -> PolicyQuality:
    correct, costs = predictions.correct, predictions.costs
    areas = auroc_per_exit(scores, correct)
    return PolicyQuality(
        auroc={
            layer: None if np.isnan(area) else area for layer, area in zip(predictions.exit_layers, areas, strict=True)
        },
        area=area_under(*shared_threshold_curve(scores, correct, costs), costs),
        oracle=area_under(*oracle_curve(correct, costs), costs),
    )


def _early_exit_run(
    predictions: ExitPredictions,
    config: MEViTConfig,
    exit_layers: list[np.ndarray],
    reference: str,
    seconds: float,
    plain_seconds: float,
) -> EarlyExitRun:
    """The run in whose batches images left at `exit_layers`."""
    thresholds = config.resolve_exit_thresholds()
    indices = np.searchsorted(predictions.exit_layers, np.concatenate(exit_layers))
    distance = np.abs(predictions.scores[config.exit_policy][:, :-1] - np.asarray(thresholds))
    reached = np.arange(len(thresholds)) <= indices[:, None]  # (N, E − 1)
    return EarlyExitRun(
        operating_point=predictions.operating_point(config.exit_policy, thresholds, indices),
        reference=reference,
        images_per_second=len(predictions) / seconds,
        plain_images_per_second=len(predictions) / plain_seconds,
        relative_latency=seconds / plain_seconds,
        borderline=int(((distance < BORDERLINE) & reached).any(1).sum()),
    )


def _timed(run: Any, pixel_values: torch.Tensor, **arguments: Any) -> tuple[Any, float]:
    on_accelerator = pixel_values.device.type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    outputs = run(pixel_values, **arguments)
    if on_accelerator:
        torch.accelerator.synchronize()
    return outputs, time.perf_counter() - start
