# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""`mevit score` on a local Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import ViTConfig

from modeling_mevit.early_exit.monitoring import PromiseMonitor
from modeling_mevit.onnx.cascade_mevit import Cascade, read_stages
from modeling_mevit.scale import files
from modeling_mevit.scale import score as module
from modeling_mevit.scale.results import Summary, failed_results, write_results
from modeling_mevit.scale.score import ScoringActor, score
from modeling_mevit.scale.scorers import promise_monitor, scores_of
from modeling_mevit.scale.sources import list_images
from tests.helpers.dying_actors import DiesOfAnImage
from tests.helpers.images import write_image
from tests.helpers.models import tiny_model
from tests.modeling_mevit.scale.conftest import readable


pytestmark = pytest.mark.slow


def rows_of(output: Path) -> dict[str, dict]:
    """Path → row; each path once."""
    rows = pq.read_table(output).to_pylist()
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


@pytest.fixture(scope="module")
def expected(spread, noises) -> dict[str, tuple]:
    """What the runtime says in one process: path → label, probability, exit layer and score."""
    cascade = Cascade(spread)
    output = cascade(cascade.preprocess(readable(noises)))
    assert set(output.exit_layer.tolist()) == {2, 3, 4} and not output.borderline.any()
    scores = scores_of(output.logits, output.exit_layer, output.exit_score, cascade.labels)
    arrays = (array.tolist() for array in scores[1:4])
    return dict(zip(map(str, readable(noises)), zip(scores.labels, *arrays, strict=True), strict=True))


def check(rows: dict[str, dict], expected: dict[str, tuple]) -> None:
    """Compares rows with what is expected; all others are errors."""
    for path, row in rows.items():
        if path not in expected:
            assert f"cannot read the image {path}: " in row["error"]
            assert [row[name] for name in ("label", "probability", "exit_layer", "score")] == [None] * 4
            continue
        label, probability, exit_layer, its_score = expected[path]
        assert (row["label"], row["exit_layer"], row["error"]) == (label, exit_layer, None)
        assert row["probability"] == pytest.approx(probability, abs=1e-5)
        assert row["score"] == pytest.approx(its_score, abs=1e-5)


def test_scores_a_folder_and_then_what_is_missing(local_ray, mevit, spread, noises, expected, tmp_path):
    output = tmp_path / "scores"
    code, out = mevit("score", spread, noises, output, "--batch-size", 4, "--actors", 2)
    rows = rows_of(output)
    assert code == 0 and set(rows) == {*expected, str(noises / "0/noise.jpg"), str(noises / "1/truncated.png")}
    check(rows, expected)
    layers = [row["exit_layer"] for row in rows.values() if row["exit_layer"]]
    left = ", ".join(f"{layers.count(layer)} left at exit {layer}" for layer in (2, 3, 4))
    costs = {stage["exit_layer"]: stage["cost"] for stage in read_stages(spread)}
    cost = np.mean([costs[layer] for layer in layers])
    assert out.startswith("Scored 60 images in ") and left in out and f"at a mean cost of {cost:.3f} of the" in out
    assert "2 could not be scored, first: cannot read the image" in out and out.count("\n") == 1

    parts = {file: file.read_bytes() for file in output.iterdir()}
    assert len(parts) > 5  # of 2 actors, so that both have work until the end
    _, out = mevit("score", spread, noises, output)
    assert out == f"All 62 images of {noises} are in {output} already.\n"

    lost = sorted(parts)[:2]
    missing = sum(len(pq.read_table(file)) for file in lost)
    for file in lost:
        file.unlink()
    kept = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    settings = {"audit": 1.0, "max_disagreement": 0.02}
    report = score(str(spread), f"{noises}/**/*", str(output), batch_size=4, actors=1, **settings)
    assert (report.summary.images, report.before) == (missing, 62 - missing)
    assert report.disagreement.tested == missing - report.summary.errors > 0
    assert f"; the {62 - missing} that were there already do not count. Disagreement: " in str(report)
    _, out = mevit("score", spread, noises, output, "--audit", 0.1, "--max-disagreement", 0.02)
    assert out == f"All 62 images of {noises} are in {output} already, and none was audited.\n"
    assert {file: file.stat().st_mtime_ns for file in output.iterdir() if file in kept} == kept
    check(rows_of(output), expected)


