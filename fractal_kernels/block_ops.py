"""The operators of the fractal block, forward and backward, over the schedule of rows.

A row is a (wide) convolution of the units that start there, their statistics, and the join of those that end there.
Kept for backward: the joins J_r of several branches, convolution outputs and statistics; nothing else. Every
J_r is read by the convolutions of row r+1 alone, so backward has nothing to accumulate but a row that was split.
The path is data: under torch.compile the operators are opaque and take it as a small CPU tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, tiny_conv
from .library import _LIB, MAX_BRANCHES, Flags, accumulate_dtype, empty, pooled, to_layout
from .schedule import Plan, Unit, everything, plan, runs, schedule

_aten = torch.ops.aten


def wide_is_faster(in_channels: int) -> bool:
    """Whether the convs of a row run as one wide conv rather than one by one (measured: benchmarks/bench_conv.py)."""
    return in_channels < 128


def _plan(columns: int, path: Tensor, dense: bool) -> Plan:
    return everything(columns) if dense or path.dim() == 3 else plan(columns, tuple(path.flatten().tolist()))


class _Rows:
    """What forward and backward share: where a unit's output, parameters and statistics are."""

    def __init__(
        self, weights: list[Tensor], channels: int, path: Tensor, dense: bool, flags: int, device: torch.device
    ) -> None:
        self.columns = len(weights).bit_length()
        self.rows, self.channels, self.path, self.dense, self.flags = len(weights), channels, path, dense, flags
        self.schedule = schedule(self.columns)
        self.plan = _plan(self.columns, path, dense)
        # Dropped branches run too, per sample or in dense execution, and joins take them out; one copy to the device.
        self.masks = path.to(device) if path.dim() == 3 or dense else None

    def mask(self, row: int, joined: tuple[Unit, ...]) -> Tensor | None:
        return None if self.masks is None else self.masks[row, joined[0].column :]

    def groups(self, row: int, weights: list[Tensor]) -> list[tuple[Unit, ...]]:
        """The units of a row that live, as the convs that they run in."""
        units = self.plan.live[row]
        return runs(units) if wide_is_faster(weights[row].shape[1]) else [(unit,) for unit in units]

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


def _unbind(*vectors: Tensor | None) -> list[tuple[Tensor, ...]]:
    return [() if t is None else t.unbind() for t in vectors]


def _narrow(y: Tensor, group: tuple[Unit, ...], channels: int, into: dict[int, Tensor]) -> None:
    for i, unit in enumerate(group):
        into[unit.id] = y if len(group) == 1 else y.narrow(1, i * channels, channels)


_LIB.define(
    "block_forward(Tensor x, Tensor[] weights, Tensor? conv_bias, Tensor? gamma, Tensor? beta, Tensor? mean,"
    " Tensor? var, Tensor path, bool dense, float dropout, float eps, int flags, bool save, bool fixed, str backend)"
    " -> Tensor[]"
)
_LIB.define(
    "block_backward(Tensor grad, Tensor x, Tensor[] weights, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var,"
    " Tensor path, Tensor[] saved, bool conv_bias, bool batch_stats, bool needs_x, bool dense, float dropout,"
    " float eps, int flags, bool fixed, str backend) -> Tensor[]"
)


