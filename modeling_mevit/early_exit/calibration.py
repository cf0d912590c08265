# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Choosing the thresholds of early exit on held-out images: for a cost budget, or for a bound on the accuracy lost or
on the labels changed.

One threshold for all early exits is tried after another, from the most careful to the boldest. Without a guarantee,
the best one on these images is taken: it fits them, and promises nothing about others. With a confidence, the
thresholds to try are fixed beforehand, and each is tested in turn until the first one fails (fixed-sequence testing;
Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021): all thresholds before it are certified at once,
since a wrong certificate needs the first wrong threshold to pass its own test. In expectation, they are tried until
the share of images lost, with one image more that is taken to be lost, exceeds what is allowed (conformal risk
control; Angelopoulos, Bates, Fisch, Lei and Schuster, 2024).
"""

import bisect
import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import bdtr
from scipy.stats import binom, norm
from torch.utils.data import Dataset, Subset

from ..configuration_mevit import MEViTConfig, promise_digest
from ..data.identity import encode_digests, select_independent
from .calibration_target import BOUNDS, WHAT_THE_AVERAGE_COUNTS, CalibrationTarget
from .predictions import ExitPredictions, OperatingPoint, Predictor, check_labels, predict_exits


# Scores are in [0, 1], entropy in [0, ln L]. Those of a trained model crowd near 0, and the uncertainty, a sigmoid,
# near some value in between.
_GRID = np.geomspace(1e-5, 1, 201)
_GRID_OF_UNCERTAINTY = np.linspace(1e-3, 1, 1000)
_MOST_CANDIDATES = 1000  # thresholds to try, whatever the number of images
_ARC = 0.2  # standard errors of the correction rate between neighbouring rates that the difference test computes


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found. `print(result)` tells it in words.

    Args:
        target: what the thresholds were chosen for.
        operating_point: the thresholds that were chosen or certified, and what they gave on the calibration images;
            None where none that lets an image leave early is good enough.
        first_failure: with a guarantee, the first thresholds that were not certified; None where all were.
        data: the calibration images, as [`ImageClassificationDataset.describe`] tells them.
        dropped_copies: images that were not counted, since an image of the same content was.
        dropped_training_images: images that were not counted, since they trained the model.
        made_for: exits, their combination, architecture, precision and weights that this holds for, as the model's
            `made_for` tells them; of the cascade of an export all but the weights, which are in its graphs.
        losses: with a guarantee, how many images count against the operating point, and how many against the first
            failure: those harmed there, or given another label than the last exit's; in expectation, there or under
            any more careful thresholds. 0 where there is no such point.
    """

    target: CalibrationTarget
    operating_point: OperatingPoint | None
    first_failure: OperatingPoint | None = None
    data: dict[str, Any] | None = None
    dropped_copies: int = 0
    dropped_training_images: int = 0
    made_for: dict[str, Any] | None = None
    losses: tuple[int, int] = (0, 0)

    @property
    def required_sample_size(self) -> int | None:
        """About how many images would certify the first thresholds that failed, at their rates; None where no number
        would."""
        failed, target, lost = self.first_failure, self.target, self.losses[1]
        if failed is None:
            return None
        needed = required_sample_size(
            lost / failed.num_samples,
            target.limit,
            target.confidence,
            bound=target.bound or BOUNDS[0],
            correction_rate=(failed.corrections or 0) / failed.num_samples,
        )
        return needed and max(needed, failed.num_samples + 1)

    def apply_to(self, config: MEViTConfig) -> None:
        """Writes thresholds, target and evidence into a model's config and turns early exit on; or off, where there
        are no thresholds."""
        found = self.operating_point
        if found is None:
            disable_early_exit(config)
            return
        thresholds = [max(threshold, 0.0) for threshold in found.thresholds]  # JSON has no infinity; no score is < 0
        config.exit_policy, config.exit_thresholds, config.early_exit = found.policy, thresholds, True
        promise = {
            "target": self.target.to_dict(),
            "operating_point": {**found.to_dict(), "thresholds": thresholds},
        }
        config.calibration = {
            **promise,
            "data": self.data
            and {
                **self.data,
                "dropped_copies": self.dropped_copies,
                "dropped_training_images": self.dropped_training_images,
            },
            "made_for": self.made_for and {**self.made_for, "promise": promise_digest(promise)},
        }

    def __str__(self) -> str:
        """What was chosen or certified, on which evidence, and what stood in the way of more."""
        found, failed, target = self.operating_point, self.first_failure, self.target
        lines = []
        if self.dropped_copies:
            lines.append(f"Not counted: {self.dropped_copies} images that are copies of others.")
        if self.dropped_training_images:
            lines.append(f"Not counted: {self.dropped_training_images} images that trained the model.")
        if found and target.guarantee:
            lines.append(self._certificate(found))
        if not found and not target.guarantee:
            lines.append("No thresholds that let an image leave early are better than running every image to the end.")
        if not found and target.guarantee:
            lines.append(f"No thresholds that save cost can be certified for {target.claim}.")
        if failed:
            lines.append(self._failure(failed))
        if found:
            counts = ", ".join(f"{count} at exit {layer}" for layer, count in found.exit_counts.items())
            accuracy = (
                ""
                if found.accuracy is None
                else f"accuracy {found.accuracy:.1%} (last exit {found.full_model_accuracy:.1%}), "
            )
            lines.append(
                f"On {found.num_samples} images: {accuracy}disagreement {found.disagreement:.1%}, mean cost "
                f"{found.cost:.3f}. Left: {counts}."
            )
        return "\n".join(lines)

    def _certificate(self, found: OperatingPoint) -> str:
        """What is certified, and on which evidence."""
        target = self.target
        if target.guarantee == "probability" and target.needs_labels:
            return (
                f"Certified on {found.num_samples} images, of which {found.harms} were harmed and {found.corrections} "
                f"corrected: {target.certainty}, the true accuracy drop is at most {target.limit:.2%}."
            )
        lost = "were harmed" if target.needs_labels else "got another label than the last exit's"
        if target.guarantee == "probability":
            return (
                f"Certified on {found.num_samples} images, of which {found.disagreements} {lost}: {target.certainty}, "
                f"the true share of such images is at most {target.limit:.2%}, and so is the accuracy drop."
            )
        share = "accuracy drop is" if target.needs_labels else "share of such images and the accuracy drop are"
        return (
            f"Certified in expectation on {found.num_samples} images, of which {self.losses[0]} {lost} under these "
            f"thresholds or more careful ones: on average over calibration sets and new images, the {share} at most "
            f"{target.limit:.2%}. Under these very thresholds it may be larger: only a confidence says how rarely. "
            f"{WHAT_THE_AVERAGE_COUNTS}"
        )

    def _failure(self, failed: OperatingPoint) -> str:
        """The first thresholds that were not certified, and how many images could certify them."""
        target, lost, needed = self.target, self.losses[1], self.required_sample_size
        number = f"about {needed}" if target.bound == "difference" else needed
        more = f"{number} images would certify them" if needed else "no number of images would certify them"
        rate = f"{lost} of {failed.num_samples} images ({lost / failed.num_samples:.2%})"
        what = f"harm {rate}" if target.needs_labels else f"give another label than the last exit to {rate}"
        if target.guarantee == "expectation":
            what = f"{what}, counting those of more careful ones; at this rate {more}"
        elif target.needs_labels:
            what = f"{what} and correct {failed.corrections}; at these rates {more} by the {target.bound} bound"
        else:
            what = f"{what}; at this rate {more}"
        return f"The first thresholds that failed have mean cost {failed.cost:.3f}, {what}."


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

    Of images whose files are equal, the first one counts, whatever their labels; images that trained the model, by the
    digests in its config, do not count. Near copies, such as another crop of the same photo, are not recognised.

    Args:
        predictor: a model in eval mode, on the device and in the precision to run in, or the cascade of an export. The
            thresholds fit scores of that precision.
        dataset: images that neither trained the model nor chose its recipe, `{"pixel_values": (3, H, W), "labels":
            int}`; without labels for `max_disagreement`, which looks at none. An [`ImageClassificationDataset`] also
            tells which they are, so that copies and training images are dropped, and evaluation can refuse the others.
            Of any other data set, every sample counts.
        target: what the thresholds are chosen for.
        policy: exit policy; the config's by default.
        batch_size: images at a time.
        num_workers: processes that read images.

    Raises:
        ValueError: where the model has one exit only, or not those of the target, the policy is unknown or not for
            this model, no thresholds are within a cost, all images trained the model, labels are needed and there
            are none, or a guarantee is asked for and the split trained the model or has too few images to certify
            anything.
    """
    config = predictor.config
    policy = policy or config.exit_policy
    _check_policy(config, policy)
    if len(config.exit_layers) < 2:
        raise ValueError(f"early exit needs at least two exits; the model has one, on layer {config.exit_layers[0]}.")
    target.check_exits(config.exit_layers)
    if target.needs_labels:
        check_labels(dataset, "calibration for max_cost or max_accuracy_drop")
    describe = getattr(dataset, "describe", None)
    data = describe() if describe else None
    if data:
        check_held_out(data["split"], target.guarantee is not None)
    copies = training_images = 0
    hashes = getattr(dataset, "image_hashes", None)
    if hashes is not None:
        kept, copies, training_images = select_independent(hashes, config.training_images)
        if training_images and not kept:
            raise ValueError(
                f"calibration needs images that did not train the model, and all {training_images} given ones did."
            )
        dataset = Subset(dataset, kept)
        data = data and {**data, "image_digests": encode_digests(hashes[index] for index in kept)}
    check_sample_size(len(dataset), target)  # type: ignore[arg-type]
    predictions = predict_exits(predictor, dataset, batch_size=batch_size, num_workers=num_workers)
    result = calibrate_predictions(predictions, target, policy=policy, num_labels=config.num_labels, data=data)
    made_for = predictor.made_for()
    return replace(result, dropped_copies=copies, dropped_training_images=training_images, made_for=made_for)


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

    Raises:
        ValueError: where no thresholds are within a cost, labels are needed and there are none, the model lacks exits
            of the target, or the predictions scores of the policy.
    """
    if policy not in predictions.scores:
        raise ValueError(
            f"there are no scores of exit_policy={policy!r}, only of {', '.join(map(repr, predictions.scores))}; an "
            f"export has those of its own policy and of its logits, so calibrate the checkpoint."
        )
    if target.needs_labels and predictions.labels is None:
        raise ValueError(f"only max_disagreement can be calibrated without labels, got {target}.")
    layers = predictions.exit_layers
    target.check_exits(layers)
    if target.guarantee is not None:
        grid = [
            target.among_exits(thresholds, layers) for thresholds in threshold_grid(policy, len(layers), num_labels)
        ]
        if target.guarantee == "expectation":
            certified, first_failure, losses = control_expectation(predictions, policy, grid, target)
        else:
            certified, first_failure = fixed_sequence_test(predictions, policy, grid, target)
            losses = _losses(certified, target), _losses(first_failure, target)
        return CalibrationResult(target, certified, first_failure, data, losses=losses)
    tried = [
        predictions.simulate(policy, target.among_exits(thresholds, layers))
        for thresholds in shared_thresholds(predictions, policy)
    ]
    if target.max_cost is not None:
        chosen = best_within_cost(tried, target.max_cost)
    elif target.max_accuracy_drop is not None:
        chosen = cheapest_within_drop(tried, target.max_accuracy_drop)
    else:
        chosen = cheapest_within_disagreement(tried, target.limit)
    return CalibrationResult(target, chosen if chosen.saves else None, None, data)


