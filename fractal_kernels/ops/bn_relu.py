"""``bn_relu``: batch norm and ReLU of one tensor, the join of one branch."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..library import Flags
from .join import normalised_join


def bn_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    group: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Batch norm, then ReLU, in one pass after the statistics.

    .. math:: out = \max(0,\; w\,(x - \mu)/\sqrt{\sigma^2 + \epsilon} + b)

    Args:
        x: [N, C, *], float32, float64, float16 or bfloat16, channels_last or contiguous (others are copied).
        weight, bias: [C] or None. running_mean, running_var: [C], updated in place when training, or both None.
        training, momentum, eps, group, backend: as in :func:`bn_relu_join`.
    Returns:
        The shape, dtype and layout of x. Deterministic; the backward saves x and two vectors, nothing normalised.
    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend that was named cannot run.
    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1; the contract of ``torch.nn.BatchNorm2d``.
    Example:
        >>> import torch
        >>> bool((bn_relu(torch.randn(4, 3, 8, 8), None, None, None, None, training=True) >= 0).all())
        True
    """
    y = checks.tensor("bn_relu", "x", x)
    if y.dim() < 2:
        raise ValueError(f"bn_relu: expected x of shape [N, C, *], got {list(y.shape)}")
    return normalised("bn_relu", y, weight, bias, running_mean, running_var, training, momentum, eps, group, backend)


def normalised(
    op: str,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    group: object,
    backend: str | None,
) -> Tensor:
    """:func:`bn_relu` of a public function ``op``, which has checked ``y``."""
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    w, b, rm, rv = (None if t is None else checks.channel_vector(op, name, t, y) for name, t in named.items())
    if (rm is None) != (rv is None):
        raise ValueError(f"{op}: expected running_mean and running_var both or neither, got one")
    eps = checks.eps(op, eps)
    return normalised_join(
        op, [y], [w], [b], [rm], [rv], None, training, momentum, eps, int(Flags.RELU_BRANCH), backend, group
    )
