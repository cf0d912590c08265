# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Serves an exported cascade on Ray Serve."""

import logging
import math
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..hub import is_export
from .cluster import LOOPBACK, check_is_closed, connected, resources, room
from .requests import Limits


if TYPE_CHECKING:
    import uvicorn


TOKEN = "MEVIT_SERVE_TOKEN"  # name of the environment variable
SHORTEST_TOKEN = 16  # characters
CONNECTIONS = 1024  # at a time
MOST_HEADERS = 2**16  # bytes of a request's headers
KEEP_ALIVE = 5  # seconds
HEALTH_CHECKS = 1.0  # seconds between them: how soon a dead replica is noticed
SCALES_UP_AFTER, SCALES_DOWN_AFTER = 3.0, 60.0  # seconds

_VISIBLE = re.compile("[!-~]+")


@dataclass(frozen=True)
class Service:
    """How a cascade is served.

    Args:
        export: directory of the export, which every machine of the cluster can read.
        segments: exit layers that segments end with, in ascending order, the last of which may be left out; one
            segment by default.
        host: address to listen on; any but 127.0.0.1 needs a token.
        port: to listen on; 0 takes a free one.
        batch_size: images that go through a segment together, at most.
        batch_wait: milliseconds that an image waits for others, at most.
        replicas: of a segment, at most, as requests demand; by default as many as there are CPUs for.
        threads: of a replica; replicas of all segments, one of each, take that many CPUs together.
        queue: images that are accepted and not answered yet, at most; further ones are refused.
        deadline: seconds after which a request that was accepted is given up.
        limits: of one request.
        token: that every request must bear.
        audit: share of the accepted images that also run to the end, to watch the promise; none by default.
        max_disagreement: share of the images that may disagree; what calibration promised by default.
        audit_state: file in which the monitor's state outlives the service.

    Raises:
        ValueError: where one of them is not what it must be.
    """

    export: str
    segments: Sequence[int] = ()
    host: str = LOOPBACK
    port: int = 8000
    batch_size: int = 8
    batch_wait: float = 5
    replicas: int | None = None
    threads: int = 1
    queue: int = 64
    deadline: float = 30
    limits: Limits = field(default_factory=Limits)
    token: str | None = field(default=None, repr=False)
    audit: float | None = None
    max_disagreement: float | None = None
    audit_state: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "queue", "deadline"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}.")
        if not is_export(self.export):
            raise ValueError(f"EXPORT must be what `mevit export --cascade` wrote, got {self.export}.")
        if self.limits.images > self.queue:
            raise ValueError(
                f"queue must be at least the images of a request, {self.limits.images}, got {self.queue}."
            )
        if self.host != LOOPBACK and not self.token:
            raise ValueError(
                f"--host {self.host} needs a token that requests must bear, in the environment variable {TOKEN}; "
                f"without one the service listens on {LOOPBACK} alone."
            )
        for name in ("max_disagreement", "audit_state"):
            if self.audit is None and getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is for --audit, which is not given, got {getattr(self, name)}.")
        if self.token is None:
            return
        if len(self.token) < SHORTEST_TOKEN:
            raise ValueError(f"{TOKEN} must have at least {SHORTEST_TOKEN} characters, got {len(self.token)}.")
        if not _VISIBLE.fullmatch(self.token):  # others arrive in a header as something else, or not at all
            raise ValueError(f"{TOKEN} must be of visible ASCII characters without spaces, and has others.")


def token_from_environment() -> str | None:
    """The token that requests must bear, taken out of the environment, which other processes inherit; without spaces
    around it, which a header has none of either."""
    token = os.environ.pop(TOKEN, "")
    return token.strip() if token else None


def serve(service: Service, cluster: str | None = None) -> None:
    """Serves until the process is interrupted, and says where. To be called in the main thread.

    Args:
        service: what is served, and how.
        cluster: address of a Ray cluster; this machine alone by default.

    Raises:
        ValueError: where the export is not one, there is no promise to watch, or replicas do not start.
        OSError: where the address cannot be listened on, or the audit's state cannot be written.
    """
    with serving(service, cluster) as running:
        # ends as Ctrl+C does, in place of Ray's handler
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"Serving {service.export} at {running.url}predict (Ctrl+C ends it).", flush=True)
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            running.run()


class RunningService(NamedTuple):
    """A service whose replicas run, and which answers as soon as its server does.

    Args:
        server: of its HTTP.
        listener: socket on which it listens.
        url: of its root.
        segments: names of the applications on Ray Serve, in order.
    """

    server: "uvicorn.Server"
    listener: socket.socket
    url: str
    segments: list[str]

    def run(self) -> None:
        """Answers until the server is told to end, by a signal or by its `should_exit`."""
        self.server.run(sockets=[self.listener])


