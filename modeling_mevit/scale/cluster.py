# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Ray on this machine, reachable from nowhere else, or a cluster that runs already."""

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


if find_spec("ray") is None:  # said before anything is done; importing it waits until its environment is set
    raise ModuleNotFoundError("No module named 'ray'", name="ray")

LOOPBACK = "127.0.0.1"
OBJECT_STORE = 2 * 2**30  # bytes at most, of what processes hand to each other on one machine

_HAS_OTHER_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": all ports of Ray are on the loopback address


@contextmanager
def connected(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Connects this process to Ray, and leaves at the end.

    Where neither an address nor a running Ray is given, Ray starts on this machine and ends with the context: without
    a dashboard, without a port for clients, with its other ports on 127.0.0.1 and a token that no other user knows.

    Args:
        address: of a cluster, such as `"10.0.0.1:6379"`, or `"auto"` on one of its machines.
        num_cpus: that the Ray of this machine may hand out; all cores by default.

    Raises:
        ValueError: where the cluster does not answer, or the Ray of this machine could be reached from others.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # by the program that calls this
        yield
        return
    os.environ[_HAS_OTHER_NODES] = "0" if address is None else "1"
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray
    from ray import _raylet
    from ray._private import auto_init_hook, ray_constants

    # Ray reads both when it is imported, which may have been before
    ray_constants.ENABLE_RAY_CLUSTER = address is not None
    _raylet.Config.initialize("")  # type: ignore[attr-defined]
    # else a thread of Ray Serve that comes late would start a Ray of its own, with all that is closed here
    auto_init_hook.enable_auto_connect = False
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
        if address is None and ray.util.get_node_ip_address() != LOOPBACK:
            address = ray.util.get_node_ip_address()
            raise ValueError(f"Ray must listen on {LOOPBACK} alone, got {address}; this version of it does not.")
        yield
    finally:
        ray.shutdown()


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
