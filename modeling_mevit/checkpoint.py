# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A finished checkpoint or export: read whole, and written back with what calibration and evaluation found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.dynamic_module_utils import custom_object_save

from .atomic import staged
from .configuration_mevit import MEViTConfig, is_certified
from .data.identity import UNLABELLED
from .data.image_dataset import DataSource, ImageClassificationDataset
from .data.image_processing import on_pillow
from .early_exit.calibration_target import CalibrationTarget
from .hub import is_export, locate
from .modeling_mevit import MEViTForImageClassification
from .reports.environment import environment_info
from .reports.model_card import write_card
from .reports.tables import benchmark_table, evaluation_tables


if TYPE_CHECKING:
    from .early_exit.evaluation import Evaluation
    from .onnx.quantize import Quantization
    from .onnx.runtime import MEViTCascade

_COPIED = ("metrics.json", "training_curve.png")  # what a card needs beside the config
_READ_BY_CARD = (*_COPIED, "evaluation.json", "accuracy_cost.png", "README.md")


def load_model(checkpoint: str, device: str | None = None, dtype: str | None = None) -> MEViTForImageClassification:
    """The trained model, complete, in eval mode.

    Args:
        checkpoint: directory or Hub name.
        device: such as `"cpu"` or `"cuda"`; an accelerator where there is one, by default.
        dtype: precision, such as `"bfloat16"`; the checkpoint's own by default.

    Raises:
        ValueError: where it holds another kind of model, lacks weights or is damaged, or the device cannot be used.
    """
    model = load_classifier(checkpoint, device, dtype)
    if not isinstance(model, MEViTForImageClassification):
        raise ValueError(f"{checkpoint} must hold a MEViT checkpoint; it holds a {type(model).__name__}.")
    return model


def load_classifier(checkpoint: str, device: str | None = None, dtype: str | None = None) -> torch.nn.Module:
    """Any image classifier, complete, in eval mode; see [`load_model`]. Pickled weights are not read, and code of the
    checkpoint is not run."""
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            locate(checkpoint),
            dtype=dtype or "auto",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except SafetensorError as error:
        raise ValueError(f"the weights of {checkpoint} cannot be read: {error}") from error
    except RuntimeError as error:  # of shapes that differ
        raise ValueError(f"the weights of {checkpoint} do not fit its config.json: {error}") from error
    except (TypeError, AttributeError, StrictDataclassError) as error:  # Transformers on a value of a wrong type
        raise ValueError(f"config.json of {checkpoint} is malformed: {error}") from error
    lacking = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if lacking:
        raise ValueError(f"{checkpoint} lacks {len(lacking)} weights of the model, first {lacking[0]}.")
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except RuntimeError as error:
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error


def load_predictor(
    checkpoint: str, device: str | None = None, dtype: str | None = None, backend: str | None = None
) -> "MEViTForImageClassification | MEViTCascade":
    """What can be calibrated, evaluated and asked: the model of a checkpoint, or the cascade of an export.

    Args:
        checkpoint: directory or Hub name; an export is a directory.
        device: of [`load_model`].
        dtype: of [`load_model`], or the `precision` of [`MEViTCascade.from_pretrained`].
        backend: of [`MEViTCascade.from_pretrained`].

    Raises:
        ValueError: what these two raise, or where an argument is for the other of the two.
    """
    if not is_export(checkpoint):
        if backend is not None:
            raise ValueError(f"backend={backend!r} is for exports; {checkpoint} is a checkpoint, which PyTorch runs.")
        return load_model(checkpoint, device, dtype)
    if device not in (None, "cpu"):
        raise ValueError(f"device={device!r} is for checkpoints; the cascade of an export runs on the CPU here.")
    from .onnx.runtime import MEViTCascade

    return MEViTCascade.from_pretrained(checkpoint, backend=backend, precision=dtype)


def load_image_processor(checkpoint: str) -> Any:
    """The image processor that is saved with a checkpoint or an export, on Pillow; its code is not run."""
    return on_pillow(AutoImageProcessor.from_pretrained(locate(checkpoint), trust_remote_code=False))


def quantization_for(
    config: MEViTConfig, image_processor: Any, source: DataSource, precision: str, target: str | None
) -> "Quantization":
    """What an export in a lower precision needs: training images for ranges, others for thresholds.

    Args:
        config: of the model.
        image_processor: of the model.
        source: the data set that the model was trained on. Its split and half choose the thresholds anew; without a
            split, the images that calibrated the model do, or those of validation.
        precision: one of `onnx.quantize.PRECISIONS`.
        target: processor that int8 files are made for.

    Raises:
        ValueError: where the images have no labels, or the split cannot certify what the calibration did, or must be
            given, since unlabelled images calibrated the model.
    """
    from .data.datasets import is_unlabelled  # needs Datasets
    from .early_exit.calibration import check_held_out  # needs scipy
    from .onnx.quantize import Quantization  # needs ONNX Runtime

    if source.split == UNLABELLED or is_unlabelled(source.name_or_path):
        raise ValueError(
            f"--data must have labels, since a lower precision is reported by its accuracy and thresholds are chosen "
            f"anew on labelled images; got {source.name_or_path} without labels."
        )
    if not source.split:
        calibrated = (config.calibration or {}).get("data") or {"split": "validation", "half": None}
        if calibrated["split"] == UNLABELLED:
            raise ValueError(
                "--split must name the images that choose the thresholds anew, since those that calibrated the model "
                "are unlabelled and not part of --data."
            )
        source = replace(source, split=calibrated["split"], half=source.half or calibrated["half"])
    check_held_out(source.split, is_certified(config.calibration))
    training = replace(source, split="train", half=None)
    return Quantization(
        precision,
        calibration=source.load(config.label2id, image_processor),
        training=training.load(config.label2id, image_processor),
        target=target,
    )