@contextmanager
def serving(service: Service, cluster: str | None = None) -> Iterator[RunningService]:
    """Deploys a service for the time of the context.

    Raises:
        ValueError: where the export is not one, there is no promise to watch, or replicas do not start.
        OSError: where the address cannot be listened on, or the audit's state cannot be written.
    """
    from ..onnx.cascade_mevit import read_stages
    from .audits import Auditor, kept_in
    from .front import Front
    from .metrics import Metrics
    from .scorers import promise_monitor

    directory = os.path.abspath(service.export)
    exit_layers = [stage["exit_layer"] for stage in read_stages(Path(directory))]
    places = places_of(service.segments, exit_layers)
    monitor = None
    if service.audit is not None:
        monitor = promise_monitor(service.export, service.audit, service.max_disagreement)
    file = None if service.audit_state is None else Path(os.path.abspath(service.audit_state))
    with ExitStack() as stack:
        listener = stack.enter_context(_listener(service))
        if monitor is not None:
            stack.enter_context(kept_in(file, monitor))
        stack.enter_context(connected(cluster))
        import uvicorn

        from .segments import Pipeline

        if cluster is None:
            check_is_closed()  # where the program started Ray

        service_name = f"mevit-{secrets.token_hex(4)}"  # a cluster may have several
        names = [f"{service_name}-{exit_layers[stop - 1]}" for _, stop in places]
        with _deployed(service, directory, dict(zip(names, places, strict=True))) as handles:
            metrics = Metrics([str(exit_layers[stop - 1]) for _, stop in places], exit_layers)
            pipeline, auditor = Pipeline(handles, metrics), None
            if monitor is not None:
                auditor = Auditor(monitor, pipeline.audit, service.queue, service.deadline, file)
                metrics.watch(auditor.watched)
            front = Front(
                pipeline,
                _Readiness(names),
                metrics,
                service.limits,
                service.queue,
                service.deadline,
                service.token,
                auditor,
            )
            config = uvicorn.Config(
                front.app,
                http="h11",  # which bounds a request's headers
                h11_max_incomplete_event_size=MOST_HEADERS,
                limit_concurrency=max(CONNECTIONS, 2 * service.queue),
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(service.deadline) + 1,
                access_log=False,
                server_header=False,
                log_level="warning",
            )
            listener.listen(CONNECTIONS)
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
            yield RunningService(uvicorn.Server(config), listener, url, names)


@contextmanager
def _listener(service: Service) -> Iterator[socket.socket]:
    """A socket with the service's address, which is taken before anything is started."""
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((service.host, service.port))
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot listen on {service.host}, port {service.port}: {error}") from error
        yield listener


@contextmanager
def _deployed(service: Service, directory: str, segments: dict[str, tuple[int, int]]) -> Iterator[list[Any]]:
    """Deploys segments, by their names, as long as the context lasts. Gives their handles."""
    import ray
    from ray import serve as ray_serve

    from .audits import AT_A_TIME
    from .segments import Segment, check_export

    share = service.threads / len(segments)  # of CPUs: where one segment is busy, others are not
    if room(share) < len(segments):
        raise ValueError(
            f"--threads must be at most the CPUs of one machine, got {service.threads}; Ray has {resources()} to hand "
            "out."
        )
    try:  # once, where replicas would try again and again
        ray.get(ray.remote(num_cpus=0)(check_export).remote(directory))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    most = service.replicas or max(1, int(ray.cluster_resources().get("CPU", 0)) // service.threads)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # without proxies: requests arrive in this process
    ray_serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "ERROR"})
    deployed = ray_serve.deployment(
        ray_actor_options={"num_cpus": share},
        # audits take no request's place
        max_ongoing_requests=2 * service.batch_size + (0 if service.audit is None else AT_A_TIME),
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": most,
            "target_ongoing_requests": service.batch_size,
            "upscale_delay_s": SCALES_UP_AFTER,
            "downscale_delay_s": SCALES_DOWN_AFTER,
        },
        health_check_period_s=HEALTH_CHECKS,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=3,
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )(Segment)
    targets = []
    for name, places in segments.items():
        arguments = (directory, places, service.batch_size, service.batch_wait / 1000, service.threads)
        application = deployed.options(name=name).bind(*arguments)
        targets.append(ray_serve.RunTarget(target=application, name=name, route_prefix=None))
    handles: list[Any] = []
    try:
        try:
            handles = ray_serve.run_many(targets)
        except RuntimeError as error:
            raise ValueError(f"replicas of {directory} do not start: {error}") from error
        yield handles
    finally:
        for handle in handles:
            handle.shutdown()
        for name in segments:
            ray_serve.delete(name)


def places_of(ends: Sequence[int], exit_layers: Sequence[int]) -> list[tuple[int, int]]:
    """Which exits each segment has: first place and one past the last.

    Args:
        ends: exit layers that segments end with, in order; the last one may be left out.
        exit_layers: of the cascade.

    Raises:
        ValueError: where one is not an exit, or they are not in order.
    """
    ends = list(ends)
    if ends != sorted(set(ends)) or not set(ends) <= set(exit_layers):
        raise ValueError(f"--segments must be some of the exits {list(exit_layers)}, in ascending order, got {ends}.")
    cuts = [0, *(exit_layers.index(end) + 1 for end in ends)]
    return list(pairwise([*cuts, *([] if cuts[-1] == len(exit_layers) else [len(exit_layers)])]))


class _Readiness:
    """Whether each of some applications has a replica that runs; asked of Ray Serve once a second at most."""

    def __init__(self, names: Sequence[str]):
        self.names, self.asked, self.answer = names, float("-inf"), False

    def __call__(self) -> bool:
        from ray import serve as ray_serve
        from ray.serve.schema import ReplicaState

        if time.monotonic() - self.asked > HEALTH_CHECKS:
            applications = ray_serve.status().applications
            running = [
                deployment.replica_states.get(ReplicaState.RUNNING, 0)
                for name in self.names
                if name in applications
                for deployment in applications[name].deployments.values()
            ]
            self.answer, self.asked = len(running) == len(self.names) and min(running) > 0, time.monotonic()
        return self.answer
