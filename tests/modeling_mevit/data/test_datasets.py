# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Data: every layout, held-out splits, reading of images, transforms, reproducible augmentation, bad input."""

import io
import logging
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, pipeline

from modeling_mevit import data
from modeling_mevit.data import (
    ImageClassificationDataset,
    denormalize,
    evaluation_transform,
    fingerprint,
    image_processor_for,
    load_splits,
    image_hashes,
    load_split,
    read_image,
    train_transform,
)
from modeling_mevit.data.demo import CLASS_NAMES


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
UNCHANGED = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}

shared = pytest.mark.skipif("MEVIT_SHARED" not in os.environ, reason="MEVIT_SHARED names no folder with real data")


def noise(height: int = 40, width: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(8, 8)).save(path)
    return path


def write_classes(folder: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        for i in range(size):
            write(folder / name / f"{i:02}.jpg")
    return folder


def class_names(rows: datasets.Dataset) -> list[str]:
    return rows.features["label"].names


def files(rows: datasets.Dataset) -> list[str]:
    """File name and class name of each row."""
    return [f"{Path(row['image']['path']).name} {class_names(rows)[row['label']]}" for row in rows]


def sizes(splits: datasets.DatasetDict) -> dict[str, int]:
    return {split: len(rows) for split, rows in splits.items()}


# Folders of classes


def test_folder_with_all_splits(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2, "dog": 2, "ant": 1})
    write_classes(tmp_path / "validation", {"dog": 1})
    write_classes(tmp_path / "test", {"dog": 1, "ant": 1})
    splits = load_splits(tmp_path)

    assert list(splits) == ["train", "validation", "test"]
    for rows in splits.values():
        assert class_names(rows) == ["ant", "cat", "dog"]
        assert rows.features["image"] == datasets.Image(decode=False)
    assert files(splits["train"]) == ["00.jpg ant", "00.jpg cat", "01.jpg cat", "00.jpg dog", "01.jpg dog"]
    assert files(splits["validation"]) == ["00.jpg dog"]
    assert files(splits["test"]) == ["00.jpg ant", "00.jpg dog"]
    assert splits["test"][0] == {"image": {"path": str(tmp_path / "test/ant/00.jpg"), "bytes": None}, "label": 0}


def test_folder_is_read_again_when_it_changes(tmp_path):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, {"cat": 2, "dog": 2})
    assert sizes(load_splits(tmp_path)) == {"train": 4, "validation": 4, "test": 4}
    write(tmp_path / "train" / "emu" / "new.png")
    splits = load_splits(tmp_path)
    assert class_names(splits["test"]) == ["cat", "dog", "emu"]
    assert files(splits["train"])[-1] == "new.png emu"


def test_validation_is_held_out_per_class(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 10, "emu": 1})
    write_classes(tmp_path / "test", {"cat": 2, "dog": 2})
    splits = load_splits(tmp_path)
    assert Counter(splits["validation"]["label"]) == {0: 2, 1: 1}
    assert Counter(splits["train"]["label"]) == {0: 18, 1: 9, 2: 1}
    assert sorted(files(splits["train"]) + files(splits["validation"])) == sorted(
        [f"{i:02}.jpg cat" for i in range(20)] + [f"{i:02}.jpg dog" for i in range(10)] + ["00.jpg emu"]
    )
    assert len(splits["test"]) == 4

    assert files(load_splits(tmp_path)["validation"]) == files(splits["validation"])
    others = [files(load_splits(tmp_path, seed=seed)["validation"]) for seed in (1, 2)]
    assert any(other != files(splits["validation"]) for other in others)
    larger = load_splits(tmp_path, validation_fraction=0.5)
    assert Counter(larger["validation"]["label"]) == {0: 10, 1: 5}


def test_selection_moves_a_part_of_each_class_to_validation(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 10})
    write_classes(tmp_path / "val", {"cat": 3, "dog": 2})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 1})
    plain, selection = load_splits(tmp_path), load_splits(tmp_path, selection_fraction=0.2)
    assert Counter(selection["train"]["label"]) == {0: 16, 1: 8}
    assert Counter(selection["validation"]["label"]) == {0: 3 + 4, 1: 2 + 2}
    assert files(selection["test"]) == files(plain["test"])
    for split in ("train", "validation"):
        paths = {row["path"] for row in selection[split]["image"]}
        assert len(paths) == len(selection[split])
    moved = {row["path"] for row in selection["validation"]["image"]} & {r["path"] for r in plain["train"]["image"]}
    assert len(moved) == 6 and not moved & {row["path"] for row in selection["train"]["image"]}


