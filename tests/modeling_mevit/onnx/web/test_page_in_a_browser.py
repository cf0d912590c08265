# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The page of an export, in a real browser: what a visitor does, and what goes wrong."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mevit.data.demo import demo_images
from modeling_mevit.early_exit.calibration import CalibrationTarget, calibrate
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.onnx.export import export
from modeling_mevit.onnx.onnxruntime_web import read_onnxruntime_web
from modeling_mevit.onnx.page import WebPage
from modeling_mevit.onnx.quantize import Quantization
from modeling_mevit.onnx.serve import PageHandler, page_server
from tests.helpers.images import noise
from tests.helpers.models import tiny_model
from tests.modeling_mevit.onnx.web.conftest import missing


try:
    from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
except ImportError:
    sync_playwright = None

FAKE_CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
PATIENCE = 120_000  # ms
LABELS = {number: f"<b>species {number}</b>" for number in range(5)}  # a label is text, whatever it says


class Samples:
    """Images with labels, in memory."""

    def __init__(self, pixel_values, labels):
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": int(self.labels[index])}


@pytest.fixture(scope="module")  # while it lasts an event loop runs in this thread; tests of other files run theirs
def browser() -> Iterator["Browser"]:
    if sync_playwright is None:
        missing("the Python package playwright is not installed")
    from browser import ARGUMENTS, CHROMIUM  # it needs playwright

    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        missing("no Chromium is installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, headless=True, args=[*ARGUMENTS, *FAKE_CAMERA])
        yield started
        started.close()


@pytest.fixture(scope="session")
def drawn() -> list[Image.Image]:
    return [*demo_images(1, seed=3)[0][:4], *(noise(40, 56, seed) for seed in range(4))]


@pytest.fixture(scope="session")
def exported_page(tmp_path_factory, processor, ort_dir, drawn) -> Path:
    """An export in int8 and float32 of a model that is certified, with a page; not to be changed."""
    images, others = (
        processor(some, return_tensors="pt")["pixel_values"] for some in (drawn, demo_images(5, seed=4)[0])
    )
    for seed in range(20):  # until not all of the images that the page is given leave at one exit
        model = tiny_model(seed, id2label=LABELS, label2id={name: number for number, name in LABELS.items()})
        with torch.no_grad():
            labels = model(torch.cat((others, images)), early_exit=False).logits.argmax(-1)
        samples = Samples(torch.cat((others, images)), labels)
        result = calibrate(model, samples, CalibrationTarget(max_disagreement=0.1, confidence=0.8))
        result.apply_to(model.config)
        with torch.no_grad():
            if model.config.early_exit and len(set(model(images).exit_layer.tolist())) > 1:
                break
    assert result.operating_point is not None
    output = tmp_path_factory.mktemp("page") / "out"
    page = WebPage("Trees", read_onnxruntime_web(ort_dir), examples=[("one", drawn[0]), ("two", drawn[1])])
    quantization = Quantization("int8", calibration=samples, training=samples, target="avx2")
    export(model, processor, output, exits=[4], cascade=True, quantization=quantization, page=page)
    return output


@pytest.fixture
def copied(exported_page, tmp_path) -> Path:
    """A copy of the page, which a test may damage."""
    return shutil.copytree(exported_page, tmp_path / "copied")


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves a directory, and gives its address."""
    servers = []

    def start(directory: Path, handler: type[PageHandler] = PageHandler) -> str:
        server = page_server(directory, handler=handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://localhost:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def context(browser) -> Iterator["BrowserContext"]:
    """A browser's profile of its own. No page of it may fail, write an error or ask another host."""
    opened = browser.new_context(viewport={"width": 1100, "height": 900})
    troubles, hosts = [], set()
    opened.on("weberror", lambda error: troubles.append(str(error.error)))
    opened.on("request", lambda request: hosts.add(re.sub(r":\d+/.*", "", request.url)))
    yield opened
    opened.close()
    assert not troubles
    assert hosts <= {"http://localhost", "blob:http://localhost"}


@pytest.fixture
def opened(context, serve, exported_page) -> "Page":
    return ready(context.new_page(), serve(exported_page))


def ready(page: "Page", address: str) -> "Page":
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE)
    return page


def png(image: Image.Image, folder: Path, name: str) -> Path:
    file = folder / name
    image.save(file)
    return file


def give(page: "Page", *files: Path) -> None:
    """Chooses files, and waits until each has an answer."""
    count = page.locator(".result").count() + len(files)
    page.set_input_files("#files", [str(file) for file in files])
    expect(page.locator(".result")).to_have_count(count, timeout=PATIENCE)
    expect(page.locator(".result.waiting")).to_have_count(0, timeout=PATIENCE)


