"""The page of promises names tests that are there, and every promise names one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/guarantees.md").read_text()


def test_every_test_that_the_page_names_is_there():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)
    assert len(named) > 50
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_promise_names_a_test():
    promised, _ = PAGE.split("## What is not promised")
    rows = re.findall(r"^\| (.+) \| (.+) \|$", promised, re.MULTILINE)
    promises = [(sentence, tests) for sentence, tests in rows if sentence not in ("sentence", "---")]
    assert len(promises) > 30
    for sentence, tests in promises:
        assert sentence.endswith(".") and "::test_" in tests, sentence
