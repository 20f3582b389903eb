"""The operators of the fractal block, forward and backward, over the schedule of rows.

A row is a (wide) convolution of the units that start there, their statistics, and the join of those that end there.
Kept for backward: the joins J_r of several branches, convolution outputs and statistics; nothing else. Where nobody
else has the outputs (``donated``), their gradients take their place in memory. Every J_r is read by the convolutions
of row r+1 alone, so backward has nothing to accumulate but a row that was split.
Every segment of the batch (``block_rows``) goes through this with its own tensors; statistics and gradients of
parameters are added over segments.
The path is data: under torch.compile the operators are opaque and take it as a small tensor. One on the host chooses
what runs, which a CUDA graph of the compiler's would keep as it was: of such paths the overload is ``host``, which is
tagged to stay out of them. For dropout forward is tagged as random, so that a compiled checkpoint draws the same noise
again; and every traced call of it has a number of its own (``call``), else compilers take two calls for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, cpu_conv, sync
from .block_rows import Conv, Layers, Rows, Statistics, gather_weight
from .library import _LIB, POOL, accumulate_dtype, empty, pooled, to_layout
from .schedule import schedule

_aten = torch.ops.aten
# Backends whose join_backward_apply may write dy over the y that it reads, on the CPU. Triton's tuning runs a launch
# several times; CUDA's loads do not wait for its stores.
IN_PLACE = ("cpu", "reference")


def _unbind(*vectors: Tensor | None) -> list[tuple[Tensor, ...]]:
    return [() if t is None else t.unbind() for t in vectors]


for _overload, _tags in (("", ()), (".host", (torch.Tag.cudagraph_unsafe,))):
    _LIB.define(
        f"block_forward{_overload}(Tensor x, Tensor[] weights, Tensor? conv_bias, Tensor? gamma, Tensor? beta,"
        " Tensor? mean, Tensor? var, Tensor path, bool dense, Tensor? live, float dropout, float eps, int flags,"
        " bool save, bool fixed, str backend, str group, int call=0) -> Tensor[]",
        tags=(*_tags, torch.Tag.nondeterministic_seeded),
    )
    _LIB.define(
        f"block_backward{_overload}(Tensor grad, Tensor x, Tensor[] weights, Tensor? gamma, Tensor? beta, Tensor mean,"
        " Tensor var, Tensor count, Tensor path, Tensor[] saved, bool conv_bias, bool batch_stats, bool[] needs,"
        " bool dense, float dropout, float eps, int flags, bool fixed, str backend, str group, bool donated=False)"
        " -> Tensor[]",
        tags=_tags,
    )


@torch.library.impl(_LIB, "block_forward", "CompositeExplicitAutograd")
@torch.library.impl(_LIB, "block_forward.host", "CompositeExplicitAutograd")
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
    live: Tensor | None,
    dropout: float,
    eps: float,
    flags: int,
    save: bool,
    fixed: bool,
    backend: str,
    group: str,
    call: int = 0,
) -> list[Tensor]:
    """[out, count, mean, var, *saved]: saved is the joins, then per row the outputs and dropout masks of
    its convs; where ``fixed``, of a size that does not depend on the path."""
    launch = backends.launcher(backend)
    units = len(schedule(len(weights).bit_length()).units)
    channels = sum(w.shape[0] for w in weights) // units
    training = mean is None
    our_convs = conv_bias is None and cpu_conv.computes(x, channels, backend)
    rows = Rows(weights, channels, path, dense, flags, x, group if training else "", our_convs)
    dtype = accumulate_dtype(x.dtype)
    count = x.new_empty(units, dtype=dtype)
    if mean is None or var is None:
        mean, var = x.new_empty((units, channels), dtype=dtype), x.new_empty((units, channels), dtype=dtype)
    made = [count, mean, var] if training else [count]
    if not training or len(rows.segments[0].plan.units) < units:
        torch._foreach_zero_(made)  # of what does not run; on a GPU one launch
    vectors = _unbind(mean, var, gamma, beta)
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    ys: list[dict[int, Tensor]] = [{} for _ in rows.segments]
    stats = Statistics(launch, rows, mean, var, count)
    kept: list[Tensor] = []
    joins: list[Tensor] = []
    source, bits = x, x.new_empty((0, 0, *x.shape[2:]), dtype=torch.bool)
    for row in range(rows.rows):
        outputs: list[Tensor] = []
        noises: list[Tensor] = []
        for conv in rows.convs(row, weights):
            first, n = conv.group[0].id, len(conv.group)
            bias = None if conv_bias is None else conv_bias[first : first + n].flatten()
            inputs, weight = conv.part(source), rows.weight(conv.group, weights)
            own = bias is None and cpu_conv.fits(inputs, weight, backend)
            y = cpu_conv.conv(inputs, weight) if own else torch.conv2d(inputs, weight.to(x.dtype), bias, padding=1)
            if dropout and training:
                y, noise = _aten.native_dropout(y, dropout, True)
                noises.append(to_layout(noise, True))
            y = to_layout(y, True)
            outputs.append(y)
            rows.spread(y, conv, ys)
            if training:
                stats.take(y, conv)
        stats.finish_row(row)
        if save:
            kept += rows.fixed(outputs, row, weights, x) if fixed else outputs
            if dropout and training:
                kept += rows.fixed(noises, row, weights, bits) if fixed else noises
        joined_here = rows.joins(row)
        if joined_here or (fixed and rows.keeps_join(row)):
            pool = row == rows.rows - 1 and flags & POOL
            target = empty(pooled(shape) if pool else shape, x, True)
            for i, segment, joined in joined_here:
                norm, mask = rows.norm(joined, vectors), segment.joined_mask(row, joined)
                branches = [ys[i].pop(u.id) for u in joined]
                launch.join_forward(segment.part(target), branches, mask, *norm, eps, rows.join_flags(row), True)
            if save and rows.keeps_join(row):
                joins.append(target)
            source = target
    if training:
        stats.finish(rows.alive(path, dense, live), x.shape[0] * x.shape[2] * x.shape[3])
    if not training:
        mean, var = x.new_empty(0), x.new_empty(0)
    return [source, count, mean, var, *joins, *kept]


@torch.library.impl(_LIB, "block_backward", "CompositeExplicitAutograd")
@torch.library.impl(_LIB, "block_backward.host", "CompositeExplicitAutograd")
def _block_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    path: Tensor,
    saved: list[Tensor],
    conv_bias: bool,
    batch_stats: bool,
    needs: list[bool],
    dense: bool,
    dropout: float,
    eps: float,
    flags: int,
    fixed: bool,
    backend: str,
    group: str,
    donated: bool = False,
) -> list[Tensor]:
    """[dx, *dweights, dconv_bias, dgamma, dbeta]; empty where there is no such parameter, or no need for it.

    ``needs``: whether x, then each row's weight, needs a gradient.

    ``donated``: ``saved`` is given away. The schema does not say that its tensors may be written: to the dispatcher and
    to compilers, which never donate, they are inputs like others.
    """
    launch = backends.launcher(backend)
    units, channels = mean.shape
    our_convs = not conv_bias and cpu_conv.computes(x, channels, backend)
    rows = Rows(weights, channels, path, dense, flags, x, group if batch_stats else "", our_convs)
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    joins, outputs, noises = rows.unpack(weights, saved, bool(dropout) and batch_stats, fixed)
    vectors = _unbind(mean, var, gamma, beta)
    ys: list[dict[int, Tensor]] = [{} for _ in rows.segments]
    dys: list[dict[int, Tensor]] = [{} for _ in rows.segments]
    buffers: list[list[Tensor]] = []
    in_place = donated and backend in IN_PLACE
    if in_place:  # so that whoever runs this graph again after an error is told
        torch.autograd.graph.increment_version([y for parts in outputs for _, y in parts])
    for parts in outputs:
        buffers.append([y if in_place else empty((conv.size, y.shape[1], *shape[2:]), x, True) for conv, y in parts])
        for (conv, y), dy in zip(parts, buffers[-1], strict=True):
            rows.spread(y, conv, ys)
            rows.spread(dy, conv, dys)
    order = [u.id for units_here in rows.slots for u in units_here]
    make = x.new_zeros if rows.spread_out else x.new_empty
    sums = [make((2, len(order), channels), dtype=mean.dtype).unbind()]
    # Gradients of gamma and beta: this rank's own sums, for data parallelism to average.
    own = tuple(torch.empty_like(s) for s in sums[0]) if rows.group else sums[0]
    everywhere = rows.numbers(count, shape[0] * shape[2] * shape[3], dense)
    counts = torch.stack([count[u] for u in order]) if rows.counted and batch_stats else None
    dweights: list[Tensor] = [x.new_empty(0) for _ in weights]  # each its own: outputs do not alias
    dconv_bias = torch.zeros_like(mean) if conv_bias else x.new_empty(0)
    position, ds = len(order), [segment.part(grad) for segment in rows.segments]
    zeros: list[Tensor] = []
    for row in range(rows.rows - 1, -1, -1):
        code, calls, layers = rows.join_flags(row), [], Layers()
        joined_here, outputs_here, dys_here = rows.joins(row), outputs[row], buffers.pop()
        end = position
        position -= len(rows.slots[row])
        needs_source, needs_weight = row > 0 or needs[0], needs[1 + row]
        if not joined_here and not outputs_here and not rows.group:
            if needs_weight:
                dweights[row] = gather_weight(weights[row], dweights[row], [], rows, zeros)
            continue
        for i, segment, joined in joined_here:
            layer = layers.at(joined) if rows.several else 0
            if layer == len(sums):
                sums.append((torch.zeros_like(sums[0][0]), torch.zeros_like(sums[0][1])))
            at = position + (joined[0].column - rows.slots[row][0].column if rows.spread_out else 0)
            norm, mask = rows.norm(joined, vectors), segment.joined_mask(row, joined)
            g, branches = to_layout(ds[i], True), [ys[i].pop(u.id) for u in joined]
            out = [s.narrow(0, at, len(joined)) for s in sums[layer]]
            if batch_stats or gamma is not None or beta is not None:
                launch.join_backward_reduce(*out, g, branches, mask, *norm, eps, code, True)
            if layer:
                out = [s.narrow(0, at, len(joined)) for s in sums[0]]
            live = everywhere if counts is None else counts.narrow(0, at, len(joined))
            calls.append((i, joined, (g, branches, mask, *norm), [*out, live] if batch_stats else []))
        for layer in layers.further():
            for s, further in zip(sums[0], sums[layer], strict=True):
                s[position:end] += further[position:end]
        if rows.group and rows.slots[row]:
            for s, own_s in zip(sums[0], own, strict=True):
                own_s[position:end] = s[position:end]
            total = sync.add(torch.stack([s[position:end] for s in sums[0]]), rows.group)
            for s, total_s in zip(sums[0], total, strict=True):
                s[position:end] = total_s
        for i, joined, arguments, stats in calls:
            targets = [dys[i].pop(u.id) for u in joined]
            launch.join_backward_apply(targets, *arguments, stats, eps, code, True)
        totals: dict[int, Tensor] = {}
        parts_of_weight = []
        for (conv, _), dy, noise in zip(outputs_here, dys_here, noises[row], strict=True):
            weight = rows.weight(conv.group, weights)
            if needs_weight:
                source = _source(launch, rows, row, conv, x, joins, ys, vectors, eps)
            elif needs_source or conv_bias:
                source = empty((conv.size, weight.shape[1], *shape[2:]), x, True)  # nobody reads it
            else:
                continue
            if noise is not None:
                dy = _aten.native_dropout_backward(dy, noise, 1.0 / (1.0 - dropout))
            if not conv_bias and cpu_conv.fits(source, weight, backend):
                dweight = None
                if needs_weight:
                    if not dweights[row].numel() and not rows.several:
                        dweights[row] = torch.empty_like(weights[row])
                    there = dweights[row].numel() > 0
                    dweight = rows.weight(conv.group, dweights) if there else torch.empty_like(weight)
                dsource = cpu_conv.conv_backward(dy, source, weight, needs_source, dweight)
            else:
                sizes, want = ([dy.shape[1]] if conv_bias else None), [needs_source, needs_weight, conv_bias]
                dsource, dweight, dbias = _aten.convolution_backward(
                    dy, source, weight.to(dy.dtype), sizes, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, want
                )
                dweight = dweight.to(weight.dtype) if needs_weight else None
                if conv_bias:
                    first, n = conv.group[0].id, len(conv.group)
                    dconv_bias[first : first + n] += dbias.view(n, channels)
            if dsource is not None:
                for i in conv.segments:
                    part = rows.segments[i].part(dsource, conv.first)
                    totals[i] = totals[i].add_(part) if i in totals else part
            if dweight is not None:
                parts_of_weight.append((conv.group, dweight))
        if needs_weight:
            dweights[row] = gather_weight(weights[row], dweights[row], parts_of_weight, rows, zeros)
        for i, total in totals.items():
            ds[i] = total
    for dtype in {z.dtype for z in zeros}:  # a weight that nothing read is not cast
        torch._foreach_zero_([z for z in zeros if z.dtype == dtype])
    where = {unit: i for i, unit in enumerate(order)}
    dead = [u for u in range(units) if u not in where]  # whose means are zeros, if they are the batch's
    zero = [mean[dead[0]] if batch_stats else mean.new_zeros(channels)] if dead else []
    dgamma, dbeta = (  # each its own: gradients of two parameters do not share memory
        x.new_empty(0) if p is None else torch.stack([s[where.get(u, -1)] for u in range(units)])
        for p, s in ((gamma, [*own[1].unbind(), *zero]), (beta, [*own[0].unbind(), *zero]))
    )
    dx = x.new_empty(0)
    if needs[0]:
        dx = to_layout(ds[0], True) if len(ds) == 1 else empty(x.shape, x, True)
        for segment, d in zip(rows.segments if len(ds) > 1 else [], ds, strict=False):
            segment.part(dx).copy_(d)
    return [dx, *dweights, dconv_bias, dgamma, dbeta]


def _source(
    launch: Any,
    rows: Rows,
    row: int,
    conv: Conv,
    x: Tensor,
    joins: list[Tensor],
    ys: list[dict[int, Tensor]],
    vectors: list[tuple[Tensor, ...]],
    eps: float,
) -> Tensor:
    """What a conv reads: the block's input, a saved join, or a join of one branch computed again."""
    if row == 0 or rows.keeps_join(row - 1):
        return conv.part(x if row == 0 else joins[row - 1])
    source = empty((conv.size, rows.channels, *x.shape[2:]), x, True)
    code = rows.join_flags(row - 1)
    for i in conv.segments:
        segment = rows.segments[i]
        before = segment.plan.joins[row - 1]
        arguments = [ys[i][u.id] for u in before], segment.joined_mask(row - 1, before), *rows.norm(before, vectors)
        launch.join_forward(segment.part(source, conv.first), *arguments, eps, code, True)
    return source


