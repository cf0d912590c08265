# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""`mevit serve` on a local Ray."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_mevit.onnx.cascade_mevit import Cascade
from modeling_mevit.scale.requests import Limits
from modeling_mevit.scale.scorers import promise_monitor, scores_of
from modeling_mevit.scale.serve import TOKEN, RunningService, Service, serving, token_from_environment
from tests.helpers.http_answers import as_form, as_json, encoded, running, send
from tests.helpers.images import noise
from tests.modeling_mevit.scale.conftest import readable


pytestmark = pytest.mark.slow


@contextmanager
def served(export: Path, **settings) -> Iterator[RunningService]:
    """Serves an export from this process."""
    settings = {"batch_size": 4, "batch_wait": 20, "deadline": 120, "replicas": 1, **settings}
    with serving(Service(str(export), port=0, **settings)) as service, running(service.server, service.listener):
        yield service


@pytest.fixture(scope="module")
def service(local_ray, spread) -> Iterator[RunningService]:
    """The cascade in three segments."""
    with served(spread, segments=[2, 3], limits=Limits(1, 8, 20)) as service:
        yield service


@pytest.fixture(scope="module")
def whole_service(local_ray, spread) -> Iterator[RunningService]:
    """The cascade in one segment."""
    with served(spread, limits=Limits(1, 8, 20)) as service:
        yield service


@pytest.fixture(scope="module")
def images(noises) -> list[bytes]:
    return [file.read_bytes() for file in readable(noises)]


@pytest.fixture(scope="module")
def expected(spread, images) -> list[tuple]:
    """What the runtime says in one process: label, probability, exit layer and score of each image."""
    cascade = Cascade(spread)
    output = cascade(cascade.preprocess([io.BytesIO(image) for image in images]))
    assert set(output.exit_layer.tolist()) == {2, 3, 4} and not output.borderline.any()
    scores = scores_of(output.logits, output.exit_layer, output.exit_score, cascade.labels)
    return list(zip(scores.labels, *(array.tolist() for array in scores[1:4]), strict=True))


def check(predictions: list[dict], expected: list[tuple]) -> None:
    for given, (label, probability, exit_layer, score) in zip(predictions, expected, strict=True):
        assert (given["label"], given["exit_layer"]) == (label, exit_layer)
        assert [given["probability"], given["score"]] == pytest.approx([probability, score], abs=1e-5)


def metric(url: str, line: str) -> float:
    (value,) = re.findall(rf"^{re.escape(line)} (\S+)$", send(f"{url}metrics").content, flags=re.MULTILINE)
    return float(value)


def in_threads(count: int, call) -> list:
    """What calls from several clients at once give."""
    with ThreadPoolExecutor(count) as clients:
        return list(clients.map(call, range(count)))


@pytest.mark.parametrize("which", ["service", "whole_service"])
def test_says_what_the_runtime_says_in_one_process(request, which, images, expected):
    url = request.getfixturevalue(which).url
    before = {layer: metric(url, f'mevit_exits_total{{exit_layer="{layer}"}}') for layer in (2, 3, 4)}

    def ask(place: int):
        start = 6 * place
        reply = send(f"{url}predict", *(as_form, as_json)[place % 2](images[start : start + 6]))
        assert reply.status == 200, reply
        return reply.content["predictions"]

    answers = in_threads(len(images) // 6, ask)
    check([one for answer in answers for one in answer], expected)
    reply = send(f"{url}predict", *as_form(images[:1]))
    check(reply.content["predictions"], expected[:1])
    layers = [layer for _, _, layer, _ in [*expected, expected[0]]]
    for layer in (2, 3, 4):
        assert metric(url, f'mevit_exits_total{{exit_layer="{layer}"}}') - before[layer] == layers.count(layer)
    assert metric(url, "mevit_borderline_images_total") == 0 and metric(url, "mevit_queue_images") == 0
    last = 4 if which == "whole_service" else 2
    assert metric(url, f'mevit_batch_images_bucket{{le="1.0",segment="{last}"}}') < len(images)  # some ran together


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (np.random.default_rng(0).bytes(10_000), {}, 415, "Content-Type must be"),
        (np.random.default_rng(0).bytes(10_000), {"Content-Type": "application/json"}, 400, "not readable"),
        (*as_form([np.random.default_rng(0).bytes(10_000)]), 400, "image 1 must be one of JPEG"),
        (b"", {"Content-Type": "application/json"}, 400, "must have a body with an image"),
        (*as_form([encoded(noise(200, 200))[:20_000]]), 400, "image 1 cannot be read: "),
        (*as_json([encoded(noise()), encoded(noise(200, 200))[:20_000]]), 400, "image 2 cannot be read: "),
        (*as_form([encoded(Image.new("1", (10_000, 10_000)))]), 413, "at most 20 megapixels, got 10000 × 10000"),
        (*as_form([encoded(noise())] * 9), 413, "at most 8 images"),
        (b"0" * 1_000_001, {"Content-Type": "application/json"}, 413, "at most 1 MB"),
    ],
)
def test_bad_requests_get_one_sentence_and_the_service_goes_on(
    service, images, expected, body, headers, status, message
):
    reply = send(f"{service.url}predict", body, headers)
    assert reply.status == status and message in reply.content["error"] and "\n" not in reply.content["error"]
    check(send(f"{service.url}predict", *as_form(images[:1])).content["predictions"], expected[:1])


