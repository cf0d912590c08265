# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import pytest

from modeling_mevit.reports.tables import (
    benchmark_table,
    early_exit_sentence,
    evaluation_tables,
    markdown_table,
    measured_splits,
    results_table,
)


pytestmark = pytest.mark.one_major


RUN = {
    "operating_point": {
        "policy": "margin",
        "thresholds": [0.25],
        "num_samples": 200,
        "accuracy": 0.8,
        "full_model_accuracy": 0.81,
        "cost": 0.6123,
        "harms": 6,
        "corrections": 4,
        "exit_counts": {"6": 150, "12": 50},
    },
    "reference": "plain ViT",
    "images_per_second": 20.04,
    "plain_images_per_second": 13.0,
    "relative_latency": 0.649,
    "borderline": 0,
}
EVALUATION = {
    "num_samples": 200,
    "exits": [{"exit": 6, "accuracy": 0.75, "cost": 0.436}, {"exit": 12, "accuracy": 0.81, "cost": 0.932}],
    "policies": {"margin": {"auroc": {"6": 0.8333, "12": None}, "area": 0.79126, "oracle": 0.9}},
    "early_exit": RUN,
    "plain_accuracy": 0.805,
}


def test_cells_are_escaped_and_what_is_not_known_is_a_dash():
    assert markdown_table(["a|b", "c"], [(1, None), ("x|y", "")]) == (
        "| a\\|b | c |\n| --- | --- |\n| 1 | – |\n| x\\|y |  |"
    )
    assert markdown_table(["a"], iter([])) == "| a |\n| --- |"


@pytest.mark.parametrize("row", [(1,), (1, 2, 3)])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(ValueError, match=r"must have 2 cells, as the header \['a', 'b'\] has, got \[1"):
        markdown_table(["a", "b"], [row])


def test_results_have_a_column_for_each_split_that_was_measured():
    exits = [{"exit": 6, "validation_accuracy": 0.5, "test_accuracy": 0.614, "cost": 0.5054, "parameters": 10_930_339}]
    assert measured_splits(exits) == ["validation", "test"]
    assert results_table(exits) == (
        "| exit | validation accuracy | test accuracy | cost | parameters |\n| --- | --- | --- | --- | --- |\n"
        "| 6 | 50.0% | 61.4% | 0.505 | 10.9 M |"
    )
    del exits[0]["test_accuracy"]
    assert measured_splits(exits) == ["validation"]
    assert results_table(exits).splitlines()[0] == "| exit | validation accuracy | cost | parameters |"


def test_the_sentence_tells_gain_and_loss():
    assert early_exit_sentence(RUN) == (
        "Early exit: accuracy 80.0% (last exit 81.0%; 6 harmed, 4 corrected), mean cost 0.612, 20.0 images a second, "
        "relative latency 0.65 (plain ViT: 13.0 images a second). Images that left: 150 at 6, 50 at 12."
    )


def test_the_sentence_tells_the_disagreement_where_it_was_counted():
    point = {**RUN["operating_point"], "disagreements": 11}
    assert "6 harmed, 4 corrected), disagreement 5.5%, mean cost 0.612" in (
        early_exit_sentence({**RUN, "operating_point": point})
    )


def test_tables_of_an_evaluation():
    count, exits, policies, sentence = evaluation_tables(EVALUATION).split("\n\n")
    assert count == "200 images"
    assert exits.splitlines()[2:] == [
        "| 6 | 75.0% | 0.436 |",
        "| 12 | 81.0% | 0.932 |",
        "| plain ViT | 80.5% | 1.000 |",
    ]
    assert policies.splitlines() == [
        "| policy | area | oracle | AUROC 6 | AUROC 12 |",
        "| --- | --- | --- | --- | --- |",
        "| margin | 0.7913 | 0.9000 | 0.833 | – |",
    ]
    assert sentence == early_exit_sentence(RUN)


def test_tables_tell_how_exits_are_combined():
    assert evaluation_tables({**EVALUATION, "exit_combination": "none"}) == evaluation_tables(EVALUATION)
    text = evaluation_tables({**EVALUATION, "exit_combination": "mean"})
    assert text.split("\n\n")[1] == (
        "An exit predicts with the mean of the log-probabilities of the exits passed so far, itself included."
    )


def test_what_was_not_evaluated_is_left_out():
    text = evaluation_tables({**EVALUATION, "early_exit": None, "plain_accuracy": None})
    assert "plain ViT" not in text and "Early exit" not in text and len(text.split("\n\n")) == 3


def test_a_benchmark_stands_beside_the_plain_vit_in_the_same_library():
    def row(name, library, scale, joules=None):
        sizes = {"megabytes": 50 * scale, "median": 20 * scale, "p95": 30 * scale, "memory": 200 * scale}
        return {"name": name, "library": library, "precision": "float32", **sizes, "joules": joules}

    rows = [row("plain ViT", "PyTorch", 1), row("plain ViT", "ONNX Runtime", 2), row("MEViT_6", "ONNX Runtime", 1, 3)]
    lines = benchmark_table(rows, "zeus is not installed.").splitlines()
    assert lines[2] == (
        "| plain ViT | PyTorch | float32 | 50.0 (1.00 ×) | 20.0 (1.00 ×) | 30.0 | 200 (1.00 ×) | not measured |"
    )
    assert (
        lines[4] == "| MEViT_6 | ONNX Runtime | float32 | 50.0 (0.50 ×) | 20.0 (0.50 ×) | 30.0 | 200 (0.50 ×) | 3.00 |"
    )
    assert lines[5:] == ["", "Energy was not measured: zeus is not installed."]
    assert len(benchmark_table(rows).splitlines()) == 5
