# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The runtime in JavaScript does what the one in Python does, on the same inputs. It runs in Node."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from modeling_mevit.data.demo import demo_images
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.onnx.export import export
from tests.helpers.images import noise
from tests.helpers.models import thirds_as_thresholds, tiny_model


POLICIES = ("uncertainty", "confidence", "entropy", "margin", "patience")
FILTERS = [Image.Resampling(number) for number in range(6)]
# height and width of what an image is resized to: smaller, larger, each on one side, and as it is
SIZES = [(54, 54), (150, 170), (20, 300), (131, 97), (7, 5), (40, 90)]


def rgba(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").convert("RGBA"))


def check_resized(images, sizes, resample, given) -> None:
    """Equal to Pillow 13's, pass by pass, whatever version is installed."""
    for image, (height, width), resized in zip(images, sizes, given, strict=True):
        lost = image.height - height
        columns_first = lost > 0 and lost > 2 * (image.width - width)
        between = (image.width, height) if columns_first else (width, image.height)
        once = image if resample == Image.Resampling.NEAREST else image.resize(between, resample=resample)
        expected = np.asarray(once.resize((width, height), resample=resample))
        np.testing.assert_array_equal(resized, expected)
        if int(PIL.__version__.partition(".")[0]) >= 13:
            np.testing.assert_array_equal(expected, np.asarray(image.resize((width, height), resample=resample)))


def gradients() -> Image.Image:
    """Smooth, with sharp edges of black and white, where filters overshoot."""
    row, column = np.mgrid[0:131, 0:97]
    pixels = np.stack([row * 255 / 130, column * 255 / 96, 255.0 * ((row // 9 + column // 7) % 2)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    return [gradients(), noise(131, 97), noise(64, 300, 1), *demo_images(1, seed=7)[0][:3]]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    shared = os.environ.get("MEVIT_SHARED")
    files = sorted(Path(shared or "nowhere", "data/grocery_store").rglob("*.jpg"))
    if not files:
        pytest.skip("MEVIT_SHARED names no folder with photos of the Grocery Store data set")
    return [Image.open(file).convert("RGB") for file in files[:: len(files) // 8][:8]]


@pytest.mark.parametrize("resample", FILTERS, ids=lambda filter: filter.name)
def test_images_are_resized_as_pillow_does(javascript, drawn, resample):
    images, sizes = zip(*((image, size) for image in drawn for size in SIZES), strict=True)
    given = javascript("resize", images=[rgba(image) for image in images], sizes=sizes, resample=int(resample))
    check_resized(images, sizes, resample, given)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC], ids=lambda one: one.name)
def test_photos_are_resized_as_pillow_does(javascript, photos, resample):
    sizes = [(150, 150), (600, 600)] * 4
    given = javascript("resize", images=[rgba(photo) for photo in photos], sizes=sizes, resample=int(resample))
    check_resized(photos, sizes, resample, given)
    for photo, (height, width), resized in zip(photos, sizes, given, strict=True):
        at_once = np.asarray(photo.resize((width, height), resample=resample))
        assert np.abs(resized - at_once.astype(int)).mean() < 0.1  # grey levels


def test_a_large_image_is_resized_strip_by_strip(javascript):
    images, sizes = [noise(5000, 1000), noise(1000, 5000)], [(9, 990), (990, 9)]
    given = javascript("resize", images=[rgba(image) for image in images], sizes=sizes, resample=2)
    check_resized(images, sizes, Image.Resampling.BILINEAR, given)


def test_images_are_prepared_as_by_the_python_runtime(javascript, exported, drawn):
    given = javascript("preprocess", directory=exported, images=[rgba(image) for image in drawn])
    np.testing.assert_allclose(given, Cascade(exported).preprocess(drawn), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},  # crops what is there, and adds black where there is less
        {"do_center_crop": False, "size": {"height": 16, "width": 16}},
        {"do_normalize": False, "resample": 3},
        {"do_rescale": False},
    ],
)
def test_settings_of_the_image_processor_count(javascript, exported, drawn, tmp_path, settings):
    copied = shutil.copytree(exported, tmp_path / "copied")
    change(copied / "preprocessor_config.json", **settings)
    images = [*drawn, noise(9, 21)]
    given = javascript("preprocess", directory=copied, images=[rgba(image) for image in images])
    np.testing.assert_allclose(given, Cascade(copied).preprocess(images), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module", params=[*POLICIES, "uncertainty mean", "patience mean", "neighbours"])
def cascades(request, tmp_path_factory, processor) -> tuple[Path, list[float]]:
    """An export under each policy, with thresholds under which some images leave at each exit."""
    policy, _, combination = request.param.partition(" ")
    settings: dict[str, Any] = {"exit_policy": policy, "exit_combination": combination or "none"}
    if request.param == "neighbours":  # exits on every layer, so that some stages have no layer of their own
        settings = {"exit_layers": [1, 2, 3, 4]}
    images = pixel_values(12)
    for seed in range(20):  # labels of neighbouring exits agree on none or on all images of some models
        model = tiny_model(seed, **settings)
        # the scores of patience are few, and none is between these
        thresholds = [0.5, 0.5] if policy == "patience" else thirds_as_thresholds(model, images)
        model.config.exit_thresholds, model.config.early_exit = thresholds, True
        with torch.no_grad():
            if len(set(model(images).exit_layer.tolist())) > 1:
                break
    output = tmp_path_factory.mktemp("cascade") / "out"
    export(model, processor, output, exits=[4], cascade=True)
    return output, thresholds


def pixel_values(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def test_images_leave_where_they_do_in_python(javascript, cascades):
    directory, thresholds = cascades
    images = pixel_values(12).numpy()
    options = [{}, {"earlyExit": False}, {"exitThresholds": 0.5}, {"exitThresholds": [10.0] * len(thresholds)}]
    given = javascript("run", directory=directory, pixelValues=images, options=options)
    cascade = Cascade(directory)
    expected = [
        cascade(images),
        cascade(images, early_exit=False),
        cascade(images, exit_thresholds=0.5),
        cascade(images, exit_thresholds=[10.0] * len(thresholds)),
    ]
    assert len(set(expected[0].exit_layer.tolist())) > 1  # so that the test can fail
    for ours, theirs in zip(given["outputs"], expected, strict=True):
        assert ours["exitLayer"] == theirs.exit_layer.tolist()
        assert ours["borderline"] == theirs.borderline.tolist()
        np.testing.assert_allclose(ours["logits"], theirs.logits, atol=1e-5)
    logits, scores = cascade.every_exit(images)
    np.testing.assert_allclose(given["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(given["scores"], scores, atol=1e-5)
    assert given["labels"] == cascade.labels


def test_later_stages_run_on_the_images_that_go_on(javascript, exported):
    images = pixel_values(8).numpy()
    _, scores = Cascade(exported).every_exit(images)
    first = float(np.sort(scores[:, 0])[2:4].mean())
    second = float(np.sort(scores[scores[:, 0] >= first, 1])[1:3].mean())
    (output,) = javascript(
        "run", directory=exported, pixelValues=images, options=[{"exitThresholds": [first, second]}]
    )["outputs"]
    after = [8, sum(layer > 2 for layer in output["exitLayer"]), sum(layer > 3 for layer in output["exitLayer"])]
    assert 8 > after[1] > after[2] > 0
    # [CLS] of all that come, the other tokens of those that go on
    expected = []
    for place, count in enumerate(after):
        expected += [[place, "stage", count], [place, "query", count]]
        expected += [[place, "query", going_on] for going_on in after[place + 1 : place + 2]]
    assert output["fed"] == expected


def test_an_exit_where_nobody_can_leave_is_not_asked(javascript, exported):
    images = pixel_values(8).numpy()
    cascade = Cascade(exported)
    second = float(np.sort(cascade.every_exit(images)[1][:, 1])[3:5].mean())
    options = [{"exitThresholds": [0.0, second]}, {"earlyExit": False}]
    some, none = javascript("run", directory=exported, pixelValues=images, options=options)["outputs"]
    expected = cascade(images, early_exit=True, exit_thresholds=[0.0, second])
    assert some["exitLayer"] == expected.exit_layer.tolist() and set(some["exitLayer"]) == {3, 4}
    np.testing.assert_allclose(some["exitScore"], expected.exit_score, atol=1e-5)
    np.testing.assert_allclose(some["logits"], expected.logits, atol=1e-5)
    np.testing.assert_allclose(none["logits"], cascade(images, early_exit=False).logits, atol=1e-5)
    stay = some["exitLayer"].count(4)
    first, last = [[0, "stage", 8], [0, "query", 8]], [2, "stage", 8]
    assert some["fed"] == [*first, [1, "stage", 8], [1, "query", 8], [1, "query", stay]] + [
        [2, kind, stay] for kind in ("stage", "query")
    ]
    assert none["fed"] == [*first, [1, "stage", 8], [1, "query", 8], last, [2, "query", 8]]


def test_images_near_a_threshold_are_told(javascript, exported):
    images = pixel_values(8).numpy()
    _, scores = Cascade(exported).every_exit(images)
    near = int(np.argsort(scores[:, 0])[4])
    options = [{"exitThresholds": [float(scores[near, 0]) - 5e-5, 0.0]}, {"earlyExit": False}]
    some, none = javascript("run", directory=exported, pixelValues=images, options=options)["outputs"]
    assert np.flatnonzero(some["borderline"]).tolist() == [near]
    assert not any(none["borderline"])


def test_no_images_give_no_logits(javascript, exported):
    (output,) = javascript("run", directory=exported, pixelValues=np.zeros((0, 3, 16, 16), np.float32))["outputs"]
    assert output["logits"].shape == (0, 5) and output["exitLayer"] == []


def test_an_exit_that_is_not_finite_is_never_sure(javascript, cascades):
    directory, thresholds = cascades
    images = pixel_values(3).numpy()
    images[1] = np.nan
    (output,) = javascript(
        "run", directory=directory, pixelValues=images, options=[{"exitThresholds": [10.0] * len(thresholds)}]
    )["outputs"]
    expected = Cascade(directory)(images, exit_thresholds=[10.0] * len(thresholds))
    assert output["exitLayer"] == expected.exit_layer.tolist()
    assert output["exitLayer"][1] == 4 and min(output["exitLayer"]) < 4


@pytest.mark.parametrize(
    ("shift", "shifted", "delays", "fails", "provider"),
    [
        (0.0, "logits", {"webgpu": 0, "wasm": 20}, False, "webgpu"),
        (0.0, "logits", {"webgpu": 20, "wasm": 0}, False, "wasm"),  # the same, but slower
        (0.1, "logits", {"webgpu": 0, "wasm": 20}, False, "wasm"),  # other answers
        (0.002, "score", {"webgpu": 0, "wasm": 20}, False, "wasm"),  # other scores, by which images would leave
        (0.0, "logits", {"webgpu": 0, "wasm": 20}, True, "wasm"),
    ],
)
def test_webgpu_is_taken_where_it_gives_the_same_answers_faster(
    javascript, exported, shift, shifted, delays, fails, provider
):
    given = javascript("fastest", directory=exported, shift=shift, shifted=shifted, delays=delays, fails=fails)
    assert given["provider"] == provider
    assert given["released"] == ([] if fails else [{"webgpu": "wasm", "wasm": "webgpu"}[provider]])


# An export is data from anyone


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_what_is_wrong_with_an_export_is_named(javascript, exported, tmp_path):
    stages = json.loads((exported / "cascade.json").read_text())["stages"]
    older = [{name: value for name, value in stage.items() if name != "query"} for stage in stages]
    fields: list[tuple[str, dict[str, Any], str]] = [
        ("cascade", {"stages": older}, "older version; export the checkpoint again with `mevit export`"),
        ("cascade", {"stages": None}, "stages in cascade.json must be 1 to 1000 objects, got null"),
        ("cascade", {"stages": []}, "stages in cascade.json must be 1 to 1000 objects"),
        ("cascade", {"stages": stages[:1] * 2}, "the exit layers in cascade.json must be in ascending order"),
        ("cascade", {"stages": [{**stages[0], "exit_layer": 1e9}]}, "exit_layer in cascade.json must be a layer"),
        *(
            ("cascade", {"stages": [{**stages[0], "stage": name}, *stages[1:]]}, "the name of a file in cascade.json")
            for name in ("../stage_2.onnx", "/tmp/a.onnx", "a\\b.onnx", "..", "", "C:x", "x\n", "a%2fb", 3)
        ),
        ("config", {"image_size": 10**9}, "image_size in config.json must be one number or two from 1 to 4096"),
        ("config", {"image_size": 17}, "the image processor's images must be of [17,17], which the model needs"),
        ("config", {"num_channels": 1}, "num_channels in config.json must be 3, as images in a browser have, got 1"),
        ("config", {"early_exit": "yes"}, 'early_exit in config.json must be true or false, got "yes"'),
        ("config", {"exit_policy": "margin"}, 'exit_policy in config.json must be that of the graphs, "uncertainty"'),
        ("config", {"exit_layers": [1, 3, 4]}, "exit_layers in config.json must be those of the graphs, [2,3,4]"),
        ("config", {"exit_thresholds": [0.5]}, "exit_thresholds in config.json must be null, one number or 2, got"),
        ("config", {"exit_thresholds": 1e39}, "exit_thresholds in config.json must be null"),
        ("config", {"exit_combination": "mean"}, 'exit_combination in config.json must be "none", which the graphs'),
        ("config", {"id2label": {"0": "a"}}, "id2label in config.json must be of as many labels as the logits"),
        ("config", {"id2label": {"1": "a"}}, "id2label in config.json must be names of the labels 0, 1, and so on"),
        ("preprocessor_config", {"size": {"shortest_edge": 20}}, "the image processor's size must be height and wid"),
        (
            "preprocessor_config",
            {"crop_size": {"height": 0, "width": 16}},
            "crop_size must be of sides from 1 to 4096",
        ),
        ("preprocessor_config", {"resample": 6}, "the image processor's resample must be a number from 0 to 5, got 6"),
        ("preprocessor_config", {"image_std": [0.1, 0.1, 0]}, "image_std must be 3 numbers above 0"),
        ("preprocessor_config", {"rescale_factor": "1"}, "rescale_factor must be a number"),
    ]
    directories, expected = [], []
    for number, (name, changed, message) in enumerate(fields):
        directories.append(shutil.copytree(exported, tmp_path / str(number), ignore=shutil.ignore_patterns("e*.onnx")))
        change(directories[-1] / f"{name}.json", **changed)
        expected.append(message)
    for number, (name, content, message) in enumerate(
        [
            (
                "stage_3.onnx",
                (exported / "stage_3.onnx").read_bytes()[:1000],
                "stage_3.onnx cannot be opened, it may be damaged: ",
            ),
            ("stage_3.onnx", None, "stage_3.onnx is missing"),
            ("config.json", b"{", "config.json must be JSON: "),
            ("config.json", b"\xff\xfe", "config.json must be JSON: "),
            ("cascade.json", b"[]", "cascade.json must be a JSON object, got []"),
            ("query_3.onnx", b"a lolocation", "query_3.onnx must hold its weights itself"),
        ]
    ):
        directories.append(shutil.copytree(exported, tmp_path / f"file{number}"))
        (directories[-1] / name).unlink()
        if content is not None:
            (directories[-1] / name).write_bytes(content)
        expected.append(message)
    for found, message in zip(javascript("messages", directories=directories), expected, strict=True):
        assert message in str(found) and "\n" not in found


def test_what_is_wrong_with_a_call_is_named(javascript, exported):
    image = np.zeros((1, 3, 16, 16), np.float32)
    calls = [
        ({"exitThresholds": [0.5]}, image, "exitThresholds must be one number or 2, got [0.5]"),
        ({"exitThresholds": [0.5, "a"]}, image, "exitThresholds must be numbers"),
        ({"earlyExit": False, "exitThresholds": 0.5}, image, "exitThresholds need earlyExit: true"),
        ({}, image[:, :, :8], "pixelValues must have shape (B, 3, 16, 16), got (1, 3, 8, 16)"),
        ({}, image[0], "pixelValues must have shape (B, 3, 16, 16), got (3, 16, 16)"),
        ({}, image.astype(np.uint8), "pixelValues must have data of a Float32Array"),
        ({}, image, None),
    ]
    found = javascript(
        "messages",
        directories=[exported] * len(calls),
        calls=[{"options": options, "pixelValues": images} for options, images, _ in calls],
    )
    for message, (_, _, expected) in zip(found, calls, strict=True):
        assert message is None if expected is None else expected in message
