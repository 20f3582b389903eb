"""fuse(): what a model does in some calls alone, what has a forward of its own, and what tracing leaves behind."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections import defaultdict, deque

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
            self.last, self.of, self.drawn = deque([0], maxlen=2), defaultdict(list), torch.Generator()
            self.shapes, self.ring = {1}, [0]
            self.ring.append(self.ring)  # it holds itself

        def forward(self, x: Tensor) -> Tensor:
            self.cache.setdefault("scale", x.mean())
            self.cache["deep"].append(x.shape)
            self.seen += [x]
            self.last.append(x)
            self.shapes.add(x.shape)
            self.ring[0] = x
            self.of[x.shape].append(torch.rand((), generator=self.drawn))
            return self.relu(self.bn(x))

    model = Caching()
    seen, state = model.seen, model.drawn.get_state()
    assert fuse(model).fused == ["bn"]
    assert list(model.last) == [0] and model.last.maxlen == 2 and not model.of
    assert model.shapes == {1} and model.ring[0] == 0 and model.ring[1] is model.ring
    assert torch.equal(model.drawn.get_state(), state)
    assert model.cache == {"deep": [1]} and model.seen is seen and seen == [0]


def test_fuse_between_a_forward_and_its_backward():
    """Buffers that a trace does not change are left as they are: autograd refuses what was written since."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    loss = model(torch.randn(2, 3, 6, 6)).sum()
    assert fuse(model).fused == ["1"]
    loss.backward()


def test_fuse_of_buffers_made_in_inference_mode():
    """Which have no versions."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                self.calls.add_(1)
            return self.relu(self.bn(x))

    with torch.inference_mode():
        model = Counts()
        other = Counts()
        other.register_buffer("once", torch.zeros(1).expand(4))  # which nobody may write
        assert fuse(model).fused == ["bn"] and model.calls == 0
    assert fuse(other).fused == ["bn"] and other.calls == 0


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


# --- what a trace does not see -------------------------------------------------------------------


class Hidden(nn.Module):
    """It cannot be traced, and gives its batch norm's output away."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor, other: nn.Module | None = None) -> Tensor:
        return (self.bn if other is None else other)(x) - 1 if x.sum() < 1e9 else x


class Deeper(nn.Module):
    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.inner = Hidden(bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() < 1e9 else x


class Skips(nn.Module):
    """With its second argument it cannot be traced, and has no ReLU behind its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        h = self.bn(self.conv(x))
        if skip is not None:
            h = h + skip if h.shape[2:] == skip.shape[2:] else h
        return self.relu(h)


class Flag(Skips):
    """The same of a flag."""

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        h = self.bn(self.conv(x))
        if features:
            return h if h.sum() < 1e9 else x
        return self.relu(h)


class Around(nn.Module):
    """``inner`` is a module, or what makes one that holds this one's batch norm too."""

    def __init__(self, inner, function) -> None:
        super().__init__()
        self.bn, self.relu, self.function = nn.BatchNorm2d(3), nn.ReLU(), function
        self.inner = inner if isinstance(inner, nn.Module) else inner(self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def own() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3)


HIDDEN = {
    "of two": lambda: Around(Hidden, lambda m, x: m.inner(m.relu(m.bn(x)))),
    "of one": lambda: Around(Hidden(own()), lambda m, x: m.inner(x) + m.relu(m.inner.bn(x)) + m.bn(x)),
    "deeper": lambda: Around(Deeper(own()), lambda m, x: m.inner(x) + m.relu(m.inner.inner.bn(x)) + m.bn(x)),
    "handed over": lambda: Around(Hidden(own()), lambda m, x: m.inner(m.relu(m.bn(x)), m.bn)),
    "in a layer of PyTorch's": lambda: Around(nn.DataParallel, lambda m, x: m.inner(m.relu(m.bn(x)))),
    "with an argument": lambda: Around(Skips(), lambda m, x: m.inner(x, x) + m.bn(x)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("around", [nn.Sequential, Untraceable])
@pytest.mark.parametrize("case", HIDDEN)
def test_fuse_leaves_what_is_used_where_it_does_not_see(case, around, training):
    model, x = around(HIDDEN[case]()).train(training), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)
    assert fuse(model).fused == []
    torch.testing.assert_close(model(x), expected(x))


class Late(Skips):
    """The trace fails between two uses."""

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        h = self.bn(self.conv(x))
        y = self.relu(h)
        if features and x.shape[1] == 3:
            return h + y
        return y


class Both(Skips):
    """Two flags together."""

    def forward(self, x: Tensor, features: bool = False, raw: bool = False) -> Tensor:
        h = self.bn(self.conv(x))
        return h if features and raw else self.relu(h)


class Three(Skips):
    """As many flags as there are traces for."""

    def forward(self, x: Tensor, features: bool = False, b: bool = False, c: bool = False) -> Tensor:
        h = self.bn(self.conv(x))
        return h if features and b and c else self.relu(h)


class Many(Skips):
    """More flags than there are traces for."""

    def forward(self, x: Tensor, features: bool = False, b: bool = False, c: bool = False, d: bool = False) -> Tensor:
        h = self.bn(self.conv(x))
        return h if features and b and c and d else self.relu(h)


@pytest.mark.parametrize("model", [Flag, Late, Both, Three, Many])
def test_fuse_leaves_what_some_flags_use_in_another_way(model):
    model, x = model(), torch.randn(2, 3, 4, 4)
    expected, report = copy.deepcopy(model), fuse(model)
    reason = "no call of it" if isinstance(model, Many) else "in some calls"
    assert report.fused == [] and reason in dict(report.skipped)["bn"]
    flags = len(inspect.signature(model.forward).parameters) - 1
    for values in itertools.product((False, True), repeat=flags):
        torch.testing.assert_close(model(x, *values), expected(x, *values))


def test_fuse_beside_a_call_that_fails_later():
    """What had returned by then is as in every other call."""

    class Model(Skips):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 1), own(), nn.ReLU())

        def forward(self, x: Tensor, loss: bool = False) -> Tensor:
            y = self.relu(self.bn(self.body(x)))
            if loss:
                raise ValueError("expected a target")
            return y

    report = fuse(Model())
    assert report.fused == ["body.1"] and "ended before its use" in dict(report.skipped)["bn"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuse_of_torchscript():
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    scripted = torch.jit.script(copy.deepcopy(body))
    assert fuse(scripted).fused == [] and "TorchScript" in str(fuse(scripted))
    model = nn.Sequential(body, nn.Conv2d(4, 3, 1), scripted)
    assert fuse(model).fused == ["0.1"]


def test_every_batch_norm_is_in_the_report():
    left = dict(fuse(nn.Sequential(nn.DataParallel(own()), own())).skipped)
    assert "DataParallel, which holds it" in left["0.module"] and "the output" in left["1"]
    report = fuse(nn.Sequential(Hidden(own()), own(), nn.ReLU()))
    left = dict(report.skipped)
    assert report.fused == ["1"] and "not traceable" in left["0"] and "no call of it was seen" in left["0.bn"]


def test_fuse_puts_back_what_is_outside_of_a_module():
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.bn, self.relu, self.parent = own(), nn.ReLU(), [parent]

        def forward(self, x: Tensor) -> Tensor:
            self.parent[0].calls += 1
            return self.relu(self.bn(x))

    model = Around(nn.Identity(), lambda m, x: m.child(x) if x.sum() < 1e9 else x)
    model.calls, model.child = 0, Child(model)
    assert fuse(model).fused == ["child.bn"] and model.calls == 0
