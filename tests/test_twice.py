"""What a step may do twice: differentiate, which is refused and said, and call a module in both modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fractal_kernels as fk
from fractal_kernels.ops.conv import conv2d_1x1_pooled

LAST = torch.channels_last


def block(x: Tensor) -> Tensor:
    weights = [torch.randn(32, 16, 3, 3).to(x.dtype), torch.randn(16, 16, 3, 3).to(x.dtype)]
    return fk.fractal_block(x, weights, None, None, torch.ones(2, 2, dtype=torch.bool)).out


def step(x: Tensor) -> Tensor:
    weight = torch.randn(16, 16, 3, 3).to(x).to(memory_format=LAST)
    return fk.conv_bn_relu(x, weight, None, None, None, None, True)


OPERATORS = {
    "bn_relu": lambda x: fk.bn_relu(x, None, None, None, None, True),
    "bn_relu_join": lambda x: fk.bn_relu_join([x, 2 * x], None, None, None, None, None, True, pool="before"),
    "conv_bn_relu": step,
    "conv2d_1x1_pooled": lambda x: conv2d_1x1_pooled(x, torch.randn(8, 16, 1, 1), "cpu").square(),
    "fractal_block": block,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives_are_refused(name):
    """Also where the incoming gradient is a constant, of a sum: else a gradient penalty would lack its derivative."""
    x = torch.randn(4, 16, 8, 8).to(memory_format=LAST).requires_grad_()
    grads = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        out = OPERATORS[name](x)
        grads += torch.autograd.grad((out * torch.linspace(0, 1, out.shape[-1])).sum(), x, create_graph=create_graph)
    assert torch.equal(*grads) and grads[1].requires_grad
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grads[1].square().sum().backward()


def test_second_derivative_of_a_mean():
    """It is linear: a constant gradient's gradient is constant, and PyTorch's mean has none, either."""
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(fk.masked_mean_join([x, 2 * x]).square().sum(), x, create_graph=False)
    assert torch.allclose(grad, 4.5 * x)
    (grad,) = torch.autograd.grad(fk.masked_mean_join([x, 2 * x]).sum(), x, create_graph=True)
    assert torch.allclose(grad, torch.tensor(1.5)) and not grad.requires_grad


@pytest.mark.parametrize("kind", ["bn_relu", "join"])
def test_evaluation_before_training(kind):
    """A term with fixed statistics, then a training call that moves them, then one backward: as by the statistics that
    the evaluation saw."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    if kind == "join":
        net = fk.BNReLUJoin(2, 4).double()
        call = lambda net, mode: net.train(mode)([x, x.flip(0) + 1])  # noqa: E731
    else:
        net = fk.BatchNormReLU2d(4).double()
        call = lambda net, mode: net.train(mode)(x)  # noqa: E731
    for p in net.parameters():
        nn.init.normal_(p)
    apart = copy.deepcopy(net)
    (call(net, False).sum() + call(net, True).square().sum()).backward()
    call(apart, False).sum().backward()
    call(apart, True).square().sum().backward()
    for p, q in zip(net.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(net.buffers(), apart.buffers(), strict=True):
        assert torch.equal(p, q)
