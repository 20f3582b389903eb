"""torch.compile, opcheck and autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, Data, draw
from fractalnet import FractalNet, Path
from fractalnet.drop_path import full_path
from functorch.compile import make_boxed_compiler
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fractal_kernels import (
    BatchNormReLU2d,
    BNReLUJoin,
    ConvBNReLU,
    DropPathJoin,
    MeanJoin,
    bn_relu,
    bn_relu_join,
    conv_bn_relu,
    fractal_block,
    masked_mean_join,
    use_backend,
)
from fractal_kernels.library import Flags

OPS = torch.ops.fractal_kernels


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def join(data: Data, case: Case, backend: str | None = None) -> Tensor:
    args = (data.ys, data.weights, data.biases, data.running_means, data.running_vars, data.mask, case.training)
    return bn_relu_join(*args, **case.flags, backend=backend)


def assert_compiled_equals_eager(
    function: Callable[[Data], Tensor], data: Data, compiler: str = "aot_eager", atol: float = 1e-6, **options
) -> None:
    """Output, gradients and running statistics, twice, so that a second call sees what the first one updated."""
    compiled = torch.compile(function, backend=compiler, fullgraph=True, **options)
    eager, other = data.copy(), data.copy()
    for _ in range(2):
        a, b = function(eager), compiled(other)
        torch.testing.assert_close(b, a, rtol=0, atol=atol)
        assert b.stride() == a.stride()
        if data.leaves:
            grads = [torch.autograd.grad(out, d.leaves, d.grad) for out, d in ((a, eager), (b, other))]
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(y, x, rtol=0, atol=10 * atol)
        for x, y in zip(eager.running_means or [], other.running_means or [], strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=atol)
        for x, y in zip(eager.running_vars or [], other.running_vars or [], strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=atol)


CASES = [
    Case(3, mask="sample", stats="live"),
    Case(3, mask="batch", pool="before"),
    Case(2, activation="output", reduction="sum", pool="after"),
    Case(2, training=False, mask="sample"),
    Case(2, affine=False, tracked=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channel_slice"])
def test_bn_relu_join(case, layout, backend):
    data = draw(case, torch.float32, layouts=[layout])
    assert_compiled_equals_eager(lambda d: join(d, case, backend), data)


@pytest.mark.parametrize("mask", ["none", "batch", "sample"])
def test_masked_mean_join(mask, backend):
    data = draw(Case(3, affine=False, normalise=False, mask=mask), torch.float32)
    assert_compiled_equals_eager(lambda d: masked_mean_join(d.ys, d.mask, backend=backend), data)


@pytest.mark.parametrize("training", [True, False])
def test_bn_relu_and_conv_bn_relu(training, backend):
    def norm(d: Data) -> Tensor:
        running = d.running_means[0], d.running_vars[0]
        return bn_relu(d.ys[0], d.weights[0], d.biases[0], *running, training, backend=backend)

    def conv(d: Data) -> Tensor:
        running = d.running_means[0], d.running_vars[0]
        return conv_bn_relu(d.ys[0], kernel, d.weights[0], d.biases[0], *running, training, backend=backend)

    kernel = torch.randn(5, 5, 3, 3)
    data = draw(Case(1), torch.float32)
    assert_compiled_equals_eager(norm, data)
    assert_compiled_equals_eager(conv, data, atol=1e-5)


def test_inductor():
    """The default compiler, around the ops: what it fuses before and after must not change the result."""
    case = Case(3, mask="sample", pool="before")
    data = draw(case, torch.float32)

    def function(d: Data) -> Tensor:
        ys = [torch.tanh(y) * 2 for y in d.ys]
        args = (d.weights, d.biases, d.running_means, d.running_vars, d.mask, True)
        return bn_relu_join(ys, *args, **case.flags) * 3 + 1

    assert_compiled_equals_eager(function, data, "inductor", atol=1e-5)


class Net(nn.Module):
    """One of every module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, 8)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.join = BNReLUJoin(3, 8, pool="before")
        self.norm = BatchNormReLU2d(8, momentum=None)
        self.mean = MeanJoin()
        self.drop = DropPathJoin(0.3, "sample")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.join([conv(x) for conv in self.convs], mask)
        return self.drop([self.mean([x, self.norm(x)]), x])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_modules(compiler):
    torch.manual_seed(0)
    net = Net()
    other = Net()
    other.load_state_dict(net.state_dict())
    net.drop.p = other.drop.p = 0.0  # random numbers differ between compilers
    compiled = torch.compile(other, backend=compiler, fullgraph=True)
    for step in range(3):
        net.train(step < 2)
        other.train(step < 2)
        x = torch.randn(4, 3, 8, 8)
        mask = torch.rand(3, 4) < 0.7
        a, b = net(x, mask), compiled(x, mask)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
        for out in (a, b):
            out.square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-3)
    for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    other.drop.p = 0.3
    assert compiled(x, mask).isfinite().all()


