"""Convolutions of a block's rows: ours against the library's, one wide against one by one.

The figures behind `fits` in fractal_kernels/cpu_conv.py and `wide_is_faster` in fractal_kernels/block_rows.py: of
forward and backward, without the gradient of an image, but for those of few pixels. Kept in results/conv: make bench
ARGS="-k bench_conv --output benchmarks/results/conv/avx512.json", few.json with -k "few_pixels and float32"; and in
results/halves conv.json with -k test_halves and few.json with -k "few_pixels and float and 16", on a processor with
AMX, and with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 or AVX512_CORE, by which PyTorch's library does without,
conv_avx512_bf16.json, few_avx512_bf16.json and conv_avx512.json: of more shapes than are left here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Contender, hold_together
from fractal_kernels import cpu_conv

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
# batch, input channels, output channels, image size
SHAPES = [
    (50, 3, 16, 32),
    (50, 3, 48, 32),
    (50, 16, 16, 32),
    (50, 16, 32, 32),
    (50, 32, 32, 16),
    (50, 64, 64, 8),
    (50, 128, 128, 4),
    (50, 128, 128, 2),
    (16, 64, 64, 32),
    (16, 128, 128, 16),
    (64, 256, 256, 16),
    (16, 256, 256, 8),
    (16, 512, 512, 4),
    (16, 256, 512, 2),
    (16, 512, 512, 2),
    (1, 64, 64, 8),
]
FEW = [
    (1, 128, 128, 2),
    (2, 128, 128, 2),
    (1, 256, 256, 2),
    (2, 256, 256, 2),
    (4, 256, 256, 2),
    (1, 256, 256, 4),
    (1, 256, 512, 4),
    (2, 256, 512, 4),
    (1, 512, 512, 4),
    (2, 512, 512, 4),
    (4, 512, 512, 4),
    (1, 512, 512, 8),
    (2, 512, 512, 8),
    (1, 64, 64, 4),
    (1, 64, 64, 7),
    (1, 64, 64, 8),
    (1, 128, 128, 4),
    (1, 128, 128, 7),
    (1, 128, 128, 8),
    (1, 256, 256, 7),
    (1, 256, 256, 8),
    (1, 512, 512, 7),
    (2, 512, 512, 2),
]


NARROW = [
    (64, 512, 512, 7),
    (32, 256, 256, 6),
    (64, 512, 512, 5),
    (64, 512, 512, 4),
    (256, 128, 128, 4),
    (64, 256, 256, 2),
]


class Library:
    """PyTorch's convolution with the functions of ours."""

    @staticmethod
    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return torch.conv2d(x, weight, padding=1)

    @staticmethod
    def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, dweight: Tensor) -> Tensor | None:
        want, one, none = [needs_x, True, False], [1, 1], [0, 0]
        dx: Tensor | None
        dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, one, one, one, False, none, 1, want)
        dweight.copy_(dw)
        return dx


KERNELS: dict[str, ModuleType | type[Library]] = {"library": Library, "cpu_conv": cpu_conv}


def channels_last(*shape: int, **made: Any) -> Tensor:
    return torch.randn(shape[0], *shape[2:], shape[1], **made).permute(0, 3, 1, 2)


