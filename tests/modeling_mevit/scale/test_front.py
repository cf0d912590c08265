# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The service's HTTP, with a model in its place that takes as long as a test needs."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn

from modeling_mevit.early_exit.monitoring import PromiseMonitor
from modeling_mevit.scale.audits import Auditor
from modeling_mevit.scale.front import Front
from modeling_mevit.scale.metrics import Metrics
from modeling_mevit.scale.outcomes import Answer, Compared, Failed
from modeling_mevit.scale.requests import Limits
from tests.helpers.http_answers import Reply, as_form, as_json, encoded, running, send
from tests.helpers.images import noise


IMAGE = encoded(noise())
TOKEN = "0123456789abcdef"


@contextmanager
def served(answer: Any = None, *, seconds: float = 0.0, at_a_time: int = 100, **settings: Any) -> Iterator[str]:
    """A service that takes `seconds` for an image, and has places for so many at a time. Gives its address.

    What it answers may depend on the image, and be raised.
    """
    places = asyncio.Semaphore(at_a_time)

    async def classify(image: Any) -> Any:
        given = answer(image) if callable(answer) else answer
        if isinstance(given, Exception):
            raise given
        async with places:
            await asyncio.sleep(seconds)
        return given or Answer("teal", 0.75, 2, 0.25, False)

    settings = {"limits": Limits(1, 4, 1), "queue": 8, "deadline": 30, "token": None, **settings}
    metrics = Metrics(["4"], [2, 4])
    if "auditor" in settings:
        metrics.watch(settings["auditor"].watched)
    front = Front(classify, lambda: True, metrics, **settings)
    with serving(front) as url:
        yield url
    assert front.accepted == 0


@contextmanager
def serving(front: Front) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(front.app, http="h11", log_level="warning", access_log=False)
        with running(uvicorn.Server(config), listener):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def predict(url: str, images: int = 1, **headers: str) -> Reply:
    body, its_headers = as_form([IMAGE] * images)
    return send(f"{url}/predict", body, {**its_headers, **headers})


def test_answers_one_image_or_several():
    expected = {"label": "teal", "probability": 0.75, "exit_layer": 2, "score": 0.25}
    with served() as url:
        for pack in (as_form, as_json):
            for count in (1, 3):
                reply = send(f"{url}/predict", *pack([IMAGE] * count))
                assert (reply.status, reply.content) == (200, {"predictions": [expected] * count})


def test_tells_prometheus_of_exits_latency_and_queue():
    with served() as url:
        predict(url, images=3)
        send(f"{url}/predict", b"", {})
        lines = send(f"{url}/metrics").content.splitlines()
    for line in (
        'mevit_exits_total{exit_layer="2"} 3.0',
        'mevit_exits_total{exit_layer="4"} 0.0',
        'mevit_requests_total{status="200"} 1.0',
        'mevit_requests_total{status="400"} 1.0',
        "mevit_request_seconds_count 1.0",
        "mevit_queue_images 0.0",
        'mevit_segment_images{segment="4"} 0.0',
    ):
        assert line in lines


@pytest.mark.parametrize("path", ["/predict", "/healthz", "/metrics", "/nothing"])
def test_without_the_token_there_is_nothing(path):
    with served(token=TOKEN) as url:
        for given in ({}, {"Authorization": "Bearer 0123456789abcdeX"}, {"Authorization": TOKEN}):
            body, headers = as_form([IMAGE]) if path == "/predict" else (None, {})
            reply = send(f"{url}{path}", body, {**headers, **given})
            assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer TOKEN" in reply.content["error"]
        assert predict(url, Authorization=f"Bearer {TOKEN}").status == 200


def test_paths_and_methods_that_there_are_not():
    with served() as url:
        for method, path, status in (("GET", "/predict", 405), ("POST", "/metrics", 405), ("GET", "/../etc", 404)):
            reply = send(f"{url}{path}", None if method == "GET" else b"x", {}, method)
            assert reply.status == status and "a request must be POST /predict" in reply.content["error"]
        assert predict(url).status == 200


