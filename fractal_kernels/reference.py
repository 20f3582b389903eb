"""The definition of the four kernels in plain PyTorch, on any device, in float64 too.

z_i = w_i (y_i - mean_i) / sqrt(var_i + eps) + b_i;   out = pool(act_out(sum_i m_i pool(act_branch(z_i)) / n)),
n = max(sum_i m_i, 1) for the mean and 1 for the sum. Written for reading; `where` and not a product with the mask, so
that a NaN in a dropped branch stays there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import Flags, accumulate_dtype

List = list[Tensor]


def _per_channel(p: Tensor, like: Tensor) -> Tensor:
    return p.reshape((1, -1) + (1,) * (like.dim() - 2))


def _alive(mask: Tensor | None, i: int, like: Tensor) -> Tensor:
    """Whether branch i lives in each sample, shaped to broadcast over ``like``."""
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=like.device)
    return mask[i].reshape((-1,) + (1,) * (like.dim() - 1)) if mask.dim() == 2 else mask[i]


def _xhat(y: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (y.to(mean.dtype) - _per_channel(mean, y)) * _per_channel((var + eps).rsqrt(), y)


def _normalised(
    ys: List, means: Sequence[Tensor], vars: Sequence[Tensor], weights: List, biases: List, eps: float
) -> List:
    if not means:
        return [y.to(accumulate_dtype(y.dtype)) for y in ys]
    zs = [_xhat(y, mean, var, eps) for y, mean, var in zip(ys, means, vars, strict=True)]
    if weights:
        zs = [_per_channel(w, z) * z for w, z in zip(weights, zs, strict=True)]
    if biases:
        zs = [z + _per_channel(b, z) for b, z in zip(biases, zs, strict=True)]
    return zs


def _count(mask: Tensor | None, k: int, flags: int, like: Tensor) -> Tensor:
    if flags & Flags.SUM:
        return like.new_ones(())
    return sum((_alive(mask, i, like).to(like.dtype) for i in range(k)), start=like.new_zeros(())).clamp(min=1)


def _joined(zs: List, mask: Tensor | None, flags: int) -> Tensor:
    """The join before the activation and the pooling of its output."""
    hs = [F.relu(z) for z in zs] if flags & Flags.RELU_BRANCH else zs
    hs = [F.max_pool2d(h, 2) for h in hs] if flags & Flags.POOL_BEFORE else hs
    kept = [torch.where(_alive(mask, i, h), h, 0) for i, h in enumerate(hs)]
    return torch.stack(kept).sum(0) / _count(mask, len(zs), flags, hs[0])


def _unpool(value: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a 2x2 max-pool of ``value``: all of it to the largest element of each window."""
    where = F.max_pool2d(value, 2, return_indices=True)[1].flatten(2)
    flat = grad.reshape(where.shape)  # flatten() takes no batch of gradients
    return torch.zeros_like(value).flatten(2).scatter(2, where, flat).view_as(value)


def input_gradients(grad: Tensor, zs: List, mask: Tensor | None, flags: int) -> List:
    """The gradient at every z_i."""
    g = grad.to(zs[0].dtype)
    out = _joined(zs, mask, flags)
    if flags & Flags.POOL_AFTER:
        g = _unpool(F.relu(out) if flags & Flags.RELU_OUTPUT else out, g)
    if flags & Flags.RELU_OUTPUT:
        g = torch.where(out <= 0, 0, g)
    g = g / _count(mask, len(zs), flags, g)
    dzs = []
    for i, z in enumerate(zs):
        dz = torch.where(_alive(mask, i, g), g, 0)
        if flags & Flags.POOL_BEFORE:
            dz = _unpool(F.relu(z) if flags & Flags.RELU_BRANCH else z, dz)
        if flags & Flags.RELU_BRANCH:
            dz = torch.where(z <= 0, 0, dz)
        dzs.append(torch.where(_alive(mask, i, dz), dz, 0))
    return dzs