def test_a_killed_job_is_finished_by_the_next(local_ray, spread, noises, tmp_path):
    folder, output = tmp_path / "many", tmp_path / "scores"
    folder.mkdir()
    for number in range(1500):
        os.link(noises / "0" / "000.png", folder / f"{number:04}.png")
    # a block is a file; small batches make it last long enough for the job to be killed in the next one
    command = [sys.executable, "-m", "modeling_mevit", "score", spread, folder, output]
    command += ["--batch-size", 2, "--actors", 1]
    job = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (output.is_dir() and list(output.glob("part-*"))):
        assert job.poll() is None, job.stderr.read().decode()
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    _wait_for_the_end_of_writers(output)
    done = {file: file.stat().st_mtime_ns for file in output.glob("part-*")}
    scored = sum(len(pq.read_table(file)) for file in done)
    assert 0 < scored < 1500
    report = score(str(spread), str(folder), str(output), actors=1)
    assert (report.before, report.summary.images, len(rows_of(output))) == (scored, 1500 - scored, 1500)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert all(file.name.startswith("part-") for file in output.iterdir())


def _wait_for_the_end_of_writers(output: Path) -> None:
    """Ray ends a killed process's actors, which takes a moment."""
    before = None
    while (files := sorted(output.iterdir())) != before:
        before = files
        time.sleep(2)


def test_parquet_with_images_and_a_checkpoint(
    local_ray, mevit, spread, processor, thresholds, noises, expected, disagreements, tmp_path
):
    """A checkpoint and its export say the same, of files and of what Parquet holds, and so do audits."""
    checkpoint, table, output = tmp_path / "checkpoint", tmp_path / "images.parquet", tmp_path / "scores"
    model = tiny_model(exit_thresholds=thresholds, early_exit=True)
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in readable(noises)]
    pq.write_table(pa.table({"image": images}), table, row_group_size=25)
    options = ["--batch-size", 8, "--actors", 1, "--memory", 0.5, "--audit", 1, "--max-disagreement", 0.02]
    code, out = mevit("score", checkpoint, table, output, *options)
    assert code == 0 and "could not be scored" not in out
    lost = sum(disagreements.values())
    assert f"60 images were audited, of which {lost} got another label from the full run. Disagreement: " in out
    assert "at most 2.00% is allowed. ALARM since image " in out
    check(rows_of(output), {f"{table}#{row}": one for row, one in enumerate(expected.values())})
    with pytest.raises(ValueError, match="OUTPUT must be of this model as it is calibrated now"):
        score(str(spread), str(table), str(output))


def test_a_model_that_does_not_leave_early_takes_the_last_exit(spread, noises, tmp_path):
    copied = shutil.copytree(spread, tmp_path / "export")
    config = copied / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "early_exit": False}))
    rows = scored_here(copied, noises, tmp_path)
    assert {row["exit_layer"] for row in rows.values()} == {4}
    cascade = Cascade(spread)
    _, scores = cascade.every_exit(cascade.preprocess(readable(noises)))
    assert [row["score"] for row in rows.values()] == pytest.approx(scores[:, -1].tolist(), abs=1e-5)


def scored_here(checkpoint: Path, noises: Path, output: Path, batch_size: int = 7) -> dict[str, dict]:
    """What an actor writes, without Ray."""
    return audited_here(checkpoint, noises, output, batch_size, None)[0]


def audited_here(
    checkpoint: Path, noises: Path, output: Path, batch_size: int, monitor: PromiseMonitor | None
) -> tuple[dict[str, dict], dict | None]:
    """The same, and what its monitor counted."""
    actor = ScoringActor(str(checkpoint), str(output), "model", batch_size, 1, False, None, monitor)
    listed = list_images(f"{noises}/?/0*.png")
    row = actor(listed)
    assert json.loads(row["summary"][0].as_py())["images"] == len(listed)
    (part,) = output.glob("part-*")
    table = pq.read_table(part)
    assert table["path"] == listed["path"]
    return {row["path"]: row for row in table.to_pylist()}, json.loads(row["counted"][0].as_py() or "null")


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_rows_do_not_depend_on_the_batch(spread, noises, expected, tmp_path, batch_size):
    check(scored_here(spread, noises, tmp_path, batch_size), expected)


@pytest.mark.parametrize("batch_size", [7, 100])
def test_an_audit_counts_those_that_are_drawn_and_changes_no_row(
    promised, noises, expected, disagreements, tmp_path, batch_size
):
    totals = {}
    for seed in (0, 0, 1):
        monitor = promise_monitor(str(promised), 0.5, seed=seed)
        output = Path(tempfile.mkdtemp(dir=tmp_path))
        rows, state = audited_here(promised, noises, output, batch_size, monitor)
        check(rows, expected)
        drawer = monitor.for_replica(state["seed"])
        sizes = [batch_size] * (60 // batch_size) + [60 % batch_size] * (60 % batch_size > 0)
        drawn = np.concatenate([drawer.draw(size) for size in sizes])
        monitor.merge(state)
        counts = monitor.counts
        assert counts["seen"] == 60 and 15 < counts["audited"] == drawn.sum() < 45
        assert counts["disagreements"] == (drawn & list(disagreements.values())).sum()
        assert [row["full_label"] is not None for row in rows.values()] == drawn.tolist()
        differ = [row["full_label"] not in (None, row["label"]) for row in rows.values()]
        assert differ == (drawn & list(disagreements.values())).tolist()
        assert totals.setdefault(seed, drawn.tolist()) == drawn.tolist()  # the same images of the same seed
    assert totals[0] != totals[1]


def test_thresholds_that_were_not_calibrated_have_no_promise(promised, tmp_path):
    copied = shutil.copytree(promised, tmp_path / "export")
    config = copied / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "exit_thresholds": 0.5}))
    with pytest.raises(ValueError, match="--audit needs a promise .*: its thresholds are not those that were calib"):
        promise_monitor(str(copied), 0.5)
    assert promise_monitor(str(copied), 0.5, 0.02).disagreement.limit == 0.02