@pytest.mark.parametrize("case", [Case(2, mask="sample"), Case(2, pool="after", training=False)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_changing_batch_compiles_once(case, layout):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda d: join(d, case), backend=counter, fullgraph=True, dynamic=True)
    graphs = 0  # of the first call
    for n in (4, 7, 2, 16, 5):
        data = draw(case, torch.float32, (n, 5, 6, 7), [layout])
        a, b = data.copy(), data.copy()
        eager, out = join(a, case), compiled(b)
        torch.testing.assert_close(out, eager, rtol=0, atol=1e-6)
        for x, y in zip(
            torch.autograd.grad(eager, a.leaves, a.grad), torch.autograd.grad(out, b.leaves, b.grad), strict=True
        ):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, f"compiled again for a batch of {n}"


def test_a_smaller_last_batch_of_drop_path_per_sample():
    """The size of the mask is one that the compiler does not know."""
    module = DropPathJoin(0.5, "sample")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for n in (8, 8, 5, 3):
        out = compiled([torch.full((n, 2, 2, 2), 1.0), torch.full((n, 2, 2, 2), 3.0)])
        assert out.shape == (n, 2, 2, 2) and set(out.unique().tolist()) <= {1.0, 2.0, 3.0}


@pytest.mark.parametrize("where", ["input", "affine"])
def test_one_tensor_twice(where):
    def function(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        ys = [a, a, b] if where == "input" else [a, b, a + b]
        return bn_relu_join(ys, [w, w, w], None, None, None, training=True) + masked_mean_join(ys)

    leaves = [torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.rand(3)]
    results = []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        mine = [t.clone().requires_grad_() for t in leaves]
        out = f(*mine)
        results.append([out, *torch.autograd.grad(out.square().sum(), mine)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_tensor_twice_in_a_block():
    path = torch.ones(4, 3, dtype=torch.bool)

    def function(x: Tensor, first: Tensor, middle: Tensor, second: Tensor, w: Tensor) -> Tensor:
        return fractal_block(x, [first, second, middle, second], w, w, path).out

    shapes = (2, 3, 4, 4), (6, 3, 3, 3), (4, 2, 3, 3), (2, 2, 3, 3), (7, 2)
    leaves, results = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = f(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_a_block_of_one_channel_with_dropout():
    """Where one channel is contiguous in any layout, what is saved is as the fake says all the same."""
    path = torch.ones(1, 1, dtype=torch.bool)
    arguments = (torch.randn(2, 1, 4, 4), [torch.randn(4, 1, 3, 3)], *[None] * 5, path, False, None, 0.3, 1e-5, 10)
    torch.library.opcheck(OPS.block_forward.default, (*arguments, True, True, "cpu", ""), test_utils="test_faketensor")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_noise_of_compiled_blocks(compiler):
    """Of two calls in one graph each has its own; a checkpoint that computes one again has that again."""
    torch.manual_seed(0)
    net, x = FractalNet(5, 2, (16,), image_size=8, dropout=[0.5]), torch.randn(4, 3, 8, 8)
    path = full_path(1, 2)

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(3)
        out = torch.compile(function, fullgraph=True, backend=compiler)(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), net.parameters())]

    plain = gradients(lambda x: net(x, path))
    for got, want in zip(gradients(lambda x: checkpoint(net, x, path, use_reentrant=False)), plain, strict=True):
        torch.testing.assert_close(got, want)
    both = torch.compile(lambda x: net(x, path) - net(x, path), fullgraph=True, backend=compiler)
    assert both(x).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["the host", "the device", "evaluation"])
def test_graphs_of_the_compiler_have_no_path_of_the_host(where):
    """CUDA graphs, which would replay the path they were recorded with: an operator with the tag stays out of them."""
    targets = []

    @make_boxed_compiler
    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        targets.extend(node.target for node in graph.graph.nodes if "fractal_kernels" in str(node.target))
        return graph.forward

    with torch.device("meta"):
        net, x = FractalNet(10, 2, (4,), image_size=8), torch.empty(2, 3, 8, 8)
    path = Path(full_path(1, 2).keep.to("cpu" if where == "the host" else "meta"))
    options = {} if where == "evaluation" else {"path": path, "dense": where == "the device"}
    compiler = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(net.train(where != "evaluation"), backend=compiler, fullgraph=True)
    with use_backend("reference"):
        compiled(x, **options).sum().backward()
    assert [target.name().split("::")[1].split(".")[0] for target in targets] == ["block_forward", "block_backward"]
    assert all((torch.Tag.cudagraph_unsafe in target.tags) == (where == "the host") for target in targets)


def test_a_changing_image_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_mean_join, backend=counter, fullgraph=True, dynamic=True)
    for n, h, w in ((2, 4, 5), (3, 7, 6), (5, 9, 9), (8, 3, 4)):
        ys = [torch.randn(n, 6, h, w).to(memory_format=torch.channels_last) for _ in range(3)]
        mask = torch.rand(3, n) < 0.7
        assert torch.equal(compiled(ys, mask), masked_mean_join(ys, mask))
    assert counter.frame_count == 1


def test_a_changing_mask_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(masked_mean_join, backend=counter, fullgraph=True)
    ys = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    for i in range(1, 8):
        mask = torch.tensor([bool(i & 1), bool(i & 2), bool(i & 4)])
        assert torch.equal(compiled(ys, mask), masked_mean_join(ys, mask))
    assert counter.frame_count == 1


# --- opcheck -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "mask"),  # which says nothing of strides
    [
        *((layout, "sample") for layout in ("channels_last", "contiguous", "channel_slice", "swapped")),
        *(("channels_last", mask) for mask in ("none", "batch")),
    ],
)
def test_opcheck(layout, mask, backend):
    cases = [Case(2, mask=mask), Case(2, mask=mask, pool="before"), Case(2, False, mask=mask, normalise=False)]
    for case in cases[:1] if backend == "reference" else cases:  # all backends' operators allocate alike
        d = draw(case, torch.float32, layouts=[layout])
        ys = [y.detach() for y in d.ys]
        flags = int(Flags.RELU_BRANCH | (Flags.POOL_BEFORE if case.pool else 0))
        vectors = [[t.detach() for t in ts or []] for ts in (d.running_means, d.running_vars, d.weights, d.biases)]
        head = (d.grad, ys, d.mask, *vectors)
        torch.library.opcheck(OPS.join_forward, (ys, d.mask, *vectors, 1e-5, flags, backend))
        sums: list[Tensor] = []
        if case.normalise and not case.pool:  # of which statistics know nothing: the same call
            running = [t.clone() for t in (*vectors[0], *vectors[1])]
            for moved, momenta in (([], None), (running, None), (running, torch.tensor([0.1, 1.0]))):
                torch.library.opcheck(OPS.channel_stats, (ys, d.mask, moved, 0.1, momenta, backend))
        if case.normalise:
            torch.library.opcheck(OPS.join_backward_reduce, (*head, 1e-5, flags, backend))
            sums = [*OPS.join_backward_reduce(*head, 1e-5, flags, backend), torch.tensor([84.0, 84.0])]
        torch.library.opcheck(OPS.join_backward_apply, (*head, sums, 2, 1e-5, flags, backend))
    torch.library.opcheck(OPS.join_backward_apply, (d.grad, [], d.mask, [], [], [], [], [], 2, 0.0, 0, backend))


