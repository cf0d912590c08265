# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""From the name or path of a data set to tensors: splits, images, transforms, and the data set a Trainer reads.

Every layout is read into rows of file names and labels; images are opened when they are needed. The transforms are
TransFG's (He et al., AAAI 2022): both sides are resized to 600/448 of the model's image size, training crops at random
and flips, testing crops the centre.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Collection
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import scipy.io
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import DeiTImageProcessor
from transformers.image_utils import PILImageResampling, load_image

from .demo_data import CLASS_NAMES, demo_images


logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
TEST_FRACTION = 0.2
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
    name_or_path: str | os.PathLike,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    aircraft_level: str = "variant",
    validation_fraction: float = 0.1,
    selection_fraction: float = 0.0,
    seed: int = 0,
) -> datasets.DatasetDict:
    """Reads a data set, from a folder, from the Hub or drawn by code, as train, validation and test.

    `name_or_path` is one of:

    - `"demo"`: aircraft drawn by code, the same ones whatever the seed.
    - A folder with `cars_train/` and `devkit/`: Stanford Cars in its original layout. The test half is read if
      `cars_test/` and `devkit/cars_test_annos_withlabels.mat` are there.
    - A folder with `data/images_variant_train.txt`: FGVC-Aircraft in its original layout. `read_image` cuts off the
      banner below each photo.
    - Any other folder: `train/CLASS/*.jpg` and, if they are there, `validation` (or `valid`, `val`, `dev`) and `test`;
      or just `CLASS/*.jpg`, which is a train split.
    - `owner/name`: a data set on the Hub, such as `Donghyun99/Stanford-Cars` or `Donghyun99/FGVC-Aircraft`.

    The classes are those that occur in train; validation and test may lack some of them. A split that the data set
    lacks is held out from train: `validation_fraction` of each class for validation, a fifth for testing. Each class
    keeps an image in train at least. Local images are checked by their headers; only paths are held in memory.

    Args:
        name_or_path: see above. A folder goes before a Hub data set of the same name, `"demo"` before both.
        image_column: column of a Hub data set; by default its only one of type `Image`.
        label_column: column of a Hub data set, with class labels, strings or integers; by default its only one of
            type `ClassLabel`.
        aircraft_level: `"variant"`, `"family"` or `"manufacturer"`, for FGVC-Aircraft in its original layout.
        validation_fraction: part of each class, between 0 and 1, held out where there is no validation split.
        selection_fraction: part of each class of train, from 0 to below 1, that is moved to validation once the splits
            stand: more images to choose a recipe by.
        seed: decides, together with the data, which images are held out.

    Returns:
        The splits `train`, `validation` and `test` with the columns `image` (`{"path", "bytes"}`, not decoded),
        `label` (`ClassLabel` with the names of train's classes) and, for FGVC-Aircraft in its original layout,
        `banner` (height in pixels of what is to be cut off at the bottom).

    Raises:
        ValueError: if the data set, a column or a part of its layout does not exist, a split has no images, a label
            is none of the classes, train lacks a class, or an image file cannot be opened.
    """
    name = str(name_or_path)
    if not name:
        raise ValueError("the data set's name is empty; allowed are 'demo', a folder or a Hub data set 'owner/name'")
    folder = Path(name).expanduser()
    on_hub = name != "demo" and not folder.exists()
    if not on_hub and (image_column or label_column):
        raise ValueError(f"image_column and label_column are for Hub data sets only, and {name!r} is none")

    if name == "demo":
        splits, classes = _demo()
    elif (folder / "cars_train").is_dir() and (folder / "devkit").is_dir():
        splits, classes = _stanford_cars(folder)
    elif (folder / "data" / "images_variant_train.txt").is_file():
        splits, classes = _fgvc_aircraft(folder / "data", aircraft_level)
    elif folder.is_dir():
        splits, classes = _image_folder(folder)
    elif on_hub and HUB_ID.fullmatch(name):
        splits, classes = _hub(name, image_column, label_column)
    else:
        raise ValueError(f"{name!r} is no folder; allowed are 'demo', a folder or a Hub data set 'owner/name'")

    if "train" not in splits:
        raise ValueError(f"{name!r} has no train split, only {sorted(splits)}")
    splits = _labelled(splits, classes)

    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
    if not 0 <= selection_fraction < 1:
        raise ValueError(f"selection_fraction must lie from 0 to below 1, got {selection_fraction}")
    fractions = {"test": TEST_FRACTION, "validation": validation_fraction}
    fractions = {split: fraction for split, fraction in fractions.items() if split not in splits}
    splits |= _held_out(splits["train"], fractions, seed)
    if selection_fraction:
        moved = _held_out(splits["train"], {"selection": selection_fraction}, seed)
        splits["train"] = moved["train"]
        splits["validation"] = datasets.concatenate_datasets([splits["validation"], moved["selection"]])
    return datasets.DatasetDict({split: splits[split] for split in SPLIT_NAMES})


