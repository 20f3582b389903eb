"""Threads, seeds, and the table of ratios after the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.compare import Contender, alternate, figures
from benchmarks.report import table

ROWS: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def same_start(request: pytest.FixtureRequest) -> None:
    """Every benchmark starts from the same seed, threads and, unless marked, an empty compiler cache in memory."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    if request.node.get_closest_marker("keep_compiled") is None:
        torch._dynamo.reset()


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """Stores a row of figures in the JSON output and in the table."""

    def store(group: str, what: str, row: dict[str, Any], unit: str = "ms", **extra: float) -> None:
        row = {"group": group, "what": what, "unit": unit, **row, "extra": extra}
        benchmark.extra_info.update(row)
        ROWS.append(row)

    return store


@pytest.fixture
def compare(benchmark: Any, record: Callable[..., None]) -> Callable[..., None]:
    """Times the contenders in turn and records the row; `extra` maps the row to further figures, `case` names what a
    plot goes by (op, backend, dtype, ...)."""

    def run(
        group: str,
        what: str,
        contenders: dict[str, Contender],
        rounds: int,
        cycle: int | None = None,
        extra: Callable[[dict[str, Any]], dict[str, float]] | None = None,
        case: dict[str, Any] | None = None,
    ) -> None:
        times = alternate(benchmark, contenders, rounds)
        if times is not None:
            row = figures(times, cycle) | ({"case": case} if case else {})
            record(group, what, row, **(extra(row) if extra else {}))

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        terminalreporter.section("ratios")
        terminalreporter.write_line(table(ROWS))
