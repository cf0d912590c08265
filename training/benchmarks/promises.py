# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""How often certificates are wrong and how much they save, in simulated calibrations whose truth is known.

    python training/benchmarks/promises.py [--output promises.json]

Each image has a score, uniform in 0 … 1, and leaves at the only early exit where it is below the threshold. Whether it
is then harmed or corrected depends on its score, as a model below says, so that the true drop of every threshold is
known. Thresholds are tested in turn, as `fixed_sequence_test` does. Violations: calibrations that certify a threshold
whose true drop is above the allowed one; 5 % are promised. Saved: the mean share of images that leave early, times the
share of the cost that the early exit saves.

Besides the two bounds there is `betting`, the earlier difference bound: the mean capital of gamblers with constant
stakes (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024).

The allowed drop is also what may be allowed of a disagreement, which here is a harm or a correction: certified at a
confidence, where a violation is a true disagreement above it, and in expectation, of harm and of disagreement. There
what counts is the mean of the true shares of images lost over all calibrations: it may not be above what is allowed,
while a single one may. With one early exit, an image that is lost under some threshold is lost under every bolder one,
so that counts are running maxima already.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp
from transformers import HfArgumentParser

from modeling_mevit.early_exit.calibration import BOUNDS, bounds_expectation, most_harms
from modeling_mevit.reports.tables import markdown_table


SIZES = (400, 800, 1500)
DROPS = (0.005, 0.01, 0.02)
CONFIDENCE = 0.95
SAVING = 0.5  # of the cost, where all images leave early
THRESHOLDS = np.linspace(0, 1, 101)[1:]
TESTS = (*BOUNDS, "betting", "disagreement")
EXPECTATIONS = ("expected harm", "expected disagreement")

# model → what share of all images with a score below t is harmed and corrected, by t and the allowed drop
Shares = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
MODELS: dict[str, Shares] = {
    "few harms": lambda t, drop: (0.03 * t**4, 0.01 * t**4),
    "many corrections": lambda t, drop: (0.06 * t**4, 0.05 * t**4),
    # adversarial: every threshold loses a hair more than is allowed
    "sure and wrong": lambda t, drop: (np.full_like(t, 1.0001 * drop), np.zeros_like(t)),
    "hidden by corrections": lambda t, drop: (np.full_like(t, 0.05 + 1.0001 * drop), np.full_like(t, 0.05)),
}


@dataclass
class PromisesArguments:
    """What is simulated."""

    calibrations: int = field(default=1000, metadata={"help": "Calibrations of each setting."})
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def draw(
    harmed: np.ndarray, corrected: np.ndarray, num_samples: int, calibrations: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Harms and corrections of T thresholds on the images of each calibration.

    Args:
        harmed: (T,), share of images that are harmed at a threshold.
        corrected: (T,).
        num_samples: images of a calibration.
        calibrations: C.
        rng: what draws.

    Returns:
        Both (C, T), int64, never decreasing along T.
    """
    cells = np.concatenate((np.diff(harmed, prepend=0.0), np.diff(corrected, prepend=0.0)))
    counts = rng.multinomial(num_samples, np.append(cells, 1 - cells.sum()), calibrations)[:, :-1]
    harms, corrections = np.split(counts, 2, axis=1)
    return harms.cumsum(1), corrections.cumsum(1)


def passes(test: str, harms: np.ndarray, corrections: np.ndarray, num_samples: int, drop: float) -> np.ndarray:
    """(C, T), bool: whether a test, or a bound in expectation, certifies each threshold by itself."""
    if test in EXPECTATIONS:
        lost = harms if test == "expected harm" else harms + corrections
        return bounds_expectation(lost, num_samples, drop)
    if test == "disagreement":
        return harms + corrections <= most_harms(num_samples, drop, CONFIDENCE, "harm")[0]
    if test in BOUNDS:
        return harms <= most_harms(num_samples, drop, CONFIDENCE, test)[corrections]
    pairs, places = np.unique(np.stack((harms.ravel(), corrections.ravel())), axis=1, return_inverse=True)
    h, c = pairs[:, :, None]
    stakes = np.linspace(0, 1, 101)[:-1] / (1 - drop)
    gains = h * np.log1p(stakes * (drop - 1)) + c * np.log1p(stakes * (drop + 1))
    capital = logsumexp(gains + (num_samples - h - c) * np.log1p(stakes * drop), axis=1) - np.log(len(stakes))
    return (capital >= -np.log(1 - CONFIDENCE))[places.reshape(harms.shape)]


def simulate(model: str, num_samples: int, drop: float, arguments: PromisesArguments) -> dict[str, Any]:
    """Violations and saving of every test in one setting, and risks in expectation, on the same draws."""
    harmed, corrected = MODELS[model](THRESHOLDS, drop)
    rng = np.random.default_rng([arguments.seed, list(MODELS).index(model), num_samples, round(drop * 1e6)])
    harms, corrections = draw(harmed, corrected, num_samples, arguments.calibrations, rng)
    lost = {"disagreement": harmed + corrected, "expected harm": harmed, "expected disagreement": harmed + corrected}
    violations, risks, saved = {}, {}, {}
    for test in (*TESTS, *EXPECTATIONS):
        # how many thresholds are certified before the first one that fails; none lets all images run to the end
        passed = passes(test, harms, corrections, num_samples, drop).cumprod(1).sum(1)
        shares = np.append(0.0, lost.get(test, harmed - corrected))[passed]
        if test in TESTS:
            violations[test] = float((shares > drop).mean())
        else:
            risks[test] = float(shares.mean())
        saved[test] = float(SAVING * np.append(0.0, THRESHOLDS)[passed].mean())
    setting = {"model": model, "num_samples": num_samples, "drop": drop}
    return {**setting, "violations": violations, "risks": risks, "saved": saved}


def tables(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: the tests of a drop, and what there is besides them."""
    drops = [test for test in TESTS if test != "disagreement"]
    return "\n\n".join(
        (
            _table(results, "allowed drop", [("violations", drops), ("saved", drops)]),
            _table(
                results,
                "allowed share",
                [
                    ("violations", ["disagreement"]),
                    ("risks", list(EXPECTATIONS)),
                    ("saved", ["disagreement", *EXPECTATIONS]),
                ],
            ),
        )
    )


def _table(results: list[dict[str, Any]], allowed: str, columns: list[tuple[str, list[str]]]) -> str:
    header = [test if kind == "risks" else f"{kind}, {test}" for kind, tests in columns for test in tests]
    rows = [
        (
            row["model"],
            row["num_samples"],
            f"{row['drop']:.1%}",
            *(f"{row[kind][test]:.{2 if kind == 'risks' else 1}%}" for kind, tests in columns for test in tests),
        )
        for row in results
    ]
    return markdown_table(("model", "images", allowed, *header), rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Simulates every setting and prints the tables. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(PromisesArguments).parse_args_into_dataclasses(argv)
    settings = [(model, size, drop) for model in MODELS for size in SIZES for drop in DROPS]
    results = {
        "confidence": CONFIDENCE,
        **{name: value for name, value in asdict(arguments).items() if name != "output"},
        "settings": [simulate(*setting, arguments) for setting in settings],
    }
    print(tables(results["settings"]))
    print(json.dumps(results))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
