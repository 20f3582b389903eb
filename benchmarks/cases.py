"""What is measured: the join's shape, the networks, and the drop-path draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch

JOIN_SHAPE = (32, 64, 32, 32)
JOIN_BRANCHES = 3
LOCAL_DROP = 0.15


@dataclass(frozen=True)
class Net:
    """A network and the batch of its training step."""

    title: str
    columns: int
    channels: tuple[int, ...]
    batch: int
    paths: int  # distinct drop-path draws, one per round
    passes: int  # times the list of draws is gone through
    classes: int = 100
    image: int = 32
    options: tuple[tuple[str, object], ...] = ()  # further ones of FractalNet, which the baselines know too


NETS = {
    "c3": Net("C = 3, channels 16…128, batch 50", 3, (16, 32, 64, 128, 128), 50, 24, 2),
    "c4": Net("C = 4, channels 16…128, batch 50", 4, (16, 32, 64, 128, 128), 50, 24, 2),
    "wide": Net("C = 3, channels 64…512, batch 16", 3, (64, 128, 256, 512, 512), 16, 24, 1),
}


# Of the paper, as `fractalnet.create` has them but for the dropout; on a GPU (the title says which batch).
_FORTY = (("column_widths", (1, 1 / 2, 1 / 4, 1 / 8)), ("kernel_mix", 0.5))
_IMAGENET = (("stem", "resnet"), ("last_pool", False))
GPU_NETS = {
    "fractalnet20": Net("FractalNet-20", 3, (64, 128, 256, 512, 512), 100, 24, 1, classes=10),
    "fractalnet40": Net("FractalNet-40", 4, (128, 256, 512, 1024, 1024), 100, 24, 1, options=_FORTY),
    "fractalnet34": Net("FractalNet-34", 4, (128, 256, 512, 1024), 64, 24, 1, 1000, 224, _IMAGENET),
    **{
        f"fractal_c{c}": Net(f"C = {c}", c, (16, 32, 64, 128, 128), 100, 2 * c * (24 // (2 * c)), 1)
        for c in range(3, 7)
    },
}


def draw_mask(
    branches: int,
    samples: int,
    drop: float = LOCAL_DROP,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Per-sample drop-path mask, bool [branches, samples]; every sample keeps at least one."""
    keep = torch.rand(branches, samples, generator=generator, device=device) >= drop
    revived = torch.randint(branches, (samples,), generator=generator, device=device)
    only = torch.arange(branches, device=device).unsqueeze(1) == revived
    return keep | (only & ~keep.any(dim=0))


def join_inputs(dtype: torch.dtype, branches: int = JOIN_BRANCHES) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Channels_last branches that require gradients, and the gradient of their join."""
    generator = torch.Generator().manual_seed(0)

    def one() -> torch.Tensor:
        values = torch.randn(JOIN_SHAPE, generator=generator).to(dtype)
        return values.to(memory_format=torch.channels_last)

    return [one().requires_grad_() for _ in range(branches)], one()


def random_batch(net: Net) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [batch, 3, image, image], contiguous, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(net.batch, 3, net.image, net.image, generator=generator)
    return images, torch.randint(net.classes, (net.batch,), generator=generator)
