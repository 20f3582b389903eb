"""The contract of ``torch.nn.BatchNorm2d``: running statistics, modes, precision, errors, state."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from fractal_kernels import BatchNormReLU2d, BNReLUJoin, bn_relu, bn_relu_join, use_backend

OPTIONS = [
    dict(),
    dict(momentum=0.3, eps=1e-3),
    dict(momentum=None),
    dict(momentum=0.0),
    dict(momentum=1.0),
    dict(affine=False),
    dict(track_running_stats=False),
    dict(affine=False, track_running_stats=False),
    dict(affine=False, momentum=None),
]
FAR_SHAPES = [(16, 8, 32, 32), (3, 33, 7, 5), (64, 3, 1, 1), (128, 16, 2, 2), (2, 5, 129, 67)]


def pair(channels: int, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """BatchNorm2d and ReLU, and the fused module with the same state."""
    norm = nn.BatchNorm2d(channels, dtype=dtype, **options)
    for p in norm.parameters():
        nn.init.normal_(p, 0.5)
    fused = BatchNormReLU2d(channels, dtype=dtype, **options)
    fused.load_state_dict(norm.state_dict())
    return nn.Sequential(norm, nn.ReLU()), fused


def assert_same_state(a: nn.Module, b: nn.Module, atol: float) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert x.dtype == y.dtype, name
        torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_batchnorm_and_relu(options, dtype, backend):
    eager, fused = pair(7, dtype, **options)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    with use_backend(backend):
        for step in range(6):
            for module in (eager, fused):
                module.train(step not in (2, 5))
            x = torch.randn(5, 7, 4, 6, dtype=dtype).mul_(3).add_(1)
            x = x.contiguous(memory_format=torch.channels_last) if step % 2 else x
            xs = [x.clone().requires_grad_() for _ in range(2)]
            grad = torch.randn_like(x)
            outs = [module(x) for module, x in zip((eager, fused), xs, strict=True)]
            torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=atol)
            for out in outs:
                out.backward(grad)
            torch.testing.assert_close(xs[1].grad, xs[0].grad, rtol=0, atol=atol)
            for p, q in zip(fused.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=20 * atol)
            assert_same_state(eager[0], fused, atol)


def test_functional_equals_batch_norm(backend):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    weight, bias = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for training, (w, b) in itertools.product(
        (True, False), ((weight, bias), (None, None), (weight, None), (None, bias))
    ):
        stats = [[torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)] for _ in range(2)]
        expected = torch.relu(torch.nn.functional.batch_norm(x, *stats[0], w, b, training, 0.2, 1e-3))
        actual = bn_relu(x, w, b, *stats[1], training, 0.2, 1e-3, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        for a, e in zip(stats[1], stats[0], strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_under_half_inputs(dtype, backend):
    eager, fused = pair(6, torch.float32)
    x = torch.randn(4, 6, 5, 5).to(dtype)
    with use_backend(backend):
        out = fused(x)
        out.float().sum().backward()
    assert out.dtype == dtype
    assert fused.weight.grad.dtype == fused.running_mean.dtype == torch.float32
    expected = eager(x.float())  # batch norm in float32 of the rounded input, rounded once
    torch.testing.assert_close(out, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert_same_state(eager[0], fused, 1e-6)


def test_half_parameters(backend):
    """A model cast as a whole: parameters and buffers in bfloat16, arithmetic in float32."""
    _, fused = pair(6, torch.bfloat16)
    x = torch.randn(4, 6, 5, 5).bfloat16().requires_grad_()
    with use_backend(backend):
        fused(x).float().sum().backward()
    assert fused.weight.grad.dtype == x.grad.dtype == fused.running_var.dtype == torch.bfloat16
    assert all(t.isfinite().all() for t in (x.grad, fused.weight.grad, fused.running_var))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", FAR_SHAPES, ids=str)
def test_statistics_where_the_mean_is_5000_standard_deviations(shape, layout, backend):
    """Against float64, absolute: mean within two float32 steps (9.8e-4), standard deviation within 2e-4."""
    channels = shape[1]
    y = (torch.randn(shape) + 5000 + torch.arange(channels).view(1, -1, 1, 1)).contiguous(memory_format=layout)
    exact = y.double().transpose(0, 1).flatten(1)
    mean, var, count = torch.ops.fractal_kernels.channel_stats([y], None, [], 0.0, None, backend)
    mean_error = (mean[0].double() - exact.mean(1)).abs().max().item()
    std_error = (var[0].double().sqrt() - exact.var(1, correction=0).sqrt()).abs().max().item()
    assert count.item() == y.numel() / channels
    assert mean_error <= 9.8e-4 and std_error <= 2e-4, f"mean error {mean_error:.3g}, std error {std_error:.3g}"

    running = torch.zeros(channels), torch.zeros(channels)
    out = bn_relu_join([y], None, None, [running[0]], [running[1]], None, True, 1.0, backend=backend, activation="none")
    torch.testing.assert_close(running[0].double(), exact.mean(1), rtol=0, atol=9.8e-4)
    torch.testing.assert_close(running[1].double(), exact.var(1), rtol=0, atol=4e-4)
    expected = (exact - exact.mean(1, keepdim=True)) / (exact.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out.transpose(0, 1).flatten(1).double(), expected, rtol=0, atol=2e-3)


def test_constant_channels(backend):
    """No variance: the output is the bias, the gradient finite, the variance exactly 0."""
    for value in (0.0, 1.0, -3e4, 0.1):
        x = torch.full((4, 3, 5, 5), value, requires_grad=True)
        mean, var, _ = torch.ops.fractal_kernels.channel_stats([x.detach()], None, [], 0.0, None, backend)
        torch.testing.assert_close(mean, torch.full((1, 3), value), rtol=1.2e-7, atol=0)
        assert var.max().item() <= (value * 1.2e-7) ** 2
        out = bn_relu(x, torch.ones(3), torch.full((3,), 0.5), None, None, True, backend=backend)
        torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=0, atol=1.2e-7 * abs(value) / 1e-5**0.5 + 1e-6)
        out.sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3), (1, 3, 1)], ids=str)
def test_one_value_per_channel(shape, backend):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="bn_relu: expected more than 1 value per channel when training, got"):
        bn_relu(x, None, None, torch.zeros(3), torch.ones(3), True, backend=backend)
    with pytest.raises(ValueError, match="bn_relu_join: expected more than 1 value per channel when training, got"):
        bn_relu_join([x], None, None, None, None, None, True, backend=backend)
    bn_relu(x, None, None, torch.zeros(3), torch.ones(3), False, backend=backend)
    if len(shape) == 4:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm2d(3)(x)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            BatchNormReLU2d(3)(x)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            BatchNormReLU2d(3, track_running_stats=False).eval()(x)


def test_empty_batch_keeps_running_statistics(backend):
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    y = bn_relu(torch.empty(0, 3, 4, 4), None, None, mean, var, training=True, momentum=0.5, backend=backend)
    assert y.shape == (0, 3, 4, 4)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_input_dimensions():
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormReLU2d(3)(torch.randn(2, 3, 4))


def test_state_dict_round_trip(tmp_path):
    eager, fused = pair(5, torch.float32)
    fused(torch.randn(3, 5, 4, 4))
    assert list(fused.state_dict()) == list(eager[0].state_dict())
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    for other in (nn.BatchNorm2d(5), BatchNormReLU2d(5)):
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert_same_state(fused, other, 0.0)
    assert_same_state(copy.deepcopy(fused), fused, 0.0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_dropped_branch_keeps_its_running_statistics(momentum, backend):
    """Each branch follows a BatchNorm2d that is called only in the steps in which the branch lives."""
    join = BNReLUJoin(3, 4, momentum=momentum).double()
    eager = [nn.BatchNorm2d(4, momentum=momentum).double() for _ in range(3)]
    masks = [[True, False, True], [False, True, True], [False, False, False], [True, True, False]]
    with use_backend(backend):
        for mask in masks:
            inputs = [torch.randn(3, 4, 5, 5, dtype=torch.float64) for _ in range(3)]
            join(inputs, torch.tensor(mask))
            for norm, x, kept in zip(eager, inputs, mask, strict=True):
                if kept:
                    norm(x)
    for i, norm in enumerate(eager):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(join.bns[i], name), getattr(norm, name), rtol=0, atol=1e-12)


def test_statistics_of_the_live_samples(backend):
    """stats="live" is a BatchNorm2d of the live samples, stats="all" one of the whole batch."""
    x, mask = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.tensor([[True, False, True, True, False, False]])
    for stats, seen in (("live", x[mask[0]]), ("all", x)):
        norm = nn.BatchNorm2d(4).double()
        expected = torch.relu(norm(seen))
        mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        out = bn_relu_join([x], None, None, [mean], [var], mask, True, stats=stats, backend=backend)
        torch.testing.assert_close(out[mask[0]], expected if stats == "live" else expected[mask[0]], rtol=0, atol=1e-12)
        assert (out[~mask[0]] == 0).all()
        torch.testing.assert_close(mean, norm.running_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(var, norm.running_var, rtol=0, atol=1e-12)
