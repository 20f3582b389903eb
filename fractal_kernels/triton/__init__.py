"""The Triton backend: launchers of the kernels in ``kernels.py``.

Every launch goes to the current stream of the inputs' device, reads no device memory on the host and allocates through
PyTorch only, so it can be captured in a CUDA graph. Sums are the same bits on every run on one kind of device: their
order depends on shapes and the number of its multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from ..library import POOL, Flags
from . import config, kernels

INTERPRETED = bool(triton.knobs.runtime.interpret)
FLAGS = {name: int(Flags[name]) for name in ("SUM", "RELU_BRANCH", "RELU_OUTPUT", "POOL_BEFORE", "POOL_AFTER")}
MOST = 2**31 - 2**16  # pixels of a sample: those of a tile are counted in 32 bits
List = list[Tensor]


@cache
def _processors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return nullcontext() if INTERPRETED or device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _pixels(t: Tensor) -> int:
    return prod(t.shape[2:]) if t.shape[0] and t.shape[1] else 0  # t[0, 0].numel() would make a view first


def _ceil(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv wraps its arguments for its own language


def _strides(tensors: List, pool: bool) -> tuple[tuple[int, ...], ...]:
    """Of samples, channels, rows (with pooling) and pixels, in elements: a tuple each."""
    rows = []
    for t in tensors:
        last = next((t.stride(d) for d in range(t.dim() - 1, 1, -1) if t.shape[d] > 1), 1)
        rows.append((t.stride(0), t.stride(1), *((t.stride(2), t.stride(3)) if pool else (0, last))))
    return tuple(zip(*rows, strict=True))


def _is_wide(tensors: List) -> bool:
    return any(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 2**31 - 2**16 for t in tensors)


class _Call:
    """What every kernel is told of a call: geometry, tile, grid and flags."""

    def __init__(
        self,
        kernel: str,
        y: Tensor,
        branches: int,
        mask: Tensor | None,
        flags: int,
        channels_last: bool,
        norm: bool = True,
        edges: bool = False,
    ) -> None:
        self.pool, self.channels = bool(flags & POOL), y.shape[1]
        height, width = (y.shape[2], y.shape[3]) if self.pool else (1, _pixels(y))
        step, more = (2, int(edges)) if self.pool else (1, 0)  # edges: windows that are cut off too
        width_out, height_out = (width + more) // step, (height + more) // step
        self.count = y.shape[0] * height_out * width_out
        if height * width > MOST:
            raise ValueError(f"triton: expected at most {MOST} pixels in a sample, got inputs of shape {list(y.shape)}")
        # No division by zero on the device where there is nothing to do.
        self.geometry = (self.count, max(height_out * width_out, 1), max(width_out, 1), height, width, self.channels)
        what = (kernel, y.dtype, branches, flags & POOL, mask is not None, norm, channels_last, self.channels)
        self.case = config.Case(*what, bits=self.count.bit_length(), device=y.device.index)
        self.mask = y if mask is None else mask.view(torch.uint8)
        self.mask_strides = (0, 0) if mask is None else (mask.stride(0), mask.stride(1) if mask.dim() == 2 else 0)
        self.constants: dict[str, Any] = {"K": branches, "MASK": mask is not None, "CL": channels_last}
        choice = config.look_up(self.case)
        self.untuned = choice is None
        self.take(choice or self.case.candidates()[0])
        self.flags = {name: bool(flags & bit) for name, bit in FLAGS.items()}

    def take(self, choice: config.Choice) -> None:
        self.choice = choice
        self.constants |= {"BP": choice.sites, "BC": choice.channels}
        self.constants |= config.options(
            self.case.kernel, self.case.branches, self.pool, choice.warps, self.case.channels_last
        )

    def is_wide(self, tensors: List) -> bool:
        """Whether an offset, or the number of a site, may pass 2**31."""
        return self.count >= MOST or _is_wide(tensors)

    def flat(self, *strides: tuple[tuple[int, ...], ...]) -> bool:
        """Whether a pixel's offset is its number among those of all samples times a stride, and no mask asks for the
        sample."""
        if self.pool or not self.case.channels_last or self.mask_strides[1]:
            return False
        return all(n == self.geometry[1] * p for of in strides for n, p in zip(of[0], of[3], strict=True))

    def grid(self, device: torch.device) -> tuple[int, int]:
        blocks = _ceil(self.channels, self.choice.channels)
        tiles = _ceil(self.count, self.choice.sites)
        programs = _ceil(_processors(device) * self.choice.programs_per_processor, blocks)
        return max(1, min(tiles, programs)), max(1, blocks)

    def run(self, launch: Callable[[], None], outputs: List) -> None:
        """Launches; where the choice is to be tuned, tries the others first."""
        if self.untuned:
            from . import tuning

            def trial(choice: config.Choice) -> None:
                self.take(choice)
                launch()

            self.take(tuning.tune(self.case, trial, outputs))
        launch()


def _norm(ys: List, means: List, vars: List, weights: List, biases: List) -> tuple[tuple[Tensor, ...], ...]:
    """As the kernels take them; what is not there stands for itself by a tensor that is not read."""
    return tuple(tuple(t or ys) for t in (means, vars, weights, biases))


def channel_stats(
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    ys: List,
    mask: Tensor | None,
    running: List,
    momentum: float,
    momenta: Tensor | None,
    channels_last: bool,
) -> None:
    call = _Call("channel_stats", ys[0], len(ys), mask, 0, channels_last)
    k, device, channels = len(ys), ys[0].device, call.channels
    y_strides, unroll = _strides(ys, False), config.STATS_UNROLL[channels_last and channels % 16 == 0]  # 16: Triton's
    row = config.row_of(ys[0].dtype, channels_last, call.choice.channels, call.geometry[1])
    if row > 1:
        unroll = config.ROW_UNROLL
        call.choice = call.choice._replace(programs_per_processor=config.ROW_STATS[1])
        call.constants |= config.options("channel_stats", k, False, call.choice.warps, channels_last, row)
    programs, blocks = call.grid(device)
    partial = mean.new_empty((programs, k, 3, channels))
    numbers = mean.new_empty((programs, k))
    with _on(device):
        kernels.channel_stats[(programs, blocks)](
            partial, numbers, tuple(ys), call.mask, *y_strides, *call.mask_strides, call.count, call.geometry[1],
            channels, FLAT=call.flat(y_strides), WIDE=call.is_wide(ys), U=unroll, V=row, **call.constants,
        )  # fmt: skip
        tile = config.merge(channels)
        kernels.merge_stats[(_ceil(channels, tile.channels), k)](
            mean, var, count, partial, numbers, tuple(running) or (mean,), momentum,
            mean if momenta is None else momenta, programs, channels, K=k, UPDATE=bool(running),
            HAS_M=momenta is not None, BG=tile.sites, BC=tile.channels, **config.FMA,
        )  # fmt: skip


def join_forward(
    out: Tensor,
    ys: List,
    mask: Tensor | None,
    means: List,
    vars: List,
    weights: List,
    biases: List,
    eps: float,
    flags: int,
    channels_last: bool,
) -> None:
    call = _Call("join_forward", ys[0], len(ys), mask, flags, channels_last, bool(means))
    y_strides, out_strides = _strides(ys, call.pool), _strides([out], call.pool)

    def launch() -> None:
        kernels.join_forward[call.grid(out.device)](
            out, tuple(ys), call.mask, *_norm(ys, means, vars, weights, biases), *y_strides, *_one(out_strides),
            *call.mask_strides, *call.geometry, eps, NORM=bool(means), HAS_W=bool(weights), HAS_B=bool(biases),
            FLAT=call.flat(y_strides, out_strides), WIDE=call.is_wide([out, *ys]), **call.constants, **call.flags,
        )  # fmt: skip

    with _on(out.device):
        call.run(launch, [out])


def join_backward_reduce(
    sum_dz: Tensor,
    sum_dzx: Tensor,
    grad: Tensor,
    ys: List,
    mask: Tensor | None,
    means: List,
    vars: List,
    weights: List,
    biases: List,
    eps: float,
    flags: int,
    channels_last: bool,
) -> None:
    call = _Call("join_backward_reduce", ys[0], len(ys), mask, flags, channels_last)
    k, channels = len(ys), call.channels
    programs, blocks = call.grid(grad.device)
    partial = sum_dz.new_empty((programs, 2 * k, channels))
    y_strides, grad_strides = _strides(ys, call.pool), _strides([grad], call.pool)
    with _on(grad.device):
        kernels.join_backward_reduce[(programs, blocks)](
            partial, grad, tuple(ys), call.mask, *_norm(ys, means, vars, weights, biases), *y_strides,
            *_one(grad_strides), *call.mask_strides, *call.geometry, eps, HAS_W=bool(weights), HAS_B=bool(biases),
            FLAT=call.flat(y_strides, grad_strides), WIDE=call.is_wide([grad, *ys]), **call.constants, **call.flags,
        )  # fmt: skip
        tile = config.merge(channels)
        kernels.merge_sums[(_ceil(channels, tile.channels), 2 * k)](
            sum_dz, sum_dzx, partial, programs, channels, K=k, BG=tile.sites, BC=tile.channels, **config.FMA
        )


def join_backward_apply(
    dys: List,
    grad: Tensor,
    ys: List,
    mask: Tensor | None,
    means: List,
    vars: List,
    weights: List,
    biases: List,
    sums: List,
    eps: float,
    flags: int,
    channels_last: bool,
) -> None:
    call = _Call("join_backward_apply", dys[0], len(dys), mask, flags, channels_last, bool(means), edges=True)
    per_sample = mask is not None and mask.dim() == 2
    inputs = ys or dys  # the gradient of a plain mean does not depend on its inputs
    strides = [_strides(tensors, call.pool) for tensors in (inputs, dys, [grad])]

    def launch() -> None:
        kernels.join_backward_apply[call.grid(grad.device)](
            tuple(dys), grad, tuple(inputs), call.mask, *_norm(inputs, means, vars, weights, biases),
            *(sums or [grad] * 3), *strides[0], *strides[1], *_one(strides[2]),
            *call.mask_strides, *call.geometry, eps, FLAT=call.flat(*strides), NORM=bool(means), BATCH=bool(sums),
            ALL=bool(sums) and per_sample and not flags & Flags.STATS_LIVE, READS=bool(ys), HAS_W=bool(weights),
            HAS_B=bool(biases), WIDE=call.is_wide([grad, *inputs, *dys]), **call.constants, **call.flags,
        )  # fmt: skip

    with _on(grad.device):
        call.run(launch, dys)


def _one(strides: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Those of the only tensor."""
    return tuple(s for (s,) in strides)