def test_bodies_above_the_limit_are_not_read_on():
    with served() as url:
        large = np.random.default_rng(0).bytes(1_000_001)
        reply = send(f"{url}/predict", large, {"Content-Type": "application/json"})
        assert reply.status == 413 and reply.content["error"] == "a request must have at most 1 MB, got more."
        # in parts, whose sum nobody tells beforehand
        reply = send(f"{url}/predict", iter([large[:600_000]] * 2), {"Content-Type": "application/json"})
        assert reply.status == 413
        assert predict(url).status == 200


def test_a_full_service_refuses_and_keeps_its_latency():
    def ask(_: int) -> tuple[Reply, float]:
        began = time.monotonic()
        return predict(url), time.monotonic() - began

    with served(seconds=0.2, at_a_time=1, queue=4) as url, ThreadPoolExecutor(24) as clients:
        replies = list(clients.map(ask, range(24)))
        accepted = [seconds for reply, seconds in replies if reply.status == 200]
        refused = [reply for reply, _ in replies if reply.status != 200]
        assert len(accepted) >= 4 and len(refused) > 4
        assert max(accepted) < 2.4  # the last of 4 has its answer after 0.8 s, the last of 24 would after 4.8
        for reply in refused:
            assert reply.status == 503 and reply.headers["retry-after"] == "1"
            assert reply.content["error"] == "the service is full, with 4 images at most; try again."
        # images count, not requests
        two = list(clients.map(lambda _: predict(url, images=3).status, range(2)))
        assert sorted(two) == [200, 503]


def test_an_accepted_request_is_given_up_at_its_deadline():
    with served(seconds=60, deadline=0.4) as url:
        began = time.monotonic()
        reply = predict(url)
        assert reply.status == 503 and "no answer within 0.4 s; the request was accepted" in reply.content["error"]
        assert time.monotonic() - began < 10


def test_reading_a_request_counts_for_its_deadline_and_holds_up_no_other(monkeypatch):
    read = threading.Event()
    monkeypatch.setattr("modeling_mevit.scale.front.read_images", lambda *given: read.wait(60))
    with served(deadline=0.4, queue=40) as url, ThreadPoolExecutor(40) as clients:
        replies = clients.map(lambda _: predict(url), range(40))
        time.sleep(0.2)
        began = time.monotonic()
        assert send(f"{url}/healthz").status == 200 and time.monotonic() - began < 5
        assert {reply.status for reply in replies} == {503}
        read.set()


def test_images_of_a_request_that_fails_run_no_further():
    """Else those that it leaves behind would run without a place in the queue."""
    ended = []

    async def classify(image: Any) -> Any:
        if image.name == "image 1":
            raise RuntimeError("a fault")
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(front.accepted)

    front = Front(classify, lambda: True, Metrics(["4"], [2, 4]), Limits(1, 4, 1), 8, 30, None)
    began = time.monotonic()
    with serving(front) as url:
        assert predict(url, images=3).status == 500
        assert ended == [3, 3] and front.accepted == 0 and time.monotonic() - began < 30


def test_exits_of_a_request_that_is_refused_are_not_counted():
    with served(lambda image: Failed("broken", True) if image.name == "image 2" else None) as url:
        assert predict(url, images=2).status == 400
        assert 'mevit_exits_total{exit_layer="2"} 0.0' in send(f"{url}/metrics").content.splitlines()


def test_a_body_that_does_not_arrive_is_not_waited_for():
    with served(deadline=0.3) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(("is_clients_fault", "status"), [(True, 400), (False, 503)])
def test_what_cannot_be_answered_says_whose_fault_it_is(is_clients_fault, status):
    with served(Failed("image 1 cannot be read: truncated", is_clients_fault)) as url:
        reply = predict(url)
        assert reply.status == status and reply.content == {"error": "image 1 cannot be read: truncated."}
        assert reply.headers.get("retry-after") == (None if is_clients_fault else "1")


