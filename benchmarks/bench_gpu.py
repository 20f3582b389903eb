"""The kernels of both GPU backends: bytes/s against a device copy, and against eager and compiled code of their maths.

Run with ``pytest benchmarks/bench_gpu.py -m gpu``; the table of ratios comes after the run. The rows that matter most
come first, since a round has a limit.

A figure is the wall time of REPEATS calls and one wait for them; ``device_ms`` is what the device takes for the same
calls, replayed as a CUDA graph and timed by events. Nothing flushes the L2 cache between calls: the calls of a kernel,
and of the copy it is held against, take turns over sets of tensors, so that what is read again was followed by at least
three times the cache; a row of fewer bytes is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn

import fractal_kernels as fk
from benchmarks import baselines
from benchmarks.baselines import clean_bn_relu_join, clean_mean_join
from benchmarks.compare import WARMUP, Contender, hold_together
from fractal_kernels.backends import launcher
from fractal_kernels.library import Flags

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
K, SHAPE = 3, (256, 64, 56, 56)
REPEATS, ROUNDS = 10, 20
WIDE = (64, 512, 28, 28)
RELU, POOL = int(Flags.RELU_BRANCH), int(Flags.RELU_BRANCH | Flags.POOL_BEFORE)
MODES = {"compiled": None, "compiled_max": "max-autotune-no-cudagraphs"}  # contenders, and torch.compile's modes
LABELS = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
ORDERS = {torch.channels_last: "nhwc", torch.contiguous_format: "nchw"}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3, torch.float16: 1e-2}

# Of stacked marks, the topmost varies fastest.
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cuda"])
DTYPES = pytest.mark.parametrize("dtype", list(LABELS), ids=list(LABELS.values()))
LAYOUTS = pytest.mark.parametrize("layout", list(ORDERS), ids=list(ORDERS.values()))


# --- timing ------------------------------------------------------------------------------------


def repeated(launch: Callable[[], Any]) -> Contender:
    """REPEATS calls and the wait for them: a launch alone takes longer to issue than to run."""

    def call(_: int) -> None:
        for _ in range(REPEATS):
            launch()
        torch.cuda.synchronize()

    return call


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call after the other."""
    turn = cycle(calls)
    return lambda: next(turn)()


def device_ms(launch: Callable[[], Any]) -> float:
    """Median milliseconds of REPEATS calls, replayed as one CUDA graph: nothing of the host is in it.

    What is launched has run before, so that nothing is compiled or tuned during the capture.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            launch()
    times = []
    for _ in range(WARMUP + ROUNDS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times[WARMUP:])


def flushes(moved: int) -> int:
    """How many calls that move so many bytes replace what is in the L2 cache: three times its size."""
    return -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // moved)


def skip_within_cache(moved: int) -> None:
    if flushes(moved) > 1:
        pytest.skip(f"a call moves {moved} bytes, and a third of them would fit into this GPU's L2 cache")


# --- what is timed -----------------------------------------------------------------------------


def filled(dtype: torch.dtype, layout: torch.memory_format, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=layout).normal_()


def case(
    op: str,
    direction: str,
    backend: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    shape: tuple[int, ...] = SHAPE,
    branches: int = K,
) -> dict[str, Any]:
    """What a plot goes by."""
    names = {"op": op, "direction": direction, "backend": backend, "dtype": LABELS[dtype], "layout": ORDERS[layout]}
    return {**names, "shape": list(shape), "branches": branches}


def group(case: dict[str, Any]) -> str:
    """The table of pytest-benchmark that a case stands in."""
    return f"{case['op']}/{case['direction']}/{'×'.join(map(str, case['shape']))}"


@cache
def compiled(function: Callable[..., Tensor], mode: str | None) -> Callable[..., Tensor]:
    """One for the whole run: directions and backends share what was compiled for a dtype and a layout."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Lets a backward be called again and again, and one function be compiled for every dtype, layout and mode."""
    with torch._functorch.config.patch(donated_buffer=False), torch._dynamo.config.patch(recompile_limit=64):
        yield


def eager_mean_join(ys: Sequence[Tensor], mask: Tensor) -> Tensor:
    """As public code has it, in the order of memory."""
    last = ys[0].is_contiguous(memory_format=torch.channels_last)
    return (baselines.eager_mean_join_last if last else baselines.eager_mean_join)(ys, mask)


