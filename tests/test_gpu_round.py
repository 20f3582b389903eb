"""``make gpu`` on a machine without a GPU: what it would run is there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu


def test_dry_run(capsys):
    assert gpu.main(["--dry-run"]) == 0
    output = capsys.readouterr().out
    for stage in gpu.ALWAYS:
        assert f"{stage}: " in output
    assert output.count("tests collected") == 2, output


def test_dry_run_finds_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TESTS", ["tests/test_not_there.py"])
    assert gpu.main(["--dry-run", "--stages", "test"]) == 1
    assert "test: exit status" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path / "results")]) == 1
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
