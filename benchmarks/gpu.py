"""``make gpu``: the round on a machine with a CUDA GPU, offline, with the PyTorch, Triton and nvcc that are there.

Stages: build (the extensions, in place), test (every backend on the GPU, in several processes:
compiling takes most of the time), sanitize (only when named: compute-sanitizer on the CUDA kernels), tune (only when
named: the tiles of the Triton kernels, for what is measured), kernels (the microbenchmarks), steps (training steps).
The round ends in time: every stage has a limit, tests and rows that it does not reach are skipped, and the last stage
has what the others left. After build failed nothing is measured; after a test failed rows still are, since each is
held against a reference before it is timed, but the README then says so. Leaves in one folder <gpu>-<commit>.json,
written after every stage, its plots, the names of the tests that passed, and the log of all stages; a later round of
the same commit, with nothing changed, goes on with the tests and rows that are not there. Where the files travel
without their git, FRACTAL_COMMIT names the commit.
Ends with a summary of at most 60 lines; exits 1 if a stage failed, which to run out of time is not.
--dry-run needs no GPU: it collects what the stages would run, and says why they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_logs import complaints, counts, last_line, uninitialised
from benchmarks.gpu_plots import plot
from benchmarks.gpu_report import summary
from benchmarks.report import RESULTS, ROOT, ReportError, commit, machine, rounded, write_text

MINUTES = 8.4  # of the whole round, but for the imports before and the plots after it
LIMITS = {"build": 240, "test": 180, "sanitize": 400, "tune": 300, "kernels": 100, "steps": 120}  # seconds
ALWAYS = ("build", "test", "kernels", "steps")
GRACE = 20  # seconds between the last test's end and a stage's limit
FILES = ("ops", "gpu", "graphed", "graphed_training", "triton", "tiles", "tuning", "cuda", "running", "recompute")
FILES += ("graphed_changes", "shortcut", "edges", "frozen")
TESTS = [f"tests/test_{name}.py" for name in FILES]
SANITIZED = "number_of_branches_and_dtypes or half_of_a_vector or (test_vector_loads and channel_slice)"
SANITIZED = f"({SANITIZED}) and not triton"
# Of the kernels' rows: what the README shows, peers of a user's, and then what compiles.
FIRST = (r"test_kernel\[.*nhwc-bf16", "test_kernel_of|row_of_convs", r"test_kernel\[.*nhwc-fp32")
FIRST += ("compile.*nhwc-bf16|bench_gpu_ops",)
PYTEST = ["-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "-p", "benchmarks.rounds"]
BENCHES = {  # what matters most first, and what compiles for long last
    "kernels": [
        "benchmarks/bench_gpu.py::test_kernel",
        "benchmarks/bench_gpu.py::test_against_compile",
        "benchmarks/bench_gpu.py::test_kernel_of",
        "benchmarks/bench_gpu_ops.py",
    ],
    "steps": ["benchmarks/bench_gpu_steps.py"],
}


class Failed(Exception):
    """A stage did; the text says how."""


class Late(Failed):
    """A stage was not done in time, and nothing else was wrong with it."""


def start(command: Sequence[str], log: Path, under: Sequence[str] = (), **variables: str) -> subprocess.Popen[bytes]:
    """Tiles come from the committed table alone, unless ``variables`` say otherwise."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    # Without what a pytest that calls this tells its own tests.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    env |= {"FRACTAL_TUNE": "0", "FRACTAL_CACHE_DIR": str(log.parent / "no-cache"), **variables}
    with log.open("ab") as file:
        command = [*under, sys.executable, *command]
        options = {"cwd": ROOT, "env": env, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, stdout=file, **options)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it started: a benchmark's compilers must not run beside the next stage."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], limit: float) -> None:
    """Waits for all of them, and no longer than ``limit`` seconds."""
    until = time.monotonic() + limit
    failures, late = [], True
    try:
        for process, log in zip(processes, logs, strict=True):
            try:
                code = process.wait(max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                late &= code is None
                why = f"not done in {limit:.0f} s" if code is None else f"exit status {code}"
                failures.append(f"{why}; {log.name}: {last_line(log)}")
    finally:
        for process in processes:
            end(process)
    if failures:
        raise (Late if late else Failed)("\n".join(failures))


def rates() -> dict[str, Any]:
    """What this GPU reaches: bytes/s of a copy, read and written, and bf16 products, as medians of 20 runs, after half
    a second of work: an idle GPU's clocks are low."""

    def seconds(call: Any) -> float:
        times, until = [], time.monotonic() + 0.5
        while time.monotonic() < until:
            call()
            torch.cuda.synchronize()
        for _ in range(20):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            call()
            ended.record()
            ended.synchronize()
            times.append(1e-3 * began.elapsed_time(ended))
        return statistics.median(times)

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy, product = seconds(lambda: target.copy_(source)), seconds(lambda: a @ a)
    for _ in range(int(1 / product)):  # about a second of work, during which the clocks are read
        a @ a
    facts = {"copy_gb_per_s": 2e-9 * source.numel() / copy, "bf16_tflop_per_s": 2e-12 * 8192**3 / product}
    query = "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version"
    return {**facts, "clocks": told("nvidia-smi", query, "--format=csv,noheader")}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def told(*command: str) -> str:
    """What a tool prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


class Round:
    def __init__(self, folder: Path, processes: int, deadline: float, select: str = "", tests: str = "") -> None:
        self.folder, self.processes, self.deadline = folder.resolve(), processes, deadline
        self.select, self.tests = select, tests
        self.limits: dict[str, float] = {}  # in the place of LIMITS
        self.files = tempfile.TemporaryDirectory(prefix="fractal-gpu-", ignore_cleanup_errors=True)  # of its processes
        self.scratch = Path(self.files.name)
        self.limit = 0.0  # seconds of the stage that runs
        self.logs: list[Path] = []  # of its processes
        (self.folder / "log.txt").unlink(missing_ok=True)
        self.command = "python -m benchmarks.gpu"
        self.device = torch.cuda.get_device_name()
        name, sha = re.sub(r"[^A-Za-z0-9]+", "-", self.device).strip("-").lower(), commit()
        self.path = self.folder / f"{name}-{(sha or 'no-commit')[:10]}.json"
        self.facts = {"device": self.device, "cuda": torch.version.cuda, "triton": version("triton")}
        self.facts |= {"cudnn": torch.backends.cudnn.version(), "nvcc": told("nvcc", "--version").split("\n")[-1]}
        self.facts |= rates()
        torch.cuda.empty_cache()  # the stages are other processes
        self.result: dict[str, Any] = {"stages": {}, "rows": []}
        self.goes_on = False  # where an earlier round of the same sources ended
        if sha and not sha.endswith("-dirty") and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            self.goes_on = earlier.get("commit") == sha
            self.result = earlier if self.goes_on else self.result

    def run(self, stage: str, last: bool) -> bool:
        """A stage and, in the results, what became of it. False: it failed."""
        begun, self.logs = time.monotonic(), []
        left = self.deadline - begun
        usual = left if last else LIMITS[stage]
        self.limit = min(self.limits.get(stage, usual), left)
        said, failed = "stopped", True
        try:
            if self.limit < 2 * GRACE:
                raise Failed(f"not begun: {max(left, 0):.0f} s of the round were left")
            said, failed = getattr(self, stage)(), False
        except (Failed, ReportError) as error:
            said, failed = str(error), True
        finally:  # what an interrupt has left of it, too
            self.note(stage, begun, said, failed)
        return not failed

    def note(self, stage: str, begun: float, said: str, failed: bool) -> None:
        seconds = time.monotonic() - begun
        self.result["stages"][stage] = {"seconds": round(seconds, 1), "said": said, "failed": failed}
        self.result["stages"][stage]["command"] = self.command
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            for log in self.logs:
                file.write(f"===== {stage}: {log.stem}\n{log.read_text(errors='replace') if log.exists() else ''}\n")
        print(f"{stage}: {'failed, ' if failed else ''}{seconds:.0f} s\n{said}\n", flush=True)
        self.keep()

    def keep(self) -> None:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        facts = rounded({**machine(), **self.facts})
        head = {"machine": facts, "date": date, "commit": commit(), "command": self.command}
        self.result = {**head, "stages": self.result["stages"], "rows": self.result["rows"]}
        write_text(self.path, json.dumps(self.result, indent=1) + "\n")

    def log(self, name: str) -> Path:
        """Where a process writes; the stage's end adds it to the round's log, one file."""
        self.logs.append(self.scratch / f"{name}.txt")
        return self.logs[-1]

    # --- stages ------------------------------------------------------------------------------------

    def build(self) -> str:
        """Both extensions, for this GPU; they must be there, since the tests of every backend need them."""
        log = self.log("build")
        major, minor = torch.cuda.get_device_capability()
        mode = {"FRACTAL_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count() or 1)}
        mode["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"  # an image's own list may be long: none is in time for it
        finish([start(["setup.py", "-q", "build_ext", "--inplace"], log, **mode)], [log], self.limit - GRACE)
        before = log.stat().st_size
        finish([start(["-m", "fractal_kernels.info"], log)], [log], GRACE)
        return log.read_text(errors="replace")[before:].strip()

    def test(self) -> str:
        logs = [self.log(f"test-{i}") for i in range(self.processes)]
        of, failures, done, cut = self.processes, self.scratch / "failures.txt", self.scratch / "passed.json", ""
        passed = self.path.with_name(f"{self.path.stem}-tests.txt")  # goes on where the last round of a commit ended
        before = passed.read_text(encoding="utf-8").splitlines() if self.goes_on and passed.exists() else []
        done.write_text(json.dumps(before))
        passed.write_text("".join(f"{name}\n" for name in before), encoding="utf-8")
        suite = [*PYTEST, *TESTS, "--seconds", f"{self.limit - GRACE}", "--failures", str(failures), "-k", self.tests]
        suite += ["--done", str(done), "--passed", str(passed)]
        try:
            shards = [start([*suite, "--shard", f"{i}/{of}"], log) for i, log in enumerate(logs)]
            finish(shards, logs, self.limit)
        except Late as late:
            if failures.exists():
                raise Failed(f"{late}\nfailed: {failures.read_text().strip()}") from late
            cut = f"\n{late}"
        if not (said := counts(logs)) and not before and not cut:
            raise Failed("no test ran")
        return said + (f"; {len(before)} passed before" if before else "") + cut

    def sanitize(self) -> str:
        """Of our kernels alone: under these tools PyTorch's would take the time. But initcheck has to see all writes,
        and none of the tests' NaN, with which all memory would be initialised to it."""
        tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if tool is None:
            raise Failed("there is no compute-sanitizer; it comes with the CUDA toolkit")
        suite = [*PYTEST, "tests/test_cuda.py", "-k", SANITIZED, "--seconds", f"{self.limit - GRACE}"]
        checks = ("memcheck", "racecheck", "initcheck")
        logs = [self.log(name) for name in checks]
        ours = ["--error-exitcode", "9", "--kernel-name", "kns=fractal"]
        # Without PyTorch's caching, an access past the end of a tensor is one past the end of an allocation.
        running = [
            start(
                suite, log, [tool, *under, "--tool", name], PYTORCH_NO_CUDA_MEMORY_CACHING="1", FRACTAL_TEST_POISON="0"
            )
            for name, log, under in zip(checks, logs, (ours, ours, []), strict=True)
        ]
        cut = ""
        try:
            finish(running, logs, self.limit)
        except Late as late:
            if found := [line for log in logs[:2] for line in complaints(log)]:
                raise Failed(f"{late}\n{found[0]}") from late
            cut = f"\n{late}"
        if read := uninitialised(logs[2]):
            raise Failed(f"initcheck: {read[0]}{cut}")
        return counts(logs) + cut

    def tune(self) -> str:
        log, cache = self.log("tune"), str(self.scratch / "tuned")
        tuning = [*PYTEST, *BENCHES["kernels"], "--benchmark-disable", "--seconds", f"{self.limit - 2 * GRACE}"]
        finish([start(tuning, log, FRACTAL_TUNE="1", FRACTAL_CACHE_DIR=cache)], [log], self.limit - GRACE)
        writing = ["-m", "fractal_kernels.triton.tuning", "--write-table"]
        finish([start(writing, log, FRACTAL_CACHE_DIR=cache)], [log], GRACE)
        # Not *.json: those in the folder are results.
        shutil.copy(ROOT / "fractal_kernels" / "triton" / "tuned.json", self.folder / "tuned.json.txt")
        return f"{len(list(Path(cache).glob('*/*.json')))} classes in tuned.json"

    def kernels(self) -> str:
        return self.measure("kernels")

    def steps(self) -> str:
        return self.measure("steps")

    def measure(self, stage: str) -> str:
        """Adds the rows of every benchmark that passed, whatever became of the others."""
        log, rows = self.log(stage), self.scratch / f"{stage}.jsonl"
        command = [*PYTEST, *BENCHES[stage], "--rows", str(rows), "--seconds", f"{self.limit - GRACE}"]
        done, cut = self.scratch / "done.json", ""
        done.write_text(json.dumps([row["test"] for row in self.result["rows"]]))
        command += [*(f"--first={name}" for name in FIRST), "--done", str(done)] + (
            ["-k", self.select] if self.select else []
        )
        before = sum(row["stage"] == stage for row in self.result["rows"])
        try:
            finish([start(command, log)], [log], self.limit)
        except Late as late:
            cut = f"; {late}"
        finally:
            lines = rows.read_text(encoding="utf-8").splitlines() if rows.exists() else []
            found = [rounded(json.loads(line)) | {"stage": stage} for line in lines]
            self.result["rows"] += found
        if not found and not before:
            raise Failed(f"no figures; {log.name}: {last_line(log)}")
        return f"{len(found)} rows, {before} before; {counts([log])}{cut}"


def dry_run(stages: Sequence[str]) -> int:
    """Collects what would run, so that the round is not broken when a GPU comes."""
    there = torch.cuda.is_available()
    for stage in stages:
        print(f"{stage}: dry run" if there else f"{stage}: skipped: PyTorch sees no CUDA device")
        files = TESTS if stage == "test" else BENCHES.get(stage)
        if files is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "collect.txt")
            try:
                finish([start([*PYTEST, "--collect-only", *files], log)], [log], 300)
            except Failed as error:
                print(f"{stage}: {error}", file=sys.stderr)
                return 1
            print(f"  would run: {last_line(log)}")
    return 0