def test_a_fault_of_the_service_tells_nothing_of_it(caplog):
    with served(object()) as url:
        reply = predict(url)
        assert reply.status == 500
        assert reply.content == {"error": "the service failed to answer this request."}
        assert send(f"{url}/healthz").content == {"status": "ready"}


# Audits


def auditing(seconds: float, places: int = 8, audit: float = 1.0) -> Auditor:
    """Audits that take `seconds`, and all disagree."""

    async def compare(image: Any) -> Compared:
        await asyncio.sleep(seconds)
        return Compared(1, 2)

    return Auditor(PromiseMonitor(0.02, audit=audit), compare, places, deadline=30)


def metrics_of(url: str) -> dict[str, float]:
    """Line → number."""
    lines = send(f"{url}/metrics").content.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_no_answer_waits_for_an_audit():
    auditor = auditing(seconds=20)
    with served(auditor=auditor) as url:
        began = time.monotonic()
        assert predict(url, images=3).status == predict(url).status == 200
        assert time.monotonic() - began < 10
        assert auditor.waiting == 4 and metrics_of(url)["mevit_audited_images_total"] == 0


def test_prometheus_is_told_what_audits_find():
    with served() as url:
        predict(url)
        assert not [name for name in metrics_of(url) if "audit" in name or "promise" in name]
    auditor = auditing(seconds=0)
    with served(auditor=auditor) as url:
        before = metrics_of(url)
        for _ in range(4):
            predict(url, images=4)
        while auditor.waiting:
            time.sleep(0.01)
        after = metrics_of(url)
    names = ("mevit_audited_images_total", "mevit_disagreements_total", "mevit_promise_alarm")
    assert [before[name] for name in names] == [0, 0, 0] and [after[name] for name in names] == [16, 16, 1]
    assert before["mevit_promise_evidence"] == pytest.approx(1) and after["mevit_promise_evidence"] > 20
    assert after['mevit_exits_total{exit_layer="2"}'] == 16  # of answers alone


def test_where_the_backlog_is_full_audits_are_dropped_and_requests_are_not():
    auditor = auditing(seconds=60, places=5)
    with served(auditor=auditor) as url:
        assert {predict(url).status for _ in range(20)} == {200}
        counted = metrics_of(url)
    assert auditor.monitor.counts["seen"] == 20 and auditor.dropped["busy"] == 15
    assert counted['mevit_audits_dropped_total{reason="busy"}'] == 15
    assert counted['mevit_requests_total{status="200"}'] == 20


def test_an_overloaded_service_audits_nothing_more():
    auditor = auditing(seconds=0, places=100)
    with served(seconds=1, queue=4, auditor=auditor) as url, ThreadPoolExecutor(3) as clients:
        three = [clients.submit(predict, url) for _ in range(3)]
        while auditor.monitor.counts["seen"] < 3:
            time.sleep(0.01)
        replies = [predict(url), *(one.result() for one in three)]
        assert {reply.status for reply in replies} == {200}
    # the fourth came beside three others, which is more than half of the queue
    assert auditor.dropped["busy"] == 1 and auditor.monitor.counts["seen"] == 4


@pytest.mark.parametrize("answer", [None, Failed("image 1 cannot be read: truncated", True), "late"])
def test_what_becomes_of_a_request_does_not_decide_on_its_audit(answer):
    auditor = auditing(seconds=0)
    settings = {"seconds": 60, "deadline": 0.2} if answer == "late" else {"answer": answer}
    with served(auditor=auditor, **settings) as url:
        predict(url)
        while auditor.waiting:
            time.sleep(0.01)
    assert auditor.monitor.counts["audited"] == 1


def test_what_is_refused_is_not_audited():
    auditor = auditing(seconds=0)
    with served(auditor=auditor) as url:
        predict(url, images=5)  # of 4
        send(f"{url}/predict", b"x", {"Content-Type": "application/json"})
    assert auditor.monitor.counts["seen"] == 0
