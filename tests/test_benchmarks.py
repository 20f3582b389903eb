"""The benchmarks run: once each and untimed, those that show every helper and take little time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("chosen", ["bench_join.py::test_mean_join_forward[bf16-all]", "bench_depth.py::test_building"])
def test_a_benchmark_runs(chosen):
    command = [sys.executable, "-m", "pytest", "-q", f"benchmarks/{chosen}", "--benchmark-disable"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