def test_flat_folder_is_train_only(tmp_path):
    flat = write_classes(tmp_path / "brackets [1]", {"cat": 10, "test kit": 20, "two": 1})
    write(flat / "cat" / "closer" / "validation_99.PNG")
    for name in ("cat/._00.jpg", ".cache/00.jpg"):
        write(flat / name)
    (flat / "cat" / "notes.txt").write_text("no image")
    splits = load_splits(flat)
    assert class_names(splits["train"]) == ["cat", "test kit", "two"]
    assert sum(sizes(splits).values()) == 32
    assert Counter(splits["test"]["label"]) == {0: 2, 1: 4}
    assert Counter(splits["validation"]["label"]) == {0: 1, 1: 2}
    assert len(set().union(*(files(rows) for rows in splits.values()))) == 32
    assert "validation_99.PNG cat" in sum((files(rows) for rows in splits.values()), [])


def test_every_class_keeps_a_training_image(tmp_path):
    write_classes(tmp_path, {"one": 1, "two": 2, "many": 20})
    splits = load_splits(tmp_path, validation_fraction=0.9)
    counts = Counter(splits["train"]["label"])
    assert [counts[label] for label in range(3)] == [1, 1, 1]


# Stanford Cars


def write_cars(folder: Path, half: str, annotations: str, labels: list[int]) -> None:
    rows = np.zeros((1, len(labels)), [(name, object) for name in CARS_FIELDS])
    for i, label in enumerate(labels):
        write(folder / half / f"{i + 1:05}.jpg")
        rows[0, i] = (1, 1, 7, 7, label, f"{i + 1:05}.jpg")
    (folder / "devkit").mkdir(exist_ok=True)
    scipy.io.savemat(folder / "devkit" / annotations, {"annotations": rows})
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]], object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


CARS_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
CARS_LABELS = [1, 2, 3] * 10


def test_stanford_cars_without_the_test_half(tmp_path):
    write_cars(tmp_path, "cars_train", "cars_train_annos.mat", CARS_LABELS)
    splits = load_splits(tmp_path)
    assert class_names(splits["train"]) == ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
    assert Counter(splits["train"]["label"]) == {0: 7, 1: 7, 2: 7}
    assert Counter(splits["validation"]["label"]) == {0: 1, 1: 1, 2: 1}
    assert Counter(splits["test"]["label"]) == {0: 2, 1: 2, 2: 2}
    held_out = files(splits["test"])
    assert len(set().union(*(files(rows) for rows in splits.values()))) == 30
    assert files(load_splits(tmp_path)["test"]) == held_out
    for row in splits["train"]:
        number = int(Path(row["image"]["path"]).stem)
        assert row["label"] == CARS_LABELS[number - 1] - 1


def test_stanford_cars_with_the_test_half(tmp_path, caplog):
    write_cars(tmp_path, "cars_train", "cars_train_annos.mat", CARS_LABELS)
    write(tmp_path / "cars_test" / "00001.jpg")
    assert len(load_splits(tmp_path)["test"]) == 6
    assert "cars_test_annos_withlabels.mat" in caplog.text

    write_cars(tmp_path, "cars_test", "cars_test_annos_withlabels.mat", [3, 3, 1])
    splits = load_splits(tmp_path)
    assert sizes(splits) == {"train": 27, "validation": 3, "test": 3}
    assert splits["test"]["label"][:] == [2, 2, 0]
    assert splits["test"][0]["image"]["path"] == str(tmp_path / "cars_test/00001.jpg")


def test_stanford_cars_with_missing_images(tmp_path, caplog):
    write_cars(tmp_path, "cars_train", "cars_train_annos.mat", CARS_LABELS)
    images = sorted((tmp_path / "cars_train").iterdir())
    images[4].unlink()
    with caplog.at_level(logging.WARNING):
        splits = load_splits(tmp_path)
    assert sum(sizes(splits).values()) == 29
    assert "1 of the 30 images" in caplog.text and str(images[4]) in caplog.text
    for image in images:
        image.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="30 of the 30 images in .*cars_train_annos.mat are missing"):
        load_splits(tmp_path)


