# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The data set that a Trainer reads: samples, reproducible augmentation, and which images it says these are."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from modeling_mevit.data.identity import count_known, encode_digests, fingerprint
from modeling_mevit.data.image_dataset import DataSource, ImageClassificationDataset
from modeling_mevit.data.image_processing import evaluation_transform, image_processor_for, train_transform
from tests.helpers.images import noise, write_image


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.fixture
def rows(tmp_path) -> datasets.Dataset:
    for i in range(6):
        write_image(tmp_path / "a" / f"{i}.png", noise(20, 20, seed=i))
    images = [str(tmp_path / "a" / f"{i}.png") for i in range(6)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 0, 1, 2]})
    return rows.cast_column("image", datasets.Image(decode=False))


TRANSFORM = train_transform(image_processor_for(16, resize_size=64, **HALF), auto_augment="imagenet")


def epoch_of(loader: DataLoader, epoch: int) -> dict[int, torch.Tensor]:
    """Images of an epoch by their labels, which are all different here."""
    loader.dataset.set_epoch(epoch)
    return {int(label): pixels for batch in loader for pixels, label in zip(*batch.values(), strict=True)}


def test_sample(rows):
    processor = image_processor_for(16, **HALF)
    dataset = ImageClassificationDataset(rows, evaluation_transform(processor))
    assert len(dataset) == 6
    sample = dataset[4]
    assert set(sample) == {"pixel_values", "labels"} and sample["labels"] == 1 and dataset.has_labels
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
    dataset, other_seed = (ImageClassificationDataset(same, TRANSFORM, seed=seed) for seed in (0, 1))
    first = dataset[0]["pixel_values"]
    torch.rand(7)
    assert torch.equal(dataset[0]["pixel_values"], first)
    assert not torch.equal(dataset[1]["pixel_values"], first)
    assert not torch.equal(other_seed[0]["pixel_values"], first)
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0]["pixel_values"], first)
    dataset.set_epoch(0)
    assert torch.equal(dataset[0]["pixel_values"], first)


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
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
    with pytest.raises(ValueError, match="row 2 of the data set: cannot read the image .*2.png"):
        ImageClassificationDataset(rows, TRANSFORM, seed=0)[2]
    stored = [{"image": {"path": None, "bytes": b"text"}, "label": 0}]
    with pytest.raises(ValueError, match="row 0 of the data set: cannot read the image stored as bytes"):
        ImageClassificationDataset(stored, TRANSFORM)[0]


def test_banner_is_cut_off(rows):
    with_banner = rows.add_column("banner", [4] * 6)
    cut = ImageClassificationDataset(with_banner, lambda image: image)[1]["pixel_values"]
    assert cut.tobytes() == noise(20, 20, seed=1).crop((0, 0, 20, 16)).tobytes()


# Images for a trained model


LABEL2ID = {"dog": 7, "cat": 2}


@pytest.fixture
def pets(tmp_path) -> Path:
    for split, sizes in {"train": {"cat": 6, "dog": 6}, "test": {"cat": 4, "dog": 2}}.items():
        for name, size in sizes.items():
            for number in range(size):
                image = noise(8, 8, seed=[len(split), LABEL2ID[name], number])
                write_image(tmp_path / "pets" / split / name / f"{number}.png", image)
    return tmp_path / "pets"


def test_a_source_loads_what_a_model_sees(pets):
    processor = image_processor_for(4, **HALF)
    dataset = DataSource(pets, half="second").load(LABEL2ID, processor)
    assert [sample["labels"] for sample in dataset] == [2, 2, 7]
    for index, row in enumerate(dataset.rows):
        with Image.open(row["image"]["path"]) as image:
            expected = evaluation_transform(processor)(image)
        assert torch.equal(dataset[index]["pixel_values"], expected)
    with pytest.raises(ValueError, match="split must be one of .*, got 'dev'"):
        DataSource(pets, "dev").load(LABEL2ID, processor)
    with pytest.raises(ValueError, match="label_column='species'"):
        DataSource(pets, label_column="species").load(LABEL2ID, processor)


def test_which_images_are_described_without_decoding_them(pets, monkeypatch):
    processor = image_processor_for(4, **HALF)
    dataset = DataSource(str(pets), "test", half="first").load(LABEL2ID, processor)
    assert ImageClassificationDataset(dataset.rows, evaluation_transform(processor)).describe() is None

    reads = Counter()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.update([path]) or read_bytes(path))
    monkeypatch.setattr(Image, "open", lambda *arguments: pytest.fail("an image was decoded"))
    described = dataset.describe()
    assert described == dataset.describe()
    assert len(reads) == 3 and set(reads.values()) == {1}
    assert described == {
        "name": "pets",
        "split": "test",
        "half": "first",
        "sha256": fingerprint(dataset.image_hashes, [2, 2, 7]),
        "image_digests": encode_digests(dataset.image_hashes),
    }
    assert json.loads(json.dumps(described)) == described

    all_images = DataSource(pets, "all").load(LABEL2ID, processor)
    assert count_known(all_images.image_hashes, described["image_digests"]) == 3
    assert all_images.describe()["sha256"] != described["sha256"]


def test_images_without_labels(tmp_path):
    for number in range(3):
        write_image(tmp_path / "phone" / f"{number}.png", noise(20, 20, seed=number))
    dataset = DataSource(tmp_path / "phone", "unlabelled").load({"a": 0}, image_processor_for(16, **HALF))
    assert len(dataset) == 3 and set(dataset[1]) == {"pixel_values"} and not dataset.has_labels
    described = dataset.describe()
    assert (described["name"], described["split"]) == ("phone", "unlabelled")
    assert described["sha256"] == fingerprint(dataset.image_hashes[::-1], None)
    assert described["sha256"] != fingerprint(dataset.image_hashes, [0, 0, 0])
    assert count_known(dataset.image_hashes, described["image_digests"]) == 3
