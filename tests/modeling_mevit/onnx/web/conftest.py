# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Node and a browser, where there are some. `MEVIT_DEMANDS_WEB=1` makes what is missing a failure."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from modeling_mevit.onnx.onnxruntime_web import FILES, read_onnxruntime_web


HARNESS = Path(__file__).parent / "harness.mjs"


def missing(what: str) -> NoReturn:
    """Skips a test, or fails it where the web is demanded."""
    if os.environ.get("MEVIT_DEMANDS_WEB"):
        pytest.fail(f"{what}, and MEVIT_DEMANDS_WEB demands this test")
    pytest.skip(what)


@pytest.fixture(scope="session")
def ort_dir(tmp_path_factory) -> Path:
    """A folder with the files of onnxruntime-web."""
    try:
        files = read_onnxruntime_web()
    except ValueError as error:
        missing(str(error))
    folder = tmp_path_factory.mktemp("onnxruntime-web")
    for name in FILES:
        (folder / name).write_bytes(files[name])
    return folder


@pytest.fixture(scope="session")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        missing("Node is not installed")
    return found


@pytest.fixture(scope="session")
def javascript(node, ort_dir) -> Callable[..., Any]:
    """Calls a function of `harness.mjs` in a process of its own. Arrays go in and come back as arrays."""

    def call(function: str, **arguments: Any) -> Any:
        job = {"function": function, "arguments": encoded(arguments), "ort": str(ort_dir)}
        done = subprocess.run([node, HARNESS], input=json.dumps(job), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return decoded(json.loads(done.stdout))

    return call


def encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": content, "type": value.dtype.name, "dims": list(value.shape)}
    if isinstance(value, dict):
        return {name: encoded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def decoded(value: Any) -> Any:
    if isinstance(value, dict) and "array" in value:
        return np.frombuffer(base64.b64decode(value["array"]), value["type"]).reshape(value["dims"])
    if isinstance(value, dict):
        return {name: decoded(one) for name, one in value.items()}
    return [decoded(one) for one in value] if isinstance(value, list) else value
