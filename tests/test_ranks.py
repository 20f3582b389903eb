"""Training on several ranks: two gloo processes on the CPU against one, and what a rank's death does."""

import json
import os
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

import yaml  # noqa: E402
from fractalnet import checkpoints  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RECIPE = {
    "network": {"columns": 2, "channels": [4, 6]},
    "data": {"source": "digits", "translate": 1, "padding": "black"},
    "epochs": 2,
    "batch_size": 100,  # the last one has 37 images: 18 and 19
    "precision": "fp64",
    "accumulate": 2,
    "clip": 5.0,
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
    "tensorboard": False,
    "accelerator": "cpu",
}


def training(folder, name, **changes):
    """The arguments of one."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(RECIPE | changes))
    return ["train", str(folder / f"{name}.yaml"), "--out", str(folder / name)]


def start(folder, name, *options, **changes):
    command = [sys.executable, "-m", "fractalnet", *training(folder, name, **changes)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "LOCAL_", "NODE_", "WORLD_"))}
    env |= {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=env, **pipes)


def finish(process, limit=150):
    try:
        _, said = process.communicate(timeout=limit)
    finally:
        process.kill()
    assert process.returncode == 0, said.decode()[-3000:]


def state_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.load(folder / "model.pt", weights_only=True)["state"], rows


ALL = pytest.mark.skipif(os.environ.get("FRACTAL_RANKS") != "all", reason="for make ranks (FRACTAL_RANKS=all)")


@pytest.mark.parametrize(
    "granularity, strategy",
    [("batch", "ddp"), pytest.param("sample", "ddp", marks=ALL), pytest.param("batch", "fsdp", marks=ALL)],
)
def test_two_ranks_are_one(tmp_path, granularity, strategy):
    changes = {"network": RECIPE["network"] | {"granularity": granularity}}
    exact = {"rtol": 1e-9, "atol": 1e-11}
    if strategy == "fsdp":  # not in fp64, by Fabric
        changes["precision"], exact = "fp32", {"rtol": 2e-3, "atol": 2e-4}
        sgd = RECIPE["optimizer"]  # fused, as every recipe has it, where PyTorch has none of sharded weights
        changes["optimizer"] = sgd | {"init_args": sgd["init_args"] | {"fused": True}}
    elif granularity == "batch":
        changes["ema"] = 0.9
    assert main(training(tmp_path, "one", **changes)) == 0  # here, where PyTorch is imported
    finish(start(tmp_path, "two", "--devices", "2", "--strategy", strategy, **changes))
    (one, first), (two, second) = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], **exact, msg=lambda m, k=key: f"{k}: {m}")
    for a, b in zip(first, second, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=max(exact["rtol"], 1e-6))
        for name, found in a["holdout"].items():  # of float32 logits
            assert found["accuracy"] == pytest.approx(b["holdout"][name]["accuracy"], abs=3 / 360)
            assert found["loss"] == pytest.approx(b["holdout"][name]["loss"], rel=1e-5 if strategy == "ddp" else 1e-2)


@ALL
def test_ranks_go_on(tmp_path):
    """Stopped inside an epoch by SIGTERM to the first rank alone."""
    finish(start(tmp_path, "one", "--devices", "2", epochs=6))
    process = start(tmp_path, "two", "--devices", "2", epochs=6, save_every=2)
    limit = time.monotonic() + 100
    while not checkpoints.saved(tmp_path / "two" / "checkpoints"):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert not (tmp_path / "two" / "model.pt").exists()
    finish(start(tmp_path, "two", "--devices", "2", "--resume", epochs=6))
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == (tmp_path / "two" / "metrics.jsonl").read_bytes()
    (one, _), (two, _) = (state_of(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@ALL
def test_sharded_ranks_go_on(tmp_path):
    """From a checkpoint inside an epoch, to the same bytes."""
    options = ["--devices", "2", "--strategy", "fsdp", "--precision", "fp32", "--save_every", "4", "--keep", "9"]
    finish(start(tmp_path, "run", *options))
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in ("model.pt", "metrics.jsonl")}
    finish(start(tmp_path, "run", *options, "--resume", str(tmp_path / "run/checkpoints/step-000000008.ckpt")))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in whole} == whole


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@ALL
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["other", "first"])
def test_a_rank_dies(tmp_path, victim):
    """The rest ends with an error, and does not wait for it; what it had saved is whole, and goes on."""
    process = start(tmp_path, "run", "--devices", "2", epochs=2000, save_every=4)
    saved = tmp_path / "run" / "checkpoints"
    try:
        limit = time.monotonic() + 150
        while len(checkpoints.saved(saved)) < 1:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        (child,) = (pid for pid in children(process) if b"fractalnet" in Path(f"/proc/{pid}/cmdline").read_bytes())
        if victim == "other":
            os.kill(child, signal.SIGKILL)
            process.communicate(timeout=60)
            assert process.returncode not in (0, None)
        else:
            process.kill()
            process.wait()
            limit = time.monotonic() + 60
            while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
                assert time.monotonic() < limit, "the other rank hangs"
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    checkpoints.prove(checkpoints.saved(saved)[-1])
