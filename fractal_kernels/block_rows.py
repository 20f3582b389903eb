"""What the block's operators run: which units on which range of the batch, and where their tensors are.

Under a path for the batch one segment, the whole batch, runs what lives. Under a path per sample whose statistics run
over live samples, samples that keep one column alone (global drop-path) and lie side by side are a segment of their
own that runs nothing but that column; the others run everything and their joins are masked. Segments share parameters
and statistics, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .library import MAX_BRANCHES, POOL, Flags, empty
from .schedule import Plan, Unit, everything, live_units, plan, runs, schedule, spans

# Of numbers, as a tensor of its own begins: Triton compiles a kernel once more for a pointer that is less aligned.
ALIGNED = 4
RANGES_PAY = 12_000_000  # on the CPU, measured: benchmarks/bench_depth.py


def ranges_are_faster(x: Tensor, channels: int) -> bool:
    """Whether the ranges of columns in a batch are worth more, smaller convolutions: if a unit's work is enough. On a
    GPU, where they are more launches, it has not been measured: no."""
    return x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] * channels**2 >= RANGES_PAY


def wide_is_faster(in_channels: int, ours: bool, device: torch.device) -> bool:
    """Whether the convs of a row run as one wide conv rather than one by one: on the CPU, where that was measured to be
    faster (benchmarks/bench_conv.py). Elsewhere always: one launch, and no gradients to add up or to gather; not
    measured yet (benchmarks/bench_gpu_ops.py does)."""
    return device.type != "cpu" or in_channels < (256 if ours else 128)


class Segment(NamedTuple):
    """Samples first ... first + size - 1. ``mask`` [R, C, size] or, for the batch, [R, C]; None: the plan says all."""

    first: int
    size: int
    plan: Plan
    mask: Tensor | None

    def part(self, t: Tensor, first: int = 0) -> Tensor:
        """This segment's samples of ``t``, which begins with sample ``first``."""
        return t if self.size == t.shape[0] else t.narrow(0, self.first - first, self.size)


class Join(NamedTuple):
    """One join, on one segment."""

    at: int  # the segment's number
    segment: Segment
    units: tuple[Unit, ...]
    ids: tuple[int, ...]
    mask: Tensor | None


class Conv(NamedTuple):
    """One convolution: a run of units of a row, on neighbouring segments."""

    first: int
    size: int
    group: tuple[Unit, ...]
    segments: tuple[int, ...]  # their numbers
    ids: tuple[int, ...]
    channels: tuple[int, int]  # in its row's wide weight, from ... to

    def part(self, t: Tensor) -> Tensor:
        """Its samples of ``t``."""
        return t if self.size == t.shape[0] else t.narrow(0, self.first, self.size)

    def weight(self, wide: Tensor) -> Tensor:
        """Its part of its row's wide weight."""
        first, last = self.channels
        return wide if last - first == wide.shape[0] else wide.narrow(0, first, last - first)


def live_samples(columns: int, keep: Tensor) -> Tensor:
    """``keep`` [R, C, N] without the branches that are kept in a join which does not live for the sample."""
    kept = torch.zeros_like(keep)
    s = schedule(columns)
    for unit, samples in zip(s.units, live_units(s, keep), strict=True):
        kept[unit.end, unit.column] = samples
    return kept


def alone(keep: Tensor) -> list[int]:
    """Per sample of a live ``keep`` [R, C, N] on the host: the one column that it uses, or -1."""
    joins = keep.sum(0)  # per column and sample: in how many joins it is kept
    most, column = joins.max(0)
    return torch.where((joins.sum(0) == most) & (most == 2**column), column, -1).tolist()


def segments(columns: int, path: Tensor, dense: bool, live: bool, x: Tensor, channels: int) -> list[Segment]:
    """The segments of a path [R, C] of which nothing is skipped, or of [R, C, N] (on the host where ranges are to be
    found)."""
    batch, device = x.shape[0], x.device
    keep = live_samples(columns, path) if live and path.dim() == 3 else path
    mask = keep.contiguous().to(device, non_blocking=True)
    if dense or not live or path.device.type != "cpu" or not ranges_are_faster(x, channels):
        return [Segment(0, batch, everything(columns), mask)]
    return [
        Segment(at, size, everything(columns), mask[..., at : at + size].contiguous())
        if column < 0
        else Segment(at, size, _only(columns, column), None)
        for column, at, size in ranges(alone(keep), batch / (4 * columns))
    ]


def ranges(columns: list[int], least: float) -> list[tuple[int, int, int]]:
    """Neighbours of one column as (column, first, size); shorter ranges than ``least`` count as -1, as no column.

    Example:
        >>> ranges([-1, 2, -1, 0, 0], 2)
        [(-1, 0, 3), (0, 3, 2)]
    """
    runs = [(column, len(list(samples))) for column, samples in groupby(columns)]
    long = [column if size >= least else -1 for column, size in runs for _ in range(size)]
    found, first = [], 0
    for column, samples in groupby(long):
        found.append((column, first, size := len(list(samples))))
        first += size
    return found