def test_where_nothing_was_promised_there_is_no_audit(mevit, spread, noises, tmp_path):
    code, _ = mevit("score", spread, noises, tmp_path / "out", "--audit", 0.1)
    assert code.startswith("mevit: error: --audit needs a promise in ") and "\n" not in code
    code, _ = mevit("score", spread, noises, tmp_path / "out", "--max-disagreement", 0.1)
    assert code == "mevit: error: --max-disagreement is for --audit, which is not given, got 0.1."
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_not_a_number_is_an_error(spread, noises, tmp_path, monkeypatch):
    actor = ScoringActor(str(spread), str(tmp_path), "model", 8, 1, False, None)
    cascade = actor.scorer.cascade
    monkeypatch.setattr(cascade, "preprocess", lambda images: np.full((1, 3, 16, 16), np.nan, np.float32))
    actor(list_images(str(noises / "2")))
    (part,) = tmp_path.glob("part-*")
    assert set(pq.read_table(part)["error"].to_pylist()) == {"the model's result is not a number"}


def test_an_image_that_no_file_holds_is_an_error(spread, noises, tmp_path, monkeypatch):
    """Of those that a Parquet file names, or whose name is not UTF-8."""

    class Store:
        def open_input_file(self, path: str):
            raise RuntimeError("no network")  # as clients of stores do, which have errors of their own

    in_store = files._in_store
    monkeypatch.setattr(
        files, "_in_store", lambda name: (Store(), name) if name.startswith("hf://") else in_store(name)
    )
    (tmp_path / "out").mkdir()
    named = ["hf://datasets/org/name/1.png", str(tmp_path / "\\xff.png"), str(readable(noises)[0])]
    ScoringActor(str(spread), str(tmp_path / "out"), "model", 8, 1, False, None)(pa.table({"path": named}))
    rows = rows_of(tmp_path / "out")
    assert rows[named[0]]["error"] == "hf://datasets/org/name/1.png cannot be read: no network"
    assert named[1] in rows[named[1]]["error"] and rows[named[2]]["error"] is None


def test_an_image_that_ends_its_process_is_an_error(local_ray, spread, noises, expected, tmp_path, monkeypatch):
    """Not a job that never ends: its block is scored in pieces, down to that image."""
    folder, output = tmp_path / "photos", tmp_path / "scores"
    folder.mkdir()
    for file in readable(noises)[:20]:
        os.link(file, folder / file.name)
    (folder / "killer.png").write_bytes(b"")

    monkeypatch.setattr("modeling_mevit.scale.score.ScoringActor", DiesOfAnImage)
    monkeypatch.setattr("modeling_mevit.scale.score.ATTEMPTS", 2)  # each takes a process
    report = score(str(spread), str(folder), str(output), batch_size=4, actors=1)
    rows = rows_of(output)
    assert (report.summary.images, report.summary.errors) == (21, 1)
    assert rows.pop(str(folder / "killer.png"))["error"] == "the process that read it died, at 2 attempts"
    check({str(readable(noises)[0].parent / Path(path).name): row for path, row in rows.items()}, expected)


@pytest.fixture
def passes(monkeypatch) -> list[list[list[str]]]:
    """Stands in for Ray: actors that write no rows, and die with blocks that have a name with "killer" in it. The
    blocks of each pass, by the names of their images."""
    passes: list[list[list[str]]] = []

    def run(blocks: list[pa.Table], *settings, waiting: bool):
        assert waiting is (not passes)
        passes.append([block["path"].to_pylist() for block in blocks])
        for names in passes[-1]:
            if not any("killer" in name for name in names):
                summary = Summary(len(names), 0, None, {2: len(names)}).to_json()
                yield {"first": names[0], "summary": summary, "began": 0.0, "failure": "", "counted": ""}

    monkeypatch.setattr(module, "_pass", run)
    return passes