def test_stanford_cars_bad_annotations(tmp_path):
    write_cars(tmp_path, "cars_train", "cars_train_annos.mat", [1, 2, 4])
    with pytest.raises(ValueError, match="label 4 in row 2 of the train split is none of the 3 classes, 1 to 3"):
        load_splits(tmp_path)
    (tmp_path / "devkit" / "cars_meta.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(ValueError, match="cars_meta.mat cannot be read as a MATLAB file with 'class_names'"):
        load_splits(tmp_path)
    (tmp_path / "devkit" / "cars_meta.mat").unlink()
    with pytest.raises(ValueError, match="cars_meta.mat is missing"):
        load_splits(tmp_path)


@shared
def test_real_stanford_cars():
    folder = Path(os.environ["MEVIT_SHARED"]) / "data" / "stanford_cars"
    splits = load_splits(folder)
    assert len(class_names(splits["train"])) == 196
    assert sum(sizes(splits).values()) == len(list((folder / "cars_train").iterdir()))
    for rows in splits.values():
        assert set(rows["label"]) == set(range(196))
    # the first annotation of the original file: class 3
    row = next(row for rows in splits.values() for row in rows if row["image"]["path"].endswith("00002.jpg"))
    assert class_names(splits["train"])[row["label"]] == "Acura TL Sedan 2012"
    # the files that this module's tests write have the structure of the real one
    real = scipy.io.loadmat(folder / "devkit" / "cars_train_annos.mat")["annotations"]
    assert real.dtype == [(name, object) for name in CARS_FIELDS] and real.shape[0] == 1


@shared
def test_real_grocery_store():
    splits = load_splits(Path(os.environ["MEVIT_SHARED"]) / "data" / "grocery_store")
    assert sizes(splits) == {"train": 2640, "validation": 296, "test": 2485}
    assert len(class_names(splits["validation"])) == 81
    assert len(set(splits["validation"]["label"])) == 60
    assert min(read_image(splits["test"][0]).size) == 160


# FGVC-Aircraft


def write_aircraft(folder: Path) -> Path:
    levels = {
        "variant": ["707-320", "A300B4", "Cessna 172"],
        "family": ["Boeing 707", "A300", "Cessna 172"],
        "manufacturer": ["Boeing", "Airbus", "Cessna"],
    }
    (folder / "data" / "images").mkdir(parents=True)
    for level, file in (("variant", "variants"), ("family", "families"), ("manufacturer", "manufacturers")):
        (folder / "data" / f"{file}.txt").write_text("\n".join(levels[level]) + "\n")
        for number, split in enumerate(("train", "val", "test")):
            lines = [f"{number}{i:06} {name}" for i, name in enumerate(levels[level])]
            (folder / "data" / f"images_{level}_{split}.txt").write_text("\n".join(lines) + "\n")
    photo = Image.new("RGB", (50, 60), (0, 200, 0))
    photo.paste((255, 255, 255), (0, 40, 50, 60))
    for number in range(3):
        for i in range(3):
            photo.save(folder / "data" / "images" / f"{number}{i:06}.jpg")
    return folder


@pytest.mark.parametrize(
    ("level", "names"),
    [
        ("variant", ["707-320", "A300B4", "Cessna 172"]),
        ("family", ["Boeing 707", "A300", "Cessna 172"]),
        ("manufacturer", ["Boeing", "Airbus", "Cessna"]),
    ],
)
def test_fgvc_aircraft(tmp_path, level, names):
    splits = load_splits(write_aircraft(tmp_path), aircraft_level=level)
    assert sizes(splits) == {"train": 3, "validation": 3, "test": 3}
    assert class_names(splits["train"]) == names
    assert files(splits["validation"]) == [f"1{i:06}.jpg {name}" for i, name in enumerate(names)]
    image = read_image(splits["test"][0])
    assert image.size == (50, 40)
    assert np.asarray(image)[..., 0].max() < 100, "something of the white banner is left"


def test_fgvc_aircraft_bad_input(tmp_path):
    write_aircraft(tmp_path)
    with pytest.raises(ValueError, match=r"aircraft_level must be one of \['variant', 'family', 'manufacturer'\]"):
        load_splits(tmp_path, aircraft_level="make")
    (tmp_path / "data" / "families.txt").unlink()
    with pytest.raises(ValueError, match="families.txt is missing"):
        load_splits(tmp_path, aircraft_level="family")
    test = tmp_path / "data" / "images_variant_test.txt"
    test.write_text(test.read_text().replace("A300B4", "A300B5"))
    with pytest.raises(ValueError, match="label 'A300B5' in row 1 of the test split is none of the 3 classes"):
        load_splits(tmp_path)


# Data sets on the Hub


def encoded(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def rows_of(labels: list, feature=None, **columns) -> datasets.Dataset:
    feature = feature or datasets.ClassLabel(names=["cat", "dog"])
    features = {"photo": datasets.Image(), "kind": feature}
    images = [encoded(noise(8, 8, seed)) for seed in range(len(labels))]
    rows = datasets.Dataset.from_dict({"photo": images, "kind": labels}, features=datasets.Features(features))
    for name, column in columns.items():
        rows = rows.add_column(name, column)
    return rows


@pytest.fixture
def hub(monkeypatch):
    """Puts an in-memory data set in the place of what the Hub would send."""

    def put(**splits: datasets.Dataset) -> None:
        def load_dataset(name: str) -> datasets.DatasetDict:
            assert name == "owner/pets"
            return datasets.DatasetDict(splits)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return put


def test_hub_columns_are_detected(hub):
    hub(train=rows_of([0, 1] * 10, bbox=list(range(20))), test=rows_of([1, 0, 1], bbox=[0, 0, 0]))
    splits = load_splits("owner/pets")
    assert sizes(splits) == {"train": 18, "validation": 2, "test": 3}
    for rows in splits.values():
        assert rows.column_names == ["image", "label"]
        assert class_names(rows) == ["cat", "dog"]
    assert splits["test"]["label"][:] == [1, 0, 1]
    assert np.array_equal(np.asarray(read_image(splits["test"][2])), np.asarray(noise(8, 8, seed=2)))


@pytest.mark.parametrize("feature", [datasets.Value("string"), datasets.Value("int64")])
def test_hub_labels_of_strings_and_integers(hub, feature):
    text = feature.dtype == "string"
    values = ["dog", "cat"] if text else [10, 9]
    hub(train=rows_of(values * 2, feature), valid=rows_of(values[:1], feature), test=rows_of(values, feature))
    splits = load_splits("owner/pets", label_column="kind")
    assert class_names(splits["train"]) == (["cat", "dog"] if text else ["9", "10"])
    assert splits["train"]["label"][:] == [1, 0, 1, 0]
    assert splits["validation"]["label"][:] == [1]


def test_hub_class_labels_that_train_lacks_are_dropped(hub):
    pets = datasets.ClassLabel(names=["ant", "cat", "bat", "dog"])
    hub(train=rows_of([1, 3], pets), validation=rows_of([3], pets), test=rows_of([1], pets))
    splits = load_splits("owner/pets")
    assert class_names(splits["test"]) == ["cat", "dog"]
    assert splits["train"]["label"][:] == [0, 1] and splits["validation"]["label"][:] == [1]


def test_hub_bad_input(hub):
    strings = datasets.Value("string")
    pets = datasets.ClassLabel(names=["cat", "dog", "emu"])
    hub(train=rows_of([0, 1], breed=[1, 2]))
    with pytest.raises(ValueError, match=r"label_column 'race' does not exist; .* \['photo', 'kind', 'breed'\]"):
        load_splits("owner/pets", label_column="race")
    with pytest.raises(ValueError, match=r"image_column 'image' does not exist; .* \['photo', 'kind', 'breed'\]"):
        load_splits("owner/pets", image_column="image")
    with pytest.raises(ValueError, match="image_column 'kind' must be of type Image"):
        load_splits("owner/pets", image_column="kind")
    with pytest.raises(ValueError, match="label_column 'photo' must hold class labels, strings or integers"):
        load_splits("owner/pets", label_column="photo")
    hub(train=rows_of([0, 1], boxes=[[1, 2], [3, 4]]))
    with pytest.raises(ValueError, match="label_column 'boxes' must hold class labels, strings or integers"):
        load_splits("owner/pets", label_column="boxes")
    hub(train=rows_of(["a", "b"], strings))
    with pytest.raises(ValueError, match=r"label_column must be given: \[\] .* \['photo', 'kind'\]"):
        load_splits("owner/pets")
    hub(train=rows_of([0, 1]).cast_column("kind", datasets.ClassLabel(names=["a", "b"])), test=rows_of([0, None]))
    with pytest.raises(ValueError, match="label None in row 1 of the test split is none of the 2 classes, 0 to 1"):
        load_splits("owner/pets")
    hub(train=rows_of([0, 2], pets), test=rows_of([2, 1], pets))
    with pytest.raises(ValueError, match="class 'dog' of the test split has no images in the train split"):
        load_splits("owner/pets")
    hub(train=rows_of([0, 1]), test=rows_of([]))
    with pytest.raises(ValueError, match="the test split has no images"):
        load_splits("owner/pets")
    hub(train=rows_of([]), test=rows_of([0, 1]))
    with pytest.raises(ValueError, match="the train split has no images"):
        load_splits("owner/pets")
    hub(full=rows_of([0, 1]))
    with pytest.raises(ValueError, match=r"'owner/pets' has no train split, only \['full'\]"):
        load_splits("owner/pets")
    hub(train=rows_of([0, 1]), val=rows_of([0]), validation=rows_of([0]))
    with pytest.raises(ValueError, match=r"only one of \['val', 'validation'\] can be the validation split"):
        load_splits("owner/pets")


@pytest.mark.parametrize("error", [datasets.exceptions.DatasetNotFoundError("unknown"), ConnectionError("offline")])
def test_hub_data_set_that_cannot_be_loaded(monkeypatch, error):
    def load_dataset(name):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"'data/pets' is no folder, and as a Hub data set .*: {error}"):
        load_splits("data/pets")


# The embedded data set


def test_demo(monkeypatch):
    monkeypatch.setattr(data, "DEMO_SAMPLES_PER_CLASS", {"train": 2, "validation": 1, "test": 1})
    splits = load_splits("demo")
    count = len(data.CLASS_NAMES)
    assert sizes(splits) == {"train": 2 * count, "validation": count, "test": count}
    assert class_names(splits["test"]) == list(data.CLASS_NAMES)
    images, labels = data.demo_images(2, seed=0)
    assert splits["train"]["label"][:] == labels
    assert np.array_equal(np.asarray(read_image(splits["train"][1])), np.asarray(images[1]))
    contents = [row["image"]["bytes"] for rows in splits.values() for row in rows]
    assert len(set(contents)) == len(contents), "an image is in two splits"
    again = load_splits("demo", seed=1)
    assert [row["image"]["bytes"] for rows in again.values() for row in rows] == contents


# Bad folders


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent", "absent", "a/b/c"])
def test_path_that_does_not_exist(name):
    message = f"{name!r} is no folder; allowed are 'demo', a folder or a Hub data set 'owner/name'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_splits(name)


def test_folder_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no images in class folders \(CLASS/\*.jpg\)"):
        load_splits(tmp_path / "empty")
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="file.zip' is no folder"):
        load_splits(tmp_path / "file.zip")

    pets = tmp_path / "pets"
    write_classes(pets / "train", {"cat": 2, "dog": 2})
    (pets / "test").mkdir()
    with pytest.raises(ValueError, match="test has no images in class folders"):
        load_splits(pets)
    write_classes(pets / "test", {"cat": 1, "emu": 1})
    with pytest.raises(ValueError, match="class 'emu' of the test split has no images in the train split"):
        load_splits(pets)
    (pets / "test" / "emu" / "00.jpg").unlink()
    with pytest.raises(ValueError, match="the classes of train are too small to hold out images for a validation"):
        load_splits(pets)
    with pytest.raises(ValueError, match="validation_fraction must lie between 0 and 1, got 1.5"):
        load_splits(pets, validation_fraction=1.5)
    with pytest.raises(ValueError, match="selection_fraction must lie from 0 to below 1, got 1.0"):
        load_splits(pets, selection_fraction=1.0)
    with pytest.raises(ValueError, match="image_column and label_column are for Hub data sets only"):
        load_splits(pets, label_column="species")
    with pytest.raises(ValueError, match=r"at least two classes are needed, and train has \['pets'\]"):
        load_splits(tmp_path)
    (pets / "train").rename(pets / "other")
    with pytest.raises(ValueError, match=r"has no train split, only \['test'\]"):
        load_splits(pets)


