# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What a service tells Prometheus: exits taken, latency, queues, and whether the promise holds."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .audits import Watched


LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one service.

    Args:
        segments: names of the segments, in order.
        exit_layers: of the cascade.
    """

    def __init__(self, segments: Sequence[str], exit_layers: Sequence[int]):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("mevit_requests", "Requests answered.", ["status"], registry=registry)
        self._seconds = Histogram(
            "mevit_request_seconds", "Time of requests with an answer.", buckets=LATENCIES, registry=registry
        )
        self._exits = Counter("mevit_exits", "Images by the exit they took.", ["exit_layer"], registry=registry)
        self._borderline = Counter(
            "mevit_borderline_images", "Images with a score within 1e-4 of a threshold.", registry=registry
        )
        self._queue = Gauge("mevit_queue_images", "Images accepted and not answered yet.", registry=registry)
        inside = Gauge("mevit_segment_images", "Images waiting or running in it.", ["segment"], registry=registry)
        batch = Histogram(
            "mevit_batch_images",
            "Size of the batch that each image ran in.",
            ["segment"],
            buckets=BATCHES,
            registry=registry,
        )
        lost = Counter("mevit_restarts", "Images that a replica took with it.", ["segment"], registry=registry)
        # made here, so that each shows from the start
        self._inside = [inside.labels(segment=name) for name in segments]
        self._batch = [batch.labels(segment=name) for name in segments]
        self._lost = [lost.labels(segment=name) for name in segments]
        for layer in exit_layers:
            self._exits.labels(exit_layer=layer)

    def watch(self, watched: Callable[[], Watched]) -> None:
        """Adds what audits tell, as it is whenever Prometheus asks."""
        self._registry.register(_Audits(watched))

    def answered(self, status: int, seconds: float) -> None:
        """Counts a request. Only those with an answer count for the latency: a refusal takes no time."""
        self._requests.labels(status=status).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def left(self, exit_layer: int, borderline: bool) -> None:
        """Counts an image that has its answer."""
        self._exits.labels(exit_layer=exit_layer).inc()
        self._borderline.inc(borderline)

    def queued(self, images: int) -> None:
        """Sets how many images are accepted and not answered yet."""
        self._queue.set(images)

    def entered(self, segment: int) -> None:
        """Counts an image into a segment, by its place."""
        self._inside[segment].inc()

    def went(self, segment: int) -> None:
        """Counts an image out of a segment."""
        self._inside[segment].dec()

    def ran(self, segment: int, batch: int) -> None:
        """Tells in how large a batch an image went through a segment."""
        self._batch[segment].observe(batch)

    def lost(self, segment: int) -> None:
        """Counts an image that starts anew, since a replica died with it."""
        self._lost[segment].inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Audits(Collector):
    """Counts of a monitor, which go on where a service is started again with the same state."""

    def __init__(self, watched: Callable[[], Watched]):
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        verdict, dropped = self._watched()
        for name, text, count in (
            ("mevit_audited_images", "Images that also ran to the end.", verdict.tested),
            ("mevit_disagreements", "Those of them that got another label there.", verdict.lost),
        ):
            yield CounterMetricFamily(name, text, count)
        family = CounterMetricFamily("mevit_audits_dropped", "Audits that there are not.", labels=["reason"])
        for reason, count in dropped.items():
            family.add_metric([reason], count)
        yield family
        text = f"Evidence against the promise; {verdict.needed:g} once is an alarm."
        yield GaugeMetricFamily("mevit_promise_evidence", text, verdict.evidence)
        yield GaugeMetricFamily("mevit_promise_alarm", "1 where the promise is refuted, else 0.", int(verdict.alarm))
