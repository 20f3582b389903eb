"""Early exit: the shallowest column that is sure of a sample answers for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import drop_path
from .layers import check, is_number

if TYPE_CHECKING:
    from .model import FractalNet


class EarlyExit(NamedTuple):
    """``logits`` [N, classes], and ``column`` [N] (int64): which column answered."""

    logits: Tensor
    column: Tensor


@torch.no_grad()
def early_exit(model: FractalNet, x: Tensor, confidence: float = 0.9) -> EarlyExit:
    r"""Answers every sample by its first sure column.

    .. math:: c(x) = \min \{c : \max_k \mathrm{softmax}(f_c(x))_k \ge p\} \cup \{C-1\}

    The shallowest column runs on all samples; those of which it is sure leave the batch, the others go on to the next
    column. Columns share no activations (but for the stem, which runs once), so nothing is computed twice. How many
    samples are left is read from the device once per column. No gradients.

    Args:
        model: a network in evaluation mode.
        x: images [N, C, H, W]; N may be 0.
        confidence: p, from 0 (the shallowest column answers) to 1.
    Returns:
        :class:`EarlyExit`.
    Raises:
        ValueError: the model is in training mode, or the confidence is not in [0, 1].
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 4.3 (anytime answers); the threshold on the softmax is the
        customary rule of early-exit networks.
    Example:
        >>> from fractalnet import FractalNet
        >>> net = FractalNet(10, 3, (8,), image_size=8).eval()
        >>> logits, column = net.early_exit(torch.randn(4, 3, 8, 8), confidence=0.0)
        >>> logits.shape, column
        (torch.Size([4, 10]), tensor([0, 0, 0, 0]))
    """
    if model.training:
        raise ValueError("early_exit: expected a model in evaluation mode, got one in training mode; call model.eval()")
    check("early_exit", "confidence", is_number(confidence) and 0 <= confidence <= 1, "in [0, 1]", confidence)
    z = model.stem(x)
    answered = torch.empty(len(x), dtype=torch.int64, device=x.device)
    left = torch.arange(len(x), device=x.device)
    for column in range(model.columns):
        path = drop_path.column_path(len(model.blocks), model.columns, column)
        out = model._logits(z, path)
        if column == 0:
            logits = torch.empty_like(out)
        wide = torch.promote_types(out.dtype, torch.float32)  # a rounded probability may look surer than it is
        sure = out.softmax(1, dtype=wide).amax(1) >= confidence
        if column == model.columns - 1:
            sure.fill_(True)
        order, many = sure.to(torch.uint8).argsort(descending=True, stable=True), int(sure.sum())
        answers, others = order[:many], order[many:]  # not by a bool as an index, whose values each would be read for
        logits[left[answers]], answered[left[answers]] = out[answers], column
        left, z = left[others], z[others]
        if not len(left):
            break
    return EarlyExit(logits, answered)
