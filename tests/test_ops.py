"""Every flag, layout and dtype of the join against the oracle, forward and backward."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    LAYOUTS,
    Case,
    all_flags,
    assert_same_bits,
    bits,
    check,
    draw,
    in_layouts,
    plain_flags,
    run,
)
from conftest import GPU_BACKENDS, INTERPRETED

from fractal_kernels import bn_relu_join, masked_mean_join
from fractal_kernels.library import in_one_layout

THREADS = 2
GPU = True  # these tests run on a GPU's backends too: on one, under Triton's interpreter, or executed on the host
QUICK = INTERPRETED and os.environ.get("FRACTAL_INTERPRET") != "all"
some_of = zip if QUICK else itertools.product  # a few combinations, or all
NAN, INF = float("nan"), float("inf")
TYPICAL = [
    Case(),
    Case(mask="batch"),
    Case(mask="sample", stats="live"),
    Case(mask="sample", pool="before"),
    Case(pool="after", activation="output", reduction="sum"),
    Case(training=False, mask="sample"),
    Case(affine=False, tracked=False, training=False),
    Case(affine=False, normalise=False, mask="sample", activation="none"),
]


def need_gpu_dtype(dtype):
    if dtype == torch.float64:
        pytest.skip("the backends of a GPU have no float64")
    if dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("Triton's interpreter does not round bfloat16 to nearest")


def test_memory_is_poisoned():
    like = torch.ones(3, 4)
    allocated = [
        torch.empty(5),
        torch.empty_like(like),
        torch.empty_strided((3, 4), (1, 3)),
        like.new_empty(7),
        like.new_empty((2, 3), dtype=torch.float64),
        like.bfloat16().new_empty(2),
        like.half().new_empty((2, 5, 3)).movedim(-1, 1),
    ]
    assert all(t.isnan().all() for t in allocated)


@pytest.mark.parametrize("case", all_flags(), ids=str)
def test_all_flags(case, backend):
    if QUICK and case.stats == "live" and (case.mask == "batch" or not case.training):
        pytest.skip("the kernels are those of stats='all'")
    layouts = ["channels_last", "contiguous"]
    if QUICK:  # half a second each: one layout a combination
        layouts = [layouts[(case.k + (case.activation == "output") + (case.pool is None)) % 2]]
    for layout in layouts:
        check(case, draw(case, layouts=[layout]), backend)


@pytest.mark.parametrize("case", plain_flags(), ids=str)
def test_plain_flags(case, backend):
    for layout in ("channels_last", "contiguous"):
        check(case, draw(case, layouts=[layout]), backend)


@pytest.mark.parametrize("case", [case for case in TYPICAL if case.pool is None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_than_the_caches(case, dtype, cpu_backend):
    """What is written past the caches: whole vectors at aligned places, the rest as ever."""
    shape = (9 if dtype == torch.float32 else 18, 64, 56, 56)
    for name in ("channels_last", "contiguous", "channel_slice"):
        check(case, draw(case, dtype, shape, [name], grad_layout="channels_last"), cpu_backend)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("mask", ["none", "batch", "sample"])
def test_number_of_branches(k, mask, backend):
    for pool, normalise in itertools.product((None, "before"), (True, False)):
        if QUICK and (pool is None) == (normalise == (k % 2 == 0)):
            continue  # of every number one plain join and one that normalises, of which one pools
        case = Case(k, affine=normalise, mask=mask, pool=pool, normalise=normalise)
        check(case, draw(case, torch.float32, layouts=["channels_last"], seed=k), backend)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(case, dtype, backend):
    if backend in GPU_BACKENDS:
        need_gpu_dtype(dtype)
    for layout, channels in itertools.product(("channels_last", "contiguous", "channel_slice"), (5, 32, 67)):
        result = check(case, draw(case, dtype, (3, channels, 6, 8), [layout]), backend)
        assert result.out.dtype == dtype
        assert all(g.dtype == dtype for g in result.grads[: case.k])
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(t.dtype == parameters for t in (*result.grads[case.k :], *result.running))


@pytest.mark.parametrize("case", TYPICAL, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, layout, backend):
    for grad_layout in LAYOUTS:
        check(case, draw(case, torch.float32, layouts=[layout], grad_layout=grad_layout), backend)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_mixed_layouts(case, backend):
    for first, second in itertools.permutations(LAYOUTS, 2):
        check(case, draw(case, torch.float64, layouts=[first, second]), backend)


@pytest.mark.parametrize(
    "shape", [(6, 5), (3, 5, 9), (2, 3, 4, 3, 5), (2, 5, 1, 1), (1, 3, 1, 7), (5, 1, 3, 3)], ids=str
)
def test_other_ranks(shape, backend):
    for mask, normalise in itertools.product(("none", "batch", "sample"), (True, False)):
        case = Case(2, affine=normalise, mask=mask, normalise=normalise)
        check(case, draw(case, shape=shape, layouts=["contiguous"]), backend)


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (2, 5), (5, 2), (7, 4), (5, 35)], ids=str)
@pytest.mark.parametrize("pool", ["before", "after"])
def test_pools_of_odd_sizes(size, pool, backend):
    shape = (3, 5 if QUICK else 9, *size)  # of contiguous pixels each channel is a program; 9: a vector and one more
    for mask, layout in some_of(("none", "sample"), ("contiguous", "channel_slice", "channels_last")):
        check(case := Case(3, pool=pool, mask=mask), draw(case, shape=shape, layouts=[layout]), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channel_slice"])
def test_many_blocks(dtype, layout, cpu_backend):
    """More units than one thread's grain, and partials that are merged."""
    for case in (Case(2, mask="sample", stats="live"), Case(2, pool="before"), Case(2, training=False)):
        check(case, draw(case, dtype, (9, 24, 40, 34), [layout]), cpu_backend)


