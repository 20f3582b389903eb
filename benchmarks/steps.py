"""What the benchmarks of training steps share: the same network in three forms, held together, and its step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import fractalnet
import torch
import torch.nn.functional as F
from fractalnet.devices import zero_momenta
from fractalnet.drop_path import Path
from torch import Tensor, nn

from benchmarks.baselines import DenseFractalNet, PublicFractalNet
from benchmarks.cases import Net
from benchmarks.compare import hold_together

TOLERANCE = 1e-3
MOMENTUM = 0.9


def full_path(net: Net) -> Path:
    """Nothing dropped."""
    return Path(torch.ones(len(net.channels), 2 ** (net.columns - 1), net.columns, dtype=torch.bool), None)


@torch.no_grad()
def unsettle(model: nn.Module, net: Net) -> None:
    """Moves the batch norms off their initial ones and zeros, so that the comparison below sees them."""
    generator = torch.Generator().manual_seed(1)
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
    shape, options = (net.classes, net.columns, net.channels), {"image_size": net.image, **dict(net.options)}
    ours = fractalnet.FractalNet(*shape, **options)
    unsettle(ours, net)
    public, dense = PublicFractalNet(*shape, **options), DenseFractalNet(*shape, **options)
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


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class MixedStep:
    """A training step in a precision: autocast, a scaler for fp16, SGD with momentum, all on the device."""

    def __init__(self, model: nn.Module, precision: str, device: str) -> None:
        self.dtype, self.device = PRECISIONS[precision], device
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=MOMENTUM, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        zero_momenta(self.optimizer)

    def __call__(self, forward: Callable[[], Tensor], y: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype) if self.dtype else nullcontext():
            loss = F.cross_entropy(forward(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def held_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass allocates and has not freed when it returns, whoever holds them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
    total = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    del loss
    return total
