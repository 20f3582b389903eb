"""What the logs of a round's processes say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rounds import OVER


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def pytest_says(log: Path) -> str:
    """Its last line, behind which compute-sanitizer has one of its own."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if not line.startswith("=========")), "no output")


def counts(logs: Sequence[Path]) -> str:
    """What pytest's last lines say, added up; and how many tests were not reached in time."""
    found: dict[str, int] = {}
    for log in logs:
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", pytest_says(log)):
            found[word] = found.get(word, 0) + int(number)
    over = sum(
        int(n) for log in logs for n in re.findall(rf"SKIPPED \[(\d+)\] .*{OVER}", log.read_text(errors="replace"))
    )
    late = [f"{over} of the skipped for want of time"] if over else []
    return ", ".join([*(f"{number} {word}" for word, number in found.items()), *late])


def complaints(log: Path) -> list[str]:
    """What compute-sanitizer found, of a process that it may not have ended."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("========= ")]
    return [line for line in lines if "COMPUTE-SANITIZER" not in line and "SUMMARY: 0 " not in line]


def uninitialised(log: Path) -> list[str]:
    """What initcheck found in our kernels; it watches all of them, since it knows only the writes that it watched."""
    text = log.read_text(errors="replace")
    return re.findall(r"^========= (Uninitialized .*\n=+ +at .*fractal.*)$", text, re.MULTILINE)
