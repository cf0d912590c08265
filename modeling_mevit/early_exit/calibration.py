# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Choosing the thresholds of early exit on held-out images: for a cost budget, or for a bound on the accuracy lost.

One threshold for all early exits is tried after another, from the most careful to the boldest. Without a confidence,
the best one on these images is taken: it fits them, and promises nothing about others. With a confidence, the
thresholds to try are fixed beforehand, and each is tested in turn until the first one fails (fixed-sequence testing;
Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021): all thresholds before it are certified at once,
since a wrong certificate needs the first wrong threshold to pass its own test.
"""

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp
from scipy.stats import binom
from torch.utils.data import Dataset

from ..configuration_mevit import MEViTConfig
from ..exit_policy_mevit import EXIT_POLICIES
from .predictions import ExitPredictions, OperatingPoint, Predictor, predict_exits


BOUNDS = ("harm", "difference")
# Scores are in [0, 1], entropy in [0, ln L]. Those of a trained model crowd near 0, and the uncertainty, a sigmoid,
# near some value in between.
_GRID = np.geomspace(1e-5, 1, 201)
_GRID_OF_UNCERTAINTY = np.linspace(1e-3, 1, 1000)
_MOST_CANDIDATES = 1000  # thresholds to try, whatever the number of images


@dataclass(frozen=True)
class CalibrationTarget:
    """What the thresholds are chosen for: a cost, or an accuracy.

    - `max_cost` alone: the best accuracy within this mean cost, on the calibration images.
    - `max_accuracy_drop` alone: the lowest mean cost that loses at most this much accuracy against the last exit, on
      the calibration images.
    - `max_accuracy_drop` and `confidence`: the lowest mean cost that is certified. With this probability over the
      draw of the calibration images, early exit loses at most that much accuracy on images like them.

    Args:
        max_cost: mean cost relative to the plain ViT.
        max_accuracy_drop: share of all images, 0.01 for one point.
        confidence: probability of the certificate.
        bound: what is tested. `"harm"`, the default: how often the exit taken is wrong and the last one right, by the
            exact binomial tail. `"difference"`: the drop itself, so that corrections count too.

    Raises:
        ValueError: where the arguments do not fit together or a number is out of range.

    Example:

    ```python
    >>> from modeling_mevit.early_exit.calibration import CalibrationTarget

    >>> CalibrationTarget(max_accuracy_drop=0.01, confidence=0.95).bound
    'harm'

    ```
    """

    max_cost: float | None = None
    max_accuracy_drop: float | None = None
    confidence: float | None = None
    bound: str | None = None

    def __post_init__(self) -> None:
        if (self.max_cost is None) == (self.max_accuracy_drop is None):
            raise ValueError(
                f"a calibration target needs either max_cost or max_accuracy_drop, got max_cost={self.max_cost} and "
                f"max_accuracy_drop={self.max_accuracy_drop}."
            )
        if self.max_cost is not None and not self.max_cost > 0:
            raise ValueError(f"max_cost must be above 0 (1 is the plain ViT's cost), got {self.max_cost}.")
        if self.confidence is not None and self.max_accuracy_drop is None:
            raise ValueError(
                f"confidence={self.confidence} needs max_accuracy_drop; a cost is not certified, it is measured."
            )
        if self.bound is not None and self.confidence is None:
            raise ValueError(f"bound={self.bound!r} needs confidence; without it nothing is tested.")
        if self.confidence is None:
            if self.max_accuracy_drop is not None and not 0 <= self.max_accuracy_drop < 1:
                raise ValueError(f"max_accuracy_drop must be at least 0 and below 1, got {self.max_accuracy_drop}.")
            return
        for name in ("max_accuracy_drop", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        if self.bound is None:
            object.__setattr__(self, "bound", BOUNDS[0])
        if self.bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(map(repr, BOUNDS))}, got {self.bound!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The arguments that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found. `print(result)` tells it in words.

    Args:
        target: what the thresholds were chosen for.
        operating_point: the thresholds that were chosen or certified, and what they gave on the calibration images;
            None where none that lets an image leave early is good enough.
        first_failure: with a confidence, the first thresholds that were not certified; None where all were.
        data: the calibration images, as [`ImageClassificationDataset.describe`] tells them.
    """

    target: CalibrationTarget
    operating_point: OperatingPoint | None
    first_failure: OperatingPoint | None = None
    data: dict[str, Any] | None = None

    @property
    def required_sample_size(self) -> int | None:
        """How many images would certify the first thresholds that failed, at their rates; None where none would."""
        failed, target = self.first_failure, self.target
        if failed is None or target.max_accuracy_drop is None or target.confidence is None:
            return None
        rates = failed.harms / failed.num_samples, failed.corrections / failed.num_samples
        return required_sample_size(
            rates[0],
            target.max_accuracy_drop,
            target.confidence,
            bound=target.bound or BOUNDS[0],
            correction_rate=rates[1],
        )

    def apply_to(self, config: MEViTConfig) -> None:
        """Writes thresholds, target and evidence into a model's config and turns early exit on; or off, where there
        are no thresholds."""
        found = self.operating_point
        if found is None:
            disable_early_exit(config)
            return
        thresholds = [max(threshold, 0.0) for threshold in found.thresholds]  # JSON has no infinity; no score is < 0
        config.exit_policy, config.exit_thresholds, config.early_exit = found.policy, thresholds, True
        config.calibration = {
            "target": self.target.to_dict(),
            "operating_point": {**found.to_dict(), "thresholds": thresholds},
            "data": self.data,
        }

    def __str__(self) -> str:
        """What was chosen or certified, on which evidence, and what stood in the way of more."""
        found, failed, target = self.operating_point, self.first_failure, self.target
        drop, confidence = target.max_accuracy_drop, target.confidence
        lines = []
        if found and confidence:
            lines.append(
                f"Certified on {found.num_samples} images, of which {found.harms} were harmed and {found.corrections} "
                f"corrected: with probability {confidence:.0%}, the true accuracy drop is at most {drop:.2%}."
            )
        if not found and not confidence:
            lines.append("No thresholds that let an image leave early are better than running every image to the end.")
        if not found and confidence:
            lines.append(
                f"No thresholds that save cost can be certified for a drop of at most {drop:.2%} with probability "
                f"{confidence:.0%}."
            )
        if failed:
            needed = self.required_sample_size
            more = f"{needed} images would certify them" if needed else "no number of images would certify them"
            lines.append(
                f"The first thresholds that failed have mean cost {failed.cost:.3f}, harm {failed.harms} of "
                f"{failed.num_samples} images ({failed.harms / failed.num_samples:.2%}) and correct "
                f"{failed.corrections}; at these rates {more} by the {target.bound} bound."
            )
        if found:
            counts = ", ".join(f"{count} at exit {layer}" for layer, count in found.exit_counts.items())
            lines.append(
                f"On {found.num_samples} images: accuracy {found.accuracy:.1%} (last exit "
                f"{found.full_model_accuracy:.1%}), mean cost {found.cost:.3f}. Left: {counts}."
            )
        return "\n".join(lines)


