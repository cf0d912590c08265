# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import ast
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from modeling_mevit import CalibrationTarget, PromiseMonitor
from modeling_mevit.early_exit import monitoring
from modeling_mevit.early_exit.calibration import CalibrationResult
from modeling_mevit.early_exit.monitoring import Evidence, upper_bound
from modeling_mevit.early_exit.predictions import OperatingPoint
from tests.helpers.models import thirds_as_thresholds, tiny_model


pytestmark = pytest.mark.one_major


def alarms(outcomes: np.ndarray, limit: float, lowest: int = 0) -> np.ndarray:
    """(S,): after how many outcomes (S, T) there is an alarm; 0 where there is none."""
    evidence = Evidence(limit, lowest, shape=outcomes.shape[:1])
    found = np.zeros(len(outcomes), dtype=int)
    for place, column in enumerate(outcomes.T, start=1):
        evidence.add({outcome: (column == outcome).astype(int) for outcome in range(lowest, 2)})
        found[(found == 0) & (evidence.value >= 20)] = place
    return found


def feed(monitor: PromiseMonitor, disagreements: int, agreements: int = 0) -> None:
    """Counts audited images, those that disagree first."""
    monitor.update(early=[1] * disagreements + [0] * agreements, full=[0] * (disagreements + agreements))


def calibration(**settings) -> dict:
    """As a config holds it, of 600 images of which 3 disagree, unless told otherwise."""
    disagreements, num_samples = settings.pop("disagreements", 3), settings.pop("num_samples", 600)
    point = OperatingPoint("margin", [0.5], num_samples, 0.9, 0.9, 0.7, 2, 1, disagreements, {2: 1, 4: 1})
    target = CalibrationTarget(**settings)
    config = tiny_model().config
    CalibrationResult(target, point, made_for={"promise": "abc"}).apply_to(config)
    return config.calibration


class TestEvidence:
    @pytest.mark.parametrize("blocks", [[1] * 9, [3, 3, 3], [1, 5, 2, 1], [9]])
    def test_is_one_on_average_where_the_rate_is_the_limit(self, blocks):
        """All that a false alarm's bound needs, computed over every sequence that there is."""
        limit, expected = 0.2, 0.0
        for counts in itertools.product(*(range(size + 1) for size in blocks)):
            evidence, probability = Evidence(limit, 0), 1.0
            for size, ones in zip(blocks, counts, strict=True):
                evidence.add({1: ones, 0: size - ones})
                probability *= binom.pmf(ones, size, limit)
            expected += probability * evidence.value
        assert expected == pytest.approx(1, abs=1e-9)

    @pytest.mark.parametrize("harm", [0.1, 0.3, 0.55])
    def test_is_one_on_average_where_the_drop_is_the_limit(self, harm):
        limit, expected = 0.1, 0.0
        probabilities = {1: harm, 0: 1 - 2 * harm + limit, -1: harm - limit}
        for outcomes in itertools.product((1, 0, -1), repeat=7):
            evidence = Evidence(limit, -1)
            for outcome in outcomes:
                evidence.add({outcome: 1})
            expected += math.prod(probabilities[outcome] for outcome in outcomes) * evidence.value
        assert expected == pytest.approx(1, abs=1e-9)

    def test_falls_where_the_rate_is_below_the_limit(self):
        calm = Evidence(0.2, 0)
        expected = 0.0
        for ones in range(31):
            calm = Evidence(0.2, 0)
            calm.add({1: ones, 0: 30 - ones})
            expected += binom.pmf(ones, 30, 0.15) * calm.value
        assert expected < 0.95

    @pytest.mark.slow
    @pytest.mark.parametrize(("limit", "harm", "correction"), [(0.01, 0.01, 0.0), (0.02, 0.05, 0.03)])
    def test_false_alarms_are_rare_however_long_one_looks(self, limit, harm, correction):
        """500 streams of 10,000 audited images, all at the limit."""
        draws = np.random.default_rng(0).random((500, 10_000))
        outcomes = np.where(draws < harm, 1, np.where(draws < harm + correction, -1, 0))
        found = alarms(outcomes, limit, lowest=-1 if correction else 0)
        assert 0 < (found > 0).sum() <= 25

    def test_twice_the_limit_is_noticed(self):
        draws = np.random.default_rng(1).random((100, 2500))
        found = alarms((draws < 0.04).astype(int), 0.02)
        assert (found > 0).mean() > 0.95 and np.median(found) < 700

    def test_a_change_after_a_long_calm_is_noticed(self):
        """Gamblers of the first hour have lost what they had by then; those who begin later have not."""
        draws = np.random.default_rng(2).random((40, 4500))
        rates = np.where(np.arange(4500) < 4000, 0.01, 0.1)
        found = alarms((draws < rates).astype(int), 0.02)
        assert (found > 4000).all() and np.median(found) < 4250

    def test_nothing_overflows(self):
        evidence = Evidence(0.001, 0)
        for _ in range(3):
            evidence.add({1: 10_000, 0: 0})
        evidence.add({1: 0, 0: 10_000_000})
        evidence.add({1: 10_000, 0: 0})
        assert np.isfinite(evidence.capital).all() and evidence.value > 1e250

    def test_streams_side_by_side_are_those_one_by_one(self):
        outcomes = (np.random.default_rng(3).random((3, 50)) < 0.3).astype(int)
        together = Evidence(0.1, 0, shape=(3,))
        for column in outcomes.T:
            together.add({1: column, 0: 1 - column})
        for stream, value in zip(outcomes, together.value, strict=True):
            alone = Evidence(0.1, 0)
            for outcome in stream:
                alone.add({1: outcome, 0: 1 - outcome})
            assert alone.value == pytest.approx(value, rel=1e-12)


