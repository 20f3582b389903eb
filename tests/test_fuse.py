"""fuse(): what it swaps, what it leaves and why, and that it changes nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_modules import assert_same
from torch import Tensor, nn

import fractal_kernels
from fractal_kernels import BatchNormReLU2d, BNReLUJoin, DropPathJoin, MeanJoin, bn_relu_join, fuse, use_backend
from fractal_kernels.modules import FusedReLU


class Block(nn.Module):
    """A residual block whose second ReLU acts on the sum; ``shared``: one ReLU module for both, as torchvision has."""

    def __init__(self, channels: int, shared: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = self.relu1 if shared else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + x)


class ResNet(nn.Module):
    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(Block(6, shared), Block(6, shared))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class TwoNorms(nn.Module):
    """Two batch norms and what follows them; ``function`` is the forward."""

    def __init__(self, second: nn.Module, function) -> None:
        super().__init__()
        self.bn1, self.bn2, self.relu, self.function = nn.BatchNorm2d(3), second, nn.ReLU(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Subclass(nn.BatchNorm2d):
    pass


def check_fuse(model: nn.Module, fused: list[str], skipped: dict[str, str], channels: int = 3) -> nn.Module:
    """What the report says, and that no result and no key changed."""
    model = model.double()
    eager, keys = copy.deepcopy(model), list(model.state_dict())
    report = fuse(model)
    assert sorted(report.fused) == sorted(fused)
    left = dict(report.skipped)
    assert set(left) == set(skipped)
    for name, reason in skipped.items():
        assert reason in left[name] and f"left {name}: " in str(report)
    assert f"fused {len(fused)} batch norms" in str(report)
    assert list(model.state_dict()) == keys
    modules = dict(model.named_modules())
    assert all(type(modules[name]) is BatchNormReLU2d for name in fused)
    assert_same(model, eager, torch.randn(4, channels, 6, 6, dtype=torch.float64))
    assert fuse(model).fused == []  # a second time finds nothing
    return model


def test_fuse_sequential(backend):
    with use_backend(backend):
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
        model = check_fuse(nn.Sequential(*layers, nn.ReLU(), nn.Flatten()), ["1", "4"], {})
        assert type(model[2]) is FusedReLU and isinstance(model[2], nn.ReLU)


def test_who_looks_for_a_relu_finds_it():
    """As extractors of features do, going through the layers."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
    )

    def features(x):
        found = []
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x.clone())
        return found

    x = torch.randn(2, 3, 8, 8)
    expected = features(x)
    assert fuse(model).fused == ["1", "4"]
    for got, wanted in zip(features(x), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(expected) == 2 and len(pickle.loads(pickle.dumps(model))) == 6


def test_fuse_resnet():
    check_fuse(
        ResNet(shared=False),
        ["stem.1", "blocks.0.bn1", "blocks.1.bn1"],
        {f"blocks.{i}.bn2": "its only use is not a torch.nn.ReLU module" for i in range(2)},
    )


def test_fuse_shared_relu():
    """It passes on what the batch norm has rectified, and does its work on the sum."""
    check_fuse(
        ResNet(shared=True),
        ["stem.1", "blocks.0.bn1", "blocks.1.bn1"],
        {f"blocks.{i}.bn2": "its only use is not a torch.nn.ReLU module" for i in range(2)},
    )


def test_fuse_relu_shared_by_two_batch_norms():
    model = TwoNorms(nn.BatchNorm2d(3), lambda m, x: m.relu(m.bn2(m.relu(m.bn1(x)))))
    check_fuse(model, ["bn1", "bn2"], {})


def test_fuse_relu_shared_with_a_subclass():
    """The subclass is left, so it still needs the ReLU."""
    model = TwoNorms(Subclass(3), lambda m, x: m.relu(m.bn2(m.relu(m.bn1(x)))))
    check_fuse(model, ["bn1"], {"bn2": "Subclass"})


def test_fuse_relu_shared_with_a_batch_norm_of_two_calls():
    model = TwoNorms(nn.BatchNorm2d(3), lambda m, x: m.relu(m.bn1(x)) + m.relu(m.bn2(x)) + m.bn2(-x))
    check_fuse(model, ["bn1"], {"bn2": "in some calls"})


def test_fuse_batch_norm_used_twice():
    model = TwoNorms(nn.BatchNorm2d(3), lambda m, x: m.relu(m.bn1(x)) + m.bn2(m.bn1(2 * x)))
    check_fuse(model, [], {"bn1": "in some calls", "bn2": "its only use is not"})
    model = TwoNorms(nn.BatchNorm2d(3), lambda m, x: m.relu(m.bn1(x)) - m.relu(m.bn1(2 * x)) + m.relu(m.bn2(x)))
    check_fuse(model, ["bn1", "bn2"], {})  # as heads are that several scales share


def test_fuse_value_used_twice():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.bn1(x)
        return m.relu(y) - y + torch.relu(m.bn2(x))

    reason = "its only use is not a torch.nn.ReLU module (without hooks): "
    model = TwoNorms(nn.BatchNorm2d(3), forward)
    check_fuse(model, [], {"bn1": reason + "ReLU, sub()", "bn2": reason + "relu()"})


def test_fuse_output_is_the_batch_norm():
    check_fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), [], {"1": "(without hooks): the output"})


class Untraceable(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.sum()) < 1e9 else x


def test_fuse_untraceable():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    check_fuse(Untraceable(body), ["body.1"], {"model": "not traceable"})