def limit(text: str) -> tuple[str, float]:
    stage, _, seconds = text.partition("=")
    if stage not in LIMITS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(LIMITS)}, = and seconds, got {text!r}")
    return stage, float(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--stages", default=",".join(ALWAYS), help=f"of {','.join(LIMITS)}; default: {','.join(ALWAYS)}"
    )
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--select", default="", help="of the benchmarks, as pytest's -k has it")
    parser.add_argument("--tests", default="", help="of the tests, as pytest's -k has it")
    parser.add_argument("--limit", action="append", default=[], type=limit, help="of a stage, such as test=60: seconds")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole round")
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
    deadline = time.monotonic() + 60 * options.minutes
    this = Round(options.results, options.processes, deadline, options.select, options.tests)
    this.limits = dict(options.limit)
    this.command = shlex.join(["python", "-m", "benchmarks.gpu", "--stages", ",".join(stages)])
    for name in ("select", "tests"):
        if value := getattr(options, name):
            this.command += f" --{name} {shlex.quote(value)}"
    this.command += "".join(f" --limit {stage}={seconds:g}" for stage, seconds in options.limit)
    this.command += f" --minutes {options.minutes:g}" if options.minutes != MINUTES else ""
    good = True
    try:
        for stage in stages:
            good &= this.run(stage, last=stage == stages[-1])
            if not good and stage == "build":
                break
        for tell in (lambda: plot(this.result, this.folder, this.path.stem), lambda: print(summary(this.result))):
            try:
                tell()
            except ReportError as error:  # the figures themselves are written
                print(f"{this.path.name}: {error}", file=sys.stderr)
                good = False
    finally:
        this.files.cleanup()
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends as an interrupt does
    sys.exit(main())