class TestAudits:
    def test_are_a_random_share(self):
        monitor = PromiseMonitor(0.01, audit=0.05, seed=7)
        drawn = np.concatenate([monitor.draw(count) for count in (1, 0, 32, 9967)])
        assert drawn.dtype == bool and 400 < drawn.sum() < 600
        assert monitor.counts["seen"] == 10_000
        again = PromiseMonitor(0.01, audit=0.05, seed=7)
        assert np.array_equal(drawn, np.concatenate([again.draw(count) for count in (1, 0, 32, 9967)]))
        assert not np.array_equal(drawn[33:], PromiseMonitor(0.01, audit=0.05, seed=8).draw(9967))

    def test_differ_from_batch_to_batch_and_after_a_restart(self, tmp_path):
        monitor = PromiseMonitor(0.01, audit=0.5, seed=0)
        first, second = monitor.draw(200), monitor.draw(200)
        assert not np.array_equal(first, second)
        monitor.save(tmp_path / "state.json")
        restored = PromiseMonitor(0.01, audit=0.5, seed=0)
        restored.restore(tmp_path / "state.json")
        third = restored.draw(200)
        assert np.array_equal(third, monitor.draw(200)) and not np.array_equal(third, first)

    def test_replicas_draw_differently(self):
        first, second = (PromiseMonitor(0.01, audit=0.5) for _ in range(2))
        assert first.replica != second.replica and not np.array_equal(first.draw(200), second.draw(200))

    def test_a_replica_has_the_promise_and_nothing_else(self):
        promise = {"target": {"max_disagreement": 0.02, "confidence": 0.9}, "operating_point": {"thresholds": [0.1]}}
        monitor = PromiseMonitor.from_calibration(promise, audit=0.3, confidence=0.8)
        monitor.update([1], [2])
        replica = monitor.for_replica(seed=3)
        assert (replica.audit, replica.seed, replica.counts["audited"]) == (0.3, 3, 0)
        assert str(replica.disagreement) == "disagreement: nothing tested; at most 2.00% was promised."
        replica.update([1, 1], [1, 3])
        monitor.merge(replica.state())  # which other promises are refused for
        assert (monitor.counts["audited"], monitor.counts["disagreements"]) == (3, 2)
        assert monitor.for_replica().replica != replica.replica

    def test_all_images_can_be_audited(self):
        assert PromiseMonitor(0.01, audit=1).draw(1000).all()


