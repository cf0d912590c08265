# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Answers and times of an exported page in headless Chromium, beside the cascade in Python, on the same image files.

    python training/benchmarks/browser.py out --dataset demo [--images 200] [--output browser.json]

`out` is what `mevit export --cascade --web` wrote. Every precision that it has is measured:

- labels and exits that differ from the Python cascade's. Images near a threshold are counted apart, since there
  rounding decides; so are those that give the same answer once the page gets the pixels that Pillow decoded, as a PNG,
  since browsers decode JPEG files a little differently;
- milliseconds of an image at batch 1, early exit and to the end, in turn, the shortest of up to nine runs of each, as
  the page shows them; medians over images, the ratio over all of them, and that relative to the ratio of the costs;
- bytes that a first visit loads.

With `--screenshot FILE` it also shows the page, with three of its examples.
"""

import base64
import json
import os
import shutil
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, expect, sync_playwright
from transformers import HfArgumentParser

from modeling_mevit import DataSource
from modeling_mevit.checkpoint import load_image_processor
from modeling_mevit.data.image_processing import read_image
from modeling_mevit.onnx.cascade_mevit import Cascade, read_stages
from modeling_mevit.onnx.serve import PageHandler, page_server
from modeling_mevit.reports.environment import environment_info


CHROMIUM = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
# The page's own worker, asked as the page asks it
START = """() => {
    const worker = new Worker("worker.js", { type: "module" });
    const waiting = new Map();
    worker.onmessage = ({ data }) => waiting.get(data.id)?.(data);
    window.ask = (id, kind, given) => new Promise((resolve, reject) => {
        waiting.set(id, ({ result, error }) => error === undefined ? resolve(result) : reject(new Error(error)));
        worker.postMessage({ id, kind, ...given });
    });
}"""
LOAD = """async (directory) => {
    const { files } = await (await fetch("page.json")).json();
    const { provider, threads, config } = await ask("load", "load", { directory, sizes: files });
    window.thresholds = config.early_exit ? config.exit_thresholds : null;
    return { provider, threads };
}"""
CLASSIFY = """async ({ key, content }) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const answer = await ask(key, "classify", { key, file: new Blob([bytes]), thresholds: window.thresholds });
    await ask(`${key} `, "forget", { key });
    return answer;
}"""


@dataclass
class BrowserBenchmarkArguments:
    """What is measured."""

    exported: str = field(metadata={"help": "What `mevit export --cascade --web` wrote."})
    dataset: str = field(metadata={"help": "A folder of images, a Hub data set, or 'demo'."})
    split: str = field(default="test", metadata={"help": "Its images to run on."})
    images: int = field(default=200, metadata={"help": "How many of them, drawn at random, always the same ones."})
    chromium: str | None = field(default=None, metadata={"help": "The browser's program; found by default."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    screenshot: str | None = field(default=None, metadata={"help": "PNG file for a figure of the page."})


class CountingHandler(PageHandler):
    """Counts the bytes of each file that it sends."""

    sent: Counter = Counter()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.sent[self.path.partition("?")[0]] += os.fstat(source.fileno()).st_size
        super().copyfile(source, outputfile)


def image_files(arguments: BrowserBenchmarkArguments, directory: Path) -> list[bytes]:
    """The contents of some image files of a data set."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    label2id = {name: int(number) for number, name in config["id2label"].items()}
    rows = DataSource(arguments.dataset, arguments.split).load(label2id, load_image_processor(str(directory))).rows
    drawn = np.random.default_rng(0).permutation(len(rows))[: arguments.images]
    images = [rows[int(index)]["image"] for index in drawn]
    return [image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes() for image in images]


def classify(page: Page, key: str, content: bytes, exit_layers: list[int]) -> tuple[int, int, float, float]:
    """What the page says of an image file: label, exit layer, milliseconds with early exit and to the end."""
    answer = page.evaluate(CLASSIFY, {"key": key, "content": base64.b64encode(content).decode()})
    layer = answer["exitLayer"]
    return answer["exits"][exit_layers.index(layer)]["label"], layer, answer["early"], answer["full"]