@torch.library.impl(_LIB, "block_forward", "CompositeExplicitAutograd")
def _block_forward(
    x: Tensor,
    weights: list[Tensor],
    conv_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    path: Tensor,
    dense: bool,
    dropout: float,
    eps: float,
    flags: int,
    save: bool,
    fixed: bool,
    backend: str,
) -> list[Tensor]:
    """[out, live, mean, var, *saved]: saved is the joins, then per row the outputs and dropout masks of
    its convs; where ``fixed``, of a size that does not depend on the path."""
    launch = backends.launcher(backend)
    units = len(schedule(len(weights).bit_length()).units)
    channels = sum(w.shape[0] for w in weights) // units
    rows = _Rows(weights, channels, path, dense, flags, x.device)
    training = mean is None
    dtype = accumulate_dtype(x.dtype)
    live = x.new_zeros(units, dtype=dtype)
    if training:
        mean, var = x.new_zeros((units, channels), dtype=dtype), x.new_zeros((units, channels), dtype=dtype)
        count = x.new_empty(1, dtype=dtype)
        for group in (g for row in _plan(rows.columns, path, dense=False).live for g in runs(row)):
            live[group[0].id : group[-1].id + 1].fill_(1)  # no index tensor: it would be copied from the host
    assert mean is not None and var is not None
    vectors = _unbind(mean, var, gamma, beta)
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    ys: dict[int, Tensor] = {}
    kept: list[Tensor] = []
    joins: list[Tensor] = []
    source = x
    for row in range(rows.rows):
        outputs: list[Tensor] = []
        noises: list[Tensor] = []
        groups = rows.groups(row, weights)
        for group in groups:
            first, n = group[0].id, len(group)
            bias = None if conv_bias is None else conv_bias[first : first + n].flatten()
            weight = rows.weight(group, weights)
            if bias is None and tiny_conv.fits(source, weight):
                y = tiny_conv.conv(source, weight)
            else:
                y = torch.conv2d(source, weight, bias, padding=1)
            if dropout and training:
                y, noise = _aten.native_dropout(y, dropout, True)
                noises.append(noise)
            y = to_layout(y, True)
            if training:
                stats = mean[first : first + n].view(1, -1), var[first : first + n].view(1, -1)
                launch.channel_stats(*stats, count, [y], None, True)
            outputs.append(y)
            _narrow(y, group, channels, ys)
        if save:
            noisy = dropout and training
            kept += _fix(outputs, groups, rows, row, source) if fixed else outputs
            kept += _fix(noises, groups, rows, row, source.bool()) if fixed and noisy else noises
        joined = rows.plan.joins[row]
        if joined:
            last = row == rows.rows - 1
            pool = last and Flags(flags).pool
            source = empty(pooled(shape) if pool else shape, x, True)
            norm = rows.norm(joined, vectors)
            mask = rows.mask(row, joined)
            launch.join_forward(source, [ys[u.id] for u in joined], mask, *norm, eps, rows.join_flags(row), True)
            for unit in joined:
                del ys[unit.id]
            if rows.keeps_join(row):
                joins.append(source)
        elif fixed and rows.keeps_join(row):
            joins.append(empty(shape, x, True))
        if not save:
            joins.clear()
    if not training:
        mean, var = x.new_empty(0), x.new_empty(0)
    return [source, live, mean, var, *joins, *kept]


def _fix(parts: list[Tensor], groups: list[tuple[Unit, ...]], rows: _Rows, row: int, like: Tensor) -> list[Tensor]:
    """The parts of a row in one buffer whose size does not depend on the path (torch.compile)."""
    wide = len(rows.schedule.starts[row]) * rows.channels
    if len(parts) == 1 and parts[0].shape[1] == wide:
        return parts
    full = empty((like.shape[0], wide, *like.shape[2:]), like, True)
    for part, group in zip(parts, groups, strict=True):
        full.narrow(1, rows.offset(group), part.shape[1]).copy_(part)
    return [full]