class TestVerdicts:
    def test_an_alarm_is_raised_and_stays(self):
        monitor = PromiseMonitor(0.02)
        feed(monitor, 1, 99)
        assert not monitor.alarm and monitor.disagreement.alarm_at is None
        feed(monitor, 9)
        verdict = monitor.disagreement
        assert verdict.alarm and 100 < verdict.alarm_at <= 109
        assert verdict.needed == pytest.approx(20) and verdict.evidence >= 20
        assert (verdict.tested, verdict.lost) == (109, 10) and verdict.rate == pytest.approx(10 / 109)
        feed(monitor, 0, 3000)
        assert monitor.alarm and monitor.disagreement.alarm_at == verdict.alarm_at
        assert monitor.disagreement.evidence < 20

    def test_tell_what_is_tested_and_what_an_alarm_means(self):
        monitor = PromiseMonitor.from_calibration(calibration(max_disagreement=0.02, confidence=0.95))
        assert str(monitor) == "disagreement: nothing tested; at most 2.00% was promised."
        feed(monitor, 1, 99)
        assert str(monitor).startswith("disagreement: 1.00% of 100 images; at most 2.00% was promised. No alarm")
        feed(monitor, 20)
        assert "ALARM since image" in str(monitor) and "calibrate again" in str(monitor)
        assert "accuracy drop" not in str(monitor)
        monitor.update_labels(early=[1, 0], full=[0, 0], labels=[0, -1])
        assert "\naccuracy drop: 50.00% of 2 images; at most 2.00% was promised. No alarm" in str(monitor)

    def test_count_a_batch_as_they_count_its_images(self):
        together, alone = (PromiseMonitor(0.05) for _ in range(2))
        early, full = np.random.default_rng(0).integers(0, 3, (2, 40))
        together.update(early, full)
        for one, other in zip(early, full, strict=True):
            alone.update([one], [other])
        assert together.disagreement == alone.disagreement

    def test_take_tensors(self):
        monitor = PromiseMonitor(0.05)
        monitor.update(early=torch.tensor([1, 2]), full=torch.tensor([1, 3]))
        monitor.update(early=[], full=[])
        assert (monitor.counts["audited"], monitor.counts["disagreements"]) == (2, 1)

    def test_tell_which_images_of_a_batch_were_audited_last(self):
        monitor = PromiseMonitor(0.05, audit=0.5, seed=0)
        drawn = monitor.draw(10)
        assert 1 < drawn.sum() < 10 and not len(monitor.last_audit.images)
        monitor.update(early=np.arange(drawn.sum()), full=[7] * drawn.sum())
        images, early, full = monitor.last_audit
        assert images.tolist() == np.flatnonzero(drawn).tolist() and early.tolist() == list(range(drawn.sum()))
        assert set(full.tolist()) == {7}

    @pytest.mark.parametrize(
        ("early", "full", "message"),
        [
            ([1, 2], [1], r"full must have as many labels as early, 2, got 1"),
            ([0.5], [1], r"early must be one whole number for each image, got \[0.5\]"),
            ([[1, 2]], [1], "early must be one whole number for each image"),
        ],
    )
    def test_malformed_labels_are_named(self, early, full, message):
        monitor = PromiseMonitor(0.05)
        with pytest.raises(ValueError, match=message):
            monitor.update(early, full)
        assert monitor.counts["audited"] == 0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_disagreement": 0}, "max_disagreement must be between 0 and 1, got 0"),
            ({"max_disagreement": 0.1, "max_accuracy_drop": 1.0}, "max_accuracy_drop must be between 0 and 1"),
            ({"max_disagreement": 0.1, "audit": 0}, "audit must be above 0 and at most 1, got 0"),
            ({"max_disagreement": 0.1, "confidence": 1}, "confidence must be between 0 and 1, got 1"),
            ({"max_disagreement": 0.1, "seed": -1}, "seed must be a whole number"),
        ],
    )
    def test_settings_out_of_range_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            PromiseMonitor(**settings)


