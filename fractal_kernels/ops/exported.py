"""Joins in PyTorch's own operators, for what does not know ours: programs that run without this package (torch.export,
ONNX, TorchScript), and the transforms of torch.func."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, compiling, reference
from ..library import Flags, accumulate_dtype

TRANSFORM = "a transform of torch.func"


@compiling.assume_constant_result
def foreign_tool() -> str:
    """What runs the caller without knowing our operators, in words, or an empty string.

    torch.export knows them, but not their gradients: its programs take neither Python nor our backwards along.
    """
    if torch._C._are_functorch_transforms_active():
        return TRANSFORM
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        if torch.onnx.is_in_onnx_export():
            return "an export to ONNX"
        return "torch.export" if torch.compiler.is_exporting() else "a TorchScript trace"
    return ""


def channels_last(t: Tensor) -> Tensor:
    """``t`` in channels_last; as it is under a transform of torch.func, of which not all know memory formats."""
    return t if foreign_tool() == TRANSFORM else t.contiguous(memory_format=torch.channels_last)


def join(
    ys: list[Tensor],
    mask: Tensor | None,
    means: Sequence[Tensor | None],
    vars: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: float,
    flags: int,
    plain: tuple[int, ...] = (),
    batch_stats: bool = False,
    momentum: float | Tensor = 0.0,
) -> Tensor:
    """The join of the kernels, each of whose parts is one operator that exporters know and runtimes fuse themselves.

    With the batch's statistics, ``means`` and ``vars`` are the running ones that move, or Nones. ``plain`` branches are
    not normalised.
    """
    dtype, inputs = ys[0].dtype, ys
    wide = accumulate_dtype(dtype)
    with checks.without_autocast(ys[0]):
        if means:
            live = mask is not None and (mask.dim() == 1 or bool(flags & Flags.STATS_LIVE))
            other = any(t is not None and t.dtype != wide for t in (*means, *vars))
            if batch_stats and (live or other or isinstance(momentum, Tensor)):  # not the statistics of batch_norm
                return _by_definition(ys, mask, means, vars, weights, biases, eps, flags, plain, momentum).to(dtype)
            if mask is not None and not batch_stats:  # else a NaN that is dropped would be in the weight's gradient
                ys = [reference.where_alive(mask, i, y) for i, y in enumerate(ys)]
            if foreign_tool() == TRANSFORM:  # whose batch_norm takes one dtype
                ys = [y.to(wide) for y in ys]
            share = 0.0 if isinstance(momentum, Tensor) else momentum
            params = [[None if p is None else p.to(wide) for p in of_all] for of_all in (means, vars, weights, biases)]
            ys = [
                y if i in plain else F.batch_norm(y, mean, var, w, b, batch_stats, share, eps)
                for i, (y, mean, var, w, b) in enumerate(zip(ys, *params, strict=True))
            ]
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
        return (F.max_pool2d(out, 2) if flags & Flags.POOL_AFTER else out).to(dtype)


def _by_definition(
    ys: list[Tensor],
    mask: Tensor | None,
    means: Sequence[Tensor | None],
    vars: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: float,
    flags: int,
    plain: tuple[int, ...],
    momentum: float | Tensor,
) -> Tensor:
    """The join of the batch's statistics, as the reference has it: of branches that are dropped, of running statistics
    of another dtype, of a momentum that is a tensor."""
    wide, running = accumulate_dtype(ys[0].dtype), [t for t in (*means, *vars) if t is not None]
    if running:
        with torch.no_grad():
            of_all = mask is not None and mask.dim() == 2 and not flags & Flags.STATS_LIVE
            normed = [i for i in range(len(ys)) if i not in plain]
            found = [reference.statistics(ys[i], None if of_all else mask, i) for i in normed]
            mean, var, count = (torch.stack(parts) for parts in zip(*found, strict=True))
            share = momentum.to(wide).expand(len(ys))[normed] if isinstance(momentum, Tensor) else momentum
            for old, new, by in reference.updates(running, mean, var, count.to(wide), share):
                old.lerp_(new, by)  # one by one, as vmap takes them
    one, zero = (ys[0].new_full(ys[0].shape[1:2], value, dtype=wide) for value in (1.0, 0.0))
    scale = [one if w is None else w.to(wide) for w in weights]
    shift = [zero if b is None else b.to(wide) for b in biases]
    return reference.normalised_join(ys, mask, None, None, scale, shift, eps, flags, plain)
