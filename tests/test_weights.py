"""Weights that are cast by one copy (``wide_weights``), and what composed blocks make of it: one convolution for all
units that read the same."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext

import fractalnet
import pytest
import torch
from fractalnet import composed
from fractalnet.composed import ComposedBlock
from fractalnet.drop_path import column_path, full_path, sample_path
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from fractal_kernels import block, checks, fractal_block
from fractal_kernels.ops.weights import wide_weights

LAST = torch.channels_last
BF16 = torch.bfloat16


class Counted(TorchDispatchMode):
    """How often which operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def as_on_a_gpu(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype != dtype


def weights(*sizes: tuple[int, ...]) -> list[Tensor]:
    """As blocks have them: channels_last views of what is stored contiguously."""
    stored = [nn.Parameter(torch.randn(o, h, w, i)) for o, i, h, w in sizes]
    return [t.permute(0, 3, 1, 2) for t in stored]


def plain(groups: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.cat([w.to(dtype) for w in group]) for group in groups]


def test_values_and_gradients():
    """Bit-equal to cat and to; also where only some have gradients, where some are frozen, and in their own dtype."""
    torch.manual_seed(0)
    a, b, c, d, e = weights((4, 3, 3, 3), (2, 3, 3, 3), (5, 6, 1, 1), (3, 1, 3, 3), (2, 2, 3, 3))
    frozen = torch.randn(2, 3, 3, 3)  # neither trained nor in channels_last
    groups = [[a, b, frozen], [c], [d], [frozen], [e.detach().to(BF16), e]]
    for dtype in (BF16, torch.float32):
        found, true = wide_weights(groups, dtype), plain(groups, dtype)
        for f, t in zip(found, true, strict=True):
            assert f.dtype == dtype and f.is_contiguous(memory_format=LAST) and torch.equal(f, t)
            assert f.requires_grad == t.requires_grad
        for used in ([0, 1, 4], [1], [2, 4]):
            ours, theirs = (
                torch.autograd.grad(
                    sum((outs[i] * torch.arange(outs[i].numel()).view_as(outs[i])).sum() for i in used),
                    [a, b, c, d, e],
                    retain_graph=True,
                    allow_unused=True,
                )
                for outs in (found, true)
            )
            for o, t in zip(ours, theirs, strict=True):
                assert (o is None) == (t is None) and (o is None or (o.dtype == t.dtype and torch.equal(o, t)))
    single = wide_weights([[a]], torch.float32)[0]
    assert single.data_ptr() == a.data_ptr()
    with torch.no_grad():
        assert not any(t.requires_grad for t in wide_weights(groups, BF16))


def test_weights_of_other_classes_are_cast_by_themselves():
    with FakeTensorMode():
        weight = torch.randn(2, 3, 3, 3)
    assert isinstance(wide_weights([[weight]], BF16)[0], FakeTensor)


class Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.new_ones(())

    @staticmethod
    def backward(ctx, grad):
        return None


def test_weights_of_no_gradient():
    weight = torch.randn(2, 3, 3, 3, requires_grad=True)
    wide = wide_weights([[weight]], BF16)
    assert torch.autograd.grad(Constant.apply(*wide), weight, allow_unused=True) == (None,)


def test_one_launch_each_way():
    """What is copied has the strides that it is copied to: else a GPU would copy one by one."""
    groups = [[*weights((4, 3, 3, 3), (2, 3, 3, 3))], weights((5, 6, 1, 1)), weights((3, 1, 3, 3))]
    pairs = []

    class Strides(Counted):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "_foreach_copy_":
                pairs.extend(zip(*args[:2], strict=True))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Strides() as mode:
        outs = wide_weights(groups, BF16)
        torch.autograd.backward(outs, [torch.randn_like(t) for t in outs])
    assert mode.calls["_foreach_copy_"] == 2 and len(pairs) == 8
    for target, source in pairs:
        assert target.stride() == source.stride() and target.dtype != source.dtype
        assert target.is_contiguous(memory_format=LAST)


def test_second_derivatives_and_many_gradients_at_once():
    a, b = weights((4, 3, 3, 3), (2, 3, 3, 3))
    for outs in (wide_weights([[a, b]], BF16), plain([[a, b]], BF16)):
        x = torch.ones(6, 3, 3, 3, dtype=BF16, requires_grad=True)
        (grad,) = torch.autograd.grad((outs[0] * x).sum(), b, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        assert torch.equal(second, torch.cat([torch.zeros(4, 3, 3, 3), torch.full((2, 3, 3, 3), 2.0)]).to(BF16))
    (out,) = wide_weights([[a, b]], BF16)
    many = torch.randn(5, *out.shape).to(BF16)
    ours = torch.autograd.grad(out, (a, b), many, is_grads_batched=True)
    assert torch.equal(torch.cat(ours, 1), many.float())


def test_fused_block_under_autocast():
    """Bit-equal to a block of cast weights, gradients and a gradient penalty included; two casts at once."""
    torch.manual_seed(0)
    row_weights = weights((24, 3, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3), (8, 8, 3, 3))
    row_weights[1] = row_weights[1].detach()
    x, keep = torch.randn(2, 3, 8, 8, requires_grad=True), full_path(1, 3).keep[0]
    results = []
    for autocast in (True, False):
        with torch.autocast("cpu", BF16, enabled=autocast), Counted() as mode:
            inputs = (x, row_weights) if autocast else (x.to(BF16), [w.to(BF16) for w in row_weights])
            out = fractal_block(*inputs, None, None, keep).out
            trained = [x, *(w for w in row_weights if w.requires_grad)]
            first = torch.autograd.grad(out.float().square().sum(), trained, retain_graph=True)
        copies = mode.calls["_foreach_copy_"]
        assert copies == (3 if autocast else 0)  # trained and frozen ones, and gradients
        with torch.autocast("cpu", BF16, enabled=autocast):
            grads = torch.autograd.grad(out.float().square().sum(), trained, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), trained)
        results.append([out, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("granularity", ["batch", "sample", "dense"])
def test_one_convolution_for_units_that_read_the_same(granularity, frozen, monkeypatch):
    """As on a GPU; in fp64, as if autocast cast to it: outputs, gradients and statistics are those of one convolution
    per unit."""
    torch.manual_seed(0)
    block = ComposedBlock(3, (8, 6, 4, 2), kernel_mix=0.5, conv_bias=True)
    block.init_weights("he")
    if frozen:
        block.weights[1].requires_grad_(False)
        block.weights_1x1["2"].requires_grad_(False)
    double = copy.deepcopy(block).double()
    block.double()
    for w in (*block.weights, *block.weights_1x1.values(), *block.projections.values()):
        w.data = w.data.float()  # exactly what it was
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        path = sample_path(
            1,
            4,
            3,
            local_drop=0.3,
            global_ratio=0.0,
            granularity="sample" if granularity == "sample" else "batch",
            generator=generator,
        )
        results = []
        for net, cast in ((block, True), (double, False)):
            with monkeypatch.context() as patch, Counted() as mode:
                if cast:
                    patch.setattr(composed, "_are_wide", as_on_a_gpu)
                    patch.setattr(checks, "is_autocast", lambda x: True)
                    patch.setattr(torch, "get_autocast_dtype", lambda device: torch.float64)
                out = net(x, path.keep[0], path.alone, granularity == "dense")
                out.square().sum().backward()
            grads = [None if p.grad is None else p.grad.double() for p in net.parameters()]
            results.append((mode.calls["convolution"], [out, net.running_mean, net.running_var, *grads]))
            net.zero_grad()
        (wide, ours), (each, theirs) = results
        for o, t in zip(ours, theirs, strict=True):
            assert (o is None) == (t is None)
            if o is not None:
                torch.testing.assert_close(o, t, rtol=1e-5, atol=1e-6)
        if granularity == "dense":  # 15 units of two convolutions start at 8 rows; the frozen ones run alone
            assert each - wide == 2 * (15 - (10 if frozen else 8))


@pytest.mark.parametrize("kernel_mix", [1.0, 0.5], ids=["fused", "composed"])
def test_casts_of_a_network(kernel_mix):
    """Of a training step under autocast: one copy per block each way, where convolutions are PyTorch's."""
    net = fractalnet.FractalNet(10, 3, (20, 20), image_size=8, kernel_mix=kernel_mix)
    with torch.autocast("cpu", BF16), Counted() as mode:
        net(torch.randn(2, 3, 8, 8), path=full_path(2, net.columns), dense=True).sum().backward()
    assert mode.calls["_foreach_copy_"] == 4
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_compiled_as_on_a_gpu(monkeypatch):
    """One graph under autocast, with wide convolutions; bit-equal to the network as it is."""
    monkeypatch.setattr(composed, "_are_wide", as_on_a_gpu)
    torch.manual_seed(0)
    net = fractalnet.FractalNet(10, 2, (8,), image_size=8, kernel_mix=0.5)
    other = copy.deepcopy(net)
    x, path = torch.randn(2, 3, 8, 8), full_path(1, 2)
    for model, call in ((net, net), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        with torch.autocast("cpu", BF16):
            out = call(x, path=path, dense=True)
        out.float().square().sum().backward()
        model.out = out.detach()
    assert torch.equal(net.out, other.out)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_compiled_autograd():
    """Follows the backward of the casts in one graph."""
    torch.manual_seed(0)
    net = fractalnet.FractalNet(10, 2, (8,), image_size=8)
    x, path = torch.randn(2, 3, 8, 8), full_path(1, 2)
    results = []
    for compiles in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", BF16):
            out = net(x, path=path)
        with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)) if compiles else nullcontext():
            out.float().square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


class _Half(nn.Module):
    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return 0.5 * weight


def test_a_composed_weight_is_read_once():
    """Where it runs: what computes it (a parametrization) may have a state."""
    block = ComposedBlock(3, (8, 4), kernel_mix=0.5)
    block.init_weights("he")
    half = _Half()
    parametrize.register_parametrization(block.weights, "0", half, unsafe=True)
    path = full_path(1, 2)
    before = half.calls
    block.eval()(torch.randn(2, 3, 8, 8), path.keep[0], path.alone)
    assert half.calls - before == 2  # and once to see which weights do not run


def test_weights_of_other_dtypes_are_refused():
    """As PyTorch's convolutions do, without autocast; under autocast float64 is none of its business."""
    block = ComposedBlock(3, (8, 4), activation="silu")
    block.init_weights("he")
    path, x = full_path(1, 2), torch.randn(2, 3, 8, 8)
    for dtype, enabled in ((BF16, False), (torch.float64, True)):
        other = copy.deepcopy(block)
        other.weights[1].data = other.weights[1].data.to(dtype)
        with torch.autocast("cpu", BF16, enabled=enabled), pytest.raises(RuntimeError, match="type|dtype"):
            other(x, path.keep[0], path.alone)


def test_without_gradients_casts_are_of_a_row():
    """Those of a whole block would be its weights once more."""
    block = ComposedBlock(3, (8, 4), activation="silu").eval()
    path = full_path(1, 2)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.autocast("cpu", BF16), Counted() as mode:
            block(torch.randn(2, 3, 8, 8), path.keep[0], path.alone)
        assert mode.calls["_foreach_copy_"] == (1 if enabled else 2)


def test_weights_that_nothing_reads_are_not_cast(monkeypatch):
    """Of a column alone: the gradients of the other rows' weights are zeros in their own dtype, as those of the dense
    execution."""
    torch.manual_seed(0)
    net = fractalnet.FractalNet(5, 3, (8,), image_size=8)
    x, path, results, cast = torch.randn(4, 3, 8, 8), column_path(1, 3, 1), [], []
    spied = lambda groups, dtype: cast.append(len(groups)) or wide_weights(groups, dtype)  # noqa: E731
    monkeypatch.setattr(block, "wide_weights", spied)
    for dense in (False, True):
        own = copy.deepcopy(net)
        with torch.autocast("cpu", BF16):
            out = own(x, path=path, dense=dense)
        gradients = torch.autograd.grad(out.float().square().sum(), list(own.blocks[0].weights), create_graph=True)
        with torch.autocast("cpu", BF16):
            own(x, path=path, dense=dense).float().square().sum().backward()
        results.append([*(g.detach() for g in gradients), *(w.grad for w in own.blocks[0].weights)])
    assert cast == [2, 2, 4, 4]
    for sparse, full in zip(*results, strict=True):
        assert sparse.dtype == torch.float32
        torch.testing.assert_close(sparse, full, rtol=3e-2, atol=3e-2 * float(full.abs().max()))
    for row in (1, 3):
        assert not results[0][row].any() and not results[0][4 + row].any() and results[0][4 + row - 1].any()


def test_a_composed_bias_under_autocast():
    block, path = ComposedBlock(3, (8, 4), activation="silu", conv_bias=True), full_path(1, 2)
    block.init_weights("he")
    with torch.autocast("cpu", BF16):
        out = block(torch.randn(2, 3, 8, 8), path.keep[0], path.alone)
    out.float().sum().backward()
    assert out.dtype == BF16 and block.conv_bias.grad.dtype == torch.float32
