"""``make gpu`` on a machine without a GPU: what it would run is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_report


def test_dry_run(capsys):
    assert gpu.main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    for stage in gpu.ALWAYS:
        assert f"{stage}: " in output
    assert output.count("tests collected") == 3, output


def test_dry_run_finds_what_is_broken(monkeypatch, capsys, tmp_path):
    (tmp_path / "test_broken.py").write_text("import not_there\n")  # of a file that is missing all conftests are read
    monkeypatch.setattr(gpu, "TESTS", [str(tmp_path / "test_broken.py")])
    assert gpu.main(["--dry-run", "--stages", "test"]) == 1
    assert "test: exit status" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path / "results")]) == 1
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_scheduler_ends_cleans_up():
    """As an interrupt does: by an exception, not at once."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu", "--dry-run"]
    with subprocess.Popen(command, cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert "build: " in process.stdout.readline()
        process.terminate()
        assert process.wait(60) == 143


def test_a_round_without_tests_has_failed(tmp_path, monkeypatch):
    """By whatever number of processes."""
    monkeypatch.setattr(gpu, "finish", lambda processes, *_: [process.wait(120) for process in processes])
    for processes in (1, 2):
        this = SimpleNamespace(processes=processes, scratch=tmp_path, path=tmp_path / "a.json", goes_on=False)
        this.limit, this.tests, this.log = 60, "of_no_such_name", lambda name: tmp_path / f"{name}.txt"
        with pytest.raises(gpu.Failed, match="no test ran"):
            gpu.Round.test(this)


def test_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "test,fly"])
    assert "got fly" in capsys.readouterr().err


def test_a_stage_that_hangs_or_fails(tmp_path):
    logs = [tmp_path / f"{i}.txt" for i in range(2)]
    running = [gpu.start(["-c", "import time; time.sleep(60)"], logs[0]), gpu.start(["-c", "exit('broken')"], logs[1])]
    with pytest.raises(gpu.Failed) as error:
        gpu.finish(running, logs, 1.5)
    assert "not done in 2 s; 0.txt" in str(error.value) and "exit status 1; 1.txt: broken" in str(error.value)
    assert all(process.poll() is not None for process in running)


QUARTER = ["--minutes", "0.25"]
ROW = {"group": "gpu", "unit": "ms", "contenders": {"ours": {"figure": 1.0}, "copy": {"figure": 1.0}}, "ratios": {}}
CASE = {"op": "mean", "direction": "forward", "backend": "triton", "dtype": "bf16", "layout": "nhwc", "shape": [2, 64]}
SUITE = """
import pathlib
import signal
import time
import pytest

pytestmark = pytest.mark.gpu

def test_measured(benchmark):
    benchmark.extra_info.update({row!r} | dict(what="measured"))
    assert benchmark(lambda: 1) == 1

def test_wrong(benchmark):
    benchmark.extra_info.update({row!r} | dict(what="wrong"))
    assert benchmark(lambda: 1) == 2

def test_long(benchmark):
    benchmark.extra_info.update({row!r} | dict(what="long"))
    if {deaf}:  # like a compiler that does not come back
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    if {sleep}:
        pathlib.Path({asleep!r}).touch()
        time.sleep({sleep})

def test_late(benchmark):
    benchmark.extra_info.update({row!r} | dict(what="late"))
"""


