"""A block of which weights are frozen: the other gradients as ever, and no work for what nobody asks for."""

from types import SimpleNamespace

import fractalnet
import pytest
import torch
from fractalnet.drop_path import column_path, full_path, sample_path
from torch.utils.flop_counter import FlopCounterMode

import fractal_kernels as fk
from fractal_kernels import block_rows
from fractal_kernels.flops import FORMULAS

GPU = True
COLUMNS = 3
PATHS = {
    "full": full_path(1, COLUMNS),
    "column": column_path(1, COLUMNS, 1),
    "sample": sample_path(
        1,
        COLUMNS,
        8,
        local_drop=0.4,
        global_ratio=0.6,
        granularity="sample",
        generator=torch.Generator().manual_seed(1),
    ),
}


def gradients(net, x, path):
    """Of x and of every parameter; None where there is none."""
    start = {k: v.clone() for k, v in net.state_dict().items()}
    net.zero_grad(set_to_none=True)
    x.grad = None
    net(x, path=path).square().sum().backward()
    net.load_state_dict(start)
    return {"x": x.grad} | {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("kind", list(PATHS))
@pytest.mark.parametrize("frozen", [("x", "weights.0"), ("weights.1", "weights.3"), ("x", "weights."), ("x",)])
def test_others_are_as_ever(monkeypatch, backend, frozen, kind):
    """Of so many channels in float32 convolutions are ours on the CPU."""
    monkeypatch.setattr(block_rows, "RANGES_PAY", 1)
    net = fractalnet.FractalNet(5, COLUMNS, (16,), image_size=8, conv_bias=kind == "full", granularity="sample")
    x = torch.randn(8, 3, 8, 8, requires_grad=True)
    with fk.use_backend(backend):
        expected = gradients(net, x, PATHS[kind])
        x.requires_grad_("x" not in frozen)
        for name, p in net.blocks[0].named_parameters():
            p.requires_grad_(not any(name.startswith(f) for f in frozen))
        got = gradients(net, x, PATHS[kind])
    left = {name for name, g in got.items() if g is None}
    assert left == {n for n in expected if any(n.removeprefix("blocks.0.").startswith(f) for f in frozen)}
    for name in set(expected) - left:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


def flops_of_backward(net, x, path) -> int:
    loss = net(x, path=path).sum()
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_frozen_weights_cost_nothing(monkeypatch):
    """By count of the convolutions that run, which the formulas' count follows."""
    net = fractalnet.FractalNet(5, 2, (4,), image_size=8)
    x, path, ran = torch.randn(2, 3, 8, 8), full_path(1, 2), []
    backward = fk.block_ops._aten.convolution_backward
    monkeypatch.setattr(
        fk.block_ops,
        "_aten",
        type("Counting", (), {"convolution_backward": staticmethod(lambda *a: (ran.append(a[-1]), backward(*a))[1])}),
    )
    every = flops_of_backward(net, x, path)
    assert ran == [[True, True, False], [False, True, False]]
    ran.clear()
    net.blocks[0].weights.requires_grad_(False)
    some = flops_of_backward(net, x, path)
    assert ran == [[True, False, False]]
    pixel = 2 * 2 * 8 * 8 * 9
    assert every - some == pixel * (8 * 3 + 4 * 4)


def test_frozen_weights_cost_nothing_in_our_convolution(monkeypatch, cpu_conv_here):
    net = fractalnet.FractalNet(5, 2, (16,), image_size=8)
    ran, weight = [], fk.cpu_conv._OPS.conv3x3_weight
    counting = SimpleNamespace(default=lambda *a: (ran.append(len(a[0])), weight.default(*a))[1])
    ours = SimpleNamespace(conv3x3=fk.cpu_conv._OPS.conv3x3, conv3x3_weight=counting)
    monkeypatch.setattr(fk.cpu_conv, "_OPS", ours)
    for frozen, expected in ((False, [16, 32]), (True, [16])):
        net.blocks[0].weights[0].requires_grad_(not frozen)
        ran.clear()
        net(torch.randn(2, 3, 8, 8), path=full_path(1, 2)).sum().backward()
        assert ran == expected


def test_traced():
    """Under torch.compile, where the operator's fake says what comes back."""
    net = fractalnet.FractalNet(5, 2, (4,), image_size=8).double()
    net.blocks[0].weights[0].requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    results = []
    for f in (net, compiled):
        net.zero_grad(set_to_none=True)
        f(x, path=full_path(1, 2)).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    assert [g is None for g in results[0]].count(True) == 1
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.allclose(a, b)


@pytest.mark.parametrize("stats", ["all", "live"])
def test_paths_in_any_layout(stats):
    w = [torch.randn(8, 3, 3, 3), torch.randn(4, 4, 3, 3)]
    x, keep = torch.randn(4, 3, 8, 8), torch.ones(2, 2, 8, dtype=torch.bool)
    keep[1, 0, ::3] = False
    for path in (keep[..., ::2], keep[..., :4].permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        assert not path.is_contiguous()
        found = [
            fk.fractal_block(x, w, None, None, p, stats=stats).out
            for p in (path, path.clone(memory_format=torch.contiguous_format))
        ]
        assert torch.equal(*found)