def check_export_of(config: MEViTConfig, exported: Path) -> None:
    """Checks that a directory holds the cascade of a model as it is calibrated now.

    Raises:
        ValueError: where it does not, or where either of the two does not leave early.
    """
    if not config.early_exit or not is_export(exported):
        raise ValueError(f"the checkpoint must be calibrated, and {exported} must hold its cascade.")
    cascade = MEViTConfig.from_pretrained(exported)
    if not cascade.early_exit:
        raise ValueError(f"the cascade in {exported} must leave early; early exit is off in its config.json.")
    if _calibrated_for(config) != _calibrated_for(cascade):
        raise ValueError(f"{exported} must be of the checkpoint as it is calibrated now; export it again.")


def _calibrated_for(config: MEViTConfig) -> tuple[str, str, CalibrationTarget | None]:
    target = (config.calibration or {}).get("target")
    # as an object, since targets were written with fewer fields before
    return config.exit_policy, config.exit_combination, target and CalibrationTarget.from_dict(target)


def output_directory(checkpoint: str, output: Path | None) -> Path:
    """Where results go: `output`, or the checkpoint's own directory.

    Raises:
        ValueError: where neither is a directory to write to.
    """
    if output is None and not Path(checkpoint).is_dir():
        raise ValueError(f"--output must name a directory to write to, since {checkpoint} is not a local one.")
    return output or Path(checkpoint)


def save_calibrated(model: MEViTForImageClassification, checkpoint: str, directory: Path) -> None:
    """Writes config, code and card to a checkpoint's own directory; to another one, the weights too.

    The config says the precision of the model, which loading then takes. The weights of the checkpoint's own directory
    stay as they are.

    A process that is killed, or a full disk, leaves the files as they were.
    """
    with staged(directory, read=_READ_BY_CARD) as stage:
        if directory.resolve() == Path(checkpoint).resolve():
            model.config.dtype = model.dtype
            model.config.save_pretrained(stage)
            custom_object_save(model, stage)  # the code of an older checkpoint may not know these settings
        else:
            model.save_pretrained(stage)
            load_image_processor(checkpoint).save_pretrained(stage)
            for name in _COPIED:
                if Path(checkpoint, name).is_file():
                    shutil.copyfile(Path(checkpoint, name), stage / name)
        write_card(stage)


def plain_accuracy(
    checkpoint: str, source: DataSource, device: str | None, dtype: str | None, **loading: int
) -> float:
    """Accuracy of the checkpoint of a plain ViT, with an image processor of its own, on the images of a data source.

    Raises:
        ValueError: where it has several exits.
    """
    from .early_exit.evaluation import classifier_accuracy  # needs scipy

    model = load_classifier(checkpoint, device, dtype)
    config: Any = model.config
    exit_layers = getattr(config, "exit_layers", [])
    if len(exit_layers) > 1:
        raise ValueError(f"--plain must name a plain ViT, which has one exit; {checkpoint} has exits {exit_layers}.")
    dataset = source.load(config.label2id, load_image_processor(checkpoint))
    return classifier_accuracy(model, dataset, **loading)


def save_benchmark(
    rows: list[dict[str, Any]], why_no_energy: str | None, num_samples: int, threads: int, file: Path | None
) -> str:
    """Writes what a benchmark measured, where a file is named, and returns its table."""
    if file:
        environment = {**environment_info(), "threads": threads or torch.get_num_threads()}
        energy = why_no_energy or "measured"
        content = {"environment": environment, "num_samples": num_samples, "energy": energy, "rows": rows}
        file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return benchmark_table(rows, why_no_energy)


def draw_images(dataset: ImageClassificationDataset, count: int) -> list[np.ndarray]:
    """Some images of a data set, drawn at random, always the same ones: (1, C, H, W) each, float32."""
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images: list[Any] = [dataset[index]["pixel_values"] for index in drawn]
    return [image[None].numpy() for image in images]


def save_evaluation(evaluation: "Evaluation", directory: Path) -> str:
    """Writes `evaluation.json`, `evaluation.md` and `accuracy_cost.png`, and the card where a checkpoint lies there.

    Returns:
        The tables of `evaluation.md`.
    """
    from .reports.figures import accuracy_cost_curve  # needs matplotlib

    content = {**evaluation.to_dict(), "environment": environment_info()}
    tables = evaluation_tables(content)
    figure = accuracy_cost_curve(evaluation.predictions, evaluation.plain_accuracy)
    with staged(directory, read=("config.json", *_READ_BY_CARD)) as stage:
        (stage / "evaluation.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")
        (stage / "evaluation.md").write_text(tables + "\n", "utf-8")
        figure.savefig(stage / "accuracy_cost.png", dpi=120)
        if (directory / "config.json").is_file() and not is_export(directory):
            write_card(stage)
    return tables
