"""Batch statistics of a block's units in training: over convolutions, segments of the batch, and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import sync
from .block_rows import ALIGNED, Conv, Rows
from .schedule import cut, spans


class Layers:
    """Vectors per unit, added over segments: what is first seen of a unit is in the first layer, its next part in the
    next one. ``at(ids)`` names the layer of a group all of whose units move on together."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def at(self, ids: tuple[int, ...]) -> int:
        layer = max(self.seen.get(i, 0) for i in ids)
        self.seen |= dict.fromkeys(ids, layer + 1)
        return layer

    def further(self) -> range:
        """The layers beyond the first one."""
        return range(1, max(self.seen.values(), default=1))


class Statistics:
    """Mean, biased variance and number of live values per unit, layer by layer, merged row by row."""

    def __init__(self, launch: Any, rows: Rows, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.launch, self.rows = launch, rows
        self.layers = [(mean, var, count)]
        flat = [] if rows.counted else [cut(t.view(1, -1), rows.ranges, 1) for t in (mean, var)]
        self.flat = iter(zip(*flat, strict=True))  # per convolution
        self.row = Layers()
        self.unread = count.new_empty(1)
        self.to_fill: list[tuple[int, int]] = []  # units whose numbers no kernel writes

    def take(self, y: Tensor, conv: Conv) -> None:
        """Of a conv's output: its channels at once, or per unit over live samples."""
        first, n = conv.ids[0], len(conv.ids)
        if not self.rows.counted:
            mean, var = next(self.flat)
            there = n == 1 and first % ALIGNED == 0
            count = self.layers[0][2].narrow(0, first, 1) if there else self.unread
            self.launch.channel_stats(mean, var, count, [y], None, [], 0.0, None, True)
            if not there:
                self.to_fill.append((first, first + n))
            return
        layer = self.row.at(conv.ids)
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
