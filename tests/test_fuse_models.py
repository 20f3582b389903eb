"""fuse(): ReLUs that do other work too, models that cannot be traced as a whole, flags, what compilers make of it."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_fuse import ResNet, Untraceable, check_fuse
from test_modules import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fractal_kernels import fuse


class Base(nn.Module):
    """A convolution, a batch norm, a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class InALeaf(Base):
    """Its ReLU is a layer's of PyTorch's own, inside of which no trace looks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3, 1, 8, 0.0, activation=self.relu, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(super().forward(x).flatten(2).transpose(1, 2)) - 1


class Direct(Base):
    """A ReLU that is called by its method, which no trace sees."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu.forward(super().forward(x) - 1)


@pytest.mark.parametrize("model", [InALeaf, Direct])
def test_a_relu_that_does_other_work_too(model):
    check_fuse(model(), ["bn"], {})


def test_what_was_changed_in_place_since():
    """The ReLU's output comes to it again, and is another tensor to it than it was."""

    class Again(Base):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            h -= 0.5
            return self.relu(h)

    model = Again().eval()
    eager, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    assert fuse(model).fused == ["bn"]
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.testing.assert_close(model(x), eager(x))


def test_other_methods_use_the_relu():
    class Embeds(Base):
        def embed(self, x: Tensor) -> Tensor:
            return self.relu(self.forward(x) - 1)

    model = Embeds().eval()
    expected, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    assert fuse(model).fused == ["bn"]
    for grads in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with grads:
            torch.testing.assert_close(model.embed(x), expected.embed(x))


def test_a_relu_under_two_names():
    """It is one module: whoever holds it has the one that knows the batch norm."""

    class Holds(Base):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([self.relu])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](self.bn(self.conv(x))) + self.relu(x)

    model = check_fuse(Holds(), ["bn"], {})
    assert model.relu is model.layers[0]


# --- not traceable as a whole ---------------------------------------------------------------------


class Checked(Base):
    """As libraries of models write it: a check of the shape, then a list of layers, then a block that is traceable."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = Untraceable(nn.Conv2d(3, 3, 1))  # holds no batch norm, and cannot be traced
        self.blocks = nn.ModuleList([Base(), Untraceable(Base())])
        self.last = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError
        x = super().forward(x)
        for block in self.blocks:
            x = block(self.pos(x))
        return self.last(x)


def test_the_modules_of_what_cannot_be_traced():
    """Its blocks; of its own layers nothing is known."""
    errors = {"model": "TraceError", "blocks.1": "TypeError"}
    skipped = {name: f"not traceable ({error} at test_fuse" for name, error in errors.items()}
    skipped |= dict.fromkeys(["bn", "last"], "no call of it was seen")
    check_fuse(Checked(), ["blocks.0.bn", "blocks.1.body.bn"], skipped)


def test_around_a_module_that_cannot_be_traced():
    """Without a batch norm in it, it is passed over; with one, what is around it is traced all the same."""

    class Around(Base):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = Untraceable(body)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(super().forward(x))

    check_fuse(Around(nn.Conv2d(3, 3, 1)), ["bn"], {})
    check_fuse(Around(Base()), ["bn", "body.body.bn"], {"body": "not traceable"})


def test_what_a_trace_around_sees_counts():
    """Not what its modules would do alone: under other flags, or where they hold a batch norm twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.pos = Flagged(raw=True), Untraceable(nn.Conv2d(3, 3, 1))
            self.norms = nn.ModuleList([self.raw.bn])

        def forward(self, x: Tensor) -> Tensor:
            return self.raw(self.pos(x))

    check_fuse(Twice(), ["raw.bn"], {})


