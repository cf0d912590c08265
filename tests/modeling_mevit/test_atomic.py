# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_mevit.atomic import locked, staged, write_text


OLD = {"code.py": "old code", "config.json": "old config", "README.md": "old card", "figure.png": "old figure"}
NEW = {name: text.replace("old", "new") for name, text in OLD.items()}
IN_ORDER = ["code.py", "figure.png", "config.json", "README.md"]


@pytest.fixture
def directory(tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    write(directory, OLD)
    return directory


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).write_text(text)


def read(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in directory.iterdir() if file.is_file()}


def failing_at(call: int, error: BaseException):
    """`os.replace`, but for one call."""
    calls = []

    def replace(source, target, replace=os.replace):
        calls.append(target)
        if len(calls) == call:
            raise error
        replace(source, target)

    return replace


def test_new_and_changed_files_replace_those_of_before(directory):
    (directory / "mine.txt").write_text("mine")
    before = (directory / "code.py").stat()
    with staged(directory, read=["README.md", "absent.json"]) as stage:
        assert read(stage) == {"README.md": "old card"} and stage.name == "model"
        write(stage, {**NEW, "code.py": "old code", "new.md": "new"})
        assert read(directory) == {**OLD, "mine.txt": "mine"}
    assert read(directory) == {**NEW, "code.py": "old code", "new.md": "new", "mine.txt": "mine"}
    assert (directory / "code.py").stat().st_ino == before.st_ino  # equal, so it stays
    assert not (directory / ".cache").exists()
    write_text(directory / "config.json", "é")
    assert (directory / "config.json").read_bytes() == "é".encode() and not (directory / ".cache").exists()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_code_moves_first_then_config_then_card(directory, monkeypatch, call):
    monkeypatch.setattr(os, "replace", failing_at(call, OSError("stopped")))
    with pytest.raises(OSError, match="stopped"), staged(directory) as stage:
        write(stage, NEW)
    moved = IN_ORDER[: call - 1]
    assert read(directory) == {name: NEW[name] if name in moved else OLD[name] for name in OLD}
    assert not (directory / ".cache").exists()


def test_a_full_disk_leaves_what_was_there(directory, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), staged(directory) as stage:
        write(stage, NEW)
    with pytest.raises(OSError, match="No space left"):
        write_text(directory / "README.md", "new")
    assert read(directory) == OLD and not (directory / ".cache").exists()


def test_a_small_file_system_that_is_full(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    try:
        write(mounted, OLD)
        with pytest.raises(OSError, match="No space left"), staged(mounted) as stage:
            write(stage, {**NEW, "figure.png": "x" * 100_000})
        assert read(mounted) == OLD and not (mounted / ".cache").exists()
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_links_are_replaced_and_not_written_through(directory, tmp_path):
    blob = tmp_path / "blob"
    (directory / "config.json").rename(blob)
    (directory / "config.json").symlink_to("../blob")
    with staged(directory) as stage:
        write(stage, NEW)
    assert blob.read_text() == "old config"
    assert not (directory / "config.json").is_symlink() and read(directory) == NEW


def test_one_at_a_time_and_nothing_remains(directory, tmp_path):
    leftover = directory / ".cache" / "huggingface" / "mevit" / "of_a_killed_process"
    with locked(directory):
        leftover.mkdir()
        with pytest.raises(ValueError, match="another mevit command is writing to .*model"), locked(directory):
            raise AssertionError("never runs")
        with locked(tmp_path / "other"), staged(directory) as stage:
            write(stage, NEW)
    assert read(directory) == NEW and not (directory / ".cache").exists()
    with locked(directory):
        pass
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "mine").touch()
    with locked(directory):
        pass
    assert [file.name for file in (directory / ".cache" / "huggingface").iterdir()] == ["mine"]


HOLDS = """
import sys
from pathlib import Path
from modeling_mevit.atomic import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_killed_process_holds_no_lock(directory):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(directory)], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another mevit command is writing"), locked(directory):
            raise AssertionError("never runs")
        process.kill()
    with locked(directory):
        pass
    assert not (directory / ".cache").exists()


def test_a_link_in_place_of_the_directory_to_work_in_is_refused(tmp_path):
    """What lies behind it is not ours to remove."""
    checkpoint, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    (elsewhere / "huggingface" / "mevit").mkdir(parents=True)
    (elsewhere / "huggingface" / "mevit" / "mine").touch()
    checkpoint.mkdir()
    (checkpoint / ".cache").symlink_to(elsewhere)
    with (
        pytest.raises(ValueError, match=r"\.cache must be a directory, .* it is a link to .*elsewhere"),
        locked(checkpoint),
    ):
        raise AssertionError("locked")
    with pytest.raises(ValueError, match="it is a link to"), staged(checkpoint):
        raise AssertionError("staged")
    assert (elsewhere / "huggingface" / "mevit" / "mine").is_file()


def test_a_directory_that_was_made_to_be_locked_is_removed_where_nothing_was_written(tmp_path):
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new"):
        write_text(tmp_path / "new" / "file.txt", "text")
    assert (tmp_path / "new" / "file.txt").read_text() == "text"
