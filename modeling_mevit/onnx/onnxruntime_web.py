# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The files of onnxruntime-web, which run graphs in a browser: from a folder, or from npm by its own client."""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path


VERSION = "1.30.0"  # of the npm package
FILES = (
    "ort.wasm.min.mjs",  # WebAssembly alone
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",  # WebGPU too: twice as large, loaded where a browser has that
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_HOW = f"Install npm, or name a folder with --ort-dir, such as that of `npm install onnxruntime-web@{VERSION}`"


def read_onnxruntime_web(folder: Path | None = None) -> dict[str, bytes]:
    """The files that a page needs: name → content.

    Args:
        folder: that has them, or has them in `dist`, as the npm package does. By default npm is asked for the package,
            which it keeps in a cache of its own.

    Raises:
        ValueError: where the folder lacks files, or there is no npm or it cannot get the package.
    """
    if folder is not None:
        return _read(folder)
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"a page needs onnxruntime-web, and npm, which brings it, is not installed. {_HOW}.")
    with tempfile.TemporaryDirectory() as temporary:
        package = f"onnxruntime-web@{VERSION}"
        command = [npm, "pack", package, "--prefer-offline", "--ignore-scripts", "--loglevel=error"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
            raise ValueError(f"npm cannot get {package}: {reason}. {_HOW}.")
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                content = archive.extractfile(f"package/dist/{name}")
                Path(temporary, name).write_bytes(content.read() if content else b"")
        return _read(Path(temporary))


def version_of(files: Mapping[str, bytes]) -> str:
    """Of onnxruntime-web, as its files say; "of unknown version" where they do not."""
    found = re.search(rb"ONNX Runtime Web v([\w.-]+)", files[FILES[0]][:1000])
    return found[1].decode() if found else "of unknown version"


def _read(folder: Path) -> dict[str, bytes]:
    home = folder / "dist" if (folder / "dist").is_dir() else folder
    missing = [name for name in FILES if not (home / name).is_file()]
    if missing:
        raise ValueError(
            f"--ort-dir must name a folder with the files of onnxruntime-web {VERSION}, got {folder}, which lacks "
            f"{', '.join(missing)}."
        )
    return {name: (home / name).read_bytes() for name in FILES}