def calibrate(
    predictor: Predictor,
    dataset: Dataset,
    target: CalibrationTarget,
    *,
    policy: str | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> CalibrationResult:
    """Chooses the thresholds of early exit on held-out images, for what is asked of them.

    Nothing is changed: [`CalibrationResult.apply_to`] writes the result into a config.

    Args:
        predictor: a model in eval mode, on the device to run on, or the cascade of an export.
        dataset: images that neither trained the model nor chose its recipe, `{"pixel_values": (3, H, W), "labels":
            int}`. An [`ImageClassificationDataset`] also tells which they are, so that evaluation can refuse them.
        target: what the thresholds are chosen for.
        policy: exit policy; the config's by default.
        batch_size: images at a time.
        num_workers: processes that read images.

    Raises:
        ValueError: where the model has one exit only, the policy is unknown, no thresholds are within a cost, or the
            images trained the model and a confidence is asked for.
    """
    config = predictor.config
    policy = policy or config.exit_policy
    if policy not in EXIT_POLICIES:
        raise ValueError(f"policy must be one of {', '.join(map(repr, EXIT_POLICIES))}, got {policy!r}.")
    if len(config.exit_layers) < 2:
        raise ValueError(f"early exit needs at least two exits; the model has one, on layer {config.exit_layers[0]}.")
    describe = getattr(dataset, "describe", None)
    data = describe() if describe else None
    if data:
        check_held_out(data["split"], target.confidence)
    predictions = predict_exits(predictor, dataset, batch_size=batch_size, num_workers=num_workers)
    return calibrate_predictions(predictions, target, policy=policy, num_labels=config.num_labels, data=data)


def calibrate_predictions(
    predictions: ExitPredictions,
    target: CalibrationTarget,
    *,
    policy: str,
    num_labels: int,
    data: dict[str, Any] | None = None,
) -> CalibrationResult:
    """[`calibrate`] from predictions that are there already.

    Args:
        predictions: of every exit on the calibration images.
        target: what the thresholds are chosen for.
        policy: exit policy.
        num_labels: L, of the model.
        data: what tells the calibration images.
    """
    if target.confidence is not None:
        grid = threshold_grid(policy, len(predictions.exit_layers), num_labels)
        certified, first_failure = fixed_sequence_test(predictions, policy, grid, target)
        return CalibrationResult(target, certified, first_failure, data)
    tried = [predictions.simulate(policy, thresholds) for thresholds in shared_thresholds(predictions, policy)]
    chosen = best_within_cost(tried, target.max_cost) if target.max_cost is not None else None
    if target.max_accuracy_drop is not None:
        chosen = cheapest_within_drop(tried, target.max_accuracy_drop)
    return CalibrationResult(target, chosen if chosen and chosen.saves else None, None, data)


def check_held_out(split: str, confidence: float | None) -> None:
    """Checks that a split can certify, where a confidence is asked for.

    Raises:
        ValueError: where it has images that trained the model.
    """
    if confidence is not None and split in ("train", "all"):
        raise ValueError(
            f"the split {split!r} has images that trained the model, so it can certify nothing; take images that were "
            f"held out."
        )


def disable_early_exit(config: MEViTConfig) -> None:
    """Takes the thresholds, and what they promised, out of a model's config, and turns early exit off."""
    config.early_exit, config.exit_thresholds, config.calibration = False, None, None


def shared_thresholds(predictions: ExitPredictions, policy: str) -> list[list[float]]:
    """One threshold for all early exits, midway between neighbouring scores of the predictions.

    Returns:
        Lists of E − 1 thresholds, from the most careful one, under which no image leaves early, to the boldest.
    """
    scores = predictions.scores[policy][:, :-1]
    values = np.unique(scores).astype(np.float64)
    between = np.append((values[:-1] + values[1:]) / 2, values[-1:] + 1)
    chosen = np.linspace(0, len(between) - 1, min(_MOST_CANDIDATES, len(between))).round().astype(int)
    return [[float(threshold)] * scores.shape[1] for threshold in (-math.inf, *between[chosen])]


def threshold_grid(policy: str, num_exits: int, num_labels: int) -> list[list[float]]:
    """One threshold for all early exits, on a grid that no image has a part in.

    Returns:
        Lists of E − 1 thresholds, from the most careful to the boldest.
    """
    grids = {
        "uncertainty": _GRID_OF_UNCERTAINTY,
        "entropy": math.log(num_labels) * _GRID,
        "patience": (np.arange(num_exits) + 0.5) / num_exits,  # midway between the scores there are, 1 − streak/E
    }
    return [[float(threshold)] * (num_exits - 1) for threshold in grids.get(policy, _GRID)]


def best_within_cost(tried: list[OperatingPoint], max_cost: float) -> OperatingPoint:
    """The most accurate of some operating points whose mean cost is at most `max_cost`.

    Raises:
        ValueError: where none is that cheap.
    """
    allowed = [point for point in tried if point.cost <= max_cost]
    if not allowed:
        cheapest = min(point.cost for point in tried)
        raise ValueError(f"max_cost must be at least {cheapest:.3f}, the cost of the first exit, got {max_cost}.")
    return max(allowed, key=lambda point: (point.accuracy, -point.cost))


def cheapest_within_drop(tried: list[OperatingPoint], max_accuracy_drop: float) -> OperatingPoint:
    """The cheapest of some operating points that lose at most `max_accuracy_drop` against the last exit."""
    allowed = [point for point in tried if point.drop <= max_accuracy_drop]
    return min(allowed, key=lambda point: (point.cost, -point.accuracy))


def fixed_sequence_test(
    predictions: ExitPredictions, policy: str, sequence: Iterable[list[float]], target: CalibrationTarget
) -> tuple[OperatingPoint | None, OperatingPoint | None]:
    """The boldest thresholds that are certified for a target with a confidence.

    With probability `target.confidence` over the draw of the images, the true drop is at most
    `target.max_accuracy_drop`.

    Args:
        predictions: on images that had no part in `sequence`, drawn like those to come.
        policy: exit policy.
        sequence: thresholds from the most careful on, fixed beforehand.
        target: with `max_accuracy_drop`, `confidence` and `bound`.

    Returns:
        The boldest certified operating point, None where none that saves anything is certified; and the first one that
        failed, None where all passed.

    Raises:
        ValueError: where the target has no confidence.
    """
    drop, confidence = target.max_accuracy_drop, target.confidence
    if drop is None or confidence is None:
        raise ValueError(f"a test needs a target with max_accuracy_drop and confidence, got {target}.")
    certified = None
    for thresholds in sequence:
        point = predictions.simulate(policy, thresholds)
        if p_value(point, drop, target.bound or BOUNDS[0]) > 1 - confidence:
            return certified, point
        if point.saves:
            certified = point
    return certified, None


def p_value(point: OperatingPoint, max_accuracy_drop: float, bound: str) -> float:
    """Of the hypothesis that the true drop is above `max_accuracy_drop`, by one of `BOUNDS`."""
    if bound == "harm":
        return harm_p_value(point.harms, point.num_samples, max_accuracy_drop)
    return difference_p_value(point.harms, point.corrections, point.num_samples, max_accuracy_drop)


def harm_p_value(harms: int, num_samples: int, max_accuracy_drop: float) -> float:
    """Exact binomial p-value of the hypothesis that the harm rate is above `max_accuracy_drop`.

    The harm rate is P(last exit right and exit taken wrong), which is never below the drop.
    """
    return float(binom.cdf(harms, num_samples, max_accuracy_drop))


def difference_p_value(harms: float, corrections: float, num_samples: float, max_accuracy_drop: float) -> float:
    """P-value of the hypothesis that the drop is above `max_accuracy_drop`, from the paired differences themselves.

    Let d_i be 1 where the exit taken corrects the last one, −1 where it harms, else 0, and δ the allowed drop. A
    gambler who stakes a share λ of the capital on every image ends with `K(λ) = Π (1 + λ·(d_i + δ))`; where the drop
    is above δ, its expectation is at most 1 for every λ in [0, 1/(1 − δ)), and so is that of a mixture over λ. By
    Markov's inequality 1/K is a p-value (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting", 2024, with constant bets, so that the order of the images does not matter).
    """
    log_capital = _log_capital(harms, corrections, num_samples, max_accuracy_drop)
    return float(np.exp(min(0.0, np.log(len(log_capital)) - logsumexp(log_capital))))


def _log_capital(harms: float, corrections: float, num_samples: float, drop: float) -> np.ndarray:
    """Logarithm of K(λ) for each λ of a grid, of which 0 is the first."""
    stakes = np.linspace(0, 1, 101)[:-1] / (1 - drop)  # the last one would be ruined by a single harm
    return (
        harms * np.log1p(stakes * (drop - 1))
        + (num_samples - harms - corrections) * np.log1p(stakes * drop)
        + corrections * np.log1p(stakes * (drop + 1))
    )


def required_sample_size(
    harm_rate: float, max_accuracy_drop: float, confidence: float, *, bound: str = "harm", correction_rate: float = 0.0
) -> int | None:
    """The fewest images that certify a drop, if these shares of them are harmed and corrected; None if none can.

    By the harm rate, k harms need n_k images, and k/n_k grows with k towards the allowed drop. By the difference,
    the capital of [`difference_p_value`] grows with the images, each counted with the shares, or it does not grow.
    """
    if bound == "difference":
        if _log_capital(harm_rate, correction_rate, 1, max_accuracy_drop).max() <= 0:
            return None
        return _smallest(
            lambda n: difference_p_value(harm_rate * n, correction_rate * n, n, max_accuracy_drop) <= 1 - confidence
        )
    if harm_rate >= max_accuracy_drop:
        return None

    def size_for(harms: int) -> int:
        return _smallest(lambda n: harm_p_value(harms, n, max_accuracy_drop) <= 1 - confidence)

    if harm_rate == 0:
        return size_for(0)
    return size_for(_smallest(lambda harms: harms >= harm_rate * size_for(harms)))


def _smallest(holds: Callable[[int], bool]) -> int:
    """The smallest positive integer from which on a condition holds."""
    enough = 1
    while not holds(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, lo=enough // 2, key=holds)
