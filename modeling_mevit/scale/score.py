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
import warnings
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
from .cluster import GIB, connected, environment, resources, room
from .results import (
    COLUMNS,
    ScoringReport,
    Summary,
    failed_results,
    open_results,
    write_results,
    written_results,
)
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
from .sources import Content, Contents, list_images


MOST_ROWS = 2048  # of a block, which is a file of the results
BLOCKS_PER_ACTOR = 6  # about, so that all end at about the same time; handing one out takes Ray some 10 ms
ATTEMPTS = 3  # at a block whose actor dies
PIECES = 16  # that such a block is then cut into


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
        output: directory of Parquet files with the columns `path`, `label`, `probability`, `exit_layer`, `score`,
            `full_label` and `error`; a path or a URI. It may lie in the source, of which it is then no part.
        cluster: address of a Ray cluster; this machine alone by default.
        actors: processes with the model; by default as many as there is room for.
        cpus: of an actor, for reading images, and on the CPU for the model.
        gpus: of an actor; a part of one where several share it.
        memory: of an actor, in GiB, so that no machine gets more actors than it has memory for.
        batch_size: images that go through the model at a time.
        image_column: of Parquet files, see [`list_images`].
        audit: share of the images that also run to the end, to watch the promise; none by default. Of rows only
            `full_label` depends on it, and what was scored in an earlier run is not audited.
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
        listed = list_images(source, image_column, without=directory)
        missing = listed.filter(pc.invert(pc.is_in(listed["path"], done)))
        before = len(listed) - len(missing)
        del done, listed
        summary, running = Summary(), 0.0
        if len(missing):
            # Ray warns of each actor whose arguments it keeps; what goes wrong arrives as an exception too
            logs = {"RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")}
            stack.enter_context(environment(**logs))
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
            count = _actors(actors, cpus, gpus, memory or 0)
            blocks = _blocks(missing, min(count, ceil(len(missing) / batch_size)), batch_size)
            with tqdm(total=len(missing), desc="score", unit="image") as bar:
                for one, began_running, counted in _run(blocks, count, cpus, gpus, memory, settings):
                    summary.add(one)
                    if monitor is not None and counted is not None:
                        # A block is counted as soon as it is scored, which takes as long whatever its audits found;
                        # one that is lost and scored again is counted once, with its rows,
                        # and one whose actor died once these were written is not.
                        monitor.merge(counted)
                    running = max(running, time.time() - began_running)
                    bar.update(one.images)
    verdict = None if monitor is None else monitor.disagreement
    return ScoringReport(source, output, summary, before, time.monotonic() - began, running, costs, verdict)