@torch.library.impl(_LIB, "block_backward", "CompositeExplicitAutograd")
def _block_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    path: Tensor,
    saved: list[Tensor],
    conv_bias: bool,
    batch_stats: bool,
    needs_x: bool,
    dense: bool,
    dropout: float,
    eps: float,
    flags: int,
    fixed: bool,
    backend: str,
) -> list[Tensor]:
    """[dx (empty if not needed), *dweights, dconv_bias, dgamma, dbeta (empty where there is no such parameter)]."""
    launch = backends.launcher(backend)
    units, channels = mean.shape
    rows = _Rows(weights, channels, path, dense, flags, x.device)
    pixels = x.shape[2] * x.shape[3]
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    joins, outputs, noises = _unpack(rows, weights, saved, bool(dropout) and batch_stats, fixed)
    vectors = _unbind(mean, var, gamma, beta)
    ys: dict[int, Tensor] = {}
    dys: dict[int, Tensor] = {}
    buffers: dict[int, list[tuple[tuple[Unit, ...], Tensor, int]]] = {}
    for row, parts in enumerate(outputs):
        buffers[row] = []
        for i, (group, y) in enumerate(parts):
            _narrow(y, group, channels, ys)
            dy = empty((shape[0], len(group) * channels, *shape[2:]), x, True)
            _narrow(dy, group, channels, dys)
            buffers[row].append((group, dy, i))
    order = [u.id for joined in rows.plan.joins for u in joined]
    sums = x.new_empty((2, len(order), channels), dtype=mean.dtype)
    count = x.new_full((MAX_BRANCHES,), shape[0] * pixels, dtype=mean.dtype)
    dweights: list[Tensor] = [x.new_empty(0)] * rows.rows
    dconv_bias = torch.zeros_like(mean) if conv_bias else x.new_empty(0)
    position, d = len(order), grad
    for row in range(rows.rows - 1, -1, -1):
        joined = rows.plan.joins[row]
        if joined:
            position -= len(joined)
            dz, dzx = (s[position : position + len(joined)] for s in sums)
            norm = rows.norm(joined, vectors)
            mask = rows.mask(row, joined)
            g, y_list, code = to_layout(d, True), [ys[u.id] for u in joined], rows.join_flags(row)
            if batch_stats or gamma is not None:
                launch.join_backward_reduce(dz, dzx, g, y_list, mask, *norm, eps, code, True)
            stats = [dz, dzx, count] if batch_stats else []
            dy_list = [dys.pop(u.id) for u in joined]
            launch.join_backward_apply(dy_list, g, y_list, mask, *norm, stats, eps, code, True)
            for unit in joined:
                del ys[unit.id]
        source = x if row == 0 else joins[row - 1]
        before = rows.plan.joins[row - 1] if row > 0 else ()
        if before and not rows.keeps_join(row - 1):
            source = empty(shape, x, True)
            mask, code = rows.mask(row - 1, before), rows.join_flags(row - 1)
            launch.join_forward(source, [ys[u.id] for u in before], mask, *rows.norm(before, vectors), eps, code, True)
        needs = row > 0 or needs_x
        total: Tensor | None = None
        parts = []
        for group, dy, i in buffers.pop(row):
            if dropout and batch_stats:
                dy = _aten.native_dropout_backward(dy, noises[row][i], 1.0 / (1.0 - dropout))
            weight = rows.weight(group, weights)
            if not conv_bias and tiny_conv.fits(source, weight):
                if not parts:
                    dweights[row] = torch.empty_like(weights[row])
                dweight = rows.weight(group, dweights)
                dsource = tiny_conv.conv_backward(dy, source, weight, needs, dweight)
            else:
                sizes, want = ([dy.shape[1]] if conv_bias else None), [needs, True, conv_bias]
                dsource, dweight, dbias = _aten.convolution_backward(
                    dy, source, weight, sizes, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, want
                )
                if conv_bias:
                    dconv_bias[group[0].id : group[0].id + len(group)] = dbias.view(len(group), channels)
            if dsource is not None:
                total = dsource if total is None else total.add_(dsource)
            parts.append((group, dweight))
        dweights[row] = _gather_weight(weights[row], dweights[row], parts, rows)
        if total is not None:
            d = total
    zero, at = mean.new_zeros(channels), {unit: i for i, unit in enumerate(order)}
    dgamma, dbeta = (
        x.new_empty(0) if p is None else torch.stack([s[at[u]] if u in at else zero for u in range(units)])
        for p, s in ((gamma, sums[1]), (beta, sums[0]))
    )
    return [to_layout(d, True) if needs_x else x.new_empty(0), *dweights, dconv_bias, dgamma, dbeta]


