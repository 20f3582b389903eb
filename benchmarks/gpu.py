"""``make gpu``: the round on a machine with a CUDA GPU, offline, with the PyTorch, Triton and nvcc that are there.

Stages, each with its own time limit and its log: build (the extensions, in place), test (every backend on the GPU, in
several processes: compiling takes most of the time), sanitize (only when named: compute-sanitizer on the CUDA kernels),
tune (only when named: the tiles of the Triton kernels, for what is measured), kernels (the microbenchmarks).
A stage that fails leaves its log; nothing is measured before the tests pass. Leaves <gpu>-<commit>.json and the logs in
one folder. Exits 1 if a stage failed.

--dry-run needs no GPU: it collects what the stages would run, and says why they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, ROOT, ReportError, commit, condense, table, write_text

LIMITS = {"build": 240, "test": 300, "sanitize": 400, "tune": 300, "kernels": 300}  # seconds
ALWAYS = ("build", "test", "kernels")
TESTS = [f"tests/test_{name}.py" for name in ("ops", "gpu", "graphed", "triton", "tiles", "tuning", "cuda")]
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
BENCH = "benchmarks/bench_gpu.py"


class Failed(Exception):
    """A stage did; the text says how."""


def start(command: Sequence[str], log: Path, under: Sequence[str] = (), **variables: str) -> subprocess.Popen[bytes]:
    """Tiles come from the committed table alone, unless ``variables`` say otherwise."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    env |= {"FRACTAL_TUNE": "0", "FRACTAL_CACHE_DIR": str(log.parent / "no-cache"), **variables}
    with log.open("ab") as file:
        command = [*under, sys.executable, *command]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def finish(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], limit: float) -> None:
    """Waits for all of them, and no longer than ``limit`` seconds."""
    end = time.monotonic() + limit
    failures = []
    for process, log in zip(processes, logs, strict=True):
        try:
            code = process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = -1
        if code:
            why = f"not done in {limit:.0f} s" if code == -1 else f"exit status {code}"
            failures.append(f"{why}; {log.name}: {last_line(log)}")
    if failures:
        raise Failed("\n".join(failures))


def rates() -> dict[str, float]:
    """What this GPU reaches: bytes/s of a copy, read and written, and bf16 products, as medians of 20 runs."""

    def seconds(call: Any) -> float:
        times = []
        for _ in range(23):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            call()
            ended.record()
            ended.synchronize()
            times.append(1e-3 * began.elapsed_time(ended))
        return statistics.median(times[3:])

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy, product = seconds(lambda: target.copy_(source)), seconds(lambda: a @ a)
    return {"copy_gb_per_s": 2e-9 * source.numel() / copy, "bf16_tflop_per_s": 2e-12 * 8192**3 / product}


def clocks() -> str:
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


