"""The convolution of the column step on the CPU: conv_bn_relu, its module, fuse(), composed blocks."""

from __future__ import annotations

import copy

import fractalnet
import pytest
import torch
import torch.nn.functional as F
from fractalnet.drop_path import column_path, full_path
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fractal_kernels as fk
from fractal_kernels import block_rows, cpu_conv
from fractal_kernels.ops import weights

pytestmark = pytest.mark.usefixtures("cpu_conv_here")
LAST = torch.channels_last


@pytest.fixture
def used(monkeypatch):
    """Whether our convolution was chosen, for every forward and backward of one."""
    choose, chosen = cpu_conv.fits, []

    def fits(*operands):
        chosen.append(choose(*operands))
        return chosen[-1]

    monkeypatch.setattr(cpu_conv, "fits", fits)
    return chosen


def operands(n=4, c=16, k=32, size=9, memory_format=LAST):
    torch.manual_seed(0)
    x = torch.randn(n, c, size, size).to(memory_format=memory_format).requires_grad_()
    weight = (torch.randn(k, c, 3, 3) / c).to(memory_format=memory_format).requires_grad_()
    return x, weight


def step(x, weight, training=True):
    stats = torch.zeros(weight.shape[0]), torch.ones(weight.shape[0])
    return fk.conv_bn_relu(x, weight, None, None, *stats, training)


def expected(x, weight, training=True):
    stats = torch.zeros(weight.shape[0]).double(), torch.ones(weight.shape[0]).double()
    return F.batch_norm(F.conv2d(x.double(), weight.double(), padding=1), *stats, training=training).relu()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_equals_the_definition(training, needs, used):
    x, weight = operands()
    x.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    y, want = step(x, weight, training), expected(x, weight, training)
    assert y.is_contiguous(memory_format=LAST)
    grad = torch.randn_like(y)
    leaves = [t for t in (x, weight) if t.requires_grad]
    got = torch.autograd.grad(y, leaves, grad)
    for a, b in zip((y, *got), (want, *torch.autograd.grad(want, leaves, grad.double())), strict=True):
        assert float((a - b).detach().norm()) <= 1e-5 * float(b.detach().norm())
    assert used and all(used)


@pytest.mark.parametrize(
    "case",
    [
        lambda: operands(memory_format=torch.contiguous_format),
        lambda: operands(c=20, k=20),
        lambda: [t.detach().double().requires_grad_() for t in operands()],
    ],
    ids=["contiguous", "20 channels", "float64"],
)
def test_is_the_library_s_elsewhere(case, used):
    x, weight = case()
    y, want = step(x, weight), expected(x, weight)
    assert not any(used)
    assert y.stride() == F.conv2d(x, weight, padding=1).stride()
    assert float((y - want).detach().norm()) <= 1e-5 * float(want.detach().norm())


def test_is_that_of_the_backend_that_was_named(used):
    fk.conv_bn_relu(*operands(), *[None] * 4, True, backend="reference")
    assert used == [False]


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [nn.Conv2d, Doubled])
def test_fuse_leaves_other_convolutions(kind):
    """Padded by other values than zeros, or of a class of their own."""
    net = nn.Sequential(kind(16, 16, 3, padding=1, bias=False, padding_mode="circular")).to(memory_format=LAST)
    x, expected = operands()[0], net(operands()[0])
    fk.fuse(net, recompute=True)
    torch.testing.assert_close(net(x), expected)


