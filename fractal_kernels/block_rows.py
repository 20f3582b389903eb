"""What the block's operators run: which units on which range of the batch, and where their tensors are.

Under a path for the batch one segment, the whole batch, runs what lives. Under a path per sample whose statistics run
over live samples, samples that keep one column alone (global drop-path) and lie side by side are a segment of their
own that runs nothing but that column; the others run everything and their joins are masked. Segments share parameters
and statistics, and nothing else.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .library import Flags, empty
from .schedule import Plan, Unit, everything, plan, runs, schedule


def wide_is_faster(in_channels: int) -> bool:
    """Whether the convs of a row run as one wide conv rather than one by one (measured: benchmarks/bench_conv.py)."""
    return in_channels < 128


class Segment(NamedTuple):
    """Samples first ... first + size - 1. ``mask`` [R, C, size] or, for the batch, [R, C]; None: the plan says all."""

    first: int
    size: int
    plan: Plan
    mask: Tensor | None

    @property
    def per_sample(self) -> bool:
        return self.mask is not None and self.mask.dim() == 3

    def part(self, t: Tensor) -> Tensor:
        """This segment's samples of ``t``."""
        return t if self.size == t.shape[0] else t.narrow(0, self.first, self.size)

    def joined_mask(self, row: int, joined: tuple[Unit, ...]) -> Tensor | None:
        return None if self.mask is None else self.mask[row, joined[0].column :]

    def unit_mask(self, group: tuple[Unit, ...]) -> Tensor:
        """[n, size]: whether each unit lives in each sample."""
        assert self.mask is not None
        if len(group) == 1:
            return self.mask[group[0].end, group[0].column].unsqueeze(0)
        return torch.stack([self.mask[unit.end, unit.column] for unit in group])


def live_samples(columns: int, keep: Tensor) -> Tensor:
    """``keep`` [R, C, N] without the branches that are kept in a join which does not live for the sample."""
    units = schedule(columns).units
    live = keep.clone(memory_format=torch.contiguous_format)
    reached: dict[int, Tensor] = {}  # by row: for which samples a unit that reads its join lives
    for unit in sorted(units, key=lambda u: -u.end):
        kept = live[unit.end, unit.column]
        if unit.end in reached:
            kept &= reached[unit.end]
        if unit.start > 0:
            before = reached.get(unit.start - 1)
            reached[unit.start - 1] = kept if before is None else before | kept
    return live


def alone(keep: Tensor) -> list[int]:
    """Per sample of a live ``keep`` [R, C, N] on the host: the one column that it uses, or -1."""
    used = keep.any(0)
    return torch.where(used.sum(0) == 1, used.to(torch.uint8).argmax(0), -1).tolist()


