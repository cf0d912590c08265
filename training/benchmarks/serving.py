# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Scoring and serving an exported cascade on this machine, beside a plain loop over it and beside the plain ViT.

    python training/benchmarks/serving.py --export runs/demo-web [--segments 4,5] [--audit 0.05] [--output FILE]

- `score`: images a second of `mevit score` while its actors run, beside one process that reads, scores and writes
  batch after batch; with `--audit`, once more with an audit.
- `memory`: of all processes of `mevit score`, while it scores many more images.
- `serve`: a closed loop of clients, each of which asks anew once it has its answer, on the loopback address: answers a
  second, median and 99th percentile of their latency; the same for the plain ViT, which is the cascade run to its end
  without asking an exit, served in the same way; the same while a replica is killed every few seconds; and, with
  `--audit`, with an audit.
- `states`: the bytes that an image's state takes from one segment to the next, and the share of images that go on.
- `front`: the same closed loop on the process that speaks HTTP, without a model: what it answers at most.

From all of these, `growth` says on paper what as many machines of this kind would do.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import uvicorn
from transformers import HfArgumentParser

from modeling_mevit.data.demo import demo_images
from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.reports.environment import environment_info
from modeling_mevit.scale.front import Front
from modeling_mevit.scale.metrics import Metrics
from modeling_mevit.scale.outcomes import Answer
from modeling_mevit.scale.requests import Limits
from modeling_mevit.scale.results import ScoringReport
from modeling_mevit.scale.score import MOST_ROWS, score
from modeling_mevit.scale.scorers import CascadeScorer
from modeling_mevit.scale.serve import Service, serving


PARTS = ("score", "memory", "serve", "states", "front")
MACHINES = (1, 10, 1000)
MANY_IMAGES = 10_000_000
CORES = os.cpu_count() or 1
CLIENT = Path(__file__).with_name("serving_clients.py")
MIB = 2**20