def test_bad_file_is_named_when_the_data_is_loaded(tmp_path):
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "dog" / "03.jpg").write_text("no image")
    (tmp_path / "dog" / "05.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=f"2 of 20 images cannot be read, first {tmp_path}/dog/03.jpg: "):
        load_splits(tmp_path)


# Images


def row_of(path: Path, **columns) -> dict:
    return {"image": {"path": str(path), "bytes": None}, **columns}


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("L", "a.jpg"), ("LA", "a.png"), ("RGBA", "a.png"), ("P", "a.gif"), ("1", "a.png")],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, name):
    path = write(tmp_path / name, noise().convert(mode))
    from_path = read_image(row_of(path))
    from_bytes = read_image({"image": {"path": None, "bytes": path.read_bytes()}})
    assert from_path.mode == "RGB" and from_path.size == (48, 40)
    assert np.array_equal(np.asarray(from_path), np.asarray(Image.open(path).convert("RGB")))
    assert np.array_equal(np.asarray(from_path), np.asarray(from_bytes))


def test_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the image has to be turned by 90 degrees, clockwise
    noise().save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(noise()), k=-1)
    assert np.array_equal(np.asarray(read_image(row_of(tmp_path / "a.png"))), upright)
    without_banner = read_image(row_of(tmp_path / "a.png", banner=5))
    assert np.array_equal(np.asarray(without_banner), upright[:-5])