class Round:
    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder.resolve(), processes
        self.scratch = Path(tempfile.mkdtemp(prefix="fractal-gpu-"))

    def log(self, name: str) -> Path:
        path = self.folder / f"{name}.txt"
        path.unlink(missing_ok=True)
        return path

    def build(self) -> str:
        """Both extensions; they must be there, since the tests of every backend need them."""
        log = self.log("build")
        mode = {"FRACTAL_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count() or 1)}
        finish([start(["setup.py", "-q", "build_ext", "--inplace"], log, **mode)], [log], LIMITS["build"])
        log = self.log("info")
        finish([start(["-m", "fractal_kernels.info"], log)], [log], 60)
        return log.read_text().strip()

    def test(self) -> str:
        logs = [self.scratch / f"test-{i}.txt" for i in range(self.processes)]
        shards = [[*PYTEST, "-rs", *TESTS, "--shard", f"{i}/{self.processes}"] for i in range(self.processes)]
        try:
            finish([start(s, log) for s, log in zip(shards, logs, strict=True)], logs, LIMITS["test"])
        finally:
            self.log("test").write_text("\n".join(log.read_text(errors="replace") for log in logs))
        counts: dict[str, int] = {}
        for log in logs:
            for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last_line(log)):
                counts[word] = counts.get(word, 0) + int(number)
        return ", ".join(f"{number} {word}" for word, number in counts.items())

    def sanitize(self) -> str:
        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None:
            raise Failed("there is no compute-sanitizer; it comes with the CUDA toolkit")
        suite = [*PYTEST, "tests/test_cuda.py", "-k", "number_of_branches_and_dtypes and cuda"]
        checks = ("memcheck", "racecheck", "initcheck")
        logs = [self.log(name) for name in checks]
        under = [tool, "--error-exitcode", "9", "--tool"]
        # Without PyTorch's caching, an access past the end of a tensor is one past the end of an allocation.
        running = [
            start(suite, log, [*under, name], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            for name, log in zip(checks, logs, strict=True)
        ]
        finish(running, logs, LIMITS["sanitize"])
        return "\n".join(f"{name}: {last_line(log)}" for name, log in zip(checks, logs, strict=True))

    def tune(self) -> str:
        log, cache = self.log("tune"), str(self.scratch / "tuned")
        tuning = [*PYTEST, BENCH, "--benchmark-disable"]
        finish([start(tuning, log, FRACTAL_TUNE="1", FRACTAL_CACHE_DIR=cache)], [log], LIMITS["tune"])
        writing = ["-m", "fractal_kernels.triton.tuning", "--write-table"]
        finish([start(writing, log, FRACTAL_CACHE_DIR=cache)], [log], 60)
        shutil.copy(ROOT / "fractal_kernels" / "triton" / "tuned.json", self.folder)
        return f"{len(list(Path(cache).glob('*/*.json')))} classes in tuned.json"

    def kernels(self) -> str:
        log, raw = self.log("kernels"), self.scratch / "raw.json"
        command = [*PYTEST, BENCH]
        before = {**rates(), "clocks": clocks()}
        failure = None
        try:
            finish([start([*command, f"--benchmark-json={raw}"], log)], [log], LIMITS["kernels"])
        except Failed as error:
            failure = error  # the figures of what ran are kept
        if not raw.exists():
            raise failure or Failed("no figures")
        results = condense(json.loads(raw.read_text()), "python " + " ".join(command))
        device = torch.cuda.get_device_name()
        results["machine"] |= {"device": device, "cuda": torch.version.cuda, **before}
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}-{(commit() or 'no-commit')[:10]}.json"
        write_text(self.folder / name, json.dumps(results, indent=1) + "\n")
        if failure:
            raise failure
        return table(results["rows"])


def dry_run(stages: Sequence[str]) -> int:
    """Collects what would run, so that the round is not broken when a GPU comes."""
    for stage in stages:
        print(
            f"{stage}: skipped: PyTorch sees no CUDA device" if not torch.cuda.is_available() else f"{stage}: dry run"
        )
        if stage in ("test", "kernels"):
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder, "collect.txt")
                files = TESTS if stage == "test" else [BENCH]
                try:
                    finish([start([*PYTEST, "--collect-only", *files], log)], [log], 300)
                except Failed as error:
                    print(f"{stage}: {error}", file=sys.stderr)
                    return 1
                print(f"  would run: {last_line(log)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--stages", default=",".join(ALWAYS), help=f"of {','.join(LIMITS)}; default: {','.join(ALWAYS)}"
    )
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--dry-run", action="store_true", help="collect what would run; needs no GPU")
    options = parser.parse_args(argv)
    stages = [stage for stage in LIMITS if stage in options.stages.split(",")]
    if unknown := set(options.stages.split(",")) - set(LIMITS):
        parser.error(f"--stages: expected names of {', '.join(LIMITS)}, got {', '.join(sorted(unknown))}")
    if options.dry_run:
        return dry_run(stages)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no CUDA device; --dry-run collects what would run", file=sys.stderr)
        return 1
    options.results.mkdir(parents=True, exist_ok=True)
    this = Round(options.results, options.processes)
    try:
        for stage in stages:
            began = time.monotonic()
            try:
                said = getattr(this, stage)()
            except (Failed, ReportError) as error:
                print(f"{stage}: failed after {time.monotonic() - began:.0f} s: {error}", file=sys.stderr)
                return 1
            print(f"{stage}: {time.monotonic() - began:.0f} s\n{said}", flush=True)
    finally:
        shutil.rmtree(this.scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
