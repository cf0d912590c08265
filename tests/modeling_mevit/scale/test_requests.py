# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What clients may send, without a server."""

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from modeling_mevit.scale.requests import Limits, Refusal, is_authorized, open_image, read_images
from modeling_mevit.scale.scorers import NamedContent
from tests.helpers.http_answers import BOUNDARY, as_form, as_json, encoded
from tests.helpers.images import noise


IMAGES = [encoded(noise(seed=seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP"))]
FORM = f"multipart/form-data; boundary={BOUNDARY}"
LIMITS = Limits(megabytes=1, images=3, megapixels=1)


def refusal(body: bytes, content_type: str, limits: Limits = LIMITS) -> Refusal:
    with pytest.raises(Refusal) as raised:
        read_images(body, content_type, limits)
    assert "\n" not in raised.value.reason and 20 < len(raised.value.reason) < 300
    return raised.value


@pytest.mark.parametrize("send", [as_form, as_json])
@pytest.mark.parametrize("count", [1, 3])
def test_images_arrive_as_they_were_sent(send, count):
    body, headers = send(IMAGES[:count])
    images = read_images(body, headers["Content-Type"], LIMITS)
    assert [image.getvalue() for image in images] == IMAGES[:count]
    assert [image.name for image in images] == ["image 1", "image 2", "image 3"][:count]
    for image, content in zip(images, IMAGES, strict=False):
        assert open_image(image).tobytes() == Image.open(type(image)(content, "")).tobytes()


NOISE = np.random.default_rng(0).bytes(10_000)


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b"", FORM, 400, "must have a body with an image, got none; send image files as"),
        (b"", "application/json", 400, "must have a body"),
        (NOISE, "", 415, "Content-Type must be multipart/form-data or application/json, got none"),
        (NOISE, "application/octet-stream", 415, "got 'application/octet-stream'"),
        (NOISE, "application/x-python-pickle", 415, "got 'application/x-python-pickle'"),
        (NOISE, "\x00" * 5000, 415, "Content-Type must be"),
        (NOISE, FORM, 400, "must be multipart/form-data, and is not readable"),
        (NOISE, "multipart/form-data", 400, "must name the boundary"),
        (NOISE, "application/json", 400, "must be application/json, and is not readable"),
        (as_form([NOISE])[0], FORM, 400, "image 1 must be one of JPEG, PNG"),
        (as_json([IMAGES[0], NOISE])[0], "application/json", 400, "image 2 must be one of JPEG, PNG"),
        (as_form([b""])[0], FORM, 400, "image 1 must be one of"),
        (as_form(IMAGES[:1])[0][:-50], FORM, 400, "up to the last boundary, and ends before"),
        (f"--{BOUNDARY}--\r\n".encode(), FORM, 400, "must have an image, got none"),
        (as_form(IMAGES + IMAGES)[0], FORM, 413, "at most 3 images, got more"),
        (as_json(IMAGES + IMAGES)[0], "application/json", 413, "at most 3 images, got more"),
        (b"[" * 100_000, "application/json", 400, "not readable"),
        (b"null", "application/json", 400, 'must be {"image": BASE64}'),
        (b'{"images": []}', "application/json", 400, "must have an image, got none"),
        (b'{"images": [1]}', "application/json", 400, "must be strings of base64"),
        (b'{"image": "a", "images": []}', "application/json", 400, "got something else"),
        (b'{"image": "a", "path": "/etc/passwd"}', "application/json", 400, "got something else"),
        (b'{"image": "not base64!"}', "application/json", 400, "must be base64, and one is not"),
    ],
)
def test_what_is_no_request_is_told_in_one_sentence(body, content_type, status, message):
    refused = refusal(body, content_type)
    assert refused.status == status and message in refused.reason


def test_megapixels_are_read_from_the_header_and_not_decoded(monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("was decoded"))
    for width, height in ((10_000, 10_000), (20_000, 20_000)):  # Pillow itself refuses the second one
        body, headers = as_form([encoded(Image.new("1", (8, 8))), _png_header(width, height)])
        refused = refusal(body, headers["Content-Type"], Limits())
        assert refused.status == 413 and "image 2 must have at most 50 megapixels" in refused.reason
    body, headers = as_form([_png_header(1000, 1001)])
    assert "got 1000 × 1001, 1.0" in refusal(body, headers["Content-Type"]).reason
    body, headers = as_form([_png_header(1000, 1000)])
    assert len(read_images(body, headers["Content-Type"], LIMITS)) == 1


