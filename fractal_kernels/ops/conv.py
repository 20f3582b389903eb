"""``conv_bn_relu``: the column step, a convolution (the library's) and the fused batch norm and ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .bn_relu import bn_relu

__all__ = ["conv_bn_relu"]


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
        The backward saves x, the convolution's output and two vectors.
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
    if w.dim() != 4 or w.shape[1] * groups != x.shape[1] or w.shape[0] % groups != 0:
        raise ValueError(
            f"{op}: expected conv_weight of shape [C_out, C_in / groups, kH, kW] with C_in={x.shape[1]} and C_out a "
            f"multiple of groups={groups}, got {list(w.shape)}"
        )
    if conv_bias is not None and checks.tensor(op, "conv_bias", conv_bias).shape != w.shape[:1]:
        raise ValueError(f"{op}: expected conv_bias of shape [C_out]=[{w.shape[0]}], got {list(conv_bias.shape)}")
    for name, t in (("conv_weight", w), ("conv_bias", conv_bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {t.device}")
        if t is not None and t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{op}: expected {name} of x's dtype {x.dtype}, got {t.dtype}")
    stride, dilation = checks.pair(op, "stride", stride, 1), checks.pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        checks.choice(op, "padding", padding, ["same", "valid"] if stride == (1, 1) else ["valid"])
    else:
        padding = checks.pair(op, "padding", padding, 0)
        for d in (0, 1):
            reach = dilation[d] * (w.shape[2 + d] - 1) + 1
            if x.shape[2 + d] + 2 * padding[d] < reach:
                raise ValueError(
                    f"{op}: expected x of at least {reach} padded pixels for conv_weight {list(w.shape)}, got "
                    f"{list(x.shape)} with padding {padding}"
                )
    y = F.conv2d(x, w, conv_bias, stride, padding, dilation, groups)
    return bn_relu(y, weight, bias, running_mean, running_var, training, momentum, eps, group=group, backend=backend)