@pytest.fixture
def machine(monkeypatch):
    """What a round asks of the GPU, its grace, and stages that need one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)  # a build for CUDA looks at the devices
    monkeypatch.setattr(gpu, "rates", lambda: {"copy_gb_per_s": 1000.0, "bf16_tflop_per_s": 100.0})
    monkeypatch.setattr(gpu, "commit", lambda: "0" * 40)
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu.Round, "build", lambda self: "built")
    monkeypatch.setattr(gpu.Round, "test", lambda self: "1451 passed")


def written(folder, sleep, deaf=False):
    suite = folder / "test_suite.py"
    row = ROW | {"case": CASE, "extra": {"gb_per_s": 900.0, "share_of_copy": 0.9}}
    (folder / "asleep").unlink(missing_ok=True)
    suite.write_text(SUITE.format(row=row, sleep=sleep, deaf=deaf, asleep=str(folder / "asleep")))
    return [str(suite)]


def hurry(monkeypatch, folder):
    """The time of a process is over as soon as its suite sleeps, whatever the machine takes until then; returns how
    many seconds each was given. What ends by the clock is in the tests of a stage and of a suite that is cut."""
    start, given = gpu.start, []

    def wait(process, real, timeout=None):
        if timeout is None:
            return real()
        given.append(timeout)
        end = time.monotonic() + timeout
        while time.monotonic() < end and not (folder / "asleep").exists():
            try:
                return real(0.05)
            except subprocess.TimeoutExpired:
                pass
        raise subprocess.TimeoutExpired(process.args, timeout)

    def begin(*args, **variables):
        process = start(*args, **variables)
        process.wait = partial(wait, process, process.wait)
        return process

    monkeypatch.setattr(gpu, "start", begin)
    return given


def results(folder):
    (path,) = folder.glob("*.json")
    assert path.name.startswith("test-gpu-")
    return json.loads(path.read_text())


def test_a_round(machine, monkeypatch, tmp_path, capsys):
    """Rows of tests that passed are kept, a failing stage does not end the round, what was not reached is counted."""
    (tmp_path / "test_nothing.py").touch()
    monkeypatch.setattr(gpu, "BENCHES", {"kernels": written(tmp_path, 0), "steps": [str(tmp_path / "test_nothing.py")]})
    out = tmp_path / "results"
    assert gpu.main(["--results", str(out), "--minutes", "1"]) == 1
    result, said = results(out), capsys.readouterr().out
    assert [row["what"] for row in result["rows"]] == ["measured", "long", "late"]
    stages = result["stages"]
    assert {name: stage["failed"] for name, stage in stages.items()} == {
        "build": False, "test": False, "kernels": True, "steps": True,
    }  # fmt: skip
    assert "exit status 1; kernels.txt: 1 failed, 3 passed" in stages["kernels"]["said"]
    assert result["machine"]["device"] == "Test GPU" and result["machine"]["copy_gb_per_s"] == 1000
    assert len(list(out.iterdir())) <= 8 and len(said.splitlines()) < 90
    assert said.rstrip().splitlines()[-1]


def test_a_round_that_is_too_long(machine, monkeypatch, tmp_path):
    """A suite that hangs is cut at its limit, and its rows so far stay: late, not failed. One that does not hear is
    killed."""
    monkeypatch.setattr(gpu, "BENCHES", {"steps": written(tmp_path, 600)})
    monkeypatch.setattr(gpu, "GRACE", 6)  # a process counts from when it has imported PyTorch
    assert gpu.main(["--results", str(tmp_path / "cut"), "--stages", "steps", "--select", "not wrong", *QUARTER]) == 0
    said = results(tmp_path / "cut")["stages"]["steps"]["said"]
    assert said == "1 rows, 0 before; 1 passed, 2 skipped, 2 of the skipped for want of time", said
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "BENCHES", {"steps": written(tmp_path, 600, deaf=True)})
    out, given = tmp_path / "results", hurry(monkeypatch, tmp_path)
    assert gpu.main(["--results", str(out), "--stages", "steps", "--select", "not wrong", *QUARTER]) == 0
    assert len(given) == 1 and 10 < given[0] <= 15
    result = results(out)
    assert [row["what"] for row in result["rows"]] == ["measured"]
    assert "not done in 15 s" in result["stages"]["steps"]["said"]
    assert result["command"].endswith("--stages steps --select 'not wrong' --minutes 0.25")
    # What is there is not measured again.
    monkeypatch.setattr(gpu, "BENCHES", {"steps": written(tmp_path, 0)})
    gpu.main(["--results", str(out), "--stages", "steps", "--select", "not wrong", "--minutes", "1"])
    stage = results(out)["stages"]["steps"]
    assert "2 rows, 1 before; 2 passed" in stage["said"] and stage["command"].endswith(" --minutes 1")
    assert gpu.main(["--results", str(out), "--stages", "steps", "--select", "not wrong", "--minutes", "1"]) == 0
    assert "0 rows, 3 before" in results(out)["stages"]["steps"]["said"]
    assert [row["what"] for row in results(out)["rows"]] == ["measured", "long", "late"]
    # Of changed files nothing is there yet.
    monkeypatch.setattr(gpu, "commit", lambda: f"{'0' * 40}-dirty")
    assert gpu.Round(out, 1, 0.0).result["rows"] == []


def test_what_is_not_reached_is_skipped(tmp_path):
    log, rows = tmp_path / "log.txt", tmp_path / "rows.jsonl"
    command = [*gpu.PYTEST, *written(tmp_path, 0), "--seconds", "-1", "--rows", str(rows)]
    gpu.finish([gpu.start(command, log)], [log], 60)
    assert gpu.counts([log]) == "4 skipped, 4 of the skipped for want of time" and not rows.exists()


def test_no_suite_of_a_gpu_is_left_out():
    suites = {path.stem.removeprefix("test_"): path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    asks = re.compile(r"^GPU = True|^@.*pytest\.mark\.gpu|^def test.*, gpu_backend\)", re.M)
    assert {name for name, text in suites.items() if asks.search(text)} == set(gpu.FILES)


def test_limits(capsys):
    assert gpu.limit("test=60") == ("test", 60.0)
    for text, words in (("fly=60", "expected one of build, test"), ("test", "invalid limit value")):
        with pytest.raises(SystemExit):
            gpu.main(["--limit", text])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_tests_that_are_late_have_not_failed(fails, machine, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)  # a build for CUDA looks at the devices
    monkeypatch.setattr(gpu, "rates", dict)
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "TESTS", written(tmp_path, 600, deaf=True))
    given = hurry(monkeypatch, tmp_path)
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--shard')\n")
    this = gpu.Round(tmp_path, 1, time.monotonic() + 60, tests="" if fails else "not wrong")
    this.limit = 12
    if fails:
        with pytest.raises(gpu.Failed, match=r"failed: .*test_wrong \(call\)"):
            this.test()
    else:
        assert "not done in 12 s" in this.test() and len(given) == 1 and 11 < given[0] <= 12
        this.goes_on = True  # the next round of the commit runs what this one did not reach
        monkeypatch.setattr(gpu, "TESTS", written(tmp_path, 0))
        assert this.test() == "2 passed; 1 passed before"
        (passed,) = tmp_path.glob("test-gpu-*-tests.txt")
        names = passed.read_text().split()
        assert [name.partition("::")[2] for name in names] == ["test_measured", "test_long", "test_late"]


SANITIZER = """#!/bin/sh
echo "$@" >>{folder}/asked.txt
echo "========= COMPUTE-SANITIZER"
if [ "{found}" ]; then echo "========= Invalid __global__ read of size 4 bytes"; fi
case "$*" in *initcheck*)
printf "========= Uninitialized __global__ memory read of size 4 bytes\\n==     at void {reader}()+0x70\\n"
;; esac
sleep {seconds}
echo "12 passed, 3 skipped in 2.00s"
echo "========= ERROR SUMMARY: {errors} errors"
exit {status}
"""


@pytest.mark.parametrize(
    ("values", "failed", "words"),
    [
        (dict(found="", reader="at::fill", seconds=0, errors=0, status=0), False, "36 passed, 9 skipped"),
        (
            dict(found="it", reader="at::fill", seconds=0, errors=1, status=9),
            True,
            "exit status 9; memcheck.txt: .* SUMMARY: 1 errors",
        ),
        (dict(found="", reader="at::fill", seconds=60, errors=0, status=0), False, "not done in 2 s"),
        (
            dict(found="it", reader="at::fill", seconds=60, errors=1, status=9),
            True,
            "not done .*\n.*Invalid __global__ read",
        ),
        (
            dict(found="", reader="fractal::join", seconds=0, errors=1, status=0),
            True,
            "initcheck: Uninitialized.*fractal",
        ),
    ],
    ids=["clean", "error", "late", "late_with_error", "uninitialised"],
)
def test_sanitize(values, failed, words, machine, monkeypatch, tmp_path):
    """What the tools find fails the stage, also where they are not done in time, which alone does not."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(folder=tmp_path, **values))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    this = gpu.Round(tmp_path, 1, time.monotonic() + 60)
    this.limit = 2
    if failed:
        with pytest.raises(gpu.Failed, match=f"(?s){words}"):
            this.sanitize()
    else:
        assert words in this.sanitize()
    asked = (tmp_path / "asked.txt").read_text()
    ours = "--error-exitcode 9 --kernel-name kns=fractal "
    for name, options in (("memcheck", ours), ("racecheck", ours), ("initcheck", "")):  # which has to see all writes
        assert f"{options}--tool {name} {sys.executable} -m pytest" in asked


@pytest.mark.parametrize("stage", ["build", "test"])
def test_a_stage_that_fails(stage, machine, monkeypatch, tmp_path, capsys):
    """Nothing is measured of what was not built; of what a test found wrong, it is said with the figures."""

    def broken(self):
        raise gpu.Failed("exit status 1; test.txt: 3 failed")

    monkeypatch.setattr(gpu.Round, stage, broken)
    monkeypatch.setattr(gpu, "BENCHES", {"kernels": written(tmp_path, 0)})
    out = tmp_path / "results"
    stages = ["--stages", "build,test,kernels", "--select", "not wrong"]
    assert gpu.main(["--results", str(out), *stages, "--minutes", "1"]) == 1
    result = results(out)
    assert list(result["stages"]) == ["build", "test", "kernels"][: 1 if stage == "build" else 3]
    assert len(result["rows"]) == (0 if stage == "build" else 3)
    assert "test.txt: 3 failed" in capsys.readouterr().out
    assert ("tests of this round failed" in gpu_report.markdown(result, "name")) == (stage == "test")
