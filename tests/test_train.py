"""Training: what a run leaves, that it goes on exactly where it was stopped, and what it says of what is wrong."""

import csv
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import yaml  # noqa: E402
from fractalnet import checkpoints, config, devices, evaluate, loader, outputs, sources, train  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402
from image_files import write_folder  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SAME = ("model.pt", "metrics.jsonl", "metrics.csv", "config.yaml")  # byte for byte, however often it was stopped
RECIPE = {  # everything that has state
    "network": {"columns": 2, "channels": [4, 6], "dropout": [0.1, 0.2]},
    "data": {"source": "digits", "translate": 1, "padding": "black"},
    "epochs": 3,
    "batch_size": 100,
    "accumulate": 2,
    "clip": 1.0,
    "ema": 0.9,
    "label_smoothing": 0.1,
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
    "save_every": 4,
    "tensorboard": False,
}


class Killed(BaseException):
    """As if the process were no more."""


@pytest.fixture(autouse=True)
def quick(same_start, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(evaluate, "PASSES", 1)


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def files_of(out):
    last = checkpoints.saved(out / "checkpoints")[-1]
    return {name: (out / name).read_bytes() for name in SAME} | {last.name: last.read_bytes()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PASSES", 1)
        assert main(["train", written(folder), "--out", str(folder / "run")]) == 0
    return folder / "run"


# --- going on ------------------------------------------------------------------------------------


def stop_at(monkeypatch, where, call):
    """Kills at the n-th call of this function, before or in it."""
    owner, name = where
    original, calls = getattr(owner, name), 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counted)


PLACES = {
    "step": (train.Run, "step"),
    "rename": (os, "replace"),
    "flush": (os, "fsync"),
    "evaluation": (evaluate, "scores"),
    "end": (outputs, "conclude"),
}


@pytest.mark.parametrize("place, calls", [("step", (6, 9, 40)), ("rename", (3, 5)), ("flush", (4, 9))])
def test_killed_and_resumed(tmp_path, monkeypatch, whole, place, calls):
    """Several times in one run: between steps, while a checkpoint or a row is written, before a rename."""
    resume = []
    for call in calls:
        with monkeypatch.context() as patch:
            stop_at(patch, PLACES[place], call)
            try:
                main(["train", written(tmp_path), "--out", str(tmp_path / "run"), *resume])
                died = False
            except Killed:
                died = True
        assert died or call > 20
        resume = ["--resume"] if checkpoints.saved(tmp_path / "run" / "checkpoints") else ["--overwrite"]
    assert main(["train", written(tmp_path), "--out", str(tmp_path / "run"), *resume]) == 0
    assert files_of(tmp_path / "run") == files_of(whole)


@pytest.mark.parametrize("place", ["evaluation", "end"])
def test_killed_late(tmp_path, monkeypatch, whole, place):
    with monkeypatch.context() as patch:
        stop_at(patch, PLACES[place], 2 if place == "evaluation" else 1)
        with pytest.raises(Killed):
            main(["train", written(tmp_path), "--out", str(tmp_path / "run")])
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0  # the folder knows its recipe
    assert files_of(tmp_path / "run") == files_of(whole)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals(tmp_path, whole, number, status):
    """A process of its own, told to stop in the middle; what it prints, and that it goes on."""
    out = tmp_path / "run"
    recipe = written(tmp_path, epochs=400)
    command = [sys.executable, "-m", "fractalnet", "train", recipe, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    back = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}  # CI may ignore it
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, **back)
    try:
        limit = time.monotonic() + 100
        while not checkpoints.saved(out / "checkpoints"):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status and b"Traceback" not in said
    last = checkpoints.saved(out / "checkpoints")[-1]
    checkpoints.prove(last)
    if number != signal.SIGKILL:
        assert said.decode().splitlines()[-1] == f"stopped; {last} is written, --resume goes on from there"
    assert not list(out.rglob("model.pt"))