def _gather_weight(weight: Tensor, full: Tensor, parts: list[tuple[tuple[Unit, ...], Tensor]], rows: _Rows) -> Tensor:
    """The gradient of a row's wide weight; zeros, not None, where a unit does not live. ``full`` may hold parts."""
    if len(parts) == 1 and parts[0][1].shape == weight.shape and parts[0][1].stride() == weight.stride():
        return parts[0][1]
    full = full if full.numel() else torch.empty_like(weight)
    done = 0
    for group, dweight in parts:
        offset = rows.offset(group)
        full[done:offset].zero_()
        done = offset + dweight.shape[0]
        if dweight.data_ptr() != full[offset:done].data_ptr():
            full[offset:done].copy_(dweight)
    full[done:].zero_()
    return full


def _unpack(
    rows: _Rows, weights: list[Tensor], saved: list[Tensor], noisy: bool, fixed: bool
) -> tuple[list[Tensor], list[list[tuple[tuple[Unit, ...], Tensor]]], list[list[Tensor]]]:
    """Joins by row, (group, output) by row, dropout masks by row, from what block_forward returned."""
    items = iter(saved)
    kept = [rows.keeps_join(r) and (fixed or bool(rows.plan.joins[r])) for r in range(rows.rows)]
    joins = [next(items) if there else rows.path for there in kept]
    outputs, noises = [], []
    for row in range(rows.rows):
        groups = rows.groups(row, weights)
        parts: list[list[Tensor]] = []
        for _ in range(2 if noisy else 1):
            if fixed:
                full = next(items)
                n = rows.channels
                parts.append([full.narrow(1, rows.offset(g), len(g) * n) for g in groups])
            else:
                parts.append([next(items) for _ in groups])
        outputs.append(list(zip(groups, parts[0], strict=True)))
        noises.append(parts[1] if noisy else [])
    return joins, outputs, noises


@torch.library.register_fake("fractal_kernels::block_forward", lib=_LIB)
def _block_forward_fake(
    x: Tensor,
    weights: list[Tensor],
    conv_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    path: Tensor,
    dense: bool,
    dropout: float,
    eps: float,
    flags: int,
    save: bool,
    fixed: bool,
    backend: str,
) -> list[Tensor]:
    s = schedule(len(weights).bit_length())
    units, dtype = len(s.units), accumulate_dtype(x.dtype)
    channels = sum(w.shape[0] for w in weights) // units
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    size = (units, channels) if mean is None else (0,)
    out = [
        empty(pooled(shape) if Flags(flags).pool else shape, x, True),
        x.new_empty(units, dtype=dtype),
        x.new_empty(size, dtype=dtype if mean is None else x.dtype),
        x.new_empty(size, dtype=dtype if mean is None else x.dtype),
    ]
    if save:
        out += [empty(shape, x, True) for ends in s.ends[:-1] if len(ends) > 1]
        for row in s.starts:
            wide = empty((shape[0], len(row) * channels, *shape[2:]), x, True)
            out.append(wide)
            if dropout and mean is None:
                out.append(torch.empty_like(wide, dtype=torch.bool))
    return out


@torch.library.register_fake("fractal_kernels::block_backward", lib=_LIB)
def _block_backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    path: Tensor,
    saved: list[Tensor],
    conv_bias: bool,
    batch_stats: bool,
    needs_x: bool,
    dense: bool,
    dropout: float,
    eps: float,
    flags: int,
    fixed: bool,
    backend: str,
) -> list[Tensor]:
    none = x.new_empty(0)
    return [
        empty(x.shape, x, True) if needs_x else none,
        *(torch.empty_like(w) for w in weights),
        *(
            torch.empty_like(mean) if there else x.new_empty(0)
            for there in (conv_bias, gamma is not None, beta is not None)
        ),
    ]