@dataclass
class ServingBenchmarkArguments:
    """What is measured."""

    export: str = field(metadata={"help": "Directory with an exported cascade."})
    images: str | None = field(default=None, metadata={"help": "Folder of images; drawn aircraft by default."})
    parts: str = field(default=",".join(PARTS), metadata={"help": "Which of them, with commas between."})
    count: int = field(default=1000, metadata={"help": "Images that are scored."})
    memory_count: int = field(default=20_000, metadata={"help": "Images that memory is measured over."})
    batch_size: int = field(default=32, metadata={"help": "Of scoring and of the plain loop."})
    segments: str = field(default="", metadata={"help": "Exits to cut the cascade at, besides serving it whole."})
    clients: int = field(default=32, metadata={"help": "That ask at the same time."})
    seconds: float = field(default=60.0, metadata={"help": "Of each closed loop, after a tenth of it that warms up."})
    kill_every: float = field(default=10.0, metadata={"help": "Seconds between two killed replicas."})
    audit: float | None = field(
        default=None, metadata={"help": "Share of the images to audit, in scoring once more and a service more."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self):
        unknown = set(self.parts.split(",")) - set(PARTS)
        if unknown:
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")

    @property
    def cuts(self) -> list[int]:
        return [int(layer) for layer in self.segments.split(",") if layer]


def gather_images(folder: Path, source: str | None, count: int) -> list[Path]:
    """As many files as asked for, in a folder: those of another folder, or drawn ones, again and again."""
    folder.mkdir()
    if source is None:
        originals = []
        images, _ = demo_images(max(1, min(count, 600) // 12), seed=7)
        for number, image in enumerate(images):
            originals.append(folder.parent / f"drawn-{number:04}.jpg")
            image.save(originals[-1], quality=95)
    else:
        originals = sorted(file for file in Path(source).rglob("*.jpg"))
    files = []
    for number in range(count):
        files.append(folder / f"{number:06}.jpg")
        shutil.copyfile(originals[number % len(originals)], files[-1])
    return files


def plain_loop(export: str, files: Sequence[Path], batch_size: int, output: Path) -> float:
    """Images a second of one process that reads, scores and writes batch after batch, with all cores.

    What it writes: path, label, probability, exit layer and score of each image.
    """
    scorer = CascadeScorer(export, threads=os.cpu_count() or 1)
    rows: list[tuple[Any, ...]] = []
    began = time.perf_counter()
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        scores = scorer(scorer.cascade.preprocess(batch))
        numbers = (array.tolist() for array in (scores.probability, scores.exit_layer, scores.exit_score))
        rows += zip(map(str, batch), scores.labels, *numbers, strict=True)
    output.write_text(json.dumps(rows))
    return len(files) / (time.perf_counter() - began)


def measure_score(arguments: ServingBenchmarkArguments, work: Path) -> dict[str, Any]:
    """Scoring beside a plain loop, in turn: loop, score, loop; and with an audit, score again."""
    files = gather_images(work / "scored", arguments.images, arguments.count)
    loops = [plain_loop(arguments.export, files, arguments.batch_size, work / "loop.json")]
    report = score(arguments.export, str(work / "scored"), str(work / "scores"), batch_size=arguments.batch_size)
    loops.append(plain_loop(arguments.export, files, arguments.batch_size, work / "loop.json"))
    of_loop = {path: (label, layer) for path, label, _, layer, _ in json.loads((work / "loop.json").read_text())}
    rows = pq.read_table(work / "scores").to_pylist()
    audited = None
    if arguments.audit:
        audited = score(
            arguments.export,
            str(work / "scored"),
            str(work / "audited"),
            batch_size=arguments.batch_size,
            audit=arguments.audit,
        )
    return {
        "images": len(files),
        "image_bytes": float(np.mean([file.stat().st_size for file in files])),
        "images_per_second_per_core": report.images_per_second / CORES,
        "loop_images_per_second": loops,
        "score_images_per_second": report.images_per_second,
        "overhead": median(loops) / report.images_per_second - 1,
        "seconds_with_starting_ray": report.seconds,
        "other_answers": sum(of_loop[row["path"]] != (row["label"], row["exit_layer"]) for row in rows),
        "sentence": sentence(report, work),
        "audited": audited and {"images_per_second": audited.images_per_second, "sentence": sentence(audited, work)},
    }


def sentence(report: ScoringReport, work: Path) -> str:
    """What a job says at its end, without the name of the temporary directory."""
    return str(report).replace(f"{work}/", "")


def measure_memory(arguments: ServingBenchmarkArguments, work: Path) -> dict[str, Any]:
    """MiB of all processes of a scoring run over many images, in each tenth of its time."""
    gather_images(work / "many", arguments.images, arguments.memory_count)
    samples: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            samples.append(sum(_pss(process) for process in (os.getpid(), *_descendants(os.getpid()))) / MIB)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        report = score(
            arguments.export, str(work / "many"), str(work / "many-scores"), batch_size=arguments.batch_size
        )
    finally:
        ended.set()
        thread.join()
    tenths = [max(part) for part in np.array_split(np.array(samples), 10) if len(part)]
    return {"images": report.summary.images, "peak_mib_by_tenth": tenths, "sentence": sentence(report, work)}


def measure_serve(arguments: ServingBenchmarkArguments, work: Path) -> list[dict[str, Any]]:
    """Closed loops on the cascade whole and cut, on the plain ViT, on services whose replicas are killed, and on one
    that audits."""
    gather_images(work / "asked", arguments.images, min(arguments.count, 500))
    plain = shutil.copytree(arguments.export, work / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "early_exit": False}))
    ways: list[tuple[str, str, list[int], bool, float | None]] = [("plain ViT", str(plain), [], False, None)]
    for cuts in ([], arguments.cuts) if arguments.cuts else ([],):
        name = "cascade in segments" if cuts else "cascade"
        ways += [(name, arguments.export, cuts, False, None)]
        ways += [(f"{name}, replicas killed", arguments.export, cuts, True, None)]
    if arguments.audit:
        ways += [(f"cascade, {100 * arguments.audit:g}% audited", arguments.export, [], False, arguments.audit)]
    rows = []
    for name, export, cuts, kills, audit in ways:
        with running_service(export, cuts, audit) as url, killing(arguments.kill_every if kills else None) as killed:
            asked = run_clients(url, work / "asked", arguments)
        rows.append(
            {"name": name, "segments": cuts, "killed": len(killed), **asked, "per_core": asked["per_second"] / CORES}
        )
    return rows


def run_clients(url: str, folder: Path, arguments: ServingBenchmarkArguments) -> dict[str, Any]:
    """What `serving_clients.py` prints."""
    command = [sys.executable, str(CLIENT), url, str(folder), str(arguments.clients), str(arguments.seconds)]
    content: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return content


def measure_front(arguments: ServingBenchmarkArguments, work: Path) -> dict[str, Any]:
    """A closed loop on the process that speaks HTTP, where images have their answer once their headers are read."""
    gather_images(work / "asked", arguments.images, min(arguments.count, 500))

    async def classify(image: Any) -> Answer:
        return Answer("label", 0.75, 1, 0.25, False)

    front = Front(classify, lambda: True, Metrics(["1"], [1]), Limits(), Service.queue, Service.deadline, None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        server = uvicorn.Server(uvicorn.Config(front.app, http="h11", log_level="warning", access_log=False))
        with in_thread(server, lambda: server.run(sockets=[listener])):
            return run_clients(f"http://127.0.0.1:{listener.getsockname()[1]}/", work / "asked", arguments)


def growth(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What so many machines of the measured kind do, on paper: rates grow as their number does, since no machine waits
    for another, and with them what the one process has to do that lists images or speaks HTTP, and what crosses the
    network. Of scoring, and of serving in each way but with replicas killed; only of what was measured."""
    rows: dict[str, list[dict[str, Any]]] = {"scoring": [], "serving": []}
    score_part, states = results.get("score"), results.get("states", [])
    for machines in MACHINES:
        if score_part:
            rate = machines * score_part["score_images_per_second"]
            rows["scoring"].append(
                {
                    "machines": machines,
                    "images_per_second": rate,
                    "hours_for_many": MANY_IMAGES / rate / 3600,
                    "mb_per_second_read": rate * score_part["image_bytes"] / 1e6,
                    "blocks_per_second": rate / MOST_ROWS,
                }
            )
        for one in results.get("serve", []):
            if one["name"].endswith("replicas killed") or not (states and "front" in results):
                continue
            rate = machines * one["per_second"]
            moved = {state["after_exit"]: state["bytes_per_image"] for state in states}
            moved_here = sum(moved[cut] for cut in one["segments"] if cut in moved)
            rows["serving"].append(
                {
                    "name": one["name"],
                    "machines": machines,
                    "images_per_second": rate,
                    "bytes_moved_per_image": moved_here,
                    "mb_per_second_moved": rate * moved_here / 1e6,
                    "mb_per_second_moved_by_machine": one["per_second"] * moved_here / 1e6,
                    "fronts": ceil(rate / results["front"]["per_second"]),
                }
            )
    return rows


def measure_states(arguments: ServingBenchmarkArguments, work: Path) -> list[dict[str, Any]]:
    """Bytes of an image's state after each exit, and how many of the images go on with one."""
    files = gather_images(work / "states", arguments.images, min(arguments.count, 500))
    cascade = Cascade(arguments.export)
    exit_layer = np.concatenate([cascade(cascade.preprocess([file])).exit_layer for file in files])
    image = cascade.preprocess(files[:1])
    rows = []
    for place, layer in enumerate(cascade.exit_layers[:-1]):
        part = Cascade(arguments.export, places=range(place + 1))
        _, _, state = part.advance(part.start(image), early_exit=False)
        rows.append(
            {
                "after_exit": layer,
                "bytes": sum(array.nbytes for array in state),
                "goes_on": float((exit_layer > layer).mean()),  # of all images
                "bytes_per_image": sum(array.nbytes for array in state) * float((exit_layer > layer).mean()),
            }
        )
    return rows


@contextmanager
def running_service(export: str, cuts: list[int], audit: float | None = None) -> Iterator[str]:
    """Serves from this process; clients have another one. Gives the address."""
    asked = Service(export, segments=cuts, port=0, audit=audit)
    with serving(asked) as service, in_thread(service.server, service.run):
        yield service.url


@contextmanager
def in_thread(server: uvicorn.Server, run: Callable[[], None]) -> Iterator[None]:
    """Runs a server beside the context, and ends it."""
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def killing(every: float | None) -> Iterator[list[str]]:
    """Kills one replica, of the segments in turn, every so many seconds. Gives the names of those killed."""
    import ray

    killed: list[str] = []
    ended = threading.Event()

    def kill() -> None:
        while every and not ended.wait(every):
            actors = ray.util.list_named_actors(all_namespaces=True)
            replicas = sorted(actor["name"] for actor in actors if actor["name"].startswith("SERVE_REPLICA::"))
            if replicas:
                name = replicas[len(killed) % len(replicas)]
                try:
                    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
                except ValueError:  # it ended by itself
                    continue
                killed.append(name)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


def _descendants(process: int) -> list[int]:
    """All processes that a process started, and those that these did."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children: dict[int, list[int]] = {}
    for line in out.splitlines():
        number, parent = map(int, line.split())
        children.setdefault(parent, []).append(number)
    found, ahead = [], [process]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def _pss(process: int) -> int:
    """Bytes of memory of a process, where pages that several share are shared out; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def tables(results: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = []
    if one := results.get("score"):
        loops = ", ".join(f"{rate:.1f}" for rate in one["loop_images_per_second"])
        lines += [
            f"`mevit score`: {one['score_images_per_second']:.1f} images a second while its actors run "
            f"({one['images_per_second_per_core']:.1f} per core), plain loop {loops}: overhead "
            f"{one['overhead']:.1%}; {one['other_answers']} of {one['images']} answers differ.",
            one["sentence"],
        ]
        if audited := one.get("audited"):
            lines += [f"With an audit {audited['images_per_second']:.1f} a second. {audited['sentence']}"]
    if one := results.get("memory"):
        tenths = ", ".join(f"{value:.0f}" for value in one["peak_mib_by_tenth"])
        lines += ["", f"Memory over {one['images']:,} images, MiB in each tenth of the time: {tenths}"]
    if rows := results.get("serve"):
        lines += ["", "| served | answers a second | p50 ms | p99 ms | refused | given up | lost | replicas killed |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['name']}{' ' + str(row['segments']) if row['segments'] else ''} | {row['per_second']:.1f} | "
            f"{row['p50']:.0f} | {row['p99']:.0f} | {row['refused']} | {row['given_up']} | {row['lost']} | "
            f"{row['killed']} |"
            for row in rows
        ]
        lines += [f"Not answered: {number} × {reason}" for row in rows for reason, number in row["reasons"].items()]
    if rows := results.get("states"):
        lines += [
            "",
            "| after exit | KiB of a state | images that go on | KiB an image |",
            "| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {row['after_exit']} | {row['bytes'] / 1024:.0f} | {row['goes_on']:.1%} | "
            f"{row['bytes_per_image'] / 1024:.1f} |"
            for row in rows
        ]
    if one := results.get("front"):
        lines += ["", f"HTTP alone: {one['per_second']:.0f} answers a second, p99 {one['p99']:.0f} ms"]
    lines += growth_tables(results.get("growth", {}))
    return "\n".join(lines)


def growth_tables(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What `growth` says, as lines of Markdown."""
    lines = []
    if rows.get("scoring"):
        header = f"| machines | images a second | hours for {MANY_IMAGES:,} images | MB/s read | blocks a second |"
        lines += ["", f"{header}", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['machines']:,} | {row['images_per_second']:,.0f} | {row['hours_for_many']:,.2f} | "
            f"{row['mb_per_second_read']:,.1f} | {row['blocks_per_second']:,.2f} |"
            for row in rows["scoring"]
        ]
    if rows.get("serving"):
        lines += [
            "",
            "| served | machines | images a second | KiB moved an image | MB/s moved | by each machine | HTTP |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['name']} | {row['machines']:,} | {row['images_per_second']:,.0f} | "
            f"{row['bytes_moved_per_image'] / 1024:.1f} | {row['mb_per_second_moved']:,.1f} | "
            f"{row['mb_per_second_moved_by_machine']:.2f} | {row['fronts']:,} |"
            for row in rows["serving"]
        ]
    return lines


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints. Returns what the JSON holds."""
    (arguments,) = HfArgumentParser(ServingBenchmarkArguments).parse_args_into_dataclasses(argv)
    measure: dict[str, Callable[[ServingBenchmarkArguments, Path], Any]] = {
        "score": measure_score,
        "memory": measure_memory,
        "serve": measure_serve,
        "states": measure_states,
        "front": measure_front,
    }
    results: dict[str, Any] = {"environment": environment_info(), "arguments": asdict(arguments)}
    for part in arguments.parts.split(","):
        with tempfile.TemporaryDirectory() as work:
            results[part] = measure[part](arguments, Path(work))
        print(tables({part: results[part]}), flush=True)
    results["growth"] = growth(results)
    print(tables({"growth": results["growth"]}), flush=True)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
