# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores any number of images on Ray Data: actors that hold the model take blocks of names and write files of rows.

Names of images go from the list to the actors, and counts come back; images and rows go through no other process. An
actor reads and preprocesses the next batch while the model runs, and the model compacts each batch at its exits.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from .._extras import MissingExtraError
from ..atomic import locked
from ..early_exit.monitoring import PromiseMonitor
from . import files
from .cluster import connected
from .results import COLUMNS, ScoringReport, Summary, open_results, write_results
from .scorers import (
    NOT_A_NUMBER,
    NamedContent,
    Scorer,
    absolute,
    exit_costs,
    model_digest,
    open_scorer,
    promise_monitor,
)
from .sources import contents, list_images


GIB = 2**30
MOST_ROWS = 2048  # of a block, which is a file of the results
BLOCKS_PER_ACTOR = 8  # at least, so that all end at about the same time


def score(
    checkpoint: str,
    source: str,
    output: str,
    *,
    cluster: str | None = None,
    actors: int | None = None,
    cpus: int = 1,
    gpus: float = 0,
    memory: float | None = None,
    batch_size: int = 32,
    image_column: str | None = None,
    audit: float | None = None,
    max_disagreement: float | None = None,
    seed: int | None = None,
) -> ScoringReport:
    """Scores the images of a source that `output` does not have yet, and shows a progress bar.

    Args:
        checkpoint: directory or Hub name of a trained model, or directory of an export, which every machine can read.
        source: of the images, see [`list_images`].
        output: directory of Parquet files with the columns `path`, `label`, `probability`, `exit_layer`, `score` and
            `error`; a path or a URI.
        cluster: address of a Ray cluster; this machine alone by default.
        actors: processes with the model; by default as many as there is room for.
        cpus: of an actor, for reading images, and on the CPU for the model.
        gpus: of an actor; a part of one where several share it.
        memory: of an actor, in GiB, so that no machine gets more actors than it has memory for.
        batch_size: images that go through the model at a time.
        image_column: of Parquet files, see [`list_images`].
        audit: share of the images that also run to the end, to watch the promise; none by default. Rows do not depend
            on it, and what was scored in an earlier run is not audited.
        max_disagreement: share of the images that may disagree; what calibration promised by default.
        seed: of the draw of audited images, which also depends on how they are cut into blocks; by default one from
            the operating system.

    Raises:
        ValueError: where the model, the source or the output is not what it must be, Ray lacks what actors need, or
            there is no promise to watch.
        OSError: where files cannot be read or written.
    """
    began = time.monotonic()
    if audit is None and max_disagreement is not None:
        raise ValueError(f"--max-disagreement is for --audit, which is not given, got {max_disagreement}.")
    monitor = None if audit is None else promise_monitor(checkpoint, audit, max_disagreement, seed)
    directory, model, costs = files.full_name(output), model_digest(checkpoint), exit_costs(checkpoint)
    with ExitStack() as stack:
        if not files.is_remote(directory):
            stack.enter_context(locked(Path(directory)))
        done = open_results(directory, model)
        listed = list_images(source, image_column)
        missing = listed.filter(pc.invert(pc.is_in(listed["path"], done)))
        before = len(listed) - len(missing)
        del done, listed
        summary, running = Summary(), 0.0
        if len(missing):
            # Ray warns of each actor whose arguments it keeps; what goes wrong arrives as an exception too
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            stack.enter_context(connected(cluster))
            settings = {
                "checkpoint": absolute(checkpoint),
                "directory": directory,
                "model": model,
                "batch_size": batch_size,
                "threads": cpus,
                "on_gpu": gpus > 0,
                "image_column": image_column,
                "monitor": monitor,
            }
            count = actors or _room(cpus, gpus, memory)
            blocks = _blocks(missing, min(count, ceil(len(missing) / batch_size)), batch_size)
            with tqdm(total=len(missing), desc="score", unit="image") as bar:
                for one, began_running, counted in _run(blocks, count, cpus, gpus, memory, settings):
                    summary.add(one)
                    if monitor is not None:
                        # A block is counted as soon as it is scored, which takes as long whatever its audits found;
                        # one that is lost and scored again is counted once, with its rows.
                        monitor.merge(counted)
                    running = max(running, time.time() - began_running)
                    bar.update(one.images)
    verdict = None if monitor is None else monitor.disagreement
    return ScoringReport(source, output, summary, before, time.monotonic() - began, running, costs, verdict)


