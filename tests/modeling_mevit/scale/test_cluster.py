# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What connecting to Ray leaves of the caller's process, and what Ray has room for."""

import os

import pytest
import ray
from ray._private import ray_constants

from modeling_mevit.scale import cluster
from modeling_mevit.scale.cluster import LOOPBACK, connected, room


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """Stands in for a Ray that is not there yet: what it is started with, and in which environment."""
    started: list[dict] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: started.append({**settings, "environment": dict(os.environ)}))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: LOOPBACK)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return started


def test_the_callers_process_gets_its_settings_back(started, monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    for _ in range(2):
        with pytest.raises(KeyError), connected():
            raise KeyError
        assert (dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER) == before
    first, second = (one["environment"] for one in started)
    assert first["RAY_AUTH_MODE"] == "token" and first["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    # Ray reads it once in a process, and would not find its own Ray again with another one
    assert first["RAY_AUTH_TOKEN"] == second["RAY_AUTH_TOKEN"] and len(first["RAY_AUTH_TOKEN"]) == 64
    with connected("10.0.0.1:6379"):
        pass
    assert started[2]["address"] == "10.0.0.1:6379" and "RAY_AUTH_TOKEN" not in started[2]["environment"]


def test_a_ray_that_others_could_reach_is_left(started, monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.1")
    message = "Ray must listen on 127.0.0.1 alone where no cluster is given, got 192.0.2.1"
    with pytest.raises(ValueError, match=message), connected():
        pass


def test_a_cluster_is_not_forgotten_where_the_program_is_connected_already(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with connected():
        pass
    message = "where the program is connected to Ray already, got 10.0.0.1:6379"
    with pytest.raises(ValueError, match=message), connected("10.0.0.1:6379"):
        pass


def test_room_is_on_single_machines(monkeypatch):
    gib = cluster.GIB
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "memory": 8.0 * gib}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0, "memory": 2.0 * gib}},
        {"Alive": False, "Resources": {"CPU": 64.0, "memory": 64.0 * gib}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert [room(1), room(2), room(3), room(4)] == [5, 2, 1, 0]
    assert [room(1, gpus=0.5), room(1, memory=2), room(1 / 3)] == [2, 4, 15]
