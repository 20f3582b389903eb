"""Formulas by which ``torch.utils.flop_counter`` counts the convolutions that our operators hold.

>>> from torch.utils.flop_counter import FlopCounterMode
>>> with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
...     y = torch.ops.fractal_kernels.conv3x3(torch.randn(2, 16, 8, 8), torch.randn(16, 16, 3, 3), "reference")
>>> counter.get_total_flops() == 2 * (2 * 8 * 8 * 16) * (16 * 9)
True

A convolution counts as defined, 2 N H W C_out C_in 9, whatever method computes it; of a fractal block, those that live
under the path count. Joins count nothing, as batch norm and ReLU do in PyTorch. Not registered with PyTorch by an
import: its counter imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .block_rows import rows_of
from .schedule import schedule

_OPS = torch.ops.fractal_kernels


def _of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """The counter gives such a formula the tensors, not their shapes, and the operator's output."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@_of_tensors
def _conv3x3(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * x[:, :1].numel() * weight.numel()


@_of_tensors
def _conv3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, *_: Any, out_val: Any = None
) -> int:
    return _conv3x3(x, weight) * (needs_x + needs_weight)


def _rows(x: Tensor, weights: list[Tensor], path: Tensor, dense: bool, flags: int) -> list[int]:
    """Of a block's convolutions that live, by row."""
    channels = sum(w.shape[0] for w in weights) // len(schedule(len(weights).bit_length()).units)
    convs, pixels = rows_of(weights, channels, path, dense, flags, x, "", False).convs, x.shape[2] * x.shape[3]
    return [
        sum(2 * conv.size * pixels * conv.weight(w).numel() for conv in row)
        for row, w in zip(convs, weights, strict=True)
    ]


@_of_tensors
def _block_forward(x: Tensor, weights: list[Tensor], *rest: Any, out_val: Any = None) -> int:
    path, dense, flags = rest[5], rest[6], rest[10]
    return sum(_rows(x, weights, path, dense, flags))


@_of_tensors
def _block_backward(grad: Tensor, x: Tensor, weights: list[Tensor], *rest: Any, out_val: Any = None) -> int:
    path, needs, dense, flags = rest[5], rest[9], rest[10], rest[13]
    rows = _rows(x, weights, path, dense, flags)
    return sum(work * ((r > 0 or needs[0]) + needs[1 + r]) for r, work in enumerate(rows))


FORMULAS: dict[Any, Callable[..., int]] = {
    _OPS.conv3x3: _conv3x3,
    _OPS.conv3x3_backward: _conv3x3_backward,
    _OPS.block_forward: _block_forward,
    _OPS.block_backward: _block_backward,
}