def dash(value: tuple[int, ...] | torch.dtype) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def both_ways(kernel: ModuleType | type[Library], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Forward and backward, without the gradient of an image."""
    y, dweight = kernel.conv(x, weight), torch.empty_like(weight)
    dx = kernel.conv_backward(grad, x, weight, x.shape[1] > 3, dweight)
    return [y, dweight, *([] if dx is None or x.shape[1] <= 3 else [dx])]


def row_of_convs(kernel: ModuleType | type[Library], row: tuple[int, ...], **made: Any) -> dict[str, Contender]:
    """Forward and backward of a row's convs: "ours" as one wide conv, or one per column, gradients gathered. They
    return the gradient of the weight."""
    n, c, k, size, columns = row
    x, weight = channels_last(n, c, size, size, **made), channels_last(columns * k, c, 3, 3, **made)
    weights = weight.split(k)
    grad = channels_last(n, columns * k, size, size, **made)
    grads = [g.contiguous(memory_format=torch.channels_last) for g in grad.split(k, 1)]
    dweight = torch.empty_like(weight)

    def wide(_: int) -> Tensor:
        kernel.conv(x, weight)
        kernel.conv_backward(grad, x, weight, c > 3, dweight)
        return dweight

    def separate(_: int) -> Tensor:
        for w in weights:
            kernel.conv(x, w)
        total = None
        for w, g, out in zip(weights, grads, dweight.split(k), strict=True):
            dx = kernel.conv_backward(g, x, w, c > 3, out)
            total = dx if total is None or c <= 3 else total.add_(dx)
        return dweight

    return {"ours": wide, "separate": separate}


def titled(row: tuple[int, ...]) -> str:
    n, c, k, size, columns = row
    return f"one wide conv, batch {n}, {c} to {columns}x{k} channels, {size}x{size}"


@pytest.mark.parametrize("row", ROWS, ids=dash)
@pytest.mark.parametrize("name", ["library", "cpu_conv"])
def test_wide(compare: Callable[..., None], name: str, row: tuple[int, ...]) -> None:
    contenders = row_of_convs(KERNELS[name], row)
    hold_together("wide", [contenders["ours"](0).clone()], [contenders["separate"](0)], 1e-4)
    compare("conv", f"{name}, {titled(row)}", contenders, ROUNDS)


@pytest.mark.parametrize("case", SHAPES, ids=dash)
def test_conv(compare: Callable[..., None], case: tuple[int, ...]) -> None:
    n, c, k, size = case
    x, weight, grad = channels_last(n, c, size, size), channels_last(k, c, 3, 3), channels_last(n, k, size, size)
    operands = x, weight, grad
    hold_together("conv", both_ways(cpu_conv, *operands), both_ways(Library, *operands), 1e-4)
    compare(
        "conv",
        f"cpu_conv, batch {n}, {c} to {k} channels, {size}x{size}",
        {"ours": lambda _: both_ways(cpu_conv, *operands), "library": lambda _: both_ways(Library, *operands)},
        ROUNDS,
    )


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *((torch.bfloat16, case) for case in (*SHAPES[2:8:2], *SHAPES[9:15:2], *NARROW)),
        *((torch.float16, case) for case in ((50, 32, 32, 16), (16, 512, 512, 2))),
    ],
    ids=dash,
)
def test_halves(compare: Callable[..., None], dtype: torch.dtype, case: tuple[int, ...]) -> None:
    """Ours beside PyTorch's in bfloat16 and float16, and ours in float32."""
    n, c, k, size = case
    operands = channels_last(n, c, size, size), channels_last(k, c, 3, 3), channels_last(n, k, size, size)
    halves = [t.to(dtype) for t in operands]
    hold_together("conv", both_ways(cpu_conv, *halves), both_ways(Library, *(t.float() for t in halves)), 1e-2)
    compare(
        "conv",
        f"cpu_conv in {dash(dtype)}, batch {n}, {c} to {k} channels, {size}x{size}",
        {
            "ours": lambda _: both_ways(cpu_conv, *halves),
            "library": lambda _: both_ways(Library, *halves),
            "float32": lambda _: both_ways(cpu_conv, *operands),
        },
        ROUNDS,
    )


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        *((torch.float32, case) for case in FEW),
        *itertools.product((torch.bfloat16, torch.float16), [(1, 256, 256, 2), (1, 512, 512, 4), (1, 512, 512, 7)]),
    ],
    ids=dash,
)
def test_few_pixels(compare: Callable[..., None], dtype: torch.dtype, case: tuple[int, ...]) -> None:
    """Forward alone, as an answer for one image is."""
    n, c, k, size = case
    x, weight = channels_last(n, c, size, size).to(dtype), channels_last(k, c, 3, 3).to(dtype)
    tolerance, name = (1e-4, "") if dtype == torch.float32 else (1e-2, f" in {dash(dtype)}")
    hold_together("conv", [cpu_conv.conv(x, weight)], [Library.conv(x, weight)], tolerance)
    compare(
        "conv",
        f"cpu_conv forward{name}, batch {n}, {c} to {k} channels, {size}x{size}",
        {"ours": lambda _: cpu_conv.conv(x, weight), "library": lambda _: Library.conv(x, weight)},
        4 * ROUNDS,
    )
