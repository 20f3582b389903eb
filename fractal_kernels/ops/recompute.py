"""``recomputed``: a join's output that is computed again in backward, instead of being kept for who reads it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .join import again, can_come_again, in_checkpoint


class _Again:
    """Stands for a join's output among what operators save; holds the output from its first use to its last one."""

    def __init__(self, node: Any) -> None:
        self.node, self.uses, self.left = node, 0, 0
        self.value: Tensor | None = None

    def saved(self) -> _Again:
        self.uses += 1
        return self

    def used(self) -> Tensor:
        value = self.value
        if value is None:
            value, self.left = again(self.node), self.uses
        self.left -= 1
        self.value = value if self.left > 0 else None
        return value


@contextmanager
def recomputed(output: Tensor) -> Iterator[None]:
    r"""Operators inside the ``with`` block do not save ``output`` for backward: it is computed again from what its join
    has saved.

    A convolution keeps its input for the gradient of its weight. Where that is :math:`h = relu(bn(y))`, the join's own
    backward keeps y too; so h need not be kept, and costs one more pass over y in backward (not its statistics):

    .. math:: y' = W * relu(bn(y)): \quad \text{kept } y, \mu, \sigma^2 \text{ instead of } y, h, \mu, \sigma^2

    Args:
        output: what :func:`bn_relu`, :func:`bn_relu_join` or :func:`conv_bn_relu` returned (any layout, dtype, device).
            The block does nothing for any other tensor, one that was changed in place, without gradients, in or from a
            checkpoint, and under ``torch.compile``, which decides this by itself. Not for compiled autograd. All
            backwards of the operators inside must run before the join's, or keep the graph.
    Raises:
        TypeError: ``output`` is not a Tensor. RuntimeError, in backward: y, or what else was saved, was changed in
            place since.
    Source:
        Pleiss et al. 2017 (arXiv:1707.06990), for DenseNet; Rota Bulo et al. 2018 (arXiv:1712.02616), by inversion.
    Example:
        >>> from fractal_kernels import conv_bn_relu
        >>> x, w = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3, requires_grad=True)
        >>> h = conv_bn_relu(x, w, None, None, None, None, training=True)
        >>> with recomputed(h):
        ...     out = conv_bn_relu(h, w, None, None, None, None, training=True)
        >>> out.sum().backward()
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"recomputed: expected output to be a Tensor, got {type(output).__name__}")
    if torch.compiler.is_compiling() or not _is_possible(output):
        yield
        return
    stands, there = _Again(output.grad_fn), weakref.ref(output)  # what is saved keeps these functions, too
    # Whoever watches what is saved, to offload it say, goes on with all the rest.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(t: Tensor) -> Any:
        if t is there() and can_come_again(t):
            return stands.saved()
        # Autograd neither compares versions of what hooks packed, nor keeps an operator's own output from holding it.
        return outer[0](t) if outer else (t.detach(), t._version)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Again):
            return packed.used()
        if outer:
            return outer[1](packed)
        t, version = packed
        if t._version != version:
            raise RuntimeError(
                "recomputed: one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a {t.dtype} of shape {list(t.shape)} is at version {t._version}, expected {version}"
            )
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _is_possible(output: Tensor) -> bool:
    # A checkpoint keeps none of it anyway, and has its tensors for one use; transforms may forbid hooks.
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    return can_come_again(output) and not in_checkpoint() and bool(enabled())
