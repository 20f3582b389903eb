"""`python -m fractalnet`: what a run leaves, what an interrupted one leaves, and its errors."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("yaml")

from fractalnet import FractalNet, data, evaluate, plots, train  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402

FILES = {"model.pt", "metrics.json", "loss.png", "accuracy.png", "steps.png"}
ROOT = Path(__file__).resolve().parent.parent


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
    assert {"recipe", "seed", "versions", "threads", "data", "columns", "steps", "history"} <= set(metrics)
    assert (metrics["seed"], metrics["recipe"]["epochs"], metrics["recipe"]["batch_size"]) == (3, 2, 96)
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


def test_split():
    split = data.load("digits")
    assert tuple(split.train_x.shape) == (1437, 1, 8, 8) and tuple(split.test_x.shape) == (360, 1, 8, 8)
    assert abs(split.train_x.mean()) < 1e-4 and abs(split.train_x.std() - 1) < 1e-4
    share = split.test_y.bincount() / torch.cat([split.train_y, split.test_y]).bincount()
    assert ((share - 0.2).abs() < 0.01).all()
    again = data.load("digits")
    assert torch.equal(split.test_x, again.test_x)


def test_shift():
    x = torch.arange(1.0, 5 * 2 * 4 * 4 + 1).view(5, 2, 4, 4)
    moved = data.shifted(x, 1, -1.0, torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
    views = [wide[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    for n in range(5):
        assert any(torch.equal(moved[n], view[n]) for view in views)
    assert torch.equal(data.shifted(x, 0, -1.0), x)


def test_the_seed_fixes_the_training():
    split = data.load("digits")
    split = dataclasses.replace(split, train_x=split.train_x[:200], train_y=split.train_y[:200])
    recipe = data.load_recipe("digits", epochs=1)
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        model = FractalNet(10, 2, (8, 16, 16), in_channels=1, image_size=8)
        losses.append(train.fit(model, split, recipe, seed=5)["history"])
    assert losses[0] == losses[1]


def test_timing_leaves_the_model_alone(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "PASSES", 1)
    monkeypatch.setitem(sys.modules, "benchmarks.baselines", None)  # as if benchmarks/ were not there
    split, recipe = data.load("digits"), data.load_recipe("digits", batch_size=8)
    config = {"num_classes": 10, "columns": 2, "channels": (8,), "in_channels": 1, "image_size": 8}
    model = FractalNet(**config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    steps = evaluate.compare_steps(model, config, split, recipe, seed=0)
    assert "eager" not in steps and "left out" in capsys.readouterr().out
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert plots.steps(steps).startswith(b"\x89PNG") and "fused" in evaluate.step_table(steps)


# --- interruption ----------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_training(tmp_path, number, status):
    (tmp_path / "kept.txt").write_text("mine")
    out = tmp_path / "new" / "digits"
    command = [sys.executable, "-m", "fractalnet", "train", "digits", "--epochs", "10000", "--out", str(out)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    restore = {
        "env": one_thread,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    }  # CI may ignore it
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **restore)
    try:
        seen = b""
        while b"training:" not in seen:  # the bar's first state
            byte = process.stderr.read(1)
            assert byte, seen.decode()
            seen += byte
        time.sleep(1)
        assert process.poll() is None and out.is_dir()
        process.send_signal(number)
        _, rest = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status
    assert b"Traceback" not in rest
    if number == signal.SIGINT:
        assert rest.decode().splitlines()[-1].startswith("interrupted")
    assert [f.name for f in tmp_path.rglob("*")] == ["kept.txt"]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_interrupted_writing(tmp_path, monkeypatch, function, call):
    """Whatever the moment, every file is its old or its new self and no temporary file stays."""
    old, new = {"a": b"old a", "b": b"old b"}, {"a": b"new a", "b": b"new b"}
    data.write(tmp_path, old)
    original, calls = getattr(os, function), 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(os, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.write(tmp_path, new)
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
        (["train", "digits", "--epocs", "3"], ["--epocs", "--epochs", "--batch-size", "--seed", "--out"]),
        (["train", "digits", "--epochs", "0"], ["--epochs", ">= 1", "'0'"]),
        (["train", "digits", "--batch-size", "many"], ["--batch-size", ">= 1", "'many'"]),
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
    assert "pip install fractal-kernels[demo]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "digits", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"epochs": True}, {"lr": -1.0}, {"lr": "fast"}, {"data": "mnist"}, {"model": []}])
def test_wrong_recipe(wrong):
    recipe = data.load_recipe("digits")
    with pytest.raises(data.UserError, match=next(iter(wrong))):
        dataclasses.replace(recipe, **wrong)
