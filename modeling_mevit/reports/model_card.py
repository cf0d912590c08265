# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint, rendered from what lies beside it.

`config.json` tells the exits and how early exit was calibrated, `metrics.json` of `training/train.py` the training and
its results, `evaluation.json` of `mevit evaluate` what early exit gave on other images. Each section of
`model_card.md` is kept where there is something to fill it with; what was measured with exits combined otherwise is
left out. Nothing in a card is a fact of its own, so it is rendered again whenever one of these files changes.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from ..atomic import write_text
from ..configuration_mevit import MEViTConfig
from ..data.identity import UNLABELLED
from ..early_exit.calibration_target import WHAT_THE_AVERAGE_COUNTS, CalibrationTarget
from ..early_exit.predictions import OperatingPoint
from ..modeling_mevit import weights_digest
from .tables import combination_sentence, early_exit_sentence, markdown_table, measured_splits, results_table


# Also tells a card of ours from one that somebody wrote.
NOTICE = (
    "<!-- Rendered by modeling_mevit from config.json, metrics.json and evaluation.json, and again whenever one of "
    "them changes. -->"
)

SCORES = {
    "uncertainty": "the predicted uncertainty",
    "confidence": "1 − the largest probability",
    "entropy": "the entropy of the probabilities",
    "margin": "1 − the difference between the two largest probabilities",
    "patience": "1 − n/E, where n of the E exits, this one and those right before it, agree",
}


def write_card(directory: str | PathLike[str]) -> bool:
    """Writes `README.md` of a checkpoint's directory.

    Without `metrics.json` the directory may hold a README of somebody's own, which is left as it is.

    Returns:
        Whether it was written.
    """
    directory = Path(directory)
    file = directory / "README.md"
    if not (directory / "metrics.json").is_file() and file.is_file() and NOTICE not in file.read_text("utf-8"):
        return False
    write_text(file, render_card(directory))
    return True


def render_card(directory: str | PathLike[str]) -> str:
    """The card, as Markdown with the metadata that the Hub reads.

    Args:
        directory: with `config.json` and, optionally, `metrics.json`, `evaluation.json` and the figures
            `training_curve.png` and `accuracy_cost.png`.

    Raises:
        OSError: without `config.json`.
        ValueError: if that is not of a MEViT.
    """
    directory = Path(directory)
    config = MEViTConfig.from_pretrained(directory)
    metrics = _read_json(directory / "metrics.json")
    evaluation = _read_json(directory / "evaluation.json")
    published = metrics.get("card", {})
    values: dict[str, Any] = {
        "notice": NOTICE,
        "model_name": published.get("model_name") or directory.resolve().name,
        "exit_layers": ", ".join(map(str, config.exit_layers)),
        "first_exit": config.exit_layers[0],
        "num_labels": config.num_labels,
        "dataset": f", trained on {metrics['dataset']}" if metrics else "",
        "license": _license(metrics),
        "combination": f" {combination_sentence(config.exit_combination)}".rstrip(),
    }
    is_of_this_model = metrics.get("exit_combination", "none") == config.exit_combination  # older ones do not tell
    exits = metrics.get("exits", []) if is_of_this_model else []
    values["metadata"] = _metadata(values["model_name"], metrics, exits).to_yaml().strip()
    absent = set()
    if exits:
        curve = _figure(directory / "training_curve.png", "Training loss and validation accuracy")
        values |= {"results": results_table(exits), "training_curve": curve}
    else:
        absent.add("## Results")
        values["training_curve"] = ""
    if metrics:
        values |= _training(metrics)
    else:
        absent.add("## Training")
    calibration = _calibration(config, directory)
    if calibration:
        values |= _early_exit(calibration, config.exit_layers)
    else:
        absent.add("## Early exit")
    if calibration and _is_of_other_images(evaluation, calibration):
        curve = _figure(directory / "accuracy_cost.png", "Accuracy by mean cost")
        values |= {"accuracy_cost": curve, **_evaluation(evaluation)}
    else:
        absent.add("## Early exit, measured")

    template = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    sections = re.split(r"^(?=## )", template, flags=re.MULTILINE)
    text = "".join(section for section in sections if section.splitlines()[0] not in absent).format(**values)
    return re.sub(r"\n{3,}", "\n\n", text)  # where a figure is missing


