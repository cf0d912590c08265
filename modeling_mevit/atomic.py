# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Writing where something may be read, or lost: each file of a directory is the old one or the new one, never a part.

New content is written in full, and to the disk, beside what it replaces; renaming it then takes one step of the file
system. So a process that is killed, or a full disk, leaves what was there. A link is replaced, not written through.
"""

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


# inside the directory, so that renaming crosses no file systems; the Hub client never uploads `.cache/huggingface`
_WORK = Path(".cache", "huggingface", "mevit")
# Replaced after all others, in this order: today's code reads older configs, and the card is rendered from the config.
_LAST = ("config.json", "README.md")


def write_text(file: Path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with staged(file.parent) as stage:
        (stage / file.name).write_text(text, "utf-8")


@contextmanager
def staged(directory: Path, read: Iterable[str] = ()) -> Iterator[Path]:
    """Gives a directory to write to; at the end, those of its files that are new or changed move to `directory`.

    All are on the disk before the first moves; code moves first, then `config.json`, then `README.md`. An error before
    that leaves `directory` as it was.

    Args:
        directory: is made where there is none.
        read: names of files of `directory` to copy into the one that is given, where there are such.
    """
    work = _made(directory)
    try:
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            stage = Path(temporary, directory.resolve().name)  # a model card may be titled by it
            stage.mkdir()
            for name in read:
                if (directory / name).is_file():
                    shutil.copyfile(directory / name, stage / name)
            yield stage
            _move(stage, directory)
    finally:
        _remove_if_empty(directory)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time write to a directory, which is made where there is none.

    Raises:
        ValueError: where another process holds the lock.
    """
    is_new = not directory.exists()
    work = _made(directory)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another mevit command is writing to {directory}; start this one when it has ended."
        ) from error
    try:
        yield
    finally:
        shutil.rmtree(work, ignore_errors=True)  # with what killed processes left; Windows keeps the open lock file
        lock.release()
        _remove_if_empty(directory)
        if is_new and not any(directory.iterdir()):
            directory.rmdir()


def _made(directory: Path) -> Path:
    """The directory to work in, made where there is none.

    Raises:
        ValueError: where a part of it is a link: what lies elsewhere is not this package's to remove.
    """
    work = directory / _WORK
    for part in (work, *work.parents[: len(_WORK.parts) - 1]):
        if part.is_symlink():
            raise ValueError(f"{part} must be a directory, to write {directory} in; it is a link to {part.resolve()}.")
    work.mkdir(parents=True, exist_ok=True)
    return work


def _move(stage: Path, directory: Path) -> None:
    files = [file for file in stage.iterdir() if not _is_same(file, directory / file.name)]
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    for file in sorted(files, key=_rank):
        os.replace(file, directory / file.name)
    if os.name == "posix":  # Windows opens no directories
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _rank(file: Path) -> tuple[int, bool, str]:
    return (_LAST.index(file.name) + 1 if file.name in _LAST else 0, file.suffix != ".py", file.name)


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def _remove_if_empty(directory: Path) -> None:
    """Removes the directories to work in, as far as nothing else lies there."""
    for part in (_WORK, *_WORK.parents[:-1]):
        if (directory / part).is_dir() and not any((directory / part).iterdir()):
            (directory / part).rmdir()
