# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import json
import warnings

import numpy as np
import pytest

import monitoring
import promises


pytestmark = pytest.mark.one_major


def outcomes(rate: float, streams: int = 30, images: int = 1500, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((streams, images)) < rate).astype(np.int64)


def test_risk_monitoring_is_mapies():
    exchangeability = pytest.importorskip("mapie.exchangeability_testing", reason="the extra dev brings MAPIE")
    risk_control = pytest.importorskip("mapie.risk_control.risks")
    disagrees = risk_control.BinaryRisk(
        lambda full, early: full != early, lambda full, early: np.full(len(full), True), higher_is_better=False
    )
    streams = outcomes(0.2, streams=4, images=400)
    found = monitoring.risk_monitoring(streams, 0.05, 0)
    assert (found > 0).all()
    for stream, place in zip(streams, found, strict=True):
        # a quarter of the level goes to the one bound that is used here
        monitor = exchangeability.RiskMonitoring(risk=disagrees, test_level=4 * monitoring.ALPHA, threshold=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monitor.update(np.zeros(len(stream), int), stream)
        bounds = monitor.online_risk_lower_bound_sequence_history
        assert np.flatnonzero(bounds > 0.05)[0] + 1 == place


@pytest.mark.parametrize("test", monitoring.TESTS)
def test_each_test_notices_what_exceeds_the_limit_and_no_sooner(test):
    if test == "RiskMonitoring":
        pytest.importorskip("mapie", reason="the extra dev brings MAPIE")
    run = monitoring.TESTS[test]
    assert (run(outcomes(0.02), 0.02, 0) > 0).sum() <= 5
    assert (run(outcomes(0.2), 0.02, 0) > 0).all()


@pytest.mark.parametrize("test", monitoring.OF_A_DROP)
def test_each_test_of_a_drop_notices_what_exceeds_the_limit_and_no_sooner(test):
    run = monitoring.TESTS[test]
    harmed, corrected = outcomes(0.06), outcomes(0.04, seed=1)
    assert (run(harmed - corrected, 0.02, -1) > 0).sum() <= 5
    assert (run(outcomes(0.2) - corrected, 0.02, -1) > 0).all()


def test_delays_are_counted_from_the_change():
    assert monitoring.median_delay(np.array([5, 110, 120, 130, 0]), 100) == 30
    assert monitoring.median_delay(np.array([5, 6, 0, 130, 120]), 100) is None
    assert monitoring.median_delay(np.array([7, 9, 11]), 0) == 9


@pytest.mark.slow
def test_simulates_every_setting(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mapie", reason="the extra dev brings MAPIE")
    monkeypatch.setattr(monitoring, "LIMITS", (0.05,))
    monkeypatch.setattr(monitoring, "LIMITS_OF_A_DROP", (0.05,))
    monkeypatch.setattr(monitoring, "CHANGED", 1000)
    monkeypatch.setattr(promises, "MODELS", {"few harms": promises.MODELS["few harms"]})
    output = tmp_path / "monitoring.json"
    options = ["--streams", "20", "--images", "1500", "--calibrations", "100"]
    results = monitoring.main([*options, "--output", str(output)])
    assert json.loads(output.read_text()) == results
    rows = {row["stream"]: row for row in results["settings"] if row["corrections"] is None}
    assert set(rows) == set(monitoring.STREAMS)
    assert max(rate for row in results["settings"] for rate in row["false_alarms"].values()) <= 0.2
    assert rows["5×"]["delays"]["bets and starts"] < rows["5×"]["delays"]["RiskMonitoring"]
    after_a_calm = rows["½×, then 5×"]["delays"]
    assert after_a_calm["bets and starts"] < after_a_calm["bets"]
    merged = {row["block"]: row for row in results["replicas"] if row["stream"] == "½×, then 5×"}
    assert merged[1]["delay"] <= merged[25]["delay"]
    assert all(rate <= 0.15 for row in results["upper_bound"] for rate in row["exceeded"].values())
    printed = capsys.readouterr().out
    assert printed.count("| 5.0% | 2× |") == 1 and "few corrections" in printed
