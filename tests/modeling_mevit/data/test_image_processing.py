# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading of images, transforms, and the image processor that is saved with a model."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, pipeline

from modeling_mevit.data.image_processing import (
    denormalize,
    evaluation_transform,
    image_processor_for,
    read_image,
    train_transform,
)
from tests.helpers.images import noise, write_image


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
UNCHANGED = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("L", "a.jpg"), ("LA", "a.png"), ("RGBA", "a.png"), ("P", "a.gif"), ("1", "a.png")],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, name):
    path = write_image(tmp_path / name, noise().convert(mode))
    from_path = read_image(path)
    from_bytes = read_image(path.read_bytes())
    assert from_path.mode == "RGB" and from_path.size == (48, 40)
    assert np.array_equal(np.asarray(from_path), np.asarray(Image.open(path).convert("RGB")))
    assert np.array_equal(np.asarray(from_path), np.asarray(from_bytes))


def test_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the image has to be turned by 90 degrees, clockwise
    noise().save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(np.asarray(noise()), k=-1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), upright)
    without_banner = read_image(str(tmp_path / "a.png"), banner=5)
    assert np.array_equal(np.asarray(without_banner), upright[:-5])


def test_image_that_cannot_be_read(tmp_path):
    path = write_image(tmp_path / "cut.jpg", noise(200, 200))
    path.write_bytes(path.read_bytes()[:5000])
    Image.open(path).close()  # its header is whole
    with pytest.raises(ValueError, match=f"cannot read the image {path}: .*truncated"):
        read_image(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=f"cannot read the image {path}: "):
        read_image(path)
    path.unlink()
    with pytest.raises(ValueError, match=f"cannot read the image {path}: "):
        read_image(path)
    with pytest.raises(ValueError, match="cannot read the image stored as bytes: "):
        read_image(b"text")


@pytest.mark.parametrize(
    ("name", "type_", "turned"),
    [("a.png", "<u2", False), ("a.png", "<u2", True), ("a.tif", "<u2", False), ("a.tif", "<u2", True)]
    + [("a.tif", ">u2", False), ("a.tif", "<i4", False), ("a.tif", "<i4", True)],
)
def test_grey_values_of_16_bits_are_scaled_to_8(tmp_path, name, type_, turned):
    values = np.random.default_rng(0).integers(0, 65536, (40, 48)).astype(type_)
    values[0, :3] = [0, 128, 65535]
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    compression = {"compression": "tiff_lzw"} if turned else {}  # Pillow 13 scrambles turned TIFFs without it
    Image.fromarray(values).save(tmp_path / name, exif=exif, **compression)
    expected = np.round(values / 257).astype(np.uint8)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([np.rot90(expected, k=-1) if turned else expected] * 3, axis=-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[0.5, 1]]), "must have 8 or 16 bits per channel, got a floating-point image"),
        (np.int32([[0, 65536]]), "must have 8 or 16 bits per channel, got values from 0 to 65536"),
        (np.int32([[-1, 5]]), "must have 8 or 16 bits per channel, got values from -1 to 5"),
    ],
)
def test_images_of_other_numbers_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"cannot read the image {tmp_path / 'a.tif'}: images {message}"):
        read_image(tmp_path / "a.tif")


# Transforms


@pytest.mark.parametrize("height", [1, 3])
def test_a_flat_image_is_not_taken_for_one_with_channels_first(height):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, 60, 3), dtype=np.uint8))
    processor = image_processor_for(16, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], resize_size=20)
    resized = np.asarray(image.resize((20, 20), Image.Resampling.BILINEAR))[2:18, 2:18] / 255
    expected = (resized - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    assert np.allclose(evaluation_transform(processor)(image).permute(1, 2, 0).numpy(), expected, atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "resized"),
    [
        ({"image_size": 448}, (600, 600)),
        ({"image_size": 112}, (150, 150)),
        ({"image_size": (112, 56)}, (150, 75)),
        ({"image_size": 112, "resize_size": 128}, (128, 128)),
        ({"image_size": (96, 112), "resize_size": (96, 128)}, (96, 128)),
    ],
)
def test_resized_sides(arguments, resized):
    processor = image_processor_for(**arguments, **HALF)
    assert (processor.size["height"], processor.size["width"]) == resized
    size = arguments["image_size"]
    shape = (3, size, size) if isinstance(size, int) else (3, *size)
    training = (train_transform(processor, policy) for policy in (None, "imagenet", "ta_wide"))
    for transform in (evaluation_transform(processor), *training):
        pixels = transform(noise())
        assert pixels.shape == shape and pixels.dtype == torch.float32 and type(pixels) is torch.Tensor


def test_crop_larger_than_the_resized_image():
    with pytest.raises(
        ValueError, match=r"resize_size must be at least image_size, \(112, 112\), .* got \(100, 120\)"
    ):
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


