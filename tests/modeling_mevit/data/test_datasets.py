# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Layouts of data sets, held-out splits, halves, labels as a model numbers them, bad input."""

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
from PIL import Image

from modeling_mevit.data import datasets as data
from modeling_mevit.data.datasets import load_split, load_splits
from modeling_mevit.data.demo import CLASS_NAMES, demo_images
from modeling_mevit.data.image_processing import read_image
from tests.helpers.images import noise, write_classes, write_image


shared = pytest.mark.skipif("MEVIT_SHARED" not in os.environ, reason="MEVIT_SHARED names no folder with real data")


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
    write_image(tmp_path / "train" / "emu" / "new.png")
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

    # published results depend on which images these are
    assert files(splits["validation"]) == ["04.jpg cat", "19.jpg cat", "02.jpg dog"]


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
    write_image(flat / "cat" / "closer" / "validation_99.PNG")
    for name in ("cat/._00.jpg", ".cache/00.jpg", "cat/.thumbnails/00.jpg", "cat/closer/.thumbnails/small/00.jpg"):
        write_image(flat / name)
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
    splits = load_splits(tmp_path, selection_fraction=0.9)
    counts = Counter(splits["train"]["label"])
    assert [counts[label] for label in range(3)] == [1, 1, 1]


# Stanford Cars


def write_cars(folder: Path, half: str, annotations: str, labels: list[int]) -> None:
    rows = np.zeros((1, len(labels)), [(name, object) for name in CARS_FIELDS])
    for i, label in enumerate(labels):
        write_image(folder / half / f"{i + 1:05}.jpg")
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
    write_image(tmp_path / "cars_test" / "00001.jpg")
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
    with pytest.raises(ValueError, match="label 4 in row 2 of the train split is not one of the 3 classes, 1 to 3"):
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
    assert min(read_image(splits["test"][0]["image"]["path"]).size) == 160


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
    ("label_column", "names"),
    [
        (None, ["707-320", "A300B4", "Cessna 172"]),
        ("variant", ["707-320", "A300B4", "Cessna 172"]),
        ("family", ["Boeing 707", "A300", "Cessna 172"]),
        ("manufacturer", ["Boeing", "Airbus", "Cessna"]),
    ],
)
def test_fgvc_aircraft(tmp_path, label_column, names):
    splits = load_splits(write_aircraft(tmp_path), label_column=label_column)
    assert sizes(splits) == {"train": 3, "validation": 3, "test": 3}
    assert class_names(splits["train"]) == names
    assert files(splits["validation"]) == [f"1{i:06}.jpg {name}" for i, name in enumerate(names)]
    row = splits["test"][0]
    image = read_image(row["image"]["path"], row["banner"])
    assert image.size == (50, 40)
    assert np.asarray(image)[..., 0].max() < 100, "something of the white banner is left"


def test_fgvc_aircraft_bad_input(tmp_path):
    write_aircraft(tmp_path)
    with pytest.raises(
        ValueError, match=r"label_column must be one of \['variant', 'family', 'manufacturer'\] .*'make'"
    ):
        load_splits(tmp_path, label_column="make")
    with pytest.raises(ValueError, match="columns can be chosen for a Hub data set .* got image_column='photo' "):
        load_splits(tmp_path, image_column="photo", label_column="family")
    (tmp_path / "data" / "families.txt").unlink()
    with pytest.raises(ValueError, match="families.txt is missing"):
        load_splits(tmp_path, label_column="family")
    test = tmp_path / "data" / "images_variant_test.txt"
    listed = test.read_text()
    test.write_text(listed + "2000003\n")
    with pytest.raises(ValueError, match="each line of .*_test.txt must be an image and its class, got '2000003'"):
        load_splits(tmp_path)
    test.write_text(listed.replace("A300B4", "A300B5"))
    with pytest.raises(ValueError, match="label 'A300B5' in row 1 of the test split is not one of the 3 classes"):
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

        monkeypatch.setattr(data, "answers", lambda name, kind: True)
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
    assert np.array_equal(np.asarray(read_image(splits["test"][2]["image"]["bytes"])), np.asarray(noise(8, 8, seed=2)))


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
    with pytest.raises(
        ValueError, match=r"label_column must be given .* ClassLabel, got \[\]; .* \['photo', 'kind'\]"
    ):
        load_splits("owner/pets")
    hub(train=rows_of([0, 1]).cast_column("kind", datasets.ClassLabel(names=["a", "b"])), test=rows_of([0, None]))
    with pytest.raises(ValueError, match="label None in row 1 of the test split is not one of the 2 classes, 0 to 1"):
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
    with pytest.raises(ValueError, match=r"'owner/pets' must have a train split, got only \['full'\]"):
        load_splits("owner/pets")
    hub(train=rows_of([0, 1]), val=rows_of([0]), validation=rows_of([0]))
    with pytest.raises(ValueError, match=r"one validation split at most, got \['val', 'validation'\]"):
        load_splits("owner/pets")


