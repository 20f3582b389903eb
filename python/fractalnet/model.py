"""FractalNet on ``fractal_kernels.fractal_block``."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fractal_kernels import fractal_block
from fractal_kernels.schedule import schedule

from . import drop_path, export
from .drop_path import Path
from .interchange import Hub

__all__ = ["FractalBlock", "FractalNet"]


def _as_conv(weight: Tensor) -> Tensor:
    """[O, kH, kW, I] as the [O, I, kH, kW] view that a convolution takes."""
    return weight.permute(0, 3, 1, 2)


class FractalBlock(nn.Module):
    """One fractal block: a wide weight per row, and the normalisation of all units in [U, K] tensors.

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
        dropout: float,
        pool: str,
        conv_bias: bool,
        bn_affine: bool,
        sets: int,
        momentum: float | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.schedule = schedule(columns)
        self.columns, self.channels, self.in_channels = columns, channels, in_channels
        self.dropout, self.pool, self.momentum, self.eps = dropout, pool, momentum, eps
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

    def unit(self, c: int, j: int, set: int = 0) -> SimpleNamespace:
        """Views of column c's j-th conv: ``weight`` [K, C_in, 3, 3], ``gamma``, ``beta``, ``conv_bias`` and statistics.

        Args:
            c: column. j: which of its 2**c convs. set: which set of running statistics.
        """
        for unit in self.schedule.units:
            if (unit.column, unit.step) == (c, j):
                break
        else:
            raise ValueError(f"unit: expected c < {self.columns} and j < 2**c, got c={c!r}, j={j!r}")
        first = self.schedule.starts[unit.start][0].id
        return SimpleNamespace(
            weight=_as_conv(self.weights[unit.start]).narrow(0, (unit.id - first) * self.channels, self.channels),
            gamma=None if self.gamma is None else self.gamma[unit.id],
            beta=None if self.beta is None else self.beta[unit.id],
            conv_bias=None if self.conv_bias is None else self.conv_bias[unit.id],
            running_mean=self.running_mean[set, unit.id],
            running_var=self.running_var[set, unit.id],
        )

    @torch.no_grad()
    def unit_layers(self, c: int, j: int, set: int = 0) -> list[nn.Module]:
        """The modules that compute :meth:`unit`: conv, dropout if there is any, batch norm, ReLU; with copies."""
        unit = self.unit(c, j, set)
        out_channels, in_channels = unit.weight.shape[:2]
        made = {"device": unit.weight.device, "dtype": unit.weight.dtype}
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=unit.conv_bias is not None, **made)
        bn = nn.BatchNorm2d(out_channels, self.eps, self.momentum, affine=unit.gamma is not None, **made)
        for target, source in (
            (conv.weight, unit.weight),
            (conv.bias, unit.conv_bias),
            (bn.weight, unit.gamma),
            (bn.bias, unit.beta),
            (bn.running_mean, unit.running_mean),
            (bn.running_var, unit.running_var),
        ):
            if target is not None:
                target.copy_(source)
        return [conv, *([nn.Dropout(self.dropout)] if self.dropout else []), bn, nn.ReLU()]

    def forward(self, x: Tensor, keep: Tensor, alone: Tensor, dense: bool = False) -> Tensor:
        """``keep`` [R, C] or [R, C, N], ``alone`` as in :class:`Path`."""
        sets = self.running_mean.shape[0]
        mean = var = None
        if not self.training:
            which = (alone.to(x.device) % sets).view(1)
            mean, var = (t.index_select(0, which)[0] for t in (self.running_mean, self.running_var))
        result = fractal_block(
            x,
            [_as_conv(weight) for weight in self.weights],
            self.gamma,
            self.beta,
            keep,
            conv_bias=self.conv_bias,
            mean=mean,
            var=var,
            dropout=self.dropout,
            eps=self.eps,
            pool=self.pool,
            dense=dense,
        )
        if self.training:
            with torch.no_grad():
                self._track(result.live, result.mean, result.var, alone, x.shape[0] * x.shape[2] * x.shape[3])
        return result.out

    def _track(self, live: Tensor, mean: Tensor, var: Tensor, alone: Tensor, count: int) -> None:
        """Moves the running statistics of the units that ran, in the set of this step, without reading the device."""
        if count < 2:
            return
        sets = self.running_mean.shape[0]
        chosen = (torch.arange(sets) == alone % sets).to(live.device)
        ran = (chosen.unsqueeze(1) * live).to(self.num_batches_tracked.dtype)
        self.num_batches_tracked.add_(ran)
        weight = ran * self.momentum if self.momentum is not None else ran / self.num_batches_tracked.clamp(min=1)
        weight = weight.unsqueeze(2).to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype).expand_as(self.running_mean), weight)
        unbiased = var * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype).expand_as(self.running_var), weight)


