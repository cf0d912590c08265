# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Which images a data set holds, by their content, and what a data set may be called in public.

A checkpoint carries short digests of the images that calibrated it, so that an evaluation can tell whether it is
given the same ones, without the data set and whatever the files are called.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any


# 48 bits of each SHA-256: two sets of 10,000 images have one equal digest by chance in 1 of 2.8 million cases.
DIGEST_BYTES = 6
UNLABELLED = "unlabelled"  # the split of every image in a folder, whose labels are not looked at


def image_hashes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """SHA-256, in hexadecimal, of each image file's content, without decoding it.

    Args:
        rows: with the key `image`, a dict with the `bytes` of a file or, where they are None, the `path` to it.
    """
    hashes = []
    for row in rows:
        path, content = row["image"]["path"], row["image"]["bytes"]
        hashes.append(hashlib.sha256(Path(path).read_bytes() if content is None else content).hexdigest())
    return hashes


def fingerprint(hashes: Iterable[str], labels: Iterable[int] | None) -> str:
    """SHA-256, in hexadecimal, of which images with which labels these are, whatever their order.

    Args:
        hashes: one per image, of [`image_hashes`].
        labels: one per image, as the model numbers them; None of unlabelled images.
    """
    if labels is None:
        samples = sorted(hashes)
    else:
        samples = sorted(f"{label}/{image_hash}" for image_hash, label in zip(hashes, labels, strict=True))
    return hashlib.sha256("\n".join(samples).encode()).hexdigest()


def encode_digests(hashes: Iterable[str], encoded: str = "") -> str:
    """The first 6 bytes of each hash, equal ones once, sorted, as base64: 8 characters per image.

    Args:
        hashes: one per image, of [`image_hashes`].
        encoded: further images, as this function encoded them.
    """
    digests = {bytes.fromhex(image_hash)[:DIGEST_BYTES] for image_hash in hashes} | _decode_digests(encoded)
    return base64.b64encode(b"".join(sorted(digests))).decode("ascii")


def count_known(hashes: Iterable[str], encoded: str) -> int:
    """How many of the hashes are among those that [`encode_digests`] encoded."""
    return sum(_are_known(hashes, encoded))


def select_independent(hashes: Sequence[str], training: str | None) -> tuple[list[int], int, int]:
    """Which images can calibrate a model: those that did not train it, and of equal ones the first.

    Args:
        hashes: one per image, of [`image_hashes`].
        training: the images that trained the model, of [`encode_digests`]; None where that is not known.

    Returns:
        Indices of the images to take, how many others are copies of one of them, and how many trained the model.
    """
    trained = _are_known(hashes, training or "")
    first: dict[str, int] = {}
    for index, (image_hash, known) in enumerate(zip(hashes, trained, strict=True)):
        if not known:
            first.setdefault(image_hash, index)
    return list(first.values()), len(hashes) - sum(trained) - len(first), sum(trained)


def _are_known(hashes: Iterable[str], encoded: str) -> list[bool]:
    known = _decode_digests(encoded)
    return [bytes.fromhex(image_hash)[:DIGEST_BYTES] in known for image_hash in hashes]


def _decode_digests(encoded: str) -> set[bytes]:
    digests = base64.b64decode(encoded, validate=True)
    return {digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)}


def public_name(name_or_path: str | PathLike[str]) -> str:
    """A Hub id as it is; of a local folder its own name only, since the rest of its path is private."""
    name = str(name_or_path)
    return Path(name).expanduser().resolve().name if is_local(name) else name


def is_local(name_or_path: str | PathLike[str]) -> bool:
    """Whether a name is that of a local folder."""
    return Path(name_or_path).expanduser().is_dir()
