"""`python -m fractalnet`: what a run leaves, what an interrupted one leaves, and its errors."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("yaml")

from fractalnet import FractalNet, evaluate, files, plots, sources  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.augment import Augment  # noqa: E402
from fractalnet.loader import Loader  # noqa: E402

FILES = {"model.pt", "metrics.json", "loss.png", "accuracy.png", "steps.png", "report.md", "config.yaml"}
FILES |= {"environment.json", "metrics.jsonl", "metrics.csv", "timing.jsonl", "checkpoints", "tensorboard"}


@pytest.fixture(autouse=True)
def one_thread(same_start):
    """Two threads that wait for each other crawl on a busy machine, and nothing here is about threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the metrics of a run of two epochs."""
    out = tmp_path_factory.mktemp("demo") / "new" / "digits"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PASSES", 1)
        assert main(["train", "digits", "--epochs", "2", "--seed", "3", "--batch-size", "96", "--out", str(out)]) == 0
    return out, json.loads((out / "metrics.json").read_text())


def test_files(run):
    out, _ = run
    assert {f.name for f in out.iterdir()} == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG"), name


def test_metrics(run):
    _, metrics = run
    assert {"recipe", "config", "versions", "threads", "data", "columns", "steps", "history"} <= set(metrics)
    assert [metrics["config"][key] for key in ("seed", "epochs", "batch_size")] == [3, 2, 96]
    assert metrics["versions"]["torch"] == torch.__version__
    assert (metrics["data"]["train_images"], metrics["data"]["test_images"]) == (1437, 360)
    names = ["full", "column 0", "column 1", "column 2"]
    assert [c["name"] for c in metrics["columns"]] == names
    assert [c["depth"] for c in metrics["columns"]] == [12, 3, 6, 12]
    assert [h["epoch"] for h in metrics["history"]] == [1, 2]
    scores = [*metrics["columns"], *(h["holdout"][name] for h in metrics["history"] for name in names)]
    assert all(0 <= s["accuracy"] <= 1 and math.isfinite(s["loss"]) for s in scores)
    assert all(ms > 0 for c in metrics["columns"] for ms in c["ms_per_image"].values())
    steps = metrics["steps"]
    assert steps["fused"]["ms"] > 0 and steps["fused"]["saved_bytes"] > 0
    if evaluate.eager_baseline() is not None:
        assert steps["eager"]["saved_bytes"] > steps["fused"]["saved_bytes"]
        assert steps["speedup"] == pytest.approx(steps["eager"]["ms"] / steps["fused"]["ms"])
        assert len(steps["eager"]["rounds_ms"]) == len(steps["fused"]["rounds_ms"])


def test_eval_and_anytime(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "PASSES", 1)
    out, metrics = run
    assert main(["eval", "--checkpoint", str(out / "model.pt")]) == 0
    printed = capsys.readouterr().out
    assert main(["anytime", "--checkpoint", str(out / "model.pt")]) == 0
    answers = capsys.readouterr().out
    for column in metrics["columns"]:
        assert f"{column['accuracy']:.2%}" in printed
        assert column["column"] is None or f"{column['accuracy']:.2%}" in answers


def test_timing_leaves_the_model_alone(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "PASSES", 1)
    monkeypatch.setitem(sys.modules, "benchmarks.baselines", None)  # as if benchmarks/ were not there
    data = sources.load("digits")
    arguments = {"num_classes": 10, "columns": 2, "channels": (8,), "in_channels": 1, "image_size": 8}
    model = FractalNet(**arguments)
    this = SimpleNamespace(loader=Loader(data.train, 8, seed=0, augment=Augment.of(data)), arguments=arguments, name="")
    this.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    this.config = SimpleNamespace(seed=0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    steps = evaluate.compare_steps(model, this)
    assert "eager" not in steps and "left out" in capsys.readouterr().out
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert plots.steps(steps).startswith(b"\x89PNG") and "fused" in evaluate.step_table(steps)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_interrupted_writing(tmp_path, monkeypatch, function, call):
    """Whatever the moment, every file is its old or its new self and no temporary file stays."""
    old, new = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b"}
    files.write(tmp_path, old)
    original, calls = getattr(os, function), 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path, new)
    assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}
    for name in old:
        assert (tmp_path / name).read_bytes() in (old[name], new[name])
    if function == "fsync":
        assert (tmp_path / "a").read_bytes() == old["a"]


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["train", "cifar"], ["unknown recipe 'cifar'", "digits"]),
        (["train", "../digits"], ["unknown recipe", "digits"]),
        (["train", "digits", "--epocs", "3"], ["--epocs", "--epochs", "--batch_size", "--seed", "--out"]),
        (["train", "digits", "--epochs", "0"], ["--epochs", "1 or more", "got 0"]),
        (["train", "digits", "--batch-size", "many"], ["batch_size", "many"]),
        (["train"], ["RECIPE"]),
        (["paint"], ["'paint'", "train", "eval", "anytime", "study"]),
        (["eval"], ["--checkpoint"]),
        (["eval", "--checkpoint", "nowhere/model.pt"], ["nowhere/model.pt", "no such file"]),
    ],
)
def test_wrong_calls(argv, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(argv, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "noise", "foreign", "other state", "folder"])
@pytest.mark.parametrize("command", ["eval", "anytime"])
def test_damaged_checkpoint(run, tmp_path, capsys, damage, command):
    path = tmp_path / "model.pt"
    whole = (run[0] / "model.pt").read_bytes()
    if damage == "folder":
        path.mkdir()
    elif damage == "foreign":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage == "other state":
        content = torch.load(run[0] / "model.pt", weights_only=True)
        content["state"].pop("head.bias")
        torch.save(content, path)
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes(255 - b for b in whole[middle : middle + 64]) + whole[middle + 64 :]
        path.write_bytes(
            {"cut": whole[:middle], "flipped": flipped, "empty": b"", "noise": b"not a checkpoint" * 99}[damage]
        )
    assert main([command, "--checkpoint", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: checkpoint {path}: ") and len(said.splitlines()) == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": Trap()}, tmp_path / "model.pt")
    assert main(["eval", "--checkpoint", str(tmp_path / "model.pt")]) == 2
    assert not (tmp_path / "ran").exists()


def test_missing_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["train", "digits", "--out", str(tmp_path / "out")]) == 2
    assert "pip install fractal-kernels[train]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train digits", "eval --checkpoint model.pt"])
def test_without_the_extra_packages(tmp_path, command):
    """A line, not a traceback, where the package alone is installed."""
    absent = "huggingface_hub numpy yaml sklearn PIL datasets matplotlib lightning jsonargparse torchmetrics".split()
    code = f"""import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
runpy.run_module("fractalnet", run_name="__main__")"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: missing: .*; pip install fractal-kernels\[train\]\n", done.stderr), done.stderr


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "digits", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err
