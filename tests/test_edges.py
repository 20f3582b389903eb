"""What a wrong bound, stride or constant in a kernel would change, and random operands of even shapes do not show."""

from __future__ import annotations

import itertools
import mmap

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import Case, assert_close, bits, check, draw, run

from fractal_kernels import bn_relu_join, masked_mean_join

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


def test_negative_values_of_a_mask_keep(backend):
    """What is not zero keeps a branch, NaN too."""
    ys = [torch.full((1, 2, 2, 2), float(i)) for i in (1, 7, 2, 3)]
    assert (masked_mean_join(ys, torch.tensor([-1.0, 0.0, -0.5, NAN]), backend=backend) == 2).all()


@pytest.mark.parametrize("widest", range(3))
def test_the_widest_dtype_under_autocast(widest):
    ys = [torch.ones(1, 2, 2, 2, dtype=torch.float32 if i == widest else torch.bfloat16) for i in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert masked_mean_join(ys).dtype == torch.float32


def test_the_layout_of_as_many_of_both(backend):
    ys = [torch.randn(2, 3, 4, 4).contiguous(memory_format=f) for f in (torch.channels_last, torch.contiguous_format)]
    assert masked_mean_join(ys, backend=backend).is_contiguous(memory_format=torch.channels_last)


@LAYOUTS
def test_one_live_value(layout, backend):
    """Of one value the variance is 0, not 0/0, and nothing changes what it is normalised to."""
    y, live = (
        torch.full((4, 5, 1, 1), NAN).contiguous(memory_format=layout),
        torch.tensor([[False, True, False, False]]),
    )
    y[1] = 3.0
    mean, var, flags = torch.zeros(5), torch.ones(5), dict(stats="live", activation="none")
    out = bn_relu_join([y.requires_grad_()], None, None, [mean], [var], live, True, 0.25, **flags, backend=backend)
    assert (mean == 0.75).all() and (var == 0.75).all()
    assert (torch.autograd.grad(out.sum(), y)[0] == 0).all()


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
        error = (var[0].double().sqrt() - exact.var(1, correction=0).sqrt()).abs().max()
        assert error <= (1e-5 if backend in ("cpu", "reference") else 2e-4)


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


@pytest.mark.parametrize("layout", ["channel_slice", "contiguous_slice"])
def test_dropped_samples_of_slices(layout, backend):
    """They are read, too, for the gradient under stats="all", with strides that are not the gradient's."""
    check(Case(3, mask="sample"), draw(Case(3, mask="sample"), SINGLE, layouts=[layout]), backend)


@LAYOUTS
@pytest.mark.parametrize("pool", ["before", "after"])
def test_the_first_of_equals(pool, layout, backend):
    """Of several largest values of a window the first row's gets the gradient, as in PyTorch."""
    y = torch.randint(0, 3, (2, 20, 8, 10)).float().contiguous(memory_format=layout).requires_grad_()
    ones, zeros = [torch.ones(20)], [torch.zeros(20)]
    out = bn_relu_join([y], None, None, zeros, ones, eps=0.0, activation="none", pool=pool, backend=backend)
    expected = F.max_pool2d(y, 2)
    weights = torch.rand(out.shape)
    (grad,), (right,) = (torch.autograd.grad(t, y, weights) for t in (out, expected))
    assert torch.equal(out, expected) and torch.equal(grad, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_to_even(dtype, cpu_backend):
    """The mean of two neighbours is a tie: as PyTorch rounds it."""
    low = torch.arange(1 << 12).to(torch.int16).view(1, 16, 16, 16) + (0x3C00 if dtype == torch.float16 else 0x3F00)
    a, b = low.view(dtype), (low + 1).view(dtype)
    expected = ((a.float() + b.float()) / 2).to(dtype)
    assert torch.equal(bits(masked_mean_join([a, b], backend=cpu_backend)), bits(expected))


def test_nan_of_all_ones_stays_nan(cpu_backend):
    """Rounding to bfloat16 must not carry into the sign."""
    nan = torch.full((16,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y, zeros, ones = torch.ones(2, 16, 4, 4).bfloat16(), [torch.zeros(16)], [torch.ones(16)]
    assert bn_relu_join([y], None, [nan], zeros, ones, backend=cpu_backend).isnan().all()


@LAYOUTS
def test_statistics_of_parts_that_differ(layout, backend):
    """Of one channel of one sample, more values than are summed at once."""
    y = torch.randn(2, 5, 129, 67)
    y[:, :, 70:] += 3
    y[1] -= 2
    exact = y.double().transpose(0, 1).flatten(1)
    mean, var, _ = torch.ops.fractal_kernels.channel_stats(
        [y.contiguous(memory_format=layout)], None, [], 0.0, None, backend
    )
    assert_close(mean[0], exact.mean(1), "mean")
    assert_close(var[0], exact.var(1, correction=0), "variance")


@LAYOUTS
def test_statistics_of_no_values_are_zeros(layout, backend):
    y = [torch.randn(3, 5, 4, 4).contiguous(memory_format=layout) for _ in range(2)]
    for mask in (torch.tensor([True, False]), torch.tensor([[True, False, True], [False] * 3])):
        mean, var, count = torch.ops.fractal_kernels.channel_stats(y, mask, [], 0.0, None, backend)
        assert (mean[1] == 0).all() and (var[1] == 0).all() and count[1] == 0


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channel_slice"])
def test_very_many_channels(layout, cpu_backend):
    """A pixel of channels is more than is taken at a time."""
    for case in (Case(2), Case(2, affine=False, normalise=False)):
        check(case, draw(case, SINGLE, (2, 4200, 2, 3), [layout]), cpu_backend)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("case", [Case(3, training=False), Case(3, affine=False, normalise=False)], ids=str)
def test_larger_than_the_caches_and_not_aligned(case, layout, cpu_backend):
    """Neither pixels of 17 channels nor channels of 217 * 217 pixels begin where a vector of memory does."""
    check(case, draw(case, SINGLE, (2, 17, 217, 217), [layout]), cpu_backend)


@pytest.mark.parametrize("which", ["start", "sample"])
def test_an_output_that_is_not_aligned(which, cpu_backend):
    """The launcher takes any."""
    y = torch.randn(2, 16, 148, 150).to(memory_format=torch.channels_last)
    n, (size, at) = y[0].numel(), {"start": (y[0].numel(), 1), "sample": (y[0].numel() + 1, 0)}[which]
    out = torch.empty(2 * n + 2).as_strided(y.shape, (size, *y.stride()[1:]), at)
    torch.ops.fractal_kernels_cpu.join_forward(out, [y] * 8, None, [], [], [], [], 0.0, 0, True)
    torch.testing.assert_close(out, y)
    grads = [*(torch.empty_like(y) for _ in range(7)), out.zero_()]
    torch.ops.fractal_kernels_cpu.join_backward_apply(grads, y, [], None, [], [], [], [], [], 0.0, 1, True)
    assert torch.equal(out, y)


@pytest.mark.parametrize(
    ("ys", "mask", "words"),
    [
        (lambda y: [y] * 9, None, "expected 1 to 8 branches, got 9"),
        (lambda y: [y, y.double()], None, "branches of different dtypes"),
        (lambda y: [y.int()], None, "expected float32, float64, bfloat16 or float16"),
        (lambda y: [y] * 2, torch.ones(2), "expected a contiguous bool mask with one row per branch"),
        (lambda y: [y] * 2, torch.ones(3).bool(), "expected a contiguous bool mask with one row per branch"),
        (lambda y: [y] * 2, torch.ones(3, 2).bool().t(), "expected a contiguous bool mask with one row per branch"),
    ],
)
def test_the_launcher_refuses(ys, mask, words, cpu_backend):
    ys = ys(torch.randn(3, 4, 2, 2))
    with pytest.raises(RuntimeError, match=words):
        out = torch.empty_like(ys[0])
        torch.ops.fractal_kernels_cpu.join_forward(out, ys, mask, [], [], [], [], 0.0, 0, False)


def test_pools_larger_than_the_caches(cpu_backend):
    """Their rows, here of more than a vector, begin anywhere."""
    y, zeros, ones = torch.randn(274, 64, 8, 40), [torch.zeros(64)] * 8, [torch.ones(64)] * 8
    out = bn_relu_join([y] * 8, None, None, zeros, ones, eps=0.0, activation="none", pool="before", backend=cpu_backend)
    torch.testing.assert_close(out, F.max_pool2d(y, 2))


def test_a_pool_of_odd_height_by_threads(cpu_backend):
    """The row that no window covers is below an image, not below what a thread has of it."""
    torch.set_num_threads(2)
    for case in (Case(2, pool="before"), Case(2, pool="after", training=False)):
        check(case, draw(case, SINGLE, (1, 32, 67, 64)), cpu_backend)


FAR = (1 << 32) + 16  # of which 32 bits keep an offset inside of the tensor


def far_apart(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Pixels (of contiguous ones: channels) FAR + C elements apart, in memory of which only these pages exist."""
    n, c, h, w = t.shape
    step = FAR + (c if channels_last else h * w)
    strides = (h * w * step, 1, w * step, step) if channels_last else (c * step, step, w, 1)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * n * strides[0], flags=flags)
    except OSError as error:  # a limit on addresses
        pytest.skip(f"no {4 * n * strides[0] >> 30} GiB of addresses, of which next to nothing would be used: {error}")
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, strides).copy_(t)


FAR_APART = [
    (case, shape, channels_last)
    for case in (
        Case(2),
        Case(2, mask="sample"),
        Case(2, mask="sample", stats="live"),
        Case(2, training=False, pool="before"),
        Case(2, affine=False, normalise=False),
        Case(2, affine=False, normalise=False, activation="none", mask="sample"),
    )
    for shape, channels_last in itertools.product([(2, 5, 2, 2), (2, 2, 3, 9)], (True, False))
] + [(Case(2), (2, 4200, 1, 2), True), (Case(2, affine=False, normalise=False), (2, 4200, 1, 2), True)]


@pytest.mark.parametrize(("case", "shape", "channels_last"), FAR_APART, ids=str)
def test_offsets_of_more_than_32_bits(case, shape, channels_last, cpu_backend):
    data = draw(case, SINGLE, shape, ["channels_last" if channels_last else "contiguous"])
    for which in ("inputs", "gradient"):
        if which == "inputs":
            ys = data.ys
            data.ys = [far_apart(y.detach(), channels_last).requires_grad_() for y in ys]
        else:
            data.ys, data.grad = ys, far_apart(data.grad, channels_last)
        check(case, data, cpu_backend)
