"""What the block's operators run: which units on which range of the batch, and where their tensors are.

Under a path for the batch one segment, the whole batch, runs what lives. Under a path per sample whose statistics run
over live samples, samples that keep one column alone (global drop-path) and lie side by side are a segment of their
own that runs nothing but that column; the others run everything and their joins are masked. Segments share parameters
and statistics, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sync
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

    def joined_mask(self, row: int, joined: tuple[Unit, ...]) -> Tensor | None:
        return None if self.mask is None else self.mask[row, joined[0].column :]


class Conv(NamedTuple):
    """One convolution: a run of units of a row, on neighbouring segments."""

    first: int
    size: int
    group: tuple[Unit, ...]
    segments: tuple[int, ...]  # their numbers

    def part(self, t: Tensor) -> Tensor:
        """Its samples of ``t``."""
        return t if self.size == t.shape[0] else t.narrow(0, self.first, self.size)


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
    """The segments of a path [R, C] on the host, or [R, C, N] anywhere (on the host where ranges are to be found)."""
    batch, device = x.shape[0], x.device
    if path.dim() == 2:
        if dense:
            return [Segment(0, batch, everything(columns), path.to(device, non_blocking=True))]
        return [Segment(0, batch, plan(columns, tuple(path.flatten().tolist())), None)]
    keep = live_samples(columns, path) if live else path
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
    """What forward and backward share: what runs, and where a unit's output, parameters and statistics are."""

    def __init__(
        self,
        weights: list[Tensor],
        channels: int,
        path: Tensor,
        dense: bool,
        flags: int,
        x: Tensor,
        group: str,
        our_convs: bool,
    ) -> None:
        self.columns = len(weights).bit_length()
        self.rows, self.channels, self.flags = len(weights), channels, flags
        self.our_convs = our_convs
        self.batch, self.device = x.shape[0], x.device
        self.schedule = schedule(self.columns)
        self.segments = segments(self.columns, path, dense, bool(flags & Flags.STATS_LIVE), x, channels)
        self.per_sample, self.several, self.group = path.dim() == 3, len(self.segments) > 1, group
        # Whether a unit's number of live values depends on more than this batch.
        self.counted = self.per_sample and bool(flags & Flags.STATS_LIVE) or bool(group)
        # Units, in the order of the joins that they end in: where their sums are in backward. Ranks whose samples have
        # paths of their own add up the sums of all units, whatever each of them runs.
        self.spread_out = self.several or (self.per_sample and bool(group))
        self.slots = self.schedule.ends if self.spread_out else self.segments[0].plan.joins

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

    def convs(self, row: int, weights: list[Tensor]) -> list[Conv]:
        """Every convolution of a row."""
        wide = wide_is_faster(weights[row].shape[1], self.our_convs, self.device)
        found: list[Conv] = []
        for i, segment in enumerate(self.segments):
            units = segment.plan.live[row]
            for group in runs(units) if wide else [(unit,) for unit in units]:
                conv = Conv(segment.first, segment.size, group, (i,))
                for at, other in enumerate(found):
                    if other.group == group and other.first + other.size == segment.first:
                        found[at] = Conv(other.first, other.size + segment.size, group, (*other.segments, i))
                        break
                else:
                    found.append(conv)
        return found

    def joins(self, row: int) -> list[tuple[int, Segment, tuple[Unit, ...]]]:
        """Every join of a row: the segment's number, the segment, the branches."""
        return [(i, s, joined) for i, s in enumerate(self.segments) if (joined := s.plan.joins[row])]

    def offset(self, group: tuple[Unit, ...]) -> int:
        """Of a group's first channel in its row's wide weight."""
        return (group[0].id - self.schedule.starts[group[0].start][0].id) * self.channels

    def weight(self, group: tuple[Unit, ...], weights: list[Tensor]) -> Tensor:
        wide, channels = weights[group[0].start], len(group) * self.channels
        return wide if channels == wide.shape[0] else wide.narrow(0, self.offset(group), channels)

    def join_flags(self, row: int) -> int:
        return self.flags if row == self.rows - 1 else self.flags & ~POOL

    def keeps_join(self, row: int) -> bool:
        """Whether a join is saved. One branch's is one pass over that branch, and is computed again in backward."""
        return row < self.rows - 1 and len(self.schedule.ends[row]) > 1

    def norm(self, joined: tuple[Unit, ...], vectors: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
        """Means, vars, weights and biases of the branches, as the launchers take them."""
        return [[rows[u.id] for u in joined] if rows else [] for rows in vectors]

    def spread(self, y: Tensor, conv: Conv, into: list[dict[int, Tensor]]) -> None:
        """A conv's output as the outputs of its units on its segments."""
        for i in conv.segments:
            part = self.segments[i].part(y, conv.first) if self.several else y
            for at, unit in enumerate(conv.group):
                into[i][unit.id] = part if len(conv.group) == 1 else part.narrow(1, at * self.channels, self.channels)

    def fixed(self, parts: list[Tensor], row: int, weights: list[Tensor], like: Tensor) -> list[Tensor]:
        """The parts of a row in one buffer whose size does not depend on the path (torch.compile)."""
        wide = len(self.schedule.starts[row]) * self.channels
        if len(parts) == 1 and parts[0].shape[:2] == (self.batch, wide):
            return parts
        full = empty((self.batch, wide, *like.shape[2:]), like, True)
        for part, conv in zip(parts, self.convs(row, weights), strict=True):
            self.in_fixed(full, conv).copy_(part)
        return [full]

    def in_fixed(self, full: Tensor, conv: Conv) -> Tensor:
        return conv.part(full).narrow(1, self.offset(conv.group), len(conv.group) * self.channels)

    def unpack(
        self, weights: list[Tensor], saved: list[Tensor], noisy: bool, fixed: bool
    ) -> tuple[list[Tensor], list[list[tuple[Conv, Tensor]]], list[list[Tensor | None]]]:
        """Joins by row, convs with their outputs by row, dropout masks by row, from what forward has saved."""
        items = iter(saved)
        kept = [self.keeps_join(r) and (fixed or bool(self.joins(r))) for r in range(self.rows)]
        joins = [next(items) if there else weights[0] for there in kept]
        outputs = []
        noises: list[list[Tensor | None]] = []
        for row in range(self.rows):
            convs = self.convs(row, weights)
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
    weight: Tensor, full: Tensor, parts: list[tuple[tuple[Unit, ...], Tensor]], rows: Rows, zeros: list[Tensor]
) -> Tensor:
    """The gradient of a row's wide weight. ``full`` may hold parts; adds to ``zeros`` what is still to be filled with
    them: a unit that does not live has a gradient of zeros, not None."""
    if len(parts) == 1 and parts[0][1].shape == weight.shape and parts[0][1].stride() == weight.stride():
        return parts[0][1]
    full = full if full.numel() else torch.empty_like(weight)
    if not parts:
        zeros.append(full)
        return full
    units = weight.shape[0] // rows.channels
    written = [False] * units
    for group, dweight in sorted(parts, key=lambda part: -len(part[0])):  # wide ones first: the others add to them
        offset = rows.offset(group)
        target, first = full[offset : offset + dweight.shape[0]], offset // rows.channels
        if written[first]:
            target.add_(dweight)
        elif dweight.data_ptr() != target.data_ptr():
            target.copy_(dweight)
        written[first : first + len(group)] = [True] * len(group)
    zeros += [full.narrow(0, i * rows.channels, rows.channels) for i in range(units) if not written[i]]
    return full


