# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import os
import re
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_mevit.scale import files
from modeling_mevit.scale.sources import Contents, list_images
from tests.helpers.images import write_image


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for name in ("b/2.png", "b/1.JPG", "a/c/3.webp", ".hidden/4.png", "a/.5.png"):
        write_image(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def names(table: pa.Table) -> list[str]:
    return table["path"].to_pylist()


def test_a_folder_has_the_visible_images_below_it(folder):
    expected = [str(folder / name) for name in ("a/c/3.webp", "b/1.JPG", "b/2.png")]
    assert names(list_images(str(folder))) == names(list_images(f"{folder}/")) == expected
    assert names(list_images(f"file://{folder}")) == expected
    assert names(list_images(str(folder / "b/2.png"))) == [str(folder / "b/2.png")]


def test_relative_names_become_whole(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert names(list_images("photos/b")) == names(list_images("./photos/b/*")) == names(list_images(f"{folder}/b"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/*.png", ["b/2.png"]),
        ("**/[12].???", ["b/1.JPG", "b/2.png"]),
        ("b/[12].*", ["b/1.JPG", "b/2.png"]),
        ("*.txt", ["notes.txt"]),  # what a glob names is taken, whatever its name
    ],
)
def test_globs(folder, pattern, expected):
    assert names(list_images(f"{folder}/{pattern}")) == [str(folder / name) for name in expected]


def test_a_name_with_wildcards_in_it_is_itself(folder):
    file = write_image(folder / "a[1].png")
    assert names(list_images(str(file))) == [str(file)]


def test_parquet_with_images(folder, tmp_path):
    content = [(folder / name).read_bytes() for name in ("b/2.png", "b/1.JPG", "a/c/3.webp")] * 2
    plain, structs = tmp_path / "tables" / "plain.parquet", tmp_path / "tables" / "structs.parquet"
    plain.parent.mkdir()
    pq.write_table(pa.table({"number": range(6), "photo": content}), plain, row_group_size=4)
    images = [{"bytes": one, "path": "same.jpg"} for one in content[:4]] + [None, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": images, "path": ["same.jpg"] * 6}), structs, row_group_size=5)
    listed = list_images(str(plain.parent))
    assert names(listed) == [f"{file}#{row}" for file in (plain, structs) for row in range(6)]
    expected = [*content, *content[:4], b"", b""]
    assert list(Contents().of(listed)) == list(zip(names(listed), expected, strict=True))
    # any rows, in order, of any files
    some = listed.take([1, 3, 4, 9, 10])
    assert [content for _, content in Contents().of(some)] == [expected[place] for place in (1, 3, 4, 9, 10)]
    assert names(list_images(f"{tmp_path}/*/plain.parquet", "photo")) == names(listed)[:6]


def test_parquet_as_datasets_writes_it_of_local_files(folder, tmp_path):
    files = [str(folder / "b/2.png"), str(folder / "b/1.JPG")]
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    read = [content for _, content in Contents().of(list_images(str(tmp_path / "rows.parquet")))]
    assert read == files or read == [Path(file).read_bytes() for file in files]
    stored = pa.array(
        [{"bytes": None, "path": "photos/b/2.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": stored}), tmp_path / "beside.parquet")
    [(_, content)] = Contents().of(list_images(str(tmp_path / "beside.parquet")))
    assert content == files[0]


@pytest.mark.parametrize("with_names", [False, True])
def test_parquet_files_that_cannot_be_read_are_images_that_cannot(folder, tmp_path, with_names):
    image = "photos/b/2.png" if with_names else (folder / "b/2.png").read_bytes()
    for name in ("a", "b", "c"):
        pq.write_table(pa.table({"image": [image] * 200}), tmp_path / f"{name}.parquet", row_group_size=100)
    damaged = tmp_path / "b.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    listed = list_images(f"{tmp_path}/*.parquet")
    assert names(listed)[-1] == str(damaged) and len(listed) == (2 if with_names else 401)
    *_, (name, content) = Contents().of(listed)
    assert name == str(damaged)
    if not with_names:
        assert isinstance(content, OSError) and str(content) == f"{damaged} cannot be read as a Parquet file"
    for name in ("a", "c"):
        (tmp_path / f"{name}.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 3 Parquet files of .* can be read"):
        list_images(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="b.parquet cannot be read as a Parquet file: "):
        list_images(str(damaged))


def test_a_row_group_that_cannot_be_read_fails_alone(tmp_path):
    file = tmp_path / "large.parquet"
    content = [os.urandom(1000) for _ in range(300)]
    pq.write_table(pa.table({"image": content}), file, row_group_size=100, use_dictionary=False)
    listed, group = list_images(str(file)), pq.ParquetFile(file).metadata.row_group(1).column(0)
    with file.open("r+b") as opened:
        opened.seek(group.data_page_offset)
        opened.write(b"\xff" * group.total_compressed_size)
    read = [content for _, content in Contents().of(listed)]
    assert read[:100] == content[:100] and read[200:] == content[200:]
    assert all(isinstance(one, OSError) for one in read[100:200])


def test_a_directory_can_be_left_out(folder):
    write_image(folder / "b2" / "7.png")
    listed = names(list_images(str(folder), without=str(folder / "b")))
    assert listed == [str(folder / "a/c/3.webp"), str(folder / "b2" / "7.png")]
    assert names(list_images(f"{folder}/**/*.png", without=str(folder / "b"))) == [str(folder / "b2" / "7.png")]
    (folder.parent / "link").symlink_to(folder)  # by whatever name
    listed = names(list_images(str(folder.parent / "link"), without=str(folder / "b")))
    assert listed == [str(folder.parent / "link" / name) for name in ("a/c/3.webp", "b2/7.png")]


def test_blocks_in_order_read_a_row_group_once(tmp_path, monkeypatch):
    """Each would start at its first row: of a group of a million images, blocks read a thousand times as many."""
    file = tmp_path / "large.parquet"
    content = [f"{number}".encode() for number in range(1000)]
    pq.write_table(pa.table({"image": content}), file, row_group_size=1000)
    listed = list_images(str(file))
    opened = []
    open_file = files.open_file
    monkeypatch.setattr(files, "open_file", lambda name: opened.append(name) or open_file(name))
    read = Contents()
    for start in range(0, 1000, 100):
        assert [one for _, one in read.of(listed.slice(start, 100))] == content[start : start + 100]
    assert len(opened) == 1
    assert [one for _, one in read.of(listed.slice(130, 100))] == content[130:230]  # one that is read again


def test_a_link_to_a_directory_leads_to_it_once(folder):
    (folder / "a" / "self").symlink_to(".")
    (folder / "again").symlink_to("b")
    (folder / "a" / "up").symlink_to("..")
    elsewhere = write_image(folder.parent / "elsewhere" / "6.png").parent
    (folder / "z").symlink_to(elsewhere)
    listed = names(list_images(str(folder)))
    assert listed == [str(folder / name) for name in ("a/c/3.webp", "again/1.JPG", "again/2.png", "z/6.png")]


def test_a_name_that_is_not_utf8_is_listed_by_its_bytes(folder):
    os.rename(folder / "b" / "2.png", os.fsencode(folder / "b") + b"/\xff.png")
    assert names(list_images(str(folder / "b"))) == [str(folder / "b" / "1.JPG"), str(folder / "b" / "\\xff.png")]
    with pytest.raises(ValueError, match=r"a name must be UTF-8, got b'.*\\xff.png'; rename it"):
        list_images(os.fsdecode(os.fsencode(folder / "b") + b"/\xff.png"))


def test_parquet_with_names(folder, tmp_path):
    given = ["photos/b/2.png", str(folder / "b/1.JPG"), "photos/b/2.png", None, "s3://bucket/c.jpg"]
    for name in ("names", "more"):
        pq.write_table(pa.table({"path": given, "label": ["x"] * 5}), tmp_path / f"{name}.parquet")
    listed = list_images(f"{tmp_path}/*.parquet")
    expected = [str(folder / "b/2.png"), str(folder / "b/1.JPG"), "s3://bucket/c.jpg"]
    assert names(listed) == expected  # each once
    assert list(Contents().of(listed)) == [(name, name) for name in expected]
    assert names(list_images(str(tmp_path / "names.parquet"), "label")) == [str(tmp_path / "x")]


@pytest.mark.parametrize(
    ("source", "column", "message"),
    [
        ("nothing", None, "SOURCE must be a folder, a glob, or Parquet files with images, got .*nothing: none there"),
        ("empty", None, "none there"),
        ("photos/*.gif", None, "none there"),
        ("nothing/*.gif", None, "none there"),
        ("mixed", None, "must hold images or Parquet files, got both in .*: 1 Parquet files and 3 others"),
        ("photos", "image", "--image-column is for Parquet files, got .*photos without any"),
        ("mixed/*.parquet", "label", r"--image-column must be one of those of .* names, photo, path, got 'label'"),
        ("two.parquet", None, r"--image-column must say which column of .*two.parquet .* one of one, two"),
        ("damaged.parquet", None, "damaged.parquet cannot be read as a Parquet file"),
    ],
)
def test_what_is_no_source_is_named(folder, tmp_path, source, column, message):
    (tmp_path / "empty").mkdir()
    mixed = shutil.copytree(folder, tmp_path / "mixed")
    pq.write_table(pa.table({"label": [1], "photo": [b"x"], "path": ["x"]}), mixed / "table.parquet")
    pq.write_table(pa.table({"one": [b"x"], "two": [b"x"]}), tmp_path / "two.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=message) as raised:
        list_images(str(tmp_path / source), column)
    assert "\n" not in str(raised.value)


def test_a_store_that_cannot_be_reached_is_named():
    with pytest.raises(OSError, match="carrier-pigeon://loft cannot be reached"):
        list_images("carrier-pigeon://loft/*.jpg")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "part.parquet"
    files.write_file(str(file), b"old")
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_file(str(file), b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_reading_a_file_names_it(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "absent.jpg"))):
        files.read_file(str(tmp_path / "absent.jpg"))
