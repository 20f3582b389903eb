"""3x3 convolution, padding 1, of 2x2 images as matrix products on views.

At 2x2, 20 of a 3x3 convolution's 36 products are with padding, and the library's kernels spend most of their time
bringing the weights into another layout. In channels_last, a row of the image is 2*C_in contiguous values and meets two
contiguous taps of the weight, so everything is a product of slices and nothing is copied or multiplied by zero.
Measured against the library's convolution: benchmarks/bench_conv.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .library import empty


def fits(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether this case is here: 2x2 images and enough channels for matrix products, the CPU backend, float32."""
    return (
        backend == "cpu"
        and weight.shape[1] >= 512  # measured
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
        and x.shape[2:] == (2, 2)  # last: torch.export must not see other cases depend on it
    )


def _flat(t: Tensor) -> Tensor:
    """[N, C, H, W] in channels_last as [N, H*W*C]."""
    return t.permute(0, 2, 3, 1).flatten(1)


def _products(channels: int) -> Iterator[tuple[int, int, slice, slice]]:
    """(output pixel, input row, the row's slice of x, the taps' slice of the weight)."""
    for h in range(2):
        for w in range(2):
            for row in range(2):
                tap = (row - h + 1) * 3 + 1 - w
                taps = slice(tap * channels, (tap + 2) * channels)
                yield 2 * h + w, row, slice(2 * row * channels, 2 * (row + 1) * channels), taps


def conv(x: Tensor, weight: Tensor) -> Tensor:
    n, o, i = x.shape[0], weight.shape[0], x.shape[1]
    a, b = _flat(x), _flat(weight)
    y = empty((n, o, 2, 2), x, True)
    out = _flat(y)
    for pixel, row, columns, taps in _products(i):
        target = out[:, pixel * o : (pixel + 1) * o]
        torch.addmm(target, a[:, columns], b[:, taps].t(), beta=row, out=target)
    return y


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, dweight: Tensor | None) -> Tensor | None:
    """The gradient of x; the weight's is written into ``dweight``, if any: a tensor or slice in the weight's layout."""
    if dweight is not None:
        _gradient_of_weight(grad, x, dweight)
    if not needs_x:
        return None
    o, i = weight.shape[:2]
    g, b = _flat(grad), _flat(weight)
    dx = empty(x.shape, x, True).zero_()
    out = _flat(dx)
    for pixel, _, columns, taps in _products(i):
        out[:, columns].addmm_(g[:, pixel * o : (pixel + 1) * o], b[:, taps])
    return dx


def _gradient_of_weight(grad: Tensor, x: Tensor, dweight: Tensor) -> None:
    o, i = dweight.shape[:2]
    images, grads, taps_out = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1), dweight.permute(0, 2, 3, 1)
    for ky in range(3):
        for kx in range(3):
            # Output pixels that see this tap inside the image, and the input pixels under it.
            rows, columns = slice(max(1 - ky, 0), min(3 - ky, 2)), slice(max(1 - kx, 0), min(3 - kx, 2))
            seen = slice(rows.start + ky - 1, rows.stop + ky - 1), slice(columns.start + kx - 1, columns.stop + kx - 1)
            pixels = grads[:, rows, columns].reshape(-1, o), images[:, seen[0], seen[1]].reshape(-1, i)
            torch.mm(pixels[0].t(), pixels[1], out=taps_out[:, ky, kx])
