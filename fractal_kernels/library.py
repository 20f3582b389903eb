"""The four kernels as PyTorch operators: schemas, fakes, output allocation and dispatch to a backend's launcher.

An operator allocates its outputs, brings its inputs into one layout and calls the launcher of the backend it is given.
A launcher writes into those outputs; it knows nothing of autograd, modules or dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag

import torch
from torch import Tensor

from . import backends

MAX_BRANCHES = 8


class Flags(IntFlag):
    """The compile-time flags of the join kernels (the same bits as in csrc/join.h)."""

    SUM = 1
    RELU_BRANCH = 2
    RELU_OUTPUT = 4
    POOL_BEFORE = 8
    POOL_AFTER = 16
    STATS_LIVE = 32


POOL = int(Flags.POOL_BEFORE | Flags.POOL_AFTER)  # a plain integer: operators of an enumeration are Python code


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and parameters: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _collapses(t: Tensor) -> bool:
    """Whether the spatial axes are one axis of evenly spaced pixels."""
    dims = [d for d in range(2, t.dim()) if t.shape[d] != 1]
    return all(t.stride(a) == t.stride(b) * t.shape[b] for a, b in zip(dims, dims[1:], strict=False))


def _pixel_stride(t: Tensor) -> int | torch.SymInt:
    for d in range(t.dim() - 1, 1, -1):
        if t.shape[d] != 1:
            return t.stride(d)
    return 1


def _fits(t: Tensor, channels_last: bool) -> bool:
    dense = torch.channels_last if channels_last and t.dim() == 4 else torch.contiguous_format
    if (not channels_last or t.dim() == 4) and t.is_contiguous(memory_format=dense):
        return True  # what follows says the same of a dense tensor, in Python
    if t.numel() == 0:
        return True
    if not _collapses(t):
        return False
    if channels_last:  # the pixel stride excludes expanded tensors, whose pixels overlap
        return t.shape[1] == 1 or (t.stride(1) == 1 and (_pixels(t) == 1 or _pixel_stride(t) >= t.shape[1]))
    return _pixels(t) == 1 or _pixel_stride(t) == 1


def _pixels(t: Tensor) -> int:
    pixels = 1
    for d in range(2, t.dim()):
        pixels *= t.shape[d]
    return pixels


def in_one_layout(tensors: list[Tensor]) -> tuple[list[Tensor], bool]:
    """The tensors as a kernel can read them together (this list, if it can), and whether that is channels last.

    It is the layout that most of them are in; channels last if both fit.
    """
    last = sum(_fits(t, True) for t in tensors)
    if last == len(tensors):
        return tensors, True
    channels_last = last >= sum(_fits(t, False) for t in tensors)
    return [to_layout(t, channels_last) for t in tensors], channels_last


def to_layout(t: Tensor, channels_last: bool) -> Tensor:
    """``t`` itself if a kernel can read it in this layout (channel slices included), else a dense copy."""
    if _fits(t, channels_last):
        return t
    return empty(t.shape, t, channels_last).copy_(t)


def empty(shape: Sequence[int], like: Tensor, channels_last: bool) -> Tensor:
    """An uninitialised dense tensor [N, C, *] of the dtype and device of ``like``."""
    if shape == like.shape and (like.dim() == 4 or not channels_last):
        dense = torch.channels_last if channels_last else torch.contiguous_format
        if like.is_contiguous(memory_format=dense):
            return torch.empty_like(like)  # the same, without the strides being worked out in Python
    if not channels_last:
        return like.new_empty(shape)
    strides, step = [1] * len(shape), shape[1]
    for d in (*range(len(shape) - 1, 1, -1), 0):
        strides[d], step = step, step * shape[d]
    return like.new_empty_strided(shape, strides)  # a permuted view could not be changed in place


def pooled(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], shape[1], shape[2] // 2, shape[3] // 2)


_LIB = torch.library.Library("fractal_kernels", "DEF")
_NORM = "Tensor[] means, Tensor[] vars, Tensor[] weights, Tensor[] biases"
_LIB.define(
    "channel_stats(Tensor[] ys, Tensor? mask, Tensor(a!)[] running, float momentum, Tensor? momenta, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
_LIB.define(
    f"join_forward(Tensor[] ys, Tensor? mask, {_NORM}, float eps, int flags, str backend) -> Tensor",
)
_LIB.define(
    f"join_backward_reduce(Tensor grad, Tensor[] ys, Tensor? mask, {_NORM}, float eps, int flags, str backend)"
    " -> (Tensor, Tensor)",
)
_LIB.define(
    f"join_backward_apply(Tensor grad, Tensor[] ys, Tensor? mask, {_NORM}, Tensor[] sums, int branches, float eps,"
    " int flags, str backend) -> Tensor[]",
)


def _alloc_sums(ys: list[Tensor]) -> tuple[Tensor, Tensor]:
    shape, dtype = (len(ys), ys[0].shape[1]), accumulate_dtype(ys[0].dtype)
    return ys[0].new_empty(shape, dtype=dtype), ys[0].new_empty(shape, dtype=dtype)


def _alloc_stats(ys: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = _alloc_sums(ys)
    return mean, var, mean.new_empty(len(ys))


def _alloc_join(ys: list[Tensor], flags: int, channels_last: bool) -> Tensor:
    return empty(pooled(ys[0].shape) if flags & POOL else ys[0].shape, ys[0], channels_last)


def _alloc_apply(grad: Tensor, like: Tensor, branches: int, channels_last: bool) -> list[Tensor]:
    return [empty(like.shape, grad, channels_last) for _ in range(branches)]


@torch.library.impl(_LIB, "channel_stats", "CompositeExplicitAutograd")
def _channel_stats(
    ys: list[Tensor],
    mask: Tensor | None,
    running: list[Tensor],
    momentum: float,
    momenta: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [k, C], number of values [k]; ``running``, k means and k variances, moves by
    ``momentum`` or by ``momenta`` [k] where there were values."""
    out = _alloc_stats(ys)
    if ys[0].shape[1] == 0:
        out[2].zero_()
        return out
    ys, channels_last = in_one_layout(ys)
    launcher, k, dtype, exact = backends.launcher(backend), len(ys), out[0].dtype, running
    if not all(t.dtype == dtype and t.is_contiguous() for t in running):
        # Copies, as kernels do not take them as they are: one of what two branches share, also by views of it.
        copies = {(t.data_ptr(), t.stride()): t.to(dtype).contiguous() for t in running}
        exact = [copies[t.data_ptr(), t.stride()] for t in running]
    shared = backend in ("triton", "cuda") and len({t.data_ptr() for t in running}) < len(running)
    launcher.channel_stats(*out, ys, mask, [] if shared else exact, momentum, momenta, channels_last)
    if shared:  # a GPU's blocks would race
        update = backends.launcher("reference").update_running
        for b in range(k):
            share = momentum if momenta is None else momenta[b : b + 1]
            update([exact[b], exact[k + b]], *(t[b : b + 1] for t in out), share)
    for t, moved in zip(running, exact, strict=True):
        if t is not moved:
            t.copy_(moved)
    # Kernels write past autograd.
    torch.autograd.graph.increment_version([t for t in running if not t.is_inference()])
    return out


