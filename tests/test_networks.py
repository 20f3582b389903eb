"""The options of the networks, their errors, columns and parameter counts; the plain networks."""

import copy
import inspect
from types import SimpleNamespace

import fractalnet
import pytest
import torch
import torch.nn.functional as F
from fractalnet import FractalNet, PlainNet
from fractalnet.composed import ComposedBlock
from fractalnet.drop_path import column_path, full_path
from fractalnet.fused import ACTIVATIONS, FractalBlock

COMPOSED = {"activation": "silu", "column_widths": (1, 1 / 2, 1 / 4), "kernel_mix": 0.5}


@pytest.mark.parametrize("place", ["conv", "activation", "block"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_place_of_dropout(activation, place):
    net = FractalNet(5, 1, (6,), image_size=8, activation=activation, dropout=(0.4,), dropout_place=place)
    block, unit = net.blocks[0], net.blocks[0].unit(0, 0)
    x, path = torch.randn(16, 3, 8, 8), full_path(1, 1)

    def drop(y, at):
        return F.dropout(y, 0.4) if at == place else y

    torch.manual_seed(3)
    y = drop(F.conv2d(x, unit.weight, padding=1), "conv")
    y = drop(ACTIVATIONS[activation]()(F.batch_norm(y, None, None, training=True)), "activation")
    expected = drop(F.max_pool2d(y, 2), "block")
    torch.manual_seed(3)
    torch.testing.assert_close(block(x, path.keep[0], path.alone), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(block, FractalBlock) == (activation == "relu" and place != "activation")
    block.eval()
    assert torch.equal(*(block(x, path.keep[0], path.alone) for _ in range(2)))
    names = [type(layer).__name__ for layer in block.column_layers(0, 0)]
    assert names.index("Dropout") == {"conv": 1, "activation": 3, "block": 4}[place]


EXTRACTED = [
    {"column_widths": (1, 1 / 2, 1 / 4), "kernel_mix": 0.5, "activation": "mish", "dropout": (0.1, 0.2)},
    {"column_widths": (1 / 2, 1, 1 / 4), "pool": "avg", "conv_bias": True, "split_stats": False},
    {"stem": "resnet", "last_pool": False, "dropout": (0.1, 0.2), "dropout_place": "block", "image_size": 32},
    {"activation": "leaky_relu", "dropout": (0.0, 0.2), "dropout_place": "activation", "pool_order": "after_join"},
]


@pytest.mark.parametrize("options", EXTRACTED)
def test_extracted_column_is_the_column(options):
    net = FractalNet(7, 3, (8, 12), **{"image_size": 8, **options})
    for _ in range(6):
        net(torch.randn(8, 3, net.image_size, net.image_size))
    other = FractalNet(7, 3, (8, 12), **{"image_size": 8, **options})
    other.load_state_dict(net.state_dict())
    net.eval(), other.eval()
    x = torch.randn(5, 3, net.image_size, net.image_size)
    assert torch.equal(net(x), other(x))
    for column, depth, logits in net.anytime(x):
        plain = net.extract_column(column)
        assert all(type(m).__module__.startswith("torch.nn") for m in plain.modules())
        torch.testing.assert_close(plain(x), logits, rtol=1e-4, atol=1e-5)
        assert sum(isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1) for m in plain) == depth


def test_stem_and_last_pool():
    net = FractalNet(7, 2, (4, 6), image_size=32, stem="resnet", last_pool=False, in_channels=1).eval()
    x = torch.randn(2, 1, 32, 32)
    conv, bn = net.stem[0].conv, net.stem[0].bn
    y = F.conv2d(x, conv.weight, stride=2, padding=3)
    y = F.max_pool2d(F.relu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)), 3, 2, 1)
    assert y.shape == (2, 64, 8, 8)
    for block, size in zip(net.blocks, (4, 4), strict=True):
        y = block(y, full_path(1, 2).keep[0], torch.tensor(0))
        assert y.shape[2:] == (size, size)
    torch.testing.assert_close(net(x), net.head(y.mean((2, 3))))
    assert net.depth() == 5 and net.depth(0) == 3
    FractalNet(7, 2, (4, 6), image_size=5, stem="resnet", last_pool=False)(torch.randn(4, 3, 5, 5)).sum().backward()


def test_autocast_and_per_sample_training():
    net = FractalNet(7, 3, (8, 8), image_size=4, granularity="sample", **COMPOSED)
    x = torch.randn(6, 3, 4, 4)
    for _ in range(5):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert all(bool(b.isfinite().all()) for b in net.buffers())
    net.eval()
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x).float(), expected, rtol=0.1, atol=0.1)


def test_compiled_composed_network():
    """One graph in evaluation, exported too, and in training where everything runs; else one between its blocks.

    A compiler takes a second for a few units: what is of several blocks has two columns, and joins of joins one block.
    """
    thin = {**COMPOSED, "column_widths": (1, 1 / 2)}
    net = FractalNet(5, 2, (4, 8), image_size=8, **thin).eval()
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))
    torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x, column=1), net(x, column=1))
    net = FractalNet(5, 3, (4,), image_size=8, **COMPOSED).eval()
    whole = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), net(x))
    plain = copy.deepcopy(net.train())
    for path in (full_path(1, 3), column_path(1, 3, 1), net.sample_path(2)):
        out, expected = whole(x, path, dense=True), plain(x, path)
        torch.testing.assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, COMPOSED], ids=["fused", "composed"])