def _check_policy(config: MEViTConfig, policy: str) -> None:
    """Raises a `ValueError` where a model cannot have this policy."""
    candidate = copy.deepcopy(config)
    disable_early_exit(candidate)  # its thresholds may be of another one
    candidate.exit_policy = policy
    candidate.validate()


def check_held_out(split: str, certifies: bool) -> None:
    """Checks that a split can certify, where it is to.

    Raises:
        ValueError: where it has images that trained the model.
    """
    if certifies and split in ("train", "all"):
        raise ValueError(
            f"the split {split!r} has images that trained the model, so it can certify nothing; take images that were "
            f"held out."
        )


def check_sample_size(num_samples: int, target: CalibrationTarget) -> None:
    """Checks that so many images, none of them lost, would certify a target with a guarantee.

    Raises:
        ValueError: where they would not.
    """
    if target.guarantee is None:
        return
    fewest = required_sample_size(0.0, target.limit, target.confidence)
    if fewest is not None and num_samples < fewest:
        none_lost = "none is harmed" if target.needs_labels else "no label differs"
        raise ValueError(
            f"at least {fewest} images are needed to certify {target.claim}, even if {none_lost}, got {num_samples}."
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
        raise ValueError(
            f"max_cost must be at least {cheapest:.3f}, the cost of the first exit to leave at, got {max_cost}."
        )
    return max(allowed, key=lambda point: (point.accuracy, -point.cost))


def cheapest_within_drop(tried: list[OperatingPoint], max_accuracy_drop: float) -> OperatingPoint:
    """The cheapest of some operating points that lose at most `max_accuracy_drop` against the last exit."""
    allowed = [point for point in tried if point.drop is not None and point.drop <= max_accuracy_drop]
    return min(allowed, key=lambda point: (point.cost, point.drop))


def cheapest_within_disagreement(tried: list[OperatingPoint], max_disagreement: float) -> OperatingPoint:
    """The cheapest of some operating points that give another label than the last exit to at most this share."""
    allowed = [point for point in tried if point.disagreement <= max_disagreement]
    return min(allowed, key=lambda point: (point.cost, point.disagreements))


def fixed_sequence_test(
    predictions: ExitPredictions, policy: str, sequence: Iterable[list[float]], target: CalibrationTarget
) -> tuple[OperatingPoint | None, OperatingPoint | None]:
    """The boldest thresholds that are certified for a target with a confidence.

    With probability `target.confidence` over the draw of the images, the true drop, or disagreement, is at most
    `target.limit`.

    Args:
        predictions: on images that had no part in `sequence`, drawn like those to come.
        policy: exit policy.
        sequence: thresholds from the most careful on, fixed beforehand.
        target: with `confidence`, and `max_accuracy_drop` and `bound`, or `max_disagreement`.

    Returns:
        The boldest certified operating point, None where none that saves anything is certified; and the first one that
        failed, None where all passed.

    Raises:
        ValueError: where the target has no confidence.
    """
    if target.confidence is None:
        raise ValueError(f"a test needs a target with confidence, got {target}.")
    allowed = most_harms(len(predictions), target.limit, target.confidence, target.bound or BOUNDS[0])
    certified = None
    for thresholds in sequence:
        point = predictions.simulate(policy, thresholds)
        if _losses(point, target) > allowed[point.corrections or 0]:
            return certified, point
        if point.saves:
            certified = point
    return certified, None


def control_expectation(
    predictions: ExitPredictions, policy: str, sequence: Iterable[list[float]], target: CalibrationTarget
) -> tuple[OperatingPoint | None, OperatingPoint | None, tuple[int, int]]:
    """The boldest thresholds that keep a target in expectation (conformal risk control; Angelopoulos et al., 2024).

    An image is lost under some thresholds where it is harmed, or given another label than the last exit's, under them
    or any more careful ones: a running maximum, which never falls along the sequence. The boldest thresholds with
    (k + 1) / (n + 1) ≤ δ are taken, where k of n images are lost. Over the draw of these n images and one more, that
    one is then lost with a probability of at most δ, which is never below the expected drop under these thresholds.

    Args:
        predictions: on images drawn like those to come.
        policy: exit policy.
        sequence: thresholds from the most careful on, fixed beforehand.
        target: with `max_accuracy_drop` or `max_disagreement`.

    Returns:
        The boldest operating point that keeps the target, None where none that saves anything does; the first one that
        does not, None where all do; and how many images are lost under each of them, 0 where it is None.

    Raises:
        ValueError: where the target is a cost, or needs labels and there are none.
    """
    lost = np.zeros(len(predictions), dtype=bool)
    certified, certified_losses = None, 0
    for thresholds in sequence:
        indices = predictions.exit_indices(policy, thresholds)
        point = predictions.operating_point(policy, thresholds, indices)
        lost |= predictions.harmed(indices) if target.needs_labels else predictions.disagrees(indices)
        losses = int(lost.sum())
        if not bounds_expectation(losses, len(predictions), target.limit):
            return certified, point, (certified_losses, losses)
        if point.saves:
            certified, certified_losses = point, losses
    return certified, None, (certified_losses, 0)


def _losses(point: OperatingPoint | None, target: CalibrationTarget) -> int:
    """How many images count against a target under some thresholds."""
    if point is None:
        return 0
    losses = point.harms if target.needs_labels else point.disagreements
    assert losses is not None  # labels were asked for where they are needed
    return losses


def bounds_expectation(losses: Any, num_samples: int, limit: float) -> Any:
    """Whether so many images lost, a number or an array, bound the expected share: one more is taken to be lost."""
    return (losses + 1) / (num_samples + 1) <= limit


@lru_cache
def most_harms(num_samples: int, max_accuracy_drop: float, confidence: float, bound: str) -> np.ndarray:
    """How many images may be harmed for a drop to be certified, by how many are corrected.

    Of n images, h are harmed, at the rate p_h, and c corrected, at the rate p_c. What is rejected is p_h − p_c ≥ δ,
    and wrongly so with at most the probability α = 1 − confidence, for all rates:

    - By `"harm"`, where h ≤ k, the largest k with P(Bin(n, δ) ≤ k) ≤ α. The harm rate is never below the drop, so c
      does not matter.
    - By `"difference"`, there too, and wherever the score statistic of the paired difference (Tango, "Equivalence test
      and confidence interval for the difference in proportions for the paired-sample design", 1998),
      z = (h − c − nδ) / √(n (2p̃ + δ(1 − δ))), is at most z*; p̃ is the maximum likelihood estimate of p_c under
      p_h = p_c + δ. Its normal approximation is not relied on: z* is such that the exact probability of the whole
      region is at most α for every p_c, as [`_TrinomialSize`] bounds it. It certifies whatever harm certifies.

    Args:
        num_samples: n.
        max_accuracy_drop: δ.
        confidence: 1 − α.
        bound: one of `BOUNDS`.

    Returns:
        (n + 1,), int64, by c, never decreasing; −1 where nothing is certified. Where n images without harm are too few
        by harm, they are by the difference.
    """
    level, drop = 1 - confidence, max_accuracy_drop
    harms = int(binom.ppf(level, num_samples, drop))
    harms -= binom.cdf(harms, num_samples, drop) > level
    if bound == "harm" or harms < 0:
        return np.full(num_samples + 1, harms)
    critical = _critical_score(num_samples, drop, level, harms)
    return _harms_within_score(critical, num_samples, drop, harms)


@lru_cache
def _critical_score(num_samples: int, drop: float, level: float, harms: int) -> float:
    """z* of [`most_harms`], where up to k harms are certified in any case; −∞ where nothing can be added to them."""
    if harms > (num_samples - 1) * drop:  # the level is above one half, and g of _TrinomialSize is not convex
        return -math.inf
    size = _TrinomialSize(num_samples, drop, harms)
    lowest = low = -10.0
    high = float(norm.ppf(level)) + 0.5
    while high - low > 0.004:
        middle = (low + high) / 2
        if size.upper_bound(_harms_within_score(middle, num_samples, drop, harms)) <= level:
            low = middle
        else:
            high = middle
    return low if low > lowest else -math.inf


def _score(harms: Any, corrections: Any, num_samples: float, drop: float) -> Any:
    """Tango's z of [`most_harms`]; arguments and result are numbers or arrays."""
    linear = corrections * (1 - drop) + harms * (1 + drop) - 2 * num_samples * drop
    root = np.sqrt(linear**2 + 8 * num_samples * corrections * drop * (1 - drop))
    rate = (linear + root) / (4 * num_samples)  # of corrections, where the likelihood under p_h = p_c + δ is largest
    return (harms - corrections - num_samples * drop) / np.sqrt(num_samples * (2 * rate + drop * (1 - drop)))


def _harms_within_score(critical: float, num_samples: int, drop: float, fewest: int) -> np.ndarray:
    """(n + 1,), by the number of corrections: the most harms with a score of at most `critical`, and `fewest` at
    least; never decreasing."""
    corrections = np.arange(num_samples + 1)
    low, high = np.full(num_samples + 1, -1), num_samples - corrections + 1  # bisection of all at once
    for _ in range(num_samples.bit_length() + 1):
        middle = (low + high) // 2
        within = (middle < 0) | (_score(np.maximum(middle, 0), corrections, num_samples, drop) <= critical)
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    return np.maximum(np.maximum.accumulate(low), fewest)


class _TrinomialSize:
    """How probable, at most, a region {h ≤ H(c)} with a never decreasing H ≥ k is where p_h = p_c + δ.

    The probability f(p) of the region is computed exactly on a grid of correction rates p, and bounded between them.
    Let g(p) = P(h ≤ k) be the part of harm, and e = f − g the rest.

    - g is convex in p where k ≤ (n − 1)δ, which is needed, so it lies below its chords.
    - e'' is the sum of the probabilities of the rest, each times W = S² + S', where S is the derivative of their
      logarithm. With s the derivative for one image, of mean 0 and variance I = 1/p + 1/(p + δ) + 4/(1 − δ − 2p), W is
      the sum of s_i s_j over all pairs i ≠ j, of mean 0 and variance 2n(n − 1)I². By Cauchy and Schwarz,
      |e''| ≤ √(2e)·nI, so that e exceeds its chord over [a, b] by at most κ√E, with κ = (b − a)²/8·√2·nI and E the
      largest e there, for which E ≤ max(e(a), e(b)) + κ√E is solved.
    - At the ends of the range, where I has no bound, f(p) ≤ P(p_h = a + δ, p_c = b) on [a, b]: fewer harms or more
      corrections never lead out of the region.

    Args:
        num_samples: n.
        drop: δ.
        harms: k.
    """

    def __init__(self, num_samples: int, drop: float, harms: int):
        n = self.num_samples = num_samples
        largest = (1 - drop) / 2  # rate of corrections, where every image is harmed or corrected
        steps = math.ceil(math.pi * math.sqrt(2 * n * largest) / _ARC)
        rates = (
            largest * np.sin(np.arange(1, steps) / steps * np.pi / 2) ** 2
        )  # about equally many standard errors apart
        rates = np.concatenate(([rates[0] / 64, rates[0] / 8], rates))
        start, end = rates[:-1], rates[1:]
        information = 1 / start + 1 / (start + drop) + 4 / (1 - drop - 2 * end)
        self.curvature = (end - start) ** 2 / 8 * math.sqrt(2) * n * information
        self.of_harm = bdtr(float(harms), n, rates + drop)

        # the numbers of corrections that are probable under each rate, one rate after another
        correction_rates = np.concatenate((rates, [rates[0], largest]))
        harm_rates = np.concatenate((rates, [0.0, rates[-1]])) + drop
        deviation = np.sqrt(n * correction_rates * (1 - correction_rates))
        first = np.maximum(np.floor(n * correction_rates - 6 * deviation) - 3, 0).astype(np.int64)
        last = np.minimum(np.ceil(n * correction_rates + 6 * deviation) + 12, n).astype(np.int64)
        lengths = last - first + 1
        self.starts = np.cumsum(lengths) - lengths
        self.corrections = np.arange(lengths.sum()) + np.repeat(first - self.starts, lengths)
        self.weights = binom.pmf(self.corrections, n, np.repeat(correction_rates, lengths))
        self.left_out = 1 - np.add.reduceat(self.weights, self.starts)
        self.harm_shares = np.repeat(np.minimum(harm_rates / (1 - correction_rates), 1.0), lengths)

    def upper_bound(self, allowed: np.ndarray) -> float:
        """Of the probability of `{h ≤ allowed[c]}`, over all rates; what is left out of the sums counts as inside."""
        others = self.num_samples - self.corrections  # images that are not corrected
        within = bdtr(np.minimum(allowed[self.corrections], others).astype(np.float64), others, self.harm_shares)
        probabilities = np.add.reduceat(self.weights * within, self.starts) + self.left_out
        inner, ends = probabilities[:-2], probabilities[-2:]
        rest = np.maximum(inner - self.of_harm, 0)
        largest = np.maximum(rest[:-1], rest[1:])
        root = (self.curvature + np.sqrt(self.curvature**2 + 4 * largest)) / 2  # √E
        between = np.maximum(inner[:-1], inner[1:]) + self.curvature * root
        return float(max(between.max(), ends.max()))


def harm_p_value(harms: int, num_samples: int, max_accuracy_drop: float) -> float:
    """Exact binomial p-value of the hypothesis that the harm rate is above `max_accuracy_drop`.

    The harm rate is P(last exit right and exit taken wrong), which is never below the drop.
    """
    return float(binom.cdf(harms, num_samples, max_accuracy_drop))


def required_sample_size(
    harm_rate: float,
    max_accuracy_drop: float,
    confidence: float | None,
    *,
    bound: str = "harm",
    correction_rate: float = 0.0,
) -> int | None:
    """The fewest images that certify a drop, if these shares of them are harmed and corrected; None if none can.

    By the harm rate, k harms need n_k images, and k/n_k grows with k towards the allowed drop. By the difference it is
    an estimate: the score grows as √n, up to the critical one, which hardly depends on n and is taken at 1,000 images
    at most; never fewer than without harm, nor more than by the harm rate.

    For a disagreement, give its rate and its bound in place of those of harm; for an expectation, no confidence.
    """

    def size_for(harms: int) -> int:
        if confidence is None:
            return _smallest(lambda n: bounds_expectation(harms, n, max_accuracy_drop))
        return _smallest(lambda n: harm_p_value(harms, n, max_accuracy_drop) <= 1 - confidence)

    fewest, by_harm = size_for(0), None
    if harm_rate < max_accuracy_drop:
        by_harm = fewest if harm_rate == 0 else size_for(_smallest(lambda k: k >= harm_rate * size_for(k)))
    if confidence is None or bound == "harm" or by_harm == fewest or harm_rate >= max_accuracy_drop + correction_rate:
        return by_harm
    score = _score(harm_rate, correction_rate, 1, max_accuracy_drop)  # of one image; that of n is √n times as large
    level = 1 - confidence
    about = (norm.ppf(level) / score) ** 2
    num_samples = max(fewest, min(math.ceil(about), 1000))
    harms = most_harms(num_samples, max_accuracy_drop, confidence, "harm")[0]
    critical = _critical_score(num_samples, max_accuracy_drop, level, int(harms))
    needed = max(fewest, math.ceil((critical / score) ** 2)) if math.isfinite(critical) else by_harm
    return needed if by_harm is None or needed is None else min(needed, by_harm)


def _smallest(holds: Callable[[int], bool]) -> int:
    """The smallest positive integer from which on a condition holds."""
    enough = 1
    while not holds(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, lo=enough // 2, key=holds)