@torch.library.impl(_LIB, "join_forward", "CompositeExplicitAutograd")
def _join_forward(
    ys: list[Tensor],
    mask: Tensor | None,
    means: list[Tensor],
    vars: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    eps: float,
    flags: int,
    backend: str,
) -> Tensor:
    ys, channels_last = in_one_layout(ys)
    out = _alloc_join(ys, flags, channels_last)
    if out.numel() == 0:
        return out
    backends.launcher(backend).join_forward(out, ys, mask, means, vars, weights, biases, eps, flags, channels_last)
    return out


@torch.library.impl(_LIB, "join_backward_reduce", "CompositeExplicitAutograd")
def _join_backward_reduce(
    grad: Tensor,
    ys: list[Tensor],
    mask: Tensor | None,
    means: list[Tensor],
    vars: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    eps: float,
    flags: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    sum_dz, sum_dzx = _alloc_sums(ys)
    if sum_dz.numel() == 0:
        return sum_dz, sum_dzx
    ys, channels_last = in_one_layout(ys)
    grad = to_layout(grad, channels_last)
    backends.launcher(backend).join_backward_reduce(
        sum_dz, sum_dzx, grad, ys, mask, means, vars, weights, biases, eps, flags, channels_last
    )
    return sum_dz, sum_dzx


@torch.library.impl(_LIB, "join_backward_apply", "CompositeExplicitAutograd")
def _join_backward_apply(
    grad: Tensor,
    ys: list[Tensor],
    mask: Tensor | None,
    means: list[Tensor],
    vars: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    sums: list[Tensor],
    branches: int,
    eps: float,
    flags: int,
    backend: str,
) -> list[Tensor]:
    tensors, channels_last = in_one_layout(ys or [grad])
    dys = _alloc_apply(grad, tensors[0], branches, channels_last)
    if dys[0].numel() == 0:
        return dys
    ys, grad = (tensors, to_layout(grad, channels_last)) if ys else ([], tensors[0])
    backends.launcher(backend).join_backward_apply(
        dys, grad, ys, mask, means, vars, weights, biases, sums, eps, flags, channels_last
    )
    return dys


@torch.library.register_fake("fractal_kernels::channel_stats", lib=_LIB)
def _channel_stats_fake(ys: list[Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _alloc_stats(ys)


@torch.library.register_fake("fractal_kernels::join_forward", lib=_LIB)
def _join_forward_fake(
    ys: list[Tensor],
    mask: Tensor | None,
    means: list[Tensor],
    vars: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    eps: float,
    flags: int,
    backend: str,
) -> Tensor:
    return _alloc_join(ys, flags, in_one_layout(ys)[1])


@torch.library.register_fake("fractal_kernels::join_backward_reduce", lib=_LIB)
def _join_backward_reduce_fake(grad: Tensor, ys: list[Tensor], *_: object) -> tuple[Tensor, Tensor]:
    return _alloc_sums(ys)


@torch.library.register_fake("fractal_kernels::join_backward_apply", lib=_LIB)
def _join_backward_apply_fake(
    grad: Tensor,
    ys: list[Tensor],
    mask: Tensor | None,
    means: list[Tensor],
    vars: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    sums: list[Tensor],
    branches: int,
    eps: float,
    flags: int,
    backend: str,
) -> list[Tensor]:
    like = ys or [grad]
    return _alloc_apply(grad, like[0], branches, in_one_layout(like)[1])
