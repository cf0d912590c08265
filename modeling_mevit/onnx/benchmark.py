# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 3 on the machine at hand: size, latency, memory and energy of each way to run a model.

Batch 1. The plain ViT, the model cut at exits, and the early-exit run, each in PyTorch and in ONNX Runtime. Latencies
are taken in turn, image by image, in one process; memory in fresh processes, of which the median counts.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


WARM_UP = 5  # images before the first one that counts


def benchmark(
    checkpoint: str,
    exported: Path,
    images: list[np.ndarray],
    *,
    threads: int = 0,
    energy_monitor: Any = None,
    memory_processes: int = 3,
) -> list[dict[str, Any]]:
    """Measures every way to run a model.

    Args:
        checkpoint: of the model, calibrated.
        exported: what `mevit export --cascade` made of it.
        images: (1, C, H, W) each, float32, preprocessed.
        threads: of one operator; the libraries' choice by default.
        energy_monitor: with `begin_window(name)` and `end_window(name)`, as of zeus; without one no energy is given.
        memory_processes: fresh processes for each memory.

    Returns:
        A row for each: `name`, `library`, `megabytes` on disk, `median` and `p95` latency in ms, `memory` in MiB
        (peak, less what the process held before loading), `joules` an image or None.
    """
    with tempfile.TemporaryDirectory() as directory:
        ways = _ways(checkpoint, exported, Path(directory))
        runs = {key: _load(*way, threads) for key, way in ways.items()}
        latencies: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for number, image in enumerate([*images[:WARM_UP], *images]):
            for key, run in runs.items():
                start = time.perf_counter()
                run(image)
                if number >= min(WARM_UP, len(images)):
                    latencies[key].append(1000 * (time.perf_counter() - start))
        joules = {key: _joules(run, images, energy_monitor) for key, run in runs.items()}
        np.save(Path(directory) / "image.npy", images[0])
        rows = []
        for key, (kind, path) in ways.items():
            name, library = key
            rows.append(
                {
                    "name": name,
                    "library": library,
                    "megabytes": _size(kind, path) / 1e6,
                    "median": float(np.median(latencies[key])),
                    "p95": float(np.percentile(latencies[key], 95)),
                    "memory": _peak_memory(kind, path, Path(directory) / "image.npy", threads, memory_processes),
                    "joules": joules[key],
                }
            )
        return rows