def kill_replicas(name: str) -> int:
    """Kills the replicas of a segment, as a machine that is gone would. Returns how many."""
    import ray

    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if f"#{name}#" in one["name"]]
    for one in names:
        ray.kill(ray.get_actor(one, namespace="serve"), no_restart=True)
    return len(names)


@pytest.mark.parametrize(("which", "killed"), [("whole_service", 0), ("service", 0), ("service", 1)])
def test_replicas_killed_under_load_lose_no_request(request, which, killed, images, expected):
    service = request.getfixturevalue(which)
    url = service.url
    layers = [int(name.rpartition("-")[2]) for name in service.segments]
    inside = f'mevit_segment_images{{segment="{layers[killed]}"}}'
    restarts = f'mevit_restarts_total{{segment="{layers[killed]}"}}'
    before = metric(url, restarts)
    reaching = [place for place, one in enumerate(expected) if killed == 0 or one[2] > layers[killed - 1]]
    kills = threading.Event()

    def ask(client: int):
        """One client: asks for images that reach the segment, until its replicas have died, and then some."""
        asked = 0
        after = 0
        while after < 3:
            after += kills.is_set()
            places = [reaching[(7 * client + asked + step) % len(reaching)] for step in range(6)]
            reply = send(f"{url}predict", *as_form([images[place] for place in places]))
            if reply.status != 200:
                return reply
            check(reply.content["predictions"], [expected[place] for place in places])
            asked += 1
        return asked

    def kill() -> int:
        """Kills the replicas until they take images with them, for each of which another replica starts."""
        count = 0
        deadline = time.monotonic() + 120
        try:
            while metric(url, restarts) == before and time.monotonic() < deadline:
                time.sleep(0.1)
                if not metric(url, inside):
                    continue
                count += kill_replicas(service.segments[killed])
                time.sleep(2)  # until it is noticed
                while send(f"{url}healthz").status != 200:
                    time.sleep(0.2)
        finally:
            kills.set()
        return count

    *answered, num_killed = in_threads(9, lambda place: kill() if place == 8 else ask(place))
    assert num_killed >= 1
    assert all(isinstance(asked, int) and asked >= 3 for asked in answered), answered
    assert metric(url, "mevit_queue_images") == 0
    assert metric(url, restarts) > before  # so that the test can fail
    assert send(f"{url}healthz").status == 200


def test_health_is_that_of_every_segment(service):
    url = service.url
    assert send(f"{url}healthz").content == {"status": "ready"}
    kill_replicas(service.segments[1])
    statuses = set()
    until = time.monotonic() + 300
    while time.monotonic() < until and 503 not in statuses:
        statuses.add(send(f"{url}healthz").status)
    while time.monotonic() < until and send(f"{url}healthz").status != 200:
        time.sleep(0.2)
    assert 503 in statuses and send(f"{url}healthz").status == 200