class TestDrop:
    def test_is_harm_less_correction(self):
        monitor = PromiseMonitor(0.3)
        monitor.update_labels(early=[1, 1, 1, 1], full=[1, 2, 2, 2], labels=[0, 2, 1, 3])
        counts = monitor.counts
        assert (counts["labelled"], counts["harms"], counts["corrections"]) == (4, 1, 1)
        assert monitor.accuracy_drop.lost == 0 and monitor.disagreement.tested == 0

    def test_labels_of_images_that_agree_are_not_looked_at(self):
        first, second = (PromiseMonitor(0.3) for _ in range(2))
        first.update_labels([1, 1, 2], [1, 2, 2], [1, 2, 2])
        second.update_labels([1, 1, 2], [1, 2, 2], [-1, 2, -1])
        assert first.accuracy_drop == second.accuracy_drop

    def test_disagreement_without_a_drop_raises_its_own_alarm_alone(self):
        """The two answers differ often, and are right equally often."""
        monitor = PromiseMonitor(0.02)
        labels = np.arange(400) % 2
        early, full = np.zeros(400, int), np.ones(400, int)
        agree = np.arange(400) % 10 > 1
        full[agree] = 0
        monitor.update(early, full)
        monitor.update_labels(early, full, labels)
        assert monitor.disagreement.alarm and monitor.alarm and not monitor.accuracy_drop.alarm

    def test_a_drop_raises_its_alarm(self):
        monitor = PromiseMonitor(0.5, max_accuracy_drop=0.02)
        full = np.zeros(300, int)
        early = (np.arange(300) % 10 == 0).astype(int)
        monitor.update(early, full)
        monitor.update_labels(early, full, full)
        assert monitor.accuracy_drop.alarm and not monitor.disagreement.alarm


class TestPromises:
    def test_a_disagreement_is_the_limit_of_both(self):
        monitor = PromiseMonitor.from_calibration(calibration(max_disagreement=0.02, confidence=0.95), audit=0.5)
        assert (monitor.disagreement.limit, monitor.accuracy_drop.limit, monitor.audit) == (0.02, 0.02, 0.5)
        assert monitor.disagreement.allowed == "was promised"

    def test_a_drop_that_the_disagreement_vouches_for(self):
        monitor = PromiseMonitor.from_calibration(calibration(max_accuracy_drop=0.02, confidence=0.95))
        assert (monitor.disagreement.limit, monitor.accuracy_drop.limit) == (0.02, 0.02)
        assert "of the accuracy drop" in monitor.disagreement.allowed and "no longer vouches" in str(
            monitor.disagreement.meaning
        )

    def test_a_drop_that_it_does_not_vouch_for(self):
        stored = calibration(max_accuracy_drop=0.02, confidence=0.95, disagreements=30)
        monitor = PromiseMonitor.from_calibration(stored)
        assert monitor.accuracy_drop.limit == 0.02
        assert monitor.disagreement.limit == upper_bound(30, 600, 0.95) > 0.05
        assert "calibration images" in monitor.disagreement.allowed and "differ" in monitor.disagreement.meaning

    @pytest.mark.parametrize(
        ("settings", "claim"),
        [
            ({"guarantee": "expectation"}, "was promised on average over calibrations"),
            ({}, "was aimed at, but not promised"),
        ],
    )
    def test_what_is_no_promise_is_not_called_one(self, settings, claim):
        monitor = PromiseMonitor.from_calibration(calibration(max_disagreement=0.02, **settings))
        assert monitor.disagreement.allowed == monitor.accuracy_drop.allowed == claim
        assert PromiseMonitor(0.1).disagreement.allowed == "is allowed"

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            (None, "the config has no calibration; calibrate the model, or give max_disagreement"),
            ({"target": {"max_cost": 0.5}, "operating_point": {}}, "was calibrated for max_cost=0.5"),
            ({"target": 3}, "must be an object with target and operating_point"),
            ([3], "must be an object with target and operating_point"),
            ({"target": {"max_accuracy_drop": 0.1}, "operating_point": {}}, "num_samples and disagreements"),
            ({"target": {"max_disagreement": "x"}, "operating_point": {}}, "max_disagreement must be between"),
            ({"target": {"max_disagreement": 0}, "operating_point": {}}, "max_disagreement must be between 0 and 1"),
            ({"target": {"max_disagreement": 0.1, "guarantee": ["x"]}, "operating_point": {"x": 0}}, "guarantee of"),
            ({"target": {"max_disagreement": 0.1, "guarantee": "x"}, "operating_point": {}}, "must be one of 'probab"),
            ({"target": {"max_disagreement": 0.1}, "operating_point": {}, "made_for": 3}, "must be an object, got 3"),
        ],
    )
    def test_other_calibrations_are_named(self, stored, message):
        with pytest.raises(ValueError, match=message):
            PromiseMonitor.from_calibration(stored)

    @pytest.mark.parametrize(("count", "total"), [(0, 300), (3, 300), (30, 300), (300, 300)])
    def test_the_upper_bound_is_one(self, count, total):
        bound = upper_bound(count, total, 0.95)
        assert binom.cdf(count, total, bound) < 0.05 + 1e-9 or bound == 1
        assert (
            bound == pytest.approx(1) or binom.cdf(count, total, count / total + 0.6 * (bound - count / total)) > 0.05
        )


