# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A cascade cut at some of its exits: each part is a deployment of Ray Serve, with batches and replicas of its own.

The first takes an image file; each gives what an exit says of the image, or the image's state for the next one. A
state lies in Ray's object store, and goes from the replica that made it to the one that needs it. Where a replica
dies, so do the states that it made: the image starts anew, as long as its deadline allows.

An image that is audited comes a second time, once it has its answer, and then runs to the end. It goes alone: in a
batch with others it would keep them waiting.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import ray
from ray import serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.serve._private import replica
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from .._extras import extras_named
from ..onnx.cascade_mevit import Cascade, CascadeState, labels_of
from .cluster import LOOPBACK
from .metrics import Metrics
from .outcomes import Answer, Audited, Compared, Failed, Lost, Onward, Told
from .requests import open_image
from .scorers import NOT_A_NUMBER, NamedContent, scores_of


Outcome = TypeVar("Outcome", Answer, Compared)

MOST_ATTEMPTS = 5  # of an image, lest one that kills replicas kills all of them


class Segment:
    """A replica: some stages of a cascade.

    Args:
        directory: of the export.
        places: of the exits, first and one past the last.
        batch_size: images that go through the stages together, at most.
        batch_wait: seconds that an image waits for others, at most.
        threads: of one operator, and for reading images.
    """

    def __init__(self, directory: str, places: tuple[int, int], batch_size: int, batch_wait: float, threads: int):
        _close_port_of_replica()
        self.cascade = Cascade(directory, threads=threads, places=range(*places))
        self.is_last = places[1] == len(self.cascade.exit_layers)
        self.readers = ThreadPoolExecutor(threads)
        self.runner = ThreadPoolExecutor(1)
        self.one_audit = asyncio.Lock()  # so that a batch waits for one audited image at most
        self._in_batch.set_max_batch_size(batch_size)  # type: ignore[attr-defined]
        self._in_batch.set_batch_wait_timeout_s(batch_wait)  # type: ignore[attr-defined]

    async def __call__(self, given: NamedContent | list[Any]) -> Told:
        """Runs an image file, or the state that the segment before gave, in a batch with others."""
        state = await self._state_of(given)
        if not isinstance(state, CascadeState):
            return Told(state, 0)
        told: Told = await self._in_batch(state)
        return told

    async def audit(self, given: NamedContent | list[Any]) -> Told:
        """Runs the same through all stages, by itself, whatever the exits say."""
        state = await self._state_of(given)
        if not isinstance(state, CascadeState):
            return Told(state, 0)
        async with self.one_audit:
            return await asyncio.get_running_loop().run_in_executor(self.runner, self._advance_audited, state)

    async def _state_of(self, given: NamedContent | list[Any]) -> CascadeState | Failed | Lost:
        if isinstance(given, NamedContent):
            return await asyncio.get_running_loop().run_in_executor(self.readers, self._read, given)
        try:
            state: CascadeState = await given[0]
        except RayError:
            return Lost()
        return state

    @serve.batch
    async def _in_batch(self, states: list[CascadeState]) -> list[Told]:
        # in a thread, so that the replica takes images and answers Serve in the meantime
        return await asyncio.get_running_loop().run_in_executor(self.runner, self._advance, states)

    def _read(self, image: NamedContent) -> CascadeState | Failed:
        try:
            return self.cascade.start(self.cascade.preprocess([open_image(image)]))
        except ValueError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            return Failed(f"{image.name} cannot be read: {reason}", is_clients_fault=True)

    def _advance(self, states: list[CascadeState]) -> list[Told]:
        """Runs images through the stages; states of those that go on into the object store, each by itself."""
        batch = CascadeState(*(np.concatenate(arrays) for arrays in zip(*states, strict=True)))
        output, onward, rest = self.cascade.advance(batch)
        outcomes: list[Answer | Onward | Failed] = []
        scores = scores_of(output.logits, output.exit_layer, output.exit_score, self.cascade.labels)
        arrays = (scores.probability, scores.exit_layer, scores.exit_score, output.borderline)
        for label, *numbers in zip(scores.labels, *(array.tolist() for array in arrays), strict=True):
            failed = Failed(NOT_A_NUMBER, is_clients_fault=False)
            outcomes.append(failed if label is None else Answer(label, *numbers))
        for place, sample in enumerate(onward.tolist()):
            kept = _keep(rest.select(np.array([place])))
            outcomes[sample] = kept if isinstance(kept, Failed) else Onward(kept, bool(output.borderline[sample]))
        return [Told(outcome, len(states)) for outcome in outcomes]

    def _advance_audited(self, state: CascadeState) -> Told:
        """Runs an audited image through the stages, from each of which it goes on."""
        output, _, rest = self.cascade.advance(state._replace(audited=np.ones(1, dtype=bool)))
        left_here = output.exit_layer[0] > 0
        early = int(labels_of(output.logits)[0]) if left_here else None
        if self.is_last:
            return Told(Compared(early, int(rest.labels[0])), 0)
        kept = _keep(rest)
        return Told(kept if isinstance(kept, Failed) else Audited(kept, early), 0)