def test_signal_to_all_processes(tmp_path):
    """As schedulers send it: the workers too."""
    out, images = tmp_path / "run", write_folder(tmp_path / "images", count=200, size=(12, 12))
    data = {"source": f"folder:{images}", "image_size": 8, "workers": 2}  # other than the images' size: streamed
    recipe = written(tmp_path, data=data, batch_size=4, epochs=400)
    command = [sys.executable, "-m", "fractalnet", "train", recipe, "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    try:
        limit = time.monotonic() + 100
        while not checkpoints.saved(out / "checkpoints"):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said.decode()
    last = checkpoints.saved(out / "checkpoints")[-1]
    assert said.decode().splitlines()[-1] == f"stopped; {last} is written, --resume goes on from there"


def test_streamed_images(tmp_path, monkeypatch):
    """Workers, and images that are read while training."""
    monkeypatch.setattr(sources, "MEMORY", 0)
    monkeypatch.setattr(loader, "GRACE", 1)
    images = write_folder(tmp_path / "images", count=8, size=(12, 12))
    data = {"source": f"folder:{images}", "image_size": 8, "mirror": True, "workers": 1}
    options = {"data": data, "batch_size": 4, "accumulate": 1, "save_every": 1, "ema": None, "epochs": 2}
    assert main(["train", written(tmp_path, **options), "--out", str(tmp_path / "a")]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, PLACES["step"], 7)
        with pytest.raises(Killed):
            main(["train", written(tmp_path, **options), "--out", str(tmp_path / "b")])
    assert main(["train", "--resume", "--data.workers", "2", "--out", str(tmp_path / "b")]) == 0
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert {k: a[k] for k in ("metrics.jsonl", "metrics.csv")} == {k: b[k] for k in ("metrics.jsonl", "metrics.csv")}
    states = [torch.load(tmp_path / run / "model.pt", weights_only=True)["state"] for run in "ab"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert main(["eval", "--checkpoint", str(tmp_path / "a" / "model.pt"), "--crops", "10"]) == 0


def test_damaged_checkpoint(tmp_path, monkeypatch, capsys, whole):
    out = tmp_path / "run"
    assert main(["train", written(tmp_path), "--out", str(out)]) == 0
    earlier, last = checkpoints.saved(out / "checkpoints")[-2:]
    (out / "model.pt").unlink()
    content = bytearray(last.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - b for b in content[middle : middle + 64])
    last.write_bytes(content)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"checkpoint {last}: damaged" in said and f"--resume {earlier}" in said
    with monkeypatch.context() as patch:  # killed once more: the newer file must not be in the way
        stop_at(patch, (outputs, "conclude"), 1)
        with pytest.raises(Killed):
            main(["train", "--out", str(out), "--resume", str(earlier)])
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("full", ["disk", "limit"])
def test_disk_full(tmp_path, monkeypatch, capsys, whole, full):
    out = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if full == "limit":  # the system refuses to let a file grow
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
        else:
            calls, original = 0, os.fsync

            def fsync(descriptor):
                nonlocal calls
                calls += 1
                if calls > 8:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return original(descriptor)

            patch.setattr(os, "fsync", fsync)
        try:
            assert main(["train", written(tmp_path), "--out", str(out)]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()[-1]
    found = checkpoints.saved(out / "checkpoints")
    assert "cannot write" in said and not list(out.rglob("*.tmp"))
    if full == "limit":
        assert not found and "no earlier checkpoint" in said
        return
    assert f"the last good checkpoint is {found[-1]}" in said and "No space left" in said
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert files_of(out) == files_of(whole)


def test_an_older_checkpoint_is_gone_back_to(tmp_path, monkeypatch, whole):
    out = tmp_path / "run"
    assert main(["train", written(tmp_path), "--out", str(out), "--keep", "9"]) == 0
    old = checkpoints.saved(out / "checkpoints")[2]
    with monkeypatch.context() as patch:
        stop_at(patch, PLACES["step"], 6)
        with pytest.raises(Killed):
            main(["train", "--out", str(out), "--resume", str(old)])
    names = [path.name for path in checkpoints.saved(out / "checkpoints")]
    assert old.name < names[-1] < "step-000000030.ckpt"
    assert main(["train", "--out", str(out), "--resume", "--keep", "2"]) == 0
    assert files_of(out) == files_of(whole)


def test_other_runs_are_refused(tmp_path, refused, whole, monkeypatch):
    refused(["train", written(tmp_path), "--out", str(whole)], ["holds a run", "--resume", "--overwrite", "--out"])
    again, before = ["train", written(tmp_path), "--out", str(whole), "--resume"], files_of(whole)
    refused([*again, "--batch-size", "50", "--clip", "2"], ["--batch_size was 100, is 50", "--clip was 1.0, is 2.0"])
    refused([*again, "--network.columns", "3"], ["--network.columns was 2, is 3"])
    refused([*again, "--data.source", "cifar9"], ["cifar9"])
    refused([*again, str(whole / "model.pt")], ["model.pt"])
    other = sources.digits
    monkeypatch.setattr(sources, "digits", lambda: ([other()[0][1], other()[0][0]], other()[1]))
    refused(again, ["other images"])
    assert files_of(whole) == before


def test_overwriting(tmp_path, whole, refused, monkeypatch):
    """What was there goes, but not for a run that cannot begin; at the start, as what follows may be killed."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "mine.txt").write_text("kept")
    begin = ["train", written(tmp_path), "--out", str(out), "--overwrite"]
    refused([*begin, "--data.source", "cifar9"], ["cifar9"])
    refused([*begin, "--network.columns", "12"], ["columns"])
    assert files_of(out) == files_of(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, PLACES["step"], 1)
        with pytest.raises(Killed):
            main([*begin, "--epochs", "1"])
    assert not any((out / name).exists() for name in outputs.RESULTS)
    assert main([*begin, "--epochs", "1"]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert (out / "mine.txt").read_text() == "kept" and files_of(out) != files_of(whole)


# --- what a run leaves ---------------------------------------------------------------------------


def test_run_folder(tmp_path, whole, capsys):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.05, 0.005])
    with open(whole / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[1]["holdout.column 1.accuracy"]) == rows[1]["holdout"]["column 1"]["accuracy"]
    facts = json.loads((whole / "environment.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__ and facts["data"]["train_images"] == 1437
    text = (whole / "report.md").read_text()
    metrics = json.loads((whole / "metrics.json").read_text())
    assert all(f"{c['accuracy']:.2%}" in text for c in metrics["columns"]) and "![loss.png](loss.png)" in text
    assert len(checkpoints.saved(whole / "checkpoints")) in (2, 3)
    # The configuration of a run is a recipe, and its run the same.
    assert main(["train", str(whole / "config.yaml"), "--out", str(tmp_path / "again"), "--tensorboard", "true"]) == 0
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert list((tmp_path / "again" / "tensorboard").glob("events*"))
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(whole / "model.pt"), "--crops", "10"]) == 0
    assert "column 1 alone" in capsys.readouterr().out


def test_evaluation_is_that_of_the_average(whole):
    """With --ema the averaged weights are kept: the last row of the log is theirs."""
    from fractalnet import trained

    model, content = trained.unpack(whole / "model.pt")
    found = evaluate.scores(model, trained.views(trained.holdout(content), 1))
    rows = (whole / "metrics.jsonl").read_text().splitlines()
    assert found["full"]["accuracy"] == json.loads(rows[-1])["holdout"]["full"]["accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "bf16", "--optimizer", "AdamW"],
        ["--precision", "tf32", "--network", "{name: plain_c2, channels: [4, 6], dropout: [0.1, 0.1]}"],
        ["--network.global_mode", "tied", "--schedule.kind", "cosine"],
        ["--network.granularity", "sample", "--optimizer", "RMSprop"],
    ],
)
def test_ways_to_train(tmp_path, options):
    changes = {"epochs": 1, "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.01}}}
    assert main(["train", written(tmp_path, **changes), "--out", str(tmp_path / "run"), *options]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["history"][0]["train_loss"] < 6


def test_paper_against_reached():
    run = {"recipe": "fractalnet20-drop/c10", "config": config.load("fractalnet20-drop/c10")[1]}
    run["columns"] = [{"name": "full", "accuracy": 0.92}, {"name": "column 2", "accuracy": 0.9}]
    table = outputs.compare([run, {"recipe": "mine"}])
    crops = {"recipe": "fractalnet34/imagenet", "config": config.load("fractalnet34/imagenet")[1]}
    crops["columns"] = [{"name": "full", "accuracy": 0.7, "accuracy_top5": 0.9}]
    shown = outputs.compare([crops])
    assert "fractalnet34/imagenet, full top 5 (paper: 10 crops, here 1)" in shown
    assert [line.split()[-1] for line in shown.splitlines()[2:]] == ["30.00", "10.00"]
    assert [line.split()[-3:] for line in table.splitlines()[2:]] == [["400", "7.33", "8.00"], ["400", "7.27", "10.00"]]
    assert len(outputs.compare([run | {"columns": run["columns"][:1]}]).splitlines()) == 3


def test_accumulated_steps_are_those_of_the_whole_batch(tmp_path):
    """The divisor is the group's images; batch statistics differ a little."""
    weights = []
    for batch, accumulate in ((200, 1), (100, 2)):
        changes = {"batch_size": batch, "accumulate": accumulate, "epochs": 1, "ema": None, "clip": None}
        changes |= {"network": {"columns": 1, "channels": [4], "global_ratio": 0}, "save_every": None}
        changes["data"] = {"source": "digits"}
        main(["train", written(tmp_path, **changes), "--out", str(tmp_path / str(batch)), "--optimizer.lr", "1e-6"])
        weights.append(torch.load(tmp_path / str(batch) / "model.pt", weights_only=True)["state"]["head.bias"])
    torch.testing.assert_close(weights[0], weights[1], rtol=0.02, atol=1e-8)


def test_a_scaler_that_skips_the_first_step_leaves_no_momenta_of_chance():
    """torch.empty is poisoned: without zeros the second step would make the weights NaN."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer, scaler = torch.optim.SGD([p], lr=0.5, momentum=0.9, fused=True), torch.amp.GradScaler("cpu")
    devices.zero_momenta(optimizer)
    for factor in (float("inf"), 1.0):
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert torch.equal(p, torch.full((4,), 0.5))
    kept, state = optimizer.state[p]["momentum_buffer"], dict(optimizer.state[p])
    devices.zero_momenta(optimizer)
    assert optimizer.state[p] == state and optimizer.state[p]["momentum_buffer"] is kept  # of a run that goes on
    devices.unfuse(optimizer)
    optimizer.state.clear()
    devices.zero_momenta(optimizer)
    assert not optimizer.state and not optimizer.param_groups[0]["fused"]