class TestStates:
    def test_a_monitor_goes_on_where_it_stopped(self, tmp_path):
        whole, file = PromiseMonitor(0.02, seed=3), tmp_path / "state.json"
        feed(whole, 2, 50)
        whole.update_labels([1], [0], [0])
        whole.save(file)
        restored = PromiseMonitor(0.02)
        restored.restore(file)
        for monitor in (whole, restored):
            feed(monitor, 3, 40)
            monitor.draw(10)
        assert restored.state() == whole.state() and restored.disagreement == whole.disagreement

    def test_are_small_json(self, tmp_path):
        monitor = PromiseMonitor.from_calibration(calibration(max_disagreement=0.02, confidence=0.95))
        for _ in range(20):
            replica = PromiseMonitor.from_calibration(calibration(max_disagreement=0.02, confidence=0.95))
            feed(replica, 5, 500)
            monitor.merge(replica.state())
        monitor.save(tmp_path / "state.json")
        assert (tmp_path / "state.json").stat().st_size < 8000
        assert json.loads((tmp_path / "state.json").read_text()) == monitor.state()

    def test_a_save_that_fails_leaves_the_old_state(self, tmp_path, monkeypatch):
        monitor, file = PromiseMonitor(0.02), tmp_path / "state.json"
        monitor.save(file)
        before = file.read_bytes()
        feed(monitor, 1)

        def fails(*_):
            raise OSError("the disk is full")

        monkeypatch.setattr(monitoring.os, "fsync", fails)
        with pytest.raises(OSError, match="the disk is full"):
            monitor.save(file)
        assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]

    def test_replicas_add_up(self):
        replicas = [PromiseMonitor(0.02) for _ in range(3)]
        for place, replica in enumerate(replicas):
            replica.draw(1000)
            feed(replica, place, 100)
            replica.update_labels([1, 0], [0, 0], [0, -1])
        merged = PromiseMonitor(0.02)
        for replica in replicas:
            merged.merge(replica.state())
        assert merged.counts == {
            "seen": 3000,
            "audited": 303,
            "disagreements": 3,
            "labelled": 6,
            "harms": 3,
            "corrections": 0,
        }
        assert merged.disagreement.tested == 303 and merged.accuracy_drop.lost == 3

    def test_nothing_is_counted_twice(self):
        replica, merged = PromiseMonitor(0.02), PromiseMonitor(0.02)
        feed(replica, 1, 100)
        old = replica.state()
        merged.merge(old)
        merged.merge(old)
        assert merged.counts["audited"] == 101
        feed(replica, 1, 100)
        merged.merge(replica.state())
        merged.merge(old)  # late
        assert merged.counts["audited"] == merged.disagreement.tested == 202
        second = PromiseMonitor(0.02)
        second.merge(merged.state())
        second.merge(replica.state())
        assert second.counts["audited"] == 202

    def test_what_many_replicas_find_little_of_is_an_alarm_together(self):
        merged = PromiseMonitor(0.01)
        for _ in range(20):
            replica = PromiseMonitor(0.01)
            feed(replica, 1, 29)
            assert not replica.alarm
            merged.merge(replica.state())
        assert merged.alarm

    def test_two_processes_that_go_on_from_one_state_are_noticed(self):
        first = PromiseMonitor(0.02)
        feed(first, 1, 10)
        second = PromiseMonitor(0.02)
        second.restore(first.state())
        feed(first, 5, 10)
        feed(second, 0, 100)
        merged = PromiseMonitor(0.02)
        merged.merge(first.state())
        before = merged.state()
        with pytest.raises(ValueError, match="did two processes go on from one state"):
            merged.merge(second.state())
        assert merged.state() == before

    @pytest.mark.parametrize("use", ["merge", "restore"])
    def test_another_promise_is_refused(self, use):
        monitor = PromiseMonitor.from_calibration(calibration(max_disagreement=0.02, confidence=0.95))
        other = calibration(max_disagreement=0.02, confidence=0.95)
        other["operating_point"]["thresholds"] = [0.4]
        for state in (PromiseMonitor(0.02).state(), PromiseMonitor.from_calibration(other).state()):
            with pytest.raises(ValueError, match="must be of the same promise"):
                getattr(monitor, use)(state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 1}, "format of a monitor's state must be 2, got 1"),
            ({"counts": {"a": {"seen": 1}}}, "counts of a monitor's state must be seen, audited"),
            ({"replica": "nobody"}, "replica of a monitor's state must be in its counts"),
            ({"seed": 1.5}, "seed of a monitor's state"),
            ({"evidence": {"disagreement": {"capital": [math.inf] * 16}}}, "must be of 16 bets"),
        ],
    )
    def test_malformed_states_are_named(self, change, message):
        monitor = PromiseMonitor(0.02)
        with pytest.raises(ValueError, match=message):
            monitor.restore({**monitor.state(), **change})

    @pytest.mark.parametrize(("text", "message"), [("{", "must be JSON"), ("[]", "must be a JSON object")])
    def test_malformed_files_are_named(self, tmp_path, text, message):
        file = tmp_path / "state.json"
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            PromiseMonitor(0.02).merge(file)


