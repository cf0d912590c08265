# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_mevit.data import image_processor_for
from tests.helpers.models import tiny_model


pytest.importorskip("optimum.exporters.onnx", reason="needs the extra mevit[onnx]")

from modeling_mevit.onnx import benchmark  # noqa: E402
from modeling_mevit.onnx.export import export  # noqa: E402


PROCESSOR = image_processor_for(16, image_mean=[0.5] * 3, image_std=[0.5] * 3)


class Meter:
    """An energy monitor that counts two joules for each window."""

    def begin_window(self, name):
        pass

    def end_window(self, name):
        return SimpleNamespace(gpu_energy={0: 1.5}, cpu_energy={0: 0.5})


@pytest.mark.slow
def test_every_way_to_run_is_measured(tmp_path):
    model = tiny_model(exit_thresholds=[0.45, 0.6], early_exit=True)
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    export(model, PROCESSOR, tmp_path / "out", exits=[2, 4], cascade=True)
    images = list(np.random.default_rng(0).normal(size=(8, 1, 3, 16, 16)).astype(np.float32))
    settings = {"threads": 1, "energy_monitor": Meter(), "memory_processes": 1}
    rows = benchmark.benchmark(str(tmp_path / "model"), tmp_path / "out", images, **settings)
    libraries = ("PyTorch", "ONNX Runtime")
    names = ["plain ViT", "MEViT_2", "MEViT_4", "early exit"]
    assert [(row["name"], row["library"]) for row in rows] == [(n, library) for n in names for library in libraries]
    for row in rows:
        assert 0 < row["median"] <= row["p95"] and row["megabytes"] > 0.05 and row["joules"] == 2 / 8
        assert 0 < row["memory"] < 2000
    by_name = {(row["name"], row["library"]): row for row in rows}
    for library in libraries:
        assert by_name["MEViT_2", library]["megabytes"] < by_name["MEViT_4", library]["megabytes"]

    table = benchmark.table_of(rows).splitlines()
    assert table[2].startswith("| plain ViT | PyTorch |") and table[2].count("(1.00 ×)") == 3
    assert table[2].endswith("| 0.25 |")


def test_without_a_meter_no_energy_is_claimed(monkeypatch):
    row = {"name": "plain ViT", "library": "PyTorch", "megabytes": 2.0, "median": 4.0, "p95": 5.0, "memory": 8.0}
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    monitor, why = benchmark.find_energy_monitor()
    assert monitor is None and "zeus is not installed" in why
    table = benchmark.table_of([{**row, "joules": None}], why)
    assert "| not measured |" in table and table.endswith(why)


def test_a_machine_without_meters_is_told(monkeypatch):
    class NoMeters(Meter):
        def end_window(self, name):
            return SimpleNamespace(gpu_energy={}, cpu_energy=None)

    monkeypatch.setitem(sys.modules, "zeus", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=NoMeters))
    assert benchmark.find_energy_monitor() == (None, "zeus finds neither a GPU nor RAPL nor a board's sensor here.")
    monkeypatch.setitem(sys.modules, "zeus.monitor", SimpleNamespace(ZeusMonitor=Meter))
    assert isinstance(benchmark.find_energy_monitor()[0], Meter)


def test_a_board_with_a_sensor_tells_all_of_its_energy():
    board = SimpleNamespace(gpu_energy={0: 1.0}, cpu_energy=None, soc_energy=SimpleNamespace(total_energy_mj=2500.0))
    assert benchmark._energy(board) == 2.5
    silent = SimpleNamespace(gpu_energy={}, cpu_energy=None, soc_energy=SimpleNamespace(total_energy_mj=None))
    assert benchmark._energy(silent) is None
