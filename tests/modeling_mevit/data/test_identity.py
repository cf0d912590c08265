# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which images these are: hashes of content, a fingerprint of a data set, and digests that a checkpoint carries."""

import base64
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_mevit.data import identity
from modeling_mevit.data.identity import (
    count_known,
    encode_digests,
    fingerprint,
    image_hashes,
    is_local,
    public_name,
    select_independent,
)


HASHES = [hashlib.sha256(bytes([number])).hexdigest() for number in range(20)]


def test_hashes_are_of_content(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"the same")
    rows = [
        {"image": {"path": str(tmp_path / "a.jpg"), "bytes": None}, "label": 0},
        {"image": {"path": str(tmp_path / "b.png"), "bytes": None}, "label": 1},
        {"image": {"path": None, "bytes": b"the same"}, "label": 2},
        {"image": {"path": "missing.jpg", "bytes": b"other"}, "label": 0},
    ]
    same = hashlib.sha256(b"the same").hexdigest()
    assert image_hashes(rows) == [same, same, same, hashlib.sha256(b"other").hexdigest()]


def test_the_fingerprint_is_of_images_and_labels_whatever_their_order():
    labels = [number % 3 for number in range(20)]
    whole = fingerprint(HASHES, labels)
    assert whole == fingerprint(HASHES[::-1], labels[::-1])
    assert whole != fingerprint(HASHES[:-1], labels[:-1])
    assert whole != fingerprint(HASHES, labels[::-1])  # the same images and the same labels, put together otherwise
    assert whole != fingerprint(HASHES[:-1] + HASHES[:1], labels)
    # checkpoints that are calibrated already have it
    assert fingerprint(HASHES[:2], [1, 0]) == hashlib.sha256(f"0/{HASHES[1]}\n1/{HASHES[0]}".encode()).hexdigest()
    with pytest.raises(ValueError):
        fingerprint(HASHES, labels[:-1])


def test_digests_are_short_and_tell_images_again():
    encoded = encode_digests(HASHES[:10])
    assert len(encoded) == 8 * 10 and len(base64.b64decode(encoded)) == 6 * 10
    assert encoded == encode_digests(HASHES[9::-1]) == encode_digests(HASHES[:10] + HASHES[:3])
    assert count_known(HASHES, encoded) == 10
    assert count_known(HASHES[5:12], encoded) == 5
    assert count_known(HASHES[10:], encoded) == 0
    assert count_known([HASHES[0], HASHES[0], HASHES[19]], encoded) == 2
    assert encode_digests(HASHES[:6], encode_digests(HASHES[4:10])) == encoded
    assert encode_digests([]) == "" and count_known(HASHES, "") == 0


def test_independent_images_are_the_first_of_each_content_that_did_not_train():
    hashes = [HASHES[number] for number in (0, 1, 0, 2, 1, 3, 3)]
    assert select_independent(hashes, None) == ([0, 1, 3, 5], 3, 0)
    assert select_independent(hashes, encode_digests([HASHES[1], HASHES[9]])) == ([0, 3, 5], 2, 2)
    assert select_independent(hashes, encode_digests(HASHES)) == ([], 0, 7)
    assert select_independent([], None) == ([], 0, 0)


def test_a_digest_is_compared_as_a_whole():
    """Six bytes that lie across two digests are none of them."""
    encoded = encode_digests(HASHES[:2])
    digests = base64.b64decode(encoded)
    across = digests[3:9].hex() + HASHES[5][12:]
    assert count_known([across], encoded) == 0
    assert count_known([digests[:6].hex() + HASHES[5][12:]], encoded) == 1


def test_public_names(tmp_path, monkeypatch):
    (tmp_path / "private" / "cars").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "private" / "cars")
    for name in (tmp_path / "private" / "cars", str(tmp_path / "private" / "cars"), ".", "../cars/"):
        assert is_local(name) and public_name(name) == "cars"
    for name in ("owner/cars", "demo"):
        assert not is_local(name) and public_name(name) == name


def test_the_standard_library_is_enough():
    command = [sys.executable, "-I", "-S", str(Path(identity.__file__))]  # without installed packages
    subprocess.run(command, check=True, timeout=60)
