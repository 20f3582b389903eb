"""What does not know our operators: programs that run without this package (torch.export, ONNX, TorchScript), and the
transforms of torch.func."""

import copy
import io
import subprocess
import sys
import warnings

import cases
import fractalnet
import pytest
import torch
from torch import nn

import fractal_kernels as fk
from fractal_kernels.ops import exported


@pytest.mark.parametrize("case", cases.all_flags(), ids=str)
def test_every_flag(case, monkeypatch):
    """What is written down is what the kernels compute, with its gradients and what becomes of running statistics."""
    monkeypatch.setattr(exported, "foreign_tool", lambda: "a test")
    cases.check(case, cases.draw(case), None)


@pytest.mark.parametrize("case", [c for c in cases.plain_flags() if c.activation == "none"], ids=str)
def test_plain_joins(case, monkeypatch):
    data = cases.draw(case)
    expected = cases.expect(case, data)
    monkeypatch.setattr(exported, "foreign_tool", lambda: "a test")
    if case.reduction == "mean":  # the public function's
        cases.assert_close(fk.masked_mean_join(data.ys, data.mask, pool=case.pool).detach(), expected.out)
    flags = fk.checks.join_options("test", case.reduction, "none", case.pool, "all")
    cases.assert_close(exported.join(data.ys, data.mask, [], [], [], [], 0.0, flags).detach(), expected.out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "sample"])
def test_half_precision(dtype, mask, monkeypatch):
    case = cases.Case(training=False, mask=mask)
    data = cases.draw(case, dtype)
    expected = cases.expect(case, data).out
    monkeypatch.setattr(exported, "foreign_tool", lambda: "a test")
    out = cases.run(case, data, None).out
    assert out.dtype == dtype
    # A branch's value is rounded before the join, in PyTorch's operators.
    cases.assert_close(out, expected, slack=4 * cases.ROUNDING[dtype] * expected.abs().max())


class Net(nn.Module):
    """Each of the modules that a model of one's own may be of, and a batch norm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.side = fk.ConvBNReLU(16, 16)
        self.drop = fk.DropPathJoin(0.2, pool="before")
        self.mean = fk.MeanJoin()
        self.join = fk.BNReLUJoin(2, 16, reduction="sum", activation="output", pool="after")

    def forward(self, x):
        a = self.stem(x)
        b = self.side(a)
        a = self.drop([a, b])
        return self.join([a, self.mean([a, a, a])]).mean((2, 3))


@pytest.fixture
def net():
    net = Net()
    assert len(fk.fuse(net).fused) == 2
    net.to(memory_format=torch.channels_last)(torch.randn(4, 3, 16, 16))  # statistics move
    return net.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)


def test_trace(net, images, tmp_path):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(net, images)
    program.save(tmp_path / "net.pt")
    kinds = {node.kind() for node in torch.jit.load(tmp_path / "net.pt").inlined_graph.nodes()}
    assert kinds and all(kind.startswith(("aten::", "prim::")) for kind in kinds) and "prim::PythonOp" not in kinds
    more = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program(more), net(more), rtol=1e-5, atol=1e-6)


def test_onnx(net, images):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, (images,), dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    found = [node.op_type for node in program.model_proto.graph.node]
    # Every batch norm before a convolution's end is in the convolution, as of an eager model.
    assert found.count("Conv") == 3 and found.count("BatchNormalization") == 2
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (images, torch.randn(5, 3, 16, 16)):
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_without_running_statistics(images):
    """The batch's statistics, in evaluation too."""
    net = fk.BatchNormReLU2d(3, track_running_stats=False).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(net, images)
    torch.testing.assert_close(
        program(images), torch.batch_norm(images, *[None] * 4, True, 0.1, 1e-5, False).relu(), rtol=1e-5, atol=1e-6
    )
    assert not any(node.kind().startswith("fractal_kernels") for node in program.inlined_graph.nodes())