def test_audits_are_counted_beside_the_same_answers(
    local_ray, promised, images, expected, disagreements, tmp_path, caplog
):
    """Of an export whose thresholds were falsified, in two segments."""
    state = tmp_path / "monitor.json"
    settings = {"segments": [2], "audit": 1.0, "audit_state": str(state), "limits": Limits(1, 8, 20)}
    with served(promised, **settings) as service:
        for start in range(0, len(images), 6):
            reply = send(f"{service.url}predict", *as_form(images[start : start + 6]))
            check(reply.content["predictions"], expected[start : start + 6])
        until = time.monotonic() + 120
        while (audited := metric(service.url, "mevit_audited_images_total")) < len(images):
            assert time.monotonic() < until, audited
            time.sleep(0.2)
        assert metric(service.url, "mevit_disagreements_total") == sum(disagreements.values())
        assert metric(service.url, "mevit_promise_alarm") == 1
        assert metric(service.url, 'mevit_audits_dropped_total{reason="failed"}') == 0
        (told,) = [record.message for record in caplog.records if "ALARM" in record.message]
        assert "at most 2.00% was promised. ALARM since image" in told
    # the next one goes on from there
    monitor = promise_monitor(str(promised), 0.01)
    monitor.restore(state)
    counts = monitor.counts
    assert (counts["seen"], counts["audited"]) == (len(images), len(images))
    assert counts["disagreements"] == sum(disagreements.values()) and monitor.alarm


def listening(process: int) -> dict[str, set[int]]:
    """Address → ports on which a process and those it started listen."""
    out = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    children = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in children.splitlines())

    def is_ours(number: int) -> bool:
        while number > 1 and number != process:
            number = parents.get(number, 0)
        return number == process

    found: dict[str, set[int]] = {}
    for line in out.splitlines():
        if any(is_ours(int(number)) for number in re.findall(r"pid=(\d+)", line)):
            address, _, port = line.split()[3].rpartition(":")
            found.setdefault(address, set()).add(int(port))
    return found


def test_the_command_serves_on_the_loopback_address_alone(spread, images, expected, tmp_path):
    """In a process of its own that starts Ray, in the directory of an export which has code of its own."""
    copied = shutil.copytree(spread, tmp_path / "export")
    (copied / "onnxruntime.py").write_text("raise SystemExit('this ran')")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment[TOKEN] = token = "0123456789abcdef"
    command = [Path(sys.executable).with_name("mevit"), "serve", ".", "--port", "0", "--segments", "2", "4"]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": copied}
    process = subprocess.Popen(command, **settings)
    try:
        line = process.stdout.readline()
        (url,) = re.findall(r"^Serving \. at (http://127.0.0.1:\d+/)predict ", line) or [None]
        assert url, process.stderr.read()
        reply = send(f"{url}predict", *as_form(images[:4]))
        assert reply.status == 401
        body, headers = as_form(images[:4])
        reply = send(f"{url}predict", body, {**headers, "Authorization": f"Bearer {token}"})
        check(reply.content["predictions"], expected[:4])
        addresses = listening(process.pid)
        assert (
            set(addresses) <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}
            and int(url[:-1].rpartition(":")[2]) in (addresses["127.0.0.1"])
        )
        assert not {8265, 10001} & set.union(*addresses.values())  # Ray's dashboard, and its port for clients
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "Traceback" not in err, err
    finally:
        process.kill()
        process.communicate()


def test_a_damaged_export_is_named(local_ray, mevit, spread, tmp_path):
    copied = shutil.copytree(spread, tmp_path / "export")
    (copied / "query_3.onnx").write_bytes(b"no graph")
    code, _ = mevit("serve", copied)
    assert code.startswith(f"mevit: error: {copied / 'query_3.onnx'} is damaged: ") and "\n" not in code


def test_what_ray_has_no_room_for_is_named(local_ray, mevit, spread):
    code, _ = mevit("serve", spread, "--port", 0, "--threads", 64)
    message = "mevit: error: --threads must be at most the CPUs of one machine, got 64; Ray has 4 CPUs, 0 GPUs and "
    assert code.startswith(message) and "\n" not in code


