"""Joins in PyTorch's own operators, for programs that run without this package: ONNX files and TorchScript traces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, compiling, reference
from ..library import Flags, accumulate_dtype

__all__ = ["is_exporting", "join"]


@compiling.assume_constant_result
def is_exporting() -> bool:
    """Whether what runs is written down as a program that knows no operators of ours."""
    return torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def join(
    ys: list[Tensor],
    mask: Tensor | None,
    means: Sequence[Tensor],
    vars: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: float,
    flags: int,
) -> Tensor:
    """The join of the kernels, each of whose parts is one operator that exporters know and runtimes fuse themselves."""
    dtype, inputs = ys[0].dtype, ys
    with checks.without_autocast(ys[0]):
        if means:
            wide = accumulate_dtype(dtype)
            params = [[None if p is None else p.to(wide) for p in of_all] for of_all in (means, vars, weights, biases)]
            parts = zip(ys, *params, strict=True)
            ys = [F.batch_norm(y, mean, var, weight, bias, eps=eps) for y, mean, var, weight, bias in parts]
        if mask is not None:
            return reference.join(ys, mask, [], [], [], [], eps, flags).to(dtype)
        if flags & Flags.RELU_BRANCH:
            ys = [F.relu(y) for y in ys]
        if flags & Flags.POOL_BEFORE:
            ys = [F.max_pool2d(y, 2) for y in ys]
        if len(ys) > 1:
            out = torch.stack(ys).sum(0) if flags & Flags.SUM else torch.stack(ys).mean(0)
        else:
            out = ys[0].clone() if ys[0] is inputs[0] else ys[0]  # which may be changed in place
        out = F.relu(out) if flags & Flags.RELU_OUTPUT else out
        return F.max_pool2d(out, 2) if flags & Flags.POOL_AFTER else out