@pytest.mark.parametrize("kind", ["ICO", "TIFF"])
def test_formats_that_are_not_named_are_not_opened(kind):
    assert "must be one of JPEG" in refusal(*as_form([encoded(noise(32, 32), kind)])[:1], FORM).reason


def _in_segments(count: int, head: bytes) -> bytes:
    """A JPEG with so many more segments in its header."""
    content = encoded(noise(), "JPEG")
    return content[:2] + (b"\xff\xe1" + struct.pack(">H", 2 + len(head)) + head) * count + content[2:]


def _in_chunks(count: int) -> bytes:
    """A PNG with so many more chunks in its header."""
    content = encoded(noise())
    return (
        content[:33] + (struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))) * count + content[33:]
    )


@pytest.mark.parametrize("make", [lambda count: _in_segments(count, b"Exif\0\0"), _in_chunks])
def test_headers_of_many_pieces_are_not_read_to_their_end(make):
    """Pillow takes seconds for one of 2 MB, and more than four times as long for one of 4 MB."""
    limits = Limits(megabytes=16)
    content = make(150_000)
    began = time.process_time()
    refused = refusal(*as_form([content])[:1], FORM, limits)
    assert refused.status == 400 and "image 1 must have a header that is read in 1000 pieces at most" in refused.reason
    assert time.process_time() - began < 1
    with pytest.raises(ValueError, match="1000 pieces at most"):  # as a replica reads it
        open_image(NamedContent(content, "image 1"))


def test_headers_of_photos_are_read():
    # a colour profile and a depth map take up to some hundred segments
    body, headers = as_form([_in_segments(200, bytes(4000)), _in_chunks(200)])
    assert len(read_images(body, headers["Content-Type"], LIMITS)) == 2


def test_pixels_may_be_in_as_many_pieces_as_they_like():
    content = encoded(noise(40, 40))
    at = content.index(b"IDAT")
    pixels = content[at + 4 : at + 4 + int.from_bytes(content[at - 4 : at], "big")]
    assert len(pixels) > 1000
    chunks = [
        struct.pack(">I4scI", 1, b"IDAT", byte, zlib.crc32(b"IDAT" + byte))
        for byte in struct.unpack(f"{len(pixels)}c", pixels)
    ]
    body, headers = as_form([content[: at - 4] + b"".join(chunks) + content[at + 8 + len(pixels) :]])
    (image,) = read_images(body, headers["Content-Type"], LIMITS)
    assert open_image(image).tobytes() == noise(40, 40).tobytes()


def test_malformed_tags_are_read_without_a_word(recwarn):
    tag = b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 1, 0x10F, 2, 1000, 8)
    body, headers = as_form([_in_segments(1, tag)])
    (image,) = read_images(body, headers["Content-Type"], LIMITS)
    open_image(image)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("Bearer 0123456789abcdef", True),
        ("bearer 0123456789abcdef", True),
        ("Bearer 0123456789abcdeg", False),
        ("Bearer 0123456789abcdef0", False),
        ("Bearer ", False),
        ("Basic 0123456789abcdef", False),
        ("0123456789abcdef", False),
        ("Bearer 0123456789abcdéf", False),
        ("", False),
    ],
)
def test_a_token_must_be_the_right_one(given, right):
    assert is_authorized(given, "0123456789abcdef") is right


@pytest.mark.parametrize("limits", [{"megabytes": 0}, {"images": 0}, {"megapixels": -1.0}])
def test_limits_are_above_nothing(limits):
    with pytest.raises(ValueError, match="megapixels must be at most 178, .*, got 200"):
        Limits(megapixels=200)
    with pytest.raises(ValueError, match="must be a number above 0"):
        Limits(**limits)


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, without its pixels."""
    content = encoded(Image.new("1", (8, 8)))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