def segments(columns: int, path: Tensor, dense: bool, live: bool, batch: int, device: torch.device) -> list[Segment]:
    """The segments of a path [R, C] on the host, or [R, C, N] anywhere (on the host where ranges are to be found)."""
    if path.dim() == 2:
        if dense:
            return [Segment(0, batch, everything(columns), path.to(device))]
        return [Segment(0, batch, plan(columns, tuple(path.flatten().tolist())), None)]
    keep = live_samples(columns, path) if live else path
    whole = [Segment(0, batch, everything(columns), keep.contiguous().to(device, non_blocking=True))]
    if dense or not live or path.device.type != "cpu" or batch == 0:
        return whole
    found = [
        Segment(at, size, everything(columns), whole[0].mask[..., at : at + size].contiguous())  # type: ignore[index]
        if column < 0
        else Segment(at, size, _only(columns, column), None)
        for column, at, size in ranges(alone(keep), batch / (4 * columns))
    ]
    return sorted(found, key=lambda s: s.mask is None)  # a row's units are first seen together, then one by one


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

    def __init__(self, weights: list[Tensor], channels: int, path: Tensor, dense: bool, flags: int, x: Tensor) -> None:
        self.columns = len(weights).bit_length()
        self.rows, self.channels, self.flags, self.batch = len(weights), channels, flags, x.shape[0]
        self.schedule = schedule(self.columns)
        self.segments = segments(self.columns, path, dense, bool(flags & Flags.STATS_LIVE), x.shape[0], x.device)
        # Whether a unit's number of live values depends on more than the batch.
        self.counted = bool(flags & Flags.STATS_LIVE) and path.dim() == 3

    def groups(self, row: int, segment: Segment, weights: list[Tensor]) -> list[tuple[Unit, ...]]:
        """The units of a row that run in a segment, as the convs that they run in."""
        units = segment.plan.live[row]
        return runs(units) if wide_is_faster(weights[row].shape[1]) else [(unit,) for unit in units]

    def places(self, row: int, weights: list[Tensor]) -> list[tuple[Segment, tuple[Unit, ...]]]:
        """Every conv of a row."""
        return [(segment, group) for segment in self.segments for group in self.groups(row, segment, weights)]

    def joins(self, row: int) -> list[tuple[int, Segment, tuple[Unit, ...]]]:
        """Every join of a row: the segment's number, the segment, the branches."""
        return [(i, s, joined) for i, s in enumerate(self.segments) if (joined := s.plan.joins[row])]

    def offset(self, group: tuple[Unit, ...]) -> int:
        """Of a group's first channel in its row's wide weight."""
        return (group[0].id - self.schedule.starts[group[0].start][0].id) * self.channels

    def weight(self, group: tuple[Unit, ...], weights: list[Tensor]) -> Tensor:
        return weights[group[0].start].narrow(0, self.offset(group), len(group) * self.channels)

    def join_flags(self, row: int) -> int:
        return int(self.flags if row == self.rows - 1 else self.flags & ~(Flags.POOL_BEFORE | Flags.POOL_AFTER))

    def keeps_join(self, row: int) -> bool:
        """Whether a join is saved. One branch's is one pass over that branch, and is computed again in backward."""
        return row < self.rows - 1 and len(self.schedule.ends[row]) > 1

    def norm(self, joined: tuple[Unit, ...], vectors: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
        """Means, vars, weights and biases of the branches, as the launchers take them."""
        return [[rows[u.id] for u in joined] if rows else [] for rows in vectors]

    def narrow(self, y: Tensor, group: tuple[Unit, ...], into: dict[int, Tensor]) -> None:
        """The units' channels of a conv's output."""
        for i, unit in enumerate(group):
            into[unit.id] = y if len(group) == 1 else y.narrow(1, i * self.channels, self.channels)

    def fixed(self, parts: list[Tensor], row: int, weights: list[Tensor], like: Tensor) -> list[Tensor]:
        """The parts of a row in one buffer whose size does not depend on the path (torch.compile)."""
        wide = len(self.schedule.starts[row]) * self.channels
        if len(parts) == 1 and parts[0].shape[:2] == (self.batch, wide):
            return parts
        full = empty((self.batch, wide, *like.shape[2:]), like, True)
        for part, (segment, group) in zip(parts, self.places(row, weights), strict=True):
            self.in_fixed(full, segment, group).copy_(part)
        return [full]

    def in_fixed(self, full: Tensor, segment: Segment, group: tuple[Unit, ...]) -> Tensor:
        return segment.part(full).narrow(1, self.offset(group), len(group) * self.channels)


def gather_weight(weight: Tensor, full: Tensor, parts: list[tuple[tuple[Unit, ...], Tensor]], rows: Rows) -> Tensor:
    """The gradient of a row's wide weight; zeros, not None, where a unit does not live. ``full`` may hold parts."""
    if len(parts) == 1 and parts[0][1].shape == weight.shape and parts[0][1].stride() == weight.stride():
        return parts[0][1]
    full = full if full.numel() else torch.empty_like(weight)
    units = weight.shape[0] // rows.channels
    written = [False] * units
    for group, dweight in parts:
        offset = rows.offset(group)
        target, first = full[offset : offset + dweight.shape[0]], offset // rows.channels
        if written[first]:
            target.add_(dweight)
        elif dweight.data_ptr() != target.data_ptr():
            target.copy_(dweight)
        written[first : first + len(group)] = [True] * len(group)
    for i in range(units):
        if not written[i]:
            full[i * rows.channels : (i + 1) * rows.channels].zero_()
    return full


def statistics(
    launch: Any,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    y: Tensor,
    segment: Segment,
    group: tuple[Unit, ...],
    rows: Rows,
    ys: dict[int, Tensor],
    seen: set[int],
) -> None:
    """Statistics of a conv's output: its channels at once, or per unit over live samples; merged over segments."""
    first, last = group[0].id, group[-1].id + 1
    into = [mean[first:last], var[first:last], count[first:last]]
    again = first in seen
    out = [torch.empty_like(t) for t in into] if again else into
    if rows.counted and segment.per_sample:
        launch.channel_stats(*out, [ys[u.id] for u in group], segment.unit_mask(group), True)
    else:
        one = count.new_empty(1)
        launch.channel_stats(out[0].view(1, -1), out[1].view(1, -1), one, [y], None, True)
        if rows.counted:
            out[2].copy_(one.expand(last - first))
    if again:
        _merge(*into, *out)
    seen.update(u.id for u in group)


def _merge(mean: Tensor, var: Tensor, count: Tensor, mean_b: Tensor, var_b: Tensor, count_b: Tensor) -> None:
    """Adds statistics b to the first ones, in place (Chan et al. 1983)."""
    total = count + count_b
    share = (count_b / total.clamp(min=1)).unsqueeze(1)
    delta = mean_b - mean
    mean.add_(delta * share)
    var.lerp_(var_b, share).add_(delta.square_().mul_(share * (1 - share)))
    count.copy_(total)
