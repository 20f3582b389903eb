"""A multi-branch network of your own on the fused joins: relu(bn(3x3) + bn(1x1) + bn(identity)), as RepVGG has it.

    python examples/multi_branch.py

Trains it on scikit-learn's handwritten digits twice, from the same weights: written in PyTorch's modules, and with the
three batch norms, two additions and the ReLU of every step as one fused join. Prints both accuracies and times.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fractal_kernels as fk


class Step(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(channels, channels, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.wide(x), self.narrow(x), x)
        return F.relu(sum(norm(y) for norm, y in zip(self.norms, branches, strict=True)))


class FusedStep(nn.Module):
    """The same weights under the same names' order; the join takes the place of norms, sum and ReLU."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.wide, self.narrow = step.wide, step.narrow
        self.join = fk.BNReLUJoin(3, step.wide.out_channels, reduction="sum", activation="output")
        for mine, theirs in zip(self.join.bns, step.norms, strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.join([self.wide(x), self.narrow(x), x])


def network(channels: int = 32, steps: int = 4) -> nn.Sequential:
    stem = nn.Conv2d(1, channels, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(stem, *(Step(channels) for _ in range(steps)), head)


def fused(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(FusedStep(m) if isinstance(m, Step) else m for m in copy.deepcopy(net)))


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int = 6) -> float:
    """Milliseconds per step."""
    net = net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    generator, began, count = torch.Generator().manual_seed(0), time.perf_counter(), 0
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)  # else the last weights are luck
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(net(images[batch].to(memory_format=torch.channels_last)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += 1
        falling.step()
    return 1e3 * (time.perf_counter() - began) / count


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    split = len(images) * 4 // 5
    eager = network()
    for name, net in (("eager", eager), ("fused", fused(eager))):
        ms = train(net, images[:split], labels[:split])
        with torch.no_grad():
            right = net.eval()(images[split:]).argmax(1) == labels[split:]
        print(f"{name}: {right.float().mean():.1%} of the held-out digits, {ms:.1f} ms per step")


if __name__ == "__main__":
    main()