def test_the_backward_of_a_gradient_in_another_layout():
    (x, weight), grad = (t.detach() for t in operands()), torch.randn(4, 32, 9, 9)
    backward = torch.ops.fractal_kernels.conv3x3_backward
    found = (backward(g, x, weight, True, True, "cpu") for g in (grad, grad.to(memory_format=LAST)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_fuse_leaves_a_step_that_computes_again():
    model = nn.Sequential(fk.ConvBNReLU(3, 8, recompute=True))
    fk.fuse(model)
    assert model[0].conv.recompute


def test_one_channel_keeps_the_layout():
    """Images of one channel are in both layouts; what follows is to stay contiguous where the model is."""
    x, weight = operands(c=1, memory_format=torch.contiguous_format)
    assert step(x, weight).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, used, monkeypatch):
    """In its dtype; what it does not cast is the library's. Gradients are in the dtypes of what they are of."""
    monkeypatch.setattr(cpu_conv, "_MATRICES", False)
    x, weight = operands()
    with torch.autocast("cpu", dtype):
        y, again = step(x, weight), step(x.detach().to(dtype), weight.detach())
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, again) and torch.equal(y, compiled)
    exact = [t.detach().double().requires_grad_() for t in (x.to(dtype), weight)]
    want, grad = expected(*exact), torch.randn_like(y)
    got, wanted = torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(want, exact, grad.double())
    for a, b in zip((y, *got), (want, *wanted), strict=True):
        assert float((a - b).detach().norm()) <= 1e-2 * float(b.detach().norm())
    assert all(g.dtype == torch.float32 for g in got) and used and all(used)
    used.clear()
    with torch.autocast("cpu", dtype):
        assert step(*(t.detach().double() for t in (x, weight))).dtype == torch.float64
    assert not used


@pytest.mark.parametrize("channels", [16, 20])
def test_operators(channels):
    """Schemas, fakes and layouts, also of a case that the operators leave to the library."""
    x, weight = (t.detach() for t in operands(c=channels, k=2 * channels))
    ops, grad = torch.ops.fractal_kernels, torch.randn(4, 2 * channels, 9, 9).to(memory_format=LAST)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.conv3x3.default, (x, weight, "cpu"), test_utils=checks)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.conv3x3_backward.default, (grad, x, weight, *needs, "cpu"), test_utils=checks)
        mixed = grad.bfloat16(), x.bfloat16(), weight, *needs, "cpu"
        torch.library.opcheck(ops.conv3x3_backward.default, mixed, test_utils=checks)
    torch.library.opcheck(ops.conv3x3.default, (x.bfloat16(), weight, "cpu"), test_utils=checks)


def test_operators_give_channels_last_of_any_layout():
    """As their fakes say, where it is the library that computes."""
    y = torch.ops.fractal_kernels.conv3x3(*operands(memory_format=torch.contiguous_format), "reference")
    assert y.is_contiguous(memory_format=LAST)


def test_compiles_without_graph_breaks():
    x, weight = operands()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x, weight).square().sum(), (x, weight)) for f in (step, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_module_and_fuse(used):
    torch.manual_seed(0)
    eager = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1)
    ).to(memory_format=LAST)
    fused, module = copy.deepcopy(eager), fk.ConvBNReLU(16, 32).to(memory_format=LAST)
    assert fk.fuse(fused).fused == ["1"]
    module.conv.load_state_dict(eager[0].state_dict())
    assert repr(fused[0]) == repr(eager[0]) and type(fused[3]) is nn.Conv2d
    x, _ = operands()
    want = eager[:3](x)
    want.square().sum().backward()
    for net in (fused[:3], module):
        used.clear()
        y = net(x)
        y.square().sum().backward()
        assert used and all(used)
        assert torch.allclose(y, want, atol=1e-4)
        own, theirs = next(net.parameters()).grad, eager[0].weight.grad
        assert float((own - theirs).norm()) <= 1e-3 * float(theirs.norm())  # a ReLU may differ
    assert list(fused.state_dict()) == list(eager.state_dict())


