# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""From the name or path of a data set to its splits.

Every layout is read into rows of file names and labels; images are opened when they are needed.
"""

import io
import logging
import re
from collections.abc import Collection, Iterable
from itertools import compress
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..hub import answers
from .demo import CLASS_NAMES, demo_images
from .identity import UNLABELLED, is_local
from .image_files import image_extensions


logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2
SEED = 0
DEMO_SAMPLES_PER_CLASS = {"train": 200, "validation": 25, "test": 50}
AIRCRAFT_LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
AIRCRAFT_BANNER = 20
HALVES = ("first", "second")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

# What a layout is read into: for each split the images, with the labels as they are written there, and the class
# name of every label that the layout knows, in the order that the classes shall have.
Splits = dict[str, datasets.Dataset]
Classes = dict[Any, str]


def load_splits(
    name_or_path: str | PathLike[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    selection_fraction: float = 0.0,
) -> datasets.DatasetDict:
    """Reads a data set, from a folder, from the Hub or drawn by code, as train, validation and test.

    `name_or_path` is one of:

    - `"demo"`: aircraft drawn by code.
    - A folder with `cars_train/` and `devkit/`: Stanford Cars in its original layout. The test half is read if
      `cars_test/` and `devkit/cars_test_annos_withlabels.mat` are there.
    - A folder with `data/images_variant_train.txt`: FGVC-Aircraft in its original layout, by variant, or by what
      `label_column` says. `banner` tells how much of each image is to be cut off.
    - Any other folder: `train/CLASS/*.jpg` and, if they are there, `validation` (or `valid`, `val`, `dev`) and `test`;
      or just `CLASS/*.jpg`, which is a train split. Hidden files and folders are skipped.
    - `owner/name`: a data set on the Hub, such as `Donghyun99/Stanford-Cars` or `Donghyun99/FGVC-Aircraft`.

    The classes are those that occur in train; validation and test may lack some of them. A split that the data set
    lacks is held out from train: a tenth of each class for validation, a fifth for testing, always the same images.
    Each class keeps an image in train at least. Local images are checked by their headers, so that a training does
    not fail late; only paths are held in memory.

    Args:
        name_or_path: see above. A folder goes before a Hub data set of the same name, `"demo"` before both.
        image_column: column of a Hub data set; by default its only one of type `Image`.
        label_column: column of a Hub data set, with class labels, strings or integers; by default its only one of
            type `ClassLabel`. For FGVC-Aircraft in its original layout, `"variant"`, `"family"` or `"manufacturer"`.
        selection_fraction: part of each class of train, from 0 to below 1, that is moved to validation once the splits
            stand: more images to choose a recipe by.

    Returns:
        The splits `train`, `validation` and `test` with the columns `image` (`{"path", "bytes"}`, not decoded),
        `label` (`ClassLabel` with the names of train's classes) and, for FGVC-Aircraft in its original layout,
        `banner` (height in pixels of what is to be cut off at the bottom).

    Raises:
        ValueError: if the data set, a column or a part of its layout does not exist, a split has no images, a label
            is none of the classes, train lacks a class, or an image file cannot be opened.
    """
    if not 0 <= selection_fraction < 1:
        raise ValueError(f"selection_fraction must be at least 0 and below 1, got {selection_fraction}")
    splits, classes = _read(name_or_path, image_column, label_column)
    if is_local(name_or_path):
        for rows in splits.values():
            _check_headers(rows)
    index = {label: i for i, label in enumerate(classes)}
    splits = _numbered(splits, index, datasets.ClassLabel(names=list(classes.values())))
    splits = _completed(splits, index.values())
    if selection_fraction:
        selected, left = _split_off(splits["train"], {"selection": selection_fraction}, index.values())
        splits["train"] = left
        splits["validation"] = datasets.concatenate_datasets([splits["validation"], selected["selection"]])
    return datasets.DatasetDict({split: splits[split] for split in SPLIT_NAMES})


def load_split(
    name_or_path: str | PathLike[str],
    split: str,
    *,
    label2id: dict[str, int] | None = None,
    half: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> datasets.Dataset:
    """Reads the images to calibrate or evaluate a trained model on, with the labels as the model numbers them.

    Image files are not checked, since they are opened next anyway.

    Args:
        name_or_path: see [`load_splits`].
        split: `"train"`, `"validation"`, `"test"`, or `"all"` for everything that the data set holds; `"unlabelled"`
            for every image in a folder, at any depth, without a label. A folder of images without class folders has
            that split alone (see [`default_split`]).
        label2id: class name → label, of the model's config; by default labels are those of [`load_splits`].
        half: `"first"` or `"second"` half of the split, drawn at random from each class, always the same one.
        image_column: see [`load_splits`].
        label_column: see [`load_splits`].

    Returns:
        Rows as those of `load_splits`; given `label2id`, `label` is an int64. Unlabelled ones have no `label`.

    Raises:
        ValueError: as [`load_splits`] does, and if the split or half is none of those named or has no images, or if
            a class of these images is unknown to the model.
    """
    if half not in (None, *HALVES):
        raise ValueError(f"half must be one of {list(HALVES)}, got {half!r}")
    if split == UNLABELLED:
        folder = _local_folder(name_or_path)
        if folder is None:
            raise ValueError(f"split {UNLABELLED!r} is for a folder of images, got {str(name_or_path)!r}")
        _check_columns(str(name_or_path), image_column, label_column)
        return _unlabelled_rows(folder, half)
    if is_unlabelled(name_or_path):
        raise ValueError(f"split must be {UNLABELLED!r} for {name_or_path}, which has no class folders, got {split!r}")
    if split not in (*SPLIT_NAMES, "all"):
        raise ValueError(f"split must be one of {[*SPLIT_NAMES, 'all', UNLABELLED]}, got {split!r}")
    splits, classes = _read(name_or_path, image_column, label_column)
    if label2id is None:
        index = {label: i for i, label in enumerate(classes)}
        feature = datasets.ClassLabel(names=list(classes.values()))
    else:  # a class that the model does not know gets a number of its own, since this split may do without it
        index = {label: label2id.get(name, -1 - i) for i, (label, name) in enumerate(classes.items())}
        feature = datasets.Value("int64")
    splits = _completed(_numbered(splits, index, feature), index.values())
    rows = datasets.concatenate_datasets(list(splits.values())) if split == "all" else splits[split]
    present = set(rows["label"][:])
    unknown = sorted(name for label, name in classes.items() if index[label] < 0 and index[label] in present)
    if unknown and label2id is not None:
        raise ValueError(
            f"{len(unknown)} classes of {name_or_path} are unknown to the model, first {unknown[0]!r}; "
            f"it knows {len(label2id)}, such as {next(iter(label2id))!r}"
            + (f"; to calibrate without labels, take the split {UNLABELLED!r}" if is_local(name_or_path) else "")
        )
    if half:
        parts, left = _split_off(rows, {"first": 0.5}, index.values())
        rows = parts["first"] if half == "first" else left
    return rows


def default_split(name_or_path: str | PathLike[str], labelled: str) -> str:
    """The split to take where none is named: `labelled`, or `"unlabelled"` of images without labels."""
    return UNLABELLED if is_unlabelled(name_or_path) else labelled


def is_unlabelled(name_or_path: str | PathLike[str]) -> bool:
    """Whether it is a folder of images that are in no class folders. Folders without images in them are none."""
    folder = _local_folder(name_or_path)
    if folder is None:
        return False
    return _has_images(folder.iterdir(), folder) and not any(
        _has_images(inner.rglob("*"), inner) for inner in _visible_folders(folder)
    )


def _local_folder(name_or_path: str | PathLike[str]) -> Path | None:
    """The folder that a data set's name is of; None of the demo and of other names."""
    folder = Path(name_or_path).expanduser()
    return folder if str(name_or_path) not in ("", "demo") and folder.is_dir() else None


def _unlabelled_rows(folder: Path, half: str | None) -> datasets.Dataset:
    images = [str(image.absolute()) for image in _image_files(folder.rglob("*"), folder)]
    if not images:
        raise ValueError(f"{folder} has no images")
    if half:
        if len(images) < 2:
            raise ValueError(f"half={half!r} needs at least 2 images, and {folder} has {len(images)}")
        order = np.random.default_rng(SEED).permutation(len(images))
        middle = round(len(images) / 2)
        images = [images[index] for index in sorted(order[:middle] if half == "first" else order[middle:])]
    return datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image(decode=False))


