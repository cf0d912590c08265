# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Audits of a service: some accepted images run once more, to the end, after their answers, and a monitor compares.

Which images those are is drawn when they are accepted. Where too much is waiting already, they are dropped at once:
before anything is known of them, so that those that remain are a fair sample. Those that are not dropped run whatever
becomes of their request, each by itself and through all stages, which takes as long whatever its outcome is.
"""

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..atomic import locked
from ..early_exit.monitoring import PromiseMonitor, Verdict
from .outcomes import Compared, Failed
from .scorers import NamedContent


logger = logging.getLogger(__name__)

AT_A_TIME = 4  # audits that run, of the whole service
SAVED_AFTER = 5.0  # seconds since an audit, at most


class Watched(NamedTuple):
    """What audits tell Prometheus: the verdict, and how many audits there are not, and why."""

    verdict: Verdict
    dropped: dict[str, int]


class Auditor:
    """Has images audited in the background.

    Args:
        monitor: of the promise, for the whole service.
        compare: runs an image to the end.
        places: for images that are chosen and not audited yet; where none is free, audits are dropped.
        deadline: seconds after which an audit that has begun is given up.
        file: that the monitor's state is saved to, if any.
    """

    def __init__(
        self,
        monitor: PromiseMonitor,
        compare: Callable[[NamedContent], Awaitable[Compared | Failed]],
        places: int,
        deadline: float,
        file: Path | None = None,
    ):
        self.monitor, self.compare, self.places, self.deadline, self.file = monitor, compare, places, deadline, file
        self.dropped = {"busy": 0, "failed": 0}
        self.waiting = 0  # or running
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._audits: set[asyncio.Task[None]] = set()
        self._saving: asyncio.Task[None] | None = None

    def choose(self, images: Sequence[NamedContent], is_busy: bool) -> list[NamedContent]:
        """Draws which of the accepted images to audit, and keeps places for these. `begin` must follow.

        Args:
            images: of one request, of which nothing is known yet.
            is_busy: whether the service has enough to do, so that all are dropped.
        """
        drawn = self.monitor.draw(len(images)).tolist()
        chosen = [image for image, is_drawn in zip(images, drawn, strict=True) if is_drawn]
        kept = chosen[: 0 if is_busy else self.places - self.waiting]
        self.dropped["busy"] += len(chosen) - len(kept)
        self.waiting += len(kept)
        return kept

    def begin(self, chosen: Sequence[NamedContent]) -> None:
        """Audits what was chosen, in the background."""
        for image in chosen:
            task = asyncio.get_running_loop().create_task(self._audit(image))
            self._audits.add(task)  # else nothing holds it
            task.add_done_callback(self._audits.discard)

    def watched(self) -> Watched:
        return Watched(self.monitor.disagreement, self.dropped)

    async def _audit(self, image: NamedContent) -> None:
        try:
            async with self._turns:
                compared = await asyncio.wait_for(self.compare(image), self.deadline)
        except Exception as error:
            compared = Failed(f"{type(error).__name__}: {error}", is_clients_fault=False)
        finally:
            self.waiting -= 1
        if isinstance(compared, Compared):
            self._count(compared)
        elif not compared.is_clients_fault:  # a damaged image has neither answer
            logger.error("an audit failed: %s", compared.reason)
            self.dropped["failed"] += 1

    def _count(self, compared: Compared) -> None:
        had_alarm = self.monitor.alarm
        self.monitor.update([compared.early], [compared.full])
        has_risen = self.monitor.alarm and not had_alarm
        if has_risen:
            logger.warning("%s", self.monitor.disagreement)
        if self.file is not None and (self._saving is None or self._saving.done()):
            self._saving = asyncio.get_running_loop().create_task(
                self._save(self.file, 0 if has_risen else SAVED_AFTER)
            )

    async def _save(self, file: Path, after: float) -> None:
        """Saves the state after some seconds, in a thread, since the disk may take its time."""
        await asyncio.sleep(after)
        try:
            await asyncio.to_thread(copy.deepcopy(self.monitor).save, file)
        except OSError as error:
            logger.error("the audit's state cannot be written: %s", error)


@contextmanager
def kept_in(file: Path | None, monitor: PromiseMonitor) -> Iterator[None]:
    """Has a monitor go on from the state in a file, if there is one, and leaves the state there at the end.

    Raises:
        ValueError: where another process has the file's directory, or the state is of another promise or malformed.
        OSError: where it cannot be read or written.
    """
    if file is None:
        yield
        return
    if file.is_dir():
        raise ValueError(f"--audit-state must be a file, got the directory {file}.")
    with locked(file.parent):
        if file.exists():
            monitor.restore(file)
        else:
            monitor.save(file)  # what cannot be written is told now
        try:
            yield
        finally:
            monitor.save(file)
