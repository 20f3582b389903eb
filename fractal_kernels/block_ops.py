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
from .block_rows import Conv, Join, Rows, gather_weight, rows_of
from .block_stats import Layers, Statistics
from .library import _LIB, POOL, accumulate_dtype, empty, pooled, to_layout
from .schedule import schedule

_aten = torch.ops.aten
# Backends whose join_backward_apply may write dy over the y that it reads, on the CPU. Triton's tuning runs a launch
# several times; CUDA's loads do not wait for its stores.
IN_PLACE = ("cpu", "reference")


def _unbind(*vectors: Tensor | None) -> list[tuple[Tensor, ...]]:
    """Rows of [U, K]; unbind() takes twice as many calls for them."""
    return [() if t is None else t.flatten().split_with_sizes([t.shape[1]] * t.shape[0]) for t in vectors]


def _norm(join: Join, vectors: list[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Means, vars, weights and biases of the branches, as the launchers take them."""
    return [[rows[i] for i in join.ids] if rows else [] for rows in vectors]


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
    rows = rows_of(weights, channels, path, dense, flags, x, group if training else "", our_convs)
    dtype = accumulate_dtype(x.dtype)
    count, stats = (x.new_empty if training else x.new_zeros)(units, dtype=dtype), None
    if mean is None or var is None:
        mean, var = x.new_empty((units, channels), dtype=dtype), x.new_empty((units, channels), dtype=dtype)
        if len(rows.segments[0].plan.units) < units:
            torch._foreach_zero_([count, mean, var])  # of what does not run; on a GPU one launch
        stats = Statistics(launch, rows, mean, var, count)
    vectors = _unbind(mean, var, gamma, beta)
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    ys: list[dict[int, Tensor]] = [{} for _ in rows.segments]
    kept: list[Tensor] = []
    joins: list[Tensor] = []
    bits = x.new_empty((0, 0, *x.shape[2:]), dtype=torch.bool) if dropout and training else x
    source = x
    for row in range(rows.rows):
        outputs: list[Tensor] = []
        noises: list[Tensor] = []
        for conv in rows.convs[row]:
            bias = None if conv_bias is None else conv_bias[conv.ids[0] : conv.ids[-1] + 1].flatten()
            inputs, weight = conv.part(source), conv.weight(weights[row])
            own = bias is None and cpu_conv.fits(inputs, weight, backend)
            y = cpu_conv.conv(inputs, weight) if own else torch.conv2d(inputs, weight.to(x.dtype), bias, padding=1)
            if dropout and training:
                y, noise = _aten.native_dropout(y, dropout, True)
                noises.append(to_layout(noise, True))
            y = to_layout(y, True)
            outputs.append(y)
            rows.spread(y, conv, ys)
            if stats:
                stats.take(y, conv)
        if stats:
            stats.finish_row(row)
        if save:
            kept += rows.fixed(outputs, row, x) if fixed else outputs
            if dropout and training:
                kept += rows.fixed(noises, row, bits) if fixed else noises
        if rows.joins[row] or (fixed and rows.keeps_join[row]):
            code = rows.join_flags[row]
            target = empty(pooled(shape) if code & POOL else shape, x, True)
            for join in rows.joins[row]:
                branches, norm = [ys[join.at].pop(i) for i in join.ids], _norm(join, vectors)
                launch.join_forward(join.segment.part(target), branches, join.mask, *norm, eps, code, True)
            if save and rows.keeps_join[row]:
                joins.append(target)
            source = target
    if stats:
        stats.finish(rows.alive(path, dense, live), x.shape[0] * x.shape[2] * x.shape[3])
    else:
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
    rows = rows_of(weights, channels, path, dense, flags, x, group if batch_stats else "", our_convs)
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
            if not in_place:
                rows.spread(dy, conv, dys)
    if in_place:
        dys = [dict(parts) for parts in ys]
    order, sizes = rows.order, rows.sizes
    make = x.new_zeros if rows.spread_out else x.new_empty
    whole = make((2, len(order), channels), dtype=mean.dtype).unbind()
    sums = [[s.split_with_sizes(sizes) for s in whole]]  # layer by layer, and row by row
    # Gradients of gamma and beta: this rank's own sums, for data parallelism to average.
    own = tuple(torch.empty_like(s) for s in whole) if rows.group else whole
    everywhere = rows.numbers(count, shape[0] * shape[2] * shape[3], dense)
    counts = torch.stack([count[u] for u in order]).split_with_sizes(sizes) if rows.counted and batch_stats else None
    dweights: list[Tensor | None] = [None] * rows.rows
    dconv_bias = torch.zeros_like(mean) if conv_bias else x.new_empty(0)
    ds = [segment.part(grad) for segment in rows.segments]
    zeros: list[Tensor] = []
    for row in range(rows.rows - 1, -1, -1):
        code, calls, layers = rows.join_flags[row], [], Layers()
        outputs_here, dys_here = outputs[row], buffers.pop()
        needs_source, needs_weight = row > 0 or needs[0], needs[1 + row]
        if not rows.joins[row] and not outputs_here and not rows.group:
            if needs_weight:
                dweights[row] = gather_weight(weights[row], dweights[row], [], rows, zeros)
            continue
        for join in rows.joins[row]:
            layer = layers.at(join.ids) if rows.several else 0
            if layer == len(sums):
                sums.append([torch.zeros_like(s).split_with_sizes(sizes) for s in whole])
            branches = [ys[join.at].pop(i) for i in join.ids]
            arguments = (to_layout(ds[join.at], True), branches, join.mask, *_norm(join, vectors))
            out = [rows.in_slot(s[row], row, join) for s in sums[layer]]
            if batch_stats or gamma is not None or beta is not None:
                launch.join_backward_reduce(*out, *arguments, eps, code, True)
            if layer:
                out = [rows.in_slot(s[row], row, join) for s in sums[0]]
            live = everywhere if counts is None else rows.in_slot(counts[row], row, join)
            calls.append((join, arguments, [*out, live] if batch_stats else []))
        for layer in layers.further():
            for s, further in zip(sums[0], sums[layer], strict=True):
                s[row].add_(further[row])
        if rows.group and rows.slots[row]:
            for s, own_s in zip(sums[0], own, strict=True):
                own_s.split_with_sizes(sizes)[row].copy_(s[row])
            total = sync.add(torch.stack([s[row] for s in sums[0]]), rows.group)
            for s, total_s in zip(sums[0], total, strict=True):
                s[row].copy_(total_s)
        for join, arguments, stats in calls:
            targets = [dys[join.at].pop(i) for i in join.ids]
            launch.join_backward_apply(targets, *arguments, stats, eps, code, True)
        totals: dict[int, Tensor] = {}
        parts_of_weight = []
        for (conv, _), dy, noise in zip(outputs_here, dys_here, noises[row], strict=True):
            weight = conv.weight(weights[row])
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
                    full = dweights[row]
                    if full is None and not rows.several:
                        full = dweights[row] = torch.empty_like(weights[row])
                    dweight = torch.empty_like(weight) if full is None else conv.weight(full)
                dsource = cpu_conv.conv_backward(dy, source, weight, needs_source, dweight)
            else:
                of_bias, want = ([dy.shape[1]] if conv_bias else None), [needs_source, needs_weight, conv_bias]
                dsource, dweight, dbias = _aten.convolution_backward(
                    dy, source, weight.to(dy.dtype), of_bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, want
                )
                dweight = dweight.to(weight.dtype) if needs_weight else None
                if conv_bias:
                    dconv_bias[conv.ids[0] : conv.ids[-1] + 1] += dbias.view(-1, channels)
            if dsource is not None:
                for i in conv.segments:
                    part = rows.segments[i].part(dsource, conv.first)
                    totals[i] = totals[i].add_(part) if i in totals else part
            if dweight is not None:
                parts_of_weight.append((conv, dweight))
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
    filled = (x.new_empty(0) if d is None else d for d in dweights)  # each its own: outputs do not alias
    return [dx, *filled, dconv_bias, dgamma, dbeta]


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
    if row == 0 or rows.keeps_join[row - 1]:
        return conv.part(x if row == 0 else joins[row - 1])
    source = empty((conv.size, rows.channels, *x.shape[2:]), x, True)
    for join in rows.joins[row - 1]:
        if join.at in conv.segments:
            arguments = [ys[join.at][i] for i in join.ids], join.mask, *_norm(join, vectors)
            target = join.segment.part(source, conv.first)
            launch.join_forward(target, *arguments, eps, rows.join_flags[row - 1], True)
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
