# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Training on two machines: two processes that reach each other by their addresses alone."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import SHAPE


pytestmark = [pytest.mark.slow, pytest.mark.one_major]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs" / "accelerate"
SCRIPT = ROOT / "tests" / "helpers" / "two_networks.sh"
OWN_NETWORKS = ["unshare", "--user", "--map-root-user", "--net", "sh", str(SCRIPT)]


def demo_recipe(folder: Path, output: Path, batch_size: int) -> list[str]:
    """The demo's recipe on a few small images, with a small model: the arguments of `training/train.py`."""
    settings = {
        "dataset": folder,
        "output_dir": output,
        "image_size": 16,
        "resize_size": 20,
        "model_config": json.dumps(SHAPE),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 3,  # so that no image is counted twice, on any number of processes
        "num_train_epochs": 3,
        "warmup_steps": 3,
        "logging_steps": 1,
    }
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return ["training/train.py", "demo.yaml", *options, "--exit_layers", "1", "2", "3", "--use_cpu"]


def launch(config: str, *options: str) -> list[str]:
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    return [accelerate, "launch", "--config_file", str(CONFIGS / config), "--mixed_precision", "no", *options]


def on_two_machines(commands: list[list[str]]) -> subprocess.CompletedProcess:
    """Runs a command in each of two networks where this machine lets it.

    Else both run in one, and reach the first one by 127.0.0.2, but each other by the loopback interface's own address,
    127.0.0.1: gloo takes the name of an interface, and not an address.

    What says where the first one is reached is added after `accelerate launch`. Returns what came of the first, or of
    both together.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True}
    are_permitted = shutil.which("unshare") and subprocess.run(OWN_NETWORKS, capture_output=True).returncode == 0
    if are_permitted:
        address, port = "10.77.0.1", 29500
    else:
        address = "127.0.0.2"
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
    reach = ["--main_process_ip", address, "--main_process_port", str(port)]
    commands = [[*command[:2], *reach, *command[2:]] for command in commands]
    environment["GLOO_SOCKET_IFNAME"] = "eth0" if are_permitted else "lo"
    if are_permitted:
        scripts = [shlex.join(command) for command in commands]
        return subprocess.run([*OWN_NETWORKS, *scripts], env=environment, timeout=300, **settings)
    second = subprocess.Popen(commands[1], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    first = subprocess.run(commands[0], env=environment, timeout=300, **settings)
    assert second.wait(timeout=60) == first.returncode
    return first


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    result = subprocess.run(
        [sys.executable, *demo_recipe(folder, output, batch_size=6)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def two_machines(folder, tmp_path_factory) -> tuple[Path, Callable[..., subprocess.CompletedProcess]]:
    """The output directory of a run, and what runs its command again, with other output directories if told so."""
    output = tmp_path_factory.mktemp("two") / "run"

    def train(second_output: Path = output) -> subprocess.CompletedProcess:
        commands = [
            [
                *launch("two_machines.yaml", "--num_processes", "2", "--machine_rank", str(rank)),
                *demo_recipe(folder, directory, batch_size=3),
            ]
            for rank, directory in enumerate((output, second_output))
        ]
        return on_two_machines(commands)

    result = train()
    assert result.returncode == 0, result.stderr
    return output, train


def figures(output: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Accuracies of every exit, and losses of every step."""
    metrics = json.loads((output / "metrics.json").read_text())
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    log = [
        {name: value for name, value in entry.items() if name.startswith(("loss", "eval_loss"))}
        for entry in json.loads(state.read_text())["log_history"]
    ]
    return metrics["exits"], log


def test_two_machines_train_to_the_figures_of_one_process(one_process, two_machines):
    expected, expected_log = figures(one_process)
    found, log = figures(two_machines[0])
    recipe = json.loads((two_machines[0] / "metrics.json").read_text())["recipe"]
    assert recipe["num_processes"] == 2 and recipe["per_device_train_batch_size"] == 3
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other)
    assert len(log) > 18
    for entry, other in zip(log, expected_log, strict=True):
        assert entry == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_a_run_whose_output_is_not_shared_is_not_resumed(two_machines, tmp_path):
    """Machines that see other checkpoints would train other steps, and wait for each other for ever."""
    result = two_machines[1](second_output=tmp_path / "own")
    assert result.returncode != 0
    assert "output_dir must be on a file system that all machines share" in result.stderr


def test_processes_without_gpu_are_started_by_their_config(folder, tmp_path):
    output = tmp_path / "run"
    command = [*launch("cpu_processes.yaml"), *demo_recipe(folder, output, batch_size=3), "--max_steps", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((output / "metrics.json").read_text())["recipe"]["num_processes"] == 2


@pytest.mark.parametrize(
    ("name", "machines", "processes_of_each", "precision", "first_machine"),
    [
        ("cpu_processes.yaml", 1, 2, "no", None),
        ("one_machine.yaml", 1, 4, "bf16", None),
        ("two_machines.yaml", 2, 4, "bf16", "192.168.0.10:29500"),
    ],
)
def test_accelerate_starts_what_a_config_says(name, machines, processes_of_each, precision, first_machine):
    launch = pytest.importorskip("accelerate.commands.launch")
    command = ["--config_file", str(CONFIGS / name), "training/train.py", "demo.yaml"]
    arguments, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    environment = launch.prepare_multi_gpu_env(arguments)  # which turns arguments into those of torchrun
    assert arguments.multi_gpu and not arguments.use_cpu  # else it starts a single process
    assert (int(arguments.num_machines), int(arguments.nproc_per_node)) == (machines, processes_of_each)
    assert environment["ACCELERATE_MIXED_PRECISION"] == precision
    if first_machine:
        assert (arguments.rdzv_endpoint, int(arguments.nnodes)) == (first_machine, machines)


def test_every_config_is_tested():
    assert {file.name for file in CONFIGS.glob("*.yaml")} == {
        "cpu_processes.yaml",
        "one_machine.yaml",
        "two_machines.yaml",
    }
