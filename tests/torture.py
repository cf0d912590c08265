# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs every attempt to break the project that docs/reliability.md tells of, and writes docs/attempts.md.

    make torture

An attempt is a test, which runs with the others too; here it gets a sentence, and its result a row.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "attempts.md"


@dataclass(frozen=True)
class Attempt:
    """What was tried, what happens then, and the test that shows it, below `tests/`."""

    tried: str
    happens: str
    test: str


LIBRARY = "modeling_mevit/"
ATTEMPTS = {
    "Secrets and code": [
        Attempt(
            "Push a training with a token, local paths and the host's name in its arguments",
            "only the model, its code, its card and results are uploaded",
            LIBRARY + "test_trainer.py::test_only_the_model_its_code_and_its_card_are_pushed",
        ),
        Attempt(
            "Look for them in the local `training_args.bin`",
            "it holds neither token nor paths, and the run resumes",
            LIBRARY + "test_trainer.py::test_saved_arguments_hold_neither_token_nor_paths",
        ),
        Attempt(
            "Upload the states of a training",
            "refused",
            LIBRARY + "test_trainer.py::test_states_of_a_training_are_never_pushed",
        ),
        Attempt(
            "Give a token as an option or in a file",
            "refused, without repeating it",
            "training/test_train.py::test_a_token_is_refused_in_one_line_that_does_not_repeat_it",
        ),
        Attempt(
            "Load pickled weights, as a checkpoint or with `--plain`",
            "refused",
            LIBRARY + "test_checkpoint.py::test_pickled_weights_are_not_read",
        ),
        Attempt(
            "Name code of its own in a checkpoint, and answer yes when asked",
            "refused",
            LIBRARY + "test_checkpoint.py::test_code_of_a_checkpoint_is_not_run",
        ),
        Attempt(
            "Name files outside an export in its `cascade.json`",
            "refused",
            LIBRARY + "onnx/test_cascade_mevit.py::test_files_have_plain_names",
        ),
        Attempt(
            "Link out of an export",
            "refused; the Hub cache's own links load",
            LIBRARY + "onnx/test_cascade_mevit.py::test_links_lead_to_files_of_the_directory_only",
        ),
        Attempt(
            "Name weights in other files in a graph",
            "refused",
            LIBRARY + "onnx/test_cascade_mevit.py::test_weights_in_other_files_are_refused",
        ),
        Attempt(
            "Put a pipe in the place of a file of an export",
            "refused",
            LIBRARY + "onnx/test_cascade_mevit.py::test_what_is_no_regular_file_is_refused",
        ),
        Attempt(
            "Give an export gigantic JSON",
            "not read",
            LIBRARY + "onnx/test_cascade_mevit.py::test_large_json_is_not_read",
        ),
    ],
    "Certificates": [
        Attempt(
            "Calibrate on copies, and on images that trained the model",
            "copies count once, training images never, and the report says so",
            LIBRARY + "early_exit/test_calibration.py::test_copies_count_once_and_training_images_never",
        ),
        Attempt(
            "Certify with too few images",
            "refused before the model runs",
            LIBRARY + "early_exit/test_calibration.py::test_too_few_images_are_told_before_the_model_runs",
        ),
        Attempt(
            "Find a rate of corrections at which the `difference` bound errs too often",
            "at none of them, computed exactly",
            LIBRARY
            + "early_exit/test_calibration.py::test_the_difference_is_valid_at_every_rate_and_never_below_harm",
        ),
        Attempt(
            "Evaluate on calibration images that were renamed and mixed with others",
            "refused",
            LIBRARY
            + "early_exit/test_evaluation.py::test_images_that_chose_the_thresholds_are_recognised_in_other_folders",
        ),
        Attempt(
            "Change target, thresholds, policy, precision or weights of a live model",
            "the certificate is gone, with a warning that says why",
            LIBRARY + "test_modeling_mevit.py::test_a_certificate_is_gone_with_what_it_was_made_for",
        ),
        Attempt(
            "Edit a certified `config.json`",
            "a warning while loading; early exit still runs",
            LIBRARY + "test_configuration_mevit.py::test_a_certificate_for_something_else_is_told_while_loading",
        ),
        Attempt(
            "Change the policy or the exits of an export by hand",
            "refused",
            LIBRARY + "onnx/test_cascade_mevit.py::test_a_config_of_other_graphs_is_refused",
        ),
        Attempt(
            "Put other weights beside a certified `config.json`",
            "the model card promises nothing",
            LIBRARY
            + "reports/test_model_card.py::test_other_weights_than_those_that_were_calibrated_are_promised_nothing",
        ),
        Attempt(
            "Edit heads, layers or epsilon in `config.json`",
            "a warning while loading",
            LIBRARY + "test_configuration_mevit.py::test_an_architecture_that_was_edited_by_hand_is_told",
        ),
    ],
    "Wrong answers": [
        Attempt(
            "Give the model images that are NaN",
            "they run to the end under every policy",
            LIBRARY + "test_early_exit.py::test_an_image_that_is_no_number_runs_to_the_end",
        ),
        Attempt(
            "Give them to an exported cascade",
            "they run to the end under every policy",
            LIBRARY + "onnx/test_cascade_mevit.py::test_images_that_are_nan_run_to_the_end",
        ),
        Attempt(
            "Ask `mevit predict` for an image without a numeric result",
            "an error in its line, exit code 1",
            LIBRARY + "test_cli.py::test_a_result_that_is_not_a_number_is_no_answer",
        ),
        Attempt(
            "Ask two threads for attentions at once",
            "each gets its own",
            LIBRARY + "test_modeling_mevit.py::test_attentions_of_two_threads_are_not_mixed",
        ),
        Attempt(
            "Read grey images of 16 bits",
            "scaled to 8 bits",
            LIBRARY + "data/test_image_processing.py::test_grey_values_of_16_bits_are_scaled_to_8",
        ),
        Attempt(
            "Read floating-point images",
            "refused",
            LIBRARY + "data/test_image_processing.py::test_images_of_other_numbers_are_refused",
        ),
        Attempt(
            "Turn a photo by its EXIF orientation",
            "README's snippet and `mevit predict` agree",
            LIBRARY + "test_checkpoint.py::test_the_snippet_of_the_readme_sees_what_predict_sees",
        ),
    ],
    "Lost data": [
        Attempt(
            "Stop or kill a save at every write and rename",
            "each file is the old or the new one",
            LIBRARY + "test_checkpoint.py::test_a_save_that_stops_anywhere_leaves_whole_files",
        ),
        Attempt(
            "Fill the disk while saving",
            "the old files stay",
            LIBRARY + "test_atomic.py::test_a_small_file_system_that_is_full",
        ),
        Attempt(
            "Calibrate a checkpoint of links",
            "what they lead to stays as it is",
            LIBRARY + "test_checkpoint.py::test_calibrating_a_checkpoint_of_links_leaves_what_they_lead_to",
        ),
        Attempt(
            "Put a link in the place of the directory that saving works in",
            "refused; what it leads to stays as it is",
            LIBRARY + "test_atomic.py::test_a_link_in_place_of_the_directory_to_work_in_is_refused",
        ),
        Attempt(
            "Run two commands on one directory",
            "the second one says so and ends",
            LIBRARY + "test_checkpoint.py::test_two_commands_do_not_write_to_one_directory",
        ),
        Attempt(
            "Kill an export",
            "no directory that the runtime accepts",
            LIBRARY + "onnx/test_export.py::test_a_killed_export_leaves_nothing_that_runs",
        ),
        Attempt(
            "Keep directories of one's own beside an export",
            "left alone",
            LIBRARY + "onnx/test_export.py::test_directories_of_others_are_left_alone",
        ),
    ],
    "Scoring and serving": [
        Attempt(
            "Kill `mevit score` while it writes",
            "no part of a file is read; the next run scores what is missing",
            LIBRARY + "scale/test_score.py::test_a_killed_job_is_finished_by_the_next",
        ),
        Attempt(
            "Add the results of one model to those of another",
            "refused",
            LIBRARY + "scale/test_results.py::test_results_of_another_model_are_not_added_to",
        ),
        Attempt(
            "Kill replicas of a service under load",
            "every request is answered",
            LIBRARY + "scale/test_serve.py::test_replicas_killed_under_load_lose_no_request",
        ),
        Attempt(
            "Send noise, damaged images, 100 megapixels, too many images, too many bytes or nothing",
            "4xx and one sentence; the service goes on",
            LIBRARY + "scale/test_serve.py::test_bad_requests_get_one_sentence_and_the_service_goes_on",
        ),
        Attempt(
            "Send more than a service can take",
            "503; what was accepted is answered in its time",
            LIBRARY + "scale/test_front.py::test_a_full_service_refuses_and_keeps_its_latency",
        ),
        Attempt(
            "Send more than a service that watches its promise can also audit",
            "audits are dropped and counted; every request is answered",
            LIBRARY + "scale/test_front.py::test_where_the_backlog_is_full_audits_are_dropped_and_requests_are_not",
        ),
        Attempt(
            "Ask without the token, or with another one",
            "401, whatever the path",
            LIBRARY + "scale/test_front.py::test_without_the_token_there_is_nothing",
        ),
        Attempt(
            "Start a service in the directory of an export that has code of its own, and look for open ports",
            "its code is left alone; all ports, also those of Ray, are on 127.0.0.1",
            LIBRARY + "scale/test_serve.py::test_the_command_serves_on_the_loopback_address_alone",
        ),
    ],
    "Bad input": [
        Attempt(
            "Predict many files of which some cannot be read",
            "an error in their lines, answers in the others', exit code 1",
            LIBRARY + "test_cli.py::test_predicts_the_others_where_files_cannot_be_read",
        ),
        Attempt(
            "Give a decompression bomb",
            "one line",
            LIBRARY + "test_cli.py::test_a_decompression_bomb_is_told_in_one_line",
        ),
        Attempt(
            "Give weights that do not fit the configuration",
            "one line",
            LIBRARY + "test_checkpoint.py::test_weights_that_do_not_fit_the_config",
        ),
        Attempt(
            "Put malformed fields into `config.json`",
            "one line that names the field",
            LIBRARY + "test_configuration_mevit.py::test_malformed_fields_of_a_file_are_named",
        ),
        Attempt(
            "Put malformed fields into the calibration of `config.json`",
            "one line",
            LIBRARY + "test_configuration_mevit.py::test_a_calibration_that_is_malformed_is_named",
        ),
        Attempt(
            "Put malformed fields into `cascade.json`",
            "one line that names the field",
            LIBRARY + "onnx/test_cascade_mevit.py::test_malformed_fields_are_named",
        ),
        Attempt(
            "Name a checkpoint on a Hub that does not answer",
            "one line",
            LIBRARY + "test_checkpoint.py::test_a_hub_that_cannot_be_reached",
        ),
        Attempt(
            "Train without accelerate",
            "one line",
            "training/test_train.py::test_the_script_without_accelerate_ends_with_one_line",
        ),
    ],
}


