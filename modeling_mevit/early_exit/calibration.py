# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Choosing the thresholds of early exit on held-out images: for a cost budget, or for a bound on the accuracy lost.

Settings are tried along a path, from the most careful to the boldest. Without a confidence, the best setting of a path
that was drawn on the same images is taken: it fits them, and promises nothing about others. With a confidence, the
path is fixed without the images that test it, and each of its settings is tested in turn until the first one fails
(fixed-sequence testing; Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test", 2021): all settings before it
are certified at once, since a wrong certificate needs the first wrong setting to pass its own test.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp
from scipy.stats import binom

from .configuration_mevit import MEViTConfig
from .exit_record import ExitPredictions, OperatingPoint, Setting


BOUNDS = ("harm", "difference")
# Scores are in [0, 1], entropy in [0, ln L]. Those of a trained model crowd near 0, and the uncertainty, a sigmoid,
# near some value in between.
_GRID = np.geomspace(1e-5, 1, 201)
_GRID_OF_UNCERTAINTY = np.linspace(1e-3, 1, 1000)
PATH_PART = 1 / 3  # of the images, to draw a path of thresholds per exit that the others certify
_MOST_CANDIDATES = 1000  # thresholds of a path, whatever the number of images


@dataclass(frozen=True)
class Calibration:
    """A setting, and what is known of it.

    Args:
        policy: exit policy.
        setting: E − 1 thresholds, or how many exits must agree.
        outcome: of the calibration images, or, with a confidence, of those that tested the setting.
    """

    policy: str
    setting: Setting
    outcome: OperatingPoint


@dataclass(frozen=True)
class Certificate:
    """What fixed-sequence testing gave.

    Args:
        granted: the boldest setting that is certified, None where there is none that saves anything.
        refused: the first setting that was not, None where the path came to its end.
    """

    granted: Calibration | None
    refused: Calibration | None


def calibrate(
    record: ExitPredictions, policy: str, promise: dict[str, Any], *, per_exit: bool, num_labels: int
) -> Certificate:
    """Chooses a setting on held-out images, for what is asked of it.

    Args:
        record: of the images.
        policy: exit policy.
        promise: `{"max_cost": c}`, `{"max_accuracy_drop": d}`, or `{"max_accuracy_drop": d, "confidence": p,
            "bound": b}`; see [`within_cost`], [`within_drop`] and [`certified`].
        per_exit: whether each exit has a threshold of its own. With a confidence, a third of the images, drawn at
            random, then draws the path, and the others certify.
        num_labels: of the model.

    Returns:
        The setting in `granted`, None where it lets no image leave early; what was refused is known with a
        confidence only.

    Raises:
        ValueError: where a number is out of range, patience should have thresholds, or a path has no image.
    """
    if "confidence" in promise:
        if not per_exit:
            return certified(record, policy, threshold_grid(record, policy, num_labels), **promise)
        shuffled = np.random.default_rng(0).permutation(len(record))
        for_path = round(PATH_PART * len(record))
        if not 0 < for_path < len(record):
            raise ValueError(
                f"{len(record)} images are too few: some choose thresholds per exit, others certify them."
            )
        path = greedy_path(record.select(shuffled[:for_path]), policy)
        return certified(record.select(shuffled[for_path:]), policy, path, **promise)
    path = greedy_path(record, policy) if per_exit else shared_thresholds(record, policy)
    within = within_cost if "max_cost" in promise else within_drop
    found = within(record, policy, path, **promise)
    return Certificate(found if _saves(found.outcome) else None, None)


def enable_early_exit(
    config: MEViTConfig, found: Calibration, promise: dict[str, Any], *, per_exit: bool, source: dict[str, Any]
) -> None:
    """Writes a setting into a model's config, with what it promises and what it was chosen on, and turns it on."""
    config.exit_policy, config.early_exit = found.policy, True
    if found.policy == "patience":
        config.patience, config.exit_thresholds = found.setting, None
        setting: dict[str, Any] = {"patience": found.setting}
    else:
        # JSON has no infinity, and no score is below 0
        config.exit_thresholds = [max(threshold, 0.0) for threshold in found.setting]
        setting = {"thresholds": config.exit_thresholds, "per_exit": per_exit}
    measured = asdict(found.outcome)
    measured["exit_counts"] = {str(layer): count for layer, count in measured["exit_counts"].items()}
    config.calibration = {
        "policy": found.policy,
        **setting,
        "promise": promise,
        "measured": measured,
        "data": source,
    }


def disable_early_exit(config: MEViTConfig) -> None:
    """Takes the thresholds, and what they promised, out of a model's config, and turns early exit off."""
    config.early_exit, config.exit_thresholds, config.calibration = False, None, None


def never_early(record: ExitPredictions, policy: str) -> Setting:
    """The setting under which every image reaches the last exit."""
    num_exits = len(record.exit_layers)
    return num_exits if policy == "patience" else [-math.inf] * (num_exits - 1)


def shared_thresholds(record: ExitPredictions, policy: str) -> list[Setting]:
    """Settings with one threshold for all exits, midway between neighbouring scores of the record.

    For `"patience"`, every number of exits that can agree.

    Returns:
        Settings from the most careful to the boldest.
    """
    num_exits = len(record.exit_layers)
    if policy == "patience":
        return list(range(num_exits, 0, -1))
    candidates = _thresholds_between(record.scores[policy][:, :-1])
    return [[float(threshold)] * (num_exits - 1) for threshold in (-math.inf, *candidates)]


def threshold_grid(record: ExitPredictions, policy: str, num_labels: int) -> list[Setting]:
    """Settings with one threshold for all exits on a grid that no image has a part in.

    Returns:
        Settings from the most careful to the boldest. The scores' values are not looked at.
    """
    num_exits = len(record.exit_layers)
    if policy == "patience":
        return list(range(num_exits, 0, -1))
    grid = _GRID_OF_UNCERTAINTY if policy == "uncertainty" else _GRID
    largest = math.log(num_labels) if policy == "entropy" else 1.0
    return [[float(threshold)] * (num_exits - 1) for threshold in largest * grid]


def greedy_path(record: ExitPredictions, policy: str, candidates_per_exit: int = 50) -> list[Setting]:
    """Settings with one threshold for each exit, which rise one at a time.

    Each step raises the threshold that loses the fewest right answers for the cost that it saves.

    Returns:
        Settings from the most careful to the boldest; each lets go at least those whom the one before lets go, at the
        same exit or an earlier one.

    Raises:
        ValueError: for `"patience"`, which has no thresholds.
    """
    if policy == "patience":
        raise ValueError("patience has one number for all exits; allowed are policies with a score.")
    scores = record.scores[policy]
    num_early = len(record.exit_layers) - 1
    candidates = [_thresholds_between(scores[:, place], candidates_per_exit) for place in range(num_early)]
    setting = never_early(record, policy)
    outcome = record.outcome(record.places(policy, setting))
    path, steps = [list(setting)], [0] * num_early
    while True:
        best = None
        for place in range(num_early):
            if steps[place] == len(candidates[place]):
                continue
            raised = [*setting[:place], float(candidates[place][steps[place]]), *setting[place + 1 :]]
            result = record.outcome(record.places(policy, raised))
            saved, lost = outcome.cost - result.cost, outcome.accuracy - result.accuracy
            # first what loses nothing; then the smallest loss for the saving
            rate = lost / saved if saved > 0 else (math.inf if lost > 0 else -math.inf)
            if best is None or rate < best[0]:
                best = rate, place, raised, result
        if best is None:
            return path
        _, place, setting, outcome = best
        steps[place] += 1
        path.append(setting)


def within_cost(record: ExitPredictions, policy: str, path: list[Setting], max_cost: float) -> Calibration:
    """The most accurate setting of a path whose mean cost on the record is at most `max_cost`.

    Raises:
        ValueError: where no setting is that cheap.
    """
    tried = _tried(record, policy, path)
    allowed = [calibration for calibration in tried if calibration.outcome.cost <= max_cost]
    if not allowed:
        cheapest = min(calibration.outcome.cost for calibration in tried)
        raise ValueError(f"max_cost={max_cost} is out of reach: leaving at the first exit costs {cheapest:.3f}.")
    return max(allowed, key=lambda calibration: (calibration.outcome.accuracy, -calibration.outcome.cost))


def within_drop(record: ExitPredictions, policy: str, path: list[Setting], max_accuracy_drop: float) -> Calibration:
    """The cheapest setting of a path that loses at most `max_accuracy_drop` against the last exit, on the record."""
    _check_share("max_accuracy_drop", max_accuracy_drop, zero=True)
    allowed = [tried for tried in _tried(record, policy, path) if tried.outcome.drop <= max_accuracy_drop]
    return min(allowed, key=lambda calibration: (calibration.outcome.cost, -calibration.outcome.accuracy))


def certified(
    record: ExitPredictions,
    policy: str,
    path: list[Setting],
    *,
    max_accuracy_drop: float,
    confidence: float,
    bound: str = "harm",
) -> "Certificate":
    """The boldest setting that is certified to lose at most `max_accuracy_drop` in accuracy against the last exit.

    With probability `confidence` over the draw of the record's images, the true drop is at most that.

    Args:
        record: of images that had no part in `path`, drawn like those to come.
        policy: exit policy.
        path: settings from the most careful on, fixed beforehand.
        max_accuracy_drop: allowed drop, a share.
        confidence: of the certificate, a share.
        bound: `"harm"` tests the harm rate ([`harm_p_value`]), `"difference"` the drop itself
            ([`difference_p_value`]).

    Returns:
        The certified setting, None where nothing that saves anything is certified, and the one that was refused.

    Raises:
        ValueError: where a number is no share.
    """
    _check_share("max_accuracy_drop", max_accuracy_drop)
    _check_share("confidence", confidence)
    if bound not in BOUNDS:
        raise ValueError(f"bound={bound!r} is unknown; allowed are {', '.join(map(repr, BOUNDS))}.")
    granted = refused = None
    for setting in path:
        tried = Calibration(policy, setting, record.outcome(record.places(policy, setting)))
        if p_value(tried.outcome, max_accuracy_drop, bound) > 1 - confidence:
            refused = tried
            break
        if _saves(tried.outcome):
            granted = tried
    return Certificate(granted, refused)


def p_value(outcome: OperatingPoint, max_accuracy_drop: float, bound: str) -> float:
    """Of the hypothesis that the true drop is above `max_accuracy_drop`, by one of the bounds."""
    if bound == "harm":
        return harm_p_value(outcome.harms, outcome.images, max_accuracy_drop)
    return difference_p_value(outcome.harms, outcome.corrections, outcome.images, max_accuracy_drop)


def harm_p_value(harms: int, images: int, max_accuracy_drop: float) -> float:
    """Exact binomial p-value of the hypothesis that the harm rate is above `max_accuracy_drop`.

    The harm rate is P(last exit right and exit taken wrong), which is never below the drop.
    """
    return float(binom.cdf(harms, images, max_accuracy_drop))


def difference_p_value(harms: float, corrections: float, images: float, max_accuracy_drop: float) -> float:
    """P-value of the hypothesis that the drop is above `max_accuracy_drop`, from the paired differences themselves.

    Let d_i be 1 where the exit taken corrects the last one, −1 where it harms, else 0, and δ the allowed drop. A
    gambler who stakes a share λ of the capital on every image ends with `K(λ) = Π (1 + λ·(d_i + δ))`; where the drop
    is above δ, its expectation is at most 1 for every λ in [0, 1/(1 − δ)), and so is that of a mixture over λ. By
    Markov's inequality 1/K is a p-value (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting", 2024, with constant bets, so that the order of the images does not matter).
    """
    log_capital = _log_capital(harms, corrections, images, max_accuracy_drop)
    return float(np.exp(min(0.0, np.log(len(log_capital)) - logsumexp(log_capital))))


def _log_capital(harms: float, corrections: float, images: float, drop: float) -> np.ndarray:
    """Logarithm of K(λ) for each λ of a grid, of which 0 is the first."""
    stakes = np.linspace(0, 1, 101)[:-1] / (1 - drop)  # the last one would be ruined by a single harm
    return (
        harms * np.log1p(stakes * (drop - 1))
        + (images - harms - corrections) * np.log1p(stakes * drop)
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

    def load_split(harms: int) -> int:
        return _smallest(lambda n: harm_p_value(harms, n, max_accuracy_drop) <= 1 - confidence)

    if harm_rate == 0:
        return load_split(0)
    return load_split(_smallest(lambda harms: harms >= harm_rate * load_split(harms)))


def _smallest(holds: Callable[[int], bool]) -> int:
    """The smallest positive integer from which on a condition holds."""
    enough = 1
    while not holds(enough):
        enough *= 2
    return bisect.bisect_left(range(enough), True, lo=enough // 2, key=holds)


def _saves(outcome: OperatingPoint) -> bool:
    """Whether any image leaves before the last exit."""
    return outcome.exit_counts[max(outcome.exit_counts)] < outcome.images


def _tried(record: ExitPredictions, policy: str, path: list[Setting]) -> list[Calibration]:
    return [Calibration(policy, setting, record.outcome(record.places(policy, setting))) for setting in path]


def _thresholds_between(scores: np.ndarray, at_most: int = _MOST_CANDIDATES) -> np.ndarray:
    """Ascending thresholds midway between neighbouring scores, and one above the largest."""
    values = np.unique(scores).astype(np.float64)
    between = np.append((values[:-1] + values[1:]) / 2, values[-1] + 1)
    chosen = np.linspace(0, len(between) - 1, min(at_most, len(between))).round().astype(int)
    return between[chosen]


def _check_share(name: str, given: float, zero: bool = False) -> None:
    if not (0 < given < 1 or (zero and given == 0)):
        raise ValueError(f"{name}={given} is no share; allowed is {'0 or ' if zero else ''}above 0 and below 1.")
