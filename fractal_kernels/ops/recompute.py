"""``recomputed``: a join's output that is computed again in backward, instead of being kept for who reads it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .join import again, is_join

__all__ = ["recomputed"]


class _Again:
    """Stands for a join's output among what operators save; holds the output from its first use to its last one."""

    def __init__(self, node: Any) -> None:
        self.node, self.uses, self.left = node, 0, 0
        self.value: Tensor | None = None

    def saved(self) -> _Again:
        self.uses += 1
        return self

    def used(self) -> Tensor:
        if self.value is None:
            self.value, self.left = again(self.node), self.uses
        value = self.value
        self.left -= 1
        if self.left == 0:
            self.value = None
        return value


@contextmanager
def recomputed(output: Tensor) -> Iterator[None]:
    r"""Operators inside the ``with`` block save for backward not ``output``, but what it is computed again from.

    A convolution keeps its input for the gradient of its weight. Where that is :math:`h = relu(bn(y))`, the join's own
    backward keeps y too; so h need not be kept, and costs one more pass over y in backward (not its statistics):

    .. math:: y' = W * relu(bn(y)): \quad \text{kept } y, \mu, \sigma^2 \text{ instead of } y, h, \mu, \sigma^2

    Args:
        output: what :func:`bn_relu`, :func:`bn_relu_join` or :func:`conv_bn_relu` returned (any layout, dtype, device).
            Of any other tensor, without gradients, in a checkpoint and under ``torch.compile``, which decides this by
            itself, the block does nothing.
    Raises:
        TypeError: ``output`` is not a Tensor. RuntimeError, in backward: y was changed in place since.
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
    checks.tensor("recomputed", "output", output)
    compiling = torch.compiler.is_compiling()
    # Whoever watches what is saved, to offload it say, goes on with all the rest. A checkpoint's tensors are there for
    # one use, and it keeps none anyway.
    outer = None if compiling else torch._C._autograd._top_saved_tensors_default_hooks(True)
    checkpoint = outer is not None and outer[0].__module__ == "torch.utils.checkpoint"
    if compiling or checkpoint or not is_join(output.grad_fn):
        yield
        return
    stands, there = _Again(output.grad_fn), weakref.ref(output)  # what is saved keeps these functions, too

    def pack(t: Tensor) -> Any:
        if t is there():
            return stands.saved()
        return outer[0](t) if outer else t

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Again):
            return packed.used()
        return outer[1](packed) if outer else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