def run(directory: Path, *blocks: list[str]) -> Summary:
    total = Summary()
    settings = {"directory": str(directory), "model": "model"}
    for summary, _, _ in module._run([pa.table({"path": names}) for names in blocks], 1, 1, 0, None, settings):
        total.add(summary)
    return total


def test_blocks_whose_actors_die_are_cut_down_to_the_image(passes, tmp_path):
    names = [f"{number}.png" for number in range(40)]
    names[33] = "killer.png"
    assert run(tmp_path, names, ["a.png"]) == Summary(41, 1, "the process that read it died, at 3 attempts", {2: 40})
    assert [len(blocks) for blocks in passes] == [2, 14, 3]  # pieces of 3, and of 1
    assert list(rows_of(tmp_path)) == ["killer.png"]


def test_an_image_alone_in_its_block_is_tried_again_by_itself(passes, tmp_path):
    """In the first pass it may have waited in an actor that another block ended."""
    assert run(tmp_path, ["killer.png"], ["a.png"]).errors == 1
    assert passes == [[["killer.png"], ["a.png"]], [["killer.png"]]]


def test_what_was_written_before_its_actor_died_is_not_scored_again(passes, tmp_path):
    names = ["a.png", "killer.png"]
    write_results(str(tmp_path), "model", failed_results(pa.table({"path": names}), "broken"))
    assert run(tmp_path, names, ["b.png"]) == Summary(3, 2, "broken", {2: 1})
    assert len(passes) == 1


@pytest.mark.parametrize("blocks", [(["killer 1.png"], ["killer 2.png"]), (["killer 1.png", "killer 2.png"],)])
def test_actors_that_always_die_end_the_run(passes, tmp_path, blocks):
    with pytest.raises(
        ValueError, match="actors must stay alive, and died with each of 2 blocks, at 3 attempts; they"
    ):
        run(tmp_path, *blocks)
    assert not list(tmp_path.iterdir())


def test_what_an_actor_cannot_do_ends_with_one_line(local_ray, mevit, spread, noises, tmp_path, monkeypatch):
    code, _ = mevit("score", spread, noises, tmp_path / "out", "--cpus", 99)
    assert code.startswith("mevit: error: an actor must find 99 CPUs, 0 GPUs and 0 GiB on one machine; Ray has 4 CPUs")
    code, _ = mevit("score", spread, noises, tmp_path / "out", "--cpus", 99, "--actors", 1)
    assert code.startswith("mevit: error: an actor must find 99 CPUs, 0 GPUs and 0 GiB on one machine; Ray has 4 CPUs")
    code, _ = mevit("score", spread, noises, tmp_path / "out", "--cpus", 3, "--actors", 2)
    assert code.startswith("mevit: error: --actors must be at most 1, for which Ray has room with 3 CPUs, ")
    code, _ = mevit("score", spread, noises, tmp_path / "out", "--gpus", 1)
    assert "an actor must find 1 CPUs, 1 GPUs" in code
    code, _ = mevit("score", spread, tmp_path / "nothing", tmp_path / "out")
    assert "SOURCE must be a folder, a glob" in code and "\n" not in code


def test_what_is_no_checkpoint_is_named_before_an_actor_starts(mevit, noises, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_mevit.scale.score.connected", None)
    code, _ = mevit("score", noises, noises, tmp_path / "out")
    assert code == f"mevit: error: {noises} must hold a MEViT checkpoint or an export; it has no config.json."
    ViTConfig().save_pretrained(tmp_path / "vit")
    code, _ = mevit("score", tmp_path / "vit", noises, tmp_path / "out")
    assert code == f"mevit: error: {tmp_path / 'vit'} must hold a MEViT checkpoint or an export; it holds a vit."


@pytest.mark.parametrize("what", ["output", "model"])
def test_a_job_that_cannot_go_on_ends_with_one_line(local_ray, mevit, spread, tmp_path, what):
    folder, output = tmp_path / "photos", tmp_path / "out"
    write_image(folder / "1.png")
    if what == "output":  # a directory lies where a file of results belongs
        (tmp_path / "other").mkdir()
        ScoringActor(str(spread), str(tmp_path / "other"), "model", 1, 1, False, None)(list_images(str(folder)))
        (part,) = (tmp_path / "other").iterdir()
        (output / part.name / ".hidden").mkdir(parents=True)
        export, message = spread, part.name
    else:
        export = shutil.copytree(spread, tmp_path / "export")
        (export / "stage_3.onnx").write_bytes(b"no graph")
        message = f"{export / 'stage_3.onnx'} is damaged: "
    code, _ = mevit("score", export, folder, output, "--actors", 1)
    assert code.startswith("mevit: error: ") and message in code and len(code) < 500 and "\n" not in code
