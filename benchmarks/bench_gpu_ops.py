"""Both GPU backends: memory of a join in training, the residual add with stochastic depth, the end of a residual block,
and the column step; and the convolutions of a fractal block's rows.

Run with ``pytest benchmarks/bench_gpu_ops.py -m gpu``; timing, shapes and contenders are those of bench_gpu.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from fractalnet.evaluate import saved_bytes
from torch import Tensor, nn

import fractal_kernels as fk
from benchmarks.bench_conv import Library, dash, row_of_convs, titled
from benchmarks.bench_gpu import (
    BACKENDS,
    DEVICE,
    MODES,
    REPEATS,
    ROUNDS,
    SHAPE,
    TOLERANCE,
    K,
    case,
    compiled,
    device_ms,
    filled,
    group,
    joins,
    repeated,
    skip_within_cache,
)
from benchmarks.compare import hold_together
from fractal_kernels.library import Flags

pytestmark = pytest.mark.gpu
DTYPE, LAYOUT = torch.bfloat16, torch.channels_last
DROP = 0.15
TITLE = "bf16 NHWC"
# As bench_conv.ROWS: of FractalNet-20 at two batches, and of FractalNet-34.
ROWS = [
    (100, 128, 256, 8, 3),
    (100, 256, 512, 4, 3),
    (100, 512, 512, 2, 3),
    (100, 512, 512, 2, 2),
    (1024, 256, 512, 4, 3),
    (64, 256, 512, 28, 4),
]


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most that a step has allocated at any time beyond what there was before it."""
    step()  # what a first call allocates for good is not the step's
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@BACKENDS
@pytest.mark.parametrize("quantity", ["saved", "peak"])
def test_memory(benchmark: Any, record: Callable[..., None], quantity: str, backend: str) -> None:
    """What bn_relu_join in training keeps for backward, and the most that forward and backward allocate.

    torch.compile may reuse the memory of what it saved, as it does by default; so the compiled code of bench_gpu.py,
    whose backwards run again and again, is not used.
    """
    ys, grad = [filled(DTYPE, LAYOUT).requires_grad_() for _ in range(K)], filled(DTYPE, LAYOUT)
    functions, norms = joins("bn_relu_join", backend)
    functions = {name: functions[name] for name in ("ours", "eager", "compiled")}

    def step(function: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
        out = function(ys)
        return [out.detach(), *torch.autograd.grad(out, [*ys, *norms.parameters()], grad)]

    results = {name: step(function) for name, function in functions.items()}
    for name in ("ours", "compiled"):
        hold_together(f"{name}, bn_relu_join", results[name], results["eager"], TOLERANCE[DTYPE])
    results.clear()
    if quantity == "saved":
        figures = {name: saved_bytes(norms, lambda f=f: f(ys)) for name, f in functions.items()}
    else:
        figures = {name: peak_bytes(lambda f=f: step(f)) for name, f in functions.items()}
    this = case("bn_relu_join", "forward" if quantity == "saved" else "forward+backward", backend, DTYPE, LAYOUT)
    benchmark.group = group(this)
    benchmark.pedantic(lambda: step(functions["ours"]), rounds=3, iterations=1, warmup_rounds=1)
    row = {
        "contenders": {name: {"figure": 1e-6 * number} for name, number in figures.items()},
        "ratios": {name: {"figures": n / figures["ours"]} for name, n in figures.items() if name != "ours"},
        "case": this,
    }
    title = {"saved": "saved for backward", "peak": "peak of forward and backward"}[quantity]
    record("gpu_memory", f"{title}, {backend} bn_relu_join in training, {TITLE}", row, unit="MB")


@BACKENDS
def test_stochastic_depth(benchmark: Any, compare: Callable[..., None], backend: str) -> None:
    """The residual add of a branch that is dropped per sample, against timm's, compiled too, and torchvision's.

    Every contender draws its mask in the call. torchvision's divides by the rate of what is kept, so that all of them
    are held together with nothing dropped, and ours under its mask by itself.
    """
    layers = pytest.importorskip("timm.layers", reason="the baseline is timm's DropPath")
    torchvision = pytest.importorskip("torchvision", reason="the baseline is torchvision's stochastic_depth")
    x, y, n = filled(DTYPE, LAYOUT), filled(DTYPE, LAYOUT), SHAPE[0]
    skip_within_cache(3 * x.nbytes)
    mask = torch.ones(2, n, dtype=torch.bool, device=DEVICE)
    join, flags = torch.ops.fractal_kernels.join_forward, int(Flags.SUM)

    def launches(p: float) -> dict[str, Callable[[], Tensor]]:
        drop = layers.DropPath(p, scale_by_keep=False).train()

        def ours() -> Tensor:
            mask[1] = torch.rand(n, device=DEVICE) >= p
            return join([x, y], mask, [], [], [], [], 0.0, flags, backend)

        def eager() -> Tensor:
            return x + drop(y)

        def depth() -> Tensor:
            return x + torchvision.ops.stochastic_depth(y, p, "row", training=True)

        fused = torch.compile(eager, dynamic=False)
        return {"ours": ours, "eager": eager, "compiled": fused, "torchvision": depth}

    sums = {name: launch() for name, launch in launches(0.0).items()}
    for name, got in sums.items():
        hold_together(f"{name}, nothing dropped", [got], [x.float() + y.float()], TOLERANCE[DTYPE])
    timed = launches(DROP)
    got = timed["ours"]()
    expected = x.float() + y.float() * mask[1].view(-1, 1, 1, 1)
    hold_together("ours, some dropped", [got], [expected], TOLERANCE[DTYPE])
    del sums, got, expected

    def extra(_: dict[str, Any]) -> dict[str, float]:
        return {"device_ms": device_ms(timed["ours"])}

    this = case("residual_add", "forward", backend, DTYPE, LAYOUT)
    benchmark.group = group(this)
    what = f"{backend} residual add with stochastic depth, {TITLE}, {REPEATS} calls"
    contenders = {name: repeated(launch) for name, launch in timed.items()}
    compare("gpu", what, contenders, ROUNDS, extra=extra, case=this)


class EndOfBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(SHAPE[1], device=DEVICE)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        out = self.norm(y)
        out += x
        return out.relu_()


@cache
def end_of_block() -> EndOfBlock:
    """One for both backends, so that what is compiled of it is shared."""
    return EndOfBlock()


@pytest.mark.keep_compiled
@BACKENDS
def test_end_of_a_residual_block(benchmark: Any, compare: Callable[..., None], backend: str) -> None:
    """relu(bn(y) + x) in training, forward and backward."""
    y, x, grad = filled(DTYPE, LAYOUT).requires_grad_(), filled(DTYPE, LAYOUT).requires_grad_(), filled(DTYPE, LAYOUT)
    skip_within_cache(3 * x.nbytes)
    block = end_of_block()
    norm, fused = block.norm, {name: compiled(block, mode) for name, mode in MODES.items()}
    params = [[t, None] for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    options: dict[str, Any] = dict(reduction="sum", activation="output", normalised=[True, False], backend=backend)
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: fk.bn_relu_join([y, x], *params, training=True, **options),
        "eager": lambda: block(y, x),
        **{name: lambda f=f: f(y, x) for name, f in fused.items()},
    }

    def step(name: str) -> list[Tensor]:
        out = forwards[name]()
        return [out.detach(), *torch.autograd.grad(out, [y, x, *norm.parameters()], grad)]

    with torch.no_grad():  # the gradients of what is near 0 depend on how the sum is rounded
        hold_together("ours, end of a residual block", [forwards["ours"]()], [block(y.float(), x)], TOLERANCE[DTYPE])
    this = case("residual_end", "forward+backward", backend, DTYPE, LAYOUT)
    benchmark.group = group(this)
    what = f"{backend} relu(bn(y) + x) in training, forward + backward, {TITLE}, {REPEATS} calls"
    contenders = {name: repeated(lambda name=name: step(name)) for name in forwards}
    compare("gpu", what, contenders, ROUNDS, case=this)


@cache
def conv_block() -> nn.Sequential:
    """One for both backends, so that what is compiled of it is shared."""
    c = SHAPE[1]
    conv = nn.Conv2d(c, c, 3, padding=1, bias=False, device=DEVICE, dtype=DTYPE).to(memory_format=LAYOUT)
    norm = nn.BatchNorm2d(c, device=DEVICE)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True))


