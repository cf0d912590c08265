# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A closed loop of clients of a service, in a process of its own: each asks anew once it has its answer.

    serving_clients.py URL FOLDER CLIENTS SECONDS

Sends the images of the folder, one a request, over connections that stay open. Prints JSON: answers a second, median
and 99th percentile of their latency in ms, how many requests were refused (503 since the service is full), given up
(503 for any other reason, of which the service had accepted them) and lost (any other status, or none), and how often
each reason was given.
"""

import http.client
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np


BOUNDARY = "0f1e2d3c4b5a"
WARM_UP = 0.1  # of the time
FULL = "the service is full"  # begins the sentence that refuses a request


class Asked(NamedTuple):
    """A request: when it ended, the seconds it took, the status (0 for none), and why there is no answer."""

    ended: float
    seconds: float
    status: int
    reason: str

    @property
    def outcome(self) -> str:
        if self.status != 503:
            return "answers" if self.status == 200 else "lost"
        return "refused" if self.reason.startswith(FULL) else "given_up"


def form(image: bytes) -> bytes:
    """The body of a request with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def ask(url: str, bodies: list[bytes], start: int, until: float, asked: list[Asked]) -> None:
    """One client: adds each of its requests."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    number = start
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            connection.request("POST", "/predict", bodies[number % len(bodies)], headers)
            response = connection.getresponse()
            content = json.loads(response.read())
            status, reason = response.status, content.get("error", "")
        except (OSError, ValueError, http.client.HTTPException) as error:
            connection.close()  # the next request opens another one
            status, reason = 0, type(error).__name__
        ended = time.monotonic()
        asked.append(Asked(ended, ended - began, status, reason))
        number += 1
        if status == 503:
            time.sleep(0.1)
    connection.close()


def main(url: str, folder: str, clients: int, seconds: float) -> dict[str, Any]:
    """Runs the loop. Returns what is printed."""
    bodies = [form(file.read_bytes()) for file in sorted(Path(folder).iterdir())]
    began = time.monotonic()
    until = began + seconds * (1 + WARM_UP)
    asked: list[Asked] = []
    threads = [
        threading.Thread(target=ask, args=(url, bodies, len(bodies) * client // clients, until, asked))
        for client in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = [one for one in asked if one.ended >= began + seconds * WARM_UP]
    took = np.array([one.seconds for one in counted if one.status == 200] or [np.nan]) * 1000
    ended = max(one.ended for one in counted)
    good = sum(one.status == 200 for one in counted)
    outcomes = Counter(one.outcome for one in asked)
    return {
        "answers": good,
        "per_second": good / (ended - began - seconds * WARM_UP),
        "p50": float(np.median(took)),
        "p99": float(np.percentile(took, 99)),
        **{name: outcomes[name] for name in ("refused", "given_up", "lost")},
        "reasons": dict(Counter(one.reason for one in asked if one.status != 200)),
    }


if __name__ == "__main__":
    _, url, folder, clients, seconds = sys.argv
    print(json.dumps(main(url, folder, int(clients), float(seconds))))