# --- autocast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_autocast_conv_bn_relu(training, backend):
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    mean, var = torch.zeros(8), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        out = conv_bn_relu(x, conv.weight, weight, bias, mean, var, training, backend=backend)
    assert out.dtype == y.dtype == torch.bfloat16
    expected = nn.functional.batch_norm(y.float(), torch.zeros(8), torch.ones(8), weight, bias, training).relu()
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-5)
    out.float().sum().backward()
    assert weight.grad.dtype == conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_mixed_dtypes(dtype, backend):
    """Branches of mixed dtypes meet in the wider one, as in a + b, and each gradient has its branch's dtype."""
    a, b = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        mean = masked_mean_join([a, b], torch.tensor([True, True]), backend=backend)
        join = bn_relu_join([b, a], None, None, None, None, None, True, backend=backend)
    assert mean.dtype == join.dtype == torch.float32
    torch.testing.assert_close(mean, (a + b.float()) / 2)
    (mean.sum() + join.sum()).backward()
    assert a.grad.dtype == torch.float32 and b.grad.dtype == dtype


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nothing_requires_grad(k, backend):
    """Whatever number of arguments a call has, in evaluation and in training."""
    ys, module = [torch.randn(2, 3, 4, 4) for _ in range(k)], BNReLUJoin(k, 3, affine=False)
    with torch.no_grad():
        mean = torch.compile(lambda t: masked_mean_join(t, backend=backend), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(mean(ys), sum(ys) / k)
        for training in (True, False):
            eager = copy.deepcopy(module.train(training))
            torch.testing.assert_close(torch.compile(module, backend="aot_eager")(ys), eager(ys))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_network_in_evaluation(columns):
    import fractalnet

    net, x = fractalnet.FractalNet(5, columns, (4,), image_size=8).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="aot_eager")(x), net(x))


def test_autocast_under_compile(backend):
    x, kernel = torch.randn(4, 3, 8, 8), torch.randn(8, 3, 3, 3)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return conv_bn_relu(x, kernel, None, None, None, None, True, backend=backend)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), function(x), rtol=2**-7, atol=1e-2)
