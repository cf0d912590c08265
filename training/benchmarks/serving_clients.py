# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""A closed loop of clients of a service, in a process of its own: each asks anew once it has its answer.

    serving_clients.py URL FOLDER CLIENTS SECONDS

Sends the images of the folder, one a request, over connections that stay open. Prints JSON: answers a second, median
and 99th percentile of their latency in ms, how many were refused (503, as overload is answered) and how many were lost
(any other status, or none).
"""

import http.client
import json
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np


BOUNDARY = "0f1e2d3c4b5a"
WARM_UP = 0.1  # of the time


def form(image: bytes) -> bytes:
    """The body of a request with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'
    return head.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()


def ask(url: str, bodies: list[bytes], start: int, until: float, answers: list[tuple[float, float, int]]) -> None:
    """One client: adds for each request when it ended, the seconds it took, and the status; 0 for none."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    number = start
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            connection.request("POST", "/predict", bodies[number % len(bodies)], headers)
            response = connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            connection.close()  # the next request opens another one
            status = 0
        ended = time.monotonic()
        answers.append((ended, ended - began, status))
        number += 1
        if status == 503:
            time.sleep(0.1)
    connection.close()


def main(url: str, folder: str, clients: int, seconds: float) -> dict[str, float]:
    """Runs the loop. Returns what is printed."""
    bodies = [form(file.read_bytes()) for file in sorted(Path(folder).iterdir())]
    began = time.monotonic()
    until = began + seconds * (1 + WARM_UP)
    answers: list[tuple[float, float, int]] = []
    threads = [
        threading.Thread(target=ask, args=(url, bodies, len(bodies) * client // clients, until, answers))
        for client in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = [one for one in answers if one[0] >= began + seconds * WARM_UP]
    took = np.array([seconds for _, seconds, status in counted if status == 200] or [np.nan]) * 1000
    ended = max(one[0] for one in counted)
    good = sum(status == 200 for *_, status in counted)
    return {
        "answers": good,
        "per_second": good / (ended - began - seconds * WARM_UP),
        "p50": float(np.median(took)),
        "p99": float(np.percentile(took, 99)),
        "refused": sum(status == 503 for *_, status in answers),
        "lost": sum(status not in (200, 503) for *_, status in answers),
    }


if __name__ == "__main__":
    _, url, folder, clients, seconds = sys.argv
    print(json.dumps(main(url, folder, int(clients), float(seconds))))
