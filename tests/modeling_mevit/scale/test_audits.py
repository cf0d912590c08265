# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Audits of a service, without the service."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from modeling_mevit.early_exit.monitoring import PromiseMonitor
from modeling_mevit.scale import audits
from modeling_mevit.scale.audits import AT_A_TIME, Auditor, kept_in
from modeling_mevit.scale.metrics import Metrics
from modeling_mevit.scale.outcomes import Audited, Compared, Failed, Lost, Told
from modeling_mevit.scale.scorers import NamedContent, promise_monitor
from modeling_mevit.scale.segments import Pipeline


IMAGES = [NamedContent(b"", f"image {number}") for number in range(12)]
AGREES, DISAGREES = Compared(1, 1), Compared(1, 2)


def audited(compare: Any, *, places: int = 64, images: Any = IMAGES, **settings: Any) -> Auditor:
    """An auditor that has audited what it chose of one request with these images."""
    settings = {"monitor": PromiseMonitor(0.02, audit=1.0), "deadline": 5, **settings}

    async def run() -> Auditor:
        auditor = Auditor(settings.pop("monitor"), compare, places, **settings)
        auditor.begin(auditor.choose(images, is_busy=False))
        while auditor.waiting or auditor._saving is not None and not auditor._saving.done():
            await asyncio.sleep(0.005)
        return auditor

    return asyncio.run(run())


def counts(auditor: Auditor) -> tuple[int, int, dict[str, int]]:
    counted = auditor.monitor.counts
    return counted["audited"], counted["disagreements"], auditor.dropped


async def agree(image: Any) -> Compared:
    return AGREES


def test_all_that_is_drawn_is_compared():
    async def compare(image: Any) -> Compared:
        return DISAGREES if image in IMAGES[:3] else AGREES

    assert counts(audited(compare)) == (12, 3, {"busy": 0, "failed": 0})
    drawn = PromiseMonitor(0.02, audit=0.5, seed=3).draw(12)
    given = counts(audited(compare, monitor=PromiseMonitor(0.02, audit=0.5, seed=3)))
    assert 0 < drawn[:3].sum() < drawn.sum() < 12
    assert given == (drawn.sum(), drawn[:3].sum(), {"busy": 0, "failed": 0})


