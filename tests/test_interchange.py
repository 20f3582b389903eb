"""Weights in other implementations' naming, against module trees of that naming; Hugging Face's folders.

The trees below were written for these tests: the names of the public implementations, and the paper's recursive rule.
"""

import inspect
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from fractalnet import FractalNet, interchange
from fractalnet.drop_path import full_path
from torch import nn

CONFIG = {"num_classes": 7, "channels": (4, 6), "image_size": 8, "pool_order": "after_join"}


class Unit(nn.Module):
    def __init__(self, c_in, c_out, bias, affine):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """f_{C+1}(z) = [(f_C o f_C)(z)] + [conv(z)], all branches that meet in one mean; rows count the deepest's convs."""

    def __init__(self, columns, c_in, c_out, **options):
        super().__init__()
        self.depth, rows = columns, 2 ** (columns - 1)
        spans = [rows >> c for c in range(columns)]
        made = {
            (c, row): Unit(c_in if row == span - 1 else c_out, c_out, **options)
            for c, span in enumerate(spans)
            for row in range(span - 1, rows, span)
        }
        self.name(made, columns, rows)

    def branches(self, c, first, last, z):
        """What column c and all deeper ones bring to the join of row `last`, when z enters at row `first`."""
        own = self.unit(c, last)(z)
        if c == self.depth - 1:
            return [own]
        middle = (first + last) // 2
        z = torch.stack(self.branches(c + 1, first, middle, z)).mean(0)
        return [own, *self.branches(c + 1, middle + 1, last, z)]

    def forward(self, x):
        return torch.stack(self.branches(0, 0, 2 ** (self.depth - 1) - 1, x)).mean(0)


class PtBlock(Block):
    def name(self, made, columns, rows):
        self.columns = nn.ModuleList(nn.ModuleList(made.get((c, r)) for r in range(rows)) for c in range(columns))

    def unit(self, c, row):
        return self.columns[c][row]


class CvBlock(Block):
    def name(self, made, columns, rows):
        self.blocks = nn.Sequential()
        for r in range(rows):
            level = nn.Sequential()
            for number, c in enumerate(range(columns - 1, -1, -1), start=1):  # deepest first
                if (c, r) in made:
                    level.add_module(f"subblock{number}", made[c, r])
            self.blocks.add_module(f"block{r + 1}", level)

    def unit(self, c, row):
        return self.blocks.get_submodule(f"block{row + 1}.subblock{self.depth - c}")


class PtNet(nn.Module):
    def __init__(self, columns, bias=False, affine=True):
        super().__init__()
        options = {"bias": bias, "affine": affine}
        first, second = PtBlock(columns, 3, 4, **options), PtBlock(columns, 4, 6, **options)
        self.net = nn.Sequential(first, nn.MaxPool2d(2), second, nn.MaxPool2d(2))
        self.fc = nn.Linear(6, 7)

    def forward(self, x):
        return self.fc(self.net(x).mean((2, 3)))


class CvNet(nn.Module):
    def __init__(self, columns, bias=False, affine=True):
        super().__init__()
        self.features = nn.Sequential()
        for number, (c_in, c_out) in enumerate([(3, 4), (4, 6)], start=1):
            unit = nn.Sequential()
            unit.add_module("block", CvBlock(columns, c_in, c_out, bias=bias, affine=affine))
            unit.add_module("pool", nn.MaxPool2d(2))
            self.features.add_module(f"unit{number}", unit)
        self.output = nn.Linear(6, 7)

    def forward(self, x):
        return self.output(self.features(x).mean((2, 3)))


THEIRS = {"pt.fractalnet": PtNet, "pytorchcv": CvNet}
BOTH = pytest.mark.parametrize("naming", THEIRS)


def moved(net):
    """In fp64 and evaluation, with statistics and affines that differ from unit to unit."""
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.3, 1.5)
                module.bias.normal_()
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    return net.eval()


def ours(columns=3, **options):
    return FractalNet(columns=columns, **{**CONFIG, **options}).double().eval()


