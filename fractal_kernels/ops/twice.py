"""Second derivatives.

The backwards are kernels. Where a gradient is itself to be differentiated (``create_graph=True``), it is computed by
PyTorch's operators from the definition instead, at their speed and with their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from .. import checks

__all__ = ["gradients", "inputs_of", "twice_differentiable"]

Gradients = tuple[Tensor | None, ...]


def twice_differentiable(again: Callable[..., Gradients | None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a ``backward``: ``again``, of the same arguments, takes its place where the graph is to be differentiated.

    Where it returns None, differentiating is an error. PyTorch's own decorator lets only those second derivatives fail
    whose incoming gradient requires one. Where that is a constant (of a sum, say, or a frozen head) the gradient would
    pass for one, and the derivative of a gradient penalty would lack what it has by the saved tensors.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = function.once_differentiable(backward)

        @wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            if not torch.compiler.is_compiling():
                with checks.without_autocast(grads[0]):
                    found = again(ctx, *grads)
                if found is not None:
                    return found
                grads = tuple(g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in grads)
            return once(ctx, *grads)

        return wrapper

    return decorate


def inputs_of(ctx: Any) -> list[Tensor | None]:
    """The saved tensors as inputs of a computation that is differentiated by each, also where two are one tensor."""
    return [t.view_as(t) if t is not None and t.requires_grad else t for t in ctx.saved_tensors]


def gradients(ctx: Any, out: Tensor, inputs: Sequence[Tensor | None], grad: Tensor) -> Gradients:
    """The gradients of a definition's ``out`` by the ``inputs``, which are in the places of ``forward``'s arguments."""
    # Not what has been frozen since.
    wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad and ctx.needs_input_grad[i]]
    by = [inputs[i] for i in wanted]
    found = torch.autograd.grad(out, by, grad.to(out.dtype), create_graph=True, materialize_grads=True)  # type: ignore[arg-type]
    places: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, g in zip(wanted, found, strict=True):
        places[i] = g
    return tuple(places)