def _read(
    name_or_path: str | PathLike[str], image_column: str | None, label_column: str | None
) -> tuple[Splits, Classes]:
    """Reads whatever layout it is. Returns the splits it has, and the classes that occur in train."""
    name = str(name_or_path)
    if not name:
        raise ValueError("the data set's name is empty; allowed are 'demo', a folder or a Hub data set 'owner/name'")
    folder = Path(name).expanduser()
    on_hub = name != "demo" and not folder.exists()
    is_aircraft = (folder / "data" / "images_variant_train.txt").is_file() and name != "demo"
    if not on_hub:
        _check_columns(name, image_column, None if is_aircraft else label_column)

    if name == "demo":
        splits, classes = _demo()
    elif (folder / "cars_train").is_dir() and (folder / "devkit").is_dir():
        splits, classes = _stanford_cars(folder)
    elif is_aircraft:
        splits, classes = _fgvc_aircraft(folder / "data", label_column or "variant")
    elif folder.is_dir():
        splits, classes = _image_folder(folder)
    elif on_hub and HUB_ID.fullmatch(name):
        splits, classes = _hub(name, image_column, label_column)
    else:
        raise ValueError(f"{name!r} is not a folder; allowed are 'demo', a folder or a Hub data set 'owner/name'")

    if "train" not in splits:
        raise ValueError(f"{name!r} must have a train split, got only {sorted(splits)}")
    return splits, _classes_of_train(splits, classes)


