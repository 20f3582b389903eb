"""Branches of a join that are not normalised: the identity shortcuts of residual blocks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, Case, assert_close, bits, channels_last, check, draw, run, there
from torch import Tensor, nn
from torch.autograd import gradgradcheck

import fractal_kernels as fk
from fractal_kernels.ops import exported

GPU = True
NAN, INF = float("nan"), float("inf")
MASKS = (("none", "all"), ("batch", "all"), ("sample", "all"), ("sample", "live"))
WHICH = {2: (1,), 3: (0, 2), 4: (1,), 5: (0, 1, 2, 4)}  # of so many branches those that are not normalised
# All masks with all pools in training, and in evaluation; the rest in turn.
CASES = [
    Case(
        2 + i % 4,
        affine=i % 5 > 0,
        activation=("output", "branch", "none")[i % 3],
        reduction=("sum", "mean")[i % 2],
        pool=pool,
        mask=mask,
        stats=stats,
        training=training,
        tracked=i % 7 > 0,
        plain=WHICH[2 + i % 4],
    )
    for i, ((mask, stats), pool, training) in enumerate(
        itertools.product(MASKS, (None, "before", "after"), (True, False))
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case, backend):
    for layout in ("channels_last", "contiguous"):
        check(case, draw(case, layouts=[layout]), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(layout, dtype, backend):
    for case in (Case(2, activation="output", reduction="sum", plain=(1,)), Case(3, mask="sample", plain=(0, 1))):
        check(case, draw(case, dtype, (3, 19, 5, 7), [layout, "channels_last"]), backend)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3, 0.3, 2.0])
@pytest.mark.parametrize("training", [True, False])
def test_an_identity_is_exact(training, eps, cpu_backend):
    """What is joined with a branch that is dropped keeps its bits, and its gradient's."""
    x = channels_last(torch.randn(3, 37, 4, 5)).requires_grad_()
    y = torch.full_like(x, NAN)
    mask, running = torch.tensor([False, True]), [[torch.ones(37), None] for _ in range(2)]
    out = fk.bn_relu_join(
        [y, x], None, None, *running, mask, training, eps=eps, activation="none", normalised=[True, False]
    )
    grad = torch.randn_like(x)
    assert torch.equal(out, x) and torch.equal(torch.autograd.grad(out, x, grad)[0], grad)
    assert (running[0][0] == 1).all() and (running[1][0] == 1).all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("pool", [None, "before"])
def test_a_sample_that_is_dropped_of_a_shortcut(pool, layout, backend):
    """Under stats="all" it has a part in no statistics, so it is not read at all."""
    torch.manual_seed(0)
    y, x = (torch.randn(4, 8, 6, 7).contiguous(memory_format=layout) for _ in range(2))
    mask = torch.tensor([[True, True, True, False], [True, False, True, False]])
    options = dict(reduction="sum", activation="output", pool=pool, normalised=[True, False], backend=backend)

    def step(x: Tensor) -> list[Tensor]:
        leaves = [y.clone().requires_grad_(), x.requires_grad_()]
        out = fk.bn_relu_join(leaves, None, None, None, None, mask, True, **options)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    dropped = x.clone()
    dropped[1], dropped[3] = NAN, INF
    for a, b in zip(step(x), step(dropped), strict=True):
        assert torch.equal(bits(a), bits(b))
    assert (step(dropped)[2][1::2] == 0).all()


def test_an_infinite_shortcut_has_a_gradient(backend):
    """As an addition has it."""
    y, x = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    x[0, 3, 1, 2], x[1, 5, 0, 0] = INF, -INF
    x.requires_grad_()
    out = fk.bn_relu_join(
        [y, x], None, None, None, None, training=True, reduction="sum", activation="output", normalised=[True, False],
        backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, (out > 0).to(grad.dtype)) and grad[0, 3, 1, 2] == 1 and grad[1, 5, 0, 0] == 0


def test_without_any_batch_norm(backend):
    """relu(a + b), as of a network whose batch norms are folded."""
    ys = [torch.randn(2, 5, 4, 6, requires_grad=True) for _ in range(2)]
    options = dict(reduction="sum", activation="output", pool="after", normalised=[False, False], backend=backend)
    out = fk.bn_relu_join(ys, None, None, None, None, training=True, **options)
    expected = F.max_pool2d((ys[0] + ys[1]).relu(), 2)
    assert_close(out.detach(), expected.detach().double())
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, ys, grad), torch.autograd.grad(expected, ys, grad), strict=True):
        assert torch.equal(a, b)


def test_repeats_give_the_same_bits(backend):
    case = Case(4, activation="output", reduction="sum", mask="sample", plain=(1, 2))
    data = draw(case, torch.float32, (5, 33, 6, 7))
    for a, b in zip(run(case, data, backend).tensors(), run(case, data, backend).tensors(), strict=True):
        assert torch.equal(bits(a), bits(b))


