"""The 2x2 convolution against the library's, fp32 on the block's path and alone."""

import fractalnet
import pytest
import torch

from fractal_kernels import tiny_conv


@pytest.mark.parametrize(("n", "c", "k"), [(16, 256, 32), (1, 300, 7), (5, 256, 256)])
def test_against_the_library(n, c, k):
    torch.manual_seed(0)
    x = torch.randn(n, c, 2, 2).to(memory_format=torch.channels_last)
    wide = torch.randn(2 * k, 3, 3, c).permute(0, 3, 1, 2)
    weight, grad = wide[k:], torch.randn(n, k, 2, 2).to(memory_format=torch.channels_last)
    assert tiny_conv.fits(x, weight)
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y = torch.conv2d(x64, w64, padding=1)
    dx, dw = torch.autograd.grad(y, (x64, w64), grad.double())
    full = torch.full_like(wide, float("nan"))
    got = tiny_conv.conv_backward(grad, x, weight, True, full[k:])
    for a, b in ((tiny_conv.conv(x, weight), y), (got, dx), (full[k:], dw)):
        torch.testing.assert_close(a.double(), b.detach(), rtol=1e-4, atol=1e-3)
    assert tiny_conv.conv(x, weight).is_contiguous(memory_format=torch.channels_last)
    assert bool(full[:k].isnan().all())  # nothing outside its slice
    assert tiny_conv.conv_backward(grad, x, weight, False, full[k:]) is None


def test_fits_only_where_it_was_measured():
    x, weight = torch.randn(2, 256, 2, 2).to(memory_format=torch.channels_last), torch.randn(4, 3, 3, 256)
    weight = weight.permute(0, 3, 1, 2)
    assert tiny_conv.fits(x, weight)
    assert not tiny_conv.fits(x.contiguous(), weight)
    assert not tiny_conv.fits(x, weight.contiguous())
    assert not tiny_conv.fits(x.double(), weight.double())
    assert not tiny_conv.fits(torch.randn(2, 256, 4, 4).to(memory_format=torch.channels_last), weight)


def test_block_is_the_same_with_it(monkeypatch):
    torch.manual_seed(0)
    net = fractalnet.FractalNet(5, 3, (256, 256), image_size=4)
    x, generator = torch.randn(6, 3, 4, 4), torch.Generator().manual_seed(0)
    used = []
    for _ in range(4):
        path, grads = net.sample_path(6, generator), []
        for fits in (tiny_conv.fits, lambda *_: False):
            with monkeypatch.context() as patch:
                patch.setattr(tiny_conv, "fits", lambda *a, fits=fits: used.append(fits(*a)) or used[-1])
                net.zero_grad()
                net(x, path=path).square().sum().backward()
                grads.append([p.grad.clone() for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6
    assert any(used)
