"""What depth costs: a step and its memory at C = 6 against C = 5, building C = 8, schedules and live sets; and what
ranges of columns save under paths per sample."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import fractalnet
import pytest
import torch
import torch.nn.functional as F
from fractalnet.evaluate import mixture, saved_bytes, stepper
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import NETS, Net
from benchmarks.compare import hold_together
from benchmarks.steps import MOMENTUM, TOLERANCE, full_path
from fractal_kernels import block_rows
from fractal_kernels.schedule import plan

DRAWS = 50
DEEP = dataclasses.replace(NETS["c4"], title="C = 6 (160 layers), channels 16…128, batch 50", columns=6, paths=60)


def host_seconds(model: fractalnet.FractalNet, net: Net) -> float:
    """Drawing a path and finding its live set in every block, as a step does, with nothing cached."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in range(DRAWS):
        plan.cache_clear()
        for keep in model.sample_path(net.batch, generator).keep:
            plan(net.columns, tuple(keep.flatten().tolist()))
    return (time.perf_counter() - start) / DRAWS


def test_deeper(compare: Callable[..., None]) -> None:
    """160 layers against 80, on the same batch and the same mixture of paths."""
    nets = {"ours": DEEP, "shallower": dataclasses.replace(DEEP, columns=5)}
    x, y = cases.random_batch(DEEP)
    x = x.to(memory_format=torch.channels_last)
    contenders, saved, host = {}, {}, {}

    def step_of(name: str, net: Net) -> Callable[[int], None]:
        model = fractalnet.FractalNet(net.classes, net.columns, net.channels, image_size=net.image)
        paths = mixture(model, net.batch, net.paths, 0)
        saved[name] = saved_bytes(model, lambda: F.cross_entropy(model(x, path=full_path(net)), y))
        host[name] = host_seconds(model, net)
        return stepper(model, lambda i: model(x, path=paths[i % net.paths]), y, MOMENTUM)

    for name, net in nets.items():
        contenders[name] = step_of(name, net)

    def extra(row: dict[str, Any]) -> dict[str, float]:
        ms = {name: contender["figure"] for name, contender in row["contenders"].items()}
        return {
            "times_of_shallower": ms["ours"] / ms["shallower"],
            "saved_of_shallower": saved["ours"] / saved["shallower"],
            "host_share": 1e3 * host["ours"] / ms["ours"],
        }

    compare("depth", f"training step, {DEEP.title}", contenders, DEEP.paths, cycle=DEEP.paths, extra=extra)


@pytest.mark.parametrize("batch", [50, 200])
def test_ranges_of_columns(compare: Callable[..., None], batch: int) -> None:
    """Paths per sample, statistics over live samples: a column's convolutions on its ranges, or on all of the batch."""
    title = NETS["c3"].title.replace("batch 50", f"batch {batch}")
    net = dataclasses.replace(NETS["c3"], batch=batch, paths=12, title=title)
    x, y = cases.random_batch(net)
    x = x.to(memory_format=torch.channels_last)
    model = per_sample(net)
    generator = torch.Generator().manual_seed(0)
    paths = [model.sample_path(net.batch, generator) for _ in range(net.paths)]

    def forward(dense: bool) -> Callable[[int], Tensor]:
        return lambda i: model(x, path=paths[i % net.paths], dense=dense)

    with torch.no_grad():
        for i in range(4):
            hold_together(f"ranges, path {i}", [forward(False)(i)], [forward(True)(i)], TOLERANCE)
    contenders = {name: stepper(model, forward(name == "dense"), y, MOMENTUM) for name in ("ours", "dense")}
    what = f"training step, paths per sample, {net.title}"
    compare("depth", what, contenders, net.paths * net.passes, cycle=net.paths)


def per_sample(net: Net) -> fractalnet.FractalNet:
    torch.manual_seed(0)
    return fractalnet.FractalNet(net.classes, net.columns, net.channels, image_size=net.image, granularity="sample")


@pytest.mark.parametrize("batch", [25, 50, 100, 200])
@pytest.mark.parametrize("block", range(5))
def test_ranges_by_block(compare: Callable[..., None], monkeypatch: Any, batch: int, block: int) -> None:
    """What the rule `ranges_are_faster` is read from: every block of the C = 3 net, in ranges and as a whole."""
    monkeypatch.setattr(block_rows, "RANGES_PAY", 1)
    net = NETS["c3"]
    model = per_sample(net)
    side = net.image >> block
    x = torch.randn(batch, model.blocks[block].in_channels, side, side).to(memory_format=torch.channels_last)
    x.requires_grad_(block > 0)
    paths = [model.sample_path(batch, torch.Generator().manual_seed(i)) for i in range(4)]

    def contender(dense: bool) -> Callable[[int], None]:
        def call(i: int) -> None:
            path = paths[i % 4]
            model.blocks[block](x, path.keep[block], path.alone, dense).sum().backward()

        return call

    contenders = {"ours": contender(False), "dense": contender(True)}
    what = f"block forward + backward, paths per sample, {net.channels[block]} channels, {batch}x{side}x{side}"
    compare("conv", what, contenders, 8, cycle=4)


def test_building(benchmark: Any, record: Callable[..., None]) -> None:
    """The 640-layer network, weights drawn."""
    benchmark.pedantic(lambda: fractalnet.create("fractal_c8"), rounds=3, iterations=1, warmup_rounds=1)
    if not benchmark.disabled:
        ms = 1e3 * benchmark.stats.stats.median
        record("depth", "building C = 8 (640 layers)", {"contenders": {"ours": {"figure": ms}}, "ratios": {}})