def test_crops_keep_a_random_share_of_the_area():
    side = np.linspace(0, 255, 128).round()
    image = Image.fromarray(np.stack([*np.meshgrid(side, side), np.zeros((128, 128))], axis=-1).astype(np.uint8))
    transform = train_transform(image_processor_for(32, **UNCHANGED), min_crop_area=0.35)
    torch.manual_seed(0)
    pixels = torch.stack([transform(image) for _ in range(100)])  # red tells the column, green the row
    assert pixels.shape == (100, 3, 32, 32)
    width, height = pixels[:, :2].amax((-2, -1)).sub(pixels[:, :2].amin((-2, -1))).unbind(-1)
    areas, ratios = width * height, width / height
    assert areas.min() == pytest.approx(0.35, abs=0.06) and areas.max() > 0.9  # means of 4 pixels reach no edge
    assert ratios.min() < 0.85 and ratios.max() > 1.18
    flipped = pixels[:, 0, 0, 0] > pixels[:, 0, 0, -1]
    assert 30 < flipped.sum() < 70


@pytest.mark.parametrize("area", [0.0, 1.5, -0.1])
def test_a_crop_keeps_some_of_the_image(area):
    with pytest.raises(ValueError, match=f"min_crop_area must be above 0 and at most 1, got {area}"):
        train_transform(image_processor_for(16, **UNCHANGED), min_crop_area=area)


@pytest.mark.parametrize("policy", ["imagenet", "ta_wide"])
def test_auto_augment_changes_more_than_crop_and_flip(policy):
    flat = Image.new("RGB", (40, 40), (200, 100, 50))
    processor = image_processor_for(16, **UNCHANGED)
    expected = torch.tensor([200, 100, 50])[:, None, None].expand(3, 16, 16) / 255
    torch.manual_seed(0)
    plain, augmented = train_transform(processor), train_transform(processor, policy)
    assert all(torch.allclose(plain(flat), expected) for _ in range(10))
    assert not all(torch.allclose(augmented(flat), expected, atol=0.05) for _ in range(10))


def test_auto_augment_has_no_other_policies():
    with pytest.raises(ValueError, match="auto_augment must be one of imagenet, ta_wide, got 'augmix'"):
        train_transform(image_processor_for(16, **UNCHANGED), "augmix")


def test_saved_processor_is_the_test_transform(tmp_path):
    """The processor loads back by Auto class, and a pipeline sees what the evaluation saw, file by file.

    Whatever Auto class loads, evaluation is on Pillow; a pipeline has to be given it.
    """
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
    on_pillow = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    assert type(on_pillow) is type(processor)
    settings = {"top_k": None, "function_to_apply": "none", "image_processor": on_pillow}
    classify = pipeline("image-classification", model=str(tmp_path / "model"), **settings)
    exif = Image.Exif()
    exif[0x0112] = 8
    noise(60, 90).save(tmp_path / "turned.jpg", exif=exif)
    write_image(tmp_path / "transparent.png", noise(33, 57).convert("RGBA"))
    for name in ("turned.jpg", "transparent.png"):
        image = read_image(tmp_path / name)
        pixels = evaluation_transform(processor)(image)
        assert torch.equal(pixels, evaluation_transform(loaded)(image))
        logits = model(pixels[None]).logits[0].tolist()
        answers = {answer["label"]: answer["score"] for answer in classify(str(tmp_path / name))}
        assert [answers[config.id2label[i]] for i in range(5)] == pytest.approx(logits, abs=1e-5)


def test_what_the_model_saw_can_be_looked_at(tmp_path):
    processor = image_processor_for(8, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4], resize_size=8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    seen = denormalize(evaluation_transform(processor)(image)[None], processor)
    np.testing.assert_allclose(seen[0], np.asarray(image) / 255, atol=1e-6)


WITHOUT_EXTRAS = """
import sys

for name in ("torchvision", "datasets", "scipy", "sklearn", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed

from transformers import AutoImageProcessor
from modeling_mevit.data.image_dataset import ImageClassificationDataset
from modeling_mevit.data.image_processing import evaluation_transform, image_processor_for, train_transform

path, output = sys.argv[1:]
image_processor_for(12, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4]).save_pretrained(output)
rows = [{"image": {"path": path, "bytes": None}, "label": 3}]
images = ImageClassificationDataset(rows, evaluation_transform(AutoImageProcessor.from_pretrained(output)))
images[0]["pixel_values"].numpy().tofile(output + "/pixel_values")
try:
    train_transform(None)
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_core_packages_are_enough_to_read_what_a_model_sees(tmp_path):
    path = write_image(tmp_path / "a.png", noise())
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "torchvision" in done.stdout  # what training lacks is named
    processor = image_processor_for(12, image_mean=[0.1, 0.5, 0.9], image_std=[0.2, 0.3, 0.4])
    expected = evaluation_transform(processor)(noise()).numpy()
    seen = np.fromfile(tmp_path / "pixel_values", dtype=np.float32).reshape(3, 12, 12)
    np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-6)