def _only(columns: int, column: int) -> Plan:
    return plan(columns, tuple(c == column for _ in range(2 ** (columns - 1)) for c in range(columns)))


class Rows:
    """What forward and backward share: what runs, and where a unit's output, parameters and statistics are.

    ``wide``: whether the convs of the first row, and of the others, run as one each.
    """

    def __init__(
        self,
        columns: int,
        segments: list[Segment],
        channels: int,
        flags: int,
        batch: int,
        device: torch.device,
        group: str,
        wide: tuple[bool, bool],
        per_sample: bool,
    ) -> None:
        self.schedule = s = schedule(columns)
        self.rows, self.channels, self.flags, self.batch, self.device = s.rows, channels, flags, batch, device
        self.segments, self.per_sample, self.several, self.group = segments, per_sample, len(segments) > 1, group
        # Whether a unit's number of live values depends on more than this batch.
        self.counted = self.per_sample and bool(flags & Flags.STATS_LIVE) or bool(group)
        # Units, in the order of the joins that they end in: where their sums are in backward. Ranks whose samples have
        # paths of their own add up the sums of all units, whatever each of them runs.
        self.spread_out = self.several or (self.per_sample and bool(group))
        self.slots = s.ends if self.spread_out else segments[0].plan.joins
        self.sizes = [len(units) for units in self.slots]
        self.order = [u.id for units in self.slots for u in units]
        # Row by row: every convolution; every join, its flags, and whether it is saved. One branch's is one pass over
        # that branch, and is computed again in backward.
        self.convs = [self._convs(row, wide[row > 0]) for row in range(s.rows)]
        self.joins = [self._joins(row) for row in range(s.rows)]
        self.join_flags = [flags & ~POOL] * (s.rows - 1) + [flags]
        self.keeps_join = [len(units) > 1 for units in s.ends[:-1]] + [False]
        # Where the convolutions' channels are in statistics [1, U*K].
        groups = [conv.ids for convs in self.convs for conv in convs]
        self.ranges = tuple((ids[0] * channels, (ids[-1] + 1) * channels) for ids in groups)

    def alive(self, path: Tensor, dense: bool, live: Tensor | None) -> Sequence[int] | Tensor:
        """The units that live; of a dense execution bool [U]: its path may be on a device, unread by the host."""
        if self.per_sample:
            return range(len(self.schedule.units))
        if not dense:
            return self.segments[0].plan.units
        if live is not None:
            return live
        return torch.stack(live_units(self.schedule, path)).to(self.device, non_blocking=True)

    def numbers(self, count: Tensor, values: int, dense: bool) -> Tensor:
        """The number of values of a unit, as often as branches meet in a join, where units are not counted."""
        live = self.segments[0].plan
        for first, last in spans(live.units) if not dense or self.per_sample else ():  # else some may be dead
            start = -(-first // ALIGNED) * ALIGNED
            if last - start >= max(map(len, live.joins)):
                return count[start:last]
        return count.new_full((MAX_BRANCHES,), values)

    def _convs(self, row: int, wide: bool) -> list[Conv]:
        found: list[Conv] = []
        for i, segment in enumerate(self.segments):
            units = segment.plan.live[row]
            for group in runs(units) if wide else [(unit,) for unit in units]:
                first = (group[0].id - self.schedule.starts[row][0].id) * self.channels
                place = tuple(u.id for u in group), (first, first + len(group) * self.channels)
                conv = Conv(segment.first, segment.size, group, (i,), *place)
                for at, other in enumerate(found):
                    if other.group == group and other.first + other.size == segment.first:
                        found[at] = Conv(other.first, other.size + segment.size, group, (*other.segments, i), *place)
                        break
                else:
                    found.append(conv)
        return found

    def _joins(self, row: int) -> list[Join]:
        return [
            Join(i, s, units, tuple(u.id for u in units), None if s.mask is None else s.mask[row, units[0].column :])
            for i, s in enumerate(self.segments)
            if (units := s.plan.joins[row])
        ]

    def in_slot(self, t: Tensor, row: int, join: Join) -> Tensor:
        """Of a tensor per unit that ends at a row, the part of a join: other segments may have other units there."""
        n = len(join.units)
        return t if n == t.shape[0] else t.narrow(0, join.units[0].column - self.slots[row][0].column, n)

    def spread(self, y: Tensor, conv: Conv, into: list[dict[int, Tensor]]) -> None:
        """A conv's output as the outputs of its units on its segments."""
        for i in conv.segments:
            part = self.segments[i].part(y, conv.first) if self.several else y
            n = len(conv.ids)
            parts = (part,) if n == 1 else part.split_with_sizes([self.channels] * n, 1)
            into[i].update(zip(conv.ids, parts, strict=True))

    def fixed(self, parts: list[Tensor], row: int, like: Tensor) -> list[Tensor]:
        """The parts of a row in one buffer whose size does not depend on the path (torch.compile)."""
        wide = len(self.schedule.starts[row]) * self.channels
        if len(parts) == 1 and parts[0].shape[:2] == (self.batch, wide):
            return parts
        full = empty((self.batch, wide, *like.shape[2:]), like, True)
        for part, conv in zip(parts, self.convs[row], strict=True):
            self.in_fixed(full, conv).copy_(part)
        return [full]

    def in_fixed(self, full: Tensor, conv: Conv) -> Tensor:
        first, last = conv.channels
        return conv.part(full).narrow(1, first, last - first)

    def unpack(
        self, weights: list[Tensor], saved: list[Tensor], noisy: bool, fixed: bool
    ) -> tuple[list[Tensor], list[list[tuple[Conv, Tensor]]], list[list[Tensor | None]]]:
        """Joins by row, convs with their outputs by row, dropout masks by row, from what forward has saved."""
        items = iter(saved)
        kept = [keeps and (fixed or bool(joins)) for keeps, joins in zip(self.keeps_join, self.joins, strict=True)]
        joins = [next(items) if there else weights[0] for there in kept]
        outputs = []
        noises: list[list[Tensor | None]] = []
        for convs in self.convs:
            parts: list[list[Tensor]] = []
            for _ in range(2 if noisy else 1):
                if fixed:
                    full = next(items)
                    parts.append([self.in_fixed(full, conv) for conv in convs])
                else:
                    parts.append([next(items) for _ in convs])
            outputs.append(list(zip(convs, parts[0], strict=True)))
            noises.append([*parts[1]] if noisy else [None] * len(convs))
        return joins, outputs, noises

    def unit_masks(self, conv: Conv) -> Tensor | None:
        """[n, size], whether each unit of a conv lives in each of its samples; None: they all do."""
        parts = [self.segments[i] for i in conv.segments]
        if not self.per_sample or not self.flags & Flags.STATS_LIVE or all(s.mask is None for s in parts):
            return None
        masks = [
            torch.stack([s.mask[unit.end, unit.column] for unit in conv.group])
            if s.mask is not None
            else torch.ones(len(conv.group), s.size, dtype=torch.bool, device=self.device)
            for s in parts
        ]
        return masks[0] if len(masks) == 1 else torch.cat(masks, 1)


def gather_weight(
    weight: Tensor,
    full: Tensor | None,
    parts: list[tuple[Conv, Tensor]],
    rows: Rows,
    zeros: list[Tensor],
) -> Tensor:
    """The gradient of a row's wide weight. ``full`` may hold parts; adds to ``zeros`` what is still to be filled with
    them: a unit that does not live has a gradient of zeros, not None."""
    if len(parts) == 1 and parts[0][1].shape == weight.shape and parts[0][1].stride() == weight.stride():
        return parts[0][1]
    full = torch.empty_like(weight) if full is None else full
    if not parts:
        zeros.append(full)
        return full
    units = weight.shape[0] // rows.channels
    written = [False] * units
    for conv, dweight in sorted(parts, key=lambda part: -len(part[0].ids)):  # wide ones first: the others add to them
        target, first, n = conv.weight(full), conv.channels[0] // rows.channels, len(conv.ids)
        if written[first]:
            target.add_(dweight)
        elif dweight.data_ptr() != target.data_ptr():
            target.copy_(dweight)
        written[first : first + n] = [True] * n
    zeros += [full.narrow(0, i * rows.channels, rows.channels) for i in range(units) if not written[i]]
    return full


def rows_of(
    weights: list[Tensor],
    channels: int,
    path: Tensor,
    dense: bool,
    flags: int,
    x: Tensor,
    group: str,
    our_convs: bool,
) -> Rows:
    """The rows of a call; those of a path for the batch, in which there are no tensors, are kept for calls like it."""
    columns, (batch, in_channels) = len(weights).bit_length(), x.shape[:2]
    wide = wide_is_faster(in_channels, our_convs, x.device), wide_is_faster(channels, our_convs, x.device)
    options = channels, flags, batch, x.device, group, wide
    if path.dim() == 2 and not dense:
        return _of_a_batch(columns, tuple(path.flatten().tolist()), *options)
    found = segments(columns, path, dense, bool(flags & Flags.STATS_LIVE), x, channels)
    return Rows(columns, found, *options, per_sample=path.dim() == 3)


@lru_cache(maxsize=256)  # in forward they are laid out, and found again in backward; of C = 8 each is large
def _of_a_batch(
    columns: int,
    keep: tuple[bool, ...],
    channels: int,
    flags: int,
    batch: int,
    device: torch.device,
    group: str,
    wide: tuple[bool, bool],
) -> Rows:
    whole = Segment(0, batch, plan(columns, keep), None)
    return Rows(columns, [whole], channels, flags, batch, device, group, wide, per_sample=False)