def test_fuse_of_a_convolution_alone(used):
    """Whatever follows it, and in a model that cannot be traced too."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).tanh() if x.sum() < 1e9 else x

    eager, (x, _) = Alone().to(memory_format=LAST), operands()
    net = copy.deepcopy(eager)
    fk.fuse(net)
    used.clear()
    assert torch.allclose(net(x), eager(x), atol=1e-4) and used and all(used)
    fk.unfuse(net)
    assert type(net.conv) is nn.Conv2d


def test_fuse_finds_what_it_made_a_leaf():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = fk.ConvBNReLU(3, 16)
            self.conv, self.bn, self.relu = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(self.conv(self.step(x))))

    net = Net()
    assert fk.fuse(net) == (["bn"], [])
    assert type(net.conv) is type(net.step.conv)
    assert fk.fuse(net) == ([], [])


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.randn(2, 16, 4, 4), "expected input"),
        (torch.randn(2, 512, 4, 4).bfloat16(), "type"),
        (torch.randn(2, 512, 0, 4), "Kernel size"),
    ],
    ids=["channels", "dtype", "no pixels"],
)
def test_the_library_reports_wrong_operands(x, words):
    conv = fk.ConvBNReLU(512, 512).to(memory_format=LAST).conv
    with pytest.raises(RuntimeError, match=words):
        conv(x.to(memory_format=LAST))


def test_the_library_reports_a_weight_of_another_dtype():
    with pytest.raises(RuntimeError, match="expected .*type|should be the same"):
        fk.ConvBNReLU(16, 16).to(memory_format=LAST).double().conv(operands()[0])


def test_meta_tensors_and_dynamic_sizes():
    module = fk.ConvBNReLU(16, 16).to(memory_format=LAST)
    dynamic = {"x": {2: torch.export.Dim("h", min=2, max=64)}}
    exported = torch.export.export(
        module.eval(), (torch.randn(2, 16, 8, 8).to(memory_format=LAST),), dynamic_shapes=dynamic
    )
    x = torch.randn(2, 16, 11, 8).to(memory_format=LAST)
    torch.testing.assert_close(exported.module()(x), module(x))
    assert module.to("meta")(torch.randn(2, 16, 8, 8, device="meta")).shape == (2, 16, 8, 8)


def test_compiled_once_for_few_pixels_and_many():
    """Whether there are enough pixels for ours is asked when the graph runs: it guards no size of an image."""
    counter = CompileCounter()
    _, weight = operands(c=256, k=256)
    few, many = (torch.randn(1, 256, *size).to(memory_format=LAST) for size in ((4, 4), (9, 9)))
    assert not cpu_conv.fits(few, weight, "cpu") and cpu_conv.fits(many, weight, "cpu")
    compiled = torch.compile(lambda x: step(x, weight, False), backend=counter, dynamic=True, fullgraph=True)
    compiled(few), compiled(many)
    assert counter.frame_count == 1


def test_parametrised_weight_is_computed_once():
    conv = fk.ConvBNReLU(16, 16).to(memory_format=LAST).conv
    calls = []

    class Twice(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return 2 * weight

    nn.utils.parametrize.register_parametrization(conv, "weight", Twice())
    calls.clear()
    conv(torch.randn(2, 16, 8, 8).to(memory_format=LAST))
    assert len(calls) == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
def test_composed_blocks_have_it(memory_format, used, monkeypatch):
    torch.manual_seed(0)
    net = fractalnet.FractalNet(5, 2, (32, 32), image_size=8, activation="silu").to(memory_format=memory_format)
    path, x, results = net.sample_path(6, torch.Generator().manual_seed(0)), torch.randn(6, 3, 8, 8), []
    for library in (False, True):
        net.zero_grad()
        if library:
            monkeypatch.setattr(cpu_conv, "fits", lambda *_: False)
        net(x, path=path).square().sum().backward()
        results.append([p.grad.clone() for p in net.parameters()])
    assert used and all(used)
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


def test_segments_add_up_in_our_convolution(monkeypatch):
    """Ranges of a batch, of which several write to one weight's gradient; against fp64's convolutions, PyTorch's."""
    monkeypatch.setattr(block_rows, "RANGES_PAY", 1)
    torch.manual_seed(0)
    paths = (column_path(1, 3, 2), full_path(1, 3), column_path(1, 3, 2))
    keep = torch.cat([p.keep[0].unsqueeze(2).repeat(1, 1, 4) for p in paths], 2)
    inputs, grads = [torch.randn(12, 16, 8, 8), *(0.1 * torch.randn(n * 16, 16, 3, 3) for n in (3, 1, 2, 1))], []
    for dtype in (torch.float32, torch.float64):
        x, *w = leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
        fk.fractal_block(x, w, None, None, keep, stats="live", backend="cpu").out.square().sum().backward()
        grads.append([t.grad.double() for t in leaves])
    for got, want in zip(*grads, strict=True):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(("widths", "size"), [((32, 64), 8), ((512, 512), 4)])
