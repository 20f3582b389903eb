"""``make gpu``: the round on a machine with a CUDA GPU, offline, with the PyTorch that is there.

Tests the kernels on the GPU in several processes (compiling them takes most of the time), measures them if all tests
pass, and leaves under --output: info.txt, tests-*.txt, bench.txt and bench.json. With --tune it first tunes the tiles
for what it measures, into tuned/. Exits 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.report import ROOT, ReportError, condense, table, write_text

TESTS = tuple(f"tests/test_{name}.py" for name in ("ops", "triton", "tiles", "tuning"))


def start(command: list[str], to: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Tiles come from the committed table and from what this round tuned, whatever the user has."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    env |= {"FRACTAL_TUNE": "0", "FRACTAL_CACHE_DIR": str(to.resolve().parent / "tuned"), **variables}
    with to.open("wb") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--skip-tests", action="store_true", help="measure what was tested before")
    parser.add_argument("--tune", action="store_true", help="tune the tiles first, for what is measured")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if start(["-m", "fractal_kernels.info"], folder / "info.txt").wait():
        print((folder / "info.txt").read_text(), file=sys.stderr)
        return 1
    if not arguments.skip_tests:
        of = arguments.processes
        logs = [folder / f"tests-{i}.txt" for i in range(of)]
        suite = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs", *TESTS, "--shard"]
        running = [start([*suite, f"{i}/{of}"], log) for i, log in enumerate(logs)]
        failed = [process.wait() for process in running]
        for log in logs:
            print(f"{log.name}: {last_line(log)}")
        print(f"tests took {time.monotonic() - began:.0f} s", flush=True)
        if any(failed):
            print("benchmarks.gpu: tests failed; nothing is measured before they pass", file=sys.stderr)
            return 1
    raw = folder / "raw.json"
    command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "benchmarks/bench_gpu.py"]
    if arguments.tune:
        tuning = start([*command, "--benchmark-disable"], folder / "tune.txt", FRACTAL_TUNE="1").wait()
        classes = len(list(folder.glob("tuned/*/*.json")))
        print(f"tuning: {last_line(folder / 'tune.txt')}; {classes} classes are tuned", flush=True)
        if tuning:
            return 1
    failed_bench = start([*command, f"--benchmark-json={raw}"], folder / "bench.txt").wait()
    print(f"bench: {last_line(folder / 'bench.txt')}; all took {time.monotonic() - began:.0f} s")
    if not raw.exists():
        return 1
    try:
        results = condense(json.loads(raw.read_text()), "python " + " ".join(command))
    except ReportError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    raw.unlink()
    results["machine"] = {**results["machine"], "device": torch.cuda.get_device_name()}
    write_text(folder / "bench.json", json.dumps(results, indent=1) + "\n")
    print(table(results["rows"]))
    return 1 if failed_bench else 0


if __name__ == "__main__":
    sys.exit(main())
