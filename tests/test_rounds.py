"""What figures are made of, and what becomes of a round where something fails."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, gpu, report
from benchmarks.compare import Different, figures, hold_together
from benchmarks.gpu_logs import complaints


def test_figures_are_medians_of_each_work():
    times = {"ours": [0.001, 0.010, 0.003, 0.010, 0.002, 0.040], "eager": [0.004, 0.02, 0.005, 0.03, 0.004, 0.02]}
    found = figures(times, cycle=2)
    assert found["rounds"] == 6 and found["contenders"]["ours"]["figure"] == pytest.approx((2 + 10) / 2)
    assert found["contenders"]["eager"]["figure"] == pytest.approx((4 + 20) / 2)
    assert found["ratios"]["eager"]["figures"] == pytest.approx(2.0)
    assert found["ratios"]["eager"]["median_of_rounds"] == pytest.approx(2.0)  # of 4, 2, 5 / 3, 3, 2, 0.5
    whole = figures(times)["contenders"]["ours"]
    assert (whole["figure"], whole["min"]) == pytest.approx((6.5, 1.0)) and whole["mean"] == pytest.approx(11.0)


def test_what_is_no_number_holds_nothing_together():
    one = torch.ones(2, 3)
    hold_together("same", [one], [one * (1 + 1e-5)], 1e-4)
    for got in (one * 1.01, one * float("nan"), torch.ones(3, 2), torch.ones(1, 2, 3)):
        with pytest.raises(Different, match="contender: tensor 1: expected"):
            hold_together("contender", [one, got], [one, one], 1e-4)


def test_warm_up_rounds_do_not_count(monkeypatch):
    """Every contender is called as often as ours, and with the same numbers."""
    seen, clock = {"ours": [], "eager": []}, [0.0]
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Benchmark:
        disabled = False

        def pedantic(self, function, setup, rounds, iterations, warmup_rounds):
            data = []
            for i in range(warmup_rounds + rounds):
                arguments, _ = setup()
                function(*arguments)
                data += [float(i)] if i >= warmup_rounds else []
            self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))

    def eager(i):
        seen["eager"].append(i)
        clock[0] += 50 if len(seen["eager"]) <= compare.WARMUP else 1

    times = compare.alternate(Benchmark(), {"ours": seen["ours"].append, "eager": eager}, 4)
    assert seen["ours"] == seen["eager"] and seen["ours"][compare.WARMUP :] == [0, 1, 2, 3]
    assert len(times["ours"]) == 4 and times["eager"] == [1.0] * 4


def test_a_failure_is_not_late_wherever_it_is(tmp_path):
    logs = [tmp_path / f"{i}.txt" for i in range(2)]
    running = [gpu.start(["-c", "exit('broken')"], logs[0]), gpu.start(["-c", "import time; time.sleep(60)"], logs[1])]
    with pytest.raises(gpu.Failed) as error:
        gpu.finish(running, logs, 1.5)
    assert type(error.value) is gpu.Failed


def test_a_signal_is_not_late(tmp_path):
    log = tmp_path / "log.txt"
    code = "import os, signal; signal.signal(1, signal.SIG_DFL); os.kill(os.getpid(), 1)"  # which nohup ignores
    with pytest.raises(gpu.Failed, match="exit status -1") as error:
        gpu.finish([gpu.start(["-c", code], log)], [log], 60)
    assert type(error.value) is gpu.Failed


def test_a_round_does_not_go_on_with_one_of_changed_files(tmp_path, monkeypatch):
    """In the file: of the fixture `machine`. Both have the same name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    monkeypatch.setattr(gpu, "rates", dict)
    monkeypatch.setattr(gpu, "commit", lambda: "0" * 40)
    earlier = {"commit": f"{'0' * 40}-dirty", "stages": {}, "rows": [{"test": "a", "stage": "steps"}]}
    (tmp_path / "test-gpu-0000000000.json").write_text(json.dumps(earlier))
    this = gpu.Round(tmp_path, 1, 0.0)
    assert this.result["rows"] == [] and not this.goes_on
    (tmp_path / "test-gpu-0000000000.json").write_text(json.dumps(earlier | {"commit": "0" * 40}))
    assert gpu.Round(tmp_path, 1, 0.0).goes_on


