"""Runs joins beside memory that may not be read: who loads it, dies. It is where dropped branches and samples are, or
behind the ends of inputs and gradients (on the CPU of outputs, too: who writes there, dies).

    python unread.py BACKEND dropped|ends

A program of its own, which a segmentation fault ends. FRACTAL_SIMT names a library that executes the CUDA kernels.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fractal_kernels import backends, bn_relu_join, masked_mean_join
from fractal_kernels.library import Flags

K, N, C, H, W = 3, 4, 16, 8, mmap.PAGESIZE // 512
BYTES = C * H * W * 4  # of a sample in float32: a page
NOTHING = 0  # PROT_NONE
launchers = torch.ops.fractal_kernels_cpu
_protect = ctypes.CDLL(None, use_errno=True).mprotect
_protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def branch(channels_last: bool) -> Tensor:
    """[N, C, H, W], each sample on pages of its own."""
    flat = torch.frombuffer(mmap.mmap(-1, N * BYTES), dtype=torch.float32)
    flat.copy_(torch.randn(flat.numel()))
    return flat.view(N, H, W, C).permute(0, 3, 1, 2) if channels_last else flat.view(N, C, H, W)


@contextmanager
def unreadable(branches: list[Tensor], mask: Tensor) -> Iterator[None]:
    """What the mask drops, while this lasts."""
    lost = ~mask.view(K, -1).expand(K, N)
    dropped = [branches[b].data_ptr() + n * BYTES for b, n in lost.nonzero().tolist()]

    def protect(mode: int) -> None:
        for address in dropped:
            if _protect(address, BYTES, mode):
                raise OSError(ctypes.get_errno(), "mprotect")

    protect(NOTHING)
    try:
        yield
    finally:
        protect(mmap.PROT_READ | mmap.PROT_WRITE)


def steps(ys: list[Tensor], mask: Tensor, backend: str) -> Iterator[str]:
    """Forward and backward of every join that has to leave out what is dropped."""

    def step(out: Tensor, wanted: list[Tensor]) -> None:
        grads = torch.autograd.grad(out.sum(), wanted)
        assert all(t.isfinite().all() for t in (out, *grads))

    norms = [[torch.rand(C).add_(0.5).requires_grad_() for _ in range(K)] for _ in range(2)]
    running = [[torch.rand(C).add_(0.5) for _ in range(K)] for _ in range(2)]
    wanted = [*ys, *norms[0], *norms[1]]
    step(masked_mean_join(ys, mask, backend=backend), ys)
    yield "mean"
    for pool in (None, "before", "after"):
        for activation in ("branch", "output"):
            for training in (False, True):
                options = dict(pool=pool, activation=activation, stats="live", backend=backend)
                step(bn_relu_join(ys, *norms, *running, mask, training, **options), wanted)
                yield f"{pool}, {activation}, {'training' if training else 'evaluation'}"


def dropped(backend: str) -> int:
    """Runs all steps where what a mask drops may not be read; returns how many."""
    count = 0
    sample = torch.tensor([[True, False, True, False], [False, False, True, True], [True, False, False, True]])
    for mask in (torch.tensor([True, False, True]), sample):
        for channels_last in (True, False):
            ys = [branch(channels_last).requires_grad_() for _ in range(K)]
            with unreadable(ys, mask):
                for what in steps(ys, mask, backend):
                    count += 1
                    layout = "channels_last" if channels_last else "contiguous"
                    print(f"{layout}, mask {list(mask.shape)}: {what}", flush=True)
    return count


def at_an_end(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers behind which nothing may be read."""
    n, c, h, w = shape
    size = dtype.itemsize * n * c * h * w
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), dtype=dtype)
    if _protect(memory.data_ptr() + pages, mmap.PAGESIZE, NOTHING):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = memory[(pages - size) // dtype.itemsize : pages // dtype.itemsize]
    t = flat.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else flat.view(shape)
    return t.copy_(torch.randn(shape))


def between_guards(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones in channels_last, whole pages, before and behind which nothing may be read."""
    n, c, h, w = shape
    size = dtype.itemsize
    pages = size * n * c * h * w // mmap.PAGESIZE * mmap.PAGESIZE
    memory = torch.frombuffer(mmap.mmap(-1, pages + 2 * mmap.PAGESIZE), dtype=dtype)
    for at in (0, mmap.PAGESIZE + pages):
        if _protect(memory.data_ptr() + at, mmap.PAGESIZE, NOTHING):
            raise OSError(ctypes.get_errno(), "mprotect")
    return memory[mmap.PAGESIZE // size :][: pages // size].fill_(1.0).view(n, h, w, c).permute(0, 3, 1, 2)


def ends(backend: str) -> int:
    """The same of odd sizes at the ends of memory: nothing past a window, a vector or a tile is loaded. On the CPU in
    every dtype, of even sizes too, and nothing is written there."""
    count, shapes, dtypes = 0, [(2, 5, 5, 7)], [torch.float32]
    if backend == "cpu":
        shapes, dtypes = [*shapes, (2, 21, 4, 6)], [*dtypes, torch.float64, torch.bfloat16, torch.float16]
    for shape, dtype, channels_last in itertools.product(shapes, dtypes, (True, False)):
        for pool, training in itertools.product((None, "before", "after"), (True, False)):
            c = shape[1]
            ys = [at_an_end(shape, channels_last, dtype).requires_grad_() for _ in range(2)]
            of_norms = torch.float64 if dtype == torch.float64 else torch.float32
            norms = [[torch.ones(c, dtype=of_norms).requires_grad_() for _ in range(2)] for _ in range(2)]
            running = [[torch.rand(c, dtype=of_norms).add_(0.5) for _ in range(2)] for _ in range(2)]
            out = bn_relu_join(ys, *norms, *running, None, training, pool=pool, backend=backend)
            grad = at_an_end(tuple(out.shape), channels_last, dtype)
            torch.autograd.grad(out, [*ys, *norms[0], *norms[1]], grad)
            if backend == "cpu":
                written(ys, grad, pool, channels_last)
            count += 1
            print(
                f"{shape}, {dtype}, {'channels_last' if channels_last else 'contiguous'}, {pool}, {training}",
                flush=True,
            )
    return count


def written(ys: list[Tensor], grad: Tensor, pool: str | None, channels_last: bool) -> None:
    """The launchers' outputs at ends of memory."""
    flags = int({None: Flags(0), "before": Flags.POOL_BEFORE, "after": Flags.POOL_AFTER}[pool] | Flags.RELU_OUTPUT)
    ys = [y.detach() for y in ys]
    out, *dys = (at_an_end(tuple(t.shape), channels_last, t.dtype) for t in (grad, *ys))
    no_norm = ([], [], [], [])
    launchers.join_forward(out, ys, None, *no_norm, 0.0, flags, channels_last)
    launchers.join_backward_apply(dys, grad, ys, None, *no_norm, [], 0.0, flags, channels_last)


def main(backend: str, what: str) -> None:
    if simulated := os.environ.get("FRACTAL_SIMT"):
        torch.ops.load_library(simulated)
        backends._simulated = True
    if os.environ.get("TRITON_INTERPRET") == "1":
        import quick_interpreter

        quick_interpreter.quicken(sanitize=False)
    torch.manual_seed(0)
    print(f"{(ends if what == 'ends' else dropped)(backend)} steps read nothing of it", flush=True)


def read_nothing(backend: str, what: str = "dropped", **environment: str) -> None:
    """Fails with what the program said last."""
    here = Path(__file__).resolve()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **environment,
        "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(here), backend, what]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if run.returncode == -signal.SIGSEGV:
        raise MemoryError(f"{backend} read {what}, after: {run.stdout[-200:]}")
    steps_run = {"dropped": 52, "ends": 96 if backend == "cpu" else 12}[what]
    there = f"{steps_run} steps read nothing" in run.stdout
    assert run.returncode == 0 and there, (run.returncode, run.stdout, run.stderr)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
