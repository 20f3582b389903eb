"""The fractal block of a network: what every block has, and the fused one on ``fractal_kernels.fractal_block``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fractal_kernels import fractal_block
from fractal_kernels.schedule import Unit, cut, plan, schedule, spans

from .layers import init_conv

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
}


def as_conv(weight: Tensor) -> Tensor:
    """[O, kH, kW, I] as the [O, I, kH, kW] view that a convolution takes."""
    return weight.permute(0, 3, 1, 2)


class UnitViews(NamedTuple):
    """The tensors of one unit, as views of its block's."""

    weight: Tensor
    weight_1x1: Tensor | None
    projection: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    conv_bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor


class Block(nn.Module):
    """What fused and composed blocks share: options, the pool, a column as plain layers.

    ``pool`` is the 2x2 max-pool "before" or "after" the last join, "average", or None. ``dropout`` is a rate, and
    ``dropout_place`` where: between "conv" and norm, after each "activation", or once on the output of the "block".
    """

    sync_group: object = None  # set by fractal_kernels.sync_batch_norm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        columns: int,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        dropout_place: str = "conv",
        pool: str | None = "before",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.schedule = schedule(columns)
        self.columns, self.in_channels, self.out_channels = columns, in_channels, out_channels
        self.activation, self.dropout, self.dropout_place = activation, dropout, dropout_place
        self.pool, self.momentum, self.eps = pool, momentum, eps

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        """``to(memory_format=torch.channels_last)`` moves the elements of every 4-dim parameter. These are in that
        format as they are, seen as convolution weights; moved, they and their gradients would be copied in every step.
        """

        def in_place(t: Tensor) -> Tensor:
            out = fn(t)
            return out.contiguous() if t.is_contiguous() and not out.is_contiguous() else out

        return super()._apply(in_place, recurse)

    def rate(self, place: str) -> float:
        """The dropout rate at this place: 0 unless it is the block's."""
        return self.dropout if place == self.dropout_place else 0.0

    def finish(self, joined: Tensor) -> Tensor:
        """What comes after the last join and its max-pool."""
        if self.pool == "average":
            if min(joined.shape[2:]) < 2:
                raise ValueError(
                    f"FractalBlock: expected x with H and W >= 2 for pooling, got {list(joined.shape[2:])}"
                )
            joined = F.avg_pool2d(joined, 2)
        rate = self.rate("block")
        return F.dropout(joined, rate, self.training) if rate else joined

    def known(self, keep: Tensor, dense: bool, live: Tensor | None, values: int) -> Tensor | Sequence[int] | None:
        """The units that ran, of ``values`` values each, where that takes no look at what was computed."""
        if self.sync_group is not None or keep.dim() == 3 or torch.compiler.is_compiling() or type(keep) is not Tensor:
            return None
        if values <= 1:
            return ()
        if dense or self.momentum is None or torch._C._are_functorch_transforms_active():
            return live
        return plan(self.columns, tuple(keep.flatten().tolist())).units

    def track(self, ran: Tensor | Sequence[int], mean: Tensor, var: Tensor, alone: Tensor) -> None:
        """Moves the running statistics of the units that ``ran``, numbers or bool [U], in the set of this step.

        The host reads no device. ``mean``, unbiased ``var``: of this batch, in the shape of a set; of a unit that did
        not run, anything.
        """
        buffers, sets = [self.num_batches_tracked, self.running_mean, self.running_var], self.running_mean.shape[0]
        if not isinstance(ran, Tensor):  # on a GPU two launches
            ranges, set = spans(ran), int(alone) % sets
            tracked, *running = (buffer.select(0, set) for buffer in buffers)
            if ranges:
                torch._foreach_add_(cut(tracked, ranges), 1)
            if ranges and self.momentum:
                ranges = [self.channels_of(*span) for span in ranges]
                batch = [t.to(running[0].dtype) for t in (mean, var)]
                moved, values = ([part for t in ts for part in cut(t, ranges)] for ts in (running, batch))
                torch._foreach_lerp_(moved, values, self.momentum)
            return
        if torch.compiler.is_compiling():  # the set is data, so that a compiled step is one graph
            # Without a copy from the host, for which a compiled step would wait.
            ran = ((torch.arange(sets, device=ran.device) - alone) % sets == 0).unsqueeze(1) & ran
        else:
            buffers, ran = [buffer.narrow(0, int(alone) % sets, 1) for buffer in buffers], ran.unsqueeze(0)
        tracked, *running = buffers
        tracked.add_(ran)
        if self.momentum == 0:
            return
        share = self.momentum if self.momentum is not None else self.per_channel(tracked.clamp(min=1).reciprocal())
        there = self.per_channel(ran)
        for statistics, batch in zip(running, (mean, var), strict=True):
            # Not by a weight of 0: what is not finite in this batch would reach what did not run.
            statistics.lerp_(torch.where(there, batch.to(statistics.dtype), statistics), share)

    def _sets(self, alone: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Of a buffer the set that a path reads, and the other one."""
        if torch.compiler.is_compiling():  # the set is data, so that it is one graph
            own = (torch.zeros(1, dtype=torch.int64, device=self.running_mean.device) + alone) % 2
            return lambda t: (t.index_select(0, own)[0], t.index_select(0, 1 - own)[0])
        set = int(alone) % 2
        return lambda t: (t[set], t[1 - set])

    def statistics(self, alone: Tensor) -> list[Tensor]:
        """Running mean and variance in evaluation, in the shape of a set; the host reads no device.

        Without global drop-path no column runs alone in training: it has the full network's. So has a unit that never
        ran in the steps of its set, and did in the other's.
        """
        held = self.running_mean, self.running_var
        if len(self.running_mean) == 1:
            # With gradients copies: training may move them before the backward of this evaluation.
            return [t[0].clone() if torch.is_grad_enabled() else t[0] for t in held]
        both = self._sets(alone)
        (borrows,) = self.per_channel(self._borrows(*both(self.num_batches_tracked)).unsqueeze(0))
        return [torch.where(borrows, other, own) for own, other in map(both, held)]

    @staticmethod
    def _borrows(own: Tensor, other: Tensor) -> Tensor:
        return own.logical_not().logical_and(other)

    def find(self, c: int, j: int) -> Unit:
        """Column c's j-th unit."""
        for unit in self.schedule.units:
            if (unit.column, unit.step) == (c, j):
                return unit
        raise ValueError(f"unit: expected c < {self.columns} and j < 2**c, got c={c!r}, j={j!r}")

    def set_of(self, c: int, j: int, set: int) -> int:
        """Of which set evaluation takes the statistics of column c's j-th unit, as :meth:`statistics` has it."""
        if len(self.running_mean) == 1:
            return 0
        borrows = self._borrows(self.num_batches_tracked[set], self.num_batches_tracked[1 - set])
        return 1 - set if borrows[self.find(c, j).id] else set

    @torch.no_grad()
    def unit_layers(self, c: int, j: int, set: int = 0) -> list[nn.Module]:
        """Column c's j-th unit up to its join as modules of ``torch.nn``, with copies of its weights and statistics.

        A convolution whose output channels are partly 1x1 becomes one of 3x3 with zeros around those.
        """
        unit = self.unit(c, j, self.set_of(c, j, set))
        weight = unit.weight
        if unit.weight_1x1 is not None:
            weight = torch.cat([weight, F.pad(unit.weight_1x1, (1, 1, 1, 1))])
        out_channels, in_channels = weight.shape[:2]
        made = {"device": weight.device, "dtype": weight.dtype}
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=unit.conv_bias is not None, **made)
        bn = nn.BatchNorm2d(out_channels, self.eps, self.momentum, affine=unit.gamma is not None, **made)
        layers = [conv, bn, ACTIVATIONS[self.activation]()]
        copies = [(conv.weight, weight), (conv.bias, unit.conv_bias), (bn.weight, unit.gamma), (bn.bias, unit.beta)]
        copies += [(bn.running_mean, unit.running_mean), (bn.running_var, unit.running_var)]
        if unit.projection is not None:
            layers.append(nn.Conv2d(out_channels, unit.projection.shape[0], 1, bias=False, **made))
            copies.append((layers[-1].weight, unit.projection))
        for target, source in copies:
            if target is not None:
                target.copy_(source)
        for place, at in (("activation", 3), ("conv", 1)):
            if self.rate(place):
                layers.insert(at, nn.Dropout(self.dropout))
        return layers

    def pool_layer(self) -> nn.Module:
        """The pool as a module of ``torch.nn``."""
        if self.pool is None:
            return nn.Identity()
        return nn.AvgPool2d(2) if self.pool == "average" else nn.MaxPool2d(2)

    def column_layers(self, c: int, set: int) -> list[nn.Module]:
        """Column c alone as modules of ``torch.nn``, with copies of its weights and of its ``set`` of statistics.

        The column's own projections stay in it: they belong to the branch, and the next convolution is made for their
        width.
        """
        layers = [layer for j in range(2**c) for layer in self.unit_layers(c, j, set)]
        if self.pool is not None:
            layers.append(self.pool_layer())
        return [*layers, nn.Dropout(self.dropout)] if self.rate("block") else layers