def _keep(state: CascadeState) -> list[Any] | Failed:
    """An image's state in Ray's object store, as the next segment takes it."""
    try:
        return [ray.put(state)]
    except (ObjectStoreFullError, OutOfDiskError):
        return Failed("the states of images that go on have no room left; try again", is_clients_fault=False)


def check_export(directory: str) -> None:
    """Opens a cascade in a process that replicas are started in.

    Raises:
        MissingExtraError: where what runs it is not installed.
        ValueError: where it is damaged, or replicas of this version of Ray cannot be closed to others.
    """
    _close_port_of_replica()
    with extras_named(directory):
        Cascade(directory)


def _close_port_of_replica() -> None:
    """Has Ray Serve open a replica's port, for calls of a kind that is not made here, on the loopback address too.

    It would be on all addresses, and takes pickles, if only with Ray's token.

    Raises:
        ValueError: where this version of Ray opens it in another way.
    """
    if ray.util.get_node_ip_address() == LOOPBACK:
        if not hasattr(replica, "add_port_to_grpc_server"):
            raise ValueError(f"Ray must be 2.60, whose replicas' port is known how to close, got {ray.__version__}.")
        replica.add_port_to_grpc_server = lambda server, _: server.add_insecure_port(f"{LOOPBACK}:0")


class Pipeline:
    """Takes images from segment to segment, from wherever requests arrive.

    Args:
        segments: handles of the deployments, in order.
        metrics: of the service.
    """

    def __init__(self, segments: Sequence[Any], metrics: Metrics):
        self.segments, self.metrics = segments, metrics

    async def __call__(self, image: NamedContent) -> Answer | Failed:
        """Runs an image to its exit, and anew where a replica dies with it. The caller bounds the time."""
        return await self._until_kept(image, self._run)

    async def audit(self, image: NamedContent) -> Compared | Failed:
        """Runs an image to the end, and anew where a replica dies with it. The caller bounds the time."""
        return await self._until_kept(image, self._run_to_the_end)

    async def _until_kept(
        self, image: NamedContent, run: Callable[[NamedContent], Awaitable[Outcome | Failed | Lost]]
    ) -> Outcome | Failed:
        for _ in range(MOST_ATTEMPTS):
            outcome = await run(image)
            if not isinstance(outcome, Lost):
                return outcome
        return Failed(f"replicas died {MOST_ATTEMPTS} times with {image.name}", is_clients_fault=False)

    async def _run(self, image: NamedContent) -> Answer | Failed | Lost:
        given: Any = image
        borderline = False
        for place, segment in enumerate(self.segments):
            self.metrics.entered(place)
            try:
                told = await _through(segment, given)
            finally:
                self.metrics.went(place)
            if told.batch:
                self.metrics.ran(place, told.batch)
            outcome = told.outcome
            if isinstance(outcome, Onward):
                given, borderline = outcome.state, borderline or outcome.borderline
                continue
            if isinstance(outcome, Answer):
                return outcome._replace(borderline=outcome.borderline or borderline)
            if isinstance(outcome, Lost):
                self.metrics.lost(place)
            assert not isinstance(outcome, Audited | Compared)
            return outcome
        raise AssertionError("nobody goes on from the last exit")

    async def _run_to_the_end(self, image: NamedContent) -> Compared | Failed | Lost:
        given: Any = image
        early = None
        for segment in self.segments:
            outcome = (await _through(segment.audit, given)).outcome
            if isinstance(outcome, Audited):
                given, early = outcome.state, outcome.early if early is None else early
                continue
            if isinstance(outcome, Compared):
                return outcome if early is None else outcome._replace(early=early)
            assert not isinstance(outcome, Answer | Onward)
            return outcome
        raise AssertionError("nobody goes on from the last exit")


async def _through(segment: Any, given: Any) -> Told:
    """Runs an image through one segment, by what calls its replicas."""
    response = segment.remote(given)
    try:
        told: Told = await response
    except asyncio.CancelledError:  # its time is over
        response.cancel()
        raise
    except RayTaskError:  # what segments themselves raise is a fault of ours
        raise
    except DeploymentUnavailableError:  # replicas failed to start again and again
        return Told(Failed("a segment has no replica that starts", is_clients_fault=False), 0)
    except (RayError, ReplicaUnavailableError):
        return Told(Lost(), 0)
    return told
