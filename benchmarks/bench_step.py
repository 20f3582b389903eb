"""Training steps of FractalNets under the paper's drop-path mixture, and what they keep for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fractalnet
import pytest
import torch
import torch.nn.functional as F
from fractalnet.drop_path import Path
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.baselines import DenseFractalNet, PublicFractalNet
from benchmarks.cases import NETS, Net
from benchmarks.compare import hold_together

TOLERANCE = 1e-3


def full_path(net: Net) -> Path:
    """Nothing dropped."""
    return Path(torch.ones(len(net.channels), 2 ** (net.columns - 1), net.columns, dtype=torch.bool), None)


@torch.no_grad()
def unsettle(model: nn.Module, net: Net, seed: int = 1) -> None:
    """Moves the batch norms off their initial ones and zeros, so that the comparison below sees them."""
    generator = torch.Generator().manual_seed(seed)
    for b in range(len(net.channels)):
        for c in range(net.columns):
            for j in range(2**c):
                unit = model.blocks[b].unit(c, j)
                for tensor, low, high in (
                    (unit.gamma, 0.5, 1.5),
                    (unit.beta, -0.2, 0.2),
                    (unit.running_mean, -0.2, 0.2),
                    (unit.running_var, 0.5, 1.5),
                ):
                    tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))


def three_nets(net: Net) -> tuple[nn.Module, PublicFractalNet, DenseFractalNet]:
    """The same weights in ours, the public-style network (NCHW) and the dense one (channels_last)."""
    torch.manual_seed(0)
    ours = fractalnet.FractalNet(net.classes, net.columns, net.channels, image_size=net.image)
    unsettle(ours, net)
    public = PublicFractalNet(net.classes, net.columns, net.channels, image_size=net.image)
    dense = DenseFractalNet(net.classes, net.columns, net.channels, image_size=net.image)
    public.load_from(ours)
    dense.load_from(ours)
    return ours, public, dense.to(memory_format=torch.channels_last)


def gate(
    net: Net,
    ours: nn.Module,
    public: PublicFractalNet,
    dense: DenseFractalNet,
    compiled: Callable[..., Tensor],
    paths: list,
    x: Tensor,
    x_last: Tensor,
    y: Tensor,
) -> None:
    """Equal logits in eval, equal logits and loss in training, with everything kept and on drawn paths."""
    full = dense.full_masks()
    for model in (ours, public, dense):
        model.eval()
    with torch.no_grad():
        expected = public(x)
        hold_together("ours, eval", [ours(x_last)], [expected], TOLERANCE)
        hold_together("dense, eval", [dense(x_last, full)], [expected], TOLERANCE)
    for model in (ours, public, dense):
        model.train()
    with torch.no_grad():
        expected = public(x, dense.full_masks(net.batch))
    for name, logits in (("ours", ours(x_last, path=full_path(net))), ("compiled", compiled(x_last, full))):
        loss = F.cross_entropy(logits, y)
        hold_together(
            f"{name}, training, full path", [logits, loss], [expected, F.cross_entropy(expected, y)], TOLERANCE
        )
    for i, path in enumerate(paths):
        got, want = ours(x_last, path=path), compiled(x_last, path.keep)
        hold_together(f"ours, training, path {i}", [got], [want], TOLERANCE)


def training_step(model: nn.Module, forward: Callable[[int], Tensor], y: Tensor) -> Callable[[int], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(i), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("name", list(NETS))
def test_training_step(compare: Callable[..., None], name: str) -> None:
    """zero_grad, forward, cross-entropy, backward, SGD with momentum.

    Round i is path i of a fixed list for ours and for the compiled network, which takes it as a
    mask; the public-style network draws its per-sample masks itself. The figure is the mean over
    the paths.
    """
    net = NETS[name]
    x, y = cases.random_batch(net)
    x_last = x.to(memory_format=torch.channels_last)
    ours, public, dense = three_nets(net)
    compiled = torch.compile(dense, fullgraph=True, dynamic=False)
    paths = cases.stratified_paths(ours, net)
    gate(net, ours, public, dense, compiled, paths[:4], x, x_last, y)

    contenders = {
        "ours": training_step(ours, lambda i: ours(x_last, path=paths[i % net.paths]), y),
        "eager": training_step(public, lambda i: public(x), y),
        "compiled": training_step(dense, lambda i: compiled(x_last, paths[i % net.paths].keep), y),
    }
    compare("step", f"training step, {net.title}", contenders, net.paths * net.passes, cycle=net.paths)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves for backward, parameters and buffers excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    del loss
    return total


def held_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass allocates and has not freed when it returns, whoever holds them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    total = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del loss
    return total


def test_saved_bytes(benchmark: Any, record: Callable[..., None]) -> None:
    """What one forward pass keeps for backward with nothing dropped."""
    net = NETS["c3"]
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
