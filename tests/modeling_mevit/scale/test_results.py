# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_mevit.early_exit.monitoring import PromiseMonitor
from modeling_mevit.scale.results import COLUMNS, ScoringReport, Summary, open_results, write_results


def rows(*names: str, error: str | None = None, layer: int = 2) -> pa.Table:
    """Rows of images that all left at one exit, or could not be read."""
    scored = (None,) * 5 if error else ("teal", 0.9, layer, 0.1, None)
    columns = zip(*((name, *scored, error) for name in names), strict=True)
    return pa.table([pa.array(values, kind.type) for values, kind in zip(columns, COLUMNS, strict=True)], COLUMNS)


def test_what_was_written_is_there_the_next_time(tmp_path):
    directory = str(tmp_path / "new" / "results")
    assert open_results(directory, "model").to_pylist() == []
    write_results(directory, "model", rows("a.jpg", "b.jpg"))
    write_results(directory, "model", rows("c.jpg", error="broken"))
    write_results(directory, "model", rows("a.jpg", "b.jpg"))  # a block that was done twice
    assert sorted(open_results(directory, "model").to_pylist()) == ["a.jpg", "b.jpg", "c.jpg"]
    table = pq.read_table(directory)
    assert table.schema.remove_metadata() == COLUMNS and len(table) == 3


def test_what_a_killed_process_left_is_removed_and_not_read(tmp_path):
    write_results(str(tmp_path), "model", rows("a.jpg"))
    (done,) = tmp_path.iterdir()
    (tmp_path / f".unfinished-{done.name}.1234").write_bytes(done.read_bytes()[:50])
    assert open_results(str(tmp_path), "model").to_pylist() == ["a.jpg"]
    assert list(tmp_path.iterdir()) == [done]


def test_results_of_another_model_are_not_added_to(tmp_path):
    write_results(str(tmp_path), "0123", rows("a.jpg"))
    with pytest.raises(ValueError, match=r"must be of this model as it is calibrated now, 4567; .* is of 0123"):
        open_results(str(tmp_path), "4567")


def test_what_is_no_directory_of_results_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"OUTPUT must be a directory of results alone, .* has notes.txt"):
        open_results(str(tmp_path), "model")
    with pytest.raises(ValueError, match=r"OUTPUT must be a directory, got the file .*notes.txt"):
        open_results(str(tmp_path / "notes.txt"), "model")
    (tmp_path / "notes.txt").rename(tmp_path / "part-1.parquet")
    with pytest.raises(ValueError, match=r"part-1.parquet is damaged: .*; remove it, and its images are scored again"):
        open_results(str(tmp_path), "model")


def test_summaries_add_up():
    total = Summary()
    for table in (rows("a", "b"), rows("c", layer=4), rows("d", "e", error="cannot read e: broken")):
        total.add(Summary.from_json(Summary.of(table).to_json()))
    assert total == Summary(5, 2, "cannot read e: broken", {2: 2, 4: 1})
    assert total.mean_cost({2: 0.5, 4: 1.1}) == pytest.approx(0.7)


def test_the_report_is_a_sentence():
    summary = Summary(1200, 2, "cannot read the image e.jpg: broken.", {6: 1000, 12: 198})
    report = ScoringReport("photos", "out", summary, 300, 21.4, 20.0, {6: 0.4, 12: 1.0})
    assert str(report) == (
        "Scored 1,198 images in 21 s (60.0 a second while the actors ran): 1,000 left at exit 6, 198 left at exit 12, "
        "at a mean cost of 0.499 of the plain ViT's; 2 could not be scored, first: cannot read the image e.jpg: "
        "broken. The rows are in out; 300 more were there already."
    )
    nothing = ScoringReport("photos", "out", Summary(), 300, 1.0, 0.0, {})
    assert str(nothing) == "All 300 images of photos are in out already."


def test_the_report_says_what_the_audit_found():
    monitor = PromiseMonitor(0.02, seed=0)
    monitor.update([1] * 1200, [1] * 1199 + [2])
    settings = ("photos", "out", Summary(1200, 0, None, {6: 1200}))
    report = ScoringReport(*settings, 0, 21.4, 20.0, {6: 0.4}, monitor.disagreement)
    assert str(report).endswith(
        " The rows are in out. 1,200 images were audited, of which 1 got another label from the full run. "
        f"Disagreement{str(monitor.disagreement).removeprefix('disagreement')}"
    )
    continued = ScoringReport(*settings, 300, 21.4, 20.0, {6: 0.4}, monitor.disagreement)
    assert "another label from the full run; the 300 that were there already do not count. Dis" in str(continued)
    done = ScoringReport("photos", "out", Summary(), 300, 1.0, 0.0, {}, PromiseMonitor(0.02).disagreement)
    assert str(done) == "All 300 images of photos are in out already, and none was audited."
