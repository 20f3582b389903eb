"""Studies: what they compute against its definition, what their commands leave, and what real data must show."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fractalnet import FractalNet
from fractalnet.drop_path import full_path

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("yaml")

from fractalnet import anytime, evaluate, export, probes, sources, study  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.formats import Images  # noqa: E402
from fractalnet.plain import PlainNet  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """Few and thin: channels of the depth study, images of every study."""
    whole = sources.load("digits")
    train, test = (Images(s.x[:120], s.y[:120], s.scale) for s in (whole.train, whole.test))
    part = dataclasses.replace(whole, train=train, test=test)
    monkeypatch.setattr(sources, "load", lambda name: part)
    monkeypatch.setattr(study, "CHANNELS", (4, 6))
    monkeypatch.setattr(study, "EVERY", 1)
    return part


class Bar:
    def update(self):
        pass


# --- depth -----------------------------------------------------------------------------------------


def test_depth_command(tmp_path, capsys, small):
    out = tmp_path / "new" / "depth"
    argv = ["study", "depth", "--columns", "1,3", "--epochs", "2", "--lr", "0.03", "--seeds", "4,5"]
    assert main([*argv, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"depth.json", "depth.png", "columns.png"}
    assert all((out / f).read_bytes().startswith(b"\x89PNG") for f in ("depth.png", "columns.png"))
    found = json.loads((out / "depth.json").read_text())
    assert (found["recipe"]["epochs"], found["recipe"]["lr"], found["recipe"]["batch_size"]) == (2, 0.03, 50)
    keys = [(run["columns"], run["kind"], run["seed"]) for run in found["runs"]]
    assert keys == [(c, kind, s) for c in (1, 3) for kind in ("plain", "whole", "mixture") for s in (4, 5)]
    for run in found["runs"]:
        count = run["columns"]
        assert run["depth"] == 2 * 2 ** (count - 1)
        names = ["plain"] if run["kind"] == "plain" else ["full", *(f"column {c}" for c in range(count))]
        assert list(run["holdout"]) == names
        assert [h["epoch"] for h in run["history"]] == [0, 1, 2]
        assert all(list(h["losses"]) == names and min(h["losses"].values()) > 0 for h in run["history"])
        first, convs = (1, 2 ** (count - 1)) if run["kind"] == "plain" else (count, 2**count - 1)
        blocks = [(1, 4), (4, 6)]  # what comes in, and the width
        weights = sum(first * 9 * i * k + (convs - first) * 9 * k * k + convs * 2 * k for i, k in blocks)
        assert run["parameters"] == weights + 6 * 10 + 10
        assert f"{run['parameters']:,}" in printed
    one = {run["kind"]: run for run in found["runs"] if run["columns"] == 1 and run["seed"] == 4}
    assert one["whole"]["history"] == one["mixture"]["history"]  # with one column nothing can be dropped


def test_one_seed_is_one_run_and_the_same_batches(small):
    recipe = study.Recipe(1, 0.02)

    def trained(kind, seed):
        torch.manual_seed(0)
        model, seen = study.network(kind, 2, small), []
        model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].sum().item()) if m is model else None)
        result = study.fit(model, small, recipe, seed, Bar())
        return result["history"], seen

    (history, seen), again, other = trained("mixture", 3), trained("mixture", 3), trained("mixture", 4)
    assert history == again[0] and seen == again[1]
    assert len(seen) == 3 and seen != other[1]
    assert seen == trained("plain", 3)[1] == trained("whole", 3)[1]


def test_every_batch_is_moved_anew(small, monkeypatch):
    """As far as the recipe says; but not the images whose loss is followed."""
    made, keys = [], []

    class Seen:
        def __init__(self, augment):
            self.augment = augment

        def eval(self):
            keys.append("eval")
            return Seen(self.augment.eval())

        def __call__(self, x, key=None):
            keys.append(key)
            return self.augment(x, key)

    of = study.Augment.of
    seen = SimpleNamespace(of=lambda data, **options: made.append(options) or Seen(of(data, **options)))
    monkeypatch.setattr(study, "Augment", seen)
    study.fit(study.network("plain", 1, small), small, study.Recipe(2, 0.02, shift=1), 7, Bar())
    assert made == [{"translate": 1, "padding": "black"}] and keys == ["eval", None, *((7, i) for i in range(6))]


def test_kinds_of_networks(small):
    rates = {"whole": (0, 0), "local": (0.15, 0), "mixture": (0.15, 0.5)}
    nets = {kind: study.network(kind, 2, small) for kind in rates}
    assert {kind: (net.local_drop, net.global_ratio) for kind, net in nets.items()} == rates
    assert {*rates, "plain"} == set(study.KINDS)


def test_losses_are_those_of_training(small):
    model = FractalNet(10, 2, (4, 6), in_channels=1, image_size=8).double().eval()
    split = sources.tensors(small)
    x, y = split.train_x[:60].double(), split.train_y[:60]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    got = study.losses(model, x, y, batch=40)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and not model.training
    column = model.extract_column(1).double().train()
    want = (40 * F.cross_entropy(column(x[:40]), y[:40]) + 20 * F.cross_entropy(column(x[40:]), y[40:])) / 60
    assert got["column 1"] == pytest.approx(want.item(), rel=1e-6)
    model.train()
    full = [
        F.cross_entropy(model(p, path=full_path(2, 2)), q, reduction="sum")
        for p, q in ((x[:40], y[:40]), (x[40:], y[40:]))
    ]
    assert got["full"] == pytest.approx(sum(full).item() / 60, rel=1e-9)
    assert list(study.losses(PlainNet(10, 2, (4, 6), in_channels=1, image_size=8), x.float(), y)) == ["plain"]


def test_a_fractal_network_learns_where_a_plain_one_of_its_depth_does_not():
    """48 layers on real digits, three epochs: log 10 is chance."""
    data, recipe, last = sources.load("digits"), study.Recipe(3, 0.02), {}
    for kind, name in (("plain", "plain"), ("whole", "full")):
        torch.manual_seed(0)
        model = study.network(kind, 5, data)
        assert model.depth() == 48
        last[kind] = study.fit(model, data, recipe, 0, Bar())["history"][-1]["losses"][name]
    assert last["plain"] > 0.7 * math.log(10) and last["whole"] < 0.2 * math.log(10), last


# --- probes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"pool_order": "after_join"}, {"pool": "avg"}, {"last_pool": False}])
@pytest.mark.parametrize("composed", [{}, {"activation": "silu", "column_widths": (1, 0.5, 0.5), "kernel_mix": 0.5}])
def test_joins_are_the_blocks(options, composed):
    net = FractalNet(5, 3, (4, 8), image_size=8, **options, **composed)
    for _ in range(3):
        net(torch.randn(6, 3, 8, 8))
    net.double().eval()
    path = full_path(2, 3)
    z = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for block in net.blocks:
        found = list(export.PlainBlock(block, folded=False).eval().joins(z))
        assert len(found) == 4
        want = block(z, path.keep[0], path.alone)
        torch.testing.assert_close(found[-1], want, rtol=1e-10, atol=1e-10)
        z = want


def test_joins_against_the_recursive_rule():
    """The joins inside: of three columns, row by row, from units and plain PyTorch."""
    net = FractalNet(5, 3, (4,), image_size=8)
    net(torch.randn(6, 3, 8, 8), path=full_path(1, 3))
    block, x = net.double().eval().blocks[0], torch.randn(5, 3, 8, 8, dtype=torch.float64)

    def conv(c, j, z):
        u = block.unit(c, j)
        y = F.conv2d(z, u.weight, padding=1)
        return F.batch_norm(y, u.running_mean, u.running_var, u.gamma, u.beta, eps=block.eps).relu()

    first = conv(2, 0, x)
    second = (conv(1, 0, x) + conv(2, 1, first)) / 2
    third = conv(2, 2, second)
    for got, want in zip(export.PlainBlock(block, folded=False).eval().joins(x), (first, second, third), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stem", [None, "resnet"])
def test_features_end_where_the_classifier_begins(stem):
    net = FractalNet(5, 3, (4, 6), image_size=20, stem=stem)
    for _ in range(3):
        net(torch.randn(6, 3, 20, 20))
    x = torch.randn(5, 3, 20, 20)
    found = list(probes.features(net, x))
    deep, stemmed = {}, int(stem is not None)
    for where, depth, part in found:
        assert not part.requires_grad and part.dim() == 2
        deep.setdefault(where, []).append((depth, part))
    assert [d for d, _ in deep["join"]] == list(range(1 + stemmed, 9 + stemmed))
    torch.testing.assert_close(net.head(deep["join"][-1][1]), net(x), rtol=1e-4, atol=1e-5)
    for c in range(3):
        assert [d for d, _ in deep[f"column {c}"]] == list(range(1, 2 * 2**c + 1 + stemmed))
        torch.testing.assert_close(net.head(deep[f"column {c}"][-1][1]), net(x, column=c), rtol=1e-4, atol=1e-5)


def test_probes_command(tmp_path, capsys, packed):
    arguments = {"num_classes": 10, "columns": 2, "channels": (8, 12), "in_channels": 1, "image_size": 8}
    model = FractalNet(**arguments)
    study.fit(model, sources.load("digits"), study.Recipe(3, 0.02, 64, shift=1), 0, Bar())
    (tmp_path / "model.pt").write_bytes(packed(model, arguments))
    out = tmp_path / "probes"
    assert main(["study", "probes", "--checkpoint", str(tmp_path / "model.pt"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"probes.json", "probes.png"}
    assert (out / "probes.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((out / "probes.json").read_text())["rows"]
    depths = {"join": (1, 2, 3, 4), "column 0": (1, 2), "column 1": (1, 2, 3, 4)}
    assert [(r["where"], r["depth"]) for r in rows] == [(where, d) for where, ds in depths.items() for d in ds]
    assert all(f"{r['accuracy']:.2%}" in printed and 0.1 < r["accuracy"] <= 1 for r in rows)
    assert [r["features"] for r in rows][:4] == [8, 8, 12, 12]
    joined = [r["accuracy"] for r in rows if r["where"] == "join"]
    assert joined[-1] > joined[0]  # the classes come apart with depth


# --- two sets of running statistics ----------------------------------------------------------------


def test_what_one_set_of_statistics_costs_the_deepest_column():
    """On real data: the shared set is not the column's own, and statistics taken for it bring its loss down."""
    data = sources.load("digits")
    split = sources.tensors(data)
    torch.manual_seed(0)
    model = FractalNet(10, 3, (8, 16, 16), in_channels=1, image_size=8, split_stats=False)
    study.fit(model, data, study.Recipe(6, 0.02, 64, nesterov=True, weight_decay=5e-4, shift=1), 0, Bar())
    shared = [block.unit(2, j).running_mean.clone() for block in model.blocks for j in range(4)]
    before = evaluate.scores(model, [(split.train_x, split.train_y)])["column 2"]["loss"]
    model.recalibrate(split.train_x.split(64), column=2)
    after = evaluate.scores(model, [(split.train_x, split.train_y)])["column 2"]["loss"]
    own = [block.unit(2, j).running_mean for block in model.blocks for j in range(4)]
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(shared, own, strict=True)]
    assert max(moved) > 0.1, moved
    assert after < before


