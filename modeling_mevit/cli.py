# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The command `mevit`: from a trained checkpoint to one that leaves early, and what it then does."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import torch
import transformers
import typer
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.dynamic_module_utils import custom_object_save

from .calibration import PATH_PART, Certificate, required_sample_size, disable_early_exit, enable_early_exit
from .calibration import calibrate as calibrate_record
from .configuration_mevit import MEViTConfig
from .data import (
    ImageClassificationDataset,
    evaluation_transform,
    fingerprint,
    image_hashes,
    load_split,
    public_name,
    read_image,
)
from .evaluation import accuracy_of, run_early_exit
from .evaluation import evaluate as evaluate_record
from .exit_record import predict_exits
from .figures import accuracy_cost_curve
from .machine import machine
from .model_card import (
    EARLY_EXIT_HEADING,
    MEASURED_HEADING,
    early_exit_section,
    evaluation_section,
    with_section,
)
from .modeling_mevit import MEViTForImageClassification


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Policy = Literal["uncertainty", "confidence", "entropy", "margin", "patience"]
Checkpoint = Annotated[str, typer.Argument(help="Directory or Hub name of a trained model.", show_default=False)]
Data = Annotated[str, typer.Option(help="A folder of images, a Hub data set, or 'demo'.", show_default=False)]
Half = Annotated[str | None, typer.Option(help="'first' or 'second' half of the split, at random by class, fixed.")]
Output = Annotated[Path | None, typer.Option(help="Directory to write to; the checkpoint's by default, if it is one.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of a Hub data set with the images.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a Hub data set with the labels.")]
AircraftLevel = Annotated[str, typer.Option(help="FGVC-Aircraft: 'variant', 'family' or 'manufacturer'.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time.", min=1)]
Device = Annotated[str | None, typer.Option(help="Such as 'cpu' or 'cuda'; a GPU where there is one, by default.")]


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    data: Data,
    split: Annotated[str, typer.Option(help="'validation', 'test', 'train' or 'all'.")] = "validation",
    half: Half = None,
    max_cost: Annotated[float | None, typer.Option(help="Best accuracy within this mean cost (1: plain ViT).")] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Lowest cost within this drop against the last exit (0.01: one point).")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="With a drop: promise it for other images, with this probability.")
    ] = None,
    bound: Annotated[
        Literal["harm", "difference"] | None,
        typer.Option(help="With a confidence: test the harm rate, which is the default, or the drop itself."),
    ] = None,
    policy: Annotated[Policy | None, typer.Option(help="Exit policy; the checkpoint's by default.")] = None,
    thresholds: Annotated[
        Literal["shared", "per-exit"], typer.Option(help="One for all exits, or one for each.")
    ] = "shared",
    output: Output = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    aircraft_level: AircraftLevel = "variant",
    batch_size: BatchSize = 32,
    device: Device = None,
) -> None:
    """Chooses the thresholds of early exit on held-out images, and turns it on in the checkpoint's config."""
    if (max_cost is None) == (max_accuracy_drop is None):
        raise ValueError("give one of --max-cost and --max-accuracy-drop.")
    if confidence is not None and max_accuracy_drop is None:
        raise ValueError("--confidence is for --max-accuracy-drop; a cost is no promise.")
    if bound is not None and confidence is None:
        raise ValueError("--bound is for --confidence; without one nothing is tested.")
    _check_split_of_promise(confidence, split)
    for name, share in (("--max-accuracy-drop", max_accuracy_drop), ("--confidence", confidence)):
        if share is not None and not 0 <= share < 1:
            raise ValueError(f"{name} {share} is no share; allowed is 0 to below 1.")
    model = _load(checkpoint, device)
    destination = _destination(checkpoint, output)
    config = model.config
    if len(config.exit_layers) < 2:
        raise ValueError(f"{checkpoint} has one exit only, {config.exit_layers}; nothing can leave early.")
    policy = policy or config.exit_policy
    if policy == "patience" and thresholds == "per-exit":
        raise ValueError("patience has one number for all exits; --thresholds per-exit is for policies with a score.")
    rows, dataset = _images(
        config, checkpoint, data, split, half,
        image_column=image_column, label_column=label_column, aircraft_level=aircraft_level,
    )  # fmt: skip
    record = predict_exits(model, dataset, batch_size=batch_size)

    promise: dict[str, Any] = {"max_cost": max_cost}
    if max_accuracy_drop is not None:
        promise = {"max_accuracy_drop": max_accuracy_drop}
    if confidence is not None:
        promise |= {"confidence": confidence, "bound": bound or "harm"}
    per_exit = thresholds == "per-exit"
    certificate = calibrate_record(record, policy, promise, per_exit=per_exit, num_labels=config.num_labels)
    print(calibration_report(certificate, promise, per_exit=per_exit))
    found = certificate.granted
    if found is None:
        disable_early_exit(config)
    else:
        source = {"name": public_name(data), "split": split, "half": half, "sha256": fingerprint(rows)}
        enable_early_exit(config, found, promise, per_exit=per_exit, source=source)
    _save(model, checkpoint, destination)
    state = "on" if config.early_exit else "off"
    print(f"Early exit is {state} in {destination}.")
    if found is None:
        raise typer.Exit(1)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    split: Annotated[str, typer.Option(help="'test', 'validation', 'train' or 'all'.")] = "test",
    half: Half = None,
    plain: Annotated[
        str | None, typer.Option(help="Checkpoint of a plain ViT to compare with on the same images.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Evaluate on the images that calibrated.")] = False,
    output: Output = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    aircraft_level: AircraftLevel = "variant",
    batch_size: BatchSize = 32,
    device: Device = None,
) -> None:
    """Measures every exit, every policy and the early-exit run.

    Writes evaluation.json, evaluation.md and accuracy_cost.png, and a section of the checkpoint's own card. Given the
    directory of an exported cascade, it runs that in ONNX Runtime and writes evaluation.json.
    """
    source = {"image_column": image_column, "label_column": label_column, "aircraft_level": aircraft_level}
    if Path(checkpoint, "cascade.json").is_file():
        if plain or device:
            raise ValueError(f"{checkpoint} is an exported cascade; --plain and --device are for checkpoints.")
        _evaluate_exported(Path(checkpoint), data, split, half, force, output, batch_size, source)
        return
    model = _load(checkpoint, device)
    destination = _destination(checkpoint, output)
    rows, dataset = _images(model.config, checkpoint, data, split, half, **source)
    calibration = model.config.calibration
    if not force:
        _refuse_calibrating(rows, model.config, data, source)
    record = predict_exits(model, dataset, batch_size=batch_size)
    run = run_early_exit(model, dataset, batch_size=batch_size) if model.config.early_exit else None
    results = {
        "data": {"name": public_name(data), "split": split, "half": half, "sha256": fingerprint(rows)},
        "calibration": calibration,
        **evaluate_record(model, record, run),
        "machine": {**machine(), "device": str(model.device), "threads": torch.get_num_threads()},
    }
    plain_accuracy = None
    if plain:
        plain_model = AutoModelForImageClassification.from_pretrained(plain).to(model.device).eval()
        if len(getattr(plain_model.config, "exit_layers", [])) > 1:
            raise ValueError(
                f"--plain {plain} has exits on layers {plain_model.config.exit_layers}; a plain ViT has one."
            )
        _, plain_dataset = _images(plain_model.config, plain, data, split, half, **source)
        plain_accuracy = results["plain_accuracy"] = accuracy_of(plain_model, plain_dataset, batch_size=batch_size)

    table = evaluation_tables(results)
    print(table)
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "evaluation.json").write_text(
        json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    (destination / "evaluation.md").write_text(table + "\n", encoding="utf-8")
    accuracy_cost_curve(record, plain_accuracy).savefig(destination / "accuracy_cost.png", dpi=120)
    card = destination / "README.md"
    is_own = destination.resolve() == Path(checkpoint).resolve()
    if run and is_own and card.is_file() and split not in ("train", "all") and not force:
        section = evaluation_section(results, early_exit_sentence(results["early_exit"]), "accuracy_cost.png")
        text = with_section(card.read_text(encoding="utf-8"), MEASURED_HEADING, section)
        card.write_text(text, encoding="utf-8")
    print(f"\nevaluation.json, evaluation.md and accuracy_cost.png are in {destination}.")


@app.command()
@torch.no_grad()
def predict(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    batch_size: BatchSize = 32,
    device: Device = None,
) -> None:
    """Prints label, probability and exit layer of each image."""
    model = _load(checkpoint, device)
    transform = evaluation_transform(AutoImageProcessor.from_pretrained(checkpoint))
    for start in range(0, len(images), batch_size):
        files = images[start : start + batch_size]
        batch = [transform(read_image({"image": {"path": str(file), "bytes": None}})) for file in files]
        outputs = model(torch.stack(batch).to(model.device))
        probabilities, labels = outputs.logits.float().softmax(-1).max(-1)
        layers = [model.config.exit_layers[-1]] * len(files)
        if outputs.exit_layer is not None:
            layers = outputs.exit_layer.tolist()
        for file, probability, label, layer in zip(
            files, probabilities.tolist(), labels.tolist(), layers, strict=True
        ):
            print(f"{file}\t{model.config.id2label[label]}\t{probability:.3f}\texit {layer}")


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Directory that does not exist yet.", show_default=False)],
    exits: Annotated[list[int] | None, typer.Option(help="Exit layers to export a file for; all by default.")] = None,
    cascade: Annotated[bool, typer.Option("--cascade", help="Export the chain of stages between exits too.")] = False,
    early_exit: Annotated[bool, typer.Option(help="Whether the cascade leaves early by default.")] = True,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 17 to 23.")] = 18,
    quantize: Annotated[
        Literal["int8", "int8-dynamic"] | None, typer.Option(help="Multiply in int8, with fixed or dynamic ranges.")
    ] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of weights and activations.")] = "float32",
    data: Annotated[
        str | None, typer.Option(help="With a lower precision: the data set that the model was trained on.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Its images that choose the thresholds anew; those that calibrated by default."),
    ] = None,
    half: Half = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    aircraft_level: AircraftLevel = "variant",
) -> None:
    """Writes ONNX files that were compared with PyTorch: one for each exit, and the cascade."""
    try:
        from .onnx.export import export as export_model
        from .onnx.quantize import Quantization
    except ImportError as error:
        raise ValueError(f"exporting needs the extra packages of mevit[onnx]: {error}") from error
    if quantize and dtype != "float32":
        raise ValueError(f"--quantize {quantize} and --dtype {dtype} are two precisions; give one.")
    precision = quantize or (None if dtype == "float32" else dtype)
    if precision and not data:
        raise ValueError(f"{precision} needs --data: training images for ranges, others for thresholds.")
    model = _load(checkpoint, "cpu")
    calibration, quantization = model.config.calibration, None
    if precision:
        if split is None:
            source = calibration["data"] if calibration else {"split": "validation", "half": None}
            split, half = source["split"], half or source["half"]
        _check_split_of_promise((calibration or {"promise": {}})["promise"].get("confidence"), split)
        options = {"image_column": image_column, "label_column": label_column, "aircraft_level": aircraft_level}
        _, training = _images(model.config, checkpoint, data, "train", None, **options)
        rows, calibrating = _images(model.config, checkpoint, data, split, half, **options)
        source = {"name": public_name(data), "split": split, "half": half, "sha256": fingerprint(rows)}
        quantization = Quantization(precision, training, calibrating, source)
    done = export_model(
        model,
        AutoImageProcessor.from_pretrained(checkpoint),
        output,
        exits=exits,
        cascade=cascade,
        early_exit=early_exit,
        opset=opset,
        quantization=quantization,
    )
    for name, size in done.files.items():
        print(f"{size / 1e6:9.2f} MB  {name}")
    if precision:
        report = json.loads((output / "precision.json").read_text(encoding="utf-8"))
        for name, accuracy in report["accuracy"].items():
            print(f"{name}: accuracy {accuracy['float32']:.1%} in float32, {accuracy[precision]:.1%} in {precision}")
    print(f"Everything is in {output}; each float32 file gave what PyTorch gives.")
    if done.recalibrated:
        print(
            calibration_report(done.recalibrated, calibration["promise"], per_exit=calibration.get("per_exit", False))
        )
        if not done.recalibrated.granted:
            print(f"Early exit is off in {output}.")
            raise typer.Exit(1)


