"""Parts of a training, each by itself: seeds, divisors, what is on the disk when, what is timed and compared."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from fractalnet import (  # noqa: E402
    FractalNet,
    checkpoints,
    config,
    devices,
    evaluate,
    files,
    outputs,
    probes,
    sources,
    study,
    train,
)
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.devices import lay_out  # noqa: E402
from fractalnet.drop_path import full_path  # noqa: E402
from fractalnet.formats import Images  # noqa: E402
from fractalnet.graphed import GraphedStep  # noqa: E402
from fractalnet.layers import init_conv  # noqa: E402
from graph_twin import Twin  # noqa: E402
from lightning.fabric import loggers  # noqa: E402
from test_graphed import NETS, batches, build  # noqa: E402
from test_runs import written  # noqa: E402
from test_train import quick  # noqa: E402, F401


def bias_of(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state"]["head.bias"]


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """The bias of the head starts at zero: after one step it is proportional to the norm."""
    biases = []
    for clip in ("0.001", "0.002"):
        out = tmp_path / clip
        assert main(["train", written(tmp_path, batch_size=1437), "--out", str(out), "--clip", clip]) == 0
        biases.append(bias_of(out))
    torch.testing.assert_close(biases[1], 2 * biases[0], rtol=1e-4, atol=1e-8)


def test_the_divisor_of_a_batch_that_is_not_full(tmp_path):
    """1437 images are one batch of either size."""
    biases = []
    for size in (1437, 2000):
        assert main(["train", written(tmp_path, batch_size=size), "--out", str(tmp_path / str(size))]) == 0
        biases.append(bias_of(tmp_path / str(size)))
    assert torch.equal(*biases) and biases[0].any()


def test_the_criterion_smooths_and_sums():
    logits, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    this = SimpleNamespace(config=SimpleNamespace(label_smoothing=0.2))
    wanted = torch.nn.functional.one_hot(y, 4) * 0.8 + 0.2 / 4
    torch.testing.assert_close(train.Run.criterion(this, logits, y), -(wanted * logits.log_softmax(1)).sum())


def test_the_average_is_of_statistics_too():
    net = FractalNet(5, 1, (4,), image_size=8)
    average = train.Run._average(SimpleNamespace(config=SimpleNamespace(ema=0.75, strategy="auto"), net=net))
    mean = net.blocks[0].running_mean
    for value in (0.0, 4.0):
        mean.fill_(value)
        average.update_parameters(net)
    assert (average.module.blocks[0].running_mean == 1.0).all()


def test_every_batch_has_its_own_seed(tmp_path, monkeypatch):
    """Of dropout: else every batch drops the same."""
    seeds, work = [], train.Run.work
    monkeypatch.setattr(train.Run, "work", lambda *a: seeds.append(torch.initial_seed()) or work(*a))
    assert main(["train", written(tmp_path, epochs=2), "--out", str(tmp_path / "run")]) == 0
    assert len(seeds) == len(set(seeds)) == 6


def test_paths_have_a_seed_of_their_own(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(train, "train", lambda this, *_: found.append(this.net.path_seed) or 1 / 0)
    for options in ([], ["--network.path_seed", "7"]):
        with pytest.raises(ZeroDivisionError):
            main(["train", written(tmp_path), "--out", str(tmp_path / str(len(options))), "--seed", "3", *options])
    assert found == [3, 7]


@pytest.mark.parametrize("precision, kept", [("fp32", "highest"), ("tf32", "high")])
def test_only_tf32_rounds_factors(precision, kept):
    before, allowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        devices.fabric_for(
            SimpleNamespace(strategy="auto", devices="1", nodes=1, accelerator="cpu", precision=precision)
        )
        assert torch.get_float32_matmul_precision() == kept
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize(
    "started, chosen, counts", [(2, "1", "1 times 1"), (3, "2", "2 times 1"), (1, "2", "2 times 1")]
)
def test_torchrun_starts_as_many_processes_as_there_are_devices(started, chosen, counts, monkeypatch):
    options = {"strategy": "auto", "devices": chosen, "nodes": 1, "accelerator": "cpu", "precision": "fp32"}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": started, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(files.UserError, match=f"to be {started}, torchrun's processes, got {counts}"):
        devices.fabric_for(SimpleNamespace(**options))
    monkeypatch.setenv("WORLD_SIZE", chosen)
    devices.fabric_for(SimpleNamespace(**options))


@pytest.mark.parametrize("what", ["files", "checkpoint"])
def test_what_is_renamed_is_on_the_disk(what, tmp_path, monkeypatch):
    """File, name, then the folder: else a machine that loses its power may leave an empty file under the name."""
    done, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        done.append(("flush", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("rename", a.name)) or replace(a, b))
    if what == "files":
        files.write(tmp_path, {"a": b"1", "b": b"2"})
        names = [f".{name}.{os.getpid()}.tmp" for name in "ab"]
    else:
        fabric = SimpleNamespace(
            save=lambda path, state: path.write_bytes(b"1"), world_size=1, is_global_zero=True, broadcast=lambda x: x
        )
        checkpoints.save(fabric, tmp_path, 3, {})
        names = [".step-000000003.ckpt.tmp"]
    assert done == [*(("flush", n) for n in names), *(("rename", n) for n in names), ("flush", tmp_path.name)]


def test_a_row_is_on_the_disk(tmp_path, monkeypatch):
    sizes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: sizes.append(os.fstat(d).st_size) or fsync(d))
    log = outputs.Log(SimpleNamespace(is_global_zero=True), tmp_path, SimpleNamespace(tensorboard=False), 0, 1)
    log.time({"a": 1})
    log.time({"b": 2})
    assert sizes == [9, 18] and (tmp_path / "timing.jsonl").stat().st_size == 18


def test_no_half_of_a_row_stays(tmp_path, monkeypatch):
    log = outputs.Log(SimpleNamespace(is_global_zero=True), tmp_path, SimpleNamespace(tensorboard=False), 0, 1)
    log.time({"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.UserError, match="No space left"):
        log.time({"b": 2})
    assert (tmp_path / "timing.jsonl").read_text() == '{"a": 1}\n'


def test_checkpoints_inside_an_epoch_are_of_whole_groups(tmp_path):
    """Every third batch, or the first complete group after it."""
    options = {"batch_size": 100, "accumulate": 2, "save_every": 3, "keep": 99}
    assert main(["train", written(tmp_path, **options), "--out", str(tmp_path / "run")]) == 0
    found = map(checkpoints.step_of, checkpoints.saved(tmp_path / "run" / "checkpoints"))
    assert list(found) == [4, 6, 10, 12, 15]


def test_half_a_checkpoint_of_a_killed_run_goes(tmp_path):
    out = tmp_path / "run"
    assert main(["train", written(tmp_path), "--out", str(out)]) == 0
    half = out / "checkpoints" / ".step-000000009.ckpt.tmp"
    half.write_bytes(b"half")
    (out / "timing.jsonl").unlink()  # nor is it needed
    assert main(["train", "--out", str(out), "--resume"]) == 0 and not half.exists()


@pytest.mark.parametrize("rank, ranks, loss", [(0, 1, 3.0), (0, 3, 3.0), (1, 3, 0.0), (1, 2, 2.0)])
def test_what_a_run_goes_on_with(rank, ranks, loss, tmp_path, monkeypatch):
    """The losses of two ranks, of which other numbers have the sum, a scaler's state, and momenta laid out anew."""
    place = {"epoch": 1, "batch": 2, "best": {}, "rate": 0.1}
    saved = {"place": place, "scaler": {"scale": 512.0}, "scheduler": {}, "loss": torch.tensor([1.0, 2.0]), "log": 0}
    scaler, scheduler, laid = [], [], []
    monkeypatch.setattr(checkpoints, "load", lambda fabric, path, state, fits: state.update(saved))
    monkeypatch.setattr(train, "lay_out", laid.append)
    strategy = SimpleNamespace(precision=SimpleNamespace(load_state_dict=scaler.append))
    fabric = {"global_rank": rank, "world_size": ranks, "is_global_zero": False, "barrier": lambda: None}
    this = SimpleNamespace(fabric=SimpleNamespace(strategy=strategy, **fabric), state=dict, average=None, net=None)
    this.optimizer, this.scheduler = SimpleNamespace(optimizer="SGD"), SimpleNamespace(load_state_dict=scheduler.append)
    this.loss = torch.zeros((), dtype=torch.float64)
    train.Run.resume(this, tmp_path, tmp_path / "step-000000005.ckpt")
    assert (this.loss.item(), this.epoch, this.batch, this.rate) == (loss, 1, 2, 0.1)
    assert (scaler, scheduler, laid) == ([{"scale": 512.0}], [{}], ["SGD"])


