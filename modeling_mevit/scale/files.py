# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Files on this machine and in the cloud, by one kind of name: an absolute path, or a URI such as s3://bucket/key."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

import pyarrow as pa
from fsspec.utils import glob_translate
from pyarrow import fs


_STORE = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*", re.IGNORECASE)
_WILDCARD = re.compile(r"[*?\[]")


def full_name(name: str) -> str:
    """A name as users write it, as all functions here take it; raises a `ValueError` where it is not of UTF-8."""
    if not _is_utf8(name):
        raise ValueError(f"a name must be UTF-8, got {os.fsencode(name)!r}; rename it.")
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    return name if is_remote(name) else os.path.abspath(os.path.expanduser(name))


def is_remote(name: str) -> bool:
    """Whether a name is a URI."""
    return _STORE.match(name) is not None


def read_file(name: str) -> bytes:
    """What a file holds.

    Raises:
        OSError: where it cannot be read.
    """
    with _named(name, "read"), open_file(name) as file:
        content: bytes = file.readall()
    return content


def open_file(name: str) -> pa.NativeFile:
    """A file to read at any place of it; raises an `OSError` where it cannot be."""
    with _named(name, "read"):
        store, path = _in_store(name)
        return store.open_input_file(path)


def write_file(name: str, content: bytes) -> None:
    """Writes a file whole or not at all: beside its name, to the disk, and renamed. Stores in the cloud do as much by
    themselves, where an object appears once all of it is there.

    Raises:
        OSError: where it cannot be written.
    """
    if is_remote(name):
        store, path = _in_store(name)
        with store.open_output_stream(path) as stream:
            stream.write(content)
        return
    file = Path(name)
    part = file.with_name(f"{_PART}{file.name}.{secrets.token_hex(4)}")
    try:
        with part.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(directory: str) -> None:
    """Removes what killed processes left unfinished in a directory; nobody may be writing to it."""
    if not is_remote(directory):
        for part in Path(directory).glob(f"{_PART}*"):
            part.unlink(missing_ok=True)


def make_directory(name: str) -> None:
    """Makes a directory where there is none; raises an `OSError` where it cannot be."""
    store, path = _in_store(name)
    store.create_dir(path, recursive=True)


def kind_of(name: str) -> fs.FileType:
    """Whether a name is that of a file, a directory or nothing."""
    with _named(name, "read"):
        store, path = _in_store(name)
        return store.get_file_info(path).type


def files_below(directory: str, without: str | None = None) -> Iterator[str]:
    """Names of the files in a directory and in those below it, in order, without hidden ones; listed one directory
    after another, so that no more than one is held.

    Links to directories are followed, and a directory that several names lead to is listed by the first of them. In a
    name that is not UTF-8, `\\xff` stands for such a byte; the file cannot be opened by it. The directory `without` is
    left out, with all below it, by whatever name.
    """
    return _files_below(directory, set() if without is None else {_where(without)})


def _where(directory: str) -> str:
    """What a directory has one of, whatever its names."""
    return directory.rstrip("/") if is_remote(directory) else os.path.realpath(directory)


def _files_below(directory: str, listed: set[str]) -> Iterator[str]:
    if _where(directory) in listed:
        return
    listed.add(_where(directory))
    home = directory.rstrip("/")
    for name, is_directory in _entries(directory):
        if is_directory:
            yield from _files_below(f"{home}/{name}", listed)
        else:
            yield f"{home}/{name}"


def _entries(directory: str) -> list[tuple[str, bool]]:
    """Names in a directory, in order, without hidden ones; and whether each is a directory."""
    with _named(directory, "listed"):
        if is_remote(directory):
            store, path = _in_store(directory)
            found = store.get_file_info(fs.FileSelector(path))
            entries = [(info.base_name, info.type == fs.FileType.Directory) for info in found]
        else:
            with os.scandir(directory) as local:
                entries = [(_as_utf8(entry.name), entry.is_dir()) for entry in local]
    return sorted(entry for entry in entries if not entry[0].startswith("."))


def _as_utf8(name: str) -> str:
    return name if _is_utf8(name) else os.fsencode(name).decode(errors="backslashreplace")


def _is_utf8(name: str) -> bool:
    """Whether no byte of a file's name had to be replaced, as Python does with those that are not UTF-8."""
    return not any("\udc80" <= character <= "\udcff" for character in name)


def files_matching(pattern: str, without: str | None = None) -> Iterator[str]:
    """Names of the files that a pattern with `*`, `?`, `[…]` or `**` matches, in order, without hidden ones and those
    in the directory `without`."""
    first = _WILDCARD.search(pattern)
    assert first is not None
    home = pattern[: pattern.rindex("/", 0, first.start())] or "/"
    if kind_of(home) == fs.FileType.Directory:
        yield from filter(re.compile(glob_translate(pattern)).match, files_below(home, without))


def is_pattern(name: str) -> bool:
    """Whether a name has wildcards, and is not that of a file or a directory itself."""
    return _WILDCARD.search(name) is not None and kind_of(name) == fs.FileType.NotFound


def beside(file: str, name: str) -> str:
    """The full name of what a file calls `name`: itself, or relative to where that file lies."""
    if is_remote(name) or PurePosixPath(name).is_absolute():
        return full_name(name)
    return f"{file.rpartition('/')[0]}/{name}"


_PART = ".unfinished-"


@contextmanager
def _named(name: str, done: str) -> Iterator[None]:
    """Raises an `OSError` that names the file, whatever else a store raises."""
    try:
        yield
    except Exception as error:  # a client of a store has errors of its own
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and name in reason:
            raise
        raise OSError(f"{name} cannot be {done}: {reason}") from error


def _in_store(name: str) -> tuple[fs.FileSystem, str]:
    """Where a file lies, and how it is called there."""
    match = _STORE.match(name)
    prefix = match[0] if match else ""
    store, root = _store(prefix)
    return store, root + name[len(prefix) :]


@cache
def _store(prefix: str) -> tuple[fs.FileSystem, str]:
    """This machine's files for "", a bucket for s3://bucket; and what stands for the prefix in names there."""
    if not prefix:
        return fs.LocalFileSystem(), ""
    try:
        return fs.FileSystem.from_uri(prefix)
    except (OSError, pa.ArrowException, ImportError) as error:
        raise OSError(f"{prefix} cannot be reached: {error}") from error
