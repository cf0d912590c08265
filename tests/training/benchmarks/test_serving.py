# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark's clients and tables; what it measures is tested where it is."""

import asyncio
import socket
import time
from pathlib import Path

import pytest


pytest.importorskip("ray", reason="needs the extra mevit[scale]")

import uvicorn

import serving
import serving_clients
from modeling_mevit.scale.front import Front
from modeling_mevit.scale.metrics import Metrics
from modeling_mevit.scale.outcomes import Answer, Failed
from modeling_mevit.scale.requests import Limits
from modeling_mevit.scale.results import ScoringReport, Summary
from tests.helpers.http_answers import running


pytestmark = pytest.mark.one_major


def test_clients_tell_refusals_from_what_is_given_up_and_lost(tmp_path):
    serving.gather_images(tmp_path / "images", None, 30)
    asked = []

    async def classify(image):
        await asyncio.sleep(0.02)
        asked.append(image)
        if len(asked) % 10 == 0:
            raise RuntimeError("a fault")
        if len(asked) % 10 == 5:
            return Failed("replicas died 5 times with image 1", is_clients_fault=False)
        return Answer("teal", 0.75, 2, 0.25, False)

    front = Front(classify, lambda: True, Metrics(["4"], [2, 4]), Limits(), 3, 30, None)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(front.app, http="h11", log_level="critical", access_log=False)
        with running(uvicorn.Server(config), listener):
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            counted = serving_clients.main(url, str(tmp_path / "images"), 8, 1.0)
    assert counted["lost"] == len(asked) // 10 > 0  # the service's own faults
    assert counted["given_up"] == (len(asked) + 5) // 10 > 0  # accepted, and not answered
    assert counted["refused"] > 0  # 8 clients, 3 places
    assert counted["reasons"] == {
        "the service failed to answer this request.": counted["lost"],
        "replicas died 5 times with image 1.": counted["given_up"],
        "the service is full, with 3 images at most; try again.": counted["refused"],
    }
    assert 0 < counted["answers"] <= len(asked) and counted["per_second"] == pytest.approx(counted["answers"], rel=0.5)
    assert 20 <= counted["p50"] <= counted["p99"]


def test_a_client_that_gets_no_answer_counts_it(tmp_path):
    serving.gather_images(tmp_path / "images", None, 12)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        asked: list[serving_clients.Asked] = []
        serving_clients.ask(url, [b"x"], 0, time.monotonic() + 0.05, asked)
    assert asked and {(one.status, one.reason, one.outcome) for one in asked} == {
        (0, "ConnectionRefusedError", "lost")
    }


def test_images_are_as_many_as_asked_for(tmp_path):
    files = serving.gather_images(tmp_path / "drawn", None, 30)
    assert len(files) == 30 and len({file.read_bytes() for file in files}) == 24  # two of each class, then again
    again = serving.gather_images(tmp_path / "copied", str(tmp_path / "drawn"), 5)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files[:5]]


def test_tables_tell_what_was_measured():
    row = {"name": "cascade", "segments": [6], "killed": 2, "per_second": 20.04, "p50": 1500.4, "p99": 2000, "lost": 0}
    row |= {"given_up": 1, "reasons": {"no answer within 30 s.": 1}}
    results = {
        "score": {
            "images": 1000,
            "image_bytes": 4000.0,
            "images_per_second_per_core": 24.5,
            "loop_images_per_second": [50.0, 52.0],
            "score_images_per_second": 49.0,
            "overhead": 0.0408,
            "other_answers": 1,
            "sentence": "Scored 1,000 images.",
            "audited": {"images_per_second": 47.25, "sentence": "Audited 50 images."},
        },
        "memory": {"images": 20_000, "peak_mib_by_tenth": [700.2, 701.0]},
        "serve": [{**row, "refused": 3}],
        "states": [{"after_exit": 6, "bytes": 102_400, "goes_on": 0.251, "bytes_per_image": 25_702.4}],
    }
    text = serving.tables(results)
    assert "49.0 images a second while its actors run (24.5 per core), plain loop 50.0, 52.0: overhead 4.1%" in text
    assert "With an audit 47.2 a second. Audited 50 images." in text
    assert "Memory over 20,000 images, MiB in each tenth of the time: 700, 701" in text
    assert "| cascade [6] | 20.0 | 1500 | 2000 | 3 | 1 | 0 | 2 |" in text and "| 6 | 100 | 25.1% | 25.1 |" in text
    assert "Not answered: 1 × no answer within 30 s." in text


def test_a_sentence_names_no_temporary_directory():
    report = ScoringReport("photos", "/tmp/a1/scores", Summary(), 3, 1.0, 0.0, {6: 1.0}, None)
    assert serving.sentence(report, Path("/tmp/a1")) == "All 3 images of photos are in scores already."


def test_growth_is_arithmetic_on_what_was_measured():
    results = {
        "score": {"score_images_per_second": 50.0, "image_bytes": 4000.0},
        "serve": [
            {"name": "cascade", "segments": [], "killed": 0, "per_second": 40.0},
            {"name": "cascade in segments", "segments": [6, 9, 12], "killed": 0, "per_second": 30.0},
            {"name": "cascade in segments, replicas killed", "segments": [6, 9, 12], "killed": 3, "per_second": 20.0},
        ],
        "states": [
            {"after_exit": 6, "bytes_per_image": 50_000},
            {"after_exit": 8, "bytes_per_image": 40_000},
            {"after_exit": 9, "bytes_per_image": 10_000},
        ],
        "front": {"per_second": 500.0},
    }
    rows = serving.growth(results)
    assert [row["machines"] for row in rows["scoring"]] == [1, 10, 1000] and len(rows["serving"]) == 6
    last = rows["scoring"][-1]
    assert last["images_per_second"] == 50_000 and last["hours_for_many"] == pytest.approx(200 / 3600)
    assert last["mb_per_second_read"] == 200 and last["blocks_per_second"] == pytest.approx(50_000 / 2048)
    whole, cut = rows["serving"][-2:]
    assert (whole["fronts"], whole["mb_per_second_moved"]) == (80, 0)
    assert (cut["fronts"], cut["bytes_moved_per_image"]) == (60, 60_000)  # of the exits it is cut at
    assert (cut["mb_per_second_moved"], cut["mb_per_second_moved_by_machine"]) == (1800, 1.8)
    text = serving.tables({"growth": rows})
    assert "| 1,000 | 50,000 | 0.06 | 200.0 | 24.41 |" in text
    assert "| cascade in segments | 1,000 | 30,000 | 58.6 | 1,800.0 | 1.80 | 60 |" in text
    assert serving.tables({"growth": serving.growth({})}) == ""


def test_the_process_that_speaks_http_is_measured_without_a_model(tmp_path):
    arguments = serving.ServingBenchmarkArguments(export="", count=12, clients=2, seconds=0.5)
    measured = serving.measure_front(arguments, tmp_path)
    assert measured["answers"] > 0 and measured["reasons"] == {}


def test_unknown_parts_are_named():
    with pytest.raises(ValueError, match="parts must be some of score, memory, serve, states, front, got speed"):
        serving.ServingBenchmarkArguments(export="out", parts="score,speed")