@torch.library.register_fake("fractal_kernels::block_forward", lib=_LIB)
@torch.library.register_fake("fractal_kernels::block_forward.host", lib=_LIB)
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
    live: Tensor | None,
    dropout: float,
    eps: float,
    flags: int,
    save: bool,
    fixed: bool,
    backend: str,
    group: str,
    call: int = 0,
) -> list[Tensor]:
    s = schedule(len(weights).bit_length())
    units, dtype = len(s.units), accumulate_dtype(x.dtype)
    channels = sum(w.shape[0] for w in weights) // units
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    size = (units, channels) if mean is None else (0,)
    out = [
        empty(pooled(shape) if flags & POOL else shape, x, True),
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
@torch.library.register_fake("fractal_kernels::block_backward.host", lib=_LIB)
def _block_backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    path: Tensor,
    saved: list[Tensor],
    conv_bias: bool,
    batch_stats: bool,
    needs: list[bool],
    dense: bool,
    dropout: float,
    eps: float,
    flags: int,
    fixed: bool,
    backend: str,
    group: str,
    donated: bool = False,
) -> list[Tensor]:
    return [
        empty(x.shape, x, True) if needs[0] else x.new_empty(0),
        *(torch.empty_like(w) if needed else x.new_empty(0) for w, needed in zip(weights, needs[1:], strict=True)),
        *(
            torch.empty_like(mean) if there else x.new_empty(0)
            for there in (conv_bias, gamma is not None, beta is not None)
        ),
    ]
