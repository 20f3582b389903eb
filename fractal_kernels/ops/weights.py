"""``wide_weights``: the weights of a block as its convolutions take them, cast by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .exported import channels_last, foreign_tool
from .twice import is_batched


class _Cast(torch.autograd.Function):
    """Groups of weights as wide ones of another dtype; ``sizes``: of how many weights each."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: list[int], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.like = sizes, [(w.shape[0], w.dtype) for w in weights]
        ctx.set_materialize_grads(False)
        return _cast(dtype, sizes, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * (2 + len(ctx.like))
        places, parts, dtypes, at = [], [], [], 2
        for grad, size in zip(grads, ctx.sizes, strict=True):
            first = 0
            for rows, dtype in ctx.like[at - 2 : at - 2 + size]:
                if grad is not None and ctx.needs_input_grad[at]:
                    places.append(at)
                    parts.append(grad if size == 1 else grad.narrow(0, first, rows))
                    dtypes.append(dtype)
                at, first = at + 1, first + rows
        compiling = torch.compiler.is_compiling()  # of compiled autograd, which cannot follow the last question
        if compiling or torch.is_grad_enabled() or any(is_batched(part) for part in parts):
            cast = [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        else:
            cast = [torch.empty_like(part, dtype=dtype) for part, dtype in zip(parts, dtypes, strict=True)]
            if cast:
                torch._foreach_copy_(cast, parts)
        for i, t in zip(places, cast, strict=True):
            found[i] = t
        return tuple(found)


def _cast(dtype: torch.dtype, sizes: Sequence[int], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    wide: list[Tensor] = []
    targets: list[Tensor] = []
    for size in sizes:
        group = weights[len(targets) : len(targets) + size]
        rows = [w.shape[0] for w in group]
        shape, last = (sum(rows), *group[0].shape[1:]), torch.channels_last
        wide.append(torch.empty(shape, dtype=dtype, device=group[0].device, memory_format=last))
        # Not split: views of one call may not be written where gradients are recorded.
        targets += [wide[-1].narrow(0, sum(rows[:i]), n) for i, n in enumerate(rows)] if size > 1 else [wide[-1]]
    torch._foreach_copy_(targets, list(weights))
    return tuple(wide)


def wide_weights(groups: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Each group's convolution weights [O, I, kH, kW] side by side, [sum of O, I, kH, kW], in ``dtype`` and
    channels_last; one that is so already, and alone, is what it is.

    Casts, and those of the gradients, are one launch on a GPU for all weights that require gradients, and one for the
    others, if they are in channels_last: a block has dozens. So its gradients in ``dtype`` are all there before any is
    cast.
    """
    found: dict[int, Tensor] = {}
    if not torch.compiler.is_compiling() and not foreign_tool():
        for trained in (True, False):
            many = [
                i
                for i, group in enumerate(groups)
                if any(w.dtype != dtype for w in group)
                and all(type(w) in (Tensor, nn.Parameter) for w in group)
                and any(w.requires_grad for w in group) == trained
            ]
            if many:
                sizes, weights = [len(groups[i]) for i in many], [w for i in many for w in groups[i]]
                records = trained and torch.is_grad_enabled()
                cast = _Cast.apply(dtype, sizes, *weights) if records else _cast(dtype, sizes, weights)  # type: ignore[no-untyped-call]
                found |= dict(zip(many, cast, strict=True))
    for i, group in enumerate(groups):
        if i not in found:
            cast = [w if w.dtype == dtype else w.to(dtype) for w in group]
            found[i] = channels_last(cast[0] if len(cast) == 1 else torch.cat(cast))
    return [found[i] for i in range(len(groups))]