def table_of(rows: list[dict[str, Any]], why_no_energy: str | None = None) -> str:
    """Markdown; each figure beside its ratio to the plain ViT in the same library."""
    lines = [
        "| model | library | file (MB) | latency, median (ms) | p95 (ms) | peak memory (MiB) | energy (J) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain = {row["library"]: row for row in rows if row["name"] == "plain ViT"}
    for row in rows:
        base = plain[row["library"]]
        cells = [f"{row[key]:.1f} ({row[key] / base[key]:.2f} ×)" for key in ("megabytes", "median")]
        cells += [f"{row['p95']:.1f}", f"{row['memory']:.0f} ({row['memory'] / base['memory']:.2f} ×)"]
        cells.append("not measured" if row["joules"] is None else f"{row['joules']:.2f}")
        lines.append(f"| {row['name']} | {row['library']} | {' | '.join(cells)} |")
    if why_no_energy:
        lines += ["", f"Energy was not measured: {why_no_energy}"]
    return "\n".join(lines)


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


def _ways(checkpoint: str, exported: Path, directory: Path) -> dict[tuple[str, str], tuple[str, Path]]:
    """(name, library) → how to load it, and from where. Writes what is not there yet into `directory`."""
    from optimum.exporters.onnx import main_export
    from transformers import AutoImageProcessor

    from ..evaluation import plain_vit
    from ..modeling_mevit import MEViTForImageClassification
    from .graphs import file_of_exit

    model = MEViTForImageClassification.from_pretrained(checkpoint).eval()
    files = {layer: exported / file_of_exit(layer, model.config.exit_layers) for layer in model.config.exit_layers}
    plain_vit(model).save_pretrained(directory / "plain")
    AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(directory / "plain")
    main_export(str(directory / "plain"), directory / "plain_onnx", task="image-classification")
    ways = {
        ("plain ViT", "PyTorch"): ("torch", directory / "plain"),
        ("plain ViT", "ONNX Runtime"): ("onnx", directory / "plain_onnx" / "model.onnx"),
    }
    for layer, file in files.items():
        if not file.is_file():
            continue
        model.truncate(layer).save_pretrained(directory / f"exit_{layer}")
        ways[f"MEViT_{layer}", "PyTorch"] = ("torch", directory / f"exit_{layer}")
        ways[f"MEViT_{layer}", "ONNX Runtime"] = ("onnx", file)
    model.save_pretrained(directory / "early_exit")
    ways["early exit", "PyTorch"] = ("torch", directory / "early_exit")
    ways["early exit", "ONNX Runtime"] = ("cascade", exported)
    return ways


def _load(kind: str, path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    """What runs a model on one image."""
    if kind == "torch":
        return _load_torch(path, threads)
    if kind == "onnx":
        return _load_onnx(path, threads)
    from .cascade_mevit import Cascade

    return Cascade(path, threads=threads)


def _load_torch(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    import torch
    from transformers import AutoModelForImageClassification

    import modeling_mevit  # noqa: F401  registers the model

    if threads:
        torch.set_num_threads(threads)
    model = AutoModelForImageClassification.from_pretrained(path).eval()

    @torch.inference_mode()
    def run(image: np.ndarray) -> Any:
        return model(torch.from_numpy(image))

    return run


def _load_onnx(path: Path, threads: int) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # models take turns
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {"pixel_values": image})


def _size(kind: str, path: Path) -> int:
    """Bytes of the weights and graphs that a way to run needs."""
    if kind == "onnx":
        return path.stat().st_size
    patterns = ("stage_*.onnx", "rows_*.onnx") if kind == "cascade" else ("*.safetensors",)
    return sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))


def _joules(run: Callable[[np.ndarray], Any], images: list[np.ndarray], monitor: Any) -> float | None:
    if monitor is None:
        return None
    monitor.begin_window("images")
    for image in images:
        run(image)
    return _energy(monitor.end_window("images")) / len(images)


def _energy(measured: Any) -> float | None:
    """Joules of a window of zeus: of the board where it has a sensor (Jetson), else of GPUs and CPUs; or None."""
    of_board = getattr(getattr(measured, "soc_energy", None), "total_energy_mj", None)
    if of_board is not None:
        return of_board / 1000
    parts = [*(measured.gpu_energy or {}).values(), *(measured.cpu_energy or {}).values()]
    return sum(parts) if parts else None


def _peak_memory(kind: str, path: Path, image: Path, threads: int, processes: int) -> float:
    """MiB that a fresh process takes at most for loading and running, more than it held before; median of several."""
    command = [sys.executable, str(Path(__file__).resolve()), kind, str(path), str(image), str(threads)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(processes)]
    return float(np.median([float(run.stdout.split()[-1]) for run in runs]))


def _module(file: Path) -> ModuleType:
    """A module from its file, without the package around it, which would import torch."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fresh_process(kind: str, path: Path, image: Path, threads: int) -> None:
    """What the fresh process does: imports, looks at its memory, loads, runs, and prints the difference."""
    memory = _module(Path(__file__).parents[1] / "process_memory.py")
    inputs = np.load(image)
    if kind == "torch":
        import transformers  # noqa: F401

        import modeling_mevit  # noqa: F401

        before, run = memory.resident(), _load_torch(path, threads)
    elif kind == "onnx":
        import onnxruntime  # noqa: F401

        before, run = memory.resident(), _load_onnx(path, threads)
    else:
        runtime = _module(path / "cascade_mevit.py")
        before, run = memory.resident(), runtime.Cascade(path, threads=threads)
    for _ in range(3):
        run(inputs)
    print(memory.peak() - before)


if __name__ == "__main__":
    _fresh_process(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
