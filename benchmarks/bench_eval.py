"""Evaluation of FractalNets: everything runs, batch norms take running statistics, nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import NETS
from benchmarks.compare import hold_together
from benchmarks.steps import TOLERANCE, three_nets

ROUNDS = {"batch": 40, "one": 200}


@pytest.mark.parametrize("name", ["c3", "wide"])
@pytest.mark.parametrize("images", ["batch", "one"])
def test_evaluation(compare: Callable[..., None], images: str, name: str) -> None:
    """A batch as large as in training, and one image."""
    net = NETS[name] if images == "batch" else replace(NETS[name], batch=1)
    x, _ = cases.random_batch(net)
    x_last = x.to(memory_format=torch.channels_last)
    ours, public, dense = (model.eval() for model in three_nets(net))
    compiled, full = torch.compile(dense, fullgraph=True, dynamic=False), dense.full_masks()

    def without_gradients(forward: Callable[[], Tensor]) -> Callable[[int], Tensor]:
        def run(i: int) -> Tensor:
            with torch.no_grad():
                return forward()

        return run

    forwards = {
        "ours": lambda: ours(x_last),
        "eager": lambda: public(x),
        "compiled": lambda: compiled(x_last, full),
    }
    contenders = {key: without_gradients(forward) for key, forward in forwards.items()}
    for key in ("ours", "compiled"):
        hold_together(key, [contenders[key](0)], [contenders["eager"](0)], TOLERANCE)
    title = NETS[name].title.rsplit(", batch", 1)[0]
    compare("evaluation", f"evaluation, {title}, batch {net.batch}", contenders, ROUNDS[images])