def answers(page: "Page") -> list[tuple[str, str, int]]:
    """Label, probability and exit of each result, the first given first."""
    found = []
    for result in reversed(page.locator(".result").all()):
        exit_layer = result.locator(".drawing text.taken").text_content()
        number = result.locator(".probability .number").text_content()
        found.append((result.locator(".label").text_content(), number, int(exit_layer)))
    return found


def expected_answers(cascade: Cascade, images: list[Image.Image], **options) -> list[tuple[str, str, int]]:
    output = cascade(cascade.preprocess(images), **options)
    assert not output.borderline.any()
    probabilities = np.exp(output.logits - output.logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    return [
        (cascade.labels[row.argmax()], f"{100 * row.max():.1f}%", layer)
        for row, layer in zip(probabilities, output.exit_layer.tolist(), strict=True)
    ]


def close(given: list[tuple[str, str, int]], expected: list[tuple[str, str, int]]) -> bool:
    """The same labels and exits, and probabilities that differ by rounding only."""
    percent = [[float(number.rstrip("%")) for _, number, _ in all_] for all_ in (given, expected)]
    same = [(label, layer) for label, _, layer in given] == [(label, layer) for label, _, layer in expected]
    return same and np.abs(np.subtract(*percent)).max() <= 0.11


def test_images_are_classified_as_by_the_python_runtime(opened, exported_page, drawn, tmp_path):
    files = [png(image, tmp_path, f"{number}.png") for number, image in enumerate(drawn)]
    give(opened, *files[:3])
    give(opened, *files[3:])
    expected = expected_answers(Cascade(exported_page / "float32"), drawn)
    assert len({layer for _, _, layer in expected}) > 1
    assert close(answers(opened), expected)
    assert opened.locator(".result .full .number").first.text_content().endswith("ms")
    early = opened.locator(".result .early:visible .number")
    assert re.fullmatch(r"[\d.]+ ms · [\d.]+×", early.first.text_content())
    costs = {
        stage["exit_layer"]: stage["cost"]
        for stage in json.loads((exported_page / "cascade.json").read_text())["stages"]
    }
    mean = np.mean([costs[layer] for _, _, layer in expected])
    assert f"8 images: mean cost {mean:.2f} of the plain ViT" in opened.locator("#summary").text_content()
    # what each exit says can be unfolded, by keyboard and on a phone too
    first = opened.locator(".result").first
    assert first.locator("svg title").first.text_content().startswith("Left at exit ")
    first.get_by_text("Every exit").click()
    said = first.locator(".exits li:visible").all_text_contents()
    assert [line.partition(":")[0] for line in said] == ["Exit 2", "Exit 3", "Exit 4"]
    assert "; score " in said[0] and ", threshold " in said[0] and "threshold" not in said[2]


def test_int8_by_choice(opened, exported_page, drawn, tmp_path):
    give(opened, png(drawn[0], tmp_path, "0.png"))
    opened.locator("#precision").get_by_text("int8").click()
    expect(opened.locator("#status")).to_contain_text("Ready", timeout=PATIENCE)
    expect(opened.locator(".result.waiting")).to_have_count(0, timeout=PATIENCE)
    give(opened, *(png(image, tmp_path, f"{number}.png") for number, image in enumerate(drawn[1:], start=1)))
    assert close(answers(opened), expected_answers(Cascade(exported_page), drawn))


def test_the_slider_moves_the_thresholds_and_the_promise_goes(opened, exported_page, drawn, tmp_path):
    cascade = Cascade(exported_page / "float32")
    give(opened, *(png(image, tmp_path, f"{number}.png") for number, image in enumerate(drawn)))
    promise, slider = opened.locator("#promise"), opened.locator("#stop")
    expect(promise).to_contain_text("Promised with probability 80%: early exit gives at most 10.00% of images another")
    calibrated = slider.input_value()
    at_calibrated = answers(opened)

    slider.press("End")  # the keyboard moves it
    expect(promise).to_contain_text("The promise is gone")
    assert close(answers(opened), expected_answers(cascade, drawn, exit_thresholds=1.0))
    assert {layer for _, _, layer in answers(opened)} == {2}
    expect(opened.locator(".result .early .number").first).to_contain_text("×", timeout=PATIENCE)  # times follow

    slider.press("Home")
    expect(promise).to_contain_text("Every image runs to the end")
    assert close(answers(opened), expected_answers(cascade, drawn, early_exit=False))
    assert opened.locator(".result .early:visible").count() == 0

    opened.get_by_role("button", name="Back to the calibrated thresholds").click()
    expect(promise).to_contain_text("Promised with probability 80%")
    assert slider.input_value() == calibrated and answers(opened) == at_calibrated
    expect(opened.locator("#back")).to_be_hidden()


def test_an_image_is_taken_upright(opened, exported_page, tmp_path):
    image = demo_images(1, seed=3)[0][5].resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = tmp_path / "turned.png"
    image.save(turned, exif=exif)
    upright = png(image.transpose(Image.Transpose.ROTATE_270), tmp_path, "upright.png")
    give(opened, turned, upright)
    first, second = answers(opened)
    assert first == second
    cascade = Cascade(exported_page / "float32")
    assert close([first], expected_answers(cascade, [image.transpose(Image.Transpose.ROTATE_270)]))
    size = opened.locator(".result .thumbnail").last.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [40, 60]


def test_bad_files_get_one_sentence_and_the_page_goes_on(opened, drawn, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    heic = tmp_path / "phone.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100)
    cut = tmp_path / "cut.png"
    cut.write_bytes(png(noise(200, 200), tmp_path, "whole.png").read_bytes()[:60])
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 9_000)).save(huge)
    give(opened, text, empty, heic, cut, huge)
    said = list(reversed(opened.locator(".result.failed .note").all_text_contents()))
    assert said[0] == "notes.txt cannot be classified: it is not an image that this browser can read."
    assert said[1] == "empty.png cannot be classified: it is empty."
    assert said[2] == (
        "phone.heic cannot be classified: it is a HEIC image, which this browser cannot read; save it as JPEG or PNG."
    )
    assert said[3].startswith("cut.png cannot be classified: it ")
    assert said[4] == (
        "huge.png cannot be classified: it has 20000 × 9000 pixels, more than 178 million; make it smaller."
    )
    give(opened, png(drawn[0], tmp_path, "good.png"))
    assert opened.locator(".result:not(.failed)").count() == 1
    opened.get_by_role("button", name="Remove notes.txt").click()
    expect(opened.locator(".result")).to_have_count(5)
    opened.get_by_role("button", name="Clear").click()
    expect(opened.locator("#results")).to_be_hidden()