def test_channels_last_by_to(options):
    """A habit with vision models: weights, which are in that format as convolutions see them, and gradients stay."""
    net = FractalNet(5, 3, (8, 12), image_size=8, **options)
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in net.parameters()]
    assert net.to(memory_format=torch.channels_last) is net
    for p, (value, grad) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
    for p in net.blocks.parameters():
        assert p.is_contiguous() and p.grad.is_contiguous()
    net.zero_grad()
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad.is_contiguous() for p in net.blocks.parameters())


def test_info():
    net = FractalNet(5, 2, (4, 8), image_size=8, activation="silu", column_widths=(1, 0.5), kernel_mix=0.5)
    lines = net.info().splitlines()
    assert lines[0].startswith("block 0: composed (activation silu is not fused: the kernels compute ReLU; columns of ")
    assert "widths 8, 4 are not fused" in lines[1] and "kernel_mix 0.5 is not fused" in lines[1]
    options = {"dropout": (0.0, 0.1), "dropout_place": "activation", "column_widths": (1, 1)}
    lines = FractalNet(5, 2, (4, 8), image_size=8, **options).info().splitlines()
    assert lines[0] == "block 0: fused" and "dropout after activations" in lines[1]


def test_eps_may_be_zero():
    assert FractalNet(5, 1, (4,), image_size=8, eps=0).blocks[0].eps == 0


WRONG = {
    "columns": (0, 9, 2.0, True),
    "num_classes": (0, "ten"),
    "channels": ((), (4, 0), (4, 2.5), 4, "ab"),
    "in_channels": (0, None),
    "image_size": (3, 8.0),
    "activation": ("gelu", None, ["relu"]),
    "dropout": ((0.1,), 0.1, "ab"),
    r"dropout\[1\]": ((0.1, 1.0), (0.1, "x")),
    "dropout_place": ("input",),
    "local_drop": (-0.1, "a"),
    "global_ratio": (1.1,),
    "granularity": ("pixel",),
    "pool": ("min", None),
    "pool_order": ("before",),
    "stem": ("vgg", True),
    "column_widths": ((1,), (1, 0), (1, 2), (1, 0.3), 1),
    "kernel_mix": (0, 1.5, None),
    "init": ("zeros",),
    "momentum": (-1, "a"),
    "eps": (-1e-5, None, float("inf")),
}