def assert_same_logits(a, b, **call):
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = b(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(a(x, **call), expected, rtol=1e-10, atol=1e-12)


# --- other implementations ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("options", [{}, {"conv_bias": True}, {"bn_affine": False}, {"split_stats": False}])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_load(naming, columns, options, given):
    theirs = moved(THEIRS[naming](columns, options.get("conv_bias", False), options.get("bn_affine", True)))
    net = ours(columns, **options)
    interchange.load(net, theirs.state_dict(), naming if given else None)
    assert_same_logits(net, theirs)


def test_every_column_has_their_statistics():
    theirs, net = moved(PtNet(3)), ours()
    interchange.load(net, theirs.state_dict())
    for c in range(3):
        blocks = (theirs.net[0], theirs.net[2])
        column = [[unit for unit in block.columns[c] if unit is not None] + [nn.MaxPool2d(2)] for block in blocks]
        alone = nn.Sequential(*column[0], *column[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), theirs.fc)
        assert_same_logits(net, alone, column=c)
    assert bool((net.blocks[0].num_batches_tracked == 3).all())


@BOTH
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_save(naming, columns):
    net = ours(columns)
    for path in (full_path(len(net.blocks), columns), None, net.sample_path(4, torch.Generator().manual_seed(1))):
        net.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64), path=path)
    net.eval()
    with torch.no_grad():
        net.blocks[0].running_mean[1].fill_(float("nan"))  # of columns alone: has no say
    state = interchange.save(net, naming)
    theirs = THEIRS[naming](columns).double().eval()
    assert {name: t.dtype for name, t in state.items()} == {name: t.dtype for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    assert_same_logits(net, theirs)
    assert all(t.is_contiguous() for t in state.values())
    before = {name: t.clone() for name, t in state.items()}
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.zero_()
    assert all(torch.equal(t, before[name]) for name, t in state.items())  # copies


@BOTH
def test_statistics_that_the_full_network_borrows(naming):
    """Of units that ran in steps of a column alone only, evaluation takes theirs; so does the file."""
    net, theirs = ours(2), THEIRS[naming](2).double().eval()
    for c in (0, 1, 1):
        net.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64), column=c)
    net.eval()
    state = interchange.save(net, naming)
    theirs.load_state_dict(state)
    assert_same_logits(net, theirs)
    counts = [int(t) for name, t in state.items() if name.endswith("num_batches_tracked")]
    assert set(counts) == {1, 2}


@BOTH
@pytest.mark.parametrize("options", [{}, {"conv_bias": True, "bn_affine": False}])
def test_round_trip(naming, options):
    theirs = moved(THEIRS[naming](3, options.get("conv_bias", False), options.get("bn_affine", True))).state_dict()
    net = ours(**options)
    interchange.load(net, theirs)
    again = interchange.save(net, naming)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[name], t) and again[name].dtype == t.dtype for name, t in theirs.items())


def test_names():
    """As the public implementations have them: columns 0 (shallow) and 2 of three, in the second block."""
    net = ours()
    pt, cv = (interchange.save(net, naming) for naming in THEIRS)
    unit = net.blocks[1].unit
    assert torch.equal(pt["net.2.columns.0.3.conv.weight"], unit(0, 0).weight)
    assert torch.equal(cv["features.unit2.block.blocks.block4.subblock3.conv.weight"], unit(0, 0).weight)
    assert torch.equal(pt["net.2.columns.1.1.conv.weight"], unit(1, 0).weight)
    assert torch.equal(cv["features.unit2.block.blocks.block2.subblock2.conv.weight"], unit(1, 0).weight)
    assert torch.equal(pt["net.2.columns.2.2.conv.weight"], unit(2, 2).weight)
    assert torch.equal(cv["features.unit2.block.blocks.block3.subblock1.conv.weight"], unit(2, 2).weight)
    assert torch.equal(pt["fc.bias"], net.head.bias) and torch.equal(cv["output.bias"], net.head.bias)
    assert len(pt) == len(cv) == 2 * 7 * 6 + 2


def test_files_without_counters_and_in_half():
    theirs, net = moved(CvNet(3)), ours()
    state = {name: t.half() for name, t in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    interchange.load(net, state)
    theirs.load_state_dict(state, strict=False)
    assert_same_logits(net, theirs)
    assert bool((net.blocks[1].num_batches_tracked == 0).all())


@BOTH
def test_files_that_do_not_fit(naming):
    state = THEIRS[naming](3).double().state_dict()
    conv, *_, head = state
    cases = [
        (ours(), {**state, "optimizer": torch.zeros(1)}, "unknown optimizer"),
        (ours(), {name: t for name, t in state.items() if name != head}, f"missing {head}"),
        (ours(), {**state, conv: torch.zeros(3, 4, 3, 3)}, f"{conv}: expected shape .4, 3, 3, 3., got .3, 4, 3, 3."),
        (ours(num_classes=9), state, f"{head}: expected shape .9., got .7."),
        (ours(channels=(4, 6, 6)), state, "missing .*; and 30 more"),
        (ours(columns=2), state, "unknown .*; and .* more"),
        (ours(conv_bias=True), state, "missing .*conv.bias"),
        (ours(bn_affine=False), state, "unknown .*bn.weight"),
    ]
    for net, wrong, words in cases:
        before = {name: t.clone() for name, t in net.state_dict().items()}
        with pytest.raises(ValueError, match=f"load: the state_dict does not fit .{naming}.: .*{words}") as raised:
            interchange.load(net, wrong)
        assert str(raised.value).count(";") <= interchange.SHOWN
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())  # none is copied