class FractalBlock(Block):
    """One fused block: a wide weight per row, and the normalisation of all units in [U, K] tensors.

    ``weights[r]`` is [n_r*K, 3, 3, C_in]: channels_last convolution weights, stored contiguously, so that neither the
    convolutions nor a fused optimiser has to copy them.

    Running statistics are [S, U, K]: set 0 of steps in which a unit ran inside the full network, set 1 of steps in
    which its column ran alone (S = 2), or one set for both (S = 1).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        columns: int,
        *,
        conv_bias: bool = False,
        bn_affine: bool = True,
        sets: int = 2,
        stats: str = "live",
        **options: object,
    ) -> None:
        super().__init__(in_channels, channels, columns, **options)
        self.channels, self.stats = channels, stats
        units = len(self.schedule.units)
        self.weights = nn.ParameterList(
            torch.empty(len(row) * channels, 3, 3, in_channels if r == 0 else channels)
            for r, row in enumerate(self.schedule.starts)
        )
        self.gamma = nn.Parameter(torch.ones(units, channels)) if bn_affine else None
        self.beta = nn.Parameter(torch.zeros(units, channels)) if bn_affine else None
        self.conv_bias = nn.Parameter(torch.zeros(units, channels)) if conv_bias else None
        self.register_buffer("running_mean", torch.zeros(sets, units, channels))
        self.register_buffer("running_var", torch.ones(sets, units, channels))
        self.register_buffer("num_batches_tracked", torch.zeros(sets, units))

    def per_channel(self, values: Tensor) -> Tensor:
        """[S, U] in the shape of the running statistics."""
        return values.unsqueeze(2)

    def channels_of(self, first: int, last: int) -> tuple[int, int]:
        """Where a range of units is in a set of the running statistics."""
        return first, last

    def init_weights(self, init: str) -> None:
        for weight in self.weights:
            init_conv(weight, init, weight.shape[3] * 9, self.channels * 9)  # fans of a unit, not of the wide weight

    def unit(self, c: int, j: int, set: int = 0) -> UnitViews:
        """Views of column c's j-th conv: ``weight`` [K, C_in, 3, 3], ``gamma``, ``beta``, ``conv_bias`` and statistics;
        ``weight_1x1`` and ``projection``, which only composed blocks have, are None.

        Args:
            c: column. j: which of its 2**c convs. set: which set of running statistics.
        """
        unit = self.find(c, j)
        first = self.schedule.starts[unit.start][0].id
        return UnitViews(
            weight=as_conv(self.weights[unit.start]).narrow(0, (unit.id - first) * self.channels, self.channels),
            weight_1x1=None,
            projection=None,
            gamma=None if self.gamma is None else self.gamma[unit.id],
            beta=None if self.beta is None else self.beta[unit.id],
            conv_bias=None if self.conv_bias is None else self.conv_bias[unit.id],
            running_mean=self.running_mean[set, unit.id],
            running_var=self.running_var[set, unit.id],
        )

    def forward(
        self, x: Tensor, keep: Tensor, alone: Tensor, dense: bool = False, live: Tensor | None = None
    ) -> Tensor:
        """``keep`` [R, C] or [R, C, N], ``alone`` as in :class:`Path`; ``live`` as in ``fractal_block``."""
        mean, var = (None, None) if self.training else self.statistics(alone)
        result = fractal_block(
            x,
            [as_conv(weight) for weight in self.weights],
            self.gamma,
            self.beta,
            keep,
            conv_bias=self.conv_bias,
            mean=mean,
            var=var,
            dropout=self.rate("conv"),
            eps=self.eps,
            pool=None if self.pool == "average" else self.pool,
            stats=self.stats,
            group=self.sync_group,
            dense=dense,
            live=live,
        )
        if self.training:
            with torch.no_grad():
                values = x.shape[0] * x.shape[2] * x.shape[3]
                ran = self.known(keep, dense, live, values)
                if ran is None:
                    ran = result.counts > 1
                    unbiased = torch.addcdiv(result.var, result.var, (result.counts - 1).unsqueeze(1))
                else:
                    unbiased = result.var * (values / max(values - 1, 1))
                self.track(ran, result.mean, unbiased, alone)
        return self.finish(result.out)
