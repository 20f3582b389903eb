"""What our functions return can be changed in place, as what PyTorch's own return."""

import pytest
import torch
from cases import channel_slice, channels_last
from torch import nn

import fractal_kernels as fk

PATH = torch.ones(2, 2, dtype=torch.bool, device="cpu")


def images(channels=16, size=6, layout=channels_last):
    return layout(torch.randn(2, channels, size, size)).detach().requires_grad_()


def weight(out=16, inside=16):
    return channels_last(torch.randn(out, inside, 3, 3)).requires_grad_()


CALLS = {
    "mean join": lambda b: fk.masked_mean_join([images(), images()], backend=b),
    "contiguous": lambda b: fk.masked_mean_join([images(layout=torch.Tensor.contiguous)] * 2, backend=b),
    "slices": lambda b: fk.masked_mean_join([images(layout=channel_slice)] * 2, backend=b),
    "pooled join": lambda b: fk.masked_mean_join([images(), images()], pool="before", backend=b),
    "bn_relu of a slice": lambda b: fk.bn_relu(images(layout=channel_slice), *[None] * 4, True, backend=b),
    "bn_relu_join": lambda b: fk.bn_relu_join([images()] * 2, *[None] * 4, training=True, pool="after", backend=b),
    "3-d": lambda b: fk.bn_relu(
        torch.randn(2, 5, 4).transpose(1, 2).requires_grad_(), None, None, None, None, True, backend=b
    ),
    "channels_last_3d": lambda b: fk.bn_relu(
        torch.randn(2, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d).requires_grad_(),
        None, None, None, None, True, backend=b,
    ),
    "Winograd": lambda b: fk.conv_bn_relu(images(), weight(), *[None] * 4, True, backend=b),
    "of 3 channels": lambda b: fk.conv_bn_relu(images(3), weight(16, 3), *[None] * 4, True, backend=b),
    "block": lambda b: fk.fractal_block(images(), [weight(32), weight()], None, None, PATH, backend=b).out,
}  # fmt: skip


@pytest.mark.parametrize("name", list(CALLS))
def test_outputs(name, backend):
    out = CALLS[name](backend)
    out.add_(1).sum().backward()
    with torch.no_grad():
        out = CALLS[name](backend)
    factor = torch.ones(1, requires_grad=True)
    out.mul_(factor).sum().backward()
    assert factor.grad.isfinite().all()


@pytest.mark.parametrize("channels, size", [(16, 6), (512, 2)])
def test_convolutions_of_fused_models(channels, size):
    """The residual block: what a convolution returns gets the shortcut added in place."""
    model = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    fk.fuse(model.to(memory_format=torch.channels_last), recompute=True)
    out = model[0](images(channels, size))
    out += torch.ones_like(out)
    nn.functional.relu(out, inplace=True).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
