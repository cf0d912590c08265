# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained checkpoint: data, recipe, results of every exit, and how to load it."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


_TEXT = """---
{metadata}
---

# {model_name}

A multi-exit Vision Transformer (MEViT): one ViT with a classifier and an uncertainty predictor after encoder layers
{exit_layers}, trained on {dataset} ({num_labels} classes). A model cut at an exit is a prefix of the full one, with
the same weights.

## Results

{results}

Cost is the number of multiply-accumulates of the layers that run, heads included, relative to the plain ViT of the
same size and resolution. Accuracy is the share of images that get the right class; images go through the image
processor that is saved here.

## How to load it

With the package `mevit` installed:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import modeling_mevit

model = AutoModelForImageClassification.from_pretrained("{model_name}")
image_processor = AutoImageProcessor.from_pretrained("{model_name}")
small = model.truncate({first_exit})  # the model cut at its earliest exit

classify = pipeline("image-classification", model=model, image_processor=image_processor)
classify("image.jpg")
```

Without it, Transformers runs the code that lies beside the weights (read it first):

```python
model = AutoModelForImageClassification.from_pretrained("{model_name}", trust_remote_code=True)
```

`model(pixel_values, early_exit=False)` gives `logits` (B, L) of the last exit, and `exit_logits` (B, E, L) and
`exit_scores` (B, E) of all exits.

## Training

{data}

{recipe}

![Training loss and validation accuracy]({curve})

## Limits

The model knows its {num_labels} classes only and gives one of them to any image. Its accuracy was measured on photos
from the same source as the training photos; expect less on others. Scores say how sure an exit is among the classes it
knows, not whether an image shows one of them.

## Licence

{license}; the terms of {sources} apply too. The code beside them is Apache-2.0.
"""


EARLY_EXIT_HEADING = "## Early exit"
MEASURED_HEADING = "## Early exit, measured"


def model_card(
    *,
    model_name: str,
    dataset: str,
    dataset_on_hub: bool,
    base_model: str | None,
    base_model_on_hub: bool,
    num_labels: int,
    metrics: dict[str, Any],
    recipe: dict[str, Any],
    curve: str,
    license: str | None = None,
) -> ModelCard:
    """Writes the card of a checkpoint.

    Args:
        model_name: name of the model, or its Hub id, as one loads it.
        dataset, base_model: names to show; the metadata links those that are on the Hub.
        num_labels: number of classes.
        metrics: what `training/train.py` writes to `metrics.json`.
        recipe: setting → value, shown as a table.
        curve: file name of the training curve's image beside the card.
        license: of the checkpoint, as the Hub names it; without one the card says that none is stated.
    """
    split = measured_splits(metrics["exits"])[-1]
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
        for row in metrics["exits"]
    ]
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["mevit", "vision", "fine-grained", "early-exit"],
        datasets=[dataset] if dataset_on_hub else None,
        base_model=base_model if base_model_on_hub else None,
        metrics=["accuracy"],
        model_name=model_name,
        eval_results=results,
    )
    layers = [row["exit"] for row in metrics["exits"]]
    text = _TEXT.format(
        metadata=data.to_yaml().strip(),
        model_name=model_name,
        exit_layers=", ".join(map(str, layers)),
        first_exit=layers[0],
        dataset=dataset,
        num_labels=num_labels,
        results=results_table(metrics["exits"]),
        data=_data_sentence(dataset, metrics["num_samples"], base_model),
        recipe=_table(("setting", "value"), recipe.items()),
        curve=curve,
        sources=" and ".join(name for name in (dataset, base_model) if name),
        license=f"The weights are licensed under {license}" if license else "No licence is stated for the weights",
    )
    return ModelCard(text)


def measured_splits(exits: list[dict[str, Any]]) -> list[str]:
    """Which of validation and test the exits were measured on; a run that chooses a recipe leaves test alone."""
    return [split for split in ("validation", "test") if f"{split}_accuracy" in exits[0]]


