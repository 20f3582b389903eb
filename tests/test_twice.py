"""What a step may do twice: differentiate (gradient penalties, Hessians), also for many gradients at once, and call a
module in both modes."""

from __future__ import annotations

import copy

import fractalnet
import pytest
import torch
from fractalnet.composed import ComposedBlock
from fractalnet.drop_path import column_path
from torch import Tensor, nn
from torch.autograd import gradgradcheck

import fractal_kernels as fk
from fractal_kernels.ops.conv import conv2d_1x1_pooled

LAST = torch.channels_last
MASKS = {
    "none": None,
    "batch": torch.tensor([True, False]),
    "sample": torch.tensor([[True, False, True], [True, True, False]]),
}


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def penalty(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a gradient penalty, the squared gradient of a sum: its gradients by x and by all parameters."""
    (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    by = [x, *net.parameters()]
    return list(torch.autograd.grad(grad.square().sum(), by, materialize_grads=True))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_penalty_is_that_of_plain_modules(dtype, mode):
    """Of what `fuse` makes of a network, activations kept or computed again; the incoming gradient is constant."""
    torch.manual_seed(0)
    step = [m for _ in range(2) for m in (nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
    net = nn.Sequential(*step).to(dtype).to(memory_format=LAST).train(mode)
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias)
    x = torch.randn(4, 16, 6, 6).to(dtype).to(memory_format=LAST).requires_grad_()
    kept, again = copy.deepcopy(net), copy.deepcopy(net)
    assert len(fk.fuse(kept).fused) == 2 and len(fk.fuse(again, recompute=True).fused) == 2
    true = penalty(copy.deepcopy(net).double(), x.detach().double().requires_grad_())
    eager = penalty(net, x)
    for fused in (kept, again):
        for g, e, t in zip(penalty(fused, x), eager, true, strict=True):
            rounding = 4 * (e - t).abs().max() if dtype == torch.bfloat16 else 1e-5 * t.abs().max()
            assert g.dtype == e.dtype and (g - t).abs().max() <= rounding


@pytest.mark.parametrize("stats", ["all", "live"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pool", [None, "before", "after"])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_of_joins(training, pool, mask, stats):
    torch.manual_seed(0)
    means = [torch.randn(2, dtype=torch.float64) for _ in range(2)]
    variances = [torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(2)]
    for reduction, activation in (("mean", "branch"), ("sum", "output"), ("mean", "none")):

        def join(a: Tensor, b: Tensor, *affine: Tensor) -> Tensor:
            options = {"reduction": reduction, "activation": activation, "pool": pool, "stats": stats}  # noqa: B023
            running = [r.clone() for r in means], [r.clone() for r in variances]
            return fk.bn_relu_join(
                [a, b], affine[:2] or None, affine[2:] or None, *running, MASKS[mask], training, **options
            )

        affine = [double(2) for _ in range(0 if reduction == "sum" else 4)]
        assert gradgradcheck(join, [double(3, 2, 2, 3), double(3, 2, 2, 3), *affine], fast_mode=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pool", [None, "before", "after"])
def test_second_derivative_of_a_mean(pool, mask):
    """It is linear but for the places of maxima: a constant gradient's gradient is zero, and another's goes on."""
    inputs = [double(3, 2, 4, 5), double(3, 2, 4, 5)]
    assert gradgradcheck(lambda *ys: fk.masked_mean_join(ys, MASKS[mask], pool=pool), inputs)
    (grad,) = torch.autograd.grad(
        fk.masked_mean_join(inputs, MASKS[mask], pool=pool).sum(), inputs[0], create_graph=True
    )
    assert not grad.requires_grad


def test_second_derivatives_of_convolutions(cpu_backend):
    torch.manual_seed(0)
    x, ours, thin = double(2, 16, 3, 4), double(16, 16, 3, 3), double(3, 16, 1, 1)

    def step(x: Tensor, w: Tensor) -> Tensor:
        x, w = (t.to(memory_format=LAST) for t in (x, w))
        return fk.conv_bn_relu(x, w, None, None, None, None, True)

    assert gradgradcheck(step, [x, ours], fast_mode=True)
    assert gradgradcheck(lambda x, w: conv2d_1x1_pooled(x, w, cpu_backend).square(), [x, thin], fast_mode=True)


PATH = torch.tensor([[[0, 1]], [[1, 1]]], dtype=torch.bool).squeeze(1)
SAMPLES = torch.tensor([[[0, 0, 0], [1, 1, 0]], [[1, 1, 1], [0, 1, 1]]], dtype=torch.bool)
BLOCKS = {
    "batch": {"path": PATH},
    "batch, before": {"path": ~PATH.flip(1) | PATH, "pool": "before", "conv_bias": True},
    "samples": {"path": SAMPLES, "pool": "after"},
    "samples, live": {"path": SAMPLES, "stats": "live"},
    "dense": {"path": PATH, "dense": True},
    "fixed": {"path": PATH, "fixed": True, "conv_bias": True, "dropout": 0.5},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_second_derivatives_of_a_block(name):
    torch.manual_seed(0)
    options = {"pool": None, **BLOCKS[name]}
    path, fixed, biased = options.pop("path"), options.pop("fixed", False), options.pop("conv_bias", False)
    stats = (
        [torch.randn(3, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64) + 0.5] if fixed else [None] * 2
    )

    def block(x: Tensor, wide: Tensor, deep: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None = None) -> Tensor:
        return fk.fractal_block(
            x, [wide, deep], gamma, beta, path, conv_bias=bias, mean=stats[0], var=stats[1], **options
        ).out

    inputs = [double(3, 2, 3, 4), double(4, 2, 3, 3), double(2, 2, 3, 3), *(double(3, 2) for _ in range(2 + biased))]
    first = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(block(*inputs).square().sum(), inputs, create_graph=True)
    for a, b in zip(first, again, strict=True):  # zeros, not None, where nothing lives
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert gradgradcheck(block, inputs, fast_mode=True)


@pytest.mark.parametrize("mix", [1.0, 0.5])
def test_second_derivatives_of_a_network(mix):
    """Fused, and composed: of 1x1 convolutions, joins without batch norm and pooled projections, too."""
    torch.manual_seed(0)
    net = fractalnet.FractalNet(3, 2, (4, 6), in_channels=2, image_size=4, kernel_mix=mix).double()
    path, x = fractalnet.drop_path.full_path(2, 2), double(2, 2, 4, 4)  # gradgradcheck knows no dead weights
    assert gradgradcheck(lambda x, *_: net(x, path=path), [x, *net.parameters()], fast_mode=True)


@pytest.mark.parametrize("stats", ["all", "live"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_the_same_where_they_keep_a_graph(mask, stats):
    """The definition's, statistics of samples that a mask drops included, and the kernels'."""
    ys, w, b = ([double(*size) for _ in range(2)] for size in ((3, 2, 4, 4), (2,), (2,)))
    out = fk.bn_relu_join(ys, w, b, None, None, MASKS[mask], True, stats=stats)
    once = torch.autograd.grad(out.square().sum(), [*ys, *w, *b], retain_graph=True)
    twice = torch.autograd.grad(out.square().sum(), [*ys, *w, *b], create_graph=True)
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other)


def test_a_value_that_is_dropped_stays_out_of_second_derivatives():
    x, y = (torch.randn(3, 2, 4, 4, requires_grad=True) for _ in range(2))
    w = [torch.ones(2, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        y[1].fill_(float("nan"))
    for training in (True, False):
        stats = ([torch.zeros(2)] * 2, [torch.ones(2)] * 2)
        mask = torch.tensor([[True, True, True], [True, False, True]])
        out = fk.bn_relu_join([x, y], w, w, *stats, mask, training, stats="live")
        grads = torch.autograd.grad(out.square().sum(), [x, y, *w], create_graph=True)
        grads += torch.autograd.grad(sum(g.square().sum() for g in grads), [x, y, *w])
        assert all(g.isfinite().all() for g in grads)


def test_a_dropped_branch_without_eps():
    """Its variance is of no values, and nothing is divided by it."""
    y = [torch.randn(4, 2, 5, 5, requires_grad=True) for _ in range(2)]
    w = [torch.ones(2, requires_grad=True) for _ in range(2)]
    out = fk.bn_relu_join(y, w, None, None, None, torch.tensor([True, False]), True, eps=0.0)
    once = torch.autograd.grad(out.sum(), [*y, *w], retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(out.sum(), [*y, *w], create_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["step", "network"])
def test_what_is_frozen_after_the_forward(kind):
    """As in turns of two networks: gradients of what still requires them."""
    net = fk.ConvBNReLU(16, 16) if kind == "step" else fractalnet.FractalNet(3, 2, (16,), in_channels=16, image_size=8)
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    out = net(x)
    net.requires_grad_(False)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert grad.requires_grad and grad.abs().max() > 0


def test_running_statistics_have_no_gradient():
    mean, var = torch.zeros(3, requires_grad=True), torch.ones(3)
    with pytest.raises(ValueError, match="bn_relu: expected running statistics that require no gradient"):
        fk.bn_relu(torch.randn(2, 3, 4, 4), None, None, mean, var)
    with torch.no_grad():
        fk.bn_relu(torch.randn(2, 3, 4, 4), None, None, mean, var)


def test_what_cannot_be_differentiated_twice_is_refused():
    """A noise that only the block's operators have; also where the incoming gradient is a constant."""
    x, weights = torch.randn(4, 16, 8, 8, requires_grad=True), [torch.randn(32, 16, 3, 3), torch.randn(16, 16, 3, 3)]
    out = fk.fractal_block(x, weights, None, None, torch.ones(2, 2, dtype=torch.bool), dropout=0.5).out
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("kind", ["bn_relu", "join"])
def test_evaluation_before_training(kind):
    """A term with fixed statistics, then a training call that moves them, then one backward: as by the statistics that
    the evaluation saw."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    if kind == "join":
        net = fk.BNReLUJoin(2, 4).double()
        call = lambda net, mode: net.train(mode)([x, x.flip(0) + 1])  # noqa: E731
    else:
        net = fk.BatchNormReLU2d(4).double()
        call = lambda net, mode: net.train(mode)(x)  # noqa: E731
    for p in net.parameters():
        nn.init.normal_(p)
    apart = copy.deepcopy(net)
    (call(net, False).sum() + call(net, True).square().sum()).backward()
    call(apart, False).sum().backward()
    call(apart, True).square().sum().backward()
    for p, q in zip(net.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(net.buffers(), apart.buffers(), strict=True):
        assert torch.equal(p, q)


def test_autocast_changes_no_second_derivative():
    x, w = (torch.randn(*size).to(memory_format=torch.channels_last) for size in ((4, 16, 8, 8), (16, 16, 3, 3)))
    w.requires_grad_()
    found = []
    for enabled in (False, True):
        y = fk.conv_bn_relu(x, w, None, None, None, None, True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found += torch.autograd.grad(y.square().sum(), w, create_graph=True)
    torch.testing.assert_close(*found)


def test_a_tensor_that_comes_twice():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for create_graph in (False, True):
        out = fk.bn_relu_join([x, x], None, None, None, None, training=True)
        found += torch.autograd.grad(out.square().sum(), x, create_graph=create_graph)
    torch.testing.assert_close(*found)


def many_gradients():
    w = torch.rand(2, dtype=torch.float64)
    for name, mask in MASKS.items():
        for pool in (None, "before", "after"):
            yield f"mean-{name}-{pool}", lambda *ys, m=mask, p=pool: fk.masked_mean_join(ys, m, pool=p)
        yield f"join-{name}", lambda *ys, m=mask: fk.bn_relu_join(ys, [w, w], [w, w], None, None, m, True, pool="after")
    step = fk.ConvBNReLU(2, 16).double().to(memory_format=LAST)
    yield "step", lambda a, b: step(a.to(memory_format=LAST)) * b.sum()
    blocks = [torch.randn(4, 2, 3, 3).double(), torch.randn(2, 2, 3, 3).double()]
    yield "block", lambda a, b: fk.fractal_block(a, blocks, None, None, PATH, pool=None).out + b


@pytest.mark.parametrize(
    ("name", "function"), list(many_gradients()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_many_gradients_at_once(name, function):
    """As by `is_grads_batched=True`, of which Jacobians are made and gradcheck has a check."""
    torch.manual_seed(0)
    inputs = double(3, 2, 4, 5), double(3, 2, 4, 5)
    out = function(*inputs)
    grads = torch.randn(3, *out.shape, dtype=torch.float64)
    by = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
    together = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    vmapped = torch.func.vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True))(grads)
    for i, (t, v) in enumerate(zip(together, vmapped, strict=True)):
        assert not t.requires_grad
        for found in (t, v):
            torch.testing.assert_close(found, torch.stack([b[i] for b in by]))


def test_many_gradients_of_dropout_are_refused():
    x, weights = torch.randn(4, 16, 8, 8, requires_grad=True), [torch.randn(32, 16, 3, 3), torch.randn(16, 16, 3, 3)]
    out = fk.fractal_block(x, weights, None, None, torch.ones(2, 2, dtype=torch.bool), dropout=0.5).out
    with pytest.raises(RuntimeError, match="expected one gradient at a time of dropout"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("batched", [False, True])
def test_a_column_of_a_composed_block(batched):
    """What does not run has gradients of zeros, as where everything runs and is masked."""
    torch.manual_seed(0)
    block = ComposedBlock(2, (4, 2), kernel_mix=0.5, pool=None, conv_bias=True)
    block.init_weights("he")
    block.double()
    path, x = column_path(1, 2, 1), double(3, 2, 4, 5)
    by, found = [x, *block.parameters()], []
    for dense in (False, True):
        out = block(x, path.keep[0], path.alone, dense)
        if batched:
            grads = torch.randn(3, *out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            found.append(torch.autograd.grad(out, by, grads, is_grads_batched=True))
        else:
            grads = torch.autograd.grad(out.square().sum(), by, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), by, materialize_grads=True))
    for skipping, masked in zip(*found, strict=True):
        torch.testing.assert_close(skipping.expand_as(masked), masked)
