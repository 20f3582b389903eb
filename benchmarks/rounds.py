"""A pytest plugin of ``make gpu``: an end for a suite that may be too long, and results that outlive a kill.

python -m pytest -p benchmarks.rounds --seconds 100 --rows rows.jsonl --failures failures.txt --done done.json ...
(each option's help says what it is).
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

OVER = "the time is over"
_begun = time.monotonic()
_some_done = False
_PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, default=float("inf"), help="no test begins after that, and the one that runs is cut"
    )
    parser.addoption("--rows", default=None, help="a file that gets every benchmark's row as it is measured")
    parser.addoption("--failures", default=None, help="a file that gets the name of every test that fails")
    parser.addoption(
        "--first", action="append", default=[], help="an expression: tests that have it come before others"
    )
    parser.addoption("--passed", default=None, help="a file that gets the name of every test that passes")
    parser.addoption("--done", default=None, help="names of tests that are not run again")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _some_done
    if path := config.getoption("--done"):
        done = set(json.loads(Path(path).read_text(encoding="utf-8")))
        there = [item for item in items if item.nodeid in done]
        config.hook.pytest_deselected(items=there)
        items[:] = [item for item in items if item.nodeid not in done]
        _some_done = bool(there)
    ranks = [re.compile(first) for first in config.getoption("--first")]
    items.sort(key=lambda item: next((i for i, rank in enumerate(ranks) if rank.search(item.nodeid)), len(ranks)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    nothing_left = _some_done or session.config.getoption("--shard", "0/1") != "0/1"
    if nothing_left and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def _left(item: pytest.Item) -> float:
    return item.config.getoption("--seconds") - (time.monotonic() - _begun)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _left(item) <= 0:
        pytest.skip(OVER)


def _cut(*_: Any) -> None:
    pytest.skip(OVER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that the end finds running counts as not reached: whoever kills the process loses its last words."""
    if (left := _left(item)) == float("inf"):
        return (yield)
    before = signal.signal(signal.SIGALRM, _cut)
    signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """A row counts when its test has passed."""
    report = yield
    row = getattr(getattr(item, "funcargs", {}).get("benchmark"), "extra_info", {})
    if (path := item.config.getoption("--rows")) and call.when == "call" and report.passed and "what" in row:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "test": item.nodeid}) + "\n")
    if call.when == "call":
        item.stash[_PASSED] = report.passed
    # After its teardown, where a device's errors may show.
    good = call.when == "teardown" and report.passed and item.stash.get(_PASSED, False)
    if (path := item.config.getoption("--passed")) and good:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{item.nodeid}\n")
    if (path := item.config.getoption("--failures")) and report.failed:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{item.nodeid} ({report.when})\n")
    return report
