"""What a wrong bound, stride or constant in a kernel would change, and random operands of even shapes do not show."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import Case, assert_close, check, draw, run

from fractal_kernels import bn_relu_join

GPU = True
SINGLE, NAN = torch.float32, float("nan")
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)


@LAYOUTS
@pytest.mark.parametrize("activation", ["branch", "output"])
@pytest.mark.parametrize("pool", [None, "before", "after"])
def test_no_gradient_at_zero(pool, activation, layout, backend):
    """A ReLU's gradient at 0 is 0, as in PyTorch."""
    y = torch.randint(-1, 2, (2, 8, 8, 8)).float().contiguous(memory_format=layout).requires_grad_()
    ones, zeros = [torch.ones(8)], [torch.zeros(8)]
    out = bn_relu_join([y], None, None, zeros, ones, eps=0.0, activation=activation, pool=pool, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), y)
    assert (grad[y <= 0] == 0).all()
    assert grad.sum() == out.count_nonzero() > 0


@pytest.mark.parametrize("training", [True, False])
def test_eps(training, backend):
    """Another one than every module's."""
    data = draw(Case(2, training=training))
    d, e = data.copy(), data.copy(torch.float64)
    args = [[t.ys, t.weights, t.biases, t.running_means, t.running_vars, t.mask, training, 0.1, 0.5] for t in (d, e)]
    out, expected = bn_relu_join(*args[0], backend=backend), oracle.join(*args[1])[0]
    assert_close(out, expected, "output")
    grads, exact = torch.autograd.grad(out, d.leaves, data.grad), oracle.gradients(expected, data.grad, e.leaves)
    for grad, g in zip(grads, exact, strict=True):
        assert_close(grad, g, "gradient")


@LAYOUTS
def test_one_live_value(layout, backend):
    """Of one value the variance is 0, not 0/0."""
    y, live = (
        torch.full((4, 5, 1, 1), NAN).contiguous(memory_format=layout),
        torch.tensor([[False, True, False, False]]),
    )
    y[1] = 3.0
    mean, var = torch.zeros(5), torch.ones(5)
    bn_relu_join([y], None, None, [mean], [var], live, True, 0.25, stats="live", backend=backend)
    assert (mean == 0.75).all() and (var == 0.75).all()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_no_pixels(layout, backend):
    """Samples of no pixels: sums of nothing, and running statistics that stay."""
    for training in (True, False):
        data = draw(Case(2), SINGLE, (3, 5, 0, 7), [layout])
        before = [t.clone() for t in (*data.running_means, *data.running_vars)]
        result = run(Case(2, training=training), data, backend)
        assert result.out.shape == (3, 5, 0, 7) and all((g == 0).all() for g in result.grads)
        assert all(torch.equal(a, b) for a, b in zip(before, result.running, strict=True))


@LAYOUTS
@pytest.mark.parametrize("sign", [1, -1])
def test_live_statistics_far_from_zero(sign, layout, backend):
    """Where the first samples are dropped, too, no sum is relative to zero."""
    y = (sign * (torch.randn(8, 16, 4, 4) + 5000)).contiguous(memory_format=layout)
    for dropped in ([0, 3, 5], [0, 1, 2, 7]):
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[0, dropped] = False
        exact = y[mask[0]].double().transpose(0, 1).flatten(1)
        mean, var, count = torch.ops.fractal_kernels.channel_stats([y], mask, [], 0.0, None, backend)
        assert count.item() == exact.shape[1]
        assert (mean[0].double() - exact.mean(1)).abs().max() <= 9.8e-4
        assert (var[0].double().sqrt() - exact.var(1, correction=0).sqrt()).abs().max() <= 2e-4


@LAYOUTS
def test_statistics_where_whole_blocks_are_dropped(layout, backend):
    """A sample is several blocks: those of the first have no value at all."""
    y = torch.randn(2, 4, 32, 32).contiguous(memory_format=layout)
    mask = torch.tensor([[False, True]])
    mean, var, _ = torch.ops.fractal_kernels.channel_stats([y], mask, [], 0.0, None, backend)
    torch.testing.assert_close(mean[0], y[1].mean((1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(var[0], y[1].var((1, 2), correction=0), rtol=0, atol=1e-5)


def taller(t: torch.Tensor) -> torch.Tensor:
    """Rows of a taller channels_last buffer, whose others hold NaN: samples are further apart than pixels say."""
    n, c, h, w = t.shape
    return torch.full((n, h + 2, w, c), NAN, dtype=t.dtype)[:, 1:-1].movedim(-1, 1).copy_(t)


@pytest.mark.parametrize("case", [Case(2), Case(2, affine=False, normalise=False), Case(2, pool="before")], ids=str)
@pytest.mark.parametrize("which", ["inputs", "gradient"])
def test_rows_of_taller_tensors(which, case, backend):
    data = draw(case, SINGLE)
    if which == "inputs":
        data.ys = [taller(y.detach()).requires_grad_() for y in data.ys]
    else:
        data.grad = taller(data.grad)
    check(case, data, backend)


def test_a_column(backend):
    """Of one pixel a row: the stride of the pixels is the rows'."""
    data = draw(Case(2), SINGLE, (3, 5, 7, 1))
    wide = [torch.full((3, 7, 4, 5), NAN).movedim(-1, 1) for _ in data.ys]
    data.ys = [w[..., 2:3].copy_(y.detach()).requires_grad_() for w, y in zip(wide, data.ys, strict=True)]
    check(Case(2), data, backend)


@pytest.mark.parametrize("dtype", [SINGLE, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["start", "vector", "sample"])
@pytest.mark.parametrize("first", [True, False])
def test_one_branch_is_not_aligned(first, which, dtype, backend):
    """One thing keeps loads from being wide, in one branch of two: its start, or how far pixels (of contiguous ones:
    channels) or samples are apart."""
    n, c, h, w = shape = (2, 16, 4, 16)
    more = int(which == "vector")
    for channels_last in (True, False):
        for case in (Case(2), Case(2, pool="before"), Case(2, training=False, mask="sample")):
            data = draw(case, dtype, shape, ["channels_last" if channels_last else "contiguous"])
            y = data.ys[not first].detach()
            sample = (c + more) * h * w + 16 * more + (which == "sample")
            strides = (sample, 1, w * (c + more), c + more) if channels_last else (sample, h * w + more, w, 1)
            memory = y.new_full((n * sample + 1,), NAN)
            data.ys[not first] = memory.as_strided(shape, strides, int(which == "start")).copy_(y).requires_grad_()
            check(case, data, backend)