def results_table(exits: list[dict[str, Any]]) -> str:
    """Markdown table: exit · accuracy on each split measured · cost relative to the plain ViT · parameters."""
    splits = measured_splits(exits)
    return _table(
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


def early_exit_section(calibration: dict[str, Any], exit_layers: list[int]) -> str:
    """What a card says of a calibration that `mevit calibrate` wrote to the config: promise, thresholds, data."""
    promise, measured, data = calibration["promise"], calibration["measured"], calibration["data"]
    if "max_cost" in promise:
        text = f"Chosen for the best accuracy within a mean cost of {promise['max_cost']:.3g}. Nothing is promised."
    elif "confidence" in promise:
        text = (
            f"With probability {promise['confidence']:.0%} over the draw of the calibration images, early exit "
            f"loses at most {promise['max_accuracy_drop']:.2%} in accuracy against the last exit on images like "
            f"those ({promise['bound']} bound), if those images neither trained the model nor chose its recipe."
        )
    else:
        text = (
            f"Chosen for the lowest cost within a drop of {promise['max_accuracy_drop']:.2%} against the last exit on "
            f"the calibration images. Nothing is promised for others."
        )
    if calibration["policy"] == "patience":
        settings = f"An image leaves where {calibration['patience']} exits in a row agree."
    else:
        rows = zip(exit_layers, calibration["thresholds"], strict=False)
        settings = _table(("exit", "leaves under"), ((layer, f"{threshold:.6g}") for layer, threshold in rows))
    half = f", {data['half']} half" if data.get("half") else ""
    return f"""{EARLY_EXIT_HEADING}

In eval mode `model(pixel_values)`, and so `pipeline("image-classification", …)`, lets an image leave at its first
exit that is sure enough, by the policy `{calibration["policy"]}`; `early_exit=False` runs every exit.
{text}

{settings}

Decided on {measured["images"]} images of {data["name"]} ({data["split"]}{half}; SHA-256 of content and labels
`{data["sha256"][:16]}…`): accuracy {measured["accuracy"]:.1%}, of the last exit
{measured["full_model_accuracy"]:.1%}, mean cost {measured["cost"]:.3f} of the plain ViT's. Early exits were wrong
where the last one is right on {measured["harms"]} of them, and right where it is wrong on {measured["corrections"]}.
"""


def evaluation_section(results: dict[str, Any], sentence: str, curve: str) -> str:
    """What a card says of a run of `mevit evaluate`.

    Args:
        results: what it wrote to `evaluation.json`.
        sentence: the early-exit run in words.
        curve: file name of the image beside the card.
    """
    data, machine = results["data"], results["machine"]
    half = f", {data['half']} half" if data["half"] else ""
    return f"""{MEASURED_HEADING}

On {results["images"]} images of {data["name"]} ({data["split"]}{half}), none of which is known to have chosen the
thresholds, on {machine["accelerator"] or machine["cpu"]} ({machine["threads"]} threads).
{sentence}

![Accuracy by mean cost]({curve})
"""


def section_of(card: str, heading: str) -> str | None:
    """The section under a heading, as [`with_section`] put it in; None where there is none."""
    found = re.search(rf"^{re.escape(heading)}\n", card, flags=re.MULTILINE)
    if not found:
        return None
    start = found.start()
    end = card.find("\n## ", start)
    return card[start:end] if end >= 0 else card[start:]


def with_section(card: str, heading: str, section: str | None) -> str:
    """A card's text with a section put in before "How to load it", replaced or, where it is None, taken out."""
    before = "## How to load it\n"
    old = section_of(card, heading)
    if old is not None:
        card = card.replace(f"{old}\n", "", 1) if f"{old}\n" in card else card.replace(old, "", 1)
    if section is None:
        return card
    place = card.find(before)
    return f"{card[:place]}{section}\n{card[place:]}" if place >= 0 else f"{card.rstrip()}\n\n{section}"


def _data_sentence(dataset: str, num_samples: dict[str, int], base_model: str | None) -> str:
    counts = ", ".join(f"{count:,} {split}" for split, count in num_samples.items())
    start = f"from {base_model}" if base_model else "from random weights"
    return f"Trained on {dataset} ({counts} images), {start}."


def _table(header, rows) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