class Masked(nn.Module):
    """Statistics that PyTorch's batch norm has not: of branches that live, cumulative, of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.join = fk.BNReLUJoin(3, 4, stats="live", momentum=None)
        self.norm = fk.BatchNormReLU2d(4, momentum=None)
        self.low = fk.BatchNormReLU2d(4)
        for name in ("running_mean", "running_var"):
            setattr(self.low, name, getattr(self.low, name).bfloat16())
        self.register_buffer("mask", torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool())

    def forward(self, x):
        h = self.join([x, x + 1, x.square()], self.mask)
        return self.low(self.norm(h - 0.2))


def training_nets():
    fused = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), fk.ConvBNReLU(4, 16)
    )
    assert fk.fuse(fused).fused == ["1"]
    return {"fused": fused, "masked": nn.Sequential(nn.Conv2d(3, 4, 1), Masked())}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["fused", "masked"])
def test_an_exported_program_can_be_trained(name, training, strict):
    """torch.export keeps operators, not the backwards of ours: without PyTorch's own, gradients would end there."""
    torch.manual_seed(0)
    net, x = training_nets()[name].double().train(training), torch.randn(4, 3, 6, 6).double()
    program = torch.export.export(copy.deepcopy(net), (x,), strict=strict)
    assert not any("fractal_kernels" in str(node.target) for node in program.graph.nodes)
    module = program.module()
    for each in (net, module):
        each(x).square().sum().backward()
    ours, theirs = dict(net.named_parameters()), dict(module.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, p in ours.items():
        torch.testing.assert_close(theirs[key].grad, p.grad, rtol=1e-8, atol=1e-10)
    buffers = dict(net.named_buffers())
    kept = dict(module.named_buffers())
    assert kept.keys() == buffers.keys() or not training  # evaluation counts no batches
    for key, b in kept.items():
        torch.testing.assert_close(b, buffers[key], rtol=1e-2 if b.dtype == torch.bfloat16 else 1e-8, atol=1e-10)


def test_a_block_in_training_is_not_exported():
    net, x = fractalnet.create("fractal_c2", channels=(8,), image_size=8), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"FractalNet: expected evaluation, got torch\.export in training"):
        torch.export.export(net, (x,))

    class Block(nn.Module):
        def forward(self, x, *weights):
            return fk.fractal_block(x, weights, None, None, torch.ones(2, 2, dtype=torch.bool)).out

    with pytest.raises(RuntimeError, match=r"fractal_block: .* got torch\.export in training"):
        torch.export.export(Block(), (x, torch.randn(8, 3, 3, 3), torch.randn(4, 4, 3, 3)))
    program = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_transforms(training, dtype):
    """Gradients, batches of gradients, directional derivatives and per-sample gradients, as of a model of PyTorch's."""
    torch.manual_seed(0)
    eager = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1)
    )
    eager = eager.to(dtype).to(memory_format=torch.channels_last).train(training)
    fused, x = copy.deepcopy(eager), torch.randn(3, 2, 5, 5, dtype=dtype)
    assert fk.fuse(fused).fused == ["1"]
    found = []
    for net in (eager, fused):
        parameters, buffers = dict(net.named_parameters()), {k: b.clone() for k, b in net.named_buffers()}

        def loss(p, x, net=net, buffers=buffers):
            return (
                torch.func.functional_call(net, {**p, **{k: b.clone() for k, b in buffers.items()}}, (x,)).sin().sum()
            )

        got = [torch.func.grad(loss)(parameters, x), torch.func.hessian(loss, argnums=1)(parameters, x[:1, :, :4, :4])]
        got.append(torch.func.jvp(lambda z, p=parameters, f=loss: f(p, z), (x,), (x.cos(),))[1])
        if not training:  # PyTorch's refuses running statistics of no sample's own
            each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
            got.append(each(parameters, x.unsqueeze(1)))
        found.append(torch.utils._pytree.tree_leaves(got))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_transform_that_ends_before_the_relu():
    """Compiled, the ReLU relies on its batch norm, which was in the transform."""
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fused, x = copy.deepcopy(eager), torch.randn(2, 3, 6, 6)
    assert fk.fuse(fused).fused == ["1"]

    def call(net, x):
        return net[2](torch.func.vmap(lambda t: net[1](net[0](t[None]))[0])(x))

    for run in (call, torch.compile(call, backend="eager")):
        torch.testing.assert_close(run(fused, x), eager(x))
        for net in (fused, eager):  # zeros, as batch norms at the end of residual branches begin with
            nn.init.zeros_(net[1].weight)
        (grad,) = torch.autograd.grad(run(fused, mine := x.clone().requires_grad_()).sum(), mine)
        assert not grad.any() and not torch.autograd.grad(run(fused, x).sum(), fused[1].bias)[0].any()
        for net in (fused, eager):
            nn.init.ones_(net[1].weight)


@pytest.mark.parametrize("make", [lambda: fk.ConvBNReLU(3, 16), lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Masked())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ensemble(make, dtype):
    """Models with statistics of their own, run as one, in training and in evaluation."""
    nets, x = [make().to(dtype) for _ in range(3)], torch.randn(4, 3, 6, 6).to(dtype)
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    for training in (True, False):
        for net in (*nets, base):
            net.train(training)
        call = torch.func.vmap(lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), in_dims=(0, 0, None))
        out = call(parameters, buffers, x)
        tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(out, torch.stack([net(x) for net in nets]), **tolerance)
        for key, b in buffers.items():
            torch.testing.assert_close(b, torch.stack([net.state_dict()[key] for net in nets]), **tolerance)


def test_a_value_that_is_dropped_stays_out_of_transforms():
    join = fk.BNReLUJoin(2, 3).eval()
    a, b, mask = torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), float("nan")), torch.tensor([True, False])

    def loss(p):
        return torch.func.functional_call(join, p, ([a, b], mask)).sum()

    grads = torch.func.grad(loss)(dict(join.named_parameters()))
    assert all(g.isfinite().all() for g in grads.values()) and not grads["bns.1.weight"].any()


