# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A client of a service, and a server in a thread."""

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from PIL import Image


BOUNDARY = "0f1e2d3c4b5a"


@dataclass(frozen=True)
class Reply:
    """What a service answers: `content` is of JSON, or text."""

    status: int
    content: Any
    headers: dict[str, str] = field(default_factory=dict)


def send(
    url: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None, timeout: float = 120
) -> Reply:
    """Sends one request over a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request(method or ("GET" if body is None else "POST"), parts.path, body, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        is_json = response.getheader("content-type") == "application/json"
        return Reply(response.status, json.loads(text) if is_json else text, dict(response.getheaders()))
    finally:
        connection.close()


def as_form(images: Sequence[bytes]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form with image files."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="../../{place}.png"\r\n'
        f"Content-Type: image/png\r\n\r\n".encode()
        + image
        + b"\r\n"
        for place, image in enumerate(images)
    ]
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def as_json(images: Sequence[bytes]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of JSON with images."""
    encoded = [base64.b64encode(image).decode() for image in images]
    content = {"image": encoded[0]} if len(encoded) == 1 else {"images": encoded}
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as a file holds it."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@contextmanager
def running(server: Any, listener: Any) -> Iterator[None]:
    """Runs a uvicorn server in a thread."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