def test_image_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "cut.jpg", noise(200, 200))
    path.write_bytes(path.read_bytes()[:5000])
    Image.open(path).close()  # its header is whole
    with pytest.raises(ValueError, match=f"cannot read the image {path}: .*truncated"):
        read_image(row_of(path))
    path.write_text("text")
    with pytest.raises(ValueError, match=f"cannot read the image {path}: "):
        read_image(row_of(path))
    path.unlink()
    with pytest.raises(ValueError, match=f"cannot read the image {path}: "):
        read_image(row_of(path))
    with pytest.raises(ValueError, match="cannot read the image stored as bytes: "):
        read_image({"image": {"path": None, "bytes": b"text"}})


# Transforms


@pytest.mark.parametrize(
    ("arguments", "resized"),
    [
        ({"image_size": 448}, (600, 600)),
        ({"image_size": 112}, (150, 150)),
        ({"image_size": (112, 56)}, (150, 75)),
        ({"image_size": 112, "resize_size": 128}, (128, 128)),
        ({"image_size": (96, 112), "resize_size": (96, 128)}, (96, 128)),
        ({"image_size": 100, "resize_ratio": 1.0}, (100, 100)),
    ],
)
def test_resized_sides(arguments, resized):
    processor = image_processor_for(**arguments, **HALF)
    assert (processor.size["height"], processor.size["width"]) == resized
    size = arguments["image_size"]
    shape = (3, size, size) if isinstance(size, int) else (3, *size)
    for transform in (evaluation_transform(processor), train_transform(processor), train_transform(processor, True)):
        pixels = transform(noise())
        assert pixels.shape == shape and pixels.dtype == torch.float32 and type(pixels) is torch.Tensor