class FractalNet(nn.Module, Hub):
    """FractalNet: B fractal blocks with 2x2 max-pooling, global average, linear classifier.

    Args:
        num_classes: outputs of the classifier.
        columns: C, 1 to 8; the deepest column of a block has 2**(C-1) convs.
        channels: K of every block; its length is B.
        in_channels, image_size: of the images, [N, in_channels, image_size, image_size].
        dropout: rate per block between convolution and batch norm, or None.
        local_drop, global_ratio, granularity: the drop-path of :meth:`sample_path`.
        pool_order: "before_join" (each column pooled: the authors' code) or "after_join" (the authors' figure).
        conv_bias, bn_affine: whether convs have a bias and batch norms an affine.
        split_stats: two sets of running statistics, for the full network and for columns that ran alone. Per-sample
            paths mix both kinds in a batch and use one.
        init: "xavier" or "he".
        momentum, eps: of the batch norms; momentum None averages cumulatively.
    Shape:
        images [N, in_channels, S, S] to logits [N, num_classes].
    Source:
        Larsson et al. 2016 (arXiv:1605.07648).
    Example:
        >>> net = FractalNet(10, 3, (16, 32), image_size=8)
        >>> net(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        num_classes: int,
        columns: int,
        channels: Sequence[int],
        *,
        in_channels: int = 3,
        image_size: int = 32,
        dropout: Sequence[float] | None = None,
        local_drop: float = 0.15,
        global_ratio: float = 0.5,
        granularity: str = "batch",
        pool_order: str = "before_join",
        conv_bias: bool = False,
        bn_affine: bool = True,
        split_stats: bool = True,
        init: str = "xavier",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        channels = tuple(channels)
        _check("num_classes", num_classes >= 1, ">= 1", num_classes)
        _check("channels", len(channels) > 0 and min(channels) > 0, "a positive width per block", channels)
        _check("image_size", image_size >= 2 ** len(channels), f">= {2 ** len(channels)} for the pools", image_size)
        _check("dropout", dropout is None or len(dropout) == len(channels), "None or a rate per block", dropout)
        _check("granularity", granularity in ("batch", "sample"), "'batch' or 'sample'", granularity)
        _check("pool_order", pool_order in ("before_join", "after_join"), "'before_join' or 'after_join'", pool_order)
        _check("init", init in ("xavier", "he"), "'xavier' or 'he'", init)
        self.columns, self.channels, self.image_size = columns, channels, image_size
        self.local_drop, self.global_ratio, self.granularity = local_drop, global_ratio, granularity
        self.blocks = nn.ModuleList(
            FractalBlock(
                in_channels if b == 0 else channels[b - 1],
                width,
                columns,
                dropout=dropout[b] if dropout else 0.0,
                pool=pool_order.removesuffix("_join"),
                conv_bias=conv_bias,
                bn_affine=bn_affine,
                sets=2 if split_stats and granularity == "batch" else 1,
                momentum=momentum,
                eps=eps,
            )
            for b, width in enumerate(channels)
        )
        self.head = nn.Linear(channels[-1], num_classes)
        self._init(init)

    def _init(self, init: str) -> None:
        for block in self.blocks:
            for weight in block.weights:
                fan_in, fan_out = weight.shape[3] * 9, block.channels * 9  # of a unit, not of the wide weight
                if init == "xavier":
                    nn.init.uniform_(weight, -(bound := math.sqrt(6 / (fan_in + fan_out))), bound)
                else:
                    nn.init.normal_(weight, std=math.sqrt(2 / fan_in))
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def depth(self, column: int | None = None) -> int:
        """Convolutions on the longest path, of one column or of the full network: B * 2**column."""
        return len(self.blocks) * 2 ** (self.columns - 1 if column is None else column)

    def sample_path(self, batch_size: int, generator: torch.Generator | None = None) -> Path:
        """A path of the drop-path mixture, drawn on the CPU; the same generator state gives the same path."""
        return drop_path.sample_path(
            len(self.blocks),
            self.columns,
            batch_size,
            local_drop=self.local_drop,
            global_ratio=self.global_ratio,
            granularity=self.granularity,
            generator=generator,
        )

    def forward(self, x: Tensor, path: Path | None = None, column: int | None = None, dense: bool = False) -> Tensor:
        """Logits.

        Args:
            x: images.
            path: what to keep; None: in training a sampled path, in evaluation everything.
            column: run this column alone instead (in evaluation with its own statistics).
            dense: run dropped branches too and mask them (a check of the skipping, slower).
        """
        if column is not None:
            if path is not None:
                raise ValueError("FractalNet: expected path or column, got both")
            path = drop_path.column_path(len(self.blocks), self.columns, column)
        if path is None:
            full = drop_path.full_path(len(self.blocks), self.columns)
            path = self.sample_path(x.shape[0]) if self.training else full
        if path.keep.shape[0] != len(self.blocks):
            raise ValueError(f"FractalNet: expected path.keep for {len(self.blocks)} blocks, got {path.keep.shape[0]}")
        keep = path.keep if path.keep.dim() == 3 else path.keep.to(x.device)
        for block, rows in zip(self.blocks, keep.unbind(), strict=True):
            x = block(x, rows, path.alone, dense)
        return self.head(x.mean((2, 3)))

    @torch.no_grad()
    def extract_column(self, c: int, fold: bool = False) -> nn.Sequential:
        """Column c as a plain network of ``torch.nn`` modules, with copies of its weights and statistics.

        Args:
            c: column.
            fold: fold the batch norms into the convolutions and leave out dropout: a network for evaluation.
        Example:
            >>> net = FractalNet(10, 2, (8,), image_size=8).eval()
            >>> x = torch.randn(2, 3, 8, 8)
            >>> torch.allclose(net.extract_column(1)(x), net(x, column=1), atol=1e-5)
            True
        """
        if not isinstance(c, int) or not 0 <= c < self.columns:
            raise ValueError(f"extract_column: expected c from 0 to {self.columns - 1}, got {c!r}")
        layers: list[nn.Module] = []
        for block in self.blocks:
            for j in range(2**c):
                layers += block.unit_layers(c, j, set=block.running_mean.shape[0] - 1)
            layers.append(nn.MaxPool2d(2))
        column = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(self.head))
        return export.fold(column) if fold else column.train(self.training)

    def anytime(self, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (column, depth, logits), shallow first: the caller stops when it has to answer.

        Columns of a network share no activations, so nothing is computed twice.
        """
        for column in range(self.columns):
            yield column, self.depth(column), self(x, column=column)


def _check(argument: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"FractalNet: expected {argument} {expected}, got {got!r}")
