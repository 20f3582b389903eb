"""Running statistics taken anew, against averages computed with plain PyTorch in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fractalnet import FractalNet
from fractalnet.drop_path import full_path
from torch import nn

BATCHES = (5, 3, 6)
OPTIONS = {
    "fused": {},
    "bias and dropout": {"conv_bias": True, "dropout": (0.3, 0.2)},
    "one set": {"split_stats": False},
    "composed": {"activation": "silu", "dropout": (0.3, 0.2)},
    "stem": {"stem": "resnet"},
}


def moved(options, columns=3):
    """A network whose statistics, affine and counts are not those of a new one, in fp64 (numbers that fp32 holds, as
    the extracted column does), and batches."""
    size = 20 if options.get("stem") else 8
    net = FractalNet(5, columns, (4, 6), image_size=size, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    for _ in range(3):
        net(torch.randn(4, 3, size, size))
    loader = [torch.randn(n, 3, size, size, dtype=torch.float64) * 2 + 1 for n in BATCHES]
    return net.double(), loader


def means(inputs):
    """The averages over batches of mean and unbiased variance per channel."""
    mean = torch.stack([y.mean((0, 2, 3)) for y in inputs]).mean(0)
    return mean, torch.stack([y.var((0, 2, 3), correction=1) for y in inputs]).mean(0)


def statistics_of(net):
    """Every unit's running statistics and batch counts: {(block, set, column, step): ...}."""
    return {
        (b, s, u.column, u.step): [
            block.unit(u.column, u.step, s).running_mean.clone(),
            block.unit(u.column, u.step, s).running_var.clone(),
            block.num_batches_tracked[s, u.id].clone(),
        ]
        for b, block in enumerate(net.blocks)
        for s in range(len(block.running_mean))
        for u in block.schedule.units
    }


def others(net):
    """The state but for the blocks' statistics."""
    kept = ("running_mean", "running_var", "num_batches_tracked")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    return {k: v for k, v in state.items() if not (k.startswith("blocks.") and k.endswith(kept))}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("column", [0, 2])
def test_a_column_against_hooks_on_the_extracted_one(name, column):
    net, loader = moved(OPTIONS[name])
    before, rest = statistics_of(net), others(net)
    plain = net.extract_column(column).train()
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)][int(name == "stem") :]
    seen = {m: [] for m in norms}
    for module in norms:
        module.register_forward_pre_hook(lambda m, inputs: seen[m].append(inputs[0]))
    with torch.no_grad():
        for x in loader:
            plain(x)
    net.eval().recalibrate(((x, "label") for x in loader), column=column)
    inputs = iter(seen.values())
    last = len(net.blocks[0].running_mean) - 1
    expected = dict(before)
    for b in range(2):
        for j in range(2**column):
            expected[b, last, column, j] = [*means(next(inputs)), torch.tensor(len(loader))]
    assert next(inputs, None) is None
    for key, got in statistics_of(net).items():
        exact = expected[key] is before[key]  # another column's, or the full network's
        for value, want in zip(got, expected[key], strict=True):
            assert torch.equal(value, want) if exact else torch.allclose(value, want.to(value), 1e-10, 1e-10), key
    assert same(others(net), rest)


def test_the_full_network_against_the_recursive_rule():
    net, loader = moved({"conv_bias": True}, columns=2)
    before, rest = statistics_of(net), others(net)
    seen = {}

    def conv(block, b, c, j, z):
        unit = block.unit(c, j)
        y = F.conv2d(z, unit.weight, unit.conv_bias, padding=1)
        seen.setdefault((b, c, j), []).append(y)
        return F.batch_norm(y, None, None, unit.gamma, unit.beta, training=True, eps=block.eps).relu()

    with torch.no_grad():
        for z in loader:
            for b, block in enumerate(net.blocks):
                deep = conv(block, b, 1, 1, conv(block, b, 1, 0, z))
                z = (F.max_pool2d(conv(block, b, 0, 0, z), 2) + F.max_pool2d(deep, 2)) / 2
    net.eval().recalibrate(loader)
    for (b, s, c, j), got in statistics_of(net).items():
        expected = [*means(seen[b, c, j]), torch.tensor(len(loader))] if s == 0 else before[b, s, c, j]
        for value, want in zip(got, expected, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10, check_dtype=False)
    assert same(others(net), rest)


def test_the_stem_belongs_to_the_full_network():
    net, loader = moved(OPTIONS["stem"])
    norm = next(m for m in net.stem.modules() if isinstance(m, nn.BatchNorm2d))
    inputs = []
    hook = norm.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    net.recalibrate(loader)
    hook.remove()
    mean, var = means(inputs)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_what_stays(name, training):
    net, loader = moved(OPTIONS[name])
    net.train(training)
    net.blocks[1].eval()  # a mode of its own
    options = [(m.momentum, m.dropout) for m in net.blocks]
    modes = [m.training for m in net.modules()]
    state, grads = torch.get_rng_state(), torch.is_grad_enabled()
    assert net.recalibrate(loader, column=1) is net
    net.recalibrate(loader)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grads
    assert [(m.momentum, m.dropout) for m in net.blocks] == options and options[0][0] == 0.1
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())


def test_the_same_batch_again_is_the_batch():
    """In evaluation the network then computes, up to the unbiased variance, what it computes in training."""
    net, loader = moved({})
    x = loader[0]
    for column in (None, 1):
        net.recalibrate([x, x], column)
        net.train()
        want = net(x, column=column) if column is not None else net(x, path=full_path(2, 3))
        net.recalibrate([x, x], column)  # the line above moved them
        torch.testing.assert_close(net.eval()(x, column=column), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("loader", [[], [torch.zeros(3, 3, 8, 8, dtype=torch.float64), "no images"]])
def test_errors_leave_the_statistics(loader):
    net, _ = moved({})
    before = copy.deepcopy(net.state_dict())
    with (
        pytest.raises(ValueError, match="recalibrate: expected a loader of at least one batch")
        if not loader
        else (pytest.raises(TypeError))
    ):
        net.recalibrate(loader)
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert net.training and net.blocks[0].momentum == 0.1


@pytest.mark.parametrize("column", [-1, 3, "deepest", 1.0, True])
def test_wrong_column(column):
    net, loader = moved({})
    with pytest.raises(ValueError, match="recalibrate: expected column None or from 0 to 2, got"):
        net.recalibrate(loader, column)


def test_dropout_anywhere_draws_nothing():
    net = FractalNet(5, 2, (4,), image_size=8)
    net.head = nn.Sequential(nn.Dropout(0.5), net.head)
    images, state = torch.randn(4, 3, 8, 8), torch.get_rng_state()
    net.recalibrate([images])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loader, got", [(3, "int"), ([3], "int"), (["a"], "str"), ([[]], "list")])
def test_what_is_no_loader(loader, got):
    net = FractalNet(5, 2, (4,), image_size=8)
    with pytest.raises(TypeError, match=f"recalibrate: expected loader to .* got {got}"):
        net.recalibrate(loader)
