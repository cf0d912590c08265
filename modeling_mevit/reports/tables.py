# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Markdown tables and sentences, from what `metrics.json`, `evaluation.json` and a benchmark hold."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], rows: Iterable[Iterable[Any]]) -> str:
    r"""A Markdown table without a final line break.

    Args:
        header: one title for each column.
        rows: cells of each row, as many as the header has. `None` is shown as "–"; a "|" is escaped.

    Raises:
        ValueError: if a row has more or fewer cells than the header.

    Example:
        >>> print(markdown_table(("exit", "accuracy"), [(6, None), ("a|b", 0.5)]))
        | exit | accuracy |
        | --- | --- |
        | 6 | – |
        | a\|b | 0.5 |
    """
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        cells = list(row)
        if len(cells) != len(header):
            raise ValueError(f"a row must have {len(header)} cells, as the header {list(header)} has, got {cells}")
        lines.append(_line(cells))
    return "\n".join(lines)


def measured_splits(exits: Sequence[dict[str, Any]]) -> list[str]:
    """Which of validation and test the exits were measured on; a run that chooses a recipe leaves test alone."""
    return [split for split in ("validation", "test") if f"{split}_accuracy" in exits[0]]


def results_table(exits: Sequence[dict[str, Any]]) -> str:
    """Every exit after training: accuracy on each split measured, cost relative to the plain ViT, parameters.

    Args:
        exits: `exits` of `metrics.json`.
    """
    splits = measured_splits(exits)
    return markdown_table(
        ("exit", *(f"{split} accuracy" for split in splits), "cost", "parameters"),
        (
            (
                row["exit"],
                *(f"{row[f'{split}_accuracy']:.1%}" for split in splits),
                f"{row['cost']:.3f}",
                f"{row['parameters'] / 1e6:.1f} M",
            )
            for row in exits
        ),
    )


def evaluation_tables(evaluation: dict[str, Any]) -> str:
    """What `evaluate` measured: a table of the exits, one of the policies, and the early-exit run in words.

    Args:
        evaluation: what `Evaluation.to_dict()` gives and `evaluation.json` holds.
    """
    exits = [(row["exit"], f"{row['accuracy']:.1%}", f"{row['cost']:.3f}") for row in evaluation["exits"]]
    if evaluation.get("plain_accuracy") is not None:
        exits.append(("plain ViT", f"{evaluation['plain_accuracy']:.1%}", "1.000"))
    layers = [row["exit"] for row in evaluation["exits"]]
    policies = []
    for policy, quality in evaluation["policies"].items():
        auroc = {str(layer): area for layer, area in quality["auroc"].items()}  # the keys are strings in JSON
        areas = [None if auroc[str(layer)] is None else f"{auroc[str(layer)]:.3f}" for layer in layers]
        policies.append((policy, f"{quality['area']:.4f}", f"{quality['oracle']:.4f}", *areas))
    precision = evaluation.get("precision", "float32")  # which was not said before
    parts = [
        f"{evaluation['num_samples']} images{'' if precision == 'float32' else f', in {precision}'}",
        markdown_table(("exit", "accuracy", "cost"), exits),
        markdown_table(("policy", "area", "oracle", *(f"AUROC {layer}" for layer in layers)), policies),
    ]
    if combination := combination_sentence(evaluation.get("exit_combination", "none")):
        parts.insert(1, combination)
    if evaluation.get("early_exit"):
        parts.append(early_exit_sentence(evaluation["early_exit"]))
    return "\n\n".join(parts)


def combination_sentence(combination: str) -> str:
    """What an exit predicts with, one of `EXIT_COMBINATIONS`, in words; empty where it is its own logits."""
    sentences = {
        "none": "",
        "mean": "An exit predicts with the mean of the log-probabilities of the exits passed so far, itself included.",
    }
    return sentences[combination]


def early_exit_sentence(run: dict[str, Any]) -> str:
    """The early-exit run that `evaluate` measured, in words.

    Args:
        run: `early_exit` of [`evaluation_tables`]' argument.
    """
    point = run["operating_point"]
    counts = ", ".join(f"{count} at {layer}" for layer, count in point["exit_counts"].items())
    return (
        f"Early exit: accuracy {point['accuracy']:.1%} (last exit {point['full_model_accuracy']:.1%}; "
        f"{point['harms']} harmed, {point['corrections']} corrected){_disagreement(point)}, mean cost "
        f"{point['cost']:.3f}, "
        f"{run['images_per_second']:.1f} images a second, relative latency {run['relative_latency']:.2f} "
        f"({run['reference']}: {run['plain_images_per_second']:.1f} images a second). Images that left: {counts}."
    )


def _disagreement(point: dict[str, Any]) -> str:
    """How often the exit taken gives another label than the last one, which older operating points lack."""
    if "disagreements" not in point:
        return ""
    return f", disagreement {point['disagreements'] / point['num_samples']:.1%}"


def benchmark_table(rows: Sequence[dict[str, Any]], why_no_energy: str | None = None) -> str:
    """Size, latency, memory and energy of each way to run a model, beside the ratio to the plain ViT in that library.

    Args:
        rows: what [`modeling_mevit.onnx.benchmark.benchmark`] gives.
        why_no_energy: a sentence under the table, where energy could not be measured.
    """
    plain = {row["library"]: row for row in rows if row["name"] == "plain ViT"}
    cells = []
    for row in rows:
        base = plain[row["library"]]
        cells.append(
            (
                row["name"],
                row["library"],
                row["precision"],
                f"{row['megabytes']:.1f} ({row['megabytes'] / base['megabytes']:.2f} ×)",
                f"{row['median']:.1f} ({row['median'] / base['median']:.2f} ×)",
                f"{row['p95']:.1f}",
                f"{row['memory']:.0f} ({row['memory'] / base['memory']:.2f} ×)",
                "not measured" if row["joules"] is None else f"{row['joules']:.2f}",
            )
        )
    table = markdown_table(
        (
            "model",
            "library",
            "precision",
            "file (MB)",
            "latency, median (ms)",
            "p95 (ms)",
            "peak memory (MiB)",
            "energy (J)",
        ),
        cells,
    )
    return f"{table}\n\nEnergy was not measured: {why_no_energy}" if why_no_energy else table


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join('–' if cell is None else str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