@pytest.mark.parametrize("error", [datasets.exceptions.DatasetNotFoundError("unknown"), ConnectionError("offline")])
def test_hub_data_set_that_cannot_be_loaded(monkeypatch, error):
    def load_dataset(name):
        raise error

    monkeypatch.setattr(data, "answers", lambda name, kind: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"'data/pets' is not a folder, and loading it from the Hub failed: {error}"):
        load_splits("data/pets")


def test_hub_data_set_without_a_hub(monkeypatch, tmp_path):
    """Nobody waits for what the cache does not hold."""
    monkeypatch.setattr(data, "answers", lambda name, kind: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows_of([0, 1] * 20)))
    with pytest.raises(ValueError, match="the Hub cannot be reached, and 'owner/pets' is neither a folder nor in"):
        load_splits("owner/pets")
    (tmp_path / "owner___pets").mkdir()
    assert class_names(load_splits("owner/pets")["train"]) == ["cat", "dog"]


# The embedded data set


def test_demo(monkeypatch):
    monkeypatch.setattr(data, "DEMO_SAMPLES_PER_CLASS", {"train": 2, "validation": 1, "test": 1})
    splits = load_splits("demo")
    count = len(CLASS_NAMES)
    assert sizes(splits) == {"train": 2 * count, "validation": count, "test": count}
    assert class_names(splits["test"]) == list(CLASS_NAMES)
    images, labels = demo_images(2, seed=0)
    assert splits["train"]["label"][:] == labels
    assert np.array_equal(np.asarray(read_image(splits["train"][1]["image"]["bytes"])), np.asarray(images[1]))
    contents = [row["image"]["bytes"] for rows in splits.values() for row in rows]
    assert len(set(contents)) == len(contents), "an image is in two splits"
    again = load_splits("demo")
    assert [row["image"]["bytes"] for rows in again.values() for row in rows] == contents


# Bad folders


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent", "absent", "a/b/c"])
def test_path_that_does_not_exist(name):
    message = f"{name!r} is not a folder; allowed are 'demo', a folder or a Hub data set 'owner/name'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_splits(name)


def test_folder_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no images in class folders \(CLASS/\*.jpg\)"):
        load_splits(tmp_path / "empty")
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="file.zip' is not a folder"):
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
    with pytest.raises(ValueError, match="the classes have too few images to hold out a validation part of 10%"):
        load_splits(pets)
    with pytest.raises(ValueError, match="selection_fraction must be at least 0 and below 1, got 1.0"):
        load_splits(pets, selection_fraction=1.0)
    with pytest.raises(
        ValueError, match="columns can be chosen for a Hub data set .* label_column='species' for '.*pets'"
    ):
        load_splits(pets, label_column="species")
    with pytest.raises(ValueError, match=r"train must have at least two classes, got \['pets'\]"):
        load_splits(tmp_path)
    (pets / "train").rename(pets / "other")
    with pytest.raises(ValueError, match=r"must have a train split, got only \['test'\]"):
        load_splits(pets)