def test_a_ray_that_others_could_reach_does_not_serve(local_ray, mevit, spread, monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "192.0.2.1")
    code, _ = mevit("serve", spread, "--port", 0)
    assert code.startswith("mevit: error: Ray must listen on 127.0.0.1 alone where no cluster is given, got 192.0.2.1")


# What needs no Ray


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, f"--host 0.0.0.0 needs a token that requests must bear, in .* {TOKEN}"),
        ({"host": "localhost"}, "--host localhost needs a token"),
        ({"token": "short"}, f"{TOKEN} must have at least 16 characters, got 5"),
        ({"token": "0123456789 abcdef"}, f"{TOKEN} must be of visible ASCII characters without spaces"),
        ({"token": "0123456789abcdé"}, "must have at least 16 characters, got 15"),
        ({"token": "0123456789abcdéf"}, f"{TOKEN} must be of visible ASCII characters without spaces"),
        ({"queue": 0}, "queue must be a number above 0, got 0"),
        ({"deadline": float("inf")}, "deadline must be a number above 0, got inf"),
        ({"queue": 8}, "queue must be at least the images of a request, 32, got 8"),
        ({"batch_size": 0}, "batch_size must be a number above 0"),
        ({"deadline": -1.0}, "deadline must be a number above 0"),
        ({"max_disagreement": 0.1}, "--max-disagreement is for --audit, which is not given, got 0.1"),
        ({"audit_state": "state.json"}, "--audit-state is for --audit, which is not given, got state.json"),
    ],
)
def test_services_that_cannot_be_are_named(spread, settings, message):
    with pytest.raises(ValueError, match=message):
        Service(str(spread), **settings)


@pytest.mark.parametrize("given", ["0123456789abcdef", " 0123456789abcdef\n"])
def test_a_token_opens_other_addresses_and_is_not_shown(spread, monkeypatch, given):
    monkeypatch.setenv(TOKEN, given)
    service = Service(str(spread), host="0.0.0.0", token=token_from_environment())
    assert service.token == "0123456789abcdef"
    assert "0123456789abcdef" not in repr(service) and TOKEN not in os.environ


def test_a_token_of_spaces_is_not_none(spread, monkeypatch):
    monkeypatch.setenv(TOKEN, "  ")
    with pytest.raises(ValueError, match="must have at least 16 characters, got 0"):
        Service(str(spread), token=token_from_environment())
    monkeypatch.setenv(TOKEN, "")
    assert token_from_environment() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["NOISES"], "EXPORT must be what `mevit export --cascade` wrote, got "),
        (["EXPORT", "EXPORT"], "EXPORT must be one directory, got 2: "),
        (["EXPORT", "--segments", "2", "5"], r"--segments must be some of the exits \[2, 3, 4\], .* got \[2, 5\]"),
        (["EXPORT", "--segments", "3,2"], r"in ascending order, got \[3, 2\]"),
        (["--segments", "2", "x", "EXPORT"], "EXPORT must be one directory, got 2: x, "),
        (["EXPORT", "--host", "192.0.2.1"], "--host 192.0.2.1 needs a token"),
        (["EXPORT", "--audit", "0.01"], "--audit needs a promise in .*, or --max-disagreement"),
        (["EXPORT", "--audit", "2", "--max-disagreement", "0.1"], "audit must be above 0 and at most 1, got 2.0"),
        (["EXPORT", "--audit", "0.1", "--max-disagreement", "0"], "max_disagreement must be between 0 and 1, got 0"),
    ],
)
def test_bad_input_ends_with_one_line(mevit, spread, noises, words, message):
    words = [{"EXPORT": spread, "NOISES": noises}.get(word, word) for word in words]
    code, _ = mevit("serve", *words)
    assert code.startswith("mevit: error: ") and re.search(message, code) and "\n" not in code


def test_an_address_that_is_taken_is_named_before_ray_starts(mevit, spread):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _ = mevit("serve", spread, "--port", taken.getsockname()[1])
    assert code.startswith("mevit: error: cannot listen on 127.0.0.1, port ")
