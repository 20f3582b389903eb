"""``conv_bn_relu``: the column step, a convolution and the fused batch norm and ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, checks, cpu_conv
from ..library import _LIB, Flags, empty, to_layout
from . import exported
from .bn_relu import normalised
from .twice import Gradients, gradients, inputs_of, twice_differentiable

_OPS = torch.ops.fractal_kernels
_ONE, _NONE = [1, 1], [0, 0]
_LIB.define("conv3x3(Tensor x, Tensor weight, str backend) -> Tensor")
_LIB.define(
    "conv3x3_backward(Tensor grad, Tensor x, Tensor weight, bool needs_x, bool needs_weight, str backend)"
    " -> (Tensor, Tensor)"
)


@torch.library.impl(_LIB, "conv3x3", "CompositeExplicitAutograd")
def _conv3x3(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    if cpu_conv.fits(x, weight, backend):
        return cpu_conv.conv(x, weight)
    return to_layout(torch.conv2d(x, weight.to(x.dtype), padding=1), True)


@torch.library.impl(_LIB, "conv3x3_backward", "CompositeExplicitAutograd")
def _conv3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight in channels_last; of no element where one is not needed."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx: Tensor | None
    if cpu_conv.fits(x, weight, backend):
        dweight = empty(weight.shape, weight, True) if needs_weight else None
        dx = cpu_conv.conv_backward(grad, x, weight, needs_x, dweight)
    else:
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(x.dtype), None, _ONE, _ONE, _ONE, False, _NONE, 1, [needs_x, needs_weight, False]
        )
        dweight = dweight.to(weight.dtype) if needs_weight else None
    return tuple(x.new_empty(0) if d is None else to_layout(d, True) for d in (dx, dweight))  # type: ignore[return-value]


@torch.library.register_fake("fractal_kernels::conv3x3", lib=_LIB)
def _conv3x3_fake(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return empty((x.shape[0], weight.shape[0], *x.shape[2:]), x, True)


@torch.library.register_fake("fractal_kernels::conv3x3_backward", lib=_LIB)
def _conv3x3_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    needed = (x, needs_x), (weight, needs_weight)
    return tuple(empty(t.shape, t, True) if needs else x.new_empty(0) for t, needs in needed)  # type: ignore[return-value]


def _conv3x3_gradients(ctx: Any, grad: Tensor) -> Gradients:
    x, weight = inputs = inputs_of(ctx)
    return gradients(ctx, torch.conv2d(x, weight.to(x.dtype), padding=1), inputs, grad)  # type: ignore[arg-type,union-attr]


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(x, weight)
        return _OPS.conv3x3(x, weight, backend)  # type: ignore[no-any-return]

    @staticmethod
    @twice_differentiable(_conv3x3_gradients)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx, dweight = _OPS.conv3x3_backward(grad, x, weight, needs_x, needs_weight, ctx.backend)
        return dx if needs_x else None, dweight if needs_weight else None, None


def is_plain_3x3(size: object, stride: object, padding: object, dilation: object, groups: int, bias: object) -> bool:
    """Whether :func:`conv2d_3x3` is the convolution of these arguments."""
    return size == (3, 3) and stride == padding == dilation == (1, 1) and groups == 1 and bias is None


def conv2d_3x3(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """A 3x3 convolution with padding 1 on a backend: ours where it is there and faster, else PyTorch's.

    Under autocast ours reads a weight of float32 as it is.

    Not of one channel, which is in both layouts: PyTorch decides in which its output is. And it is PyTorch that reports
    operands that do not go together.
    """
    if x.device != weight.device:  # of a weight on "meta" PyTorch, too, would read whatever is there
        raise ValueError(f"conv_bn_relu: expected conv_weight on {x.device}, got {weight.device}")
    if exported.foreign_tool():
        return F.conv2d(x, weight, padding=1)
    valid = x.dim() == 4 and x.shape[1] == weight.shape[1] > 1
    if checks.is_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        valid = valid and torch.float64 not in (x.dtype, weight.dtype)  # which autocast leaves as they are
    else:
        dtype = x.dtype
        valid = valid and weight.dtype == dtype
    if not valid or 0 in x.shape[2:] or not cpu_conv.fits(x, weight, backend, dtype):
        return F.conv2d(x, weight, padding=1)
    weight = weight if weight.dtype == torch.float32 else weight.to(dtype)
    return _Conv3x3.apply(x.to(dtype), weight, backend)  # type: ignore[no-any-return, no-untyped-call]


def _conv2d(x: Tensor, weight: Tensor) -> Tensor:
    with checks.without_autocast(x):
        return torch.conv2d(x, weight)


def _pooled_conv1x1_gradients(ctx: Any, grad: Tensor) -> Gradients:
    x, weight = inputs = inputs_of(ctx)
    return gradients(ctx, F.max_pool2d(torch.conv2d(x, weight), 2), inputs, grad)  # type: ignore[arg-type]


class _PooledConv1x1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(x, weight)
        y = _conv2d(x, weight)
        return _OPS.join_forward([y], None, [], [], [], [], 0.0, Flags.POOL_BEFORE, backend)  # type: ignore[no-any-return]

    @staticmethod
    @twice_differentiable(_pooled_conv1x1_gradients)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        nothing: list[Tensor] = []
        operands = [_conv2d(x, weight)], None, nothing, nothing, nothing, nothing, nothing
        (dy,) = _OPS.join_backward_apply(grad, *operands, 1, 0.0, Flags.POOL_BEFORE, ctx.backend)
        needs = [*ctx.needs_input_grad[:2], False]
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, _ONE, _NONE, _ONE, False, _NONE, 1, needs
        )
        return dx, dweight, None


def conv2d_1x1_pooled(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """A 1x1 convolution and a 2x2 max-pool, between which nothing is kept: x is, which has fewer channels.

    x and weight of one dtype, H and W of 2 or more.
    """
    if exported.foreign_tool():
        return F.max_pool2d(_conv2d(x, weight), 2)
    return _PooledConv1x1.apply(x, weight, backend)  # type: ignore[no-any-return, no-untyped-call]


def conv_bn_relu(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    conv_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    group: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""The column step: 2-d convolution, batch norm, ReLU.

    .. math:: out = \mathrm{bn\_relu}(\mathrm{conv2d}(x, W) + c)

    Args:
        x: [N, C_in, H, W]. conv_weight: [C_out, C_in / groups, kH, kW]. conv_bias: [C_out] or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        weight, bias, running_mean, running_var, training, momentum, eps, group, backend: as in :func:`bn_relu`.
    Returns:
        [N, C_out, H', W']. Under autocast the convolution runs in the autocast dtype, the rest in float32 arithmetic.
        The backward saves x, the convolution's output and two vectors. The convolution is PyTorch's, except on the CPU
        for x and conv_weight in channels_last, where it is 3x3 of stride, padding, dilation and groups 1 without bias,
        C_out a multiple of 16 and C_in another or from 2 to 15; but not in float64, nor in float32 of one image of
        fewer than 64 pixels, nor in bfloat16 on a processor with AMX, unless images are at most 4 pixels wide. There it
        is this package's, as in :func:`fractal_block`: faster, errors within 4e-6 of the largest value for up to 256
        channels beside the rounding of the result, but NaN around an infinity in x.
    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend that was named cannot run.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 2: "conv" is convolution, batch norm, ReLU.
    Example:
        >>> import torch
        >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
        >>> conv_bn_relu(x, w, None, None, None, None, training=True).shape
        torch.Size([2, 5, 8, 8])
    """
    op = "conv_bn_relu"
    x = checks.tensor(op, "x", x)
    w = checks.tensor(op, "conv_weight", conv_weight)
    if x.dim() != 4:
        raise ValueError(f"{op}: expected x of shape [N, C, H, W], got {list(x.shape)}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: expected groups >= 1, got {groups!r}")
    if w.dim() != 4 or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups != 0 or 0 in w.shape:
        raise ValueError(
            f"{op}: expected conv_weight of shape [C_out, C_in / groups, kH, kW] with C_in={x.shape[1]} and C_out a "
            f"multiple of groups={groups}, got {list(w.shape)}"
        )
    if conv_bias is not None and checks.tensor(op, "conv_bias", conv_bias).shape != w.shape[:1]:
        raise ValueError(f"{op}: expected conv_bias of shape [C_out]=[{w.shape[0]}], got {list(conv_bias.shape)}")
    for name, t in (("conv_weight", w), ("conv_bias", conv_bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {t.device}")
        if t is not None and t.dtype != x.dtype and not checks.is_autocast(x):
            raise TypeError(f"{op}: expected {name} of x's dtype {x.dtype}, got {t.dtype}")
    stride, dilation = checks.pair(op, "stride", stride, 1), checks.pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        checks.choice(op, "padding", padding, ["same", "valid"] if stride == (1, 1) else ["valid"])
    else:
        padding = checks.pair(op, "padding", padding, 0)
    for d in (0, 1):
        reach = dilation[d] * (w.shape[2 + d] - 1) + 1
        padded = x.shape[2 + d] + (2 * padding[d] if isinstance(padding, tuple) else 0)
        if padding != "same" and padded < reach:
            raise ValueError(
                f"{op}: expected x of at least {reach} padded pixels for conv_weight {list(w.shape)}, got "
                f"{list(x.shape)} with padding {padding}"
            )
    if is_plain_3x3(tuple(w.shape[2:]), stride, padding, dilation, groups, conv_bias):
        y = conv2d_3x3(x, w, backends.resolve(op, backend, x.device, x.dtype))
    else:
        y = F.conv2d(x, w, conv_bias, stride, padding, dilation, groups)
    return normalised(op, y, weight, bias, running_mean, running_var, training, momentum, eps, group, backend)