def joins(op: str, backend: str) -> tuple[dict[str, Callable[[list[Tensor]], Tensor]], nn.ModuleList]:
    """Per contender a function of the branches, under one per-sample mask; and the batch norms whose weights
    and biases all of them use."""
    n, c = SHAPE[:2]
    mask = fk.drop_path_mask(K, 0.15, n, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    if op == "masked_mean_join":
        fused = {name: compiled(clean_mean_join, mode) for name, mode in MODES.items()}
        return {
            "ours": lambda ys: fk.masked_mean_join(ys, mask, backend=backend),
            "eager": lambda ys: eager_mean_join(ys, mask),
            **{name: lambda ys, f=f: f(ys, mask) for name, f in fused.items()},
        }, nn.ModuleList()
    norms = nn.ModuleList(nn.BatchNorm2d(c, device=DEVICE) for _ in range(K))
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    weights, biases = [norm.weight for norm in norms], [norm.bias for norm in norms]
    functions: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "eager": lambda ys: baselines.eager_bn_relu_join(ys, norms, mask, eager_mean_join)
    }
    fused = {name: compiled(clean_bn_relu_join, mode) for name, mode in MODES.items()}
    for name, function in {"ours": partial(fk.bn_relu_join, training=True, backend=backend), **fused}.items():
        # Running statistics of its own: autograd saves those of some, and another's forward would change them.
        own = [[torch.full((c,), v, device=DEVICE) for _ in range(K)] for v in (0.0, 1.0)]
        functions[name] = lambda ys, f=function, own=own: f(ys, weights, biases, *own, mask)
    return functions, norms


def kernel_call(
    kernel: str,
    launch: Any,
    outputs: list[Tensor],
    grad: Tensor,
    ys: list[Tensor],
    norm: tuple[list[Tensor], ...],
    sums: list[Tensor],
    channels_last: bool,
) -> Callable[[], Any]:
    """The launch of one kernel that fills ``outputs``."""
    code = POOL if kernel.endswith("_pool") else RELU
    calls: dict[str, Callable[[], Any]] = {
        "stats": lambda: launch.channel_stats(*outputs, ys, None, [], 0.0, None, channels_last),
        "mean": lambda: launch.join_forward(*outputs, ys, None, [], [], [], [], 0.0, 0, channels_last),
        "forward": lambda: launch.join_forward(*outputs, ys, None, *norm, 1e-5, code, channels_last),
        "reduce": lambda: launch.join_backward_reduce(*outputs, grad, ys, None, *norm, 1e-5, code, channels_last),
        "apply": lambda: launch.join_backward_apply(outputs, grad, ys, None, *norm, sums, 1e-5, code, channels_last),
    }
    return calls[kernel.removesuffix("_pool")]


Launch = Callable[[], Any]