def _check_columns(name: str, image_column: str | None, label_column: str | None) -> None:
    if image_column or label_column:
        given = f"image_column={image_column!r} and label_column={label_column!r}"
        raise ValueError(f"columns can be chosen for a Hub data set 'owner/name' only, got {given} for {name!r}")


def _demo() -> tuple[Splits, Classes]:
    splits = {}
    for split_seed, (split, samples_per_class) in enumerate(DEMO_SAMPLES_PER_CLASS.items()):
        images, labels = demo_images(samples_per_class, split_seed)
        encoded = []
        for image in images:
            file = io.BytesIO()
            image.save(file, format="PNG")
            encoded.append({"path": None, "bytes": file.getvalue()})
        splits[split] = _rows(encoded, labels)
    return splits, dict(enumerate(CLASS_NAMES))


def _stanford_cars(folder: Path) -> tuple[Splits, Classes]:
    def annotated(annotations: Path, images: Path) -> datasets.Dataset:
        rows = _matlab(annotations, "annotations")
        return _listed([images / file for file in rows["fname"]], rows["class"].tolist(), annotations)

    devkit = folder / "devkit"
    splits = {"train": annotated(devkit / "cars_train_annos.mat", folder / "cars_train")}
    test_annotations = devkit / "cars_test_annos_withlabels.mat"
    if test_annotations.is_file():
        splits["test"] = annotated(test_annotations, folder / "cars_test")
    elif (folder / "cars_test").is_dir():
        logger.warning("cars_test is not read, since there is no %s; part of train is held out", test_annotations)
    class_names = _matlab(devkit / "cars_meta.mat", "class_names").tolist()
    return splits, dict(enumerate(class_names, start=1))


def _fgvc_aircraft(folder: Path, level: str) -> tuple[Splits, Classes]:
    if level not in AIRCRAFT_LEVELS:
        raise ValueError(f"label_column must be one of {list(AIRCRAFT_LEVELS)} for FGVC-Aircraft, got {level!r}")
    splits = {}
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        annotations = folder / f"images_{level}_{name}.txt"
        lines = [line.split(maxsplit=1) for line in _lines(annotations)]
        for line in lines:
            if len(line) != 2:
                raise ValueError(f"each line of {annotations} must be an image and its class, got {' '.join(line)!r}")
        rows = _listed([folder / "images" / f"{image}.jpg" for image, _ in lines], [c for _, c in lines], annotations)
        splits[split] = rows.add_column("banner", [AIRCRAFT_BANNER] * len(rows))
    return splits, {class_name: class_name for class_name in _lines(folder / AIRCRAFT_LEVELS[level])}