def test_bad_file_is_named_when_the_data_is_loaded(tmp_path):
    write_classes(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / "dog" / "03.jpg").write_text("no image")
    (tmp_path / "dog" / "05.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=f"2 of 20 images cannot be read, first {tmp_path}/dog/03.jpg: "):
        load_splits(tmp_path)
    assert len(load_split(tmp_path, "all")) == 20  # whose images are opened next


# Images for a trained model


def test_labels_are_numbered_as_the_model_does(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 10})
    write_classes(tmp_path / "test", {"cat": 3, "dog": 2})
    label2id = {"dog": 7, "cat": 2, "emu": 0}
    rows = load_split(tmp_path, "test", label2id=label2id)
    assert Counter(rows["label"]) == {2: 3, 7: 2}
    assert rows.features["label"] == datasets.Value("int64")
    plain = load_split(tmp_path, "test")
    assert Counter(plain["label"]) == {0: 3, 1: 2} and class_names(plain) == ["cat", "dog"]
    assert len(load_split(tmp_path, "all", label2id=label2id)) == 35
    with pytest.raises(ValueError, match="1 classes of .* are unknown to the model, first 'dog'"):
        load_split(tmp_path, "test", label2id={"cat": 0})
    with pytest.raises(ValueError, match=r"split must be one of \['train', .*, 'all', 'unlabelled'\], got 'dev'"):
        load_split(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"half must be one of \['first', 'second'\], got 'third'"):
        load_split(tmp_path, "test", half="third")


def test_halves_are_fixed_and_share_no_image(tmp_path):
    write_classes(tmp_path / "train", {"cat": 6, "dog": 6})
    write_classes(tmp_path / "test", {"cat": 20, "dog": 10})
    label2id = {"cat": 0, "dog": 1}
    first, second = (load_split(tmp_path, "test", label2id=label2id, half=half) for half in ("first", "second"))
    assert Counter(first["label"]) == Counter(second["label"]) == {0: 10, 1: 5}
    paths = [{image["path"] for image in rows["image"]} for rows in (first, second)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 30
    assert paths[0] == {image["path"] for image in load_split(tmp_path, "test", half="first")["image"]}


def test_what_is_held_out_does_not_depend_on_how_a_model_numbers_classes(tmp_path):
    write_classes(tmp_path, {"ant": 20, "cat": 15, "dog": 10})
    splits = load_splits(tmp_path)
    label2id = {"dog": 0, "cat": 5, "ant": 3}
    for split in ("train", "validation", "test"):
        assert load_split(tmp_path, split, label2id=label2id)["image"][:] == splits[split]["image"][:]
    for half in ("first", "second"):
        renumbered = load_split(tmp_path, "train", label2id=label2id, half=half)
        assert renumbered["image"][:] == load_split(tmp_path, "train", half=half)["image"][:]
        assert renumbered["label"][:] == [label2id[Path(image["path"]).parent.name] for image in renumbered["image"]]


def test_a_class_that_is_unknown_to_the_model_matters_only_where_it_has_images(tmp_path):
    write_classes(tmp_path / "train", {"ant": 20, "cat": 20, "dog": 20})
    write_classes(tmp_path / "test", {"ant": 2, "dog": 2})
    assert len(load_split(tmp_path, "test", label2id={"ant": 0, "dog": 1})) == 4
    with pytest.raises(ValueError, match="1 classes of .* are unknown to the model, first 'cat'; it knows 2, such"):
        load_split(tmp_path, "validation", label2id={"ant": 0, "dog": 1})


def test_halves_of_classes_with_one_image(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 20})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match="the classes have too few images to hold out a first part of 50%"):
        load_split(tmp_path, "test", half="first")


# Images without labels