def test_complaints(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("========= COMPUTE-SANITIZER\n12 passed\n========= ERROR SUMMARY: 0 errors\n")
    assert complaints(log) == []
    log.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 1 error\n")
    assert complaints(log) == ["========= ERROR SUMMARY: 1 error"]


def test_the_commit_of_changed_files_is_dirty(monkeypatch):
    monkeypatch.delenv("FRACTAL_COMMIT", raising=False)
    says = {"rev-parse": "1" * 40, "status": ""}
    monkeypatch.setattr(report, "git", lambda command, *_: says[command])
    assert report.commit() == "1" * 40
    says["status"] = " M setup.py"
    assert report.commit() == f"{'1' * 40}-dirty"
    says["rev-parse"] = None
    assert report.commit() is None


def test_what_cannot_be_written_leaves_the_old(tmp_path, monkeypatch):
    report.write_text(tmp_path / "a", "old")

    def broken(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="full"):
        report.write_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_stage_without_time_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    monkeypatch.setattr(gpu, "rates", dict)
    monkeypatch.setattr(gpu.Round, "steps", lambda self: "measured")
    this = gpu.Round(tmp_path, 1, time.monotonic() + 2 * gpu.GRACE - 5)
    assert not this.run("steps", last=True)
    assert this.result["stages"]["steps"]["said"].startswith("not begun: 3")
    this.deadline += 60
    assert this.run("steps", last=True) and this.result["stages"]["steps"]["said"] == "measured"


def test_what_an_interrupt_leaves_is_written(tmp_path, monkeypatch):
    """The rows of the stage that it ended, and that it did."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    monkeypatch.setattr(gpu, "rates", dict)
    this = gpu.Round(tmp_path, 1, time.monotonic() + 60)

    def interrupted(*_):
        (this.scratch / "steps.jsonl").write_text(json.dumps({"what": "a step", "test": "a"}) + "\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "start", lambda *_, **__: None)
    monkeypatch.setattr(gpu, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        this.run("steps", last=True)
    written = json.loads(this.path.read_text())
    assert [row["what"] for row in written["rows"]] == ["a step"]
    assert written["stages"]["steps"]["failed"] and written["stages"]["steps"]["said"] == "stopped"


@pytest.mark.parametrize(("shard", "code"), [("0/1", pytest.ExitCode.NO_TESTS_COLLECTED), ("1/2", pytest.ExitCode.OK)])
def test_a_process_that_no_test_is_left_for(shard, code, tmp_path):
    """Of several it is none of a failure; a suite without tests is."""
    suite = [*gpu.PYTEST, "tests/test_rounds.py", "-k", "of_no_such_name", "--shard", shard]
    process = gpu.start(suite, tmp_path / "log.txt")
    assert process.wait(120) == code, (tmp_path / "log.txt").read_text()


def test_what_counts_as_passed_and_what_comes_first(tmp_path):
    """A test whose teardown fails, where a device's errors show, has not passed; what no expression has comes last."""
    (tmp_path / "test_suite.py").write_text(
        "import pytest\n\npytestmark = pytest.mark.gpu\n\n@pytest.fixture\ndef late():\n    yield\n    assert 0\n\n"
        "def test_c(): pass\ndef test_late(late): pass\ndef test_b(): pass\ndef test_a(): pass\n"
    )
    passed, log = tmp_path / "passed.txt", tmp_path / "log.txt"
    command = [*gpu.PYTEST, str(tmp_path / "test_suite.py"), "--passed", str(passed), "--first=test_a", "--first=_b"]
    with pytest.raises(gpu.Failed, match="exit status 1"):
        gpu.finish([gpu.start(command, log)], [log], 100)
    names = [name.partition("::")[2] for name in passed.read_text().split()]
    assert names == ["test_a", "test_b", "test_c"]


@pytest.mark.parametrize("text", ["{1}\n{0}", "{0}", "{0}{1}{1}", ""])
def test_markers_that_are_not_a_pair(text):
    text = text.format("<!-- gpu:begin -->", "<!-- gpu:end -->")
    with pytest.raises(report.ReportError, match="expected one line <!-- gpu:begin -->"):
        report.with_table(text, "gpu", "new")
