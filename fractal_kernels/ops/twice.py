"""Second derivatives, and many first ones at once.

The backwards are kernels. Where a gradient is itself to be differentiated (``create_graph=True``), or many are computed
as one (``is_grads_batched=True``), it is done by PyTorch's operators from the definition instead, at their speed and
with their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from .. import checks

Gradients = tuple[Tensor | None, ...]


def twice_differentiable(again: Callable[..., Gradients | None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a ``backward``: ``again``, of the same arguments, takes its place where the graph is to be differentiated, and
    where many gradients come at once.

    Where it returns None, differentiating is an error. PyTorch's own decorator lets only those second derivatives fail
    whose incoming gradient requires one. Where that is a constant (of a sum, say, or a frozen head) the gradient would
    pass for one, and the derivative of a gradient penalty would lack what it has by the saved tensors.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = function.once_differentiable(backward)

        @wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> Any:
            if torch.compiler.is_compiling():
                return once(ctx, *grads)
            if grads[0] is None or not (torch.is_grad_enabled() or is_batched(grads[0])):
                return backward(ctx, *grads)
            with torch.enable_grad(), checks.without_autocast(grads[0]):
                found = again(ctx, *grads)
            if found is None:
                if is_batched(grads[0]):
                    raise RuntimeError(
                        "expected one gradient at a time of dropout inside a fused block and of synchronised batch "
                        "norm, got many at once (is_grads_batched, vmap)"
                    )
                grads = tuple(g.detach().requires_grad_() if isinstance(g, Tensor) else g for g in grads)
                return once(ctx, *grads)
            if torch.is_grad_enabled():
                return found
            return tuple(None if g is None else g.clone() for g in found)  # without a graph; detach() takes no batch

        return wrapper

    return decorate


def is_batched(grad: Any) -> bool:
    """Whether it is many gradients as one (``is_grads_batched=True``, vmap), which our operators do not take."""
    functorch = torch._C._functorch
    return isinstance(grad, Tensor) and (functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad))


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
