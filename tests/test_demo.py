"""`python -m fractalnet`: what a run leaves, what an interrupted one leaves, and its errors."""

import json
import math
import os
import re
import signal
import statistics
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

from fractalnet import FractalNet, drop_path, evaluate, files, outputs, plots, sources  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.augment import Augment  # noqa: E402
from fractalnet.loader import Loader  # noqa: E402

from fractal_kernels import BackendUnavailable  # noqa: E402

FILES = {"model.pt", "metrics.json", "loss.png", "accuracy.png", "steps.png", "report.md", "config.yaml"}
FILES |= {"environment.json", "metrics.jsonl", "metrics.csv", "timing.jsonl", "checkpoints", "tensorboard"}


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
        assert steps["saved_share"] == steps["fused"]["saved_bytes"] / steps["eager"]["saved_bytes"]
        low, *_, high = statistics.quantiles(steps["eager"]["rounds_ms"], n=10)  # the same work in every round
        assert steps["scatter"] == pytest.approx(high / low)
    assert (steps["paths"], steps["passes"]) == (24, 1)  # eight for each of three columns, each timed once
    rounds = steps["fused"]["rounds_ms"]
    assert len(rounds) == 24 and steps["fused"]["ms"] == pytest.approx(sum(rounds) / 24)


def test_eval_and_anytime(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "PASSES", 1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # nothing is drawn
    out, metrics = run
    assert main(["eval", "--checkpoint", str(out / "model.pt")]) == 0
    printed = capsys.readouterr().out
    assert main(["anytime", "--checkpoint", str(out / "model.pt")]) == 0
    answers = capsys.readouterr().out
    for column in metrics["columns"]:
        assert f"{column['accuracy']:.2%}" in printed
        assert column["column"] is None or f"{column['accuracy']:.2%}" in answers


@pytest.mark.parametrize("mode, passes", [("sampled", 1), ("tied", 3)])
def test_timing_leaves_the_model_alone(mode, passes, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "PASSES", 1)
    monkeypatch.setitem(sys.modules, "benchmarks.baselines", None)  # as if benchmarks/ were not there
    data, stepper = sources.load("digits"), evaluate.stepper

    def seen(net, forward, *rest):
        """A tied step is one of the full network and of each column."""
        assert forward(0).shape == ((passes, 8, 10) if passes > 1 else (8, 10))
        return stepper(net, forward, *rest)

    monkeypatch.setattr(evaluate, "stepper", seen)
    arguments = {"num_classes": 10, "columns": 2, "channels": (8,), "in_channels": 1, "image_size": 8}
    arguments |= {"global_mode": mode}
    model = FractalNet(**arguments)
    this = SimpleNamespace(loader=Loader(data.train, 8, seed=0, augment=Augment.of(data)), arguments=arguments, name="")
    kind = torch.optim.Adam if passes > 1 else torch.optim.SGD  # of which the first has no momentum
    this.optimizer = kind(model.parameters(), lr=0.1)
    this.config = SimpleNamespace(seed=0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    steps = evaluate.compare_steps(model, this)
    assert "eager" not in steps and "left out" in capsys.readouterr().out
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert plots.steps(steps).startswith(b"\x89PNG") and "fused" in evaluate.step_table(steps)


@pytest.mark.parametrize("seconds, cycles", [(0.1, evaluate.PASSES), (11.0, 1)])
def test_calls_are_timed_in_turn(seconds, cycles, monkeypatch):
    """Not the first ones, which warm up; and in whole cycles, also where there is no time for all of them."""
    now, seen = [0.0], []
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def call(name, takes):
        def spend(i):
            seen.append((name, i))
            now[0] += takes * (1 + i)

        return spend

    times = evaluate.alternate({"a": call("a", seconds), "b": call("b", 2 * seconds)}, cycle=2)
    assert seen == [(name, i) for i in [1, 0, 1] + [0, 1] * cycles for name in "ab"]
    assert times["a"] == pytest.approx([1e3 * seconds, 2e3 * seconds] * cycles)
    assert times["b"] == pytest.approx([2e3 * seconds, 4e3 * seconds] * cycles)


def test_times_are_of_an_image(monkeypatch):
    """Of fewer images than a batch has: divided by as many as there are. A network in training is evaluated."""
    net, x, seen = FractalNet(5, 2, (4,), image_size=8), torch.randn(3, 3, 8, 8), []

    def times(calls, cycle):
        seen.append({name: call(0) for name, call in calls.items()})
        return dict.fromkeys(calls, [6.0, 1.0, 9.0])

    monkeypatch.setattr(evaluate, "alternate", times)
    found = {name: {"loss": 1.0, "accuracy": 0.5} for name in ("full", "column 0", "column 1")}
    rows = evaluate.measure(net, found, x, 7)
    assert [row["ms_per_image"] for row in rows] == [{"1": 6.0, "100": 2.0}] * 3
    assert [(row["images"], row["timed"]) for row in rows] == [(7, [1, 3])] * 3
    net.eval()
    for row in rows:
        for calls, n in zip(seen, (1, 3), strict=True):
            torch.testing.assert_close(calls[row["name"]], net(x[:n], column=row["column"]))


def test_the_table_of_steps():
    steps = {"batch_size": 8, "speedup": 2.0, "saved_share": 0.5, "scatter": 1.5}
    steps |= {name: {"ms": ms, "saved_bytes": int(2.5e6 * ms)} for name, ms in (("fused", 1.0), ("eager", 2.0))}
    idle, busy = (evaluate.step_table(steps | {"scatter": scatter}) for scatter in (1.5, 1.7))
    assert busy.startswith(idle) and "\nThe machine was busy: equal steps differ 1.7-fold." in busy[len(idle) :]
    rows = [line.split() for line in idle.splitlines()[2:]]
    assert [row[-2:] for row in rows[:2]] == [["1.00", "2.50"], ["2.00", "5.00"]]
    assert rows[2] == "fused against eager 2.00x as fast 0.50x the bytes".split()


def test_timed_paths_have_the_rates_of_now():
    """Also the local rate, also where rates change over the training, also per sample."""
    net = FractalNet(5, 3, (4,), image_size=8, local_drop=[(0, 0.0), (4, 0.9)], global_ratio=[(0, 0.75), (4, 0.0)])
    full = drop_path.full_path(1, 3).keep.flatten()
    for granularity in ("batch", "sample"):
        net.granularity, kept = granularity, []
        for net.path_step, seed in ((0, 0), (0, 0), (0, 1), (4, 0)):
            paths = evaluate.mixture(net, 4, 16, seed)
            kept.append(torch.cat([path.keep.flatten(0, 2).view(len(full), -1) for path in paths], 1))
        whole = [(keep == full[:, None]).all(0).float().mean() for keep in kept]
        assert 0.1 < whole[0] < 0.4 and whole[3] == 0
        assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])


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


