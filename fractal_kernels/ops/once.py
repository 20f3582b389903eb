"""Backwards that are kernels: whoever differentiates them is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

__all__ = ["once_differentiable"]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's, which lets only those second derivatives fail whose incoming gradient requires one.

    Where that is a constant (of a sum, say, or a frozen head) the gradient would pass for one: without an error, the
    derivative of a gradient penalty would lack what it has by the saved tensors.
    """
    refusing = function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = tuple(g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in grads)
        return refusing(ctx, *grads)

    return wrapper