def _metadata(model_name: str, metrics: dict[str, Any], exits: list[dict[str, Any]]) -> ModelCardData:
    """What the Hub lists and searches, with the results of the exits; it links the names that are on the Hub."""
    published = metrics.get("card", {})
    dataset, base_model = metrics.get("dataset", ""), _base_model(metrics)
    # a Hub id has an owner, a local folder's public name has none
    dataset_on_hub = published.get("dataset_on_hub", "/" in dataset)
    base_model_on_hub = published.get("base_model_on_hub", "/" in (base_model or ""))
    results = []
    if exits:
        split = measured_splits(exits)[-1]
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset if dataset_on_hub else dataset.lower().replace(" ", "-"),
                dataset_name=dataset,
                dataset_split=split,
                metric_type="accuracy",
                metric_name=f"Accuracy of exit {row['exit']}",
                metric_value=round(row[f"{split}_accuracy"], 4),
            )
            for row in exits
        ]
    return ModelCardData(
        license=published.get("license"),
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["mevit", "vision", "fine-grained", "early-exit"],
        datasets=[dataset] if dataset_on_hub else None,
        base_model=base_model if base_model_on_hub else None,
        metrics=["accuracy"],
        model_name=model_name if results else None,
        eval_results=results or None,
    )


def _license(metrics: dict[str, Any]) -> str:
    given = metrics.get("card", {}).get("license")
    text = f"The weights are licensed under {given}" if given else "No licence is stated for the weights"
    sources = [name for name in (metrics.get("dataset"), _base_model(metrics)) if name]
    return f"{text}; the terms of {' and '.join(sources)} apply too" if sources else text


def _training(metrics: dict[str, Any]) -> dict[str, str]:
    """Data, start, time and recipe of the training."""
    counts = ", ".join(f"{count:,} {split}" for split, count in metrics["num_samples"].items())
    start = f"from {_base_model(metrics)}" if _base_model(metrics) else "from random weights"
    text = f"Trained on {metrics['dataset']} ({counts} images), {start}."
    environment, seconds = _environment(metrics), metrics.get("training_seconds")
    if environment:
        duration = f" for {_duration(seconds)}" if seconds else ""  # not known of a run that was interrupted
        text += (
            f"\nIt ran{duration} on {_device(environment)}, with PyTorch {environment['torch']} and Transformers "
            f"{environment['transformers']}."
        )
    recipe = (
        (name, json.dumps(value) if isinstance(value, dict) else value) for name, value in metrics["recipe"].items()
    )
    return {"training": text, "recipe": markdown_table(("setting", "value"), recipe)}


def _calibration(config: MEViTConfig, directory: Path) -> dict[str, Any] | None:
    """The calibration of what lies in a directory; None where early exit is off, or it was made for something else,
    such as other thresholds, other exits or other weights."""
    if not (config.early_exit and config.calibration) or config.calibration_mismatches():
        return None
    point = config.calibration.get("operating_point") or {}
    lacking = [name for name in ("target", "data") if name not in config.calibration]
    # disagreements were not counted before
    lacking += [field.name for field in fields(OperatingPoint) if field.name not in (*point, "disagreements")]
    if lacking:
        raise ValueError(f"calibration of config.json must be as `mevit calibrate` writes it; it lacks {lacking[0]}.")
    made_for = config.calibration.get("made_for") or {}
    weights = sorted(directory.glob("model*.safetensors"))
    if weights and made_for.get("weights"):
        dtype = made_for["dtype"].split()[0]  # of weights; "with autocast to …" may follow
        found = weights_digest(_tensors(weights, getattr(torch, dtype)))
        return config.calibration if found == made_for["weights"] else None
    return config.calibration


