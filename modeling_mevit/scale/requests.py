# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""What a client may send: images in a form or in JSON, within limits. None of it is written, unpickled or evaluated.

An image's size is read from its header and checked before any of its pixels is decoded. A header may be in so many
pieces, and no more: Pillow takes quadratic time for those of one kind.
"""

import base64
import binascii
import hashlib
import hmac
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from .scorers import NamedContent


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # that are decoded
HEADER_READS = 1000  # of an image's header, each some bytes long; a segment of a JPEG takes four
MOST_MEGAPIXELS = 178  # twice what Pillow warns of
FORM, JSON = "multipart/form-data", "application/json"
HOW_TO_SEND = f'send image files as {FORM}, or {JSON} such as {{"image": BASE64}} or {{"images": [BASE64, BASE64]}}'


class HeaderTooLong(ValueError):
    """A header is in more pieces than any that is meant to be read."""


class Refusal(Exception):
    """Why a request gets no answer.

    Args:
        status: of HTTP.
        reason: one sentence.
        retry_after: seconds after which the same request may get one.
    """

    def __init__(self, status: int, reason: str, retry_after: int | None = None):
        super().__init__(status, reason)
        self.status, self.reason, self.retry_after = status, reason, retry_after


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for.

    Args:
        megabytes: of its body.
        images: in it.
        megapixels: of an image.
    """

    megabytes: float = 16
    images: int = 32
    megapixels: float = 50

    def __post_init__(self) -> None:
        for name in ("megabytes", "images", "megapixels"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}.")
        if self.megapixels > MOST_MEGAPIXELS:
            raise ValueError(
                f"megapixels must be at most {MOST_MEGAPIXELS}, more than which Pillow does not read, got "
                f"{self.megapixels:g}."
            )

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)


def read_images(body: bytes, content_type: str, limits: Limits) -> list[NamedContent]:
    """The images in a request's body, whose headers were read and checked.

    Raises:
        Refusal: where there are none or too many, or one is too large or no image.
    """
    kind, options = parse_options_header(content_type)
    if not body:
        raise Refusal(400, f"the request must have a body with an image, got none; {HOW_TO_SEND}")
    if kind == FORM.encode():
        contents = _in_form(body, options.get(b"boundary"), limits)
    elif kind == JSON.encode():
        contents = _in_json(body, limits)
    else:
        given = f"{content_type!r:.60}" if content_type else "none"
        raise Refusal(415, f"the request's Content-Type must be {FORM} or {JSON}, got {given}")
    if not contents:
        raise Refusal(400, f"the request must have an image, got none; {HOW_TO_SEND}")
    images = [NamedContent(content, f"image {number}") for number, content in enumerate(contents, start=1)]
    for image in images:
        _check_header(image, limits)
    return images


def open_image(image: NamedContent) -> Image.Image:
    """An image file of one of `FORMATS`, of which only the header is read.

    Raises:
        ValueError: where it is none, or its header is too long.
        Image.DecompressionBombError: where it is too large even for Pillow.
    """
    file = _CountingReads(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each malformed tag, and of a size on which ours is the stricter limit
            opened = Image.open(file, formats=FORMATS)
    except (HeaderTooLong, Image.DecompressionBombError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads to
        raise ValueError(f"{image.name} must be one of {', '.join(FORMATS)}, and is not readable as any") from error
    file.reads_left = None
    return opened


class _CountingReads(NamedContent):
    """An image file that is read so many times at most, as long as `reads_left` is a number."""

    def __init__(self, image: NamedContent):
        super().__init__(image.getvalue(), image.name)
        self.reads_left: int | None = HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        if self.reads_left is not None:
            self.reads_left -= 1
            if self.reads_left < 0:
                raise HeaderTooLong(f"{self.name} must have a header that is read in {HEADER_READS} pieces at most")
        return super().read(size)


def is_authorized(authorization: str, token: str) -> bool:
    """Whether a request's Authorization header bears a token, in a time that does not tell how much of it is right."""
    scheme, _, given = authorization.partition(" ")
    # of equal length, whatever is given
    digests = (hashlib.sha256(one.encode()).digest() for one in (given.strip(), token))
    return hmac.compare_digest(*digests) and scheme.lower() == "bearer"


def _check_header(image: NamedContent, limits: Limits) -> None:
    try:
        width, height = open_image(image).size
    except Image.DecompressionBombError as error:
        raise Refusal(413, f"{image.name} must have at most {limits.megapixels:g} megapixels: {error}") from error
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    if width * height > limits.megapixels * 1e6:
        raise Refusal(
            413,
            f"{image.name} must have at most {limits.megapixels:g} megapixels, got {width} × {height}, "
            f"{width * height / 1e6:.1f}",
        )


def _in_form(body: bytes, boundary: bytes | None, limits: Limits) -> list[bytes]:
    """What the parts of a form hold, whatever they are called."""
    if not boundary:
        raise Refusal(400, f"a Content-Type of {FORM} must name the boundary of its parts, got none")
    parts: list[bytearray] = []

    def begin() -> None:
        if len(parts) == limits.images:
            raise _too_many(limits)
        parts.append(bytearray())

    def extend(data: bytes, start: int, end: int) -> None:
        parts[-1] += data[start:end]

    finished: list[bool] = []
    try:
        parser = MultipartParser(
            boundary,
            {"on_part_begin": begin, "on_part_data": extend, "on_end": lambda: finished.append(True)},
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise Refusal(400, f"the request's body must be {FORM}, and is not readable as such") from error
    if not finished:
        raise Refusal(400, f"the request's body must be {FORM} up to the last boundary, and ends before")
    return [bytes(part) for part in parts]


def _in_json(body: bytes, limits: Limits) -> list[bytes]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request's body must be {JSON}, and is not readable as such") from error
    if not isinstance(content, dict) or len(content.keys() & {"image", "images"}) != 1 or len(content) != 1:
        raise Refusal(400, 'the JSON must be {"image": BASE64} or {"images": [BASE64, …]}, got something else')
    given = content.get("images", [content.get("image")])
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise Refusal(400, "images in JSON must be strings of base64, got something else")
    if len(given) > limits.images:
        raise _too_many(limits)
    try:
        return [base64.b64decode(one, validate=True) for one in cast(list[Any], given)]
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"images in JSON must be base64, and one is not: {error}") from error


def _too_many(limits: Limits) -> Refusal:
    return Refusal(413, f"a request must have at most {limits.images} images, got more; send several requests")