@app.command()
def benchmark(
    checkpoint: Checkpoint,
    exported: Annotated[Path, typer.Argument(help="What `mevit export --cascade` wrote.", show_default=False)],
    data: Data,
    split: Annotated[str, typer.Option(help="Its images to run on.")] = "test",
    images: Annotated[int, typer.Option(help="How many of them, drawn at random.", min=1)] = 100,
    threads: Annotated[int, typer.Option(help="Of one operator; the libraries' choice by default.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    aircraft_level: AircraftLevel = "variant",
) -> None:
    """Measures size, latency, memory and energy at batch 1, beside the plain ViT, in PyTorch and ONNX Runtime."""
    try:
        from .onnx.benchmark import benchmark as measure
        from .onnx.benchmark import find_energy_monitor, table_of
    except ImportError as error:
        raise ValueError(f"benchmarking needs the extra packages of mevit[onnx]: {error}") from error
    model = _load(checkpoint, "cpu")
    if not (model.config.early_exit and (exported / "cascade.json").is_file()):
        raise ValueError(f"{checkpoint} has to be calibrated and {exported} to hold its cascade.")
    cascade = json.loads((exported / "cascade.json").read_text(encoding="utf-8"))
    if not cascade["early_exit"]:
        raise ValueError(f"the cascade in {exported} does not leave early.")
    own = model.config.exit_policy, None if model.config.calibration is None else model.config.calibration["promise"]
    if own != (cascade["policy"], (cascade["calibration"] or {}).get("promise")):
        raise ValueError(f"{exported} is not of {checkpoint} as it is calibrated now; export it anew.")
    options = {"image_column": image_column, "label_column": label_column, "aircraft_level": aircraft_level}
    _, dataset = _images(model.config, checkpoint, data, split, None, **options)
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:images].tolist()
    arrays = [dataset[index]["pixel_values"][None].numpy() for index in drawn]
    monitor, why_no_energy = find_energy_monitor()
    rows = measure(checkpoint, exported, arrays, threads=threads, energy_monitor=monitor)
    print(table_of(rows, why_no_energy))
    if output:
        measured_on = {**machine(), "threads": threads or torch.get_num_threads()}
        results = {
            "machine": measured_on,
            "images": len(arrays),
            "energy": why_no_energy or "measured",
            "rows": rows,
        }
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def evaluation_tables(results: dict[str, Any]) -> str:
    """Markdown of what `mevit evaluate` measured: the exits, the policies, the early-exit run."""
    exits = ["| exit | accuracy | cost |", "| --- | --- | --- |"]
    exits += [f"| {row['exit']} | {row['accuracy']:.1%} | {row['cost']:.3f} |" for row in results["exits"]]
    if "plain_accuracy" in results:
        exits.append(f"| plain ViT | {results['plain_accuracy']:.1%} | 1.000 |")
    layers = [str(row["exit"]) for row in results["exits"]]
    columns = ["policy", "area", "oracle", *(f"AUROC {layer}" for layer in layers)]
    policies = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for policy, row in results["policies"].items():
        aurocs = ("–" if area is None else f"{area:.3f}" for area in map(row["auroc"].get, layers))
        cells = [f"{row['area']:.4f}", f"{row['oracle']:.4f}", *aurocs]
        policies.append(f"| {policy} | {' | '.join(cells)} |")
    parts = [f"{results['images']} images", "\n".join(exits), "\n".join(policies)]
    if "early_exit" in results:
        parts.append(early_exit_sentence(results["early_exit"]))
    return "\n\n".join(parts)


def early_exit_sentence(run: dict[str, Any]) -> str:
    """The early-exit run that `evaluate` measured, in words."""
    left = ", ".join(f"{count} at {layer}" for layer, count in run["exit_counts"].items())
    return (
        f"Early exit: accuracy {run['accuracy']:.1%} (last exit {run['full_model_accuracy']:.1%}; "
        f"{run['harms']} harmed, {run['corrections']} corrected), mean cost {run['cost']:.3f}, "
        f"time {run['time']:.2f} of the plain ViT's ({run['images_per_second']:.1f} against "
        f"{run['plain_images_per_second']:.1f} images a second). Left: {left}."
    )


def calibration_report(certificate: Certificate, promise: dict[str, Any], *, per_exit: bool) -> str:
    """What was chosen or certified, on which evidence, and what stood against more."""
    lines = []
    found, refused = certificate.granted, certificate.refused
    drop, confidence = promise.get("max_accuracy_drop"), promise.get("confidence")
    if found and confidence:
        lines.append(
            f"Certified on {found.outcome.images} images, {found.outcome.harms} of them harmed and "
            f"{found.outcome.corrections} corrected: with probability {confidence:.0%} the true drop is at most "
            f"{drop:.2%}."
        )
    if not found and not confidence:
        lines.append("Within this, no setting that lets an image leave early is better than running to the end.")
    if not found and confidence:
        lines.append(
            f"Nothing that saves cost can be certified for a drop of at most {drop:.2%} with probability "
            f"{confidence:.0%}."
        )
    if refused:
        outcome = refused.outcome
        harm_rate, correction_rate = outcome.harms / outcome.images, outcome.corrections / outcome.images
        bound = promise["bound"]
        needed = required_sample_size(harm_rate, drop, confidence, bound=bound, correction_rate=correction_rate)
        if needed and per_exit:
            needed = math.ceil(needed / (1 - PATH_PART))  # of which a part draws the path
        more = f"{needed} images would certify it" if needed else "no number of images would certify it"
        lines.append(
            f"The first setting refused has mean cost {outcome.cost:.3f}, harms {outcome.harms} of "
            f"{outcome.images} ({harm_rate:.2%}) and corrects {outcome.corrections}; at these rates {more} by the "
            f"{bound} bound."
        )
    if found:
        outcome = found.outcome
        left = ", ".join(f"{count} at exit {layer}" for layer, count in outcome.exit_counts.items())
        lines.append(
            f"On {outcome.images} images: accuracy {outcome.accuracy:.1%} (last exit "
            f"{outcome.full_model_accuracy:.1%}), mean cost {outcome.cost:.3f}. Left: {left}."
        )
    return "\n".join(lines)


def _load(checkpoint: str, device: str | None) -> MEViTForImageClassification:
    """The trained model, complete, in eval mode."""
    model, loading = AutoModelForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    if not isinstance(model, MEViTForImageClassification):
        raise ValueError(f"{checkpoint} holds a {type(model).__name__}; a MEViT checkpoint is needed.")
    lacking = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if lacking:
        predictor = " It has no uncertainty predictor." if lacking[0].startswith("uncertainty.") else ""
        raise ValueError(f"{checkpoint} lacks {len(lacking)} weights, first {lacking[0]}.{predictor}")
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except RuntimeError as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error


def _images(
    config: MEViTConfig, checkpoint: str | Path, data: str, split: str, half: str | None, **options
) -> tuple[datasets.Dataset, ImageClassificationDataset]:
    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    rows = load_split(config.label2id, data, split, half=half, **options)
    return rows, ImageClassificationDataset(rows, evaluation_transform(image_processor))


def _check_split_of_promise(confidence: float | None, split: str) -> None:
    if confidence is not None and split in ("train", "all"):
        raise ValueError(f"--split {split} has images that trained the model; no promise can come from them.")


def _destination(checkpoint: str, output: Path | None) -> Path:
    if output is None and not Path(checkpoint).is_dir():
        raise ValueError(f"{checkpoint} is no directory; give --output, a directory to write to.")
    return output or Path(checkpoint)


def _refuse_calibrating(rows: datasets.Dataset, config: MEViTConfig, data: str, options: dict) -> None:
    """Raises a `ValueError` where images chose the thresholds, as far as it can be told."""
    if config.calibration is None:
        return
    source = config.calibration["data"]
    seen = 0
    if fingerprint(rows) == source["sha256"]:
        seen = len(rows)
    else:
        try:
            calibrating = load_split(config.label2id, data, source["split"], half=source["half"], **options)
        except ValueError:
            return  # another data set, without such a split
        if fingerprint(calibrating) == source["sha256"]:
            seen = len(set(image_hashes(rows)) & set(image_hashes(calibrating)))
    if seen:
        raise ValueError(
            f"{seen} of these {len(rows)} images chose the thresholds, so they say too much good of them; "
            f"take others, or give --force."
        )


def _evaluate_exported(
    directory: Path,
    data: str,
    split: str,
    half: str | None,
    force: bool,
    output: Path | None,
    batch_size: int,
    options: dict,
) -> None:
    """`evaluate` of what `export --cascade` wrote: accuracy, cost and time in ONNX Runtime."""
    try:
        from .onnx.evaluation import evaluate_cascade
    except ImportError as error:
        raise ValueError(f"running an export needs the extra packages of mevit[onnx]: {error}") from error
    config = MEViTConfig.from_pretrained(directory)
    rows, dataset = _images(config, directory, data, split, half, **options)
    if not force:
        _refuse_calibrating(rows, config, data, options)
    run = evaluate_cascade(directory, dataset, batch_size=batch_size)
    left = ", ".join(f"{count} at {layer}" for layer, count in run["exit_counts"].items())
    print(
        f"{run['images']} images in ONNX Runtime: accuracy {run['accuracy']:.1%} (model.onnx "
        f"{run['full_model_accuracy']:.1%}), mean cost {run['cost']:.3f}, time {run['time']:.2f} of model.onnx "
        f"({run['images_per_second']:.1f} against {run['full_images_per_second']:.1f} images a second). "
        f"Left: {left}. {run['borderline']} had a score within 1e-4 of a threshold and may leave elsewhere in PyTorch."
    )
    results = {"data": {"name": public_name(data), "split": split, "half": half}, **run, "machine": machine()}
    destination = output or directory
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _save(model: MEViTForImageClassification, checkpoint: str, destination: Path) -> None:
    """Writes config, code and card; the weights too, where they are not there already."""
    calibration = model.config.calibration
    section = early_exit_section(calibration, model.config.exit_layers) if calibration else None
    card = _card(checkpoint, model)
    if destination.resolve() != Path(checkpoint).resolve():
        model.save_pretrained(destination)
        AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(destination)
    else:
        model.config.save_pretrained(destination)
        custom_object_save(model, destination)  # an older checkpoint's code may not know early exit
    card = with_section(card, MEASURED_HEADING, None)  # of other thresholds
    (destination / "README.md").write_text(with_section(card, EARLY_EXIT_HEADING, section), encoding="utf-8")


def _card(checkpoint: str, model: MEViTForImageClassification) -> str:
    """The checkpoint's card, or the beginning of one."""
    file = Path(checkpoint, "README.md")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if not Path(checkpoint).is_dir():
        try:
            return ModelCard.load(checkpoint).content
        except (OSError, HfHubHTTPError):
            pass  # a repository without a card
    return f"# {public_name(checkpoint)}\n\nA multi-exit ViT with exits on layers {model.config.exit_layers}.\n"


def _repeat_options(arguments: list[str]) -> list[str]:
    """`--exits 6 9 12` written as `--exits 6 --exits 9 --exits 12`, which is how the parser takes lists."""
    repeated: list[str] = []
    is_exit = False
    for place, argument in enumerate(arguments):
        if argument == "--exits":
            is_exit = True
            if not arguments[place + 1 : place + 2] or not arguments[place + 1].isdigit():
                raise ValueError("--exits needs layer numbers, such as --exits 6 9 12.")
        elif is_exit and argument.isdigit():
            repeated += ["--exits", argument]
        else:
            is_exit = False
            repeated.append(argument)
    return repeated


def main() -> None:
    """The console script: bad input ends with one line."""
    transformers.logging.set_verbosity_error()
    try:
        app(_repeat_options(sys.argv[1:]))
    except (ValueError, OSError, HFValidationError, SafetensorError) as error:
        sys.exit(f"mevit: error: {error}")


if __name__ == "__main__":
    main()