def load_split(
    label2id: dict[str, int], name_or_path: str | os.PathLike, split: str, *, half: str | None = None, **options
) -> datasets.Dataset:
    """Reads the images to calibrate or evaluate a trained model on, with the labels as the model numbers them.

    Args:
        label2id: of the model's config.
        name_or_path: see [`load_splits`].
        split: `"train"`, `"validation"`, `"test"`, or `"all"` for everything that the data set holds.
        half: `"first"` or `"second"` half of the split, drawn at random from each class, always the same one.
        options: of [`load_splits`].

    Returns:
        Rows of `load_splits`, `label` being an int64.

    Raises:
        ValueError: as [`load_splits`] does, and if the split or half is none of those named or has no images, or if
            a class of these images is unknown to the model.
    """
    if split not in (*SPLIT_NAMES, "all"):
        raise ValueError(f"split={split!r} is unknown; allowed are {', '.join(map(repr, (*SPLIT_NAMES, 'all')))}")
    if half not in (None, *HALVES):
        raise ValueError(f"half={half!r} is unknown; allowed are {' and '.join(map(repr, HALVES))}")
    splits = load_splits(name_or_path, **options)
    rows = datasets.concatenate_datasets(list(splits.values())) if split == "all" else splits[split]
    names = rows.features["label"].names
    unknown = sorted({names[label] for label in rows["label"]} - set(label2id))
    if unknown:
        raise ValueError(
            f"{len(unknown)} classes of {name_or_path} are unknown to the model, first {unknown[0]!r}; "
            f"it knows {len(label2id)}, such as {next(iter(label2id))!r}"
        )
    if half:
        parts = _held_out(rows, {"first": 0.5}, seed=0)
        rows = parts["first" if half == "first" else "train"]
    labels = [label2id[names[label]] for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", labels)


def image_hashes(rows: datasets.Dataset) -> list[str]:
    """What tells each image from others, whatever its file is called: its label and the SHA-256 of its content."""
    keys = []
    for row in rows:
        path, content = row["image"]["path"], row["image"]["bytes"]
        content = Path(path).read_bytes() if content is None else content
        keys.append(f"{row['label']}/{hashlib.sha256(content).hexdigest()}")
    return keys


def fingerprint(rows: datasets.Dataset) -> str:
    """SHA-256, in hexadecimal, of which images these are ([`image_hashes`]), whatever their order."""
    return hashlib.sha256("\n".join(sorted(image_hashes(rows))).encode()).hexdigest()


def public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a local folder its own name, since where it lies is nobody's business."""
    return Path(name_or_path).expanduser().resolve().name if is_local(name_or_path) else name_or_path


def is_local(name_or_path: str) -> bool:
    """Whether a name is that of a local folder."""
    return Path(name_or_path).expanduser().is_dir()


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
        raise ValueError(f"aircraft_level must be one of {list(AIRCRAFT_LEVELS)}, got {level!r}")
    splits = {}
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        annotations = folder / f"images_{level}_{name}.txt"
        lines = [line.split(maxsplit=1) for line in _lines(annotations)]
        if any(len(line) != 2 for line in lines):
            raise ValueError(f"{annotations} has a line that is no image and its class")
        rows = _listed([folder / "images" / f"{image}.jpg" for image, _ in lines], [c for _, c in lines], annotations)
        splits[split] = rows.add_column("banner", [AIRCRAFT_BANNER] * len(rows))
    return splits, {class_name: class_name for class_name in _lines(folder / AIRCRAFT_LEVELS[level])}


# `datasets.load_dataset("imagefolder")` is not used: it guesses splits from words in file and class names (a flat
# folder with a class "test kit" becomes a test split and the other classes vanish), drops the labels when images lie
# one folder deeper, and finds nothing below a folder with brackets in its name.
def _image_folder(folder: Path) -> tuple[Splits, Classes]:
    folders = {path.name: path for path in _visible_folders(folder)}
    found = {split: folders[name] for split, name in _split_names(folders).items()} or {"train": folder}
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    splits = {}
    for split, split_folder in found.items():
        images, labels = [], []
        for class_folder in _visible_folders(split_folder):
            files = [
                path
                for path in sorted(class_folder.rglob("*"))
                if path.suffix.lower() in extensions and not path.name.startswith(".") and path.is_file()
            ]
            images += files
            labels += [class_folder.name] * len(files)
        if not images:
            raise ValueError(f"{split_folder} has no images in class folders (CLASS/*.jpg)")
        splits[split] = _checked_rows(images, labels)
    return splits, {name: name for name in sorted({name for rows in splits.values() for name in rows["label"][:]})}


def _hub(name: str, image_column: str | None, label_column: str | None) -> tuple[Splits, Classes]:
    try:
        loaded = datasets.load_dataset(name)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is no folder, and as a Hub data set it cannot be loaded: {error}") from error
    loaded = {split: loaded[available] for split, available in _split_names(loaded).items()} or dict(loaded)
    features = next(iter(loaded.values())).features
    image = _column(features, image_column, "image_column", datasets.Image)
    label = _column(features, label_column, "label_column", datasets.ClassLabel)
    if not isinstance(features[image], datasets.Image):
        raise ValueError(f"image_column {image!r} must be of type Image, and is {features[image]}")
    kind = features[label]
    is_class_label = isinstance(kind, datasets.ClassLabel)
    is_plain = isinstance(kind, datasets.Value) and kind.dtype.startswith(("string", "large_string", "int", "uint"))
    if not is_class_label and not is_plain:
        raise ValueError(f"label_column {label!r} must hold class labels, strings or integers, and is {kind}")

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
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if given is None and len(found) == 1:
        return found[0]
    if given is None:
        raise ValueError(f"{argument} must be given: {found} are of type {kind.__name__} among {list(features)}")
    if given not in features:
        raise ValueError(f"{argument} {given!r} does not exist; the columns are {list(features)}")
    return given


def _split_names(available: Collection[str]) -> dict[str, str]:
    """Which of the names available stands for which split."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        matching = [name for name in available if name.lower() in names]
        if len(matching) > 1:
            raise ValueError(f"only one of {matching} can be the {split} split")
        if matching:
            found[split] = matching[0]
    return found


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"{file} is missing from the data set")
    return file


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in _existing(file).read_text(encoding="utf-8").splitlines() if line.strip()]


def _matlab(file: Path, variable: str) -> np.ndarray:
    _existing(file)
    try:
        return np.atleast_1d(scipy.io.loadmat(file, squeeze_me=True)[variable])
    except Exception as error:  # whatever a broken file leads to
        raise ValueError(f"{file} cannot be read as a MATLAB file with {variable!r}: {error}") from error


def _listed(images: list[Path], labels: list, annotations: Path) -> datasets.Dataset:
    """Rows of the images that are there, out of those that an annotation file lists."""
    there = [image.is_file() for image in images]
    if not all(there):
        missing = f"{there.count(False)} of the {len(there)} images in {annotations}"
        example = images[there.index(False)]
        if not any(there):
            raise ValueError(f"{missing} are missing, such as {example}")
        logger.warning("%s are missing and left out, such as %s", missing, example)
    return _checked_rows(list(compress(images, there)), list(compress(labels, there)))


def _checked_rows(images: list[Path], labels: list) -> datasets.Dataset:
    """Rows of image files. Reading the headers finds nearly all bad files before a training starts."""
    bad = []
    for image in images:
        try:
            Image.open(image).close()
        except Exception as error:  # Pillow's plugins raise whatever a broken header leads to
            bad.append((image, error))
    if bad:
        raise ValueError(f"{len(bad)} of {len(images)} images cannot be read, first {bad[0][0]}: {bad[0][1]}")
    return _rows([str(image.absolute()) for image in images], labels)


def _rows(images: list, labels: list) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"image": images, "label": labels})
    return rows.cast_column("image", datasets.Image(decode=False))


def _labelled(splits: Splits, classes: Classes) -> Splits:
    """Replaces the labels by indices into the names of train's classes."""
    for split, rows in splits.items():
        if not len(rows):
            raise ValueError(f"the {split} split has no images")
    in_train = set(splits["train"]["label"][:])
    kept = [label for label in classes if label in in_train]
    if len(kept) < 2:
        raise ValueError(f"at least two classes are needed, and train has {[classes[label] for label in kept]}")
    index = {label: i for i, label in enumerate(kept)}
    feature = datasets.ClassLabel(names=[classes[label] for label in kept])
    labelled = {}
    for split, rows in splits.items():
        labels = rows["label"][:]
        for row, label in enumerate(labels):
            if label not in classes:
                allowed = f"{len(classes)} classes, {next(iter(classes))!r} to {list(classes)[-1]!r}"
                raise ValueError(f"label {label!r} in row {row} of the {split} split is none of the {allowed}")
            if label not in index:
                raise ValueError(f"class {classes[label]!r} of the {split} split has no images in the train split")
        encoded = [index[label] for label in labels]
        labelled[split] = rows.remove_columns("label").add_column("label", encoded, feature=feature)
    return labelled


def _held_out(train: datasets.Dataset, fractions: dict[str, float], seed: int) -> Splits:
    """Splits fractions of each class off train. Returns those splits and what is left of train."""
    rng = np.random.default_rng(seed)
    labels = np.array(train["label"][:])
    parts: dict[str, list[int]] = {split: [] for split in ("train", *fractions)}
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        size = len(rows)
        for split, fraction in fractions.items():
            count = min(round(fraction * size), len(rows) - 1)
            parts[split].extend(rows[:count])
            rows = rows[count:]
        parts["train"].extend(rows)
    for split, rows in parts.items():
        if not rows:
            raise ValueError(f"the classes of train are too small to hold out images for a {split} split")
    return {split: train.select(sorted(rows)) for split, rows in parts.items()}


def read_image(row: dict[str, Any]) -> Image.Image:
    """Reads one image in full, upright and without its banner.

    Args:
        row: row of `load_splits`: `image`, a dict with the `bytes` of a file or the `path` to it, and, if there,
            `banner`, the height in pixels of what is cut off at the bottom.

    Returns:
        RGB image, turned by the orientation in its EXIF data, as `pipeline("image-classification")` reads it too.

    Raises:
        ValueError: if the image cannot be read, naming its path.
    """
    path, content = row["image"]["path"], row["image"]["bytes"]
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as file:
            image = load_image(file)
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads to
        raise ValueError(f"cannot read the image {path or 'stored as bytes'}: {error}") from error
    return image.crop((0, 0, image.width, image.height - row.get("banner", 0)))


def image_processor_for(
    image_size: int | tuple[int, int],
    *,
    image_mean: list[float],
    image_std: list[float],
    resample: PILImageResampling = PILImageResampling.BILINEAR,
    resize_ratio: float = 600 / 448,
    resize_size: int | tuple[int, int] | None = None,
) -> DeiTImageProcessor:
    """Makes the test transform: resize both sides, crop the centre, scale to [0, 1], normalise.

    Args:
        image_size: height and width of the crop, in pixels; one number for a square.
        image_mean: mean of each RGB channel, of values in [0, 1].
        image_std: standard deviation of each RGB channel.
        resample: how pixels are interpolated.
        resize_ratio: side of the resized image relative to the crop. The aspect ratio is not kept, as in TransFG.
        resize_size: height and width of the resized image, in pixels, in place of the ratio.

    Returns:
        An image processor that `AutoImageProcessor.from_pretrained` loads once it is saved. It is DeiT's, since
        ViT's ignores the centre crop in Transformers 4.

    Raises:
        ValueError: if the crop is larger than the resized image.
    """
    height, width = height_and_width(image_size)
    resized = (round(resize_ratio * height), round(resize_ratio * width))
    if resize_size is not None:
        resized = height_and_width(resize_size)
    if resized[0] < height or resized[1] < width:
        raise ValueError(f"resized to {resized}, an image is smaller than the crop of image_size {(height, width)}")
    return DeiTImageProcessor(
        do_resize=True,
        size={"height": resized[0], "width": resized[1]},
        resample=resample,
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        do_rescale=True,
        do_normalize=True,
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Both sides in pixels, of a size that may be the side of a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def train_transform(
    image_processor: DeiTImageProcessor, auto_augment: bool = False
) -> Callable[[Image.Image], torch.Tensor]:
    """Makes the training transform that belongs to a test transform: random crop and flip in place of the centre.

    Args:
        image_processor: processor of `image_processor_for`; sizes, interpolation, mean and deviation are read from it.
        auto_augment: whether to apply AutoAugment's ImageNet policy too, as TransFG does for Stanford Cars.

    Returns:
        Function from an RGB image to a float32 tensor `(3, H, W)`. It draws from torch's global random state.
    """
    resized, crop = image_processor.size, image_processor.crop_size
    return v2.Compose(
        [
            v2.Resize((resized["height"], resized["width"]), interpolation=image_processor.resample),
            v2.RandomCrop((crop["height"], crop["width"])),
            v2.RandomHorizontalFlip(),
            *([v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)] if auto_augment else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(image_processor.image_mean, image_processor.image_std),
            v2.ToPureTensor(),
        ]
    )


def evaluation_transform(image_processor: DeiTImageProcessor) -> Callable[[Image.Image], torch.Tensor]:
    """Makes the test transform, the image processor itself, a function from an RGB image to float32 `(3, H, W)`."""
    return partial(_processed, image_processor)


def denormalize(pixel_values: torch.Tensor, image_processor: DeiTImageProcessor) -> np.ndarray:
    """Normalised images (N, 3, H, W) as the model saw them, to look at: (N, H, W, 3) in 0 … 1."""
    images = pixel_values.permute(0, 2, 3, 1).numpy() * image_processor.image_std + image_processor.image_mean
    return images.clip(0, 1)


def _processed(image_processor: DeiTImageProcessor, image: Image.Image) -> torch.Tensor:
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


class ImageClassificationDataset(torch.utils.data.Dataset):
    """Images as a Trainer reads them.

    Args:
        rows: split of `load_splits`.
        transform: function from an RGB image to a float32 tensor `(3, H, W)`.
        seed: with a seed, what the transform draws is a function of (seed, epoch, sample index) alone, whatever the
            order, the workers and the global random state, so that a resumed run sees the images it would have
            seen. Without one the transform draws from the global state.
    """

    def __init__(
        self, rows: datasets.Dataset, transform: Callable[[Image.Image], torch.Tensor], seed: int | None = None
    ):
        self.rows = rows
        self.transform = transform
        self.seed = seed
        # in shared memory, so that workers that are already running see the new epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0, that augmentation depends on, in loader workers too."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Returns `pixel_values`, float32 `(3, H, W)`, and `labels`, an index into the class names.

        Raises:
            ValueError: if the image cannot be read.
        """
        row = self.rows[index]
        image = read_image(row)
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                entropy = np.random.SeedSequence([self.seed, self.epoch.item(), index])
                # not torch.manual_seed, which would also seed the accelerators, whose states are not forked here
                torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            return {"pixel_values": self.transform(image), "labels": row["label"]}