def test_a_large_image_is_read_in_strips(opened, exported_page, tmp_path):
    image = Image.effect_noise((5000, 4000), 90).convert("RGB")  # over four strips
    give(opened, png(image, tmp_path, "large.png"))
    assert close(answers(opened), expected_answers(Cascade(exported_page / "float32"), [image]))


def test_transparent_parts_are_told(opened, tmp_path):
    image = noise(30, 30).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((30, 30)))
    give(opened, png(image, tmp_path, "clear.png"))
    assert "Transparent parts count as black here." in opened.locator(".result .note").text_content()


def test_examples_and_what_is_dropped_and_the_camera(opened):
    opened.get_by_role("button", name="two").click()
    expect(opened.locator(".result:not(.waiting)")).to_have_count(1, timeout=PATIENCE)
    expect(opened.locator(".result .file")).to_have_text("Example: two")
    drop = """async (target) => {
        const canvas = new OffscreenCanvas(20, 20);
        canvas.getContext("2d").fillRect(0, 0, 20, 20);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], "dropped.png", { type: "image/png" }));
        target.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    opened.locator("#drop").evaluate(drop)
    expect(opened.locator(".result:not(.waiting)")).to_have_count(2, timeout=PATIENCE)
    opened.get_by_role("button", name="Use the camera").click()
    opened.get_by_role("button", name="Capture image").click()
    expect(opened.locator(".result:not(.waiting):not(.failed)")).to_have_count(3, timeout=PATIENCE)
    expect(opened.locator("#viewfinder")).to_be_hidden()
    assert opened.locator(".result .file").first.text_content() == "camera.png"


def test_works_without_a_connection_after_the_first_visit(context, serve, exported_page, drawn, tmp_path):
    page = ready(context.new_page(), serve(exported_page))
    expect(page.locator("#status")).to_contain_text("kept for use without a connection")
    give(page, png(drawn[0], tmp_path, "0.png"))
    with_connection = answers(page)
    context.set_offline(True)
    page.reload()
    expect(page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE)
    give(page, png(drawn[0], tmp_path, "0.png"))
    assert answers(page) == with_connection
    # what was never loaded is missing, in one sentence, and the rest goes on
    page.locator("#precision").get_by_text("int8").click()
    expect(page.locator("#trouble-text")).to_contain_text("cannot be loaded: there is no connection", timeout=PATIENCE)
    page.locator("#precision").get_by_text("float32").click()
    expect(page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE)
    context.set_offline(False)


def test_a_new_version_replaces_what_is_kept(context, serve, copied):
    address = serve(copied)
    page = ready(context.new_page(), address)
    content = json.loads((copied / "page.json").read_text())
    (copied / "page.json").write_text(json.dumps({**content, "version": "another", "name": "Shrubs"}))
    ready(page, address)
    expect(page.locator("#name")).to_have_text("Shrubs")
    assert page.evaluate("caches.keys()") == ["mevit / another"]
    kept = page.evaluate(
        "caches.open('mevit / another').then((c) => c.keys()).then((all) => all.map(({ url }) => url))"
    )
    assert f"{address}float32/stage_2.onnx?version=another" in kept


def test_a_file_that_is_missing_is_named_and_can_come_back(context, serve, copied, drawn, tmp_path):
    (copied / "float32" / "stage_3.onnx").rename(copied / "away")
    page = context.new_page()
    page.goto(serve(copied))
    trouble = page.locator("#trouble-text")
    expect(trouble).to_have_text(
        "The model cannot be loaded: float32/stage_3.onnx is missing here: the server answers 404.", timeout=PATIENCE
    )
    in_use = "Promise.reject(new DOMException('', 'NotReadableError'))"
    page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = () => {in_use}; }}")
    page.get_by_role("button", name="Use the camera").click()
    expect(trouble).to_contain_text("404. The camera cannot be used: another program may be using it.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()  # which another trouble leaves there
    page.set_input_files("#files", str(png(drawn[0], tmp_path, "0.png")))
    page.locator("#precision").get_by_text("int8").click()
    expect(page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE)
    expect(page.locator(".result:not(.waiting)")).to_have_count(1, timeout=PATIENCE)
    expect(page.locator("#trouble")).to_be_hidden()
    (copied / "away").rename(copied / "float32" / "stage_3.onnx")
    page.locator("#precision").get_by_text("float32").click()
    expect(page.locator("#status")).to_contain_text("Ready", timeout=PATIENCE)
    expect(page.locator(".result.waiting")).to_have_count(0, timeout=PATIENCE)
    assert close(answers(page), expected_answers(Cascade(copied / "float32"), drawn[:1]))


@pytest.mark.parametrize("name", ["page.json", "worker.js", "ort/ort.wasm.min.mjs", "ort/ort-wasm-simd-threaded.wasm"])
def test_a_missing_part_of_the_page_is_told(context, serve, copied, name):
    address = serve(copied)
    (copied / name).unlink()
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#trouble-text")).to_contain_text("The model cannot be loaded: ", timeout=PATIENCE)
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_a_browser_without_simd_is_told_what_it_lacks(context, serve, exported_page):
    page = context.new_page()
    page.add_init_script("WebAssembly.validate = () => false")
    page.goto(serve(exported_page))
    expect(page.locator("#trouble-text")).to_contain_text("This browser has no WebAssembly SIMD", timeout=PATIENCE)
    expect(page.locator("#loading")).to_be_hidden()
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()


class NotIsolated(PageHandler):
    isolates = False


def test_one_thread_where_the_site_lacks_the_headers(context, serve, exported_page, drawn, tmp_path):
    page = ready(context.new_page(), serve(exported_page, NotIsolated))
    expect(page.locator("#status")).to_contain_text("WebAssembly, one thread")
    give(page, png(drawn[0], tmp_path, "0.png"))
    assert close(answers(page), expected_answers(Cascade(exported_page / "float32"), drawn[:1]))


def test_fits_a_phone_and_the_dark(browser, serve, exported_page, drawn, tmp_path):
    files = [png(image, tmp_path, f"{number}.png") for number, image in enumerate(drawn[:3])]
    backgrounds = set()
    for scheme in ("light", "dark"):
        options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
        context = browser.new_context(**options, color_scheme=scheme)
        page = ready(context.new_page(), serve(exported_page))
        give(page, *files)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for button in page.locator("button:visible, .button:visible").all():
            assert button.bounding_box()["height"] >= 24
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(backgrounds) == 2


def test_everything_can_be_reached_by_keyboard(opened):
    reached = []
    for _ in range(20):
        opened.keyboard.press("Tab")
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"files", "camera", "stop"} <= set(reached)


def test_labels_and_names_are_text(opened, exported_page, drawn, tmp_path):
    cascade = Cascade(exported_page / "float32")
    label = cascade(cascade.preprocess(drawn[:1])).logits.argmax()
    assert cascade.labels[label].startswith("<b>")
    give(opened, png(drawn[0], tmp_path, "<img src=x onerror=alert(1)>.png"))
    assert opened.locator(".result .label").text_content() == cascade.labels[label]
    assert opened.locator(".result .file").text_content() == "<img src=x onerror=alert(1)>.png"
    assert opened.locator(".result b").count() == 0
