"""3x3 convolution, padding 1, in float32 on the CPU (csrc/cpu/conv.h): forward and both gradients.

By Winograd's minimal filtering: F(4x4, 3x3), 36 products where the definition has 144, or F(2x2, 3x3), 16 where it has
36, whichever is less work for the batch (so an image alone may have other last bits than in a batch); as defined where
there are few channels. Errors are within 4e-6 of the largest value for up to 256 channels (a weight's gradient: 2**16
pixels) and grow with the root of their number (tests/test_conv3x3.py); but Winograd's method makes NaN of all outputs
of the tiles that read infinity. Measured against PyTorch's: benchmarks/bench_conv.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .library import empty

_aten = torch.ops.aten
_OPS = torch.ops.fractal_kernels_cpu  # which the compiled extension registers

PIXELS_OF_ONE_IMAGE = 64  # measured: benchmarks/results/conv/few.json
_module = backends.extension()[0]
# At import: torch.compile cannot trace the module.
_HERE = _module is not None and _module.simd_in_use() != "baseline"


def computes(dtype: torch.dtype, channels: int, backend: str) -> bool:
    """Whether a convolution of this dtype to this many channels is here, if its operands are in channels_last."""
    return backend == "cpu" and dtype == torch.float32 and channels % 16 == 0 and _HERE


def fits(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether this case is here; an image has fewer than 16 channels or a multiple of them.

    Of few pixels, what takes the time is the weights, which for one image PyTorch reads as they are. Traced code
    asks again when it runs.
    """
    return (
        computes(x.dtype, weight.shape[0], backend)
        and (torch.compiler.is_compiling() or x.shape[0] > 1 or x.numel() >= PIXELS_OF_ONE_IMAGE * x.shape[1])
        and (x.shape[1] < 16 or x.shape[1] % 16 == 0)
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def conv(x: Tensor, weight: Tensor) -> Tensor:
    y = empty((x.shape[0], weight.shape[0], *x.shape[2:]), x, True)
    _OPS.conv3x3.default(y, x, weight, False)
    return y


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, dweight: Tensor | None) -> Tensor | None:
    """The gradient of x; the weight's is written into ``dweight``, if any: a tensor or slice in the weight's layout."""
    if dweight is not None:
        _OPS.conv3x3_weight.default(dweight, x, grad)
    if not needs_x:
        return None
    if x.shape[1] % 16:
        one, none = [1, 1], [0, 0]
        of_x: Tensor = _aten.convolution_backward(
            grad, x, weight, None, one, one, one, False, none, 1, [True, False, False]
        )[0]
        return of_x
    dx = empty(x.shape, x, True)
    _OPS.conv3x3.default(dx, grad, weight, True)
    return dx
