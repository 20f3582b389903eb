"""Tile sizes. A change of them changes the order of sums, so that they depend on shapes and types alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

WARPS = 4
# Registers of a thread for up to three branches: what leaves 4, 4, 2 and 3 blocks of 128 threads to a multiprocessor.
MOST_REGISTERS = {"channel_stats": 128, "join_forward": 128, "join_backward_reduce": 208, "join_backward_apply": 168}
PROGRAMS_PER_PROCESSOR = 8  # of the elementwise kernels; a reduction writes a partial for each, so it takes fewer
REDUCERS_PER_PROCESSOR = 2


class Tile(NamedTuple):
    sites: int
    channels: int


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile(branches: int, elements: int, itemsize: int, channels: int, channels_last: bool) -> Tile:
    """Sites and channels of a program, so that a thread holds one load of each branch: 128 bits up to 3 branches.

    Args:
        branches: how many are held in registers at once.
        elements: of a branch in a site, 4 with pooling.
    """
    per_thread = 16 // itemsize
    most = 48 if elements > 1 and channels_last else 24  # values in registers: what keeps every kernel free of spills
    while per_thread > 1 and per_thread * branches * elements > most:
        per_thread //= 2
    size = 32 * WARPS * per_thread
    if channels_last:  # as few idle lanes as possible
        wide = min((128, 64, 32), key=lambda width: (-(-channels // width) * width, -width))
        wide = min(wide, power_of_two(channels))
    else:
        wide = power_of_two(-(-channels // 65535))  # the most blocks that a grid's second axis has
    return Tile(size // wide, wide)


def merge(channels: int) -> Tile:
    """Partials and channels that a program of a merge takes at once."""
    wide = min(power_of_two(channels), 64)
    return Tile(1024 // wide, wide)


def options(kernel: str, branches: int, pool: bool) -> dict[str, int]:
    """Of a launch. Without a bound ptxas picks one by itself, and now and then spills a register for it."""
    if torch.version.hip:
        return {"num_warps": WARPS}
    return {"num_warps": WARPS, "maxnreg": 255 if pool or branches > 3 else MOST_REGISTERS[kernel]}
