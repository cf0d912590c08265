# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's clients and tables; what it measures is tested where it is."""

import asyncio
import socket
import time

import pytest


pytest.importorskip("ray", reason="needs the extra mevit[scale]")

import uvicorn

import serving
import serving_clients
from modeling_mevit.scale.front import Front
from modeling_mevit.scale.metrics import Metrics
from modeling_mevit.scale.outcomes import Answer
from modeling_mevit.scale.requests import Limits
from tests.helpers.http import running


pytestmark = pytest.mark.one_major


def test_clients_count_answers_refusals_and_what_is_lost(tmp_path):
    serving.gather_images(tmp_path / "images", None, 30)
    asked = []

    async def classify(image):
        await asyncio.sleep(0.02)
        asked.append(image)
        if len(asked) % 10 == 0:
            raise RuntimeError("a fault")
        return Answer("teal", 0.75, 2, 0.25, False)

    front = Front(classify, lambda: True, Metrics(["4"], [2, 4]), Limits(), 3, 30, None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(front.app, http="h11", log_level="critical", access_log=False)
        with running(uvicorn.Server(config), listener):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            counted = serving_clients.main(url, str(tmp_path / "images"), 8, 1.0)
    assert counted["lost"] == len(asked) // 10 > 0  # the service's own faults
    assert counted["refused"] > 0  # 8 clients, 3 places
    assert 0 < counted["answers"] <= len(asked) and counted["per_second"] == pytest.approx(counted["answers"], rel=0.5)
    assert 20 <= counted["p50"] <= counted["p99"]


def test_a_client_that_gets_no_answer_counts_it(tmp_path):
    serving.gather_images(tmp_path / "images", None, 12)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        answers: list = []
        serving_clients.ask(url, [b"x"], 0, time.monotonic() + 0.05, answers)
    assert answers and {status for *_, status in answers} == {0}


def test_images_are_as_many_as_asked_for(tmp_path):
    files = serving.gather_images(tmp_path / "drawn", None, 30)
    assert len(files) == 30 and len({file.read_bytes() for file in files}) == 24  # two of each class, then again
    again = serving.gather_images(tmp_path / "copied", str(tmp_path / "drawn"), 5)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files[:5]]


def test_tables_tell_what_was_measured():
    row = {"name": "cascade", "segments": [6], "killed": 2, "per_second": 20.04, "p50": 1500.4, "p99": 2000, "lost": 0}
    results = {
        "score": {
            "images": 1000,
            "loop_images_per_second": [50.0, 52.0],
            "score_images_per_second": 49.0,
            "overhead": 0.0408,
            "other_answers": 1,
            "sentence": "Scored 1,000 images.",
        },
        "memory": {"images": 20_000, "peak_mib_by_tenth": [700.2, 701.0]},
        "serve": [{**row, "refused": 3}],
        "states": [{"after_exit": 6, "bytes": 102_400, "goes_on": 0.251}],
    }
    text = serving.tables(results)
    assert "49.0 images a second while its actors run, plain loop 50.0, 52.0: overhead 4.1%; 1 of 1000" in text
    assert "Memory over 20,000 images, MiB in each tenth of the time: 700, 701" in text
    assert "| cascade [6] | 20.0 | 1500 | 2000 | 3 | 0 | 2 |" in text and "| 6 | 100 | 25.1% |" in text


def test_unknown_parts_are_named():
    with pytest.raises(ValueError, match="parts must be some of score, memory, serve, states, got speed"):
        serving.ServingBenchmarkArguments(export="out", parts="score,speed")
