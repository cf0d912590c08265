# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 3 on the machine at hand: size, latency, memory and energy of each way to run a model.

Batch 1. The plain ViT, the model cut at exits, and the early-exit run, each in PyTorch and in the export's runtime.
Latencies are taken in turn, image by image, in one process; memory in fresh processes, of which the median counts.
"""

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling_mevit import MEViTForImageClassification
from . import _memory_probe
from .cascade_mevit import FILES, default_backend, graph_in, read_description
from .graphs import exit_file, plain_graph
from .writer import write_graph


WARM_UP = 5  # images before the first one that counts
MEMORY_PROCESSES = 3  # fresh ones, for each memory
LIBRARIES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class BenchmarkRow:
    """One way to run a model, and what it takes for an image.

    Args:
        name: `"plain ViT"`, `"MEViT_k"` or `"early exit"`.
        library: one of `LIBRARIES`.
        precision: that it computes in, such as `"bfloat16"`.
        megabytes: of weights and graphs on disk.
        median: latency in ms.
        p95: latency in ms.
        memory: in MiB, the peak less what the process held before loading.
        joules: None where no energy was measured.
    """

    name: str
    library: str
    precision: str
    megabytes: float
    median: float
    p95: float
    memory: float
    joules: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Way:
    """One way to run a model: its name, and what [`_memory_probe.load`] takes."""

    name: str
    kind: str
    path: Path
    precision: str | None
    files_in: str = "float32"

    @property
    def files(self) -> list[Path]:
        """Weights and graphs that it needs."""
        if self.path.is_file():
            return [self.path]
        if self.kind == "torch":
            return list(self.path.glob("*.safetensors"))
        stages = read_description(self.path)["stages"]
        return [self.path / stage[graph] for stage in stages for graph in ("stage", "query")]


def benchmark(
    checkpoint: str,
    exported: Path,
    images: Sequence[np.ndarray],
    *,
    threads: int = 0,
    energy_monitor: Any = None,
    backend: str | None = None,
    dtype: str | None = None,
) -> list[BenchmarkRow]:
    """Measures every way to run a model.

    Args:
        checkpoint: of the model, calibrated.
        exported: what `mevit export --cascade` made of it.
        images: (1, C, H, W) each, float32, preprocessed.
        threads: of one operator; the libraries' choice by default.
        energy_monitor: with `begin_window(name)` and `end_window(name)`, as of zeus; without one no energy is given.
        backend: what runs the export; by default as for [`Cascade`].
        dtype: precision that PyTorch and OpenVINO compute in; by default the checkpoint's, and as for [`Cascade`].
    """
    with tempfile.TemporaryDirectory() as directory:
        ways = _ways(checkpoint, exported, Path(directory), backend, dtype)
        loaded = [_memory_probe.load(way.kind, way.path, threads, way.precision, way.files_in) for way in ways]
        runs = [one.run for one in loaded]
        latencies = _latencies(runs, images)
        joules = [_joules(run, images, energy_monitor) for run in runs]
        image = Path(directory) / "image.npy"
        np.save(image, images[0])
        return [
            BenchmarkRow(
                name=way.name,
                library=LIBRARIES[way.kind],
                precision=loaded[place].precision,
                megabytes=sum(file.stat().st_size for file in way.files) / 1e6,
                median=float(np.median(latencies[place])),
                p95=float(np.percentile(latencies[place], 95)),
                memory=_peak_memory(way, image, threads),
                joules=joules[place],
            )
            for place, way in enumerate(ways)
        ]


def find_energy_monitor() -> tuple[Any, str | None]:
    """What measures energy on this machine (by zeus: RAPL, NVML, Jetson), or None and the reason."""
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, "zeus is not installed (it comes with the extra packages of mevit[energy])."
    try:
        monitor = ZeusMonitor()
        monitor.begin_window("probe")
        joules = _energy(monitor.end_window("probe"))
    except Exception as error:  # zeus has no common class for what a machine may lack
        return None, f"zeus finds nothing to read here ({error})."
    if joules is None:
        return None, "zeus finds neither a GPU nor RAPL nor a board's sensor here."
    return monitor, None


def _ways(
    checkpoint: str, exported: Path, directory: Path, backend: str | None = None, dtype: str | None = None
) -> list[Way]:
    """All ways to run a model. Writes what is not there yet into `directory`."""
    made_for = read_description(exported).get("precision", "float32")
    backend = backend or default_backend(made_for)
    files_in = made_for if made_for in FILES else "float32"
    precisions = {
        "torch": dtype,
        "onnxruntime": None,  # that of the graphs
        "openvino": dtype or ("bfloat16" if made_for == "bfloat16" else None),
    }
    model = MEViTForImageClassification.from_pretrained(checkpoint, dtype=dtype or "auto").eval()
    plain = directory / "plain"
    model.to_vit().save_pretrained(plain)

    def ways_of(name: str, in_torch: Path, in_graphs: Path, files_in: str = files_in) -> list[Way]:
        kinds = (("torch", in_torch), (backend, in_graphs))
        return [Way(name, kind, path, precisions[kind], files_in) for kind, path in kinds]

    plain_file = directory / "plain.onnx"
    write_graph(plain_graph(copy.deepcopy(model).float()), plain_file)
    ways = ways_of("plain ViT", plain, plain_file, "float32")
    for layer in model.config.exit_layers:
        name = exit_file(layer, model.config.exit_layers).name
        if (exported / name).is_file():
            file = graph_in(exported, name)
            cut = directory / f"exit_{layer}"
            model.truncate(layer).save_pretrained(cut)
            ways += ways_of(f"MEViT_{layer}", cut, file)
    model.save_pretrained(directory / "early_exit")
    return ways + ways_of("early exit", directory / "early_exit", exported)


def _latencies(runs: Sequence[Callable[[np.ndarray], Any]], images: Sequence[np.ndarray]) -> np.ndarray:
    """Milliseconds (runs, images), taken in turn, image by image, after some that do not count."""
    warm_up = images[:WARM_UP]
    milliseconds = np.empty((len(runs), len(warm_up) + len(images)))
    for number, image in enumerate([*warm_up, *images]):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            run(image)
            milliseconds[place, number] = 1000 * (time.perf_counter() - start)
    return milliseconds[:, len(warm_up) :]


def _joules(run: Callable[[np.ndarray], Any], images: Sequence[np.ndarray], monitor: Any) -> float | None:
    if monitor is None:
        return None
    monitor.begin_window("images")
    for image in images:
        run(image)
    energy = _energy(monitor.end_window("images"))
    return None if energy is None else energy / len(images)


def _energy(measured: Any) -> float | None:
    """Joules of a window of zeus: of the board where it has a sensor (Jetson), else of GPUs and CPUs; or None."""
    of_board = getattr(getattr(measured, "soc_energy", None), "total_energy_mj", None)
    if of_board is not None:
        return float(of_board / 1000)
    parts = [*(measured.gpu_energy or {}).values(), *(measured.cpu_energy or {}).values()]
    return float(sum(parts)) if parts else None


def _peak_memory(way: Way, image: Path, threads: int) -> float:
    """MiB that a fresh process takes at most for loading and running, more than it held before; median of several."""
    command = [
        sys.executable,
        str(Path(_memory_probe.__file__).resolve()),
        way.kind,
        str(way.path),
        str(image),
        str(threads),
        way.precision or "",
    ]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(MEMORY_PROCESSES)]
    return float(np.median([float(run.stdout.split()[-1]) for run in runs]))
