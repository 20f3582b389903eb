"""What becomes of a fused model: hooks, replaced modules and compilers after `fuse`; `unfuse`."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fuse import Block, ResNet, check_fuse
from test_modules import assert_same
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fractal_kernels as fk
from fractal_kernels.modules import FusedReLU, StepConv2d


def chain(*between: nn.Module) -> nn.Sequential:
    """Convolution, batch norm with moved statistics, modules between, ReLU, and another layer."""
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), *between, nn.ReLU(), nn.Conv2d(3, 3, 1)).double()
    net(torch.randn(8, 3, 6, 6, dtype=torch.float64) + 1)
    return net


def test_modules_that_return_what_they_are_given_may_be_between():
    """timm's residual blocks have one, where others have DropBlock."""
    model = check_fuse(chain(nn.Identity(), nn.Identity()), ["1"], {})
    assert isinstance(model[4], FusedReLU) and model[4].alone


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.same, self.relu = nn.BatchNorm2d(3), nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.same(self.bn(x))
        return self.relu(h) - h


def test_what_is_between_may_not_be_seen():
    check_fuse(Twice(), [], {"bn": "its only use is not a torch.nn.ReLU module"})
    hooked = chain(nn.Identity())
    hooked[2].register_forward_hook(lambda module, args, out: out - 0.3)
    check_fuse(hooked, [], {"1": "(without hooks): Identity"})  # of a leaf the hook is no reader of its own


def compiled(model: nn.Module, x: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def exported(strict: bool):
    return lambda model, x: torch.export.export(model, (x,), strict=strict).module()(x)


TOOLS = {"eager": lambda model, x: model(x), "compile": compiled, "export": exported(False), "strict": exported(True)}


def subtract(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out - 0.3


def hook_the_norm(model: nn.Sequential) -> None:
    model[1].register_forward_hook(subtract)


def hook_the_relu(model: nn.Sequential) -> None:
    model[2].register_forward_pre_hook(lambda module, args: args[0] - 0.3)


def patch(model: nn.Sequential) -> None:
    forward = model[1].forward
    model[1].forward = lambda x: forward(x) - 0.3


def fold(model: nn.Sequential) -> None:
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("change", [hook_the_norm, hook_the_relu, patch, fold], ids=lambda change: change.__name__)
def test_what_is_changed_after_fuse(change, tool):
    """Before torch.compile, `fuse` is called again, and sees it; the others need not be told."""
    model, x = chain().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    eager = copy.deepcopy(model)
    assert fk.fuse(model).fused == ["1"]
    for each in (model, eager):
        change(each)
    if tool == "compile":
        fk.fuse(model)
    torch.testing.assert_close(TOOLS[tool](model, x), eager(x), rtol=1e-10, atol=1e-10)


def test_steps_recompute_as_they_were_made():
    model = nn.Sequential(fk.ConvBNReLU(3, 4), fk.ConvBNReLU(4, 4, recompute=True))
    fk.fuse(model, recompute=True)
    assert [step.conv.recompute for step in model] == [True, True]
    fk.unfuse(model)
    assert [step.conv.recompute for step in model] == [False, True]


@pytest.mark.parametrize("recompute", [True, False])
def test_unfuse(recompute):
    model = ResNet(shared=True).double()
    before = copy.deepcopy(model)
    assert fk.unfuse(model) == []
    names = fk.fuse(model, recompute=recompute).fused
    assert fk.unfuse(model) == names and len(names) == 3
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in before.modules()]
    assert_same(model, before, torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert fk.fuse(model, recompute=recompute).fused == names


def test_unfuse_leaves_modules_of_ones_own():
    own = fk.ConvBNReLU(3, 3)
    model = nn.Sequential(own, Block(3, False), fk.BatchNormReLU2d(3))
    assert fk.unfuse(model) == [] and type(own.conv) is StepConv2d
    assert type(own.bn) is type(model[2]) is fk.BatchNormReLU2d


def test_unfuse_says_what_it_cannot():
    with pytest.raises(TypeError, match=r"unfuse: expected model to be a torch\.nn\.Module, got list"):
        fk.unfuse([])
    model = chain()
    fk.fuse(model)
    model[1].sync_group = "a group"
    with pytest.raises(ValueError, match=r"unfuse: expected batch norms that are not synchronised, got 1"):
        fk.unfuse(model)
    assert type(model[1]) is fk.BatchNormReLU2d and type(model[2]) is FusedReLU
    model[1].sync_group = None
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"unfuse: expected 1 as fuse left it, got a ParametrizedBatchNormReLU2d"):
        fk.unfuse(model)
    assert type(model[2]) is FusedReLU
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert fk.unfuse(model) == ["1"]


def test_a_relu_that_no_trace_sees_any_more_does_its_work():
    model = chain()
    fk.fuse(model)
    assert model[2].alone
    model.forward = lambda x: model[2](x)
    fk.fuse(model)
    assert not model[2].alone


def test_a_forward_that_was_set_is_named():
    """As accelerate sets it on what it prepares."""
    model = chain()
    model.forward = model.forward
    report = fk.fuse(model)
    assert not report.fused and dict(report.skipped)["model"].startswith("not traceable (a forward that was set on the")