def test_times_of_a_run(tmp_path):
    """And that its last epoch is measured, whichever others are."""
    out = tmp_path / "run"
    options = {"epochs": 3, "evaluate_every": 2, "accelerator": "cpu"}
    assert main(["train", written(tmp_path, **options), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    total = {key: sum(row.get(key, 0) for row in rows) for key in ("seconds", "in_steps", "evaluating_and_saving")}
    assert ["holdout" in row for row in metrics["history"]] == [False, True, True]
    assert metrics["training_seconds"] == pytest.approx(total["seconds"])
    assert metrics["evaluating_seconds"] == pytest.approx(total["evaluating_and_saving"])
    assert metrics["overhead"] == pytest.approx(total["seconds"] / total["in_steps"] - 1)


def test_tensorboard_has_steps(tmp_path, monkeypatch):
    """Batches, so that curves of runs lie over each other; a resumed run's take the place of what came after."""
    made = []

    class Board:
        def __init__(self, *_, **options):
            made.append(options["purge_step"])

        def log_metrics(self, scalars, step):
            made.append((scalars["epoch"], step))

        def save(self):
            pass

    monkeypatch.setattr(loggers, "TensorBoardLogger", Board)
    out = tmp_path / "run"
    argv = ["train", written(tmp_path, tensorboard=True, epochs=2, keep=9), "--out", str(out)]
    assert main(argv) == 0 and made == [0, (1, 3), (2, 6)]
    made.clear()
    first = checkpoints.saved(out / "checkpoints")[0]
    assert main([*argv, "--resume", str(first)]) == 0 and made == [3, (2, 6)]


@pytest.mark.parametrize("key", ["precision", "seed", "sync_bn", "strategy", "ema", "compile", "evaluate_every"])
def test_what_changes_weights_or_metrics_is_not_free(key):
    assert outputs.differences({key: 1}, {key: 2}, config.FREE)


def test_a_capture_that_fails_in_its_middle_leaves_nothing():
    net, optimizer, work, state = build(NETS["fused"])

    class Half(Twin):
        def capture(self, call):
            for p in net.parameters():
                p.grad = torch.full_like(p, float("nan"))
            optimizer.grad_scale = optimizer.found_inf = torch.ones(())
            raise RuntimeError("out of memory")

    step = GraphedStep(net, optimizer, work, capturer=Half(state), warmup=1)
    with pytest.warns(UserWarning, match="out of memory"):
        for x, y in batches(2):
            step(x, y, full_path(2, 3))
    assert all(p.isfinite().all() for p in net.parameters())
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def test_ten_crops_average_probabilities():
    net, x, y = FractalNet(5, 1, (4,), image_size=8).eval(), 9 * torch.randn(10, 6, 3, 8, 8), torch.arange(6) % 5
    with torch.no_grad():
        net.head.weight.mul_(20)
        mean = torch.stack([net(part) for part in x]).softmax(-1).mean(0)
    assert evaluate.scores(net, [(x, y)])["full"]["loss"] == pytest.approx(
        torch.nn.functional.nll_loss(mean.log(), y).item(), rel=1e-5
    )


def test_networks_that_differ_are_not_timed():
    one, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    evaluate.hold_together(one.eval(), one, x)
    assert one.training
    for bias in (0.1, float("nan")):
        other = torch.nn.Linear(3, 2)
        other.load_state_dict({"weight": one.weight, "bias": one.bias + bias})
        with pytest.raises(RuntimeError, match="the fused and the eager network differ"):
            evaluate.hold_together(one, other, x)


def test_timed_paths_have_the_shares_of_the_mixture():
    net = FractalNet(5, 2, (4,), image_size=8, global_ratio=0.5)
    columns = [path.column for path in evaluate.mixture(net, 4, 16, 0)]
    assert [columns.count(c) for c in (0, 1)] == [4, 4]


def test_the_best_checkpoint_stays(tmp_path):
    for step in range(1, 6):
        (tmp_path / f"step-{step:09d}.ckpt").write_bytes(b"")
    checkpoints.prune(tmp_path, 2, "step-000000002.ckpt")
    assert [checkpoints.step_of(path) for path in checkpoints.saved(tmp_path)] == [2, 4, 5]
    with pytest.raises(files.UserError, match="step-000000004.ckpt: damaged .*: --resume .*step-000000002.ckpt$"):
        checkpoints.prove(tmp_path / "step-000000004.ckpt")
    checkpoints.prune(tmp_path, 1, None)
    assert [checkpoints.step_of(path) for path in checkpoints.saved(tmp_path)] == [5]


def test_a_checkpoint_knows_the_best_one(tmp_path):
    """Else a resumed run would take any later one for it."""
    out = tmp_path / "run"
    assert main(["train", written(tmp_path, epochs=2), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["holdout"]["full"]["accuracy"] for row in rows]
    last = torch.load(checkpoints.saved(out / "checkpoints")[-1], weights_only=True)
    best = {"accuracy": max(accuracies), "checkpoint": f"step-{3 + 3 * accuracies.index(max(accuracies)):09d}.ckpt"}
    assert last["place"]["best"] == best
    this = SimpleNamespace(best=best, steps=99, save=lambda out: out)
    train.Run.save_epoch(this, out, rows[accuracies.index(max(accuracies))])  # of equal ones the first
    assert this.best == best


def test_code_in_a_checkpoint_to_resume_from_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"epoch": Code()}, tmp_path / "step-000000001.ckpt")
    options = {"strategy": "auto", "devices": "1", "nodes": 1, "accelerator": "cpu", "precision": "fp32"}
    with pytest.raises(files.UserError, match="not a checkpoint of a training|does not fit"):
        fabric, path = devices.fabric_for(SimpleNamespace(**options)), tmp_path / "step-000000001.ckpt"
        checkpoints.load(fabric, path, {"epoch": 0}, lambda run: None)
    assert not (tmp_path / "it ran").exists()


def test_probes_are_of_standardised_features_and_of_the_holdout(monkeypatch):
    monkeypatch.setattr(probes, "features", lambda model, x: iter([("join", 1, x)]))
    y = torch.arange(40) % 2
    x = torch.stack([1e-4 * y, torch.randn(40)], 1)  # a small feature that tells, beside a large one that does not
    (right,) = probes.measure(None, sources.Split(x, y, x, y))
    (wrong,) = probes.measure(None, sources.Split(x, y, x, 1 - y))
    assert right == {"where": "join", "depth": 1, "features": 2, "accuracy": 1.0} and wrong["accuracy"] == 0.0


def test_initial_weights_are_of_glorot_and_he():
    weight, bound = torch.empty(200, 100), (6 / 1050) ** 0.5
    init_conv(weight, "he", 50, 1000)
    assert weight.std().item() == pytest.approx(0.2, rel=0.03) and abs(weight.mean().item()) < 0.01
    init_conv(weight, "xavier", 50, 1000)
    assert 0.99 * bound < weight.abs().max() <= bound and abs(weight.mean().item()) < 0.01


def test_the_rate_of_a_study_falls_to_zero(monkeypatch):
    """From the recipe's; and the seconds are of all epochs, the losses of the last one too."""
    data, factor, seen, made, sgd = sources.load("digits"), study.factor, [], [], torch.optim.SGD
    data = dataclasses.replace(data, train=Images(data.train.x[:150], data.train.y[:150], 16.0))
    monkeypatch.setattr(study, "factor", lambda *a: seen.append(factor(*a)) or seen[-1])
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **options: made.append(sgd(*a, **options)) or made[-1])
    monkeypatch.setattr(study, "time", SimpleNamespace(process_time=iter(range(99)).__next__))
    recipe = study.Recipe(4, 0.03, momentum=0.8, nesterov=True, weight_decay=1e-4)
    found = study.fit(study.network("plain", 1, data), data, recipe, 0, SimpleNamespace(update=lambda: None))
    assert seen == pytest.approx([0.5 + 0.5 * np.cos(np.pi * i / 12) for i in range(12)])
    group = made[0].param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")] == [0.03 * seen[-1], 0.8, True, 1e-4]
    assert found["cpu_seconds"] == 4 and [row["epoch"] for row in found["history"]] == [0, 4]


