"""Recipes against the paper's text, their options, and the learning rate over a training."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("yaml")

import torch  # noqa: E402
from fractalnet import FractalNet, PlainNet, config, devices, evaluate, schedules, summary, train  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.config import Schedule  # noqa: E402
from fractalnet.drop_path import full_path  # noqa: E402
from fractalnet.files import UserError  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402

FACTS = Path(config.FOLDER)


def test_every_file_belongs_to_a_recipe():
    rows, columns = ({name.split("/")[i] for name in config.paper()} for i in (0, 1))
    assert rows == {f.stem for f in (FACTS / "networks").iterdir()}
    assert columns == {f.name.removesuffix(".yaml") for f in (FACTS / "data").iterdir()}


@pytest.mark.parametrize("name", config.paper())
def test_recipe_is_the_papers(name):
    found, _ = config.load(name)
    row, _, column = name.partition("/")
    epochs, batch, lr, classes = (70, 32, 0.001, 1000) if column == "imagenet" else (400, 100, 0.02, 10)
    epochs = 20 if column == "svhn" else epochs
    classes = 100 if column.startswith("c100") else classes
    batch = 50 if row.startswith(("fractal_c", "plain_c")) else batch
    optimizer = found.optimizer([torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert (found.epochs, found.batch_size) == (epochs, batch)
    assert type(optimizer) is torch.optim.SGD and (group["lr"], group["momentum"]) == (lr, 0.9)
    assert group["weight_decay"] == 0 and not group["nesterov"]
    if column == "imagenet":
        assert found.schedule == Schedule("milestones", 0.1, [50.0, 65.0])
    else:
        assert found.schedule == Schedule("halving", 0.1)
        augmented = column.endswith("+")
        assert (found.data.mirror, found.data.translate) == (augmented, 4 if augmented else 0)
        assert found.data.padding == ("reflect" if column.endswith("++") else "zero")
    assert found.data.normalise == "mean"
    assert summary.KNOWN[found.data.source][0] == classes
    if row in ("fractalnet20", "fractalnet20-drop", "fractal_c4-drop"):
        shape = {"num_classes": classes, "in_channels": 3, "image_size": 32}
        net = evaluate.build({**shape, **found.network}, name)
        drops = row.endswith("-drop")
        assert (net.local_drop, net.global_ratio) == ((0.15, 0.5) if drops else (0, 0))
        if row != "fractal_c4-drop":
            rates = [0.0, 0.1, 0.2, 0.3, 0.4] if drops else [0.0] * 5
            assert [block.dropout for block in net.blocks] == rates and net.depth() == 20
        else:
            assert net.depth() == 40


# --- the learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 7, 20, 400])
def test_halving(epochs):
    """By its definition: the rate drops each time that what remains is half of what remained at the last drop."""
    expected, mark, drops = [], epochs, 0
    for epoch in range(epochs):
        while 2 * (epochs - epoch) <= mark:
            mark, drops = mark / 2, drops + 1
        expected.append(drops)
    assert [schedules.halvings(epoch, epochs) for epoch in range(epochs)] == expected
    if epochs == 400:
        assert [e for e in range(1, 400) if expected[e] > expected[e - 1]][:4] == [200, 300, 350, 375]
    rates = [schedules.factor(Schedule("halving"), epoch + 0.5, epochs) for epoch in range(epochs)]
    assert rates == pytest.approx([0.1**k for k in expected])


def test_other_schedules():
    def rates(schedule, epochs=4):
        return [schedules.factor(schedule, p, epochs) for p in (0, 1, 2, 3.5, 4)]

    assert rates(Schedule("constant")) == [1] * 5
    assert rates(Schedule("milestones", 0.5, [1, 3.5])) == [1, 0.5, 0.5, 0.25, 0.25]
    assert rates(Schedule("cosine")) == pytest.approx([1, 0.8535534, 0.5, 0.0380602, 0], abs=1e-6)
    assert rates(Schedule("constant", warmup=2)) == [0, 0.5, 1, 1, 1]


def test_the_scheduler_reaches_the_optimizer():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.2)
    scheduler, rates = schedules.scheduler(optimizer, Schedule("halving"), 4, 2), []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2] * 4 + [0.02] * 2 + [0.002] * 2)


def test_epochs_scale_the_schedule():
    def schedule(*options):
        return config.load("fractalnet34/imagenet", options)[0].schedule

    assert schedule("--epochs", "7").milestones == pytest.approx([5, 6.5])
    assert schedule("--epochs", "7", "--schedule.milestones", "[1, 2]").milestones == [1, 2]
    assert schedule("--epochs", "7", "--schedule", '{"kind": "milestones", "milestones": [3]}').milestones == [3]
    assert schedule("--epochs=35", "--schedule.warmup=3").warmup == 3
    own = '{"kind": "milestones", "milestones": [50, 65]}'  # the recipe's, and asked for
    assert schedule("--epochs", "7", "--schedule", own).milestones == [50, 65]
    assert schedule("--epochs", "7", "--schedule.milestones", "[50, 65]").milestones == [50, 65]


# --- options -------------------------------------------------------------------------------------


def test_options_lie_over_the_recipe(tmp_path):
    argv = [
        "--optimizer",
        "AdamW",
        "--optimizer.weight-decay",
        "0.05",
        "--network.columns",
        "2",
        "--data.mirror",
        "true",
    ]
    found, plain = config.load("digits", argv)
    optimizer = found.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 0.05
    assert found.network == {"columns": 2, "channels": [32, 64, 128]} and found.data.mirror
    import yaml

    (tmp_path / "again.yaml").write_text(f"# digits{config.HEAD} config.yaml\n" + yaml.safe_dump(plain))
    assert config.load(str(tmp_path / "again.yaml"))[1] == plain
    assert config.known_as(str(tmp_path / "again.yaml")) == "digits"
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    assert config.known_as(str(tmp_path / "mine.yaml")) == "mine"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "1"], ["--lr", "--optimizer", "--out"]),
        (["--optimizer", "Sgd"], ["optimizer", "Sgd"]),
        (["--optimizer.speed", "3"], ["speed"]),
        (["--precision", "int8"], ["precision", "bf16", "int8"]),
        (["--data.padding", "edge"], ["padding", "reflect", "edge"]),
        (["--ema", "2"], ["--ema", "(0, 1)", "2"]),
        (["--devices", "none"], ["--devices", "auto", "'none'"]),
        (["--network.columns", "9"], ["recipe digits", "columns", "9"]),
        (["--network.rows", "9"], ["recipe digits", "rows"]),
        (["--keep", "0"], ["--keep", "1 or more"]),
        (["--resume"], ["--resume", "no checkpoint"]),
        (["--epoch", "1"], ["unknown argument --epoch 1"]),
        (["--optimizer", "LBFGS"], ["optimizer", "LBFGS"]),
        (["--network.name", "fractal_c2"], ["image_size >= 32", "got 8"]),  # its five pools, not the recipe's three
    ],
)
def test_wrong_options(argv, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["train", "digits", *argv], words)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


BOUNDS = {  # the nearest values that are accepted, and that are not
    "clip": ([1e-9], [0, math.inf]),
    "ema": ([1e-9], [0, 1]),
    "label_smoothing": ([0], [-0.1, 1]),
    "schedule.factor": ([1], [0, 1.1]),
    "schedule.warmup": ([0], [-0.1, math.inf]),
    "optimizer.init_args.lr": ([1e-9], [0, math.inf]),
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    **{name: ([least], [least - 1]) for name, least in (("save_every", 1), ("evaluate_every", 1), ("accumulate", 1))},
    **{f"data.{name}": ([least], [least - 1]) for name, least in (("workers", 0), ("translate", 0), ("image_size", 1))},
}


@pytest.mark.parametrize("key", BOUNDS)
def test_bounds_of_options(key):
    class Found(dict):
        devices = strategy = "auto"

    good, bad = BOUNDS[key]
    for value in good:
        config.check(Found({key: value}), "recipe mine")
    for value in bad:
        with pytest.raises(UserError, match=f"recipe mine: --{key}: expected"):
            config.check(Found({key: value}), "recipe mine")


def test_wrong_backend(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FRACTAL_BACKEND", "nope")
    assert main(["train", "digits", "--out", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert last.startswith("error: ") and "expected FRACTAL_BACKEND one of cpu" in last and "got 'nope'" in last


@pytest.mark.parametrize("text", [
    "- 1", "epochs: [", "epochs: 3", "network: {}\nspeed: 3", "epochs: 2020-13-45", "a: " + 9999 * "[", "network:",
    "a: &a [*a]", "network: [1]", "network: {1: 2, columns: 3}",
])  # fmt: skip
def test_wrong_files(text, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    for options in ([], ["--network.name", "fractal_c2"]):
        refused(["train", "mine.yaml", *options], ["mine.yaml"])
    refused(["train", "none.yaml"], ["recipe none.yaml", "No such file"])


# --- what a run would be -------------------------------------------------------------------------


def test_where_a_run_goes(monkeypatch, capsys):
    """And that nothing runs where its options are asked for."""
    runs = []
    monkeypatch.setattr(train, "run", lambda found, plain, *where: runs.append(where))
    for argv in (["fractalnet20/c10"], ["--recipe", "digits", "--resume", "--overwrite"], ["digits", "--options"]):
        assert main(["train", *argv]) == 0
    assert runs == [
        ("fractalnet20/c10", Path("runs/fractalnet20-c10"), None, False),
        ("digits", Path("runs/digits"), "newest", True),
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch_size BATCH_SIZE images of a batch, over all ranks. (required, type: int)" in said


@pytest.mark.parametrize("name, million, parameters", [("fractalnet20-drop/c10+", "845.2", "33,724,618")])
def test_dry_run(name, million, parameters, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, "--dry-run", "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert f"work: {million} M multiply-adds" in said and f"{parameters} parameters" in said
    assert "epochs: 2" in said and "mirror: true" in said and "2 epochs x 500 batches of 100" in said
    assert not list(tmp_path.iterdir())


def test_work_and_live_fraction():
    net = FractalNet(10, 3, (4, 6), image_size=8)
    convs = 8 * 8 * 9 * (3 * 3 * 4 + 4 * 4 * 4) + 4 * 4 * 9 * (3 * 4 * 6 + 4 * 6 * 6)  # 3 of 7 units read the input
    assert summary.work(net, 3, 8) == convs + 60
    stemmed = FractalNet(10, 2, (4,), image_size=32, stem="resnet", last_pool=False)
    assert summary.work(stemmed, 3, 32) == 16 * 16 * 49 * 3 * 64 + 8 * 8 * 9 * (2 * 64 * 4 + 4 * 4) + 40
    assert summary.live_fraction(net) == pytest.approx(0.59, abs=0.02)
    for options in ({"local_drop": 0, "global_ratio": 0}, {"granularity": "sample"}):  # or masked
        assert summary.live_fraction(FractalNet(10, 3, (4,), image_size=8, **options)) == 1


def test_figures_of_a_dry_run(tmp_path, capsys):
    """Against their definitions: of 1437 images of 8 x 8 and, by options, of all that the figures depend on."""
    file, epochs = tmp_path / "mine.yaml", 10**6
    network = "{columns: 2, channels: [256], granularity: sample}"
    sgd = "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}"
    plan = f"epochs: {epochs}\nbatch_size: 10000\noptimizer: {sgd}\n"
    file.write_text(f"network: {network}\ndata: {{source: digits}}\n{plan}")

    def figures(*options):
        assert main(["train", str(file), "--dry-run", *options]) == 0
        found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[-7:])
        return found | {"MB": [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MB", found["memory, estimate"])]}

    one = figures()
    net = FractalNet(10, 2, (256,), in_channels=1, image_size=8, granularity="sample")
    size, x = sum(p.numel() for p in net.parameters()), torch.randn(4, 1, 8, 8)
    saved = evaluate.saved_bytes(net, lambda: net(x, path=full_path(1, 2)).sum()) / 4 * 1e4 / 1e6
    assert f"{size:,} parameters" in one["network"] and one["steps"] == f"{epochs} epochs x 1 batches of 10000"
    assert one["MB"][1] == pytest.approx(saved, rel=0.03) and abs(one["MB"][0] - sum(one["MB"][1:])) <= 1
    assert one["live fraction under drop-path"] == "100.0% of the blocks' convolutions"  # none is drawn
    total = 3 * summary.work(net, 1, 8) * 1437 * epochs / 1e15
    assert float(one["training"].split()[0].replace(",", "")) == pytest.approx(total, abs=0.01)
    for options, copies, activations in (
        ([], 2, 1),
        (["--optimizer.momentum", "0.9"], 3, 1),
        (["--optimizer", "AdamW", "--ema", "0.9"], 5, 1),
        (["--precision", "fp64"], 4, 2),
        (["--precision", "bf16"], 2, 0.5),
    ):
        _, held, weights = figures(*options)["MB"]
        assert weights == round(copies * size * 4 / 1e6) and held == pytest.approx(activations * one["MB"][1], abs=1)
    steps = figures("--batch_size", "1000", "--accumulate", "3")["steps"]
    assert steps.endswith("x 2 batches of 1000, an optimizer step every 3")


def test_dry_runs_of_other_networks(tmp_path, capsys):
    """Tied columns draw no column; a plain network nothing. Images of another size are of that size."""
    file = tmp_path / "mine.yaml"
    sgd, live = "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}", []
    for network in (
        "{columns: 2, channels: [4], global_mode: tied}",
        "{columns: 2, channels: [4], global_ratio: 0}",
        "{name: plain_c1, channels: [4]}",
    ):
        data = "{source: imagenet, image_size: 16}"
        file.write_text(f"network: {network}\ndata: {data}\nepochs: 1\nbatch_size: 10\noptimizer: {sgd}\n")
        assert main(["train", str(file), "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"{file.stem}: imagenet, 1,281,167 training images 3 x 16 x 16, 1000 classes" in lines
        live += [line for line in lines if line.startswith("live fraction")]
    assert live[0] == live[1] + "; and every column by itself" and live[1].endswith(", mean of 2000 paths")
    assert live[2] == "live fraction under drop-path: 100.0% of the blocks' convolutions"


@pytest.mark.parametrize("options, words", [
    (["--optimizer.momentum", "0"], ["optimizer: Nesterov"]),
    (["--network.in_channels", "3"], ["--network.in_channels: expected 1 for digits"]),
    (["--network.image_size", "16"], ["--network.image_size: expected 8 for digits"]),
    (["--devices", "²"], ["--devices: expected a whole number"]),
    (["--devices", "0"], ["--devices: expected a whole number"]),
    (["--optimizer", "torch.optim.LBFGS"], ["optimizer: expected one of torch.optim but LBFGS"]),
    (["--strategy", "fsdp", "--ema", "0.9"], ["--ema: expected --strategy auto or ddp beside it, got fsdp"]),
    (["--strategy", "fsdp", "--precision", "bf16"], ["--precision: expected fp32 or tf32"]),
])  # fmt: skip
def test_a_dry_run_refuses_what_a_run_does(options, words, refused):
    for dry in ([], ["--dry-run"]):
        refused(["train", "digits", *dry, *options], words)


def test_unknown_recipe():
    with pytest.raises(UserError, match="unknown recipe 'c10'; there is: digits, fractalnet20/c10, .*yaml"):
        config.load("c10")


def test_warm_up_and_milestones_scale_with_the_epochs(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "network: {columns: 2, channels: [8]}\ndata: {source: digits}\nepochs: 20\nbatch_size: 50\n"
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}\n"
        "schedule: {kind: milestones, milestones: [10], warmup: 4}\n"
    )
    found = config.load(str(file), ["--epochs", "10"])[0].schedule
    assert found.warmup == 2 and found.milestones == [5]
    file.write_text(file.read_text().replace("epochs: 20", "epochs: 100").replace("[10]", "[50]"))
    assert config.load(str(file), ["--epochs", "14"])[0].schedule.milestones == [7]  # not a step later
    file.write_text(file.read_text().replace("epochs: 100", "epochs: 20").replace("[50]", "[10]"))
    assert config.load(str(file), ["--epochs", "10", "--schedule.warmup", "4"])[0].schedule.warmup == 4


# --- devices -------------------------------------------------------------------------------------


def test_machines_that_nobody_started(monkeypatch):
    """Lightning would wait for them."""
    monkeypatch.delenv("NODE_RANK", raising=False)
    options = {"strategy": "auto", "devices": "1", "nodes": 2, "accelerator": "cpu", "precision": "fp32"}
    with pytest.raises(UserError, match="--nodes 2: expected torchrun to start every machine's part, got none"):
        devices.fabric_for(SimpleNamespace(**options))


@pytest.mark.filterwarnings("ignore:You passed")
def test_a_precision_that_the_device_has_not():
    """Fabric would put another one in its place."""
    options = {"strategy": "auto", "devices": "1", "nodes": 1, "accelerator": "cpu", "precision": "fp16"}
    with pytest.raises(UserError, match="--precision: expected one that cpu has, got fp16"):
        devices.fabric_for(SimpleNamespace(**options))


def test_only_what_is_shaped_like_a_parameter_is_laid_out():
    """Counters stay, and what is kept in another dtype stays in it."""
    p, mean = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)), torch.randn(4, 3, 2, 2)
    held = {"step": torch.tensor(3.0), "mean": mean.bfloat16()}
    devices.lay_out(SimpleNamespace(state={p: held}))
    assert held["step"].shape == () and held["mean"].stride() == p.stride()
    assert held["mean"].dtype == torch.bfloat16 and torch.equal(held["mean"], mean.bfloat16())


@pytest.mark.parametrize("net", [FractalNet(3, 2, (4,), image_size=8), PlainNet(3, 2, (4,), image_size=8)])
def test_averages_are_those_of_pytorch(net):
    """Bit for bit, counters of batches too; a sum of squares is a step."""
    averages = [AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True) for _ in range(2)]
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8)).square().sum().backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 1e-2 * p.grad
        devices.follow(averages[0], net)
        averages[1].update_parameters(net)
        for ours, theirs in zip(*(a.state_dict().values() for a in averages), strict=True):
            assert torch.equal(ours, theirs)
    assert averages[0].n_averaged == 3 and not torch.equal(next(averages[0].parameters()), next(net.parameters()))
