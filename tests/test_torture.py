# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
import re
from collections import Counter
from pathlib import Path

from tests.torture import ATTEMPTS, PAGE, Outcomes, attempts_page


ALL = [attempt for attempts in ATTEMPTS.values() for attempt in attempts]


def test_every_attempt_is_a_test():
    for attempt in ALL:
        file, name = attempt.test.split("::")
        assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text("utf-8"), attempt.test
    assert len({attempt.test for attempt in ALL}) == len(ALL)


def test_the_page_shows_every_attempt_and_none_failed():
    page = PAGE.read_text("utf-8")
    assert re.sub(r"\| \d+ \| [^|]* \|$", "", page, flags=re.MULTILINE) == re.sub(
        r"\| \d+ \| [^|]* \|$", "", attempts_page({}), flags=re.MULTILINE
    )
    assert "failed" not in page and "not run" not in page


def test_cases_are_counted_once():
    class Report:
        def __init__(self, when, outcome):
            self.nodeid, self.when, self.outcome = f"tests/{ALL[0].test}[a]", when, outcome

    outcomes = Outcomes()
    for when, outcome in (("setup", "passed"), ("call", "failed"), ("teardown", "passed"), ("setup", "skipped")):
        outcomes.pytest_runtest_logreport(Report(when, outcome))
    assert outcomes.by_test == {ALL[0].test: Counter(failed=1, skipped=1)}
    assert f"| {ALL[0].tried} | {ALL[0].happens} | 2 | 1 failed, 1 skipped |" in attempts_page(outcomes.by_test)
