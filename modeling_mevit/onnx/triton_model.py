# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The cascade as a model of Triton Inference Server, which calls its stages as models of their own (BLS).

`mevit export --cascade --triton` puts a copy of this file into a model repository, as `model.py`, beside what
[`write_repository`] lists. It runs in Triton's Python backend with numpy alone, and nothing but Triton imports it:
`triton_python_backend_utils` exists only there. How images go from stage to stage is what cascade_mevit.py says.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


DIRECTORY = Path(__file__).resolve().parent
if str(DIRECTORY) not in sys.path:
    sys.path.append(str(DIRECTORY))

from cascade_mevit import Cascade, RunnableGraph  # noqa: E402


class StageModel(RunnableGraph):
    """A graph that Triton serves.

    Args:
        name: of the model.
        inputs: name and shape of each.
        outputs: the same.
    """

    def __init__(self, name: str, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]):
        self.name, self.inputs, self.outputs = name, inputs, outputs

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Asks Triton to run it."""
        request = pb_utils.InferenceRequest(
            model_name=self.name,
            requested_output_names=list(self.outputs),
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()],
            # numpy reads what is in main memory, also where the stage runs on a GPU
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise ValueError(f"{self.name}: {response.error().message()}")
        values = {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in self.outputs}
        # of one number for each image, whose shape Triton does not know
        return {name: value[:, 0] if len(self.outputs[name]) == 1 else value for name, value in values.items()}


class TritonPythonModel:
    """Images in, `logits` and `exit_layer` of the exit that each one took out, as config.pbtxt says."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the export's settings. Models of the stages are called NAME_stage_6 and so on, after this one."""
        graphs, cascade = (
            json.loads((DIRECTORY / name).read_text("utf-8")) for name in ("graphs.json", "cascade.json")
        )

        def open_graph(file: str) -> StageModel:
            return StageModel(f"{args['model_name']}_{Path(file).stem}", **graphs[file])

        self.cascade = Cascade(DIRECTORY, description=cascade, graphs=open_graph)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers all requests that Triton has batched as one batch, which shrinks from exit to exit."""
        images = [pb_utils.get_input_tensor_by_name(request, "pixel_values").as_numpy() for request in requests]
        try:
            output = self.cascade(np.concatenate(images))
        except ValueError as error:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(one) for one in images])[:-1]
        answers = zip(np.split(output.logits, ends), np.split(output.exit_layer[:, None], ends), strict=True)
        return [
            pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor("logits", logits), pb_utils.Tensor("exit_layer", exit_layer)]
            )
            for logits, exit_layer in answers
        ]