def statistics(y: Tensor, mask: Tensor | None, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the values of branch i."""
    axes = [d for d in range(y.dim()) if d != 1]
    alive = _alive(mask, i, y).expand(y.shape[0], *(1,) * (y.dim() - 1))
    count = alive.sum() * y[:1, :1].numel()
    number = count.clamp(min=1)
    mean = torch.where(alive, y.to(accumulate_dtype(y.dtype)), 0).sum(axes) / number
    away = torch.where(alive, y - _per_channel(mean, y), 0)
    shift = away.sum(axes) / number  # what rounding left of the mean in a long sum
    return mean + shift, away.square().sum(axes) / number - shift.square(), count


def unchanged(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and variance by which a branch is normalised to itself: that of ``var + eps`` is 1."""
    mean = y.new_zeros(y.shape[1], dtype=accumulate_dtype(y.dtype))
    return mean, torch.full_like(mean, 1 - eps)


def channel_stats(
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    ys: List,
    mask: Tensor | None,
    running: List,
    momentum: float,
    momenta: Tensor | None,
    channels_last: bool,
) -> None:
    for i, y in enumerate(ys):
        mean[i], var[i], count[i] = statistics(y, mask, i)
    if running:
        update_running(running, mean, var, count, momentum if momenta is None else momenta)


def updates(
    running: List, mean: Tensor, var: Tensor, count: Tensor, momentum: float | Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of k running means and k running (unbiased) variances: each, the new value, and its share, 0 of no values."""
    unbiased = var * (count / (count - 1).clamp(min=1)).unsqueeze(1)
    factors = ((count > 0).to(count.dtype) * momentum).unbind()
    batch = zip((*mean.unbind(), *unbiased.unbind()), (*factors, *factors), running, strict=True)
    return [(old, new.to(old.dtype), share.to(old.dtype)) for new, share, old in batch]


def update_running(running: List, mean: Tensor, var: Tensor, count: Tensor, momentum: float | Tensor) -> None:
    """The running statistics move, in place."""
    moves = updates(running, mean, var, count, momentum)
    torch._foreach_lerp_(running, [new for _, new, _ in moves], [share for _, _, share in moves])


def join(
    ys: List,
    mask: Tensor | None,
    means: Sequence[Tensor],
    vars: Sequence[Tensor],
    weights: List,
    biases: List,
    eps: float,
    flags: int,
) -> Tensor:
    j = _joined(_normalised(ys, means, vars, weights, biases, eps), mask, flags)
    j = F.relu(j) if flags & Flags.RELU_OUTPUT else j
    return F.max_pool2d(j, 2) if flags & Flags.POOL_AFTER else j


def normalised_join(
    ys: List,
    mask: Tensor | None,
    means: Sequence[Tensor] | None,
    vars: Sequence[Tensor] | None,
    weights: List,
    biases: List,
    eps: float,
    flags: int,
    plain: Sequence[int] = (),
) -> Tensor:
    """A join to be differentiated, by the batch's own statistics where none are given, of branches that are not
    ``plain``. A value that is dropped has no part in any gradient, be it NaN."""
    if means is None or vars is None:
        of_all = mask is not None and mask.dim() == 2 and not flags & Flags.STATS_LIVE
        found = [
            (*unchanged(y, eps), y.new_ones(())) if i in plain else statistics(y, None if of_all else mask, i)
            for i, y in enumerate(ys)
        ]
        means = [mean for mean, _, _ in found]
        vars = [torch.where(count > 0, var, 1) for _, var, count in found]  # of no values: eps may be 0
    return join([where_alive(mask, i, y) for i, y in enumerate(ys)], mask, means, vars, weights, biases, eps, flags)


def join_forward(
    out: Tensor,
    ys: List,
    mask: Tensor | None,
    means: List,
    vars: List,
    weights: List,
    biases: List,
    eps: float,
    flags: int,
    channels_last: bool,
) -> None:
    out.copy_(join(ys, mask, means, vars, weights, biases, eps, flags))


def join_backward_reduce(
    sum_dz: Tensor,
    sum_dzx: Tensor,
    grad: Tensor,
    ys: List,
    mask: Tensor | None,
    means: List,
    vars: List,
    weights: List,
    biases: List,
    eps: float,
    flags: int,
    channels_last: bool,
) -> None:
    dzs = input_gradients(grad, _normalised(ys, means, vars, weights, biases, eps), mask, flags)
    for i, (dz, y) in enumerate(zip(dzs, ys, strict=True)):
        axes = [d for d in range(dz.dim()) if d != 1]
        sum_dz[i] = dz.sum(axes)
        x = torch.where(_alive(mask, i, y), _xhat(y, means[i], vars[i], eps), 0)
        sum_dzx[i] = (dz * x).sum(axes)


def join_backward_apply(
    dys: List,
    grad: Tensor,
    ys: List,
    mask: Tensor | None,
    means: List,
    vars: List,
    weights: List,
    biases: List,
    sums: List,
    eps: float,
    flags: int,
    channels_last: bool,
) -> None:
    if ys:
        dzs = input_gradients(grad, _normalised(ys, means, vars, weights, biases, eps), mask, flags)
    else:  # a plain mean: the gradient does not depend on the inputs' values
        dzs = input_gradients(
            grad, [torch.zeros_like(grad, dtype=accumulate_dtype(grad.dtype))] * len(dys), mask, flags
        )
    for i, (dy, dz) in enumerate(zip(dys, dzs, strict=True)):
        if not means:
            dy.copy_(dz)
            continue
        scale = (vars[i] + eps).rsqrt() * (weights[i] if weights else 1)
        if sums:
            mean_dz, mean_dzx = (s[i] / sums[2][i].clamp(min=1) for s in sums[:2])
            moved = _per_channel(mean_dz, dz) + _xhat(ys[i], means[i], vars[i], eps) * _per_channel(mean_dzx, dz)
            dz = dz - torch.where(sums[2][i] > 0, moved, 0)  # of a branch that is not normalised nothing is counted
        # A dropped sample gets no gradient, unless the statistics ran over it too.
        elsewhere = bool(sums) and mask is not None and mask.dim() == 2 and not flags & Flags.STATS_LIVE
        dy.copy_(dz * _per_channel(scale, dz) if elsewhere else where_alive(mask, i, dz * _per_channel(scale, dz)))


def where_alive(mask: Tensor | None, i: int, value: Tensor) -> Tensor:
    return torch.where(_alive(mask, i, value), value, 0)
