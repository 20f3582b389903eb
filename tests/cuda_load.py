"""Run by a Python whose PyTorch is a CUDA build, with or without a GPU: the compiled kernels load and are registered.

python tests/cuda_load.py     with fractal_kernels installed, or on PYTHONPATH
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fractal_kernels as fk
from fractal_kernels import backends

KERNELS = ("channel_stats", "join_forward", "join_backward_reduce", "join_backward_apply")


def check(t: torch.Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    assert t.device.type == "cuda" and t.shape == shape and t.is_contiguous(memory_format=layout), (t.shape, t.stride())


def main() -> int:
    if not torch.version.cuda:
        sys.exit(f"expected a CUDA build of PyTorch, got {torch.__version__}")
    module, reason = backends.extension("cuda")
    if module is None:
        sys.exit(f"the CUDA extension is not there: {reason}")
    # What a launch asks for first, and no machine without a GPU would miss.
    stream = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    assert stream.aoti_torch_get_current_cuda_stream
    print(f"{module.__file__}: {os.path.getsize(module.__file__) / 1e6:.1f} MB; {module.problem(0) or 'it runs here'}")
    info = module.build_info()
    print(f"torch {torch.__version__}, extension {info}")
    for kernel in KERNELS:
        name = f"fractal_kernels_cuda::{kernel}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
        schemas = [
            str(getattr(getattr(torch.ops, f"fractal_kernels_{b}"), kernel).default._schema) for b in ("cpu", "cuda")
        ]
        assert schemas[0].replace("_cpu::", "_cuda::") == schemas[1], schemas
    with FakeTensorMode():
        for layout in (torch.channels_last, torch.contiguous_format):
            for pool in (None, "before", "after"):
                flags = {None: 2, "before": 2 | 8, "after": 2 | 16}[pool]
                ys = [torch.empty(4, 16, 8, 8, device="cuda").to(memory_format=layout) for _ in range(3)]
                weights, biases, means, vars = ([torch.ones(16, device="cuda") for _ in range(3)] for _ in range(4))
                mask = torch.ones(3, 4, dtype=torch.bool, device="cuda")
                norm = (means, vars, weights, biases)
                out = fk.bn_relu_join(ys, weights, biases, means, vars, mask, True, pool=pool, backend="cuda")
                check(out, (4, 16, *((4, 4) if pool else (8, 8))), layout)
                # Not through autograd, whose engine asks for the device.
                ops = torch.ops.fractal_kernels
                mean, var, count = ops.channel_stats(ys, mask, [*means, *vars], 0.1, None, "cuda")
                assert mean.shape == var.shape == (3, 16) and count.shape == (3,)
                check(ops.join_forward(ys, mask, *norm, 1e-5, flags, "cuda"), out.shape, layout)
                sums = ops.join_backward_reduce(out, ys, mask, *norm, 1e-5, flags, "cuda")
                assert [s.shape for s in sums] == [(3, 16)] * 2
                plain = ops.join_forward(ys, mask, [], [], [], [], 0.0, 0, "cuda")
                check(plain, ys[0].shape, layout)
                for dy in ops.join_backward_apply(plain, [], mask, [], [], [], [], [], 3, 0.0, 0, "cuda"):
                    check(dy, ys[0].shape, layout)
                for dy in ops.join_backward_apply(out, ys, mask, *norm, [*sums, count], 3, 1e-5, flags, "cuda"):
                    check(dy, ys[0].shape, layout)
    print("every kernel is registered for CUDA; fake tensors pass through all of them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
