"""Properties of the join over shapes, strides, slices and masks that nobody would choose."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Case, assert_close, assert_same_bits, check, draw, expect, run
from conftest import BACKENDS, need_backend
from hypothesis import given
from hypothesis import strategies as st

from fractal_kernels import bn_relu_join, drop_path_mask, masked_mean_join

pytestmark = pytest.mark.parametrize("name", BACKENDS)


seeds = st.integers(0, 2**16)
layouts = st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@st.composite
def cases(draw_: st.DrawFn, normalise: bool | None = None, plain: bool = False) -> Case:
    choose = lambda *values: draw_(st.sampled_from(values))  # noqa: E731
    normalised = draw_(st.booleans()) if normalise is None else normalise
    k = draw_(st.integers(1, 8))
    return Case(
        k=k,
        affine=normalised and draw_(st.booleans()),
        activation=choose("branch", "output", "none"),
        reduction=choose("mean", "sum"),
        pool=choose(None, "before", "after"),
        mask=choose("none", "batch", "sample"),
        stats=choose("all", "live"),
        training=draw_(st.booleans()),
        normalise=normalised,
        tracked=draw_(st.booleans()),
        plain=tuple(sorted(draw_(st.sets(st.integers(0, k - 1), max_size=k - 1)))) if plain and normalised else (),
    )


@st.composite
def shapes(draw_: st.DrawFn) -> tuple[int, ...]:
    """[N, C, H, W] that can be pooled and trained on."""
    channels = draw_(st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 33]))
    return draw_(st.integers(0, 5)), channels, draw_(st.integers(2, 9)), draw_(st.integers(2, 19))


@given(case=cases(plain=True), shape=shapes(), names=layouts, grad=st.sampled_from(sorted(LAYOUTS)), seed=seeds)
def test_equals_the_oracle(name, case, shape, names, grad, seed):
    need_backend(name)
    check(case, draw(case, torch.float64, shape, names, seed, grad), name)


@given(case=cases(plain=True), shape=shapes(), names=layouts, dtype=dtypes, seed=seeds)
def test_forward_equals_the_oracle_in_every_dtype(name, case, shape, names, dtype, seed):
    need_backend(name)
    data = draw(case, dtype, shape, names, seed)
    result, expected = run(case, data, name), expect(case, data)
    assert_close(result.out, expected.out, "output")
    for a, e in zip(result.running, expected.running, strict=True):
        assert_close(a, e, "running statistics")


@given(case=cases(normalise=True, plain=True), shape=shapes(), seed=seeds)
def test_layout_changes_no_result(name, case, shape, seed):
    need_backend(name)
    data = draw(case, torch.float64, shape, ["channels_last"], seed)
    first = run(case, data, name)
    other = draw(case, torch.float64, shape, ["contiguous", "channel_slice"], seed)
    for a, b in zip(first.tensors(), run(case, other, name).tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@given(case=cases(), shape=shapes(), seed=seeds, order=st.randoms(use_true_random=False))
def test_branches_can_be_permuted_with_their_masks(name, case, shape, seed, order):
    need_backend(name)
    data = draw(case, torch.float64, shape, ["channels_last"], seed)
    index = list(range(case.k))
    order.shuffle(index)
    moved = data.copy()
    for field in ("ys", "weights", "biases", "running_means", "running_vars"):
        values = getattr(moved, field)
        setattr(moved, field, values and [values[i] for i in index])
    moved.mask = None if data.mask is None else data.mask[index]
    a, b = run(case, data, name), run(case, moved, name)
    torch.testing.assert_close(a.out, b.out, rtol=0, atol=1e-11)
    for values, others in ((a.grads, b.grads), (a.running, b.running)):
        for group in range(len(values) // case.k):
            for at, i in enumerate(index):
                torch.testing.assert_close(values[group * case.k + i], others[group * case.k + at], rtol=0, atol=1e-11)


@given(k=st.integers(1, 8), shape=shapes(), layout=st.sampled_from(sorted(LAYOUTS)), seed=seeds, p=st.floats(0, 1))
def test_mean_of_equal_branches_is_the_branch(name, k, shape, layout, seed, p):
    need_backend(name)
    generator = torch.Generator().manual_seed(seed)
    y = LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=torch.float64))
    mask = drop_path_mask(k, p, shape[0], generator=generator)
    torch.testing.assert_close(masked_mean_join([y] * k, mask, backend=name), y, rtol=1e-14, atol=0)
    torch.testing.assert_close(masked_mean_join([y] * k, backend=name), y, rtol=1e-14, atol=0)


@given(case=cases(plain=True), shape=shapes(), seed=seeds)
def test_mask_of_ones_is_no_mask(name, case, shape, seed):
    need_backend(name)
    data = draw(case, torch.float64, shape, ["channels_last"], seed)
    data.mask = None
    plain = run(case, data, name)
    for size in ((case.k,), (case.k, shape[0])):
        data.mask = torch.ones(size, dtype=torch.bool)
        for a, b in zip(plain.tensors(), run(case, data, name).tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@given(case=cases(), shape=shapes(), seed=seeds)
def test_batch_mask_is_the_join_of_what_is_left(name, case, shape, seed):
    """A [k] mask gives the bits of the join of the live branches alone, in the output and in their gradients."""
    need_backend(name)
    data = draw(Case(**{**vars(case), "mask": "batch"}), torch.float32, shape, ["channels_last"], seed)
    full = run(case, data, name)
    live = data.mask.nonzero().flatten().tolist()
    few = data.copy()
    few.mask = None
    for field in ("ys", "weights", "biases", "running_means", "running_vars"):
        values = getattr(few, field)
        setattr(few, field, values and [values[i] for i in live])
    part = run(Case(**{**vars(case), "k": len(live), "mask": "none"}), few, name)
    assert_close(full.out, part.out.double(), "output")
    for group in range(len(full.grads) // case.k):
        for at, i in enumerate(live):
            assert_close(full.grads[group * case.k + i], part.grads[group * len(live) + at].double(), "gradient")


@given(case=cases(normalise=True), shape=shapes(), seed=seeds)
def test_sample_mask_in_evaluation_is_a_batch_mask_per_sample(name, case, shape, seed):
    need_backend(name)
    case = Case(**{**vars(case), "mask": "sample", "training": False, "tracked": True})
    data = draw(case, torch.float64, shape, ["channels_last"], seed)
    args = (data.weights, data.biases, data.running_means, data.running_vars)
    out = bn_relu_join(data.ys, *args, data.mask, **case.flags, backend=name)
    for n in range(shape[0]):
        one = bn_relu_join([y[n : n + 1] for y in data.ys], *args, data.mask[:, n], **case.flags, backend=name)
        torch.testing.assert_close(out[n : n + 1], one, rtol=0, atol=1e-12)


@given(case=cases(), shape=shapes(), names=layouts, dtype=dtypes, seed=seeds)
def test_repeats_give_the_same_bits(name, case, shape, names, dtype, seed):
    need_backend(name)
    data = draw(case, dtype, shape, names, seed)
    assert_same_bits(run(case, data, name), run(case, data, name))


@given(k=st.integers(1, 8), n=st.integers(0, 50), p=st.floats(0, 1), seed=seeds)
def test_a_branch_survives(name, k, n, p, seed):
    def make(batch: int | None) -> torch.Tensor:
        return drop_path_mask(k, p, batch, generator=torch.Generator().manual_seed(seed))

    for mask, size in ((make(None), (k,)), (make(n), (k, n))):
        assert mask.shape == size and mask.dtype == torch.bool and bool(mask.any(0).all())
    assert torch.equal(make(n), make(n))
