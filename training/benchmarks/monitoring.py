# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""How soon tests of a promise notice that it is broken, and how often they say so while it holds, in simulated
streams.

    python training/benchmarks/monitoring.py [--output monitoring.json]

Each audited image disagrees with a given probability, a multiple of the limit. A test is looked at after every image.
An alarm while every image keeps to the limit is false; 5 % of all streams may have one. Delays are medians, in audited
images from the first one on that exceeds the limit; streams that raise no alarm until their end count as later.

- `RiskMonitoring`: MAPIE's lower confidence bound of the mean (Podkopaev and Ramdas, 2022), to which all of its level
  is given.
- `plug-in bet`: one gambler, whose stake follows the outcomes so far (aGRAPA; Waudby-Smith and Ramdas, 2024).
- `beta mixture`: the likelihood ratio against the limit, averaged over all higher rates by Jeffreys' prior.
- `bets`: constant stakes from the first image on, as `Evidence` without those who begin later.
- `bets and starts`: `Evidence` of `PromiseMonitor`.

The same of the accuracy drop, whose outcomes are harm 1, correction −1, and else 0; `RiskMonitoring` takes binary
ones. A merged stream is that of several replicas, whose counts reach the monitor in blocks. And since a promised drop
leaves the limit of the disagreement to the calibration images: how often the true disagreement is above what
`upper_bound` makes of those that chose the thresholds, in the simulated calibrations of promises.py.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import betainc, betaln
from transformers import HfArgumentParser

import promises
from modeling_mevit.early_exit.calibration import BOUNDS
from modeling_mevit.early_exit.monitoring import AWAKE, Evidence, upper_bound
from modeling_mevit.reports.tables import markdown_table


LIMITS, LIMITS_OF_A_DROP = (0.01, 0.02, 0.05), (0.01, 0.02)
ALPHA = 0.05
CALM, CHANGED = 0.5, 5000  # multiple of the limit before a change, and after how many audited images that comes
# name → multiples of the limit before and after the change
STREAMS = {"1×": (1, 1), "2×": (2, 2), "5×": (5, 5), "½×, then 2×": (CALM, 2), "½×, then 5×": (CALM, 5)}
CORRECTIONS = {"few corrections": 0.5, "many corrections": 4.0}  # their rate, as a multiple of the limit
REPLICAS = ((1, 1), (8, 1), (8, 25), (8, 200))  # how many, and audited images of each between two of its reports