def test_few_run_at_a_time():
    running: list[int] = []
    at_once = 0

    async def compare(image: Any) -> Compared:
        nonlocal at_once
        at_once += 1
        running.append(at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        return AGREES

    assert counts(audited(compare))[0] == 12 and max(running) == AT_A_TIME


def test_where_no_place_is_free_or_the_service_is_busy_audits_are_dropped():
    async def run() -> None:
        auditor = Auditor(PromiseMonitor(0.02, audit=1.0), agree, places=5, deadline=5)
        assert auditor.choose(IMAGES[:4], is_busy=True) == []
        assert auditor.choose(IMAGES[:4], is_busy=False) == IMAGES[:4]
        chosen = auditor.choose(IMAGES[4:8], is_busy=False)  # while the first four wait
        assert chosen == IMAGES[4:5] and auditor.dropped == {"busy": 7, "failed": 0}
        auditor.begin(chosen)
        await asyncio.sleep(0.02)
        assert auditor.waiting == 4 and auditor.monitor.counts["audited"] == 1
        assert len(auditor.choose(IMAGES, is_busy=False)) == 1
        assert auditor.monitor.counts["seen"] == 24

    asyncio.run(run())


@pytest.mark.parametrize("what", ["raises", "replies", "hangs"])
def test_an_audit_that_fails_is_counted_and_told(what, caplog):
    async def compare(image: Any) -> Any:
        if image in IMAGES[:2]:
            if what == "raises":
                raise RuntimeError("a fault")
            if what == "hangs":
                await asyncio.sleep(60)
            return Failed("a fault", is_clients_fault=False)
        return AGREES

    assert counts(audited(compare, deadline=0.1)) == (10, 0, {"busy": 0, "failed": 2})
    assert caplog.text.count("an audit failed: ") == 2


def test_a_damaged_image_is_neither_audited_nor_dropped(caplog):
    async def compare(image: Any) -> Failed:
        return Failed("image 1 cannot be read", is_clients_fault=True)

    assert counts(audited(compare)) == (0, 0, {"busy": 0, "failed": 0}) and not caplog.text


def test_an_alarm_is_told_once_when_it_rises(caplog):
    async def compare(image: Any) -> Compared:
        return DISAGREES

    auditor = audited(compare)
    assert auditor.monitor.alarm
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "disagreement: 100.00% of" in record.message and "ALARM since image" in record.message


def test_the_state_is_saved_while_the_service_runs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(audits, "SAVED_AFTER", 0.01)
    file = tmp_path / "monitor.json"
    auditor = audited(agree, file=file)
    saved = PromiseMonitor(0.02)
    saved.restore(file)
    assert 0 < saved.counts["audited"] <= 12 == auditor.monitor.counts["audited"]
    # a disk that is full stops nothing
    audited(agree, file=tmp_path / "missing" / "monitor.json")
    assert "the audit's state cannot be written: " in caplog.text


def test_a_state_outlives_the_service(tmp_path):
    file = tmp_path / "state" / "monitor.json"
    for run in (1, 2):
        monitor = PromiseMonitor(0.02)
        with kept_in(file, monitor):
            monitor.update([1, 2], [1, 3])
            assert json.loads(file.read_text())["counts"] != monitor.state()["counts"]
        assert (monitor.counts["audited"], monitor.counts["disagreements"]) == (2 * run, run)
    assert list(file.parent.iterdir()) == [file]


def test_a_state_that_cannot_be_kept_is_told(tmp_path):
    file = tmp_path / "monitor.json"
    with (
        kept_in(file, PromiseMonitor(0.02)),
        pytest.raises(ValueError, match="another mevit command is writing to"),
        kept_in(file, PromiseMonitor(0.02)),
    ):
        pass
    with pytest.raises(ValueError, match="must be of the same promise"), kept_in(file, PromiseMonitor(0.1)):
        pass
    with pytest.raises(ValueError, match="--audit-state must be a file, got the directory"):
        kept_in(tmp_path, PromiseMonitor(0.02)).__enter__()
    file.write_text("x")
    with pytest.raises(ValueError, match="must be JSON"), kept_in(file, PromiseMonitor(0.02)):
        pass
    assert file.read_text() == "x"


# What is watched


def export(directory: Path, **change: Any) -> str:
    """What of an export tells its promise."""
    target, point = {"max_disagreement": 0.02, "confidence": 0.95}, {"thresholds": [0.3]}
    calibration = {"target": target, "operating_point": point}
    config = {"early_exit": True, "exit_thresholds": [0.3], "calibration": calibration, **change}
    (directory / "cascade.json").write_text("{}")
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def test_the_promise_is_that_of_the_calibration_or_is_given(tmp_path):
    monitor = promise_monitor(export(tmp_path), 0.3, seed=4)
    assert (monitor.audit, monitor.seed, monitor.disagreement.limit) == (0.3, 4, 0.02)
    assert monitor.disagreement.allowed == "was promised"
    for calibration in ({"calibration": None}, {}):
        monitor = promise_monitor(export(tmp_path, **calibration), 0.3, 0.1)
        assert (monitor.disagreement.limit, monitor.disagreement.allowed) == (0.1, "is allowed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibration": None}, r"--audit needs a promise in .*, or --max-disagreement: .* has no calibration"),
        (
            {"calibration": {"target": {"max_cost": 0.5}, "operating_point": {}}},
            r"--audit needs a promise in .*, or --max-disagreement: .* was calibrated for max_cost=0.5",
        ),
        ({"calibration": ["x"]}, "the calibration in the config must be an object"),
        ({"exit_thresholds": [0.4]}, "its thresholds are not those that were calibrated"),
        ({"early_exit": False}, r"--audit .* must be left out where early exit is off, as it is in "),
    ],
)
def test_without_a_promise_there_is_nothing_to_watch(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        promise_monitor(export(tmp_path, **change), 0.01)


# From segment to segment


class Segments:
    """What calls the replicas of one segment, which tell one thing after another."""

    def __init__(self, *told: Any):
        self.told, self.given = list(told), []
        self.audit = self

    async def remote(self, given: Any) -> Told:
        self.given.append(given)
        return Told(self.told.pop(0), 0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_exit_that_an_image_took_is_remembered_to_the_end(place):
    early = [3 if place == segment else None for segment in range(3)]
    segments = [
        Segments(Audited(["a"], early[0])),
        Segments(Audited(["b"], early[1])),
        Segments(Compared(early[2], 4)),
    ]
    pipeline = Pipeline(segments, Metrics(["2", "3", "4"], [2, 3, 4]))
    assert asyncio.run(pipeline.audit(IMAGES[0])) == Compared(3, 4)
    assert [segment.given for segment in segments] == [[IMAGES[0]], [["a"]], [["b"]]]


def test_an_audit_starts_anew_where_a_replica_dies_with_it():
    first, last = Segments(Audited(["a"], 3), Audited(["b"], None)), Segments(Lost(), Compared(2, 4))
    pipeline = Pipeline([first, last], Metrics(["2", "4"], [2, 4]))
    assert asyncio.run(pipeline.audit(IMAGES[0])) == Compared(2, 4)  # of the second run alone
    assert first.given == [IMAGES[0]] * 2
    lost = Pipeline([Segments(*[Lost()] * 5)], Metrics(["4"], [4]))
    assert asyncio.run(lost.audit(IMAGES[0])) == Failed("replicas died 5 times with image 0", is_clients_fault=False)
