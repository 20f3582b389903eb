"""Times contenders in turn, so that a noisy machine is equally noisy for all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Contender = Callable[[int], Any]
WARMUP = 3


def alternate(benchmark: Any, contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]] | None:
    """Seconds per round of every contender; None under --benchmark-disable, where each runs once.

    A round calls every contender once: the baselines in an order drawn anew, then "ours", which
    is the call that pytest-benchmark times. A contender gets the number of the round.
    """
    others = [name for name in contenders if name != "ours"]
    times: dict[str, list[float]] = {name: [] for name in others}
    order = random.Random(0)
    calls = 0

    def baselines() -> tuple[tuple[int], dict[str, Any]]:
        nonlocal calls
        index = (calls - WARMUP) % rounds
        calls += 1
        for name in order.sample(others, len(others)):
            start = time.perf_counter()
            contenders[name](index)
            times[name].append(time.perf_counter() - start)
        return (index,), {}

    def ours(index: int) -> None:
        contenders["ours"](index)  # returns nothing: freeing the result is timed, as it is above

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(ours, setup=baselines, rounds=rounds, iterations=1, warmup_rounds=WARMUP)
    finally:
        if collects:
            gc.enable()
    if benchmark.disabled:
        return None
    return {"ours": list(benchmark.stats.stats.data)} | {name: t[WARMUP:] for name, t in times.items()}


def figures(times: dict[str, list[float]], cycle: int | None = None) -> dict[str, Any]:
    """Milliseconds per contender, and how many times as long as ours each baseline takes.

    A contender's figure is its median. With `cycle`, round i did the work number i % cycle, and
    the figure is the mean over the works of each one's median, for every contender alike.
    """
    result: dict[str, Any] = {"contenders": {}, "ratios": {}, "rounds": len(times["ours"])}
    for name, seconds in times.items():
        ms = [1e3 * s for s in seconds]
        if cycle is None:
            figure = statistics.median(ms)
        else:
            figure = statistics.fmean(statistics.median(ms[i::cycle]) for i in range(cycle))
        low, median, high = statistics.quantiles(ms, n=4)
        result["contenders"][name] = {
            "figure": figure,
            "median": median,
            "mean": statistics.fmean(ms),
            "min": min(ms),
            "p25": low,
            "p75": high,
        }
    ours = result["contenders"]["ours"]["figure"]
    for name in times:
        if name != "ours":
            result["ratios"][name] = {
                "figures": result["contenders"][name]["figure"] / ours,
                "median_of_rounds": statistics.median(b / o for b, o in zip(times[name], times["ours"], strict=True)),
            }
    return result


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got − expected| / |expected|, Euclidean norms in fp64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-30))


class Different(AssertionError):
    """Two contenders do not compute the same."""


def hold_together(what: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raises unless every tensor is within `tolerance` of what is expected: no figure from a wrong result."""
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if g.shape != e.shape:
            raise Different(f"{what}: tensor {i}: expected shape {list(e.shape)}, got {list(g.shape)}")
        error = relative_error(g, e)
        if not error <= tolerance:
            raise Different(f"{what}: tensor {i}: expected a relative error <= {tolerance:g}, got {error:.3g}")
