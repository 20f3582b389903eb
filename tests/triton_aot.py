"""Compiles Triton kernels for a GPU that is not there, through the launchers, and reads the machine code."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import fractal_kernels.triton as launchers
from fractal_kernels.library import POOL, Flags

KERNELS = (
    "channel_stats", "merge_stats", "join_forward", "join_backward_reduce", "merge_sums", "join_backward_apply",
)  # fmt: skip
PROCESSORS = 132
SHAPE = (32, 64, 32, 32)
BIN = Path(triton.backends.nvidia.__file__).parent / "bin"


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Code:
    """What the compiler made of one kernel."""

    name: str
    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of local memory
    loads: dict[str, int]  # of global memory, by instruction
    stores: dict[str, int]
    double: int  # float64 instructions

    @classmethod
    def of(cls, name: str, cubin: bytes) -> Code:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = _run("cuobjdump", "-res-usage", file.name)
            text = _run("nvdisasm", "-c", "-ndf", file.name)  # the code alone, without an analysis of its data flow
        numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
        return cls(
            name,
            int(numbers["REG"]),
            int(numbers["STACK"]),
            len(re.findall(r"\b(?:STL|LDL)\b", text)),
            dict(Counter(re.findall(r"\bLDG\.E[.\w]*", text))),
            dict(Counter(re.findall(r"\bSTG\.E[.\w]*", text))),
            len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP|MNMX)\b|\.F64\b", text)),
        )


class _Compile:
    """Stands in for a kernel: a launch compiles it as the launch would, and notes the code."""

    def __init__(self, kernel: Any, target: GPUTarget, into: list[Code]) -> None:
        self.kernel, self.target, self.into = kernel, target, into

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            backend = make_backend(self.target)
            assert options["enable_fp_fusion"]  # else it would be as the version of Triton has it
            options.setdefault("debug", False)
            bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
            bound, specialization, rest = bind(*args, **options)
            settled, signature, constants, attributes = self.kernel._pack_args(
                backend, options, bound, specialization, rest
            )
            source = ASTSource(self.kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=self.target, options=settled.__dict__)
            self.into.append(Code.of(self.kernel.__name__, compiled.asm["cubin"]))

        return launch


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[Code]]:
    """Launches inside the block compile for sm_<capability> and run nothing."""
    codes: list[Code] = []
    real, processors, on = launchers.kernels, launchers._processors, launchers._on
    target = GPUTarget("cuda", capability, 32)

    class Kernels:
        pass

    for name in KERNELS:
        setattr(Kernels, name, _Compile(getattr(real, name), target, codes))
    launchers.kernels = Kernels  # type: ignore[assignment]
    launchers._processors = lambda device: PROCESSORS
    launchers._on = lambda device: contextlib.nullcontext()
    try:
        yield codes
    finally:
        launchers.kernels, launchers._processors, launchers._on = real, processors, on


def call_all(
    dtype: torch.dtype,
    k: int,
    flags: Flags,
    channels_last: bool,
    masked: bool,
) -> None:
    """The launches of a forward and a backward in training."""

    def tensor(size: tuple[int, ...]) -> Tensor:
        t = torch.empty(size, dtype=dtype)
        return t.to(memory_format=torch.channels_last) if channels_last else t

    n, c, h, w = SHAPE
    ys, dys = ([tensor(SHAPE) for _ in range(k)] for _ in range(2))
    out = tensor((n, c, h // 2, w // 2) if flags & POOL else SHAPE)
    vectors = [torch.empty(c) for _ in range(k)]
    norm = (vectors, vectors, vectors, vectors)
    mask = torch.ones(k, n, dtype=torch.bool) if masked else None
    rows, count = torch.empty(k, c), torch.empty(k)
    momenta = torch.empty(k) if masked else None
    launchers.channel_stats(rows, rows, count, ys, mask, [*vectors, *vectors], 0.1, momenta, channels_last)
    launchers.join_forward(out, ys, mask, *norm, 1e-5, int(flags), channels_last)
    launchers.join_backward_reduce(rows, rows, out, ys, mask, *norm, 1e-5, int(flags), channels_last)
    launchers.join_backward_apply(dys, out, ys, mask, *norm, [rows, rows, count], 1e-5, int(flags), channels_last)


def call_plain(dtype: torch.dtype, k: int, channels_last: bool, masked: bool) -> None:
    """A mean without normalisation, forward and backward, and the backward of evaluation."""
    ys, dys = ([torch.empty(SHAPE, dtype=dtype) for _ in range(k)] for _ in range(2))
    if channels_last:
        ys, dys = ([t.to(memory_format=torch.channels_last) for t in ts] for ts in (ys, dys))
    mask = torch.ones(k, SHAPE[0], dtype=torch.bool) if masked else None
    none: tuple[list[Tensor], ...] = ([], [], [], [])
    vectors = [torch.empty(SHAPE[1]) for _ in range(k)]
    launchers.join_forward(dys[0], ys, mask, *none, 0.0, 0, channels_last)
    launchers.join_backward_apply(dys, ys[0], [], mask, *none, [], 0.0, 0, channels_last)
    flags = int(Flags.RELU_BRANCH)
    launchers.join_backward_apply(dys, ys[0], ys, mask, *none, [], 0.0, flags, channels_last)
    launchers.join_backward_apply(dys, ys[0], ys, mask, *(vectors,) * 4, [], 1e-5, flags, channels_last)


def everything() -> Iterator[tuple[torch.dtype, int, Flags, bool, bool]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for k in range(1, 9):
            for pool in (Flags(0), Flags.POOL_BEFORE, Flags.POOL_AFTER):
                for activation in (Flags.RELU_BRANCH, Flags.RELU_OUTPUT):
                    for channels_last in (True, False):
                        yield dtype, k, pool | activation, channels_last, True
