"""Residual networks: the end of a block as one join, and a training step of a model that ``fuse`` has swapped.

Kept in results/residual: make bench ARGS="-k bench_residual --output benchmarks/results/residual/avx2.json".
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fractalnet.evaluate import stepper
from torch import Tensor, nn

import fractal_kernels as fk
from benchmarks import cases
from benchmarks.bench_join import DTYPES, TOLERANCE, gradients, label
from benchmarks.compare import hold_together
from benchmarks.steps import MOMENTUM

BATCH, SIZE = 50, 32


class Block(nn.Module):
    """Basic (He et al. 2016, arXiv:1512.03385, figure 5), shortcuts by a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet(blocks: int, width: int) -> nn.Sequential:
    """Three stages of blocks at 1, 2 and 4 times the width: of 3 blocks and 16 channels ResNet-20 for CIFAR."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    layers, channels = nn.Sequential(*stem), width
    for stage in range(3):
        for i in range(blocks):
            layers.append(Block(channels, width << stage, 2 if stage and not i else 1))
            channels = width << stage
    return layers.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)])


@DTYPES
def test_end_of_a_block(compare: Callable[..., None], dtype: torch.dtype) -> None:
    """relu(bn(y) + x), forward and backward."""
    inputs, grad = cases.join_inputs(dtype, branches=2)
    wide, wide_grad = [x.detach().float().requires_grad_() for x in inputs], grad.float()
    own, fused_norm, norm, reference = (nn.BatchNorm2d(inputs[0].shape[1]) for _ in range(4))
    options = dict(training=True, reduction="sum", activation="output", normalised=[True, False])

    def ours(i: int) -> list[Tensor]:
        params = [[t, None] for t in (own.weight, own.bias, own.running_mean, own.running_var)]
        return gradients(lambda: fk.bn_relu_join(inputs, *params, **options), grad, [*inputs, *own.parameters()])

    def eager(bn: nn.BatchNorm2d, y: Tensor, x: Tensor) -> Tensor:
        out = bn(y)
        out += x
        return F.relu(out, inplace=True)

    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    contenders = {
        "ours": ours,
        "eager": lambda i: gradients(lambda: eager(norm, *inputs), grad, [*inputs, *norm.parameters()]),
        "compiled": lambda i: gradients(
            lambda: compiled(fused_norm, *inputs), grad, [*inputs, *fused_norm.parameters()]
        ),
    }
    expected = gradients(lambda: eager(reference, *wide), wide_grad, [*wide, *reference.parameters()])
    for name in ("ours", "compiled"):
        # Of two million sums a few are so near to 0 that they are rounded to either side of the ReLU's edge.
        hold_together(f"{name}, end of a residual block", contenders[name](0), expected, 3 * TOLERANCE[dtype])
    compare("residual", f"relu(bn(y) + x) in training, forward + backward, {label(dtype)}", contenders, 40)


@pytest.mark.parametrize(("blocks", "width"), [(3, 16), (3, 64)])
def test_training_step(compare: Callable[..., None], blocks: int, width: int) -> None:
    """zero_grad, forward, cross-entropy, backward, SGD with momentum; all in channels_last."""
    x = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    y = torch.randint(10, (BATCH,))
    nets = {"eager": resnet(blocks, width).to(memory_format=torch.channels_last)}
    nets |= {name: copy.deepcopy(nets["eager"]) for name in ("ours", "compiled")}
    fk.fuse(nets["ours"])
    fused = torch.compile(nets["compiled"], fullgraph=True, dynamic=False)
    calls = {name: (lambda i, net=net: net(x)) for name, net in (nets | {"compiled": fused}).items()}
    losses = {name: F.cross_entropy(call(0), y) for name, call in calls.items()}
    for name in ("ours", "compiled"):
        found, expected = (
            torch.autograd.grad(losses[n], list(nets[n].parameters()), retain_graph=True) for n in (name, "eager")
        )
        hold_together(f"{name}, ResNet", found, expected, 3e-2)
    contenders = {name: stepper(nets[name], call, y, MOMENTUM) for name, call in calls.items()}
    what = f"training step, ResNet-{6 * blocks + 2}, channels {width}…{4 * width}, batch {BATCH}, by fuse"
    compare("residual", what, contenders, 15)