def test_one_set_and_two_are_not_mixed_up(monkeypatch):
    monkeypatch.setattr(study, "fit", lambda *_: None)
    monkeypatch.setattr(
        study, "answers", lambda model, *_: dict.fromkeys(("full", "column 2"), len(model.blocks[0].running_mean) == 2)
    )
    taken = []
    monkeypatch.setattr(FractalNet, "recalibrate", lambda self, x, c=None: taken.append((len(torch.cat(x)), c)) or self)
    scores = study.statistics_run(study.Recipe(1, 0.02), sources.load("digits"), 0, None)["scores"]
    assert {name: found["full"] for name, found in scores.items()} == {
        "one set": False, "one set, recalibrated": False, "two sets": True, "two sets, recalibrated": True,
    }  # fmt: skip
    assert taken == [(1437, None), (1437, 2)] * 2  # from all training images


def test_momenta_of_another_layout():
    """A checkpoint's of contiguous weights, for weights in channels_last: fused steps read both in memory's order."""
    torch.manual_seed(0)
    nets = [torch.nn.Conv2d(4, 6, 3) for _ in range(2)]
    x, made = torch.randn(2, 4, 8, 8), []
    for net, fused in zip(nets, (True, False), strict=True):
        net.load_state_dict(nets[0].state_dict())
        made.append(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused))
    nets[0](x).square().mean().backward()
    made[0].step()
    nets[1].to(memory_format=torch.channels_last).load_state_dict(nets[0].state_dict())
    made[1].load_state_dict(made[0].state_dict())
    assert made[1].state[nets[1].weight]["momentum_buffer"].stride() != nets[1].weight.stride()
    lay_out(made[1])
    made[1].param_groups[0]["fused"] = True
    for net, optimizer in zip(nets, made, strict=True):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(nets[1].weight, nets[0].weight)
