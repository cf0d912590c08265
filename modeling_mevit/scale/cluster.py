# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Ray on this machine, reachable from nowhere else, or a cluster that runs already."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


if find_spec("ray") is None:  # said before anything is done; importing it waits until its environment is set
    raise ModuleNotFoundError("No module named 'ray'", name="ray")

LOOPBACK = "127.0.0.1"
OBJECT_STORE = 2 * 2**30  # bytes at most, of what processes hand to each other on one machine

GIB = 2**30

_HAS_OTHER_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": all ports of Ray are on the loopback address
_RAY_TOKEN = secrets.token_hex(32)  # one for this process: Ray reads its token once


@contextmanager
def connected(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connects this process to Ray, and leaves at the end.

    Where neither an address nor a running Ray is given, Ray starts on this machine and ends with the context: without
    a dashboard, without a port for clients, with its other ports on 127.0.0.1 and a token that no other user knows.
    Afterwards Ray starts as ever in this process, but not by itself: `ray.init()` has to be called.

    Args:
        address: of a cluster, such as `"10.0.0.1:6379"`, or `"auto"` on one of its machines.
        num_cpus: that the Ray of this machine may hand out; all cores by default.

    Raises:
        ValueError: where the cluster does not answer, an address is given where this process is connected already, or
            the Ray of this machine could be reached from others.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # by the program that calls this
        if address is not None:
            raise ValueError(
                f"the address of a cluster must be left out where the program is connected to Ray already, got "
                f"{address}; leave it out, or call ray.shutdown() before."
            )
        yield
        return
    with _settings_of_ray(address is not None):
        import ray

        settings: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        if address is None:
            store = min(OBJECT_STORE, _memory() // 4)
            settings |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": store}
        try:
            with _in_home():
                ray.init(address=address or "local", **settings)  # "local" whatever the environment names
        except Exception as error:  # Ray raises plain ones
            where = "on this machine does not start" if address is None else f"at {address} does not answer"
            raise ValueError(f"Ray {where}: {error}") from error
        try:
            if address is None:
                check_is_closed()
            yield
        finally:
            ray.shutdown()


def check_is_closed() -> None:
    """Raises a `ValueError` where the Ray of this machine could be reached from others."""
    import ray

    if (address := ray.util.get_node_ip_address()) != LOOPBACK:
        raise ValueError(
            f"Ray must listen on {LOOPBACK} alone where no cluster is given, got {address}; where the program has "
            "started it itself, call ray.shutdown() before."
        )


def room(cpus: float, gpus: float = 0, memory: float = 0) -> int:
    """How many processes the machines of Ray have room for, each of which takes so many CPUs, GPUs and GiB."""
    import ray

    needed = {"CPU": cpus, "GPU": gpus, "memory": memory * GIB}
    # a millionth more, since shares of a CPU may not add up to all of it
    return sum(
        min(int(node["Resources"].get(name, 0) / amount * (1 + 1e-6)) for name, amount in needed.items() if amount)
        for node in ray.nodes()
        if node["Alive"]
    )


def resources() -> str:
    """What Ray has to hand out, in words."""
    import ray

    there = ray.cluster_resources()
    text = f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs and {there.get('memory', 0) / GIB:.1f} GiB"
    machines = sum(node["Alive"] for node in ray.nodes())
    return text if machines == 1 else f"{text} on {machines} machines"


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    """Sets environment variables, and sets them back."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _settings_of_ray(has_other_nodes: bool) -> Iterator[None]:
    """Has Ray start for a cluster or for this machine alone, and gives this process its own settings back."""
    settings = {_HAS_OTHER_NODES: "1" if has_other_nodes else "0"}
    if not has_other_nodes:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", _RAY_TOKEN)}
    with ExitStack() as stack:
        stack.enter_context(environment(**settings))
        from ray import _raylet
        from ray._private import auto_init_hook, ray_constants

        # Ray reads both when it is imported, which may have been before
        stack.callback(setattr, ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
        ray_constants.ENABLE_RAY_CLUSTER = has_other_nodes
        _raylet.Config.initialize("")  # type: ignore[attr-defined]
        # Stays so: else a thread of Ray Serve that comes late would start a Ray of its own, with all that is closed.
        auto_init_hook.enable_auto_connect = False
        yield


@contextmanager
def _in_home() -> Iterator[None]:
    """Changes to where this package lies: Ray's processes import from the directory that Ray was started in, which may
    hold somebody else's code, as an export does."""
    before = Path.cwd()
    os.chdir(Path(__file__).parents[2])
    try:
        yield
    finally:
        os.chdir(before)


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
