"""The definition of a join in float64, with autograd for its gradients. Nothing here uses the library.

x_i = (y_i - mean_i) / sqrt(var_i + eps)              mean, var: of the batch (biased) or the running ones
h_i = pool_before(relu_branch(w_i x_i + b_i))
out = pool_after(relu_output(sum_i m_i h_i / max(sum_i m_i, 1)))      or the plain sum
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Vectors = Sequence[Tensor | None] | None


def wide(t: Tensor) -> Tensor:
    return t.to(torch.float64)


def along_channels(v: Tensor, like: Tensor) -> Tensor:
    return wide(v).view(1, -1, *(1 for _ in like.shape[2:]))


def moments(y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and number of values of each channel."""
    values = y.transpose(0, 1).flatten(1)
    count = values.shape[1]
    if count == 0:
        return y.new_zeros(y.shape[1]), y.new_zeros(y.shape[1]), 0
    mean = values.mean(1)
    return mean, ((values - mean[:, None]) ** 2).mean(1), count


def join(
    inputs: Sequence[Tensor],
    weights: Vectors = None,
    biases: Vectors = None,
    running_means: Vectors = None,
    running_vars: Vectors = None,
    mask: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    normalised: Sequence[bool] | None = None,
    reduction: str = "mean",
    activation: str = "branch",
    pool: str | None = None,
    stats: str = "all",
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """The output and the new running statistics; branches that are not ``normalised`` are joined as they are."""
    k, n = len(inputs), inputs[0].shape[0]
    per_sample = mask is not None and mask.dim() == 2
    keep = (
        torch.ones(k, n, dtype=torch.bool, device=inputs[0].device)
        if mask is None
        else (mask != 0).view(k, -1).expand(k, n)
    )
    weights, biases = list(weights or [None] * k), list(biases or [None] * k)
    new_means, new_vars = list(running_means or [None] * k), list(running_vars or [None] * k)
    normalised = [True] * k if normalised is None else normalised

    total: Tensor | float = 0.0
    for i, given in enumerate(inputs):
        y, normalise = wide(given), normalised[i]
        from_batch = normalise and (training or new_means[i] is None)
        alive = keep[i].view(-1, *(1 for _ in y.shape[1:]))
        dropped_whole = mask is not None and not per_sample and not mask[i]
        whole = y
        if dropped_whole or not (from_batch and stats == "all"):
            y = torch.where(alive, y, 0.0)  # what is dropped has no say, NaN or not
        if normalise and not dropped_whole:
            if from_batch:
                mean, var, count = moments(whole if stats == "all" else whole[keep[i]])
            else:
                mean, var, count = wide(new_means[i]), wide(new_vars[i]), 0
            y = (y - along_channels(mean, y)) / torch.sqrt(along_channels(var, y) + eps)
            if training and new_means[i] is not None and count:
                unbiased = var.detach() * count / max(count - 1, 1)
                new_means[i] = (1 - momentum) * wide(new_means[i]) + momentum * mean.detach()
                new_vars[i] = (1 - momentum) * wide(new_vars[i]) + momentum * unbiased
        if normalise:
            y = y if weights[i] is None else y * along_channels(weights[i], y)
            y = y if biases[i] is None else y + along_channels(biases[i], y)
        y = F.relu(y) if activation == "branch" else y
        y = F.max_pool2d(y, 2) if pool == "before" else y
        total = total + torch.where(alive, y, 0.0)
    if reduction == "mean":
        total = total / keep.sum(0).clamp(min=1).view(-1, *(1 for _ in total.shape[1:]))
    total = F.relu(total) if activation == "output" else total
    return F.max_pool2d(total, 2) if pool == "after" else total, new_means, new_vars


def gradients(out: Tensor, grad: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, wanted, wide(grad), allow_unused=True, materialize_grads=True))