@pytest.mark.parametrize("argument, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_errors(argument, value):
    options = {
        "num_classes": 7,
        "columns": 2,
        "channels": (4, 4),
        "image_size": 8,
        argument.removesuffix(r"\[1\]"): value,
    }
    with pytest.raises(ValueError, match=rf"FractalNet: expected {argument} .*, got "):
        FractalNet(**options)


def test_errors_of_blocks_and_plain_networks():
    with pytest.raises(ValueError, match="FractalNet: expected image_size >= 13 for the pools, got 12"):
        FractalNet(7, 2, (4, 4), image_size=12, stem="resnet")
    with pytest.raises(ValueError, match="PlainNet: expected depth_per_block a whole number >= 1, got 0"):
        PlainNet(7, 0, (4, 4))
    with pytest.raises(ValueError, match="PlainNet: expected channels a positive width per block, got"):
        PlainNet(7, 1, ())
    with pytest.raises(ValueError, match="PlainNet: expected bn_affine True or False, got 1"):
        PlainNet(7, 1, (4,), bn_affine=1)
    block, path = ComposedBlock(3, (4, 2)), full_path(1, 2)
    with pytest.raises(ValueError, match=r"FractalBlock: expected x with H and W >= 2 for pooling, got \[1, 4\]"):
        FractalNet(7, 2, (4,), pool="avg")(torch.randn(2, 3, 1, 4))
    with pytest.raises(ValueError, match=r"ComposedBlock: expected x of shape \[N, 3, H, W\], .* got \[2, 4, 8, 8\]"):
        block(torch.randn(2, 4, 8, 8), path.keep[0], path.alone)
    with pytest.raises(ValueError, match=r"ComposedBlock: expected keep bool of shape \[2, 2\], got"):
        block(torch.randn(2, 3, 8, 8), path.keep[0, :1], path.alone)
    with pytest.raises(ValueError, match="FractalNet: expected last_pool True or False, got 'no'"):
        FractalNet(7, 2, (4,), last_pool="no")
    with pytest.raises(ValueError, match="expected the path to keep a branch of the join of row 1, got none"):
        block(torch.randn(2, 3, 8, 8), torch.zeros(2, 2, dtype=torch.bool), path.alone)
    with pytest.raises(ValueError, match="ComposedBlock: expected more than 1 value per channel when training"):
        ComposedBlock(3, (4, 2), pool=None)(torch.randn(1, 3, 1, 1), path.keep[0], path.alone)


@pytest.mark.parametrize(
    "options", [{}, {"pool": "avg", "dropout": (0.1, 0.0)}, {"stem": "resnet", "last_pool": False}]
)
def test_plain_network_is_the_deepest_column(options):
    options = {"image_size": 16, "conv_bias": True, **options}
    column = FractalNet(7, 3, (4, 6), **options)
    column(torch.randn(4, 3, 16, 16))
    column = column.extract_column(2)
    plain = PlainNet(7, 4, (4, 6), **options)
    for mine, theirs in ((plain.parameters(), column.parameters()), (plain.buffers(), column.buffers())):
        for a, b in zip(mine, theirs, strict=True):
            a.data.copy_(b)
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(plain.eval()(x), column.eval()(x), rtol=1e-4, atol=1e-5)
    for net in (plain, column):
        net.train()
        torch.manual_seed(5)
        net.result = net(x)
    torch.testing.assert_close(plain.result, column.result, rtol=1e-4, atol=1e-5)
    assert plain.depth() == 8 + ("stem" in options)


FANS = ((3 * 49, 64 * 49), (64 * 9, 32 * 9), (32 * 9, 128 * 9))


@pytest.mark.parametrize("init", ["xavier", "he"])
def test_options_of_a_plain_network(init):
    """As a fractal network takes them, and unless they are given the same ones."""
    options = {"stem": "resnet", "conv_bias": True, "init": init, "momentum": 0.3, "eps": 0.01}
    net = PlainNet(5, 1, (32, 128), **options)  # of these fans, after the stem's
    for (step, *_), fans in zip((net.stem, *net.blocks), FANS, strict=True):
        std = (2 / fans[0]) ** 0.5 if init == "he" else (2 / sum(fans)) ** 0.5
        assert step.conv.weight.std().item() == pytest.approx(std, rel=0.04)
        assert not step.conv.bias.any() and (step.bn.momentum, step.bn.eps) == (0.3, 0.01)
    fractal, plain = (inspect.signature(kind).parameters for kind in (FractalNet, PlainNet))
    assert all(fractal[name].default == p.default for name, p in plain.items() if name != "depth_per_block")


def parameters(level, source, joined, net):
    """Of f_level that reads `source` channels and ends in a join of `joined`, by the recursive rule."""
    width = net.widths[len(net.widths) - level]
    spatial = round(net.mix * width)
    total = spatial * source * 9 + (width - spatial) * source + 2 * width + (width < joined) * width * joined
    if level > 1:
        middle = max(net.widths[1 - level :])
        total += parameters(level - 1, source, middle, net) + parameters(level - 1, middle, joined, net)
    return total


def network(channels, shares, classes, mix=1.0, stem=False):
    total, source = (64 * 3 * 49 + 128, 64) if stem else (0, 3)
    for width in channels:
        widths = [int(width * share) for share in shares]
        total += parameters(len(shares), source, max(widths), SimpleNamespace(widths=widths, mix=mix))
        source = max(widths)
    return total + (source + 1) * classes


def plain(channels, depth, classes):
    total = 0
    for source, width in zip((3, *channels), channels, strict=False):
        total += source * width * 9 + (depth - 1) * width**2 * 9 + depth * 2 * width
    return total + (channels[-1] + 1) * classes


ULTRA = (16, 32, 64, 128, 128)
COUNTS = {
    "fractalnet20": network((64, 128, 256, 512, 512), (1, 1, 1), 10),
    "fractalnet40": network((128, 256, 512, 1024, 1024), (1, 1 / 2, 1 / 4, 1 / 8), 100, mix=0.5),
    "fractalnet34": network((128, 256, 512, 1024), (1, 1, 1, 1), 1000, stem=True),
    **{f"fractal_c{c}": network(ULTRA, (1,) * c, 100) for c in range(1, 9)},
    **{f"plain_c{c}": plain(ULTRA, 2 ** (c - 1), 100) for c in range(1, 9)},
}


@pytest.mark.parametrize("name", fractalnet.list_models())
def test_parameter_counts(name):
    with torch.device("meta"):
        model = fractalnet.create(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    known = {"fractalnet20": 33_724_618, "fractalnet40": 27_549_300, "fractal_c3": 2_125_204}
    assert COUNTS[name] == known.get(name, COUNTS[name])
    depth = {"fractalnet20": 20, "fractalnet40": 40, "fractalnet34": 33}  # 34 with the classifier
    assert model.image_size == (224 if name == "fractalnet34" else 32)
    unpooled = [not name.startswith("plain") and block.pool is None for block in model.blocks]
    assert unpooled == [False] * (len(unpooled) - 1) + [name == "fractalnet34"]
    assert model.depth() == (depth[name] if name in depth else 5 * 2 ** (int(name[-1]) - 1))


@torch.no_grad()
def test_the_deepest_network_runs():
    net = fractalnet.create("fractal_c8").eval()
    out = net(torch.randn(1, 3, 32, 32))
    assert net.depth() == 640 and out.shape == (1, 100) and bool(out.isfinite().all())
