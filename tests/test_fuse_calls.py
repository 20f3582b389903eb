"""fuse(): what a model does in some calls alone, what has a forward of its own, and what tracing leaves behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_fuse import Untraceable
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_list

from fractal_kernels import fuse


class Shared(nn.Module):
    """One ReLU for two batch norms, of which the second does not have it in every call."""

    def __init__(self, only: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu, self.only = nn.ReLU(), only

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        h = self.conv2(self.relu(self.bn1(self.conv1(x))))
        if self.only == "dropout" and self.training:
            h = torch.nn.functional.dropout(h, 0.0)
        if (self.only == "training" and not self.training) or (self.only == "optional" and more is None):
            return h
        return self.relu(self.bn2(h))


@pytest.mark.parametrize("only", ["dropout", "training", "optional"])
@pytest.mark.parametrize("training", [True, False])
def test_fuse_keeps_a_relu_that_a_batch_norm_needs_in_some_calls(only, training):
    model, x = Shared(only), torch.randn(2, 3, 4, 4)
    fused = copy.deepcopy(model)
    fuse(fused)
    for more in (None, x):
        out, expected = (net.train(training)(x, more) for net in (fused, model))
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("at", ["bn", "relu", "body"])
def test_fuse_leaves_what_has_a_forward_of_its_own(at, traced):
    """As hooks of other libraries wrap it."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = (nn.Sequential if traced else Untraceable)(body)
    module = {"bn": body[1], "relu": body[2], "body": body}[at]
    module.forward = lambda x, was=module.forward: was(x) - 1
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    assert bool(fuse(model).fused) == (traced and at == "body")  # a trace sees what is inside
    torch.testing.assert_close(model(x), expected)


def test_fuse_leaves_nothing_in_containers():
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu, self.cache, self.seen = nn.BatchNorm2d(3), nn.ReLU(), {"deep": [1]}, [0]

        def forward(self, x: Tensor) -> Tensor:
            self.cache.setdefault("scale", x.mean())
            self.cache["deep"].append(x.shape)
            self.seen += [x]
            return self.relu(self.bn(x))

    model = Caching()
    seen = model.seen
    assert fuse(model).fused == ["bn"]
    assert model.cache == {"deep": [1]} and model.seen is seen and seen == [0]


def test_fuse_leaves_replaced_children_and_modes():
    class Assigns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu, self.last = nn.BatchNorm2d(3), nn.ReLU(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.last = nn.Flatten()
            return self.last(self.relu(self.bn(x)))

    model = Assigns().eval()
    fuse(model)
    assert type(model.last) is nn.Identity and not any(m.training for m in model.modules())


class Frozen(dict):
    """As configurations of other libraries are: it lets nobody change it."""

    def clear(self) -> None:
        raise TypeError("frozen")


def test_fuse_beside_containers_of_other_classes():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()
            self.options, self.sizes = Frozen(a=1), immutable_list([1])
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.relu(self.bn(x))

    model = Counts()
    assert fuse(model).fused == ["bn"]
    assert all(m.training for m in model.modules()) and model.calls == 0
    assert model.options == {"a": 1} and model.sizes == [1]


def test_fuse_beside_scripted_containers():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Untraceable(nn.ModuleDict({"body": body, "scripted": torch.jit.script(Listed())})["body"])
        model.scripted = torch.jit.script(Listed())
    assert len(fuse(model).fused) == 1


def test_fuse_leaves_a_relu_with_a_hook_on_its_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.5,))
    assert fuse(model).fused == []


def test_fuse_leaves_a_batch_norm_that_is_used_alone_too():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.bn = self.body[1]

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.bn(y - 1) if y.sum() < 1e9 else y

    assert fuse(Twice()).fused == []
