"""The fractal block unit by unit, for what the fused one does not compute: other activations, columns of different
widths, a mix of 1x1 and 3x3 convolutions. Joins are ``masked_mean_join``, batch norms ``bn_relu_join``, with the ReLU
if it is one; what these return is not kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fractal_kernels import backends, bn_relu_join, checks, compiling, masked_mean_join, recomputed, sync
from fractal_kernels.ops.conv import conv2d_1x1_pooled, conv2d_3x3
from fractal_kernels.ops.exported import channels_last, foreign_tool
from fractal_kernels.ops.weights import wide_weights
from fractal_kernels.schedule import Unit, live_units, plan

from .fused import ACTIVATIONS, Block, UnitViews, as_conv
from .layers import init_conv

KINDS = ("3x3", "1x1")  # of convolutions, in the order of UnitViews


def _cast_to(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x reads a weight: autocast's, but for float64."""
    casts = checks.is_autocast(x) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else weight.dtype


def _are_wide(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether convolutions that read the same run as one: on a GPU, where each is a launch, and where their weights are
    copied anyway (autocast), since a wide copy is kept for backward."""
    return weight.device.type != "cpu" and weight.dtype != dtype


class _WithZeros(torch.autograd.Function):
    """The first argument as it is; the gradients of the others, which nothing else read, are zeros instead of None."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return out.detach()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.empty_like(t) for t in ctx.saved_tensors]
        torch._foreach_zero_(zeros)  # on a GPU one launch
        return grad, *zeros


class _Split(torch.autograd.Function):
    """``Tensor.split``, whose backward fills one tensor of zeros for all parts that nothing read, not one for each."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return vector.split(sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        like = next((g for g in grads if g is not None), None)
        if like is None:
            return None, None
        zeros = like.new_zeros(max(ctx.sizes))
        return torch.cat([zeros[:n] if g is None else g for g, n in zip(grads, ctx.sizes, strict=True)]), None


class ComposedBlock(Block):
    r"""A fractal block, unit by unit, of which only the part that lives under a path for the batch runs.

    .. math:: f_1(z) = conv(z), \qquad f_{C+1}(z) = (f_C \circ f_C)(z) \oplus conv(z)

    A unit is convolution, batch norm, activation. Where branches of different widths meet, the thinner ones pass a
    linear 1x1 projection (no bias) to the widest branch's width, then the join is the mean; the projection is the
    branch's own, and a column alone passes it too. A max-pool "before" the join follows the projection.

    Parameters are ``weights[unit.id]`` [n, 3, 3, C_in] (channels_last convolution weights, stored contiguously),
    ``weights_1x1`` and ``projections`` by the unit's id where there are any, and ``gamma``, ``beta``, ``conv_bias``,
    vectors of all units side by side, as the running statistics [S, sum of widths] are: S sets as in
    :class:`FractalBlock`. Gradients of what does not live are zeros, not None. Under ``torch.compile`` the block runs
    as it is, between two graphs, but for ``dense`` and paths per sample.

    Args:
        in_channels: C_in. widths: output channels of every column's convolutions, shallowest column first; C of them.
        kernel_mix: share of a convolution's output channels that are 3x3, its first ones; the others are 1x1.
        conv_bias, bn_affine: whether convolutions have a bias and batch norms an affine.
        sets: of running statistics.
        options: activation, dropout, dropout_place, pool, momentum, eps of :class:`Block`.
    Shape:
        [N, C_in, H, W] to [N, max(widths), H/2, W/2], or H, W without a pool.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), equation 1 and section 4 (projections, 1x1 convolutions).
    Example:
        >>> from fractalnet.drop_path import full_path
        >>> block, path = ComposedBlock(3, (8, 4), activation="silu"), full_path(1, 2)
        >>> block.init_weights("he")
        >>> block(torch.randn(2, 3, 8, 8), path.keep[0], path.alone).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        *,
        kernel_mix: float = 1.0,
        conv_bias: bool = False,
        bn_affine: bool = True,
        sets: int = 2,
        **options: object,
    ) -> None:
        super().__init__(in_channels, max(widths), len(widths), **options)
        self.widths = tuple(widths)
        self.sizes = [widths[unit.column] for unit in self.schedule.units]
        self.weights = nn.ParameterList()
        self.weights_1x1, self.projections = nn.ParameterDict(), nn.ParameterDict()
        source = in_channels
        for starts, ends in zip(self.schedule.starts, self.schedule.ends, strict=True):
            for unit in starts:
                width = widths[unit.column]
                spatial = max(1, round(kernel_mix * width))
                self.weights.append(torch.empty(spatial, 3, 3, source))
                if spatial < width:
                    self.weights_1x1[str(unit.id)] = torch.empty(width - spatial, 1, 1, source)
                joined = max(widths[other.column] for other in self.schedule.ends[unit.end])
                if width < joined:
                    self.projections[str(unit.id)] = torch.empty(joined, 1, 1, width)
            source = max(widths[unit.column] for unit in ends)
        total = sum(self.sizes)
        self.gamma = nn.Parameter(torch.ones(total)) if bn_affine else None
        self.beta = nn.Parameter(torch.zeros(total)) if bn_affine else None
        self.conv_bias = nn.Parameter(torch.zeros(total)) if conv_bias else None
        self.register_buffer("running_mean", torch.zeros(sets, total))
        self.register_buffer("running_var", torch.ones(sets, total))
        self.register_buffer("num_batches_tracked", torch.zeros(sets, len(self.sizes)))
        self.act = ACTIVATIONS[self.activation]()

    def init_weights(self, init: str) -> None:
        for weight in (*self.weights, *self.weights_1x1.values(), *self.projections.values()):
            out_channels, kernel, _, in_channels = weight.shape
            init_conv(weight, init, in_channels * kernel**2, out_channels * kernel**2)

    def per_channel(self, values: Tensor) -> Tensor:
        """[S, U] in the shape of the running statistics."""
        return torch.cat([v.expand(-1, n) for v, n in zip(values.split(1, 1), self.sizes, strict=True)], 1)

    def channels_of(self, first: int, last: int) -> tuple[int, int]:
        """Where a range of units is in a set of the running statistics."""
        return sum(self.sizes[:first]), sum(self.sizes[:last])

    def unit(self, c: int, j: int, set: int = 0) -> UnitViews:
        """Views of column c's j-th conv: ``weight`` [n, C_in, 3, 3], ``weight_1x1`` [K - n, C_in, 1, 1] or None,
        ``projection`` [J, K, 1, 1] or None, ``gamma``, ``beta``, ``conv_bias`` and statistics [K].

        Args:
            c: column. j: which of its 2**c convs. set: which set of running statistics.
        """
        unit = self.find(c, j)
        vectors = (self.gamma, self.beta, self.conv_bias, self.running_mean[set], self.running_var[set])
        return self._views(unit, [None if v is None else v.split(self.sizes) for v in vectors])

    def _views(self, unit: Unit, vectors: list[tuple[Tensor, ...] | None]) -> UnitViews:
        key = str(unit.id)
        gamma, beta, conv_bias, mean, var = (None if v is None else v[unit.id] for v in vectors)
        return UnitViews(
            weight=as_conv(self.weights[unit.id]),
            weight_1x1=as_conv(self.weights_1x1[key]) if key in self.weights_1x1 else None,
            projection=as_conv(self.projections[key]) if key in self.projections else None,
            gamma=gamma,
            beta=beta,
            conv_bias=conv_bias,
            running_mean=mean,
            running_var=var,
        )

    def forward(
        self, x: Tensor, keep: Tensor, alone: Tensor, dense: bool = False, live: Tensor | None = None
    ) -> Tensor:
        """``keep`` [R, C] or [R, C, N], ``alone`` as in :class:`Path`; ``live`` as in ``fractal_block``.

        Per batch only live units run, or with ``dense`` all, masked: then ``keep`` may be on the device, where the host
        does not look at it. Per sample all run, masked, and a unit's statistics are of the samples for which it lives.
        """
        self._check(x, keep)
        run = self._run if dense or keep.dim() == 3 else self._uncompiled
        return run(x, keep, alone, dense, live)

    def _run(self, x: Tensor, keep: Tensor, alone: Tensor, dense: bool, known: Tensor | None) -> Tensor:
        live: list[Tensor] | None = None
        if dense or keep.dim() == 3:
            runs, joins = {u.id for u in self.schedule.units}, self.schedule.ends
            keep = keep.to(x.device, non_blocking=True)
            live = live_units(self.schedule, keep) if keep.dim() == 3 else None
        else:
            chosen = plan(self.columns, tuple(keep.flatten().tolist()))
            runs, joins = set(chosen.units), chosen.joins
        # On a GPU one launch; zeros, as what is not moved stays as it is.
        zero = self.running_mean.new_zeros((2, sum(self.sizes))) if self.training else None
        taken = self.statistics(alone) if zero is None else list(zero.unbind())
        tool = foreign_tool()  # which knows no autograd functions
        parts = Tensor.split if tool or len(runs) == len(self.sizes) else _Split.apply
        split = [None if v is None else parts(v, self.sizes) for v in (self.gamma, self.beta, self.conv_bias)]
        split += [v.split(self.sizes) for v in taken]
        views = {u.id: self._views(u, split) for u in self.schedule.units if u.id in runs}
        groups = [self._groups([u for u in row if u.id in runs], views, x) for row in self.schedule.starts]
        keeps = bool(tool) or torch.is_grad_enabled()  # casts, for backward; else those of a row are gone with it
        weights = self._weights(groups, views, x) if keeps else {}
        branches: dict[int, Tensor] = {}
        out = channels_last(x)  # once, not for every column that reads it
        for row, joined in enumerate(joins):
            if not keeps:
                weights = self._weights(groups[row : row + 1], views, x)
            with recomputed(out):
                for group in groups[row]:
                    ys = self._convs(out, [views[u.id] for u in group], *(weights[kind, group[0].id] for kind in KINDS))
                    for unit in group:
                        own = views[unit.id]._replace(projection=weights["projection", unit.id])
                        pooled = self.pool == "before" and unit.end == len(joins) - 1
                        samples = None if live is None else live[unit.id]
                        branches[unit.id] = self._branch(ys.pop(0), own, samples, pooled)
            if joined:
                mask = None
                if keep.dim() == 3:
                    mask = torch.stack([live[u.id] for u in joined])
                elif dense:
                    mask = keep[row, joined[0].column :]
                out = self._join([branches.pop(u.id) for u in joined], mask, last=row == len(joins) - 1)
        if self.training:
            with torch.no_grad():
                ran = self.known(keep, dense, known, x.shape[0] * x.shape[2] * x.shape[3])
                if ran is None:
                    if keep.dim() == 2 and dense:
                        live = live_units(self.schedule, keep)
                    count = self._count(x, runs, live)
                    if self.sync_group is not None:
                        count = sync.add(count, sync.name_of("FractalNet", self.sync_group))
                    ran = count > 1
                self.track(ran, *taken, alone)
        unused = [p for i, p in enumerate(self.weights) if i not in runs]
        unused += [p for group in (self.weights_1x1, self.projections) for i, p in group.items() if int(i) not in runs]
        unused += [v for v in (self.gamma, self.beta, self.conv_bias) if v is not None and not runs]
        return self.finish(_WithZeros.apply(out, *unused) if unused and not tool else out)

    _uncompiled = compiling.disable(_run)  # which units run is the host's to read from keep

    def _check(self, x: Tensor, keep: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels or (self.pool is not None and min(x.shape[2:]) < 2):
            raise ValueError(
                f"ComposedBlock: expected x of shape [N, {self.in_channels}, H, W], H and W >= 2 for pooling, "
                f"got {list(x.shape)}"
            )
        if self.training and self.sync_group is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise ValueError(
                f"ComposedBlock: expected more than 1 value per channel when training, got x of shape {list(x.shape)}"
            )
        shape = (self.schedule.rows, self.columns) + ((x.shape[0],) if keep.dim() == 3 else ())
        if tuple(keep.shape) != shape or keep.dtype != torch.bool:
            raise ValueError(
                f"ComposedBlock: expected keep bool of shape {list(shape)}, got {keep.dtype} {list(keep.shape)}"
            )

    def _count(self, x: Tensor, runs: set[int], live: list[Tensor] | None) -> Tensor:
        """Values per unit [U]: of all samples, if it lives (``live``, or None: if it runs); of a path per sample, of
        the samples for which it is live."""
        pixels = x.shape[2] * x.shape[3]
        if live is not None:
            alive = torch.stack(live)
            return alive.sum(1) * pixels if alive.dim() == 2 else alive * (pixels * x.shape[0])
        # No list of the host's: a CUDA graph cannot copy from there.
        one = torch.full((1,), pixels * x.shape[0], device=x.device)
        zero = torch.zeros_like(one)
        return torch.cat([one if i in runs else zero for i in range(len(self.sizes))])

    def _groups(self, units: list[Unit], views: dict[int, UnitViews], x: Tensor) -> list[list[Unit]]:
        """Units of a row whose convolutions run as one: that train, or do not."""
        found: dict[object, list[Unit]] = {}
        for unit in units:
            weight, mixed = views[unit.id].weight, views[unit.id].weight_1x1
            trained = weight.requires_grad, mixed is not None and mixed.requires_grad
            alone = not _are_wide(weight, _cast_to(x, weight))
            found.setdefault(unit.id if alone else trained, []).append(unit)
        return list(found.values())

    def _weights(
        self, groups: list[list[list[Unit]]], views: dict[int, UnitViews], x: Tensor
    ) -> dict[tuple[str, int], Tensor | None]:
        """What convolutions read, wide where they are: "3x3" and "1x1" by a group's first unit, "projection" by every
        unit; None where there is none."""
        wide: dict[tuple[str, int], list[Tensor | None]] = {}
        for group in (group for row in groups for group in row):
            wide |= {(kind, group[0].id): [views[u.id][i] for u in group] for i, kind in enumerate(KINDS)}
            wide |= {("projection", u.id): [views[u.id].projection] for u in group}
        found: dict[tuple[str, int], Tensor | None] = dict.fromkeys(wide)
        casts: dict[torch.dtype, dict[tuple[str, int], list[Tensor]]] = {}
        for key, weights in wide.items():
            if there := [w for w in weights if w is not None]:
                casts.setdefault(_cast_to(x, there[0]), {})[key] = there
        for dtype, cast in casts.items():
            found |= zip(cast, wide_weights([*cast.values()], dtype), strict=True)
        return found

    def _convs(self, z: Tensor, units: list[UnitViews], weight: Tensor, weight_1x1: Tensor | None) -> list[Tensor]:
        """The convolutions of units that read the same."""
        z = channels_last(z)
        y = conv2d_3x3(z, weight, backends.resolve("FractalNet", None, z.device, z.dtype))
        ys = [y] if len(units) == 1 else [*y.split([u.weight.shape[0] for u in units], 1)]
        if weight_1x1 is None:
            return ys
        sizes = [0 if u.weight_1x1 is None else u.weight_1x1.shape[0] for u in units]
        y = F.conv2d(z, weight_1x1)
        parts = [y] if len(units) == 1 else y.split(sizes, 1)
        return [torch.cat([y, part], 1) if size else y for y, part, size in zip(ys, parts, sizes, strict=True)]

    def _branch(self, y: Tensor, unit: UnitViews, live: Tensor | None, pooled: bool) -> Tensor:
        """One unit from its convolution's output up to its join; its statistics run over samples that are ``live``."""
        if unit.conv_bias is not None:
            y = y + unit.conv_bias.to(y.dtype).view(-1, 1, 1)
        if rate := self.rate("conv"):
            y = F.dropout(y, rate, self.training)
        rate = self.rate("activation")
        relu = self.activation == "relu"
        at_once = relu and pooled and unit.projection is None and not rate
        y = self._norm(y, unit, live, relu, at_once)
        if not relu:
            with recomputed(y):
                y = self.act(y)
        if rate:
            y = F.dropout(y, rate, self.training)
        if unit.projection is not None:
            with recomputed(y):
                backend = backends.resolve("FractalNet", None, y.device, y.dtype)
                weight = unit.projection
                y = conv2d_1x1_pooled(y, weight, backend) if pooled else F.conv2d(y, weight)
        elif pooled and not at_once:
            y = masked_mean_join([y], pool="before")
        return y

    def _norm(self, y: Tensor, unit: UnitViews, live: Tensor | None, relu: bool, pooled: bool) -> Tensor:
        """Batch norm, ReLU and max-pool; in training the unit's statistics become the batch's (momentum 1), the
        variance unbiased."""
        vectors = ([v] for v in (unit.gamma, unit.beta, unit.running_mean, unit.running_var))
        options = {"activation": "branch" if relu else "none", "pool": "before" if pooled else None, "stats": "live"}
        mask = None if live is None else live.unsqueeze(0)
        return bn_relu_join([y], *vectors, mask, self.training, 1.0, self.eps, group=self.sync_group, **options)

    def _join(self, branches: list[Tensor], mask: Tensor | None, last: bool) -> Tensor:
        out = branches[0] if len(branches) == 1 and mask is None else masked_mean_join(branches, mask)
        return masked_mean_join([out], pool="after") if last and self.pool == "after" else out