def test_crop_larger_than_the_resized_image():
    with pytest.raises(ValueError, match=r"resized to \(100, 120\), .* image_size \(112, 112\)"):
        image_processor_for(112, resize_size=(100, 120), **HALF)


def test_evaluation_transform_resizes_both_sides_and_crops_the_centre():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    processor = image_processor_for((20, 12), resize_size=(40, 24), image_mean=mean, image_std=std)
    pixels = evaluation_transform(processor)(noise(80, 96))
    resized = np.asarray(noise(80, 96).resize((24, 40), Image.Resampling.BILINEAR)) / 255
    expected = (resized[10:30, 6:18] - mean) / std
    # PIL and torchvision round their 8-bit results differently, by at most one level
    torch.testing.assert_close(pixels.permute(1, 2, 0), torch.tensor(expected).float(), rtol=0, atol=1.01 / 255 / 0.5)


def test_train_transform_crops_and_flips_what_testing_resizes():
    whole = evaluation_transform(image_processor_for((20, 26), resize_size=(20, 26), **HALF))(noise())
    transform = train_transform(image_processor_for((16, 20), resize_size=(20, 26), **HALF))
    torch.manual_seed(0)
    places = set()
    for _ in range(60):
        pixels = transform(noise())
        found = [
            (top, left, flipped)
            for flipped, image in enumerate((whole, whole.flip(-1)))
            for top in range(5)
            for left in range(7)
            if (image[:, top : top + 16, left : left + 20] - pixels).abs().max() < 0.01
        ]
        assert len(found) == 1
        places |= set(found)
    assert {top for top, _, _ in places} == set(range(5)) and {flipped for _, _, flipped in places} == {0, 1}
    assert {left for _, left, _ in places} == set(range(7))


