"""Training steps of FractalNets under the paper's drop-path mixture, and what they keep for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fractalnet.evaluate import mixture, saved_bytes, stepper
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import GPU_NETS, NETS, Net
from benchmarks.compare import hold_together
from benchmarks.steps import MOMENTUM, TOLERANCE, full_path, gate, held_bytes, three_nets

LOWER_TOLERANCE = 5e-2  # of logits in bfloat16
FORTY = replace(GPU_NETS["fractalnet40"], batch=20, title="FractalNet-40, batch 20")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, None) for name in NETS), *((name, torch.bfloat16) for name in ("c3", "wide"))],
    ids=[*NETS, "c3-bf16", "wide-bf16"],
)
def test_training_step(compare: Callable[..., None], name: str, dtype: torch.dtype | None) -> None:
    """zero_grad, forward, cross-entropy, backward, SGD with momentum; with a dtype, under autocast.

    Round i is path i of a fixed list for ours and for the compiled network, which takes it as a
    mask; the public-style network draws its per-sample masks itself, and ours a path that it does
    not take. The figure is the mean over the paths.
    """
    net = NETS[name]
    x, y = cases.random_batch(net)
    x_last = x.to(memory_format=torch.channels_last)
    ours, public, dense = three_nets(net)
    compiled = torch.compile(dense, fullgraph=True, dynamic=False)
    paths = mixture(ours, net.batch, net.paths, 0)
    gate(net, ours, public, dense, compiled, paths[:4], x, x_last, y)

    last, generator = copy.deepcopy(public).to(memory_format=torch.channels_last), torch.Generator()

    def cast(forward: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        def run(i: int) -> Tensor:
            with torch.autocast("cpu", dtype):
                return forward(i).float()

        return run if dtype else forward

    @cast
    def own(i: int) -> Tensor:
        ours.sample_path(net.batch, generator)
        return ours(x_last, path=paths[i % net.paths])

    @cast
    def dense_compiled(i: int) -> Tensor:
        return compiled(x_last, paths[i % net.paths].keep)

    if dtype:
        with torch.no_grad():
            hold_together("in a lower precision", [own(0)], [dense_compiled(0)], LOWER_TOLERANCE)

    def extra(row: dict[str, Any]) -> dict[str, float]:
        return {"vs_eager_nhwc": row["ratios"]["eager_nhwc"]["figures"]}

    contenders = {
        "ours": stepper(ours, own, y, MOMENTUM),
        "eager": stepper(public, cast(lambda i: public(x)), y, MOMENTUM),
        "eager_nhwc": stepper(last, cast(lambda i: last(x_last)), y, MOMENTUM),
        "compiled": stepper(dense, dense_compiled, y, MOMENTUM),
    }
    rounds, title = net.paths * net.passes, f"training step, {net.title}{', bf16 (autocast)' if dtype else ''}"
    compare("step", title, contenders, rounds, cycle=net.paths, extra=extra)


@pytest.mark.parametrize("net", [NETS["c3"], FORTY], ids=["c3", "fractalnet40"])
def test_saved_bytes(benchmark: Any, record: Callable[..., None], net: Net) -> None:
    """What one forward pass keeps for backward with nothing dropped: of fused blocks, and of composed ones."""
    x, y = cases.random_batch(net)
    x_last = x.to(memory_format=torch.channels_last)
    ours, public, _ = three_nets(net)
    masks = public.full_masks(net.batch)

    def own() -> Tensor:
        return F.cross_entropy(ours(x_last, path=full_path(net)), y)

    def eager() -> Tensor:
        return F.cross_entropy(public(x, masks), y)

    hold_together("ours, training, full path", [own()], [eager()], TOLERANCE)
    saved = {"ours": saved_bytes(ours, own), "eager": saved_bytes(public, eager)}
    held = {"ours": held_bytes(own), "eager": held_bytes(eager)}
    benchmark.pedantic(own, rounds=3, iterations=1, warmup_rounds=1)
    row = {
        "contenders": {name: {"figure": 1e-6 * n, "held": 1e-6 * held[name]} for name, n in saved.items()},
        "ratios": {"eager": {"figures": saved["eager"] / saved["ours"]}},
    }
    record(
        "memory",
        f"saved for backward, {net.title}, full path",
        row,
        unit="MB",
        share_of_eager=saved["ours"] / saved["eager"],
        held_share_of_eager=held["ours"] / held["eager"],
    )