# `datasets.load_dataset("imagefolder")` is not used: it guesses splits from words in file and class names (a flat
# folder with a class "test kit" becomes a test split and the other classes vanish), drops the labels when images lie
# one folder deeper, and finds nothing below a folder with brackets in its name.
def _image_folder(folder: Path) -> tuple[Splits, Classes]:
    folders = {path.name: path for path in _visible_folders(folder)}
    found = {split: folders[name] for split, name in _split_names(folders).items()} or {"train": folder}
    splits = {}
    for split, split_folder in found.items():
        images, labels = [], []
        for class_folder in _visible_folders(split_folder):
            files = _image_files(class_folder.rglob("*"), class_folder)
            images += files
            labels += [class_folder.name] * len(files)
        if not images:
            raise ValueError(f"{split_folder} has no images in class folders (CLASS/*.jpg)")
        splits[split] = _rows([str(image.absolute()) for image in images], labels)
    return splits, {name: name for name in sorted({name for rows in splits.values() for name in rows["label"][:]})}


def _hub(name: str, image_column: str | None, label_column: str | None) -> tuple[Splits, Classes]:
    if not answers(name, "dataset") and not Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).exists():
        raise ValueError(f"the Hub cannot be reached, and {name!r} is neither a folder nor in the cache of data sets")
    try:
        loaded = datasets.load_dataset(name)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is not a folder, and loading it from the Hub failed: {error}") from error
    loaded = {split: loaded[available] for split, available in _split_names(loaded).items()} or dict(loaded)
    features = next(iter(loaded.values())).features
    image = _column(features, image_column, "image_column", datasets.Image)
    label = _column(features, label_column, "label_column", datasets.ClassLabel)
    if not isinstance(features[image], datasets.Image):
        raise ValueError(f"image_column {image!r} must be of type Image, got {features[image]}")
    kind = features[label]
    is_class_label = isinstance(kind, datasets.ClassLabel)
    is_plain = isinstance(kind, datasets.Value) and kind.dtype.startswith(("string", "large_string", "int", "uint"))
    if not is_class_label and not is_plain:
        raise ValueError(f"label_column {label!r} must hold class labels, strings or integers, got {kind}")

    splits = {
        split: rows.select_columns([image, label])
        .rename_columns({image: "image", label: "label"})
        .cast_column("image", datasets.Image(decode=False))
        for split, rows in loaded.items()
    }
    if is_class_label:
        return splits, dict(enumerate(kind.names))
    values = {value for rows in splits.values() for value in rows["label"][:]} - {None}
    return splits, {value: str(value) for value in sorted(values)}


def _column(features: datasets.Features, given: str | None, argument: str, kind: type) -> str:
    found: list[str] = [column for column, feature in features.items() if isinstance(feature, kind)]
    if given is None and len(found) == 1:
        return found[0]
    if given is None:
        raise ValueError(
            f"{argument} must be given where not exactly one column is of type {kind.__name__}, "
            f"got {found}; the columns are {list(features)}"
        )
    if given not in features:
        raise ValueError(f"{argument} {given!r} does not exist; the columns are {list(features)}")
    return given