def test_counts_that_a_file_lacks_are_0():
    a, b = (FractalNet(7, 2, (4,), image_size=8, pool_order="after_join") for _ in range(2))
    state = {k: v for k, v in interchange.save(a, "pytorchcv").items() if not k.endswith("num_batches_tracked")}
    b.blocks[0].num_batches_tracked.fill_(9)
    interchange.load(b, state)
    assert not b.blocks[0].num_batches_tracked.any()


def test_what_is_another_function():
    state = CvNet(3).double().state_dict()
    for options, words in (
        ({"pool_order": "before_join"}, "after_join.*got pool_order='before_join'"),
        ({"eps": 0.1}, "eps=1e-05"),
    ):
        with pytest.raises(ValueError, match=f"load: expected model with .*{words}"):
            interchange.load(ours(**options), state)
        with pytest.raises(ValueError, match=f"save: expected model with .*{words}"):
            interchange.save(ours(**options), "pytorchcv")
    for options in ({"pool": "avg"}, {"last_pool": False}):
        with pytest.raises(ValueError, match=f"save: expected model with max-pools .*, got {next(iter(options))}="):
            interchange.save(ours(**options), "pytorchcv")
    for options, words in (
        ({"stem": "resnet", "image_size": 32}, "without a stem, as pytorchcv has none"),
        ({"activation": "silu"}, "of fused blocks, as pytorchcv has, got block 0: composed"),
    ):
        with pytest.raises(ValueError, match=f"load: expected model {words}"):
            interchange.load(ours(**options), state)
        with pytest.raises(ValueError, match=f"save: expected model {words}"):
            interchange.save(ours(**options), "pytorchcv")
    with pytest.raises(TypeError, match="save: expected model a FractalNet, got Linear"):
        interchange.save(torch.nn.Linear(1, 1), "pytorchcv")
    with pytest.raises(ValueError, match="expected a tensor, got str"):
        interchange.load(ours(), state | {next(iter(state)): "nothing"})
    with pytest.raises(ValueError, match="save: expected naming one of pt.fractalnet, pytorchcv, got 'keras'"):
        interchange.save(ours(), "keras")
    for nothing in ({}, {"weight": torch.zeros(1)}):
        with pytest.raises(ValueError, match="load: expected keys of pt.fractalnet .*, got (none|weight)"):
            interchange.load(ours(), nothing)


# --- Hugging Face ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Hugging Face's mixin, without a network."""
    module = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", True)

    def connect(*_):
        raise AssertionError("a local folder needs no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return module


EVERYTHING = {
    "num_classes": 7,
    "columns": 2,
    "channels": (4, 6),
    "in_channels": 2,
    "image_size": 16,
    "dropout": (0.0, 0.25),
    "local_drop": 0.2,
    "global_ratio": 0.25,
    "granularity": "sample",
    "pool_order": "after_join",
    "conv_bias": True,
    "bn_affine": False,
    "split_stats": False,
    "init": "he",
    "momentum": None,
    "eps": 0.001,
}


def test_hub_folder(hub, tmp_path):
    parameters = inspect.signature(FractalNet).parameters
    assert all(EVERYTHING[name] != p.default for name, p in parameters.items() if name in EVERYTHING)
    net = FractalNet(7, 2, **{name: v for name, v in EVERYTHING.items() if name not in ("num_classes", "columns")})
    net(torch.randn(3, 2, 16, 16))
    net.save_pretrained(tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config.keys() == parameters.keys()
    expected = {name: list(v) if isinstance(v, tuple) else v for name, v in EVERYTHING.items()}
    assert {name: config[name] for name in EVERYTHING} == expected
    loaded = FractalNet.from_pretrained(tmp_path / "net")
    assert not loaded.training and loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert [vars(block)["dropout"] for block in loaded.blocks] == [0.0, 0.25]
    x = torch.randn(2, 2, 16, 16)
    assert torch.equal(loaded(x), net.eval()(x))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


def test_hub_folder_with_missing_or_other_weights(hub, tmp_path):
    from safetensors.torch import load_file, save_file

    FractalNet(columns=2, **CONFIG).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({name: t for name, t in state.items() if name != "head.bias"}, file)
    with pytest.raises(RuntimeError, match="head.bias"):
        FractalNet.from_pretrained(tmp_path)
    save_file({**state, "head.bias": torch.zeros(8)}, file)
    with pytest.raises(RuntimeError, match="head.bias"):
        FractalNet.from_pretrained(tmp_path)


def test_without_huggingface_hub():
    """The library works, and says what is missing, where the package is not."""
    program = """
import sys
sys.modules["huggingface_hub"] = None
import fractalnet, torch
net = fractalnet.FractalNet(7, 2, (4,), image_size=8).eval()
assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)
for call in (lambda: net.save_pretrained("x"), lambda: fractalnet.FractalNet.from_pretrained("x")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    for line, op in zip(done.stdout.splitlines(), ("save_pretrained", "from_pretrained"), strict=True):
        assert line.startswith(f"{op}: missing huggingface_hub (")
        assert line.endswith("pip install fractal-kernels[export]")