@pytest.mark.keep_compiled
@BACKENDS
def test_conv_bn_relu(benchmark: Any, compare: Callable[..., None], backend: str) -> None:
    """The column step in training, forward and backward, against Conv2d, BatchNorm2d and ReLU; fp32 parameters of the
    norm. The convolution is the library's in every contender, but for what max-autotune makes of it."""
    x, grad, block = filled(DTYPE, LAYOUT).requires_grad_(), filled(DTYPE, LAYOUT), conv_block()
    skip_within_cache(x.nbytes + grad.nbytes)
    conv, norm = block[0], block[1]
    args = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    fused = {name: compiled(block, mode) for name, mode in MODES.items()}
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: fk.conv_bn_relu(x, *args, training=True, backend=backend),
        "eager": lambda: block(x),
        **{name: lambda f=f: f(x) for name, f in fused.items()},
    }

    def step(name: str) -> list[Tensor]:
        out = forwards[name]()
        return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad)]

    # The convolution's output is rounded: against float32, the ReLU of what is near 0 would go the other way.
    expected = step("eager")
    for name in ("ours", *MODES):
        hold_together(f"{name}, conv_bn_relu", step(name), expected, TOLERANCE[DTYPE])
    del expected
    this = case("conv_bn_relu", "forward+backward", backend, DTYPE, LAYOUT)
    benchmark.group = group(this)
    what = f"{backend} conv_bn_relu in training, forward + backward, {TITLE}, {REPEATS} calls"
    contenders = {name: repeated(lambda name=name: step(name)) for name in forwards}
    compare("gpu", what, contenders, ROUNDS, case=this)


@pytest.mark.parametrize("row", ROWS, ids=dash)
def test_row_of_convs(compare: Callable[..., None], row: tuple[int, ...]) -> None:
    """What a block's rule for GPUs goes by (`wide_is_faster` in fractal_kernels/block_rows.py)."""
    calls = {name: partial(call, 0) for name, call in row_of_convs(Library, row, device=DEVICE, dtype=DTYPE).items()}
    hold_together("wide", [calls["ours"]().clone()], [calls["separate"]()], TOLERANCE[DTYPE])

    def extra(_: dict[str, Any]) -> dict[str, float]:
        return {f"device_ms_{name}": device_ms(call) for name, call in calls.items()}

    contenders = {name: repeated(call) for name, call in calls.items()}
    compare("gpu_rule", f"{titled(row)}, {TITLE}, {REPEATS} calls", contenders, ROUNDS, extra=extra)