class TestRunning:
    @pytest.fixture
    def model(self, pixel_values):
        model = tiny_model()
        model.config.exit_thresholds = thirds_as_thresholds(model, pixel_values)
        return model

    @torch.no_grad()
    def test_a_model_is_audited(self, model, pixel_values):
        monitor = PromiseMonitor(0.02, audit=1)
        outputs = monitor.run(model, pixel_values)
        expected = model(pixel_values, early_exit=True)
        assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.exit_layer, expected.exit_layer)
        full = model(pixel_values, early_exit=False).logits.argmax(-1)
        assert monitor.counts["audited"] == len(pixel_values)
        assert monitor.counts["disagreements"] == (expected.logits.argmax(-1) != full).sum() > 0

    @torch.no_grad()
    def test_only_audited_images_that_left_run_to_the_end(self, model, pixel_values, monkeypatch):
        monitor = PromiseMonitor(0.02, audit=0.5, seed=3)
        drawn = PromiseMonitor(0.02, audit=0.5, seed=3).draw(len(pixel_values))
        left = (model(pixel_values, early_exit=True).exit_layer != 4).numpy()
        ran = []
        forward = model.forward

        def recorded(images, early_exit):
            if not early_exit:
                ran.append(images)
            return forward(images, early_exit=early_exit)

        monkeypatch.setattr(model, "forward", recorded)
        monitor.run(model, pixel_values)
        assert 0 < (drawn & left).sum() < drawn.sum() < len(drawn)  # so that the test can fail
        assert len(ran) == 1 and torch.equal(ran[0], pixel_values[torch.from_numpy(drawn & left)])
        assert monitor.counts["audited"] == drawn.sum()


def test_needs_numpy_and_the_syntax_of_python_3_8_alone():
    tree = ast.parse(Path(monitoring.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
