"""A pytest plugin of ``make gpu``: an end for a suite that may be longer than the round, and rows that outlive a kill.

python -m pytest -p benchmarks.rounds --seconds 100 --rows rows.jsonl ...
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

BEGUN = time.monotonic()
OVER = "the time is over"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=float("inf"), help="no test begins later than that")
    parser.addoption("--rows", default=None, help="a file that gets every benchmark's row as it is measured")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - BEGUN > item.config.getoption("--seconds"):
        pytest.skip(OVER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """A row counts when its test has passed."""
    report = yield
    row = getattr(getattr(item, "funcargs", {}).get("benchmark"), "extra_info", {})
    if (path := item.config.getoption("--rows")) and call.when == "call" and report.passed and "what" in row:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return report