class Residual(nn.Module):
    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        self.conv, self.join = nn.Conv2d(8, 8, 3, padding=1, bias=False), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join([self.conv(x), x])


class Eager(nn.Module):
    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm2d(8, momentum=momentum), nn.Identity()])

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return (self.bns[0](inputs[0]) + inputs[1]).relu()


@pytest.mark.parametrize("momentum", [0.3, None])
def test_residual_block(momentum, backend):
    """The module beside PyTorch's own, over steps of training, then in evaluation; the same state_dict."""
    torch.manual_seed(0)
    options = dict(reduction="sum", activation="output", normalised=[True, False], momentum=momentum)
    eager = Residual(Eager(momentum))
    fused = Residual(fk.BNReLUJoin(2, 8, **options))
    assert list(fused.state_dict()) == list(eager.state_dict())
    fused.load_state_dict(copy.deepcopy(eager.state_dict()))
    with fk.use_backend(backend):
        for training in (True, True, False):
            x = torch.randn(3, 8, 5, 6)
            results = []
            for net in (eager, fused):
                leaf = x.clone().requires_grad_()
                out = net.train(training)(leaf)
                results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *net.parameters()])])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(eager.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_beside_a_shortcut_that_comes_first(momentum):
    """They move by their own batch norm's momentum."""
    bn, join = nn.BatchNorm2d(3, momentum=momentum), fk.BNReLUJoin(2, 3, normalised=[False, True], momentum=momentum)
    for y, x in torch.randn(2, 2, 4, 3, 5, 5):
        bn(y), join([x, y])
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(join.bns[1].state_dict()[name], value)


def test_nothing_more_is_kept(cpu_backend):
    """Of relu(bn(y) + x) its two inputs and three vectors a branch are kept; x is the convolution's, too."""
    y, x = (channels_last(torch.randn(4, 16, 8, 8)).requires_grad_() for _ in range(2))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        fk.bn_relu_join([y, x], None, None, None, None, training=True, activation="output", normalised=[True, False])
    assert {t.data_ptr() for t in kept.values() if t.numel() > 16} == {y.data_ptr(), x.data_ptr()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_pytorchs_own_operators(case, monkeypatch):
    """What exports and transforms are given."""
    monkeypatch.setattr(exported, "foreign_tool", lambda: "a test")
    check(case, draw(case), None)


def double(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", [None, "before"])
@pytest.mark.parametrize(("mask", "stats"), [(None, "all"), ("sample", "all"), ("sample", "live")])
def test_second_derivatives(mask, stats, pool, training):
    mask = None if mask is None else torch.tensor([[True, False, True], [True, True, False]])
    running = [[None, torch.rand(2, dtype=torch.float64) + 0.5] for _ in range(2)]

    def join(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = [[None, r[1].clone()] for r in running]
        options = dict(reduction="sum", activation="output", pool=pool, stats=stats, normalised=[False, True])
        return fk.bn_relu_join([a, b], [None, weight], [None, bias], *moved, mask, training, **options)

    assert gradgradcheck(join, [double(3, 2, 2, 3), double(3, 2, 2, 3), double(2), double(2)], fast_mode=True)


def test_transforms():
    block = Residual(fk.BNReLUJoin(2, 8, reduction="sum", activation="output", normalised=[True, False])).double()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))

    def loss(p: dict[str, Tensor]) -> Tensor:
        buffers = {k: v.clone() for k, v in block.named_buffers()}
        return torch.func.functional_call(block, (p, buffers), (x,)).square().sum()

    for g, e in zip(torch.func.grad(loss)(dict(block.named_parameters())).values(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", ["none", "batch", "sample"])
def test_compiled(mask, cpu_backend):
    case = Case(3, activation="output", reduction="sum", mask=mask, stats="live", plain=(1,))
    data = draw(case, torch.float32)

    def join(ys: list[Tensor], weights: list[Tensor | None], running: list[list[Tensor | None]]) -> Tensor:
        flags = dict(case.flags, normalised=case.normalised)
        return fk.bn_relu_join(ys, weights, data.biases, *running, data.mask, True, **flags)

    results = []
    for function in (join, torch.compile(join, fullgraph=True, backend="aot_eager")):
        d = data.copy()
        out = function(d.ys, d.weights, [d.running_means, d.running_vars])
        grads = torch.autograd.grad(out, [*d.ys, *there(d.weights)], data.grad)
        results.append([out, *grads, *there([*d.running_means, *d.running_vars])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_exported_program():
    block = Residual(fk.BNReLUJoin(2, 8, reduction="sum", activation="output", normalised=[True, False])).eval()
    x = torch.randn(2, 8, 4, 4)
    program = torch.export.export(block, (x,))
    assert not any("fractal_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)