class ScoringActor:
    """Holds a model, scores blocks of listed images and writes each block's rows to a file of its own.

    The model is loaded with the first block, and what cannot be loaded, read or written is told in place of a summary.
    Ray would lose what was raised, and take it for a block whose actor dies.
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
        self.batch_size, self.contents, self.monitor = batch_size, Contents(image_column), monitor
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
        """Scores listed images. Gives one row: the first image's path, by which a block is known, the summary of all,
        when this actor had its model, what failed, and what a monitor of this block alone counted."""
        first = images["path"][0].as_py()
        try:
            began = self.began
            monitor = None if self.monitor is None else self.monitor.for_replica(_seed_of(self.monitor, images))
            results = pa.concat_tables(self._score(images, monitor))
            write_results(self.directory, self.model, results)
        except (OSError, ValueError, MissingExtraError) as error:
            return self._row(first, "", 0.0, str(error))
        except Exception as error:  # of the model, such as where its memory does not suffice
            return self._row(first, "", 0.0, f"scoring failed: {type(error).__name__}: {error}")
        counted = "" if monitor is None else json.dumps(monitor.state())
        return self._row(first, Summary.of(results).to_json(), began, "", counted)

    def _row(self, first: str, summary: str, began: float, failure: str, counted: str = "") -> pa.Table:
        columns = {"first": first, "summary": summary, "began": began, "failure": failure, "counted": counted}
        return pa.table({name: [value] for name, value in columns.items()})

    def _score(self, images: pa.Table, monitor: PromiseMonitor | None) -> Iterator[pa.Table]:
        """Rows of results, a batch at a time, while the next one is read."""
        reading: list[tuple[str, Future[np.ndarray | str]]] = []
        listed = self.contents.of(images)
        while batch := list(islice(listed, self.batch_size)):
            next_reading = [(path, self.readers.submit(self._read, path, content)) for path, content in batch]
            if reading:
                yield self._rows(reading, monitor)
            reading = next_reading
        yield self._rows(reading, monitor)

    def _read(self, path: str, content: Content) -> np.ndarray | str:
        """Pixel values of an image, or why there are none."""
        if isinstance(content, OSError):
            return str(content)
        try:
            held = files.read_file(content) if isinstance(content, str) else content
            return self.scorer.read(NamedContent(held, path))
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    def _rows(self, reading: list[tuple[str, Future[np.ndarray | str]]], monitor: PromiseMonitor | None) -> pa.Table:
        read = [future.result() for _, future in reading]
        pixel_values = [pixels for pixels in read if isinstance(pixels, np.ndarray)]
        scored: Iterator[tuple[Any, ...]] = iter(())
        if pixel_values:
            scores = self.scorer(np.stack(pixel_values), monitor)
            arrays = (scores.probability, scores.exit_layer, scores.exit_score)
            scored = zip(scores.labels, *(array.tolist() for array in arrays), scores.full_labels, strict=True)
        rows = []
        for (path, _), pixels in zip(reading, read, strict=True):
            label, *others = (None,) if isinstance(pixels, str) else next(scored)
            if label is None:
                reason = pixels if isinstance(pixels, str) else NOT_A_NUMBER
                rows.append((path, *(None for _ in COLUMNS.names[1:-1]), reason))
            else:
                rows.append((path, label, *others, None))
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
    return _pieces(images, rows)


def _pieces(images: pa.Table, rows: int) -> list[pa.Table]:
    return [images.slice(start, rows).combine_chunks() for start in range(0, len(images), rows)]


def _actors(wanted: int | None, cpus: int, gpus: float, memory: float) -> int:
    """How many actors there are to be: as many as wanted, or as Ray has room for.

    Raises:
        ValueError: where it has no room for them, for which they would wait.
    """
    most = room(cpus, gpus, memory)
    needs = f"{cpus} CPUs, {gpus:g} GPUs and {memory:g} GiB"
    if not most:
        raise ValueError(f"an actor must find {needs} on one machine; Ray has {resources()} to hand out.")
    if wanted is not None and wanted > most:
        raise ValueError(
            f"--actors must be at most {most}, for which Ray has room with {needs} each, got {wanted}; it has "
            f"{resources()} to hand out."
        )
    return wanted or most


def _run(
    blocks: list[pa.Table], actors: int, cpus: int, gpus: float, memory: float | None, settings: dict[str, Any]
) -> Iterator[tuple[Summary, float, Any]]:
    """Has actors score blocks. Yields each block's summary, when its actor had its model, in seconds since 1970, and
    the state of its monitor, if it has one.

    An image may end the process that reads it. A block with which actors die again and again is cut into pieces, down
    to that image, which becomes a row with an error.

    Raises:
        ValueError: what an actor could not do, or where actors die with every block.
    """
    directory, model = settings["directory"], settings["model"]
    has_scored = is_again = False
    while blocks:
        done = set()
        for row in _pass(blocks, actors, cpus, gpus, memory, settings, waiting=not is_again):
            done.add(row["first"])
            yield Summary.from_json(row["summary"]), row["began"], json.loads(row["counted"] or "null")
        lost = [block for block in blocks if block["path"][0].as_py() not in done]
        has_scored = has_scored or bool(done)
        if not has_scored and len(blocks) > 1:
            raise ValueError(
                f"actors must stay alive, and died with each of {len(blocks)} blocks, at {ATTEMPTS} attempts; they "
                "may lack memory, of which --memory says how much each needs and --batch-size takes its share."
            )
        blocks = []
        for block in lost:
            results = written_results(directory, block)
            if results is None and (len(block) > 1 or not is_again):
                blocks += _pieces(block, ceil(len(block) / PIECES))
                continue
            if results is None:
                results = failed_results(block, f"the process that read it died, at {ATTEMPTS} attempts")
                write_results(directory, model, results)
            yield Summary.of(results), float("inf"), None
        is_again = True


def _pass(
    blocks: list[pa.Table],
    actors: int,
    cpus: int,
    gpus: float,
    memory: float | None,
    settings: dict[str, Any],
    waiting: bool,
) -> Iterator[dict[str, Any]]:
    """Has actors score blocks. Gives what they say, without blocks with which actors died again and again.

    With `waiting`, an actor has its next block before it is done with one, and both die with it.

    Raises:
        ValueError: what an actor could not do.
    """
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the exception says the same
    listed = ray.data.from_arrow(blocks)
    context = listed.context
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1
    pool = ray.data.ActorPoolStrategy(
        size=min(actors, len(blocks)), max_tasks_in_flight_per_actor=None if waiting else 1
    )
    with warnings.catch_warnings():
        # of the number of retries, which has no parameter of its own
        warnings.simplefilter("ignore", RayDeprecationWarning)
        done = listed.map_batches(
            ScoringActor,
            fn_constructor_kwargs=settings,
            compute=pool,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            num_gpus=gpus or None,
            memory=None if memory is None else int(memory * GIB),
            max_task_retries=ATTEMPTS - 1,
        )
    try:
        for row in done.iter_rows():
            if row["failure"]:
                raise ValueError(row["failure"])
            yield row
    except ray.exceptions.RayError as error:
        raise ValueError(f"scoring failed: {error}") from error