def launches(
    kernel: str, dtype: torch.dtype, layout: torch.memory_format, backend: str, k: int, shape: tuple[int, ...]
) -> tuple[Launch, Launch, int]:
    """A kernel's launch, held against the reference's, one of a copy of as many bytes, and their number."""
    (n, c, h, w), ys = shape, [filled(dtype, layout, shape) for _ in range(k)]
    size = (n, c, h // 2, w // 2) if kernel.endswith("_pool") else shape
    grad = filled(dtype, layout, size)
    mean, var, count = torch.ops.fractal_kernels.channel_stats(ys, None, [], 0.0, None, "reference")
    weights, biases = ([torch.rand(c, device=DEVICE) + 0.5 for _ in range(k)] for _ in range(2))
    norm = (list(mean.unbind()), list(var.unbind()), weights, biases)
    sums = [*(0.1 * count[0] * torch.randn_like(mean) for _ in range(2)), count]
    kinds = {"stats": [mean, var, count], "reduce": [mean, var], "apply": ys}
    like = kinds.get(kernel.removesuffix("_pool"), [grad])
    outputs, expected = ([torch.full_like(t, torch.nan) for t in like] for _ in range(2))
    last = layout == torch.channels_last
    call = kernel_call(kernel, launcher(backend), outputs, grad, ys, norm, sums, last)
    kernel_call(kernel, launcher("reference"), expected, grad, ys, norm, sums, last)()
    call()
    hold_together(f"{backend} {kernel}", outputs, expected, TOLERANCE[dtype])
    read = [*ys, *([grad] if kernel.startswith(("reduce", "apply")) else [])]
    moved = sum(t.nbytes for t in (*read, *outputs))
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return call, lambda: target.copy_(source), moved


# --- the benchmarks ----------------------------------------------------------------------------


def measure(
    benchmark: Any,
    compare: Callable[..., None],
    kernel: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    backend: str,
    k: int = K,
    shape: tuple[int, ...] = SHAPE,
) -> None:
    """One kernel into memory that is there, against a copy of as many bytes into memory that is there."""
    sets = [launches(kernel, dtype, layout, backend, k, shape)]
    moved = sets[0][2]
    sets += [launches(kernel, dtype, layout, backend, k, shape) for _ in range(flushes(moved))]
    call, copy = (in_turn(each) for each in [*zip(*sets, strict=True)][:2])

    def extra(row: dict[str, Any]) -> dict[str, float]:
        wall = {name: 1e-3 * figures["figure"] / REPEATS for name, figures in row["contenders"].items()}
        # The faster of the two: a graph's copy of some sizes has been seen to be a fifth slower than a call's.
        ours, copied = device_ms(call), min(device_ms(copy), 1e3 * REPEATS * wall["copy"])
        return {
            "bytes": moved,
            "gb_per_s": 1e-9 * moved / wall["ours"],
            "share_of_copy": wall["copy"] / wall["ours"],
            "device_ms": ours,
            "device_gb_per_s": 1e-6 * moved * REPEATS / ours,
            "device_share_of_copy": copied / ours,
        }

    direction = "backward" if kernel.startswith(("reduce", "apply")) else "forward"
    this = case(kernel, direction, backend, dtype, layout, shape, k)
    benchmark.group = group(this)
    named = f"{k} × {'×'.join(map(str, shape))} {LABELS[dtype]} {ORDERS[layout].upper()}"
    what = f"{backend} {kernel}, {named}, {REPEATS} calls"
    compare("gpu", what, {"ours": repeated(call), "copy": repeated(copy)}, ROUNDS, extra=extra, case=this)


@BACKENDS
@pytest.mark.parametrize("kernel", ["forward", "apply", "reduce", "stats", "mean", "forward_pool", "apply_pool"])
@DTYPES
@LAYOUTS
def test_kernel(
    benchmark: Any,
    compare: Callable[..., None],
    kernel: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    backend: str,
) -> None:
    measure(benchmark, compare, kernel, dtype, layout, backend)


@BACKENDS
@pytest.mark.parametrize("kernel", ["forward", "apply", "reduce"])
@pytest.mark.parametrize("k, shape", [(1, SHAPE), (3, WIDE)], ids=["one", "wide"])
def test_kernel_of(
    benchmark: Any, compare: Callable[..., None], kernel: str, k: int, shape: tuple[int, ...], backend: str
) -> None:
    """Of one branch, as every batch norm of a chain is and half of the joins of a FractalNet; and of 512 channels."""
    measure(benchmark, compare, kernel, torch.bfloat16, torch.channels_last, backend, k, shape)


@pytest.mark.keep_compiled
@BACKENDS
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", ["bn_relu_join", "masked_mean_join"])
@DTYPES
@LAYOUTS
def test_against_compile(
    benchmark: Any,
    compare: Callable[..., None],
    compiler: None,
    op: str,
    direction: str,
    dtype: torch.dtype,
    layout: torch.memory_format,
    backend: str,
) -> None:
    """The public functions, in training, against public code of their maths and torch.compile of clean code of it."""
    ys, grad = [filled(dtype, layout).requires_grad_() for _ in range(K)], filled(dtype, layout)
    skip_within_cache(sum(t.nbytes for t in (*ys, grad)))
    functions, norms = joins(op, backend)
    parameters = list(norms.parameters())
    wide = [y.detach().float().requires_grad_() for y in ys]
    out = functions["eager"](wide)
    expected = [out.detach(), *torch.autograd.grad(out, [*wide, *parameters], grad.float())]
    outs = {name: function(ys) for name, function in functions.items()}

    def backward(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outs[name], [*ys, *parameters], grad, retain_graph=True)

    for name in functions:
        hold_together(f"{name}, {op}", [outs[name], *backward(name)], expected, TOLERANCE[dtype])
    del wide, out, expected
    if direction == "forward":
        outs.clear()
        launches = {name: (lambda f=f: f(ys)) for name, f in functions.items()}
    else:
        launches = {name: (lambda name=name: backward(name)) for name in functions}

    def extra(_: dict[str, Any]) -> dict[str, float]:
        return {"device_ms": device_ms(launches["ours"])} if direction == "forward" else {}

    this = case(op, direction, backend, dtype, layout)
    benchmark.group = group(this)
    what = f"{backend} {op} {direction}, {LABELS[dtype]} {ORDERS[layout].upper()}, {REPEATS} calls"
    contenders = {name: repeated(launch) for name, launch in launches.items()}
    compare("gpu", what, contenders, ROUNDS, extra=extra, case=this)