def test_folders_that_stay(tmp_path):
    """What was made vanishes again unless something is put there; what was there stays."""
    (tmp_path / "old").mkdir()
    with files.folder_for(tmp_path / "old" / "new" / "deep") as folder:
        assert folder.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with files.folder_for(tmp_path / "a" / "b") as folder:
        files.write(folder, {"c": b"1"})
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"1"
    with pytest.raises(files.UserError, match="cannot write to the folder .*none: No such file"):
        files.write(tmp_path / "none", {"c": b"1"})


def test_signals_are_noted():
    """A second Ctrl-C interrupts. Afterwards the handlers are those of before; the first signal is the status."""
    kinds = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in kinds]
    with files.signals() as came:
        for number in (*kinds[:1], *kinds):
            signal.raise_signal(number)
        assert came == [*kinds[:1], *kinds]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in kinds] == before
    for came, status in (([], 0), ([*kinds], 0), ([*kinds[::-1]], 130)):
        assert files.stopped(came, Path("x")).status == status


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
        (["train", "--out", "run"], ["expected a RECIPE"]),
        (["train", "digits", "--recipe", "mine"], ["--recipe: expected one recipe, got 'digits' and 'mine'"]),
        (["compare"], ["error: runs: expected folders of finished runs", "found none"]),
        (["eval", "--check", "model.pt"], ["required: --checkpoint"]),
        (["paint"], ["'paint'", "train", "eval", "anytime", "study"]),
        (["eval"], ["--checkpoint"]),
        (["eval", "--checkpoint", "nowhere/model.pt"], ["nowhere/model.pt", "no such file"]),
    ],
)
def test_wrong_calls(argv, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(argv, words)
    assert not list(tmp_path.iterdir())


STATUSES = [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (files.Stopped("said", 3), 3)]


@pytest.mark.parametrize("error, status", [*STATUSES, (files.UserError("said"), 2), (BackendUnavailable("said"), 2)])
def test_how_a_command_ends(error, status, monkeypatch, capfd):
    def broken(_):
        raise error

    ends = []
    monkeypatch.setattr(outputs, "found", broken)
    monkeypatch.setattr(os, "dup2", lambda *a: ends.append(a))
    assert main(["compare"]) == status
    assert len(ends) == isinstance(error, BrokenPipeError)  # nothing is written there at the end either
    printed = capfd.readouterr()
    assert not printed.out and str(error) in printed.err and len(printed.err.splitlines()) == 1 - len(ends)


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


def test_missing_packages_are_named_as_they_are_installed(monkeypatch):
    for name in ("yaml", "PIL", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        files.UserError, match=r"^missing: PyYAML \(.*\), pillow \(.*\), tqdm \(.*\); pip install fract"
    ):
        files.require("yaml", "json", "PIL", "tqdm")


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
