# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Triton Inference Server: it reads a model repository, checks requests against each model's config as
Triton does, runs graphs with ONNX Runtime, and Python models with its own `triton_python_backend_utils`."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest


TYPES = {"TYPE_FP32": np.dtype(np.float32), "TYPE_INT64": np.dtype(np.int64)}
TOKEN = re.compile(r'"[^"]*"|[{}\[\]:,]|[\w.-]+')


def parse_pbtxt(text: str) -> dict[str, Any]:
    """The text format of protobuf, as far as configs use it; `input` and `output` are lists."""
    tokens = TOKEN.findall(text)
    assert "".join(tokens) == re.sub(r"\s", "", text), "there is something else in it"
    message, rest = _message(tokens)
    assert not rest
    return message


def _message(tokens: list[str]) -> tuple[dict[str, Any], list[str]]:
    message: dict[str, Any] = {}
    while tokens and tokens[0] != "}":
        name, *tokens = tokens
        if tokens[0] == "{":
            value, tokens = _message(tokens[1:])
            assert tokens[0] == "}"
            if name in ("input", "output"):
                message.setdefault(name, []).append(value)
            else:
                assert name not in message
                message[name] = value
            tokens = tokens[1:]
            continue
        assert tokens[0] == ":" and name not in message
        if tokens[1] == "[":
            end = tokens.index("]")
            message[name], tokens = [int(one) for one in tokens[2:end] if one != ","], tokens[end + 1 :]
        else:
            message[name], tokens = _scalar(tokens[1]), tokens[2:]
    return message, tokens


def _scalar(token: str) -> Any:
    if token.startswith('"'):
        return token[1:-1]
    return int(token) if token.lstrip("-").isdigit() else token


class Tensor:
    def __init__(self, name: str, value: np.ndarray):
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value


class Answer:
    """An `InferenceResponse`."""

    def __init__(self, output_tensors: list[Tensor] = (), error: Any = None):
        self._tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class Error:
    def __init__(self, message: str):
        self._message = message

    def message(self) -> str:
        return self._message


class Server:
    """Serves a model repository.

    Attributes:
        configs: name → config of each model.
        asked: names of the models that were asked by others, with the batch sizes.
    """

    def __init__(self, repository: Path, patch: pytest.MonkeyPatch):
        self.repository = repository
        self.configs = {file.parent.name: parse_pbtxt(file.read_text()) for file in repository.glob("*/config.pbtxt")}
        self.asked: list[tuple[str, int]] = []
        self._models: dict[str, Any] = {}
        patch.setitem(sys.modules, "triton_python_backend_utils", self._utils())
        patch.delitem(sys.modules, "cascade_mevit", raising=False)
        patch.setattr(sys, "path", list(sys.path))

    def request(self, model: str, requests: list[dict[str, np.ndarray]]) -> list[Answer]:
        """Answers requests that were batched, each of which has arrays by the names of inputs."""
        config = self.configs[model]
        assert sum(len(next(iter(request.values()))) for request in requests) <= config["max_batch_size"]
        for request in requests:
            _check(config["input"], request)
        if config["backend"] == "python":
            answers = self._python_model(model).execute(
                [[Tensor(name, value) for name, value in request.items()] for request in requests]
            )
        else:
            answers = [self._run(model, config, request) for request in requests]
        for answer in answers:
            if not answer.has_error():
                given = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
                _check([output for output in config["output"] if output["name"] in given], given)
        return answers

    def _python_model(self, name: str) -> Any:
        if name not in self._models:
            file = self.repository / name / "1" / "model.py"
            specification = importlib.util.spec_from_file_location("triton_model", file)
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
            self._models[name] = module.TritonPythonModel()
            self._models[name].initialize({"model_name": name, "model_repository": str(self.repository / name)})
        return self._models[name]

    def _run(self, name: str, config: dict[str, Any], request: dict[str, np.ndarray]) -> Answer:
        if name not in self._models:
            self._models[name] = onnxruntime.InferenceSession(self.repository / name / "1" / "model.onnx")
        names = [output["name"] for output in config["output"]]
        try:
            values = dict(zip(names, self._models[name].run(names, request), strict=True))
        except Exception as error:
            return Answer(error=Error(str(error)))
        for output in config["output"]:
            if "reshape" in output:
                assert output["reshape"] == {"shape": []} and values[output["name"]].ndim == 1
                values[output["name"]] = values[output["name"]][:, None]
        return Answer([Tensor(*value) for value in values.items()])

    def _utils(self) -> ModuleType:
        server, utils = self, ModuleType("triton_python_backend_utils")

        class InferenceRequest:
            def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
                assert preferred_memory == ("cpu", 0)
                self.model, self.names, self.inputs = model_name, requested_output_names, inputs

            def exec(self) -> Answer:
                values = {tensor.name(): tensor.as_numpy() for tensor in self.inputs}
                server.asked.append((self.model, len(next(iter(values.values())))))
                (answer,) = server.request(self.model, [values])
                if answer.has_error():
                    return answer
                return Answer([tensor for tensor in answer.output_tensors() if tensor.name() in self.names])

        def by_name(tensors: list[Tensor], name: str) -> Tensor:
            (found,) = [tensor for tensor in tensors if tensor.name() == name]
            return found

        utils.InferenceRequest, utils.InferenceResponse, utils.Tensor = InferenceRequest, Answer, Tensor
        utils.TritonError, utils.TRITONSERVER_MEMORY_CPU = Error, "cpu"
        utils.PreferredMemory = lambda kind, device: (kind, device)
        utils.get_input_tensor_by_name = by_name
        utils.get_output_tensor_by_name = lambda answer, name: by_name(answer.output_tensors(), name)
        return utils


def _check(described: list[dict[str, Any]], given: dict[str, np.ndarray]) -> None:
    """That arrays are what a config says of inputs or outputs, with a batch before them."""
    assert {one["name"] for one in described} == set(given)
    for one in described:
        value = given[one["name"]]
        assert value.dtype == TYPES[one["data_type"]], one["name"]
        assert value.flags.c_contiguous, one["name"]
        sizes = [size for size, allowed in zip(value.shape[1:], one["dims"], strict=True) if allowed != -1]
        assert sizes == [size for size in one["dims"] if size != -1], one["name"]
