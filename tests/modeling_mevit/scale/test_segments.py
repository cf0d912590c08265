# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What is told where Ray itself has no more to give, without a Ray."""

import asyncio
from typing import Any

import pytest
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.serve.exceptions import DeploymentUnavailableError

from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.scale import segments
from modeling_mevit.scale.metrics import Metrics
from modeling_mevit.scale.outcomes import Answer, Failed
from modeling_mevit.scale.scorers import NamedContent
from tests.modeling_mevit.scale.conftest import readable


pytestmark = pytest.mark.slow


class Unavailable:
    """The handle of a deployment whose replicas do not start."""

    def remote(self, given: Any) -> Any:
        async def fail() -> None:
            raise DeploymentUnavailableError("DeploymentID")

        return fail()


def test_a_segment_without_replicas_is_unavailable_and_no_fault():
    pipeline = segments.Pipeline([Unavailable()], Metrics(["4"], [4]))
    outcome = asyncio.run(pipeline(NamedContent(b"", "image 1")))
    assert outcome == Failed("a segment has no replica that starts", is_clients_fault=False)


@pytest.mark.parametrize("error", [ObjectStoreFullError, OutOfDiskError])
def test_where_states_have_no_room_images_that_leave_have_their_answer(spread, noises, monkeypatch, error):
    def put(state: Any) -> None:
        raise error("full")

    monkeypatch.setattr(ray, "put", put)
    segment = object.__new__(segments.Segment)
    segment.cascade = Cascade(spread, places=range(1))
    outcomes = [
        one.outcome
        for one in segment._advance(
            [segment._read(NamedContent(file.read_bytes(), file.name)) for file in readable(noises)]
        )
    ]
    failed = Failed("the states of images that go on have no room left; try again", is_clients_fault=False)
    assert {type(one) for one in outcomes} == {Answer, Failed} and failed in outcomes


def test_a_ray_whose_replicas_cannot_be_closed_is_named(spread, monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delattr(segments.replica, "add_port_to_grpc_server")
    with pytest.raises(ValueError, match="Ray must be 2.60, whose replicas' port .* got "):
        segments.check_export(str(spread))