def test_fuse_untraceable_with_a_repeated_module():
    """The convolution that comes again stands between the batch norm and the ReLU."""
    conv = nn.Conv2d(3, 3, 1)
    model = Untraceable(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.ReLU())).double()
    eager = copy.deepcopy(model)
    fuse(model)
    assert_same(model, eager, torch.randn(4, 3, 6, 6, dtype=torch.float64))


def test_fuse_keeps_mode_parameters_and_hooks_on_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    weight, calls = model[1].weight, []
    model[1].register_forward_pre_hook(lambda *_: calls.append(1))
    assert fuse(model).fused == ["1"]
    model(torch.randn(2, 3, 6, 6))
    assert model[1].weight is weight and not model[1].training and calls == [1]


HOOKS = {
    "register_forward_hook": lambda module, inputs, output: output - 0.5,
    "register_full_backward_hook": lambda module, grads, outputs: (2 * grads[0],),
    "register_full_backward_pre_hook": lambda module, outputs: (outputs[0] + 1,),
}


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("at", [1, 2], ids=["norm", "relu"])
@pytest.mark.parametrize("kind", HOOKS)
def test_fuse_leaves_what_hooks_see(kind, at, traced):
    """Of the batch norm's output the ReLU would have made something else; the ReLU would be gone."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    getattr(model[at], kind)(HOOKS[kind])
    model = model if traced else Untraceable(model)
    eager, x = copy.deepcopy(model), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    report = fuse(model)
    assert report.fused == []
    assert at == 2 or "it has hooks" in dict(report.skipped)["1" if traced else "body.1"]
    assert_same(model, eager, x)


class Merging(nn.Module):
    """Evaluation mode merges weights, as adapters do; ``train`` returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.merged = nn.BatchNorm2d(3), nn.ReLU(), False

    def train(self, mode: bool = True) -> None:
        super().train(mode)
        self.merged = not mode

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))


def test_fuse_does_not_call_train():
    model = Merging()
    assert fuse(model).fused == ["bn"]
    assert model.training and not model.merged


class Remembers(nn.Module):
    """A forward that leaves something of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.seen = nn.BatchNorm2d(3), nn.ReLU(), None
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.seen = self.relu(self.bn(x))
        return self.seen + torch.rand(1)


def test_fuse_leaves_no_trace():
    model = Remembers()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert fuse(model).fused == ["bn"]
    assert model.seen is None and model.steps == 0 and torch.equal(torch.rand(1), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuse_beside_modules_of_other_kinds():
    """Scripted ones keep their mode and buffers, lazy ones have none yet, and a forward may ask for our classes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu, self.lazy = nn.BatchNorm2d(3), nn.ReLU(), nn.LazyBatchNorm2d()
            self.drop = torch.jit.script(nn.Dropout())
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            y = self.lazy(self.drop(self.relu(self.bn(x))))
            return y if isinstance(self.bn, BatchNormReLU2d | fractal_kernels.BNReLUJoin) else -y

    model = Model()
    assert fuse(model).fused == ["bn"]
    assert model.training and model.drop.training and model.steps == 0


class Optional(nn.Module):
    """Without the option its batch norm has no ReLU."""

    def __init__(self, needed: bool = False) -> None:
        super().__init__()
        self.bn, self.relu, self.needed = nn.BatchNorm2d(3), nn.ReLU(), needed

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None and self.needed:
            raise ValueError("expected skip")
        y = self.bn(x)
        return y if skip is None else self.relu(y) + skip


def test_fuse_without_optional_arguments():
    model, x = Optional().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    eager, report = copy.deepcopy(model), fuse(model)
    assert report.fused == [] and "in some calls, not in others" in dict(report.skipped)["bn"]
    assert_same(model, eager, x)
    assert fuse(Optional(needed=True)).fused == ["bn"]  # what it refuses, nobody calls


class Modes(nn.Module):
    """A ReLU that training uses for something else too."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(x))
        return y + self.relu(-x) if self.training else y


class Doubled(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + self[1](x) + super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_fuse_changes_no_result(training):
    """A ReLU's subclass, its hooks."""
    hooked = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    hooked[1].register_forward_hook(lambda module, inputs, output: output + 1)
    for model in (nn.Sequential(nn.BatchNorm2d(3), Doubled()), hooked):
        model.train(training).double()
        eager, x = copy.deepcopy(model), torch.randn(4, 3, 6, 6, dtype=torch.float64)
        assert fuse(model).fused == [] and model.training == training
        for mode in (True, False):
            assert torch.equal(model.train(mode)(x), eager.train(mode)(x))


def test_fuse_beside_other_uses_of_the_relu():
    """In one mode only, and in a Sequential with a forward of its own."""
    check_fuse(Modes(), ["bn"], {})
    check_fuse(Untraceable(Residual(nn.BatchNorm2d(3), nn.ReLU())), ["body.0"], {"model": "not traceable"})


def test_fuse_beside_joins():
    """A model with joins of this package in it is traced."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join, self.drop = MeanJoin(), DropPathJoin(0.5)
            self.norms, self.bn, self.relu = BNReLUJoin(2, 3), nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.norms([self.join([x, x]), self.drop([x, -x])])))

    class Functions(Branches):
        def forward(self, x: Tensor) -> Tensor:
            joined = fractal_kernels.masked_mean_join([x, self.relu(self.bn(x))])
            return bn_relu_join([joined, x], None, None, None, None, training=True)

    for model in (Branches(), Functions()):
        assert fuse(model) == (["bn"], [])
        assert model(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
