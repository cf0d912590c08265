# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Files by URI, in a store of Arrow's that lies in memory: what is in a bucket is scored into a bucket."""

import json
import secrets

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from modeling_mevit.scale import files
from modeling_mevit.scale.results import open_results
from modeling_mevit.scale.score import ScoringActor
from modeling_mevit.scale.sources import list_images
from tests.modeling_mevit.scale.conftest import readable


@pytest.fixture
def bucket() -> str:
    """The URI of a store of its own."""
    return f"mock://{secrets.token_hex(8)}"


def test_files_of_a_store(bucket):
    directory = f"{bucket}/photos/a"
    files.make_directory(directory)
    for name in ("2.png", "1.jpg", ".hidden.png"):
        files.write_file(f"{directory}/{name}", name.encode())
    assert files.read_file(f"{directory}/1.jpg") == b"1.jpg"
    assert list(files.files_below(f"{bucket}/photos")) == [f"{directory}/1.jpg", f"{directory}/2.png"]
    assert list(files.files_matching(f"{bucket}/photos/**/*.png")) == [f"{directory}/2.png"]
    kinds = [files.kind_of(f"{bucket}/photos{name}") for name in ("", "/a/2.png", "/b")]
    assert kinds == [fs.FileType.Directory, fs.FileType.File, fs.FileType.NotFound]
    with pytest.raises(OSError, match=f"{bucket}/photos/b.png cannot be read: "):
        files.read_file(f"{bucket}/photos/b.png")


@pytest.mark.slow
@pytest.mark.parametrize("in_parquet", [False, True])
def test_a_bucket_is_scored_into_a_bucket(spread, noises, bucket, in_parquet):
    source, output = f"{bucket}/photos", f"{bucket}/scores"
    files.make_directory(source)
    images = readable(noises)[:6]
    if in_parquet:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": [image.read_bytes() for image in images]}), buffer, row_group_size=4)
        files.write_file(f"{source}/images.parquet", buffer.getvalue().to_pybytes())
        expected = [f"{source}/images.parquet#{row}" for row in range(6)]
    else:
        expected = [f"{source}/{number}.png" for number in range(6)]
        for name, image in zip(expected, images, strict=True):
            files.write_file(name, image.read_bytes())
    assert open_results(output, "model").to_pylist() == []
    told = ScoringActor(str(spread), output, "model", 4, 1, False, None)(list_images(source))
    assert told["failure"].to_pylist() == [""]
    assert json.loads(told["summary"][0].as_py())["errors"] == 0
    assert open_results(output, "model").to_pylist() == expected  # so that a second run has nothing left to do
