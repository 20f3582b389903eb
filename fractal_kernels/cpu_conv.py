"""3x3 convolution, padding 1, on the CPU (csrc/cpu/conv.h): forward and both gradients. All arithmetic is in float32.

By Winograd's minimal filtering: F(4x4, 3x3), 36 products where the definition has 144, or F(2x2, 3x3), 16 where it has
36, whichever is less work for the batch (so an image alone may have other last bits than in a batch); as defined where
there are few channels. Errors are within 4e-6 of the largest value for up to 256 channels (a weight's gradient: 2**16
pixels) and grow with the root of their number (tests/test_conv3x3.py); but Winograd's method makes NaN of all outputs
of the tiles that read infinity. Measured against PyTorch's: benchmarks/bench_conv.py. What PyTorch has in bfloat16 is
faster where the processor multiplies matrices of it (Intel's AMX), but for narrow images, and slower elsewhere; what it
has in float16 is slower, its backward by far.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import backends
from .library import empty, to_layout

_aten = torch.ops.aten
_OPS = torch.ops.fractal_kernels_cpu  # which the compiled extension registers

PIXELS_OF_ONE_IMAGE = 64  # in float32; measured: benchmarks/results/conv/few.json, halves/few*.json
NARROW = 4  # pixels of a row, in bfloat16 where there is AMX; measured: benchmarks/results/halves/conv.json
_module = backends.extension()[0]
# At import: torch.compile cannot trace the module.
_HERE = _module is not None and _module.simd_in_use() != "baseline"


def _multiplies_matrices() -> bool:
    """Whether PyTorch's library has AMX, which its users can forbid it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = limit.upper() in ("ALL", "DEFAULT") or "AMX" in limit.upper()
    return allowed and torch.cpu._is_amx_tile_supported()


_MATRICES = _HERE and _multiplies_matrices()


def computes(x: Tensor, channels: int, backend: str, dtype: torch.dtype | None = None) -> bool:
    """Whether convolutions of images like x, in ``dtype`` or x's, to this many channels are here, if all is in
    channels_last."""
    dtype = dtype or x.dtype
    if backend != "cpu" or channels % 16 or not _HERE or dtype not in backends.HALF_AND_SINGLE:
        return False
    return not (_MATRICES and dtype == torch.bfloat16) or x.shape[3] <= NARROW


def fits(x: Tensor, weight: Tensor, backend: str, dtype: torch.dtype | None = None) -> bool:
    """Whether this case is here, of x in ``dtype`` or its own, and a weight in that or in float32; an image has fewer
    than 16 channels or a multiple of them.

    Of few pixels, what takes the time is the weights, which for one image in float32 PyTorch reads as they are. Traced
    code asks again when it runs.
    """
    return (
        computes(x, weight.shape[0], backend, dtype)
        and (
            torch.compiler.is_compiling()  # which would take a comparison of sizes for a reason to compile again
            or (dtype or x.dtype) != torch.float32
            or x.shape[0] > 1
            or x.numel() >= PIXELS_OF_ONE_IMAGE * x.shape[1]
        )
        and (x.shape[1] < 16 or x.shape[1] % 16 == 0)
        and x.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype."""
    y = empty((x.shape[0], weight.shape[0], *x.shape[2:]), x, True)
    _OPS.conv3x3.default(y, x, weight, False)
    return y


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, dweight: Tensor | None) -> Tensor | None:
    """The gradient of x; the weight's is written into ``dweight``, if any: a tensor or slice in the weight's layout."""
    if dweight is not None:
        _OPS.conv3x3_weight.default(dweight, x, grad)
    if not needs_x:
        return None
    if x.shape[1] % 16:  # in float32: of other dtypes the library's may take many times as long
        one, none = [1, 1], [0, 0]
        of_x: Tensor = _aten.convolution_backward(
            *(t.float() for t in (grad, x, weight)), None, one, one, one, False, none, 1, [True, False, False]
        )[0]
        return to_layout(of_x.to(x.dtype), True)
    dx = empty(x.shape, x, True)
    _OPS.conv3x3.default(dx, grad, weight, True)
    return dx