def _split_names(available: Collection[str]) -> dict[str, str]:
    """Which of the names available stands for which split."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        matching = [name for name in available if name.lower() in names]
        if len(matching) > 1:
            raise ValueError(f"there must be one {split} split at most, got {matching}")
        if matching:
            found[split] = matching[0]
    return found


def _image_files(paths: Iterable[Path], folder: Path) -> list[Path]:
    """The visible image files among paths within a folder, in order."""
    return [path for path in sorted(paths) if _is_image(path, folder)]


def _has_images(paths: Iterable[Path], folder: Path) -> bool:
    """Whether there are any; paths are looked at up to the first one."""
    return any(_is_image(path, folder) for path in paths)


def _is_image(path: Path, folder: Path) -> bool:
    """Whether a path within a folder is a visible image file, by its name."""
    return path.suffix.lower() in image_extensions() and path.is_file() and not _is_hidden(path, folder)


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path, folder))


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a path within a folder is hidden there, or lies in a hidden folder."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"{file} is missing from the data set")
    return file


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in _existing(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def _matlab(file: Path, variable: str) -> np.ndarray:
    from scipy.io import loadmat  # needed for this one layout

    _existing(file)
    try:
        return np.atleast_1d(loadmat(file, squeeze_me=True)[variable])
    except Exception as error:  # whatever a broken file leads to
        raise ValueError(f"{file} cannot be read as a MATLAB file with {variable!r}: {error}") from error


def _listed(images: list[Path], labels: list[Any], annotations: Path) -> datasets.Dataset:
    """Rows of the images that are there, out of those that an annotation file lists."""
    there = [image.is_file() for image in images]
    if not all(there):
        missing = f"{there.count(False)} of the {len(there)} images in {annotations}"
        example = images[there.index(False)]
        if not any(there):
            raise ValueError(f"{missing} are missing, such as {example}")
        logger.warning("%s are missing and left out, such as %s", missing, example)
    return _rows([str(image.absolute()) for image in compress(images, there)], list(compress(labels, there)))


def _rows(images: list[Any], labels: list[Any]) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"image": images, "label": labels})
    return rows.cast_column("image", datasets.Image(decode=False))


def _check_headers(rows: datasets.Dataset) -> None:
    """Opens every image file without decoding it, which finds nearly all bad files before a training starts."""
    bad = []
    for path in (image["path"] for image in rows["image"][:] if image["bytes"] is None):
        try:
            Image.open(path).close()
        except Exception as error:  # Pillow's plugins raise whatever a broken header leads to
            bad.append((path, error))
    if bad:
        raise ValueError(f"{len(bad)} of {len(rows)} images cannot be read, first {bad[0][0]}: {bad[0][1]}")


def _classes_of_train(splits: Splits, classes: Classes) -> Classes:
    """The classes that occur in train, in their order, once every label of every split is known to be one of them."""
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"the {split} split has no images")
    in_train = set(splits["train"]["label"][:])
    kept = {label: name for label, name in classes.items() if label in in_train}
    if len(kept) < 2:
        raise ValueError(f"train must have at least two classes, got {list(kept.values())}")
    for split, rows in splits.items():
        for row, label in enumerate(rows["label"][:]):
            if label not in classes:
                allowed = f"{len(classes)} classes, {next(iter(classes))!r} to {list(classes)[-1]!r}"
                raise ValueError(f"label {label!r} in row {row} of the {split} split is not one of the {allowed}")
            if label not in kept:
                raise ValueError(f"class {classes[label]!r} of the {split} split has no images in the train split")
    return kept


def _numbered(splits: Splits, index: dict[Any, int], feature: datasets.ClassLabel | datasets.Value) -> Splits:
    """Replaces the labels as they are written in the data set by numbers."""
    return {
        split: rows.remove_columns("label").add_column(
            "label", [index[label] for label in rows["label"][:]], feature=feature
        )
        for split, rows in splits.items()
    }


def _completed(splits: Splits, class_order: Collection[int]) -> Splits:
    """Holds out of train the splits that the data set lacks. Returns train, validation and test, in this order."""
    fractions = {"test": TEST_FRACTION, "validation": VALIDATION_FRACTION}
    fractions = {split: fraction for split, fraction in fractions.items() if split not in splits}
    held_out, train = _split_off(splits["train"], fractions, class_order)
    found = {**splits, **held_out, "train": train}
    return {split: found[split] for split in SPLIT_NAMES}


def _split_off(
    rows: datasets.Dataset, fractions: dict[str, float], class_order: Collection[int]
) -> tuple[Splits, datasets.Dataset]:
    """Splits fractions of each class off. Returns these parts and what is left, at least an image of each class.

    The draw goes through the classes in the data set's own order, so that it does not depend on how a model numbers
    them.
    """
    rng = np.random.default_rng(SEED)
    labels = np.array(rows["label"][:])
    parts: dict[str, list[int]] = {part: [] for part in fractions}
    left: list[int] = []
    for label in class_order:
        of_class = rng.permutation(np.flatnonzero(labels == label))
        size = len(of_class)
        for part, fraction in fractions.items():
            count = max(min(round(fraction * size), len(of_class) - 1), 0)  # a split may lack a class
            parts[part].extend(of_class[:count])
            of_class = of_class[count:]
        left.extend(of_class)
    for part, indices in parts.items():
        if not indices:
            raise ValueError(f"the classes have too few images to hold out a {part} part of {fractions[part]:.0%}")
    return {part: rows.select(sorted(indices)) for part, indices in parts.items()}, rows.select(sorted(left))