def test_auto_augment_changes_more_than_crop_and_flip():
    flat = Image.new("RGB", (40, 40), (200, 100, 50))
    processor = image_processor_for(16, **UNCHANGED)
    expected = torch.tensor([200, 100, 50])[:, None, None].expand(3, 16, 16) / 255
    torch.manual_seed(0)
    plain, augmented = train_transform(processor), train_transform(processor, auto_augment=True)
    assert all(torch.allclose(plain(flat), expected) for _ in range(10))
    assert not all(torch.allclose(augmented(flat), expected, atol=0.05) for _ in range(10))


def test_saved_processor_is_the_test_transform(tmp_path):
    """The processor loads back by Auto class, and a pipeline sees what the evaluation saw, file by file."""
    processor = image_processor_for((28, 42), resize_size=(40, 50), **HALF)
    config = ViTConfig(
        image_size=(28, 42), patch_size=14, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.vit.embeddings.patch_embeddings.projection.weight)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    loaded = AutoImageProcessor.from_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", model=str(tmp_path / "model"), top_k=None, function_to_apply="none")
    exif = Image.Exif()
    exif[0x0112] = 8
    noise(60, 90).save(tmp_path / "turned.jpg", exif=exif)
    write(tmp_path / "transparent.png", noise(33, 57).convert("RGBA"))
    for name in ("turned.jpg", "transparent.png"):
        image = read_image(row_of(tmp_path / name))
        pixels = evaluation_transform(processor)(image)
        assert torch.equal(pixels, evaluation_transform(loaded)(image))
        logits = model(pixels[None]).logits[0].tolist()
        answers = {answer["label"]: answer["score"] for answer in classify(str(tmp_path / name))}
        assert [answers[config.id2label[i]] for i in range(5)] == pytest.approx(logits, abs=1e-5)


# Reproducible augmentation


@pytest.fixture
def rows(tmp_path) -> datasets.Dataset:
    for i in range(6):
        write(tmp_path / "a" / f"{i}.png", noise(20, 20, seed=i))
    images = [str(tmp_path / "a" / f"{i}.png") for i in range(6)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 0, 1, 2]})
    return rows.cast_column("image", datasets.Image(decode=False))


TRANSFORM = train_transform(image_processor_for(16, resize_size=64, **HALF), auto_augment=True)


def epoch_of(loader: DataLoader, epoch: int) -> dict[int, torch.Tensor]:
    """Images of an epoch by their labels, which are all different here."""
    loader.dataset.set_epoch(epoch)
    return {int(label): pixels for batch in loader for pixels, label in zip(*batch.values(), strict=True)}


def test_sample_of_a_image_dataset(rows):
    processor = image_processor_for(16, **HALF)
    dataset = ImageClassificationDataset(rows, evaluation_transform(processor))
    assert len(dataset) == 6
    sample = dataset[4]
    assert set(sample) == {"pixel_values", "labels"} and sample["labels"] == 1
    assert torch.equal(sample["pixel_values"], evaluation_transform(processor)(noise(20, 20, seed=4)))


def test_augmentation_leaves_the_global_state_alone(rows):
    dataset = ImageClassificationDataset(rows, TRANSFORM, seed=0)
    before = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), before)
    unseeded = ImageClassificationDataset(rows, TRANSFORM)
    unseeded[0]
    assert not torch.equal(torch.get_rng_state(), before)