def test_block_is_the_same_with_it(widths, size, monkeypatch):
    torch.manual_seed(0)
    net = fractalnet.FractalNet(5, 3, widths, image_size=size)
    x, generator = torch.randn(6, 3, size, size), torch.Generator().manual_seed(0)
    used, choose = [], cpu_conv.fits
    for _ in range(4):
        path, grads = net.sample_path(6, generator), []
        for choice in (lambda *a: used.append(choose(*a)) or used[-1], lambda *_: False):
            with monkeypatch.context() as patch:
                patch.setattr(cpu_conv, "fits", choice)
                net.zero_grad()
                net(x, path=path).square().sum().backward()
                grads.append([p.grad.clone() for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6
    assert any(used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_in_halves(dtype, monkeypatch):
    """Not farther from the truth than with the library's, which rounds the weights: it is what is rounded, and decided
    otherwise, that makes the errors."""
    torch.manual_seed(0)
    net = fractalnet.FractalNet(5, 3, (32, 64), image_size=8)
    exact, generator, fits = copy.deepcopy(net).double(), torch.Generator().manual_seed(0), cpu_conv.fits
    monkeypatch.setattr(cpu_conv, "_MATRICES", False)
    errors = {True: 0.0, False: 0.0}
    for _ in range(10):
        x, path, grads = torch.randn(6, 3, 8, 8), net.sample_path(6, generator), {}
        for ours, choice in ((None, fits), (True, fits), (False, lambda *_: False)):
            monkeypatch.setattr(cpu_conv, "fits", choice)
            model = exact if ours is None else net
            model.zero_grad()
            with torch.autocast("cpu", dtype, enabled=ours is not None):
                model(x.double() if ours is None else x, path=path).square().sum().backward()
            grads[ours] = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        for ours in errors:
            errors[ours] += float((grads[ours] - grads[None]).norm() / grads[None].norm())
    assert errors[True] <= 1.5 * errors[False] and errors[True] <= 2.5, errors


def test_nothing_is_cast_for_it(monkeypatch):
    """Weights of a block are read in float32 under autocast, their gradients written in it."""
    monkeypatch.setattr(cpu_conv, "_MATRICES", False)
    net = fractalnet.FractalNet(10, 3, (16, 16), image_size=8)
    monkeypatch.setattr(weights, "_cast", lambda *_: pytest.fail("cast"))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 3, 8, 8), path=full_path(2, net.columns)).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_block_has_it_in_every_layout_of_the_weights(monkeypatch):
    """A copy is made of what is not in channels_last as a convolution's weight."""
    torch.manual_seed(0)
    net = fractalnet.FractalNet(5, 2, (16, 32), image_size=8)
    used, choose, results, x = [], cpu_conv.fits, [], torch.randn(6, 3, 8, 8)
    path = net.sample_path(6, torch.Generator().manual_seed(0))
    monkeypatch.setattr(cpu_conv, "fits", lambda *a: used.append(choose(*a)) or used[-1])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for p in net.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=memory_format)
        net.zero_grad()
        out = net(x, path=path)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in net.parameters())])
    assert used and all(used)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