def _tensors(files: Iterable[Path], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name, as a model of that precision has them in memory."""
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is no dict
                yield name, stored.get_tensor(name).to(dtype)


def _early_exit(calibration: dict[str, Any], exit_layers: list[int]) -> dict[str, Any]:
    """How the thresholds were chosen, and what is promised of them."""
    target = CalibrationTarget.from_dict(calibration["target"])
    point, data = calibration["operating_point"], calibration["data"]
    made_for = calibration.get("made_for") or {}
    rows = zip(exit_layers, point["thresholds"], strict=False)  # the last exit has none
    hashed = "content" if data and data["split"] == UNLABELLED else "content and labels"
    digest = f"; SHA-256 of {hashed} `{data['sha256'][:16]}…`" if data else ""
    return {
        "policy": point["policy"],
        "score": SCORES[point["policy"]],
        "thresholds": markdown_table(("exit", "threshold"), ((layer, f"{number:.6g}") for layer, number in rows)),
        "target": _target(target, made_for.get("dtype") if made_for.get("weights") else None),
        "chosen": _chosen(point, _images(point["num_samples"], data, digest)),
    }


def _chosen(point: dict[str, Any], images: str) -> str:
    """What the thresholds gave on the images that chose them; without labels, no accuracy."""
    has_labels = point["accuracy"] is not None
    accuracy = (
        f"accuracy {point['accuracy']:.1%}, that of the last exit {point['full_model_accuracy']:.1%}, "
        if has_labels
        else ""
    )
    lines = [f"The thresholds were chosen on {images}: {accuracy}mean cost {point['cost']:.3f} of the plain ViT's."]
    if has_labels:
        lines.append(
            f"Early exit was wrong where the last exit is right on {point['harms']} of these images, and right where "
            f"it is wrong on {point['corrections']}."
        )
    if "disagreements" in point:  # which older operating points lack
        lines.append(f"It gave another label than the last exit to {point['disagreements']} of these images.")
    return "\n".join(lines)


def _target(target: CalibrationTarget, dtype: str | None) -> str:
    """What the thresholds were chosen for, and whether it is promised for other images: of these weights in a
    precision, or of weights that the calibration does not tell, where `dtype` is None."""
    if target.max_cost is not None:
        return (
            f"They give the best accuracy within a mean cost of {target.max_cost:.3g} on the calibration images. "
            "Nothing is promised for others."
        )
    if target.needs_labels:
        keeps = f"loses at most {target.limit:.2%} in accuracy against the last exit on"
    else:
        keeps = f"gives another label than the last exit to at most {target.limit:.2%} of"
    if target.guarantee is None:
        return (
            f"They give the lowest cost at which early exit {keeps} the calibration images. Nothing is promised for "
            "others."
        )
    if dtype is None:
        return (
            f"It was certified that early exit {keeps} images like those, but the calibration does not say for which "
            "weights. Nothing is promised until it is run again."
        )
    bound = f" ({target.bound} bound)" if target.bound else ""
    counts = f" {WHAT_THE_AVERAGE_COUNTS}" if target.guarantee == "expectation" else ""
    return (
        f"Certified: {target.certainty} over the draw of the calibration images, early exit {keeps} images like "
        f"those{bound}, if those images neither trained the model nor chose its recipe. This holds for these weights "
        f"in {dtype}.{counts}"
    )


def _is_of_other_images(evaluation: dict[str, Any], calibration: dict[str, Any]) -> bool:
    """Whether an evaluation ran the calibrated thresholds, on images that neither chose them nor trained the model."""
    run, data = evaluation.get("early_exit"), evaluation.get("data")
    if not run or "operating_point" not in run:  # which evaluations by older versions lack
        return False
    measured, chosen = run["operating_point"], calibration["operating_point"]
    made_for = calibration.get("made_for") or {}
    return (
        (measured["policy"], measured["thresholds"]) == (chosen["policy"], chosen["thresholds"])
        and evaluation.get("exit_combination", "none") == made_for.get("exit_combination", "none")
        and evaluation.get("precision", "float32") == made_for.get("dtype", "float32")
        and not evaluation["calibration_images"]
        and not (data and data["split"] in ("train", "all"))
    )


def _evaluation(evaluation: dict[str, Any]) -> dict[str, str]:
    """What early exit gave on other images, and on which machine."""
    environment = _environment(evaluation)
    threads = f", {environment['threads']} threads" if environment.get("threads") else ""
    return {
        "evaluation_data": _images(evaluation["num_samples"], evaluation.get("data")),
        "measured_on": f"; on {_device(environment)}{threads}" if environment else "",
        "measured": early_exit_sentence(evaluation["early_exit"]),
    }


def _images(count: int, data: dict[str, Any] | None, more: str = "") -> str:
    """How many images of what, such as "300 images of demo (validation)"."""
    if not data:
        return f"{count} images"
    half = f", {data['half']} half" if data["half"] else ""
    return f"{count} images of {data['name']} ({data['split']}{half}{more})"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _base_model(metrics: dict[str, Any]) -> Any:
    """Name of the pretrained ViT that training started from, or None."""
    return metrics.get("card", {}).get("base_model") or metrics.get("recipe", {}).get("backbone")


def _environment(measured: dict[str, Any]) -> dict[str, Any]:
    return measured.get("environment") or measured.get("machine") or {}  # its name in older versions


def _device(environment: dict[str, Any]) -> str:
    """What a model ran on: the accelerator, if there is one and `device` does not say that it was left alone."""
    if environment["accelerator"] and environment.get("device") != "cpu":
        return str(environment["accelerator"])
    return f"{environment['cpu']} ({environment['cores']} cores)"


def _figure(file: Path, description: str) -> str:
    return f"![{description}]({file.name})" if file.is_file() else ""


def _read_json(file: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
