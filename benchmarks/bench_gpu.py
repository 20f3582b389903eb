"""The kernels of both GPU backends: bytes/s against a device copy, and against torch.compile of the same maths.

Run with ``pytest benchmarks/bench_gpu.py -m gpu``; the table of ratios comes after the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fractal_kernels as fk
from benchmarks.baselines import clean_bn_relu_join, clean_mean_join
from benchmarks.compare import Contender, hold_together
from fractal_kernels.backends import launcher
from fractal_kernels.library import Flags

pytestmark = pytest.mark.gpu
K, SHAPE = 3, (256, 64, 56, 56)
REPEATS, ROUNDS = 10, 20
LABELS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
DTYPES = pytest.mark.parametrize("dtype", list(LABELS), ids=list(LABELS.values()))
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
RELU, POOL = int(Flags.RELU_BRANCH), int(Flags.RELU_BRANCH | Flags.POOL_BEFORE)


BACKENDS = pytest.mark.parametrize("backend", ["triton", "cuda"])


def repeated(launch: Callable[[], Any]) -> Contender:
    """REPEATS calls and the wait for them: a launch alone takes longer to issue than to run."""

    def call(_: int) -> None:
        for _ in range(REPEATS):
            launch()
        torch.cuda.synchronize()

    return call


def branches(dtype: torch.dtype, layout: torch.memory_format, shape: Sequence[int] = SHAPE) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="cuda", memory_format=layout).normal_() for _ in range(K)]


@BACKENDS
@LAYOUTS
@DTYPES
@pytest.mark.parametrize("kernel", ["stats", "mean", "forward", "forward_pool", "reduce", "apply", "apply_pool"])
def test_kernel(
    compare: Callable[..., None], kernel: str, dtype: torch.dtype, layout: torch.memory_format, backend: str
) -> None:
    """One kernel into memory that is there, against a copy of as many bytes into memory that is there."""
    launch, last = launcher(backend), layout == torch.channels_last
    ys = branches(dtype, layout)
    pooled = kernel.endswith("pool")
    n, c, h, w = SHAPE
    size = (n, c, h // 2, w // 2) if pooled else SHAPE
    out = torch.empty(size, dtype=dtype, device="cuda", memory_format=layout).normal_()
    dys = [torch.empty_like(y) for y in ys]
    mean, var, count = torch.ops.fractal_kernels.channel_stats(ys, None, backend)
    means, vars = list(mean.unbind()), list(var.unbind())
    weights, biases = ([torch.rand(c, device="cuda") + 0.5 for _ in range(K)] for _ in range(2))
    norm, code = (means, vars, weights, biases), POOL if pooled else RELU
    sums = [torch.zeros_like(mean), torch.zeros_like(mean)]
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "stats": (lambda: launch.channel_stats(mean, var, count, ys, None, last), K),
        "mean": (lambda: launch.join_forward(out, ys, None, [], [], [], [], 0.0, 0, last), K + 1),
        "forward": (lambda: launch.join_forward(out, ys, None, *norm, 1e-5, code, last), K + 1),
        "reduce": (lambda: launch.join_backward_reduce(*sums, out, ys, None, *norm, 1e-5, code, last), K + 1),
        "apply": (lambda: launch.join_backward_apply(dys, out, ys, None, *norm, [*sums, count], 1e-5, code, last), 0),
    }
    call, tensors = calls[kernel.removesuffix("_pool")]
    moved = out.nbytes * (tensors - K) + K * ys[0].nbytes if tensors else out.nbytes + 2 * K * ys[0].nbytes
    moved = K * ys[0].nbytes if kernel == "stats" else moved
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def extra(row: dict[str, Any]) -> dict[str, float]:
        seconds = {name: 1e-3 * figures["figure"] / REPEATS for name, figures in row["contenders"].items()}
        return {"gb_per_s": 1e-9 * moved / seconds["ours"], "share_of_copy": seconds["copy"] / seconds["ours"]}

    shape = f"{K} × {'×'.join(map(str, SHAPE))} {LABELS[dtype]} {'NHWC' if last else 'NCHW'}"
    what = f"{backend} {kernel}, {shape}, {REPEATS} calls"
    compare("gpu", what, {"ours": repeated(call), "copy": repeated(lambda: target.copy_(source))}, ROUNDS, extra=extra)


@BACKENDS
@LAYOUTS
@DTYPES
@pytest.mark.parametrize("what", ["mean", "bn_relu_join"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_against_compile(
    compare: Callable[..., None],
    what: str,
    direction: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    backend: str,
) -> None:
    """The public functions against torch.compile of one clean expression, per-sample masks."""
    torch._functorch.config.donated_buffer = False  # the backward is called again and again
    ys = [y.requires_grad_() for y in branches(dtype, layout)]
    c = SHAPE[1]
    mask = fk.drop_path_mask(K, 0.15, SHAPE[0], generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    weights, biases = ([torch.rand(c, device="cuda").add_(0.5).requires_grad_() for _ in range(K)] for _ in range(2))
    means, vars = ([torch.full((c,), float(v), device="cuda") for _ in range(K)] for v in (0, 1))
    grad = torch.randn_like(ys[0])
    if what == "mean":
        wanted, args = ys, (ys, mask)
        ours, clean = (lambda *a: fk.masked_mean_join(*a, backend=backend)), clean_mean_join
    else:
        wanted, args = [*ys, *weights, *biases], (ys, weights, biases, means, vars, mask)
        ours, clean = (lambda *a: fk.bn_relu_join(*a, training=True, backend=backend)), clean_bn_relu_join
    functions = {"ours": ours, "compiled": torch.compile(clean, fullgraph=True, dynamic=False)}
    outs = {name: f(*args) for name, f in functions.items()}
    grads = {name: torch.autograd.grad(out, wanted, grad, retain_graph=True) for name, out in outs.items()}
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    hold_together(what, [outs["ours"], *grads["ours"]], [outs["compiled"], *grads["compiled"]], tolerance)
    if direction == "forward":
        contenders = {name: repeated(lambda f=f: f(*args)) for name, f in functions.items()}
    else:
        contenders = {
            name: repeated(lambda out=out: torch.autograd.grad(out, wanted, grad, retain_graph=True))
            for name, out in outs.items()
        }
    title = f"{backend} {what} {direction}, {LABELS[dtype]} {'NHWC' if layout == torch.channels_last else 'NCHW'}"
    compare("gpu", f"{title}, {REPEATS} calls", contenders, ROUNDS)