@pytest.mark.parametrize("case", [Case(pool="before"), Case(normalise=False, affine=False, activation="none")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_keeps_layout(case, dtype, backend):
    if backend in GPU_BACKENDS:
        need_gpu_dtype(dtype)
    for layout in ("channels_last", "channel_slice"):
        result = run(case, draw(case, dtype, layouts=[layout]), backend)
        for t in (result.out, *result.grads[: case.k]):
            assert t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    for layout in ("contiguous", "contiguous_slice"):
        result = run(case, draw(case, dtype, layouts=[layout]), backend)
        assert all(t.is_contiguous() for t in (result.out, *result.grads[: case.k]))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channel_slice", "contiguous_slice"])
def test_layouts_read_in_place(layout):
    (y,) = in_layouts([torch.randn(2, 3, 4, 5)], [layout])
    assert in_one_layout([y])[0][0] is y


# --- dropped branches --------------------------------------------------------------------------

POISON_CASES = [
    Case(3, mask="batch", pool=pool, training=training, normalise=normalise, affine=normalise, activation=activation)
    for pool, activation in itertools.product((None, "before", "after"), ("branch", "output"))
    for training, normalise in ((True, True), (False, True), (True, False))
] + [
    Case(3, mask="sample", stats=stats, pool=pool, training=training, normalise=normalise, affine=normalise)
    for pool in (None, "before", "after")
    for stats, training, normalise in (("live", True, True), ("all", False, True), ("all", True, False))
]


@pytest.mark.parametrize("case", POISON_CASES, ids=str)
def test_dropped_branches_are_not_read(case, backend):
    layouts = ("channels_last", "contiguous", "swapped")
    for layout, (dtype, bad) in some_of(layouts, ((torch.float64, NAN), (torch.float32, INF), (torch.float16, -INF))):
        data = draw(case, dtype, layouts=[layout])
        with torch.no_grad():
            for y, kept in zip(data.ys, data.mask.view(case.k, -1), strict=True):
                y[~kept.expand(y.shape[0])] = bad
        result = check(case, data, backend)
        assert all(t.isfinite().all() for t in result.tensors())


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("pool", [None, "before", "after"])
def test_statistics_of_dropped_branches_are_not_used(pool, bad, backend):
    case = Case(3, mask="batch", pool=pool, training=False)
    data = draw(case, torch.float32)
    data.mask = torch.tensor([True, False, True], device=data.mask.device)
    data.running_means[1].fill_(bad)
    data.running_vars[1].fill_(bad)
    result = run(case, data, backend)
    assert all(t.isfinite().all() for t in (result.out, *result.grads))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_no_channels(layout, backend):
    ys = [LAYOUTS[layout](torch.ones(2, 0, 4, 4)).requires_grad_() for _ in range(2)]
    empty = [torch.ones(0) for _ in range(2)]
    for out in (
        masked_mean_join(ys, backend=backend),
        bn_relu_join(ys, empty, empty, None, None, training=True, backend=backend),
    ):
        assert out.shape == (2, 0, 4, 4)
        assert [g.shape for g in torch.autograd.grad(out.sum(), ys)] == [y.shape for y in ys]
    _, _, count = torch.ops.fractal_kernels.channel_stats([y.detach() for y in ys], None, [], 0.0, None, backend)
    assert (count == count).all()


@pytest.mark.parametrize("pool", ["before", "after"])
def test_windows_of_minus_infinity(pool, backend):
    """Without an activation nothing is below a floor: the first of a window gets the gradient."""
    y = torch.full((1, 8, 2, 2), -INF).requires_grad_()
    ones = [torch.ones(8)], [torch.zeros(8)]
    out = bn_relu_join([y], *ones, *ones[::-1], activation="none", pool=pool, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), y)
    assert (grad[..., 0, 0] > 0.9).all() and grad.count_nonzero() == 8


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["none", "branch"])
@pytest.mark.parametrize("pool", ["before", "after"])
def test_windows_with_nan(pool, activation, layout, backend):
    """A window's gradient goes to its NaN, as in PyTorch (of several, not to the same one)."""
    y = torch.randn(2, 20, 8, 8)
    for at in range(4):  # every place of a window, in a channel of its own; the other channels hold none
        y[:, at, at // 2 :: 2, at % 2 :: 2] = NAN
    y = y.contiguous(memory_format=layout).requires_grad_()
    ones, zeros = [torch.ones(20)], [torch.zeros(20)]
    options = {"eps": 0.0, "activation": activation, "pool": pool, "backend": backend}
    out = bn_relu_join([y], None, None, zeros, ones, **options)
    expected = F.max_pool2d(y if activation == "none" else F.relu(y), 2)
    torch.testing.assert_close(out, expected, equal_nan=True)
    weights = torch.rand(out.shape)
    (grad,) = torch.autograd.grad(out, y, weights)
    (right,) = torch.autograd.grad(expected, y, weights)
    assert right[:, :4].count_nonzero() == 2 * 4 * 16
    torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("pool", [None, "before", "after"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_everything_dropped(pool, training, normalise, per_sample, backend):
    case = Case(2, mask="sample" if per_sample else "batch", stats="live", pool=pool, training=training)
    case = Case(**{**vars(case), "normalise": normalise, "affine": normalise})
    data = draw(case, torch.float32)
    data.mask = torch.zeros_like(data.mask)
    with torch.no_grad():
        for y in data.ys:
            y.fill_(NAN)
    before = [t.clone() for t in (*(data.running_means or []), *(data.running_vars or []))]
    result = run(case, data, backend)
    assert all((t == 0).all() for t in (result.out, *result.grads))
    assert all(torch.equal(a, b) for a, b in zip(before, result.running, strict=True))


def test_dropped_sample_is_zero_whatever_the_statistics_are(backend):
    data = draw(Case(2, mask="sample"))
    with torch.no_grad():
        data.ys[1][0] = NAN  # under stats="all" the statistics of the branch are NaN
    assert (run(Case(2, mask="sample"), data, backend).out[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_mask_dtypes(dtype, backend):
    y = [torch.full((2, 3, 2, 2), float(i)) for i in range(3)]
    mask = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=dtype)
    out = masked_mean_join(y, mask, backend=backend)
    assert out[0].unique().item() == 1.0 and out[1].unique().item() == 1.5
    assert torch.equal(out, masked_mean_join(y, mask.t().contiguous().t(), backend=backend))


# --- empty batches, repeats, gradients ---------------------------------------------------------


@pytest.mark.parametrize("case", [*TYPICAL, Case(pool="before", mask="batch", training=False)], ids=str)
def test_empty_batch(case, backend):
    for layout in ("channels_last", "contiguous"):
        data = draw(case, torch.float32, (0, 5, 6, 7), [layout])
        result = run(case, data, backend)
        assert result.out.shape == data.grad.shape
        assert [g.shape for g in result.grads] == [t.shape for t in data.leaves]
        assert all((g == 0).all() for g in result.grads)
        before = [*(data.running_means or []), *(data.running_vars or [])]
        assert all(torch.equal(a, b) for a, b in zip(before, result.running, strict=True))


@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_repeats_and_threads_give_the_same_bits(case, backend):
    for layout, dtype in itertools.product(("channels_last", "contiguous"), (torch.float32, torch.bfloat16)):
        data = draw(case, dtype, (8, 24, 26, 20), [layout])
        first = run(case, data, backend)
        assert_same_bits(first, run(case, data, backend))
        if backend == "cpu":
            torch.set_num_threads(1)
            assert_same_bits(first, run(case, data, backend))
            torch.set_num_threads(2)


GRADCHECK = [Case(2, mask=mask, pool=pool, training=t) for mask in ("none", "batch", "sample") for pool, t in
             ((None, True), ("before", True), ("after", False))] + [
    Case(2, mask="sample", stats="live"),
    Case(2, activation="output", reduction="sum"),
    Case(2, affine=False, activation="none", tracked=False),
]  # fmt: skip


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck(case, backend):
    if backend in GPU_BACKENDS:
        pytest.skip("gradcheck needs float64, which the backends of a GPU have not")
    d = draw(case, shape=(3, 2, 4, 3), layouts=["channels_last", "contiguous"])
    k = case.k

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        weights, biases = (leaves[k : 2 * k], leaves[2 * k :]) if case.affine else (None, None)
        running = [ts and [t.clone() for t in ts] for ts in (d.running_means, d.running_vars)]
        return bn_relu_join(leaves[:k], weights, biases, *running, d.mask, case.training, **case.flags, backend=backend)

    assert torch.autograd.gradcheck(function, d.leaves)


@pytest.mark.parametrize("mask", ["none", "batch", "sample"])
def test_gradcheck_of_the_mean(mask, backend):
    if backend in GPU_BACKENDS:
        pytest.skip("gradcheck needs float64, which the backends of a GPU have not")
    d = draw(Case(3, affine=False, normalise=False, mask=mask), shape=(3, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda *ys: masked_mean_join(ys, d.mask, backend=backend), d.ys)


@pytest.mark.parametrize("case", TYPICAL, ids=str)
def test_expanded_gradient(case, backend):
    """``out.sum().backward()`` and a gradient per channel hand over tensors of stride 0."""
    for shape in ((1, 1, 1, 1), (1, 5, 1, 1), (4, 1, 1, 1)):
        data = draw(case, shape=(4, 5, 6, 7))
        data.grad = torch.linspace(0.5, 2, max(shape), dtype=data.grad.dtype).view(shape).expand(data.grad.shape)
        check(case, data, backend)


def test_expanded_inputs(backend):
    for case in (Case(2), Case(2, training=False, pool="before"), Case(2, affine=False, normalise=False)):
        for size in ((1, 5, 6, 7), (4, 5, 1, 1), (4, 1, 6, 7)):
            data = draw(case, shape=(4, 5, 6, 7))
            data.ys[1] = torch.randn(size, dtype=data.ys[0].dtype).expand(4, 5, 6, 7).requires_grad_()
            check(case, data, backend)


def test_gradients_share_no_memory(backend):
    """Scaling one gradient in place must not scale another, nor the one that came."""
    a, b = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    grad = torch.ones(2, 3, 4, 4)
    masked_mean_join([a, b], backend=backend).backward(grad)
    a.grad.mul_(10), b.grad.mul_(100)
    assert a.grad.unique().item() == 5 and b.grad.unique().item() == 50 and grad.unique().item() == 1


def test_only_the_gradients_that_are_asked_for(backend):
    for case in (Case(2), Case(2, training=False), Case(2, training=False, mask="sample", pool="before")):
        data = draw(case)
        full = run(case, data, backend)
        for wanted in (0, 1, 2, 5):
            d = data.copy()
            for i, leaf in enumerate(d.leaves):
                leaf.requires_grad_(i == wanted)
            args = (d.ys, d.weights, d.biases, d.running_means, d.running_vars, d.mask, case.training)
            bn_relu_join(*args, **case.flags, backend=backend).backward(d.grad)
            assert torch.equal(bits(d.leaves[wanted].grad), bits(full.grads[wanted]))
            assert all(leaf.grad is None for i, leaf in enumerate(d.leaves) if i != wanted)


def test_saved_for_backward():
    """Of the mean, the mask; of a normalised join, the inputs themselves and vectors."""
    saved: list[torch.Tensor] = []
    case = Case(3, mask="sample")
    data = draw(case, torch.float32, (8, 16, 12, 12))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_mean_join(data.ys, data.mask)
        assert sum(t.nbytes for t in saved) == data.mask.nbytes
        saved.clear()
        run(case, data, None)
    big = [t for t in saved if t.numel() >= data.ys[0].numel()]
    assert {t.data_ptr() for t in big} == {y.data_ptr() for y in data.ys} and len(big) == 3
    assert sum(t.numel() for t in saved) - sum(t.numel() for t in big) <= 3 * 16 * 4 + 3 + data.mask.numel()