def measure(page: Page, exported: Path, folder: str, contents: list[bytes]) -> dict[str, Any]:
    """One precision, in the browser and in Python."""
    page.evaluate(START)
    loaded = page.evaluate(LOAD, folder)
    directory = exported / folder
    cascade = Cascade(directory)
    stages = read_stages(directory)
    costs = {stage["exit_layer"]: stage["cost"] for stage in stages}
    counts: Counter[str] = Counter()
    answers = []
    for number, content in enumerate(contents):
        label, layer, early, full = classify(page, str(number), content, cascade.exit_layers)
        output = cascade(cascade.preprocess([read_image(content)]))
        expected = int(output.logits[0].argmax()), int(output.exit_layer[0])
        counts["borderline"] += bool(output.borderline[0])
        counts["other_label"] += label != expected[0]
        counts["other_exit"] += layer != expected[1]
        if (label, layer) != expected and not output.borderline[0]:
            png = BytesIO()
            read_image(content).save(png, "PNG")
            again = classify(page, f"{number} as PNG", png.getvalue(), cascade.exit_layers)
            counts["other_by_decoder" if again[:2] == expected else "other_unexplained"] += 1
        answers.append((layer, early, full))
    layers, early, full = zip(*answers, strict=True)
    mean_cost = float(np.mean([costs[layer] for layer in layers]))
    relative_cost = mean_cost / costs[cascade.exit_layers[-1]]
    relative_latency = sum(early) / sum(full)
    return {
        **loaded,
        "num_samples": len(contents),
        **{
            name: int(counts[name])
            for name in ("other_label", "other_exit", "borderline", "other_by_decoder", "other_unexplained")
        },
        "exit_counts": {str(layer): layers.count(layer) for layer in cascade.exit_layers},
        "early_exit_ms": float(np.median(early)),
        "to_the_end_ms": float(np.median(full)),
        "relative_latency": relative_latency,
        "mean_cost": mean_cost,
        "latency_over_cost": relative_latency / relative_cost,
    }


def show(page: Page, port: int, file: str) -> None:
    """Writes a figure of the page with its first, middle and last example."""
    page.goto(f"http://localhost:{port}/")
    expect(page.locator("#status")).to_contain_text("Ready", timeout=600_000)
    examples = page.locator("#examples button").all()
    for example in (examples[0], examples[len(examples) // 2], examples[-1]):
        example.click()
    expect(page.locator(".result:not(.waiting)")).to_have_count(3, timeout=600_000)
    page.locator("#examples ul").evaluate("list => (list.scrollLeft = 0)")
    page.mouse.move(0, 0)
    page.screenshot(path=file, full_page=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints. Returns what the JSON holds."""
    argv = sys.argv[1:] if argv is None else argv
    (arguments,) = HfArgumentParser(BrowserBenchmarkArguments).parse_args_into_dataclasses(["--exported", *argv])
    exported = Path(arguments.exported)
    chromium = arguments.chromium or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        raise ValueError(
            f"--chromium must name a browser's program, since none of {', '.join(CHROMIUM)} is installed."
        )
    contents = image_files(arguments, exported)
    server = page_server(exported, handler=CountingHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    precisions = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=ARGUMENTS)
        version = browser.version
        for cascade in json.loads((exported / "page.json").read_text("utf-8"))["cascades"]:
            CountingHandler.sent.clear()
            context = browser.new_context(service_workers="block")  # a first visit, without what is kept for later
            page = context.new_page()
            page.goto(f"http://localhost:{server.server_port}/icon.svg")  # of the site, without a model of its own
            measured = measure(page, exported, cascade["directory"], contents)
            sent = dict(CountingHandler.sent)
            measured["bytes"] = {"graphs": cascade["bytes"], "all": sum(sent.values())}
            precisions[cascade["precision"]] = measured
            print(f"{cascade['precision']}: {json.dumps(measured, indent=2)}", flush=True)
            context.close()
        if arguments.screenshot:
            show(browser.new_page(viewport={"width": 1000, "height": 700}), server.server_port, arguments.screenshot)
        browser.close()
    server.shutdown()
    environment = {**environment_info(), "chromium": version}
    data = {"name": Path(arguments.dataset).name, "split": arguments.split}
    results = {"environment": environment, "data": data, "precisions": precisions}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