def test_statistics_command(tmp_path, capsys, small):
    out = tmp_path / "statistics"
    assert main(["study", "statistics", "--epochs", "2", "--seeds", "7", "--out", str(out)]) == 0
    assert [f.name for f in out.iterdir()] == ["statistics.json"]
    found = json.loads((out / "statistics.json").read_text())
    recipe = {"lr": 0.02, "batch_size": 64, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "shift": 1}
    assert found["recipe"] == {"epochs": 2, **recipe} and [run["seed"] for run in found["runs"]] == [7]
    run = found["runs"][0]
    assert run["same_weights"]  # statistics do not act on training
    scores = run["scores"]
    assert set(scores) == {"one set", "two sets", "one set, recalibrated", "two sets, recalibrated"}
    assert scores["one set"] != scores["two sets"]
    one, two = scores["one set, recalibrated"], scores["two sets, recalibrated"]
    assert one["full"] == two["full"] and one["deepest column"] == two["deepest column"]
    assert f"{scores['one set']['full']['loss']:.4f}" in capsys.readouterr().out


# --- calls -----------------------------------------------------------------------------------------


def test_what_is_asked_for(monkeypatch):
    """By default what docs/studies.md has; and of a list each thing once."""
    asked = []
    for module, name in ((study, "depth"), (study, "statistics"), (probes, "run")):
        monkeypatch.setattr(module, name, lambda *arguments: asked.append(arguments))
    options = ["--columns", "2,1,2", "--kinds", "local,plain,local", "--epochs", "3", "--lr", "1e-3", "--seeds", "1,1"]
    calls = (["depth"], ["depth", *options, "--out", "x"], ["statistics"], ["probes", "--checkpoint", "m"])
    assert [main(["study", *argv]) for argv in calls] == [0] * 4
    assert asked == [
        ((1, 2, 3, 4, 5, 6), 40, (0,), 0.02, ("plain", "whole", "mixture"), Path("runs/depth")),
        ((2, 1), 3, (1,), 1e-3, ("local", "plain"), Path("x")),
        (20, (0, 1, 2), Path("runs/statistics")),
        (Path("m"), None, Path("runs/probes")),
    ]


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["study"], ["STUDY"]),
        (["study", "width"], ["'width'", "depth", "statistics", "probes"]),
        (["study", "depth", "--columns", "3,9"], ["--columns", "1 to 8", "'9'"]),
        (["study", "depth", "--columns", "3,"], ["--columns", ">= 1", "''"]),
        (["study", "depth", "--kinds", "plain,resnet"], ["--kinds", "plain, whole, local, mixture", "'resnet'"]),
        (["study", "depth", "--lr", "0"], ["--lr", "> 0", "'0'"]),
        (["study", "depth", "--lr", "inf"], ["--lr", "> 0", "'inf'"]),
        (["study", "depth", "--seed", "1"], ["--seed", "--seeds", "--columns"]),
        (["study", "probes"], ["--checkpoint"]),
        (["study", "probes", "--checkpoint", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    ],
)
def test_wrong_calls(argv, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(argv, words)
    assert not list(tmp_path.iterdir())


# --- documentation ---------------------------------------------------------------------------------


def test_documented_tables_are_the_results():
    root = Path(__file__).resolve().parent.parent
    results, text = root / "benchmarks" / "results" / "study", (root / "docs" / "studies.md").read_text()

    def found(name):
        return json.loads((results / f"{name}.json").read_text())

    folders = ("", "lr_0.005/", "lr_0.1/", "local/", "epochs_200/")
    tables = [study.depth_table(found(f"{name}depth")["runs"]) for name in folders]
    tables += [study.statistics_table(found(name)["runs"]) for name in ("statistics", "epochs_60/statistics")]
    tables.append(probes.table(found("probes")["rows"]))
    tables.append(anytime.exits_table(found("anytime")["rows"], found("anytime")["images"]))
    for table in tables:
        assert "\n".join(line.rstrip() for line in table.split("\n")) in text, table
