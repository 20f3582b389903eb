"""Tiles and warps. Where a kernel adds up, a change of them changes the order of sums: they depend on shapes and types
alone. Where it does not (``ELEMENTWISE``), the rule is the first of a few candidates; ``tuning`` says which to take."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..library import Flags

WARPS = 4
# Registers of a thread for up to three branches: what leaves 4, 4, 2 and 3 blocks of 128 threads to a multiprocessor.
MOST_REGISTERS = {"channel_stats": 128, "join_forward": 128, "join_backward_reduce": 208, "join_backward_apply": 168}
PROGRAMS_PER_PROCESSOR = 8  # of the elementwise kernels; a reduction writes a partial for each, so it takes fewer
REDUCERS_PER_PROCESSOR = {"channel_stats": 4, "join_backward_reduce": 2}  # all of them run at once
# Where pixels are contiguous, each counts its values by itself: more registers, 3 blocks.
CONTIGUOUS_STATS = (168, 3)
# Loads of a thread that are on their way together; fewer where they are not of channels by 128 bits.
STATS_UNROLL = {True: 4, False: 2}
# Where a row of pixels has one set of sums: registers, blocks, and rows that are on their way together.
ROW_STATS = (80, 6)
ROW_UNROLL = 4
# The kernels that may be tuned: each of their outputs depends on one site and channel, so that no tile changes a bit of
# it. channel_stats and join_backward_reduce add up in an order that their tile and grid give.
ELEMENTWISE = ("join_forward", "join_backward_apply")
# Values of a thread, and branches: twice the values still spill no register.
MOST_DOUBLED = {"join_forward": (24, 8), "join_backward_apply": (16, 4)}
POOLS = {0: "no_pool", int(Flags.POOL_BEFORE): "pool_before", int(Flags.POOL_AFTER): "pool_after"}


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
    wide = min(power_of_two(channels), 8)  # a sector of memory; few, so that many programs share the work
    return Tile(2048 // wide, wide)


def row_of(dtype: torch.dtype, channels_last: bool, wide: int, pixels: int) -> int:
    """Neighbouring pixels that channel_stats takes as one: 128 bits of a sample's channel, or 1."""
    row = 16 // dtype.itemsize
    return row if not channels_last and wide == 1 and pixels % row == 0 else 1


def most_registers(kernel: str, branches: int, pool: bool, channels_last: bool, row: int = 1) -> int:
    if kernel == "channel_stats":
        return MOST_REGISTERS[kernel] if channels_last else (CONTIGUOUS_STATS if row == 1 else ROW_STATS)[0]
    return 255 if pool or branches > 3 else MOST_REGISTERS[kernel]


# Products and sums are one instruction: of every launch, since what Triton does by itself depends on its version.
FMA = {"enable_fp_fusion": True}


def options(kernel: str, branches: int, pool: bool, warps: int, channels_last: bool, row: int = 1) -> dict[str, int]:
    """Of a launch. Without a bound ptxas picks one by itself, and now and then spills a register for it. The bound is a
    thread's, whatever the number of warps: eight of 255 registers are a multiprocessor's 65536."""
    if torch.version.hip:
        return {"num_warps": warps, **FMA}
    return {"num_warps": warps, "maxnreg": most_registers(kernel, branches, pool, channels_last, row), **FMA}


class Choice(NamedTuple):
    """Sites and channels of a program's tile, its warps, and how many programs a multiprocessor is given."""

    sites: int
    channels: int
    warps: int
    programs_per_processor: int


def candidates(
    kernel: str, branches: int, elements: int, itemsize: int, channels: int, channels_last: bool
) -> tuple[Choice, ...]:
    """What may be chosen, the rule of :func:`tile` first; for a kernel that adds up, the rule alone.

    All load as wide as the rule does and spill no register (``make aot``).

    Args:
        branches, elements, itemsize, channels, channels_last: as in :func:`tile`.
    Example:
        >>> candidates("join_forward", 3, 1, 2, 64, True)[0]
        Choice(sites=16, channels=64, warps=4, programs_per_processor=8)
    """
    rule = tile(branches, elements, itemsize, channels, channels_last)
    if kernel not in ELEMENTWISE:
        contiguous_stats = kernel == "channel_stats" and not channels_last
        return (Choice(*rule, WARPS, CONTIGUOUS_STATS[1] if contiguous_stats else REDUCERS_PER_PROCESSOR[kernel]),)
    size, wide = rule.sites * rule.channels, rule.channels
    shapes = [(wide, 1, WARPS, PROGRAMS_PER_PROCESSOR), (wide, 1, 4, 4), (wide, 1, 4, 16), (wide, 1, 8, 4)]
    shapes += [(wide, 1, 8, 8)]
    values, most = size // (32 * WARPS) * branches * elements, MOST_DOUBLED[kernel]
    if values <= most[0] and branches <= most[1]:
        shapes += [(wide, 2, 4, 4), (wide, 2, 4, 8)]
    if channels_last:
        if 2 * wide <= min(256, size, power_of_two(channels)):
            shapes += [(2 * wide, 1, 4, 8), (2 * wide, 1, 8, 4)]
        if wide // 2 * itemsize >= 64:  # two sectors of memory
            shapes += [(wide // 2, 1, 4, 8), (wide // 2, 1, 8, 4)]
    return tuple(
        Choice(size * vectors * warps // WARPS // width, width, warps, programs)
        for width, vectors, warps, programs in shapes
    )


class Case(NamedTuple):
    """What a choice is looked up by. Made for every launch, so of nothing that takes time to find out."""

    kernel: str
    dtype: torch.dtype
    branches: int
    pool: int  # POOL_BEFORE, POOL_AFTER or neither
    masked: bool
    norm: bool
    channels_last: bool
    channels: int
    bits: int  # of the number of sites
    device: int | None  # None: not on a GPU

    def candidates(self) -> tuple[Choice, ...]:
        elements, size = 4 if self.pool else 1, self.dtype.itemsize
        return candidates(self.kernel, self.branches, elements, size, self.channels, self.channels_last)

    def key(self) -> str:
        """The class of the call, readable and fit for a file's name. All of a class have the same candidates: the width
        of the rule's tile parts channels that leave lanes idle from those that do not.

        Example:
            >>> Case("join_forward", torch.bfloat16, 3, 0, True, True, True, 64, 20, 0).key()
            'join_forward-bfloat16-k3-no_pool-mask-norm-channels_last-c64w64-sites2^19'
        """
        words = (
            self.kernel,
            str(self.dtype).removeprefix("torch."),
            f"k{self.branches}",
            POOLS[self.pool],
            "mask" if self.masked else "no_mask",
            "norm" if self.norm else "plain",
            "channels_last" if self.channels_last else "contiguous",
            f"c{power_of_two(self.channels)}w{self.candidates()[0].channels}",
            f"sites2^{self.bits - 1}",
        )
        return "-".join(words)


chosen: dict[Case, Choice] = {}


def look_up(case: Case) -> Choice | None:
    """The choice for a call; None where it is to be tuned now."""
    if (choice := chosen.get(case)) is None:
        from . import tuning  # late: `python -m fractal_kernels.triton.tuning` imports this package first

        choice = tuning.find(case)
    return choice
