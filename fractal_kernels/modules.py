"""The public functions as ``torch.nn`` modules, with the parameter names of the modules that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import backends, checks, sync
from .library import MAX_BRANCHES
from .ops.bn_relu import bn_relu
from .ops.conv import conv2d_3x3, is_plain_3x3
from .ops.drop_path import drop_path_mask
from .ops.exported import TRANSFORM, foreign_tool
from .ops.join import bn_relu_join, masked_mean_join
from .ops.recompute import recomputed


class MeanJoin(nn.Module):
    """:func:`masked_mean_join` as a module.

    Args:
        pool: as there.
    Example:
        >>> MeanJoin()([torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)]).mean().item()
        0.5
    """

    def __init__(self, pool: str | None = None) -> None:
        super().__init__()
        checks.join_options("MeanJoin", "mean", "none", pool, "all")
        self.pool = pool

    def forward(self, inputs: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        return masked_mean_join(inputs, mask, pool=self.pool)

    def extra_repr(self) -> str:
        return "" if self.pool is None else f"pool={self.pool!r}"


class DropPathJoin(nn.Module):
    """A mean join that drops branches while training (local drop-path); nothing is dropped in evaluation.

    Args:
        p: probability of dropping each branch; at least one survives.
        granularity: "batch" (one draw) or "sample" (one per sample).
        pool: as in :func:`masked_mean_join`.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 3.
    Example:
        >>> DropPathJoin(0.15)([torch.ones(1, 2, 3, 3)] * 3).mean().item()
        1.0
    """

    def __init__(self, p: float, granularity: str = "batch", pool: str | None = None) -> None:
        super().__init__()
        checks.join_options("DropPathJoin", "mean", "none", pool, "all")
        self.pool = pool
        checks.probability("DropPathJoin", "p", p)
        checks.choice("DropPathJoin", "granularity", granularity, ["batch", "sample"])
        self.p = p
        self.granularity = granularity

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        if not self.training or self.p == 0:
            return masked_mean_join(inputs, pool=self.pool)
        inputs = checks.branches("DropPathJoin", inputs)
        batch = inputs[0].shape[0] if self.granularity == "sample" else None
        mask = drop_path_mask(len(inputs), self.p, batch, device=inputs[0].device)
        return masked_mean_join(inputs, mask, pool=self.pool)

    def extra_repr(self) -> str:
        return f"p={self.p}, granularity={self.granularity!r}" + ("" if self.pool is None else f", pool={self.pool!r}")


def advance(bn: nn.BatchNorm2d, live: Tensor | int = 1) -> float | Tensor:
    """Counts a training batch (``live`` 0: not) and returns its weight in the running statistics, on the device."""
    if not (bn.training and bn.track_running_stats) or bn.num_batches_tracked is None:
        return bn.momentum if bn.momentum is not None else 0.0
    bn.num_batches_tracked.add_(live)
    return bn.momentum if bn.momentum is not None else 1.0 / bn.num_batches_tracked.clamp(min=1).double()


def _running(bn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics that a call uses, as PyTorch's does: what it has, unless it trains and tracks none."""
    if not isinstance(bn, _BatchNorm) or (bn.training and not bn.track_running_stats):
        return None, None
    return bn.running_mean, bn.running_var