def test_synchronised_batch_norm_says_that_it_is_not_transformed(monkeypatch):
    monkeypatch.setattr(fk.sync, "name_of", lambda op, group: "a group")
    with pytest.raises(RuntimeError, match=r"bn_relu: expected no process group, .* got a transform of torch\.func"):
        torch.func.grad(lambda x: fk.bn_relu(x, *[None] * 4, training=True).sum())(torch.randn(2, 3, 4, 4))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU())
    fk.fuse(model)  # whose batch norms run as PyTorch's there, which are not synchronised
    model[1].sync_group = "a group"
    with pytest.raises(RuntimeError, match=r"bn_relu: expected no process group"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(2, 3, 4, 4))


def test_a_block_is_not_transformed():
    net = fractalnet.create("fractal_c2", channels=(8,), image_size=8).eval()
    with pytest.raises(RuntimeError, match=r"got a transform of torch\.func; .* fractalnet\.export\.plain"):
        torch.func.grad(lambda x: net(x).sum())(torch.randn(2, 3, 8, 8))


def test_a_join_of_one_branch_is_a_tensor_of_its_own():
    def changes(x):
        h = fk.masked_mean_join([x])
        h += 1
        return h + x

    program = torch.jit.trace(changes, torch.ones(2, 3, 4, 4))
    assert torch.equal(program(torch.ones(2, 3, 4, 4)), torch.full((2, 3, 4, 4), 3.0))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes", [("double", "float"), ("float", "bfloat16"), ("bfloat16", "bfloat16"), ("half", "float")]
)
def test_parameters_of_other_dtypes(dtypes, autocast, monkeypatch):
    """Cast as the kernels' are, and autocast has no part in it."""
    dtype, of_parameters = (getattr(torch, name) for name in dtypes)
    y, p = torch.randn(2, 3, 4, 4, dtype=dtype), torch.rand(3).add_(0.5).to(of_parameters)
    found = []
    for exporting in (False, True):
        monkeypatch.setattr(exported, "foreign_tool", lambda exporting=exporting: exporting)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(fk.bn_relu_join([y, y], [p, p], [p, p], [p, p], [p, p], reduction="sum"))
            found.append(fk.masked_mean_join([y, y]))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("dynamo", [True, False])
def test_networks_of_fused_blocks_name_the_way(dynamo):
    pytest.importorskip("onnxscript")
    net, x = fractalnet.create("fractal_c2", channels=(8,), image_size=8).eval(), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"fractalnet\.export\.plain"):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)


def test_fractal_block_names_the_way():
    block = [torch.randn(8, 3, 3, 3), torch.randn(4, 4, 3, 3)]
    path = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match=r"fractal_block: .* TorchScript trace in training; .* fractalnet\.export\.plain"
    ):
        torch.jit.trace(lambda x: fk.fractal_block(x, block, None, None, path).out, torch.randn(2, 3, 8, 8))


def test_composed_blocks():
    """Of thin columns with projections, which are pooled where they are made."""
    net = fractalnet.create("fractalnet40", columns=2, column_widths=(1, 0.5), channels=(8, 16), image_size=8).eval()
    assert "composed" in net.info()
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)  # and what a network makes once is there: the tracer compares two traces
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(net, x)
    assert not any(node.kind().startswith("fractal_kernels") for node in program.inlined_graph.nodes())
    torch.testing.assert_close(program(x), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column", [None, 0])
def test_composed_blocks_of_which_a_part_runs(column, tmp_path):
    """Traced where gradients are recorded too, and saved; per sample under the transforms of torch.func."""
    net = fractalnet.FractalNet(5, 2, (4, 4), image_size=8, activation="silu").double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def loss(x):
        return net(x, column=column).square().sum()

    def loss_of_one(weights, x):
        return torch.func.functional_call(net, weights, (x[None],), {"column": column}).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Column(net, column), x).save(tmp_path / "net.pt")
    expected = net(x, column=column)
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(x), expected)
    mine = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(mine), mine)[0])
    weights = dict(net.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0))(weights, x)
    whole = torch.autograd.grad(loss(x), list(weights.values()), materialize_grads=True)
    torch.testing.assert_close([g.sum(0) for g in each.values()], list(whole))


class Column(nn.Module):
    def __init__(self, net, column):
        super().__init__()
        self.net, self.column = net, column

    def forward(self, x):
        return self.net(x, column=self.column)


def test_exporting_first_leaves_nothing_behind():
    """In a process of its own, where nothing has been made once yet."""
    code = (
        "import torch, fractalnet; net = fractalnet.create('fractal_c2').eval(); x = torch.randn(2, 3, 32, 32); "
        "torch.export.export(net, (x,)); print(type(net(x)).__name__, type(net.train()(x)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "Tensor Tensor\n", done.stderr[-2000:]


def test_programs_of_other_images():
    """In the network's dtype and channels; folded, unless that is not wanted."""
    net = fractalnet.FractalNet(5, 2, (4,), in_channels=2, image_size=8).double().eval()
    program, x = fractalnet.export.to_exported_program(net, 1), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), net(x, column=1), rtol=1e-10, atol=1e-12)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