class ScoringActor:
    """Holds a model, scores blocks of listed images and writes each block's rows to a file of its own.

    The model is loaded with the first block, and what cannot be loaded, read or written is told in place of a summary:
    Ray would try again, and lose what was raised.
    """

    def __init__(
        self,
        checkpoint: str,
        directory: str,
        model: str,
        batch_size: int,
        threads: int,
        on_gpu: bool,
        image_column: str | None,
        monitor: PromiseMonitor | None = None,
    ):
        self._open = partial(open_scorer, checkpoint, threads, on_gpu)
        self.directory, self.model = directory, model
        self.batch_size, self.image_column, self.monitor = batch_size, image_column, monitor
        self.readers = ThreadPoolExecutor(threads)

    @cached_property
    def scorer(self) -> Scorer:
        return self._open()

    @cached_property
    def began(self) -> float:
        """When the model was loaded, in seconds since 1970."""
        _ = self.scorer
        return time.time()

    def __call__(self, images: pa.Table) -> pa.Table:
        """Scores listed images. Gives one row: their summary, when this actor had its model, what failed, and what a
        monitor of this block alone counted."""
        try:
            began = self.began
            monitor = None if self.monitor is None else self.monitor.for_replica(_seed_of(self.monitor, images))
            results = pa.concat_tables(self._score(images, monitor))
            write_results(self.directory, self.model, results)
        except (OSError, ValueError, MissingExtraError) as error:
            return self._row("", 0.0, str(error))
        counted = "" if monitor is None else json.dumps(monitor.state())
        return self._row(Summary.of(results).to_json(), began, "", counted)

    def _row(self, summary: str, began: float, failure: str, counted: str = "") -> pa.Table:
        return pa.table({"summary": [summary], "began": [began], "failure": [failure], "counted": [counted]})

    def _score(self, images: pa.Table, monitor: PromiseMonitor | None) -> Iterator[pa.Table]:
        """Rows of results, a batch at a time, while the next one is read."""
        reading: list[tuple[str, Future[np.ndarray | str]]] = []
        listed = contents(images, self.image_column)
        while batch := list(islice(listed, self.batch_size)):
            next_reading = [(path, self.readers.submit(self._read, path, content)) for path, content in batch]
            if reading:
                yield self._rows(reading, monitor)
            reading = next_reading
        yield self._rows(reading, monitor)

    def _read(self, path: str, content: bytes | None) -> np.ndarray | str:
        """Pixel values of an image, or why there are none."""
        try:
            return self.scorer.read(NamedContent(files.read_file(path) if content is None else content, path))
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def _rows(self, reading: list[tuple[str, Future[np.ndarray | str]]], monitor: PromiseMonitor | None) -> pa.Table:
        read = [future.result() for _, future in reading]
        pixel_values = [pixels for pixels in read if isinstance(pixels, np.ndarray)]
        scored: Iterator[tuple[Any, ...]] = iter(())
        if pixel_values:
            scores = self.scorer(np.stack(pixel_values), monitor)
            arrays = (scores.probability, scores.exit_layer, scores.exit_score)
            scored = zip(scores.labels, *(array.tolist() for array in arrays), strict=True)
        rows = []
        for (path, _), pixels in zip(reading, read, strict=True):
            label, *numbers = (None,) if isinstance(pixels, str) else next(scored)
            if label is None:
                reason = pixels if isinstance(pixels, str) else NOT_A_NUMBER
                rows.append((path, None, None, None, None, reason))
            else:
                rows.append((path, label, *numbers, None))
        columns = zip(*rows, strict=True)
        return pa.table([pa.array(values, kind.type) for values, kind in zip(columns, COLUMNS, strict=True)], COLUMNS)


def _seed_of(monitor: PromiseMonitor, images: pa.Table) -> int:
    """Of the draw in a block of images, which its first name tells from all others: nothing that they show counts."""
    digest = hashlib.sha256(f"{monitor.seed} {images['path'][0]}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _blocks(images: pa.Table, actors: int, batch_size: int) -> list[pa.Table]:
    """Cuts a list of images into blocks of whole batches: several for each actor, and none too large to lose."""
    rows = ceil(len(images) / (actors * BLOCKS_PER_ACTOR))
    rows = ceil(min(rows, MOST_ROWS) / batch_size) * batch_size
    return [images.slice(start, rows).combine_chunks() for start in range(0, len(images), rows)]


def _room(cpus: int, gpus: float, memory: float | None) -> int:
    """How many actors Ray has room for.

    Raises:
        ValueError: where it is none.
    """
    import ray

    needed = {"CPU": cpus, "GPU": gpus, "memory": (memory or 0) * GIB}
    there = ray.cluster_resources()
    room = min(int(there.get(name, 0) / amount) for name, amount in needed.items() if amount)
    if not room:
        has = f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs and {there['memory'] / GIB:.1f} GiB"
        raise ValueError(
            f"an actor must find {cpus} CPUs, {gpus:g} GPUs and {memory or 0:g} GiB; Ray has {has} to hand out."
        )
    return room


def _run(
    blocks: list[pa.Table], actors: int, cpus: int, gpus: float, memory: float | None, settings: dict[str, Any]
) -> Iterator[tuple[Summary, float, Any]]:
    """Has actors score blocks. Yields each block's summary, when its actor had its model, in seconds since 1970, and
    the state of its monitor, if it has one.

    Raises:
        ValueError: what an actor could not do, or where actors die again and again.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the exception says the same
    done = ray.data.from_arrow(blocks).map_batches(
        ScoringActor,
        fn_constructor_kwargs=settings,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus or None,
        memory=None if memory is None else int(memory * GIB),
    )
    try:
        for row in done.iter_rows():
            if row["failure"]:
                raise ValueError(row["failure"])
            yield Summary.from_json(row["summary"]), row["began"], json.loads(row["counted"] or "null")
    except ray.exceptions.RayError as error:
        raise ValueError(f"scoring failed: {error}") from error