class Outcomes:
    """A plugin of pytest that counts the outcomes of the cases of each test."""

    def __init__(self) -> None:
        self.by_test: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A case counts once: where it was called, or where it was skipped or failed before or after that."""
        if report.when == "call" or report.outcome != "passed":
            test = report.nodeid.removeprefix("tests/").partition("[")[0]
            self.by_test.setdefault(test, Counter())[report.outcome] += 1


def attempts_page(outcomes: dict[str, Counter[str]]) -> str:
    """The page with a table for each group; the outcomes of a test that did not run are missing."""
    introduction = (
        "`make torture` runs these attempts and writes this page. [Reliability](reliability.md) says what is promised."
    )
    lines = ["# What was tried", "", introduction]
    for group, attempts in ATTEMPTS.items():
        lines += ["", f"## {group}", "", "| tried | what happens | cases | result |", "| --- | --- | --- | --- |"]
        for attempt in attempts:
            counted = outcomes.get(attempt.test, Counter())
            result = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counted.items())) or "not run"
            lines.append(f"| {attempt.tried} | {attempt.happens} | {counted.total()} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the attempts, writes the page, and returns the exit code of pytest."""
    outcomes = Outcomes()
    tests = [str(ROOT / "tests" / attempt.test) for attempts in ATTEMPTS.values() for attempt in attempts]
    code = pytest.main(["-q", "--no-header", *tests], plugins=[outcomes])
    PAGE.write_text(attempts_page(outcomes.by_test), "utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
