# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The images that are scored: which there are, and what their files hold.

A list of images is a table with the column `path`, the name that an image keeps in the results. Images that Parquet
files hold themselves have the names FILE#ROW, and their place in columns `file`, `row_group` and `row` (in the group).
"""

import os
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ..data.image_files import image_extensions
from . import files


PARQUET = ".parquet"
ROWS_AT_ONCE = 64  # of a Parquet file
NAMES_AT_ONCE = 2**16
READ_AHEAD = 2**20  # bytes of a column
NO_GROUP = -1  # of a Parquet file that cannot be read

# what an image's file holds, the name of the file, or why a Parquet file does not give it
Content = bytes | str | OSError

_NO_ROWS = pa.array([], pa.binary())


def list_images(source: str, image_column: str | None = None, without: str | None = None) -> pa.Table:
    """Lists the images of a folder, a glob, Parquet files or a single file.

    Of several Parquet files, one that cannot be read is listed as an image of its name, which cannot be read either.

    Args:
        source: a path or a URI. Of a folder, hidden files and those that are no images by their names are left out.
        image_column: of Parquet files, with images (bytes, or as Datasets stores them) or their names, relative to the
            Parquet file; by default the only one with images, else `path` or `image`.
        without: full name of a directory that is left out.

    Raises:
        ValueError: where there is nothing, or both images and Parquet files, or the column is missing or another.
        OSError: where it cannot be listed.
    """
    tables, chunks = [], []
    names = _names(files.full_name(source), without)
    while some := list(islice(names, NAMES_AT_ONCE)):
        tables += [name for name in some if _suffix(name) == PARQUET]
        chunks.append(pa.array([name for name in some if _suffix(name) != PARQUET], pa.string()))
    images = pa.chunked_array(chunks, pa.string())
    if not tables and not len(images):
        raise ValueError(f"SOURCE must be a folder, a glob, or Parquet files with images, got {source}: none there.")
    if tables and len(images):
        raise ValueError(
            f"SOURCE must hold images or Parquet files, got both in {source}: {len(tables)} Parquet files and "
            f"{len(images)} others; name them by a glob, such as '*{PARQUET}'."
        )
    if image_column is not None and not tables:
        raise ValueError(f"--image-column is for Parquet files, got {source} without any.")
    if not tables:
        return pa.table({"path": images})
    listed, damaged = [], []
    for table in tables:
        try:
            listed.append(_images_in(table, image_column))
        except pa.ArrowException as error:
            if len(tables) == 1:
                raise ValueError(f"{table} cannot be read as a Parquet file: {error}") from error
            damaged.append(table)
    if not listed:
        raise ValueError(f"none of the {len(damaged)} Parquet files of {source} can be read.")
    images = pa.concat_tables([*listed, _unreadable(damaged, listed[0].schema)])
    return images if "file" in images.column_names else pa.table({"path": pc.unique(images["path"])})


class Contents:
    """Reads what listed images hold.

    A Parquet file is read a few rows at a time, whatever the size of its row groups. As these can be read from their
    beginning alone, the next list goes on where the last one ended: lists that are in order read a group once.

    Args:
        image_column: of Parquet files, see [`list_images`].
    """

    def __init__(self, image_column: str | None = None):
        self.image_column = image_column
        self._group: tuple[str, int] | None = None  # file and row group that is open
        self._batches: Iterator[pa.Array] = iter(())
        self._batch, self._start = _NO_ROWS, 0  # rows, and which of the group the first one is
        self._failure: OSError | None = None  # of that group

    def of(self, images: pa.Table) -> Iterator[tuple[str, Content]]:
        """Names of listed images, in order, and what their files hold, which files these are, or why there is
        nothing."""
        paths = images["path"].to_pylist()
        if "file" not in images.column_names:
            yield from zip(paths, paths, strict=True)
            return
        places = (images[column].to_pylist() for column in ("file", "row_group", "row"))
        for path, file, group, row in zip(paths, *places, strict=True):
            yield path, self._content(file, group, row)

    def _content(self, file: str, group: int, row: int) -> Content:
        if group == NO_GROUP:
            return OSError(f"{file} cannot be read as a Parquet file")
        if self._group != (file, group) or row < self._start:
            self._batches = _batches(file, group, self.image_column)
            self._group, self._batch, self._start, self._failure = (file, group), _NO_ROWS, 0, None
        try:
            while self._failure is None and row >= self._start + len(self._batch):
                self._start, self._batch = self._start + len(self._batch), next(self._batches)
        except (OSError, pa.ArrowException) as error:
            self._failure = OSError(f"{file} cannot be read: {' '.join(str(error).split())}")
        if self._failure is not None:
            return self._failure
        value = self._batch[row - self._start].as_py()
        if isinstance(value, dict) and value["bytes"] is None and value.get("path"):
            return files.beside(file, value["path"])  # as Datasets stores images whose files stay where they are
        return (value["bytes"] if isinstance(value, dict) else value) or b""  # nothing of those that are null


def _names(source: str, without: str | None) -> Iterator[str]:
    """Names of the files that a source has, but for those in a directory."""
    if files.is_pattern(source):
        yield from files.files_matching(source, without)
    elif (kind := files.kind_of(source)) == fs.FileType.Directory:
        taken = {*image_extensions(), PARQUET}
        yield from (name for name in files.files_below(source, without) if _suffix(name) in taken)
    elif kind == fs.FileType.File:
        yield source


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _images_in(file: str, image_column: str | None) -> pa.Table:
    """Lists the images of one Parquet file."""
    with files.open_file(file) as opened:
        parquet = pq.ParquetFile(opened)
        column = _column(file, parquet.schema_arrow, image_column)
        if _has_names(parquet.schema_arrow.field(column).type):
            names = parquet.read(columns=[column])[column].to_pylist()
            return pa.table({"path": [files.beside(file, name) for name in names if name]})
        groups = [parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups)]
    total = sum(groups)
    return pa.table(
        {
            "path": pa.array((f"{file}#{row}" for row in range(total)), pa.string(), size=total),
            "file": pa.repeat(pa.scalar(file), total).dictionary_encode(),
            "row_group": pa.array((n for n, count in enumerate(groups) for _ in range(count)), pa.int32(), size=total),
            "row": pa.array((row for count in groups for row in range(count)), pa.int32(), size=total),
        }
    )


def _unreadable(tables: list[str], schema: pa.Schema) -> pa.Table:
    """Parquet files that cannot be read, an image each, listed as those of others are."""
    count = len(tables)
    columns = {"path": pa.array(tables, pa.string())}
    if "file" in schema.names:
        columns["file"] = columns["path"].dictionary_encode()
        columns |= {"row_group": pa.array([NO_GROUP] * count, pa.int32()), "row": pa.array([0] * count, pa.int32())}
    return pa.table(columns)


def _column(file: str, schema: pa.Schema, given: str | None) -> str:
    """Which column of a Parquet file has the images, or their names."""
    usable = [field.name for field in schema if _has_images(field.type) or _has_names(field.type)]
    if given is not None:
        if given not in usable:
            raise ValueError(
                f"--image-column must be one of those of {file} with images or their names, {', '.join(usable)}, "
                f"got {given!r}."
            )
        return given
    with_images = [field.name for field in schema if _has_images(field.type)]
    likely = with_images if with_images else [name for name in ("path", "image") if name in usable]
    if len(likely) != 1:
        raise ValueError(
            f"--image-column must say which column of {file} has the images or their names: one of "
            f"{', '.join(schema.names)}."
        )
    return likely[0]


def _has_images(kind: pa.DataType) -> bool:
    """Whether a column is of files' bytes, or as Datasets stores images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _has_names(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _batches(file: str, group: int, image_column: str | None) -> Iterator[pa.Array]:
    """The images of one row group of a Parquet file, some rows at a time."""
    with files.open_file(file) as opened:
        parquet = pq.ParquetFile(opened, buffer_size=READ_AHEAD, pre_buffer=False)
        column = _column(file, parquet.schema_arrow, image_column)
        for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column]):
            yield batch.column(column)
