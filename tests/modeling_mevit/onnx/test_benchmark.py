# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeling_mevit.onnx import _memory_probe, benchmark
from modeling_mevit.reports.tables import benchmark_table
from tests.helpers.openvino_here import computes_in_bfloat16, needs_openvino


pytestmark = pytest.mark.one_major


class Meter:
    """An energy monitor that counts two joules for each window."""

    def begin_window(self, name):
        pass

    def end_window(self, name):
        return SimpleNamespace(gpu_energy={0: 1.5}, cpu_energy={0: 0.5})


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(8, 1, 3, 16, 16)).astype(np.float32))


@pytest.mark.slow
def test_every_way_to_run_is_measured(tmp_path, calibrated_model, processor, exported, images, monkeypatch):
    calibrated_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(benchmark, "MEMORY_PROCESSES", 1)
    rows = benchmark.benchmark(str(tmp_path / "model"), exported, images, threads=1, energy_monitor=Meter())
    libraries = ("PyTorch", "ONNX Runtime")
    names = ["plain ViT", "MEViT_2", "MEViT_3", "MEViT_4", "early exit"]
    assert [(row.name, row.library) for row in rows] == [(n, library) for n in names for library in libraries]
    megabytes = {(row.name, row.library): row.megabytes for row in rows}
    for library in libraries:
        assert megabytes["MEViT_2", library] < megabytes["MEViT_3", library] < megabytes["MEViT_4", library]
    cascade = [exported / f"{graph}_{layer}.onnx" for graph in ("stage", "query") for layer in (2, 3, 4)]
    assert megabytes["early exit", "ONNX Runtime"] == pytest.approx(sum(file.stat().st_size for file in cascade) / 1e6)
    assert {row.joules for row in rows} == {2 / 8}
    assert benchmark_table([row.to_dict() for row in rows]).count("(1.00 ×)") >= 6  # of both plain ViTs


@needs_openvino
@pytest.mark.slow
def test_each_way_runs_in_the_precision_asked_for(
    tmp_path, calibrated_model, processor, exported, images, monkeypatch
):
    calibrated_model.save_pretrained(tmp_path / "model")
    asked, load = [], _memory_probe.load
    monkeypatch.setattr(_memory_probe, "load", lambda *given: asked.append((given[0], given[3])) or load(*given))
    monkeypatch.setattr(benchmark, "_peak_memory", lambda *given: 1.0)
    told = {"torch": "float32", "openvino": "bfloat16" if computes_in_bfloat16() else "float32"}
    for kind, path in (("torch", tmp_path / "model"), ("openvino", exported), ("openvino", exported / "model.onnx")):
        assert load(kind, path, 1).precision == told[kind]
    settings = {"backend": "openvino", "dtype": "float32"}
    rows = benchmark.benchmark(str(tmp_path / "model"), exported, images[:1], threads=1, **settings)
    assert {(row.library, row.precision) for row in rows} == {("PyTorch", "float32"), ("OpenVINO", "float32")}
    assert set(asked) == {("torch", "float32"), ("openvino", "float32")} and len(asked) == len(rows) == 10
    ways = benchmark._ways(str(tmp_path / "model"), exported, tmp_path, dtype="bfloat16")
    assert {(way.kind, way.precision) for way in ways} == {("torch", "bfloat16"), ("onnxruntime", None)}
    (weights,) = (tmp_path / "plain").glob("*.safetensors")
    assert next(iter(load_file(weights).values())).dtype == torch.bfloat16


def test_latencies_are_taken_in_turn_after_a_warm_up(monkeypatch):
    clock, seen = iter(range(1000)), []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock) ** 2)
    runs = [lambda image: seen.append(("a", image)), lambda image: seen.append(("b", image))]
    latencies = benchmark._latencies(runs, range(7))
    assert seen[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] and seen[10:12] == [("a", 0), ("b", 0)]
    assert latencies.shape == (2, 7)
    # call k ends at (2k + 1)² and starts at (2k)² seconds; five images of two runs come first
    np.testing.assert_array_equal(latencies, 1000.0 * (4 * (10 + np.arange(14)) + 1).reshape(7, 2).T)


@pytest.mark.parametrize("file", ["model.onnx", ""], ids=["file", "cascade"])
@pytest.mark.parametrize("kind", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_the_probe_measures_memory_without_torch(exported, images, tmp_path, kind, file):
    np.save(tmp_path / "image.npy", images[0])
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['modeling_mevit'] = None; "
        f"sys.argv = ['', {kind!r}, {str(exported / file)!r}, {str(tmp_path / 'image.npy')!r}, '1', '']; "
        f"runpy.run_path({_memory_probe.__file__!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) > 0.1  # MiB: the graphs alone take more


def test_the_probe_runs_the_packages_own_runtime(exported, images, tmp_path):
    copied = shutil.copytree(exported, tmp_path / "copied")
    (copied / "cascade_mevit.py").write_text("raise SystemExit('a copy was run')")
    assert _memory_probe.load("onnxruntime", copied, 1).run(images[0]).logits.shape == (1, 5)


def test_files_outside_the_export_are_not_measured(tmp_path, calibrated_model, processor, exported, monkeypatch):
    calibrated_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    copied = shutil.copytree(exported, tmp_path / "copied")
    (copied / "exit_2.onnx").unlink()
    (copied / "exit_2.onnx").symlink_to(exported / "exit_2.onnx")
    monkeypatch.setattr(benchmark, "write_graph", lambda *args: None)
    with pytest.raises(ValueError, match="exit_2.onnx must lie in that directory itself, got a link"):
        benchmark._ways(str(tmp_path / "model"), copied, tmp_path / "ways")


def test_memory_is_the_median_of_fresh_processes(monkeypatch, tmp_path):
    printed = iter(("7.0", "100.0", "9.0"))
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=next(printed)))
    way = benchmark.Way("plain ViT", "onnxruntime", tmp_path, None)
    assert benchmark._peak_memory(way, tmp_path, threads=0) == 9.0


def test_without_a_meter_no_energy_is_claimed(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    monitor, why = benchmark.find_energy_monitor()
    assert monitor is None and "zeus is not installed" in why
    assert benchmark._joules(lambda image: None, [1], monitor) is None


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
