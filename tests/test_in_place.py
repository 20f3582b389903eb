"""What our functions return can be changed in place, as what PyTorch's own return."""

import pytest
import torch
from cases import channel_slice, channels_last
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("live", [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
def test_gradients_under_a_mask_for_the_batch(live, backend):
    """On the CPU those of the branches that live are one tensor, until they are somebody's own."""
    ys, mask = [images() for _ in range(3)], torch.tensor(live, dtype=torch.bool)
    grad = channels_last(torch.randn(2, 16, 6, 6))
    grad[0, 0] = torch.inf
    out = fk.masked_mean_join(ys, mask, backend=backend)
    found = torch.autograd.grad(out, ys, grad, retain_graph=True)
    for alive, d in zip(live, found, strict=True):
        torch.testing.assert_close(d, grad / sum(live) if alive else torch.zeros_like(grad))
    if backend == "cpu":
        assert len({d.data_ptr() for d in found}) == len(set(live))
    with FlopCounterMode(display=False):  # which sees every operator, as what traces them does
        traced = torch.autograd.grad(out, ys, grad, retain_graph=True)
    assert len({d.data_ptr() for d in traced}) == 3
    for d, other in zip(found, traced, strict=True):
        torch.testing.assert_close(d, other)
    out.backward(grad)
    before = [y.grad.clone() for y in ys]
    for i, y in enumerate(ys):
        y.grad.mul_(10**i)
    for i, (y, d) in enumerate(zip(ys, before, strict=True)):
        assert torch.equal(y.grad, d * 10**i) and y.grad.stride() == y.stride()
    for d in torch.autograd.grad(fk.masked_mean_join(ys, mask, backend=backend), ys, grad):
        d.mul_(2)


@pytest.mark.parametrize("channels, size", [(16, 6), (512, 2)])
def test_convolutions_of_fused_models(channels, size):
    """The residual block: what a convolution returns gets the shortcut added in place."""
    model = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    fk.fuse(model.to(memory_format=torch.channels_last), recompute=True)
    out = model[0](images(channels, size))
    out += torch.ones_like(out)
    nn.functional.relu(out, inplace=True).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