def test_a_batch_norm_of_two_modules_of_what_cannot_be_traced():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Base(), nn.Sequential(nn.Conv2d(3, 3, 1))
            self.b.append(self.a.bn)

        def append(self, layer: nn.Module) -> nn.Module:
            self.b.append(layer)
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if float(x.sum()) < 1e9 else x

    check_fuse(Tied(), [], {"model": "not traceable", "a.bn": "in some calls"})
    check_fuse(Tied().append(nn.ReLU()), [], {"model": "not traceable", "a.bn": "used elsewhere"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_models():
    model = torch.compile(ResNet(shared=True), backend="eager")
    assert fuse(model).fused == [f"_orig_mod.{name}" for name in ("stem.1", "blocks.0.bn1", "blocks.1.bn1")]
    averaged = torch.optim.swa_utils.AveragedModel(Base())
    assert fuse(averaged).fused == ["module.bn"]


def test_batch_norms_that_are_converted_later():
    """The model's own ReLU does its work again."""
    model, x = ResNet(shared=True).eval(), torch.randn(4, 3, 6, 6)
    expected = model(x)
    fuse(model)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))(x), expected)
    stem = model.stem
    stem[0], stem[1] = torch.nn.utils.fuse_conv_bn_eval(stem[0], stem[1]), nn.Identity()
    torch.testing.assert_close(model(x), expected)
    fuse(model)  # so that it knows which ReLUs have something to do for a compiler
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_traced_by_tools_of_others():
    """Whose leaves are our modules."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, (nn.BatchNorm2d, nn.Conv2d))

    model, x = Base().eval(), torch.randn(2, 3, 4, 4)
    fuse(model)
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), model(x))


# --- arguments and chance -------------------------------------------------------------------------


class Flagged(Base):
    def __init__(self, raw: bool) -> None:
        super().__init__()
        self.raw = raw

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        h = self.bn(self.conv(x))
        if features:
            return h if self.raw else self.relu(h)
        return self.relu(h)


def test_flags():
    """A flag that the forward asks for is no argument of a trace: both values are traced."""
    for raw, fused in ((False, ["bn"]), (True, [])):
        model = Flagged(raw)
        eager, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
        assert fuse(model).fused == fused
        for features in (False, True):
            torch.testing.assert_close(model(x, features), eager(x, features))


def test_chance_goes_on_as_if_nothing_had_been_traced():
    class Draws(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (random.random() + np.random.rand() + torch.rand(()))

    model = Draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    assert fuse(model).fused == ["bn"]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


# --- compilers ------------------------------------------------------------------------------------


class Broken(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        torch._dynamo.graph_break()
        return self.relu(h) + self.relu(x)


def relus_of(model: nn.Module, x: Tensor) -> int:
    """How many ReLUs are left in the graphs that the compiler is given."""
    found = []

    def backend(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(n for n in nodes if n.target in (F.relu, torch.relu, torch.relu_))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=not isinstance(model, Broken))
    torch.testing.assert_close(compiled(x), model(x))
    return len(found)


@pytest.mark.parametrize("training, shared, left", [(True, True, 4), (False, False, 2)])
def test_compiled(training, shared, left):
    """The compiler has no ReLU that has nothing left to do; one that does other work too does all of it."""
    model, x = ResNet(shared).double().train(training), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    eager = copy.deepcopy(model)
    fuse(model)
    assert relus_of(copy.deepcopy(model), x) == left and relus_of(copy.deepcopy(eager), x) == 5
    torch._dynamo.reset()
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True), eager, x)


class Elsewhere(Base):
    """Its ReLU has a second place, in which a network may use it that is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([self.relu])


class OfALeaf(InALeaf):
    """The layer alone holds it."""

    def __init__(self) -> None:
        super().__init__()
        del self.relu

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer.activation(self.bn(self.conv(x)))
        return self.layer(h.flatten(2).transpose(1, 2)) - 1


@pytest.mark.parametrize("kind", [InALeaf, OfALeaf, Direct, Elsewhere, Base])
def test_compiled_by_what_else_the_relu_does(kind):
    model, x = kind().eval(), torch.randn(2, 3, 4, 4)
    (relu,) = (m for m in model.modules() if isinstance(m, nn.ReLU))
    eager = copy.deepcopy(model)
    assert fuse(model).fused == ["bn"] and relu.alone == (kind is Base)
    fuse(model)  # which sees the same, with nothing left to fuse
    assert relu.alone == (kind is Base)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), eager(x))


def vgg() -> nn.Sequential:
    layers = [[nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()] for _ in range(2)]
    return nn.Sequential(*layers[0], *layers[1], nn.Conv2d(3, 3, 1)).double()


@pytest.mark.parametrize("segments", [2, 3, 7])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_between_a_batch_norm_and_its_relu(reentrant, segments):
    """What is computed again finds the mark that the first time found."""
    model, x = vgg(), torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    eager = copy.deepcopy(model)
    assert len(fuse(model).fused) == 2
    results = []
    for net in (model, eager):
        x.grad = None
        out = checkpoint_sequential(net, segments, x, use_reentrant=reentrant)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in net.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_compiled_with_a_checkpoint():
    """A compiler refuses what changes a tensor's attributes in there."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = vgg()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    eager = copy.deepcopy(model)
    assert len(fuse(model).fused) == 2
    torch._dynamo.reset()
    results = []
    for net, call in ((eager, eager), (model, torch.compile(model, backend="aot_eager", fullgraph=True))):
        out = call(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_compiled_with_a_break_between():
    model, x = Broken().eval(), torch.randn(2, 3, 4, 4)
    eager = copy.deepcopy(model)
    assert fuse(model).fused == ["bn"]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), eager(x))


def test_exported():
    model, x = ResNet(shared=False).eval(), torch.randn(4, 3, 6, 6)
    eager = copy.deepcopy(model)
    fuse(model)
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert names == [str(node.target) for node in torch.export.export(eager, (x,), strict=strict).graph.nodes]
        torch.testing.assert_close(program.module()(x), eager(x))