def test_augmentation_depends_on_seed_epoch_and_index(rows):
    same = rows.select([0, 0])
    dataset, other_seed = ImageClassificationDataset(same, TRANSFORM, seed=0), ImageClassificationDataset(same, TRANSFORM, seed=1)
    first = dataset[0]["pixel_values"]
    torch.rand(7)
    assert torch.equal(dataset[0]["pixel_values"], first)
    assert not torch.equal(dataset[1]["pixel_values"], first)
    assert not torch.equal(other_seed[0]["pixel_values"], first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0]["pixel_values"], first)
    dataset.set_epoch(0)
    assert torch.equal(dataset[0]["pixel_values"], first)


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_and_order_do_not_change_the_images(rows, method, num_workers):
    rows = rows.remove_columns("label").add_column("label", list(range(6)))
    plain = DataLoader(ImageClassificationDataset(rows, TRANSFORM, seed=3), batch_size=2)
    expected = [epoch_of(plain, epoch) for epoch in (0, 1)]
    assert not all(torch.equal(expected[0][i], expected[1][i]) for i in range(6))

    torch.manual_seed(123)
    torch.rand(100)
    workers = DataLoader(
        ImageClassificationDataset(rows, TRANSFORM, seed=3), batch_size=3, shuffle=True, num_workers=num_workers,
        persistent_workers=True, multiprocessing_context=method,
    )  # fmt: skip
    for epoch in (0, 1):
        images = epoch_of(workers, epoch)
        assert sorted(images) == list(range(6))
        assert all(torch.equal(images[i], expected[epoch][i]) for i in range(6))


def test_unreadable_image_is_named_by_the_dataset(rows):
    Path(rows[2]["image"]["path"]).unlink()
    with pytest.raises(ValueError, match="cannot read the image .*2.png"):
        ImageClassificationDataset(rows, TRANSFORM, seed=0)[2]


# Images for a trained model


def test_labels_are_numbered_as_the_model_does(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 10})
    write_classes(tmp_path / "test", {"cat": 3, "dog": 2})
    label2id = {"dog": 7, "cat": 2, "emu": 0}
    rows = load_split(label2id, tmp_path, "test")
    assert Counter(rows["label"]) == {2: 3, 7: 2}
    assert len(load_split(label2id, tmp_path, "all")) == 35
    with pytest.raises(ValueError, match="1 classes of .* are unknown to the model, first 'dog'"):
        load_split({"cat": 0}, tmp_path, "test")
    with pytest.raises(ValueError, match="split='dev' is unknown; allowed are 'train', 'validation', 'test', 'all'"):
        load_split(label2id, tmp_path, "dev")
    with pytest.raises(ValueError, match="half='third' is unknown"):
        load_split(label2id, tmp_path, "test", half="third")


def test_halves_are_fixed_and_share_no_image(tmp_path):
    write_classes(tmp_path / "train", {"cat": 6, "dog": 6})
    write_classes(tmp_path / "test", {"cat": 20, "dog": 10})
    label2id = {"cat": 0, "dog": 1}
    first, second = (load_split(label2id, tmp_path, "test", half=half) for half in ("first", "second"))
    assert Counter(first["label"]) == Counter(second["label"]) == {0: 10, 1: 5}
    paths = [{image["path"] for image in rows["image"]} for rows in (first, second)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 30
    assert paths[0] == {image["path"] for image in load_split(label2id, tmp_path, "test", half="first")["image"]}


def test_the_fingerprint_is_of_content_and_labels(tmp_path):
    for folder, seed in (("here", 0), ("there", 0), ("others", 1)):
        for name in ("cat", "dog"):
            rng = np.random.default_rng([seed, len(name), ord(name[0])])
            for number in range(6):
                file = tmp_path / folder / "train" / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    label2id = {"cat": 0, "dog": 1}
    here, there, others = (load_split(label2id, tmp_path / name, "all") for name in ("here", "there", "others"))
    assert fingerprint(here) == fingerprint(there) == fingerprint(here.select(range(11, -1, -1)))
    assert fingerprint(here) != fingerprint(here.select(range(5)))
    assert fingerprint(here) != fingerprint(others)  # equal names and labels, other photos
    assert fingerprint(here) != fingerprint(load_split({"cat": 0, "dog": 2}, tmp_path / "here", "all"))
    assert len(set(image_hashes(here)) & set(image_hashes(here.select([0, 1])))) == 2
    drawn = load_split(dict.fromkeys(CLASS_NAMES, 0), "demo", "validation")
    assert fingerprint(drawn.select([0])) != fingerprint(drawn.select([1]))


def test_what_the_model_saw_can_be_looked_at(tmp_path):
    processor = image_processor_for(8, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4], resize_size=8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    seen = denormalize(evaluation_transform(processor)(image)[None], processor)
    np.testing.assert_allclose(seen[0], np.asarray(image) / 255, atol=1e-6)