def test_a_folder_of_images_is_unlabelled(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png"):
        write_image(tmp_path / "phone" / name)
    (tmp_path / "phone" / "notes.txt").write_text("no image")
    write_image(tmp_path / "phone" / ".cache" / "c.png")
    assert data.default_split(tmp_path / "phone", "validation") == "unlabelled"
    rows = load_split(tmp_path / "phone", "unlabelled", label2id={"a": 0})
    assert rows.column_names == ["image"] and [Path(row["image"]["path"]).name for row in rows] == ["a.JPG", "b.png"]

    with pytest.raises(
        ValueError, match="split must be 'unlabelled' for .*phone, which has no class folders, got 'te"
    ):
        load_split(tmp_path / "phone", "test")
    with pytest.raises(ValueError, match="columns can be chosen for a Hub data set 'owner/name' only"):
        load_split(tmp_path / "phone", "unlabelled", label_column="family")
    with pytest.raises(ValueError, match=r"has no images in class folders \(CLASS/\*.jpg\)"):
        load_splits(tmp_path / "phone")


def test_folders_without_images_are_no_classes(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "exported" / "empty").mkdir(parents=True)
    (tmp_path / "exported" / "notes.txt").write_text("no image")
    write_image(tmp_path / "exported" / ".thumbnails" / "a.png")
    assert data.default_split(tmp_path, "test") == "unlabelled"
    assert len(load_split(tmp_path, "unlabelled")) == 1
    write_image(tmp_path / "exported" / "empty" / "b.png")
    assert data.default_split(tmp_path, "test") == "test"


@pytest.mark.parametrize("half", ["first", "second"])
def test_halves_without_labels_need_two_images(tmp_path, half):
    write_image(tmp_path / "0.png")
    with pytest.raises(ValueError, match=f"half='{half}' needs at least 2 images, and .* has 1"):
        load_split(tmp_path, "unlabelled", half=half)
    write_image(tmp_path / "1.png")
    assert len(load_split(tmp_path, "unlabelled", half=half)) == 1


def test_halves_without_labels_are_fixed_and_share_no_image(tmp_path):
    for number in range(7):
        write_image(tmp_path / f"{number}.png", noise(8, 8, seed=number))
    first, second = (
        [row["image"]["path"] for row in load_split(tmp_path, "unlabelled", half=half)] for half in ("first", "second")
    )
    assert len(first) == 4 and len(second) == 3 and not set(first) & set(second)
    again = load_split(tmp_path, "unlabelled", half="first")
    assert [row["image"]["path"] for row in again] == first == sorted(first)


@pytest.mark.parametrize("name", ["", "demo", "owner/name", "absent"])
def test_what_is_no_folder_of_images_is_labelled(name, tmp_path):
    assert data.default_split(name, "test") == "test"
    write_classes(tmp_path / "photos", {"a": 1, "b": 1})
    write_image(tmp_path / "photos" / "cover.png")  # beside class folders
    assert data.default_split(tmp_path / "photos", "test") == "test"


def test_of_any_folder_every_image_can_be_taken_without_labels(tmp_path):
    for name in ("0.png", "100A/1.png", "101A/2.png", "101A/deep/3.jpg", ".trash/4.png"):
        write_image(tmp_path / name)
    rows = load_split(tmp_path, "unlabelled", label2id={"cat": 0, "dog": 1})
    assert rows.column_names == ["image"]
    assert [Path(row["image"]["path"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.jpg"]
    write_classes(tmp_path / "more", {"100A": 12, "101A": 12})
    with pytest.raises(ValueError, match="unknown to the model, .* take the split 'unlabelled'"):
        load_split(tmp_path / "more", "validation", label2id={"cat": 0, "dog": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no images"):
        load_split(tmp_path / "empty", "unlabelled")
    for name in ("demo", "owner/name"):
        with pytest.raises(ValueError, match=f"split 'unlabelled' is for a folder of images, got '{name}'"):
            load_split(name, "unlabelled")
