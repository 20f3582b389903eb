"""Convolutions of a block's rows: one wide against one by one, and products of slices against the library at 2x2.

The figures behind `wide_is_faster` in fractal_kernels/block_ops.py and `fits` in fractal_kernels/tiny_conv.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.compare import hold_together
from fractal_kernels import tiny_conv

ROUNDS = 15
# batch, input channels, channels of a column, image size, columns that start at the row
ROWS = [
    (50, 3, 16, 32, 3),
    (50, 16, 16, 32, 2),
    (50, 32, 64, 8, 3),
    (50, 64, 128, 4, 3),
    (50, 128, 128, 2, 3),
    (16, 64, 128, 16, 3),
    (16, 128, 256, 8, 3),
    (16, 256, 512, 4, 3),
    (16, 512, 512, 4, 2),
]
TINY = [(16, 256, 512), (16, 512, 512), (50, 128, 128)]


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def backward(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    want = [needs_x, True, False]
    one, none = [1, 1], [0, 0]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, one, one, one, False, none, 1, want)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(map(str, r)))
def test_wide(compare: Callable[..., None], row: tuple[int, ...]) -> None:
    """ "ours" is one wide conv, forward and backward; the baseline one conv per column, gradients gathered."""
    n, c, k, size, columns = row
    x, weight = channels_last(n, c, size, size), channels_last(columns * k, c, 3, 3)
    weights = weight.split(k)
    grad = channels_last(n, columns * k, size, size)
    grads = [g.contiguous(memory_format=torch.channels_last) for g in grad.split(k, 1)]
    dweight = torch.empty_like(weight)

    def wide(_: int) -> Tensor:
        torch.conv2d(x, weight, padding=1)
        return backward(grad, x, weight, c > 3)[1]

    def separate(_: int) -> Tensor:
        for w in weights:
            torch.conv2d(x, w, padding=1)
        total = None
        for w, g, out in zip(weights, grads, dweight.split(k), strict=True):
            dx, dw, _none = backward(g, x, w, c > 3)
            out.copy_(dw)
            total = dx if total is None or c <= 3 else total.add_(dx)
        return dweight

    hold_together("wide", [wide(0)], [separate(0)], 1e-4)
    compare(
        "conv",
        f"one wide conv, batch {n}, {c} to {columns}x{k} channels, {size}x{size}",
        {"ours": wide, "separate": separate},
        ROUNDS,
    )


@pytest.mark.parametrize("case", TINY, ids=lambda r: "-".join(map(str, r)))
def test_tiny(compare: Callable[..., None], case: tuple[int, ...]) -> None:
    n, c, k = case
    x, weight, grad = channels_last(n, c, 2, 2), channels_last(k, c, 3, 3), channels_last(n, k, 2, 2)
    dweight = torch.empty_like(weight)

    def ours(_: int) -> list[Tensor]:
        y = tiny_conv.conv(x, weight)
        dx = tiny_conv.conv_backward(grad, x, weight, True, dweight)
        assert dx is not None
        return [y, dx, dweight]

    def library(_: int) -> list[Tensor]:
        return [torch.conv2d(x, weight, padding=1), *backward(grad, x, weight)[:2]]

    hold_together("tiny", ours(0), library(0), 1e-4)
    compare(
        "conv",
        f"2x2 conv as products of slices, batch {n}, {c} to {k} channels",
        {"ours": ours, "library": library},
        ROUNDS,
    )