class Layers:
    """Vectors per unit, added over segments: what is first seen of a unit is in the first layer, its next part in the
    next one. ``at(units)`` names the layer of a group all of whose units move on together."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def at(self, units: tuple[Unit, ...]) -> int:
        layer = max(self.seen.get(u.id, 0) for u in units)
        self.seen |= {u.id: layer + 1 for u in units}
        return layer

    def further(self) -> range:
        """The layers beyond the first one."""
        return range(1, max(self.seen.values(), default=1))


class Statistics:
    """Mean, biased variance and number of live values per unit, layer by layer, merged row by row."""

    def __init__(self, launch: Any, rows: Rows, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.launch, self.rows = launch, rows
        self.layers = [(mean, var, count)]
        self.flat = mean.view(1, -1), var.view(1, -1)
        self.row = Layers()
        self.unread = count.new_empty(1)
        self.to_fill: list[tuple[int, int]] = []  # units whose numbers no kernel writes

    def take(self, y: Tensor, conv: Conv) -> None:
        """Of a conv's output: its channels at once, or per unit over live samples."""
        first, n = conv.group[0].id, len(conv.group)
        if not self.rows.counted:
            k = self.rows.channels
            mean, var = self.flat[0].narrow(1, first * k, n * k), self.flat[1].narrow(1, first * k, n * k)
            there = n == 1 and first % ALIGNED == 0
            count = self.layers[0][2].narrow(0, first, 1) if there else self.unread
            self.launch.channel_stats(mean, var, count, [y], None, [], 0.0, None, True)
            if not there:
                self.to_fill.append((first, first + n))
            return
        layer = self.row.at(conv.group)
        if layer == len(self.layers):
            self.layers.append(tuple(torch.zeros_like(t) for t in self.layers[0]))  # type: ignore[arg-type]
        mean, var, count = (t[first : first + n] for t in self.layers[layer])
        mask = self.rows.unit_masks(conv)
        if mask is None:
            self.launch.channel_stats(mean.view(1, -1), var.view(1, -1), self.unread, [y], None, [], 0.0, None, True)
            count.fill_(y.shape[0] * y.shape[2] * y.shape[3])
        else:
            k = self.rows.channels
            branches = [y if n == 1 else y.narrow(1, i * k, k) for i in range(n)]
            self.launch.channel_stats(mean, var, count, branches, mask, [], 0.0, None, True)

    def finish_row(self, row: int) -> None:
        """Adds up what several segments, and then what all ranks found of the units that start at a row."""
        if not self.rows.several and not self.rows.group:
            return
        units = self.rows.schedule.starts[row]
        here = slice(units[0].id, units[-1].id + 1)
        for layer in self.row.further():
            _merge(*(t[here] for t in self.layers[0]), *(t[here] for t in self.layers[layer]))
        self.row = Layers()
        if self.rows.group and (self.rows.per_sample or self.rows.segments[0].plan.live[row]):
            mean, var, count = (t[here] for t in self.layers[0])
            sync.merge(mean, var, count, self.rows.group)

    def finish(self, alive: Sequence[int] | Tensor, values: int) -> None:
        """The number of values of the units that live for the batch, where that is all there is to it; of no other."""
        count, counted = self.layers[0][2], self.rows.counted
        if isinstance(alive, Tensor):
            torch.mul(alive, count if counted else values, out=count)
            return
        if not counted and len(alive) == len(count):
            count.fill_(values)
            return
        dead = sorted(set(range(len(count))).difference(alive)) if counted else ()  # which ran, in a dense execution
        if parts := [count[first:last] for first, last in (spans(dead) if counted else self.to_fill)]:
            torch._foreach_zero_(parts) if counted else torch._foreach_add_(parts, values)  # to zeros


def _merge(mean: Tensor, var: Tensor, count: Tensor, mean_b: Tensor, var_b: Tensor, count_b: Tensor) -> None:
    """Adds statistics b to the first ones, in place (Chan et al. 1983)."""
    total = count + count_b
    share = (count_b / total.clamp(min=1)).unsqueeze(1)
    delta = mean_b - mean
    mean.add_(delta * share)
    var.lerp_(var_b, share).add_(delta.square_().mul_(share * (1 - share)))
    count.copy_(total)