class BatchNormReLU2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` followed by ReLU, fused; the same arguments, parameters and ``state_dict``.

    Example:
        >>> bool((BatchNormReLU2d(3)(torch.randn(2, 3, 4, 4)) >= 0).all())
        True
    """

    sync_group: object = None  # set by sync_batch_norm
    marks = False  # set by fuse: whether a FusedReLU is to know its outputs

    def forward(self, input: Tensor) -> Tensor:
        if self.marks and self.sync_group is None and (tool := foreign_tool()):
            out = super().forward(input)  # its ReLU follows, as the model was written
            if tool == TRANSFORM:  # which may end before the ReLU; as what a ReLU may change in place
                out = torch.where(out <= 0, 0, out)
            return out
        self._check_input_dim(input)
        out = bn_relu(
            input,
            self.weight,
            self.bias,
            *_running(self),
            self.training or self.running_mean is None,
            advance(self),
            self.eps,
            group=self.sync_group if self.training else None,
        )
        if self.marks and not torch.compiler.is_compiling():
            out.rectified = None if out.is_inference() else out._version  # type: ignore[attr-defined]
        return out


class StepConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` that runs as in :func:`conv_bn_relu`: of :class:`ConvBNReLU` and ``fuse``."""

    recompute = False  # whether an input that comes from a fused batch norm is computed again in backward

    def _get_name(self) -> str:
        return "Conv2d"

    @staticmethod
    def may_be_ours(conv: nn.Conv2d) -> bool:
        options = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias
        return is_plain_3x3(*options) and conv.padding_mode == "zeros"

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight  # once: it may be parametrised
        with recomputed(input) if self.recompute else nullcontext():
            if not self.may_be_ours(self) or input.dim() != 4:
                return self._conv_forward(input, weight, self.bias)  # type: ignore[no-any-return]
            return conv2d_3x3(input, weight, backends.resolve("conv_bn_relu", None, input.device, input.dtype))


class FusedReLU(nn.ReLU):
    """A ReLU behind batch norms that ``fuse`` has fused: their output passes through unchanged.

    To everything else it is a ReLU, and to whoever looks for one, as feature extractors do. A batch norm marks what it
    returns by its version, so that what is changed in place, and comes again, is another tensor. torch.compile refuses
    marks inside of checkpoints, so it has none: a ReLU of which ``fuse`` saw no other work, ``alone``, does nothing
    there, and others do their work twice. For tools that do not know our operators both are PyTorch's.
    """

    alone = False  # set by fuse

    def forward(self, input: Tensor) -> Tensor:
        if foreign_tool():
            return super().forward(input)
        if torch.compiler.is_compiling():
            return input if self.alone else super().forward(input)
        mark = getattr(input, "rectified", False)
        if mark is None:  # an inference tensor, which has no version
            del input.rectified  # type: ignore[attr-defined]
        elif type(mark) is not int or mark != input._version:  # of a trace's proxy it is a proxy
            return super().forward(input)
        return input


class ConvBNReLU(nn.Module):
    """:func:`conv_bn_relu` as a module, with the sub-modules ``conv`` and ``bn``, a :class:`BatchNormReLU2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: of ``torch.nn.Conv2d``.
        padding: of ``torch.nn.Conv2d``; None: half of what the kernel reaches over, dilation * (kernel_size - 1) // 2,
            which at stride 1 keeps the size of the image where the kernel's is odd.
        eps, momentum, affine, track_running_stats, device, dtype: of ``torch.nn.BatchNorm2d``.
        recompute: of a chain of these modules keep one tensor a step for backward instead of two: an input that a fused
            batch norm returned is computed again, as in :func:`recomputed`.
    Example:
        >>> ConvBNReLU(3, 8)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if padding is None:
            size = checks.pair("ConvBNReLU", "kernel_size", kernel_size, 1)
            step = checks.pair("ConvBNReLU", "dilation", dilation, 1)
            padding = (step[0] * (size[0] - 1) // 2, step[1] * (size[1] - 1) // 2)
        self.conv = StepConv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **made)
        self.recompute = self.conv.recompute = recompute
        self.bn = BatchNormReLU2d(out_channels, eps, momentum, affine, track_running_stats, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


class BNReLUJoin(nn.Module):
    """A batch norm per branch and :func:`bn_relu_join`; the batch norms are ``bns.0`` ... ``bns.{k-1}``, of which those
    of branches that are not ``normalised`` are ``torch.nn.Identity``.

    Args:
        num_branches: k. num_features: C.
        reduction, activation, pool, stats, normalised: as in :func:`bn_relu_join`.
        eps, momentum, affine, track_running_stats, device, dtype: of ``torch.nn.BatchNorm2d``.
    Example:
        >>> residual = BNReLUJoin(2, 3, reduction="sum", activation="output", normalised=[True, False])
        >>> residual([torch.randn(2, 3, 4, 4)] * 2).shape
        torch.Size([2, 3, 4, 4])
    """

    sync_group: object = None  # set by sync_batch_norm

    def __init__(
        self,
        num_branches: int,
        num_features: int,
        *,
        reduction: str = "mean",
        activation: str = "branch",
        pool: str | None = None,
        stats: str = "all",
        normalised: Sequence[bool] | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_branches, int) or not 1 <= num_branches <= MAX_BRANCHES:
            raise ValueError(f"BNReLUJoin: expected num_branches from 1 to {MAX_BRANCHES}, got {num_branches!r}")
        checks.join_options("BNReLUJoin", reduction, activation, pool, stats)
        plain = checks.plain("BNReLUJoin", normalised, num_branches)
        if len(plain) == num_branches:
            raise ValueError(f"BNReLUJoin: expected a branch that is normalised, got {list(normalised or ())}")
        self.bns = nn.ModuleList(
            nn.Identity()
            if i in plain
            else nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
            for i in range(num_branches)
        )
        self.reduction, self.activation, self.pool, self.stats = reduction, activation, pool, stats

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [bn for bn in self.bns if not isinstance(bn, nn.Identity)]  # type: ignore[misc]

    def _live(self, mask: Tensor | None) -> list[Tensor | None]:
        """Per branch, whether its statistics see this batch; None: they do."""
        if mask is None or (mask.dim() == 2 and self.stats == "all"):
            return [None] * len(self.bns)
        live = mask.reshape(len(self.bns), -1).any(1)
        tracks = any(bn.training and bn.track_running_stats for bn in self._norms())
        if mask.dim() == 2 and self.sync_group is not None and tracks:  # or has some on another rank
            group = sync.name_of("BNReLUJoin", self.sync_group)
            live = torch.ops.fractal_kernels.sync_sums(live.to(torch.float32), group) > 0
        return list(live.unbind())

    def forward(self, inputs: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        if mask is not None or not isinstance(inputs, (list, tuple)):
            mask = checks.mask("BNReLUJoin", mask, checks.branches("BNReLUJoin", inputs))
        if len(inputs) != len(self.bns):
            raise ValueError(f"BNReLUJoin: expected {len(self.bns)} inputs, got {len(inputs)}")
        norms = self._norms()
        if any(isinstance(bn, nn.SyncBatchNorm) for bn in norms):
            raise TypeError(
                "BNReLUJoin: expected bns of torch.nn.BatchNorm2d, got SyncBatchNorm; instead of converting them, "
                "fractal_kernels.sync_batch_norm(model) lets them run over all ranks"
            )
        first = norms[0]
        for name in ("training", "eps", "momentum"):  # a frozen batch norm is one in evaluation mode
            found = [getattr(bn, name) for bn in norms]
            if any(value != found[0] for value in found):
                raise ValueError(f"BNReLUJoin: expected one {name} of all batch norms, got {found}")
        live = [1 if per_sample is None else per_sample.to(torch.int64) for per_sample in self._live(mask)]
        normalised = [not isinstance(bn, nn.Identity) for bn in self.bns]
        momenta = [
            advance(bn, alive) if has else 0.0  # type: ignore[arg-type]
            for bn, alive, has in zip(self.bns, live, normalised, strict=True)
        ]
        momentum = momenta[normalised.index(True)]
        if isinstance(momentum, Tensor):
            momentum = torch.stack([m if isinstance(m, Tensor) else torch.zeros_like(momentum) for m in momenta])
        running = [_running(bn) for bn in self.bns]
        return bn_relu_join(
            inputs,
            [getattr(bn, "weight", None) for bn in self.bns],
            [getattr(bn, "bias", None) for bn in self.bns],
            [mean for mean, _ in running],
            [var for _, var in running],
            mask,
            first.training or first.running_mean is None,
            momentum,
            first.eps,
            reduction=self.reduction,
            activation=self.activation,
            pool=self.pool,
            stats=self.stats,
            normalised=normalised,
            group=self.sync_group if first.training else None,
        )


def sync_batch_norm(module: nn.Module, group: object = None) -> int:
    """Lets the batch norms of this package's modules run over all ranks of a process group in training.

    One collective forward and one backward per join (in a fractal block: per row), as ``torch.nn.SyncBatchNorm`` needs
    one per batch norm; one more forward where ``BNReLUJoin(stats="live")`` is given a mask per sample. Gradients of
    weights stay each rank's own, for data parallelism to average. Ranks that have an empty batch take part.

    Args:
        module: changed in place; modules of other packages in it stay as they are.
        group: a torch.distributed process group; None: the default one.
    Returns:
        How many modules were changed.
    Raises:
        ValueError: torch.distributed is not initialised. TypeError: ``module`` or ``group`` is not one.
    Source:
        Zhang et al. 2018 (arXiv:1803.08904), section 3.2; the merge of Chan et al. 1983.
    Example:
        >>> sync_batch_norm(ConvBNReLU(3, 8), group)  # doctest: +SKIP
        1
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"sync_batch_norm: expected module to be a torch.nn.Module, got {type(module).__name__}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("sync_batch_norm: expected torch.distributed to be initialised, it is not")
    group = dist.group.WORLD if group is None else group
    name = sync.Name(sync.name_of("sync_batch_norm", group))
    modules = [m for m in module.modules() if hasattr(m, "sync_group")]
    for each in modules:
        each.sync_group = name  # type: ignore[assignment]  # not the group: modules are copied and pickled
    return len(modules)