@dataclass
class MonitoringArguments:
    """What is simulated."""

    streams: int = field(default=500, metadata={"help": "Streams of each setting."})
    images: int = field(default=10_000, metadata={"help": "Audited images of each stream."})
    calibrations: int = field(default=1000, metadata={"help": "Calibrations of each setting."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def betting(outcomes: np.ndarray, limit: float, lowest: int, starts: bool = True) -> np.ndarray:
    """(S,): after how many outcomes (S, T) the gamblers of `Evidence` own 1/α; 0 where they never do."""
    evidence = Evidence(limit, lowest, shape=outcomes.shape[:1])
    if not starts:
        evidence.capital /= AWAKE
        evidence.asleep = 0.0
    alarms = np.zeros(len(outcomes), dtype=np.int64)
    for place, column in enumerate(outcomes.T, start=1):
        evidence.add({outcome: (column == outcome).astype(np.int64) for outcome in range(lowest, 2)})
        alarms[(alarms == 0) & (evidence.value >= 1 / ALPHA)] = place
        if alarms.all():
            break
    return alarms


def plug_in_bet(outcomes: np.ndarray, limit: float, lowest: int) -> np.ndarray:
    """The same of one gambler whose stake is aGRAPA's."""
    count = np.arange(1, outcomes.shape[1] + 1)
    middle, quarter = (1 + lowest) / 2, ((1 - lowest) / 2) ** 2  # what is believed before the first outcome
    means = (middle + outcomes.cumsum(1)) / (count + 1)
    variances = (quarter + ((outcomes - means) ** 2).cumsum(1)) / (count + 1)
    excess = means - limit
    stakes = np.clip(excess / (variances + excess**2), 0, 0.75 / (limit - lowest))
    stakes = np.concatenate((np.zeros((len(outcomes), 1)), stakes[:, :-1]), axis=1)
    return first(np.log1p(stakes * (outcomes - limit)).cumsum(1) >= -math.log(ALPHA))


def beta_mixture(outcomes: np.ndarray, limit: float, lowest: int) -> np.ndarray:
    """The same of the likelihood ratio, averaged over rates above the limit."""
    ones = outcomes.cumsum(1)
    zeros = np.arange(1, outcomes.shape[1] + 1) - ones

    def log_mass(ones: Any, zeros: Any) -> Any:  # above the limit
        # the tail of Beta(a, b) by that of Beta(b, a), which does not round to 0
        with np.errstate(divide="ignore"):
            return betaln(ones + 0.5, zeros + 0.5) + np.log(betainc(zeros + 0.5, ones + 0.5, 1 - limit))

    value = log_mass(ones, zeros) - log_mass(0, 0) - ones * math.log(limit) - zeros * math.log1p(-limit)
    return first(value >= -math.log(ALPHA))


def risk_monitoring(outcomes: np.ndarray, limit: float, lowest: int) -> np.ndarray:
    """The same of MAPIE's lower bound: where it exceeds the limit."""
    from mapie.exchangeability_testing.bounds import GammaExponentialMixtureBound

    bound = GammaExponentialMixtureBound(v_opt=1, c=1, alpha_opt=ALPHA)
    count = np.arange(1, outcomes.shape[1] + 1)
    means = outcomes.cumsum(1) / count
    before = np.concatenate((np.full((len(outcomes), 1), 0.5), means[:, :-1]), axis=1)
    variances = ((outcomes - before) ** 2).cumsum(1)
    # it depends on the sum of variances alone, and is smooth
    grid = np.geomspace(variances.min(), variances.max() + 1e-9, 500)
    boundary = np.interp(variances, grid, [bound(v=float(v), alpha=ALPHA) for v in grid])
    return first(means - boundary / count > limit)


TESTS: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "RiskMonitoring": risk_monitoring,
    "plug-in bet": plug_in_bet,
    "beta mixture": beta_mixture,
    "bets": lambda outcomes, limit, lowest: betting(outcomes, limit, lowest, starts=False),
    "bets and starts": betting,
}
OF_A_DROP = ("plug-in bet", "bets", "bets and starts")


def first(alarms: np.ndarray) -> np.ndarray:
    """(S,): the number of the first column of (S, T) that is true, counted from 1; 0 where none is."""
    return np.where(alarms.any(1), alarms.argmax(1) + 1, 0)


def median_delay(alarms: np.ndarray, change: int) -> float | None:
    """Of alarms after a change; None where half of the streams have none, or one before."""
    later = np.sort(np.where(alarms > change, alarms - change, np.iinfo(np.int64).max))
    middle = later[len(later) // 2]
    return None if middle > 10**9 else float(middle)


def rates(name: str, limit: float, images: int) -> np.ndarray:
    """(T,): the disagreement, or drop, of each audited image of a stream."""
    before, after = STREAMS[name]
    return np.where(np.arange(images) < CHANGED, before * limit, after * limit)


def change_of(name: str) -> int:
    """How many images of a stream keep to the limit; of those that never do, 0."""
    return CHANGED if STREAMS[name][0] == CALM else 0


def simulate(name: str, limit: float, corrections: str | None, arguments: MonitoringArguments) -> dict[str, Any]:
    """Alarms of every test on the same streams: of disagreement, or of a drop with so many corrections."""
    seeds = [arguments.seed, list(STREAMS).index(name), round(limit * 1e6), len(corrections or "")]
    draws = np.random.default_rng(seeds).random((arguments.streams, arguments.images), dtype=np.float32)
    lost = rates(name, limit, arguments.images)
    corrected = 0.0 if corrections is None else CORRECTIONS[corrections] * limit
    outcomes = np.where(draws < lost + corrected, 1, np.where(draws < lost + 2 * corrected, -1, 0)).astype(np.int8)
    change, lowest = change_of(name), 0 if corrections is None else -1
    alarms, delays = {}, {}
    for test in TESTS if corrections is None else OF_A_DROP:
        found = TESTS[test](outcomes.astype(np.int64), limit, lowest)
        false = found > 0 if name == "1×" else (found > 0) & (found <= change)
        alarms[test], delays[test] = float(false.mean()), median_delay(found, change)
    return {"stream": name, "limit": limit, "corrections": corrections, "false_alarms": alarms, "delays": delays}


def simulate_replicas(
    name: str, limit: float, replicas: int, block: int, arguments: MonitoringArguments
) -> dict[str, Any]:
    """Alarms of a monitor that merges replicas, which report in turn."""
    rng = np.random.default_rng([arguments.seed, list(STREAMS).index(name), round(limit * 1e6), replicas, block])
    evidence = Evidence(limit, 0, shape=(arguments.streams,))
    alarms = np.zeros(arguments.streams, dtype=np.int64)
    audited = rates(name, limit, arguments.images)
    for start in range(0, arguments.images, replicas * block):
        rows = audited[start : start + replicas * block]
        for replica in range(min(replicas, len(rows))):
            # images come to the replicas in turn
            probabilities = rows[replica::replicas]
            ones = (rng.random((arguments.streams, len(probabilities))) < probabilities).sum(1)
            evidence.add({1: ones, 0: len(probabilities) - ones})
            alarms[(alarms == 0) & (evidence.value >= 1 / ALPHA)] = start + len(rows)
    change = change_of(name)
    false = alarms > 0 if name == "1×" else (alarms > 0) & (alarms <= change)
    delay = median_delay(alarms, change)
    setting = {"stream": name, "limit": limit, "replicas": replicas, "block": block}
    return {**setting, "false_alarms": float(false.mean()), "delay": delay}


def simulate_upper_bound(model: str, num_samples: int, drop: float, arguments: MonitoringArguments) -> dict[str, Any]:
    """How often the true disagreement is above the bound from the images that chose the thresholds."""
    harmed, corrected = promises.MODELS[model](promises.THRESHOLDS, drop)
    rng = np.random.default_rng([arguments.seed, list(promises.MODELS).index(model), num_samples, round(drop * 1e6)])
    harms, corrections = promises.draw(harmed, corrected, num_samples, arguments.calibrations, rng)
    exceeded = {}
    for bound in BOUNDS:
        passed = promises.passes(bound, harms, corrections, num_samples, drop).cumprod(1).sum(1)
        # thresholds that were certified; where none are, there is nothing to watch
        calibrations = np.flatnonzero(passed)
        chosen = passed[calibrations] - 1
        found = harms[calibrations, chosen] + corrections[calibrations, chosen]
        limits = {int(count): max(upper_bound(int(count), num_samples, 0.95), drop) for count in np.unique(found)}
        above = (harmed + corrected)[chosen] > np.array([limits[int(count)] for count in found])
        exceeded[bound] = float(above.sum() / arguments.calibrations)
    return {"model": model, "num_samples": num_samples, "drop": drop, "exceeded": exceeded}


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    return "\n\n".join(
        (
            _delays([row for row in results["settings"] if row["corrections"] is None], tuple(TESTS)),
            _delays([row for row in results["settings"] if row["corrections"] is not None], OF_A_DROP),
            markdown_table(
                ("replicas", "images between reports", "limit", "rate", "false alarms", "median delay"),
                [
                    (
                        row["replicas"],
                        row["block"],
                        f"{row['limit']:.1%}",
                        row["stream"],
                        f"{row['false_alarms']:.1%}",
                        "" if row["stream"] == "1×" else _images(row["delay"]),
                    )
                    for row in results["replicas"]
                ],
            ),
            markdown_table(
                ("model", "images", "allowed drop", *(f"above the bound, {bound}" for bound in BOUNDS)),
                [
                    (
                        row["model"],
                        row["num_samples"],
                        f"{row['drop']:.1%}",
                        *(f"{row['exceeded'][bound]:.1%}" for bound in BOUNDS),
                    )
                    for row in results["upper_bound"]
                ],
            ),
        )
    )


def _delays(rows: list[dict[str, Any]], tests: tuple[str, ...]) -> str:
    """False alarms at the limit, and median delays above it."""
    is_drop = rows[0]["corrections"] is not None
    header = ("limit", *(["of a drop"] if is_drop else []), "rate", "told", *tests)
    lines = []
    for row in rows:
        is_false = row["stream"] == "1×"
        cells = [f"{row['false_alarms'][test]:.1%}" if is_false else _images(row["delays"][test]) for test in tests]
        setting = (f"{row['limit']:.1%}", *([row["corrections"]] if is_drop else []), row["stream"])
        lines.append((*setting, "false alarms" if is_false else "median delay", *cells))
    return markdown_table(header, lines)


def _images(delay: float | None) -> str:
    return "later" if delay is None else f"{delay:.0f}"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Simulates every setting and prints the tables. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(MonitoringArguments).parse_args_into_dataclasses(argv)
    kinds = (None, *CORRECTIONS)
    settings = [
        (name, limit, kind) for kind in kinds for limit in (LIMITS_OF_A_DROP if kind else LIMITS) for name in STREAMS
    ]
    replicas = [(name, 0.02, *setting) for setting in REPLICAS for name in ("1×", "2×", "½×, then 2×", "½×, then 5×")]
    calibrations = [(model, size, drop) for model in promises.MODELS for size in (400, 1500) for drop in (0.01, 0.02)]
    results = {
        "alpha": ALPHA,
        **{name: value for name, value in asdict(arguments).items() if name != "output"},
        "settings": [simulate(*setting, arguments) for setting in settings],
        "replicas": [simulate_replicas(*setting, arguments) for setting in replicas],
        "upper_bound": [simulate_upper_bound(*setting, arguments) for setting in calibrations],
    }
    print(tables(results))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
