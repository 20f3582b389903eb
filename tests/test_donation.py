"""Gradients of a block's convolution outputs take the place of the outputs, where nobody else has them."""

from __future__ import annotations

from types import SimpleNamespace

import fractalnet
import pytest
import torch
from fractalnet.drop_path import full_path, sample_path
from torch._dynamo import compiled_autograd
from torch.utils.flop_counter import FlopCounterMode

from fractal_kernels import backends, block_ops, block_rows, fractal_block, use_backend

LAUNCHES = ("channel_stats", "join_forward", "join_backward_reduce", "join_backward_apply")
SETTINGS = [
    {"granularity": "batch"},
    {"granularity": "sample"},
    {"granularity": "sample", "stats": "all"},
    {"dropout": (0.2, 0.2)},
    {"pool_order": "after_join"},
    {"last_pool": False, "conv_bias": True, "bn_affine": False},
]


@pytest.fixture(autouse=True)
def ranges_in_small_batches(monkeypatch):
    """So that paths per sample cut the batch into segments."""
    monkeypatch.setattr(block_rows, "RANGES_PAY", 1)


def network(**options):
    torch.manual_seed(0)
    return fractalnet.FractalNet(5, 3, (16, 32), image_size=9, **options).train()


def step(net, path, *, times=1):
    """Gradients of every backward through one graph, and of one more that gives the graph up."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, 9, 9, requires_grad=True)
    leaves = [x, *net.parameters()]
    loss = net(x, path=path).square().sum()
    return [torch.autograd.grad(loss, leaves, retain_graph=i < times - 1) for i in range(times)]


@pytest.fixture
def in_place(backend, monkeypatch):
    """What every launch of join_backward_apply of this backend did: whether each dy is where its y was."""
    real, seen = backends.launcher(backend), []

    def apply(dys, grad, ys, *rest):
        seen.extend(dy.data_ptr() == y.data_ptr() for dy, y in zip(dys, ys, strict=True))
        real.join_backward_apply(dys, grad, ys, *rest)

    watched = SimpleNamespace(**{name: getattr(real, name) for name in LAUNCHES[:3]}, join_backward_apply=apply)
    monkeypatch.setattr(backends, "launcher", lambda name: watched if name == backend else pytest.fail(name))
    with use_backend(backend):
        yield seen


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_the_same_bits_in_place(options, in_place, monkeypatch):
    """Also of a graph that is kept, as often as it is used; there nothing is in place."""
    net = network(**options)
    for seed in range(2):
        path = net.sample_path(6, torch.Generator().manual_seed(seed))
        results = step(net, path)
        assert in_place and all(in_place)
        kept = step(net, path, times=3)
        half = len(in_place) // 4
        assert not any(in_place[half : 3 * half]) and all(in_place[3 * half :])
        in_place.clear()
        with monkeypatch.context() as context:
            context.setattr(block_ops, "IN_PLACE", ())
            results += step(net, path)
        assert in_place and not any(in_place)
        in_place.clear()
        assert all(same(other, results[0]) for other in (*results, *kept))
        assert all(g.isfinite().all() for g in results[0])


def test_what_hooks_hold_stays(in_place):
    net, held = network(), []

    def pack(t):
        held.append((t, t.clone()))
        return t

    path = sample_path(2, 3, 6, local_drop=0.3, global_ratio=0)
    expected = step(net, path)[0]
    in_place.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        got = step(net, path)[0]
    assert in_place and not any(in_place)
    assert len(held) > 20 and all(torch.equal(now.nan_to_num(), then.nan_to_num()) for now, then in held)
    assert same(got, expected)


def test_a_backward_allocates_no_gradients_of_outputs(cpu_backend):
    """A profile of the memory: as many bytes as the outputs of all convolutions have are not allocated."""

    def allocated(times):
        net, x = network(), torch.randn(16, 3, 9, 9)
        loss = net(x, path=full_path(2, 3)).square().sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss.backward(retain_graph=times > 1)
        return sum(max(e.self_cpu_memory_usage, 0) for e in profiler.events())

    outputs = 4 * 16 * 7 * (16 * 9 * 9 + 32 * 4 * 4)
    assert allocated(2) - allocated(1) >= outputs


def test_a_compiled_backward_donates_nothing(cpu_backend):
    """Compiled autograd keeps one graph for a backward that may run again and one that may not."""
    net, x = network(), torch.randn(4, 3, 9, 9)
    path = full_path(2, 3)

    def gradients(times):
        net.zero_grad()
        loss = net(x, path=path).square().sum()
        for i in range(times):
            loss.backward(retain_graph=i < times - 1)
        return [p.grad for p in net.parameters()]

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend="eager", fullgraph=True)

    expected, graphs = gradients(1), []
    with compiled_autograd._enable(compiler):
        assert same(gradients(1), expected)
        assert same(gradients(2), [2 * g for g in expected])
    assert graphs


def test_a_backward_that_was_interrupted_is_not_repeated(in_place, monkeypatch):
    """On a graph some of whose outputs are overwritten already."""
    x, path = torch.randn(4, 16, 4, 4, requires_grad=True), full_path(2, 3)
    out = network().blocks[1](x, path.keep[1], path.alone)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(block_ops, "gather_weight", interrupt)
        out.backward(torch.ones_like(out))
    assert in_place and all(in_place)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))


def test_a_traced_backward_donates_nothing(in_place):
    net, path = network(), full_path(2, 3)
    loss = net(torch.randn(4, 3, 9, 9), path=path).square().sum()
    with FlopCounterMode(display=False):
        loss.backward()
    assert in_place and not any(in_place)


def test_an_output_without_a_gradient():
    """Where what reads the block has none to give, the block has none either."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return None

    w = [torch.randn(8, 3, 3, 3, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)]
    out = fractal_block(torch.randn(2, 3, 8, 8), w, None, None, torch.ones(2, 2, dtype=torch.bool)).out
    for again in (False, True):
        loss = Nothing.apply(out).sum() + w[0].sum()
        first, second = torch.autograd.grad(loss, w, create_graph=again, retain_graph=True, allow_unused=True)
        assert first.eq(1).all() and second is None
