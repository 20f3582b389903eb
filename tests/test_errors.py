"""Wrong calls: the type of the error, and a message with the op, the argument, what was expected and what came."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import need_backend
from fractalnet.drop_path import Path, full_path

import fractal_kernels as fk
from fractal_kernels import backends

Y = torch.randn(2, 4, 6, 6)
YS = [Y, Y.clone()]
V, W3 = torch.ones(4), torch.ones(3)
CONV = torch.randn(5, 4, 3, 3)
NONE4 = (None, None, None, None)


def join(inputs=YS, weights=None, biases=None, means=None, variances=None, mask=None, training=False, **kwargs):
    return fk.bn_relu_join(inputs, weights, biases, means, variances, mask, training, **kwargs)


def conv(x=Y, weight=CONV, w=None, b=None, mean=None, var=None, **kwargs):
    return fk.conv_bn_relu(x, weight, w, b, mean, var, True, **kwargs)


def norm(x=Y, w=None, b=None, mean=None, var=None, training=True, **kwargs):
    return fk.bn_relu(x, w, b, mean, var, training, **kwargs)


JOINS = {"masked_mean_join": fk.masked_mean_join, "bn_relu_join": join}
COMMON = [  # of both joins
    (lambda f: f(Y), TypeError, ["inputs", "list or tuple", "got Tensor"]),
    (lambda f: f(None), TypeError, ["inputs", "got NoneType"]),
    (lambda f: f([]), ValueError, ["1 to 8 inputs", "got 0"]),
    (lambda f: f([Y] * 9), ValueError, ["1 to 8 inputs", "got 9"]),
    (lambda f: f([Y, 3.0]), TypeError, ["inputs[1]", "Tensor", "got float"]),
    (lambda f: f([Y, Y.int()]), TypeError, ["inputs[1]", "float32", "got int32"]),
    (lambda f: f([Y.to(torch.complex64)]), TypeError, ["inputs[0]", "got complex64"]),
    (lambda f: f([torch.ones(3)]), ValueError, ["inputs[0]", "[N, C, *]", "got [3]"]),
    (lambda f: f([Y, Y[:, :3]]), ValueError, ["inputs[1]", "[2, 4, 6, 6]", "got [2, 3, 6, 6]"]),
    (lambda f: f([Y, Y[:1]]), ValueError, ["inputs[1]", "[2, 4, 6, 6]", "got [1, 4, 6, 6]"]),
    (lambda f: f([Y, Y.to("meta")]), ValueError, ["inputs[1]", "cpu", "got meta"]),
    (lambda f: f([Y, Y.double()]), TypeError, ["one dtype", "float32", "float64"]),
    (lambda f: f([Y.to_sparse()]), TypeError, ["inputs[0]", "dense", "got torch.sparse_coo"]),
    (lambda f: f(YS, mask=[True, False]), TypeError, ["mask", "Tensor", "got list"]),
    (lambda f: f(YS, mask=torch.ones(3, dtype=torch.bool)), ValueError, ["mask", "[2]", "[2, 2]", "got [3]"]),
    (lambda f: f(YS, mask=torch.ones(2, 3, dtype=torch.bool)), ValueError, ["mask", "[2, 2]", "got [2, 3]"]),
    (lambda f: f(YS, mask=torch.ones(2, 2, 1)), ValueError, ["mask", "[2, 2]", "got [2, 2, 1]"]),
    (lambda f: f(YS, mask=torch.ones(2, dtype=torch.complex64)), TypeError, ["mask", "bool", "got complex64"]),
    (lambda f: f(YS, mask=torch.ones(2, device="meta")), ValueError, ["mask", "cpu", "got meta"]),
    (
        lambda f: f(YS, mask=torch.rand(2, requires_grad=True)),
        ValueError,
        ["mask", "without gradients", "requires them"],
    ),
    (lambda f: f([Y.to("meta"), Y.double().to("meta")]), TypeError, ["one dtype", "float32", "float64"]),
    (lambda f: f(YS, backend="gpu"), fk.BackendUnavailable, ["backend", "cpu, cuda, triton", "got 'gpu'"]),
    (lambda f: f(YS, backend=1), fk.BackendUnavailable, ["backend", "got 1"]),
    (lambda f: f([Y.to("meta")], backend="cpu"), fk.BackendUnavailable, ["backend", "'cpu'", "meta", "reference"]),
]
RUNNING = dict(means=[V, V], variances=[V, V])
BN_RELU_JOIN = [
    (lambda: join(weights=V), TypeError, ["weights", "list of Tensors or None", "got Tensor"]),
    (lambda: join(weights=[V]), ValueError, ["weights", "one entry per input (2)", "got 1"]),
    (lambda: join(biases=[V, V, V]), ValueError, ["biases", "one entry per input (2)", "got 3"]),
    (lambda: join(weights=[V, W3]), ValueError, ["weights[1]", "[C]=[4]", "got [3]"]),
    (lambda: join(biases=[V.view(1, 4), V]), ValueError, ["biases[0]", "[C]=[4]", "got [1, 4]"]),
    (lambda: join(weights=[V, 1.0]), TypeError, ["weights[1]", "Tensor", "got float"]),
    (lambda: join(weights=[V.long(), V]), TypeError, ["weights[0]", "float32", "got int64"]),
    (lambda: join(weights=[V, V.to("meta")]), ValueError, ["weights[1]", "cpu", "got meta"]),
    (lambda: join(means=[V, V]), ValueError, ["running_means and running_vars", "mixture"]),
    (lambda: join(means=[V, None], variances=[V, None]), ValueError, ["running_means and running_vars", "mixture"]),
    (lambda: join(means=[V, W3], variances=[V, V]), ValueError, ["running_means[1]", "[C]=[4]", "got [3]"]),
    (lambda: join(means=[V, V], variances=[V, W3]), ValueError, ["running_vars[1]", "[C]=[4]", "got [3]"]),
    (lambda: join(reduction="max"), ValueError, ["reduction", "'mean', 'sum'", "got 'max'"]),
    (lambda: join(activation="gelu"), ValueError, ["activation", "'none', 'branch', 'output'", "got 'gelu'"]),
    (lambda: join(activation=None), ValueError, ["activation", "got None"]),
    (lambda: join(pool="max"), ValueError, ["pool", "None, 'before', 'after'", "got 'max'"]),
    (lambda: join(stats="some"), ValueError, ["stats", "'all', 'live'", "got 'some'"]),
    (lambda: join(reduction=["mean"]), ValueError, ["reduction", "got ['mean']"]),
    (lambda: join([torch.ones(2, 3, 4)], pool="before"), ValueError, ["pool", "[N, C, H, W]", "got [2, 3, 4]"]),
    (lambda: join([torch.ones(2, 3, 1, 4)], pool="after"), ValueError, ["pool", "H, W >= 2", "got [2, 3, 1, 4]"]),
    (lambda: join([torch.ones(2, 3, 4, 1)], pool="after"), ValueError, ["pool", "H, W >= 2", "got [2, 3, 4, 1]"]),
    (lambda: join(normalised="no"), TypeError, ["normalised", "list of bools or None", "got str"]),
    (lambda: join(normalised=[False, False], momentum="a"), TypeError, ["momentum", "got str"]),
    (lambda: join(normalised=[True]), ValueError, ["normalised", "one entry per input (2)", "got 1"]),
    (lambda: join(normalised=[True, 0]), TypeError, ["normalised[1]", "bool", "got int"]),
    (
        lambda: join(normalised=[True, False], weights=[V, V]),
        ValueError,
        ["weights[1] None", "input 1", "got a Tensor"],
    ),
    (lambda: join(normalised=[False, True], **RUNNING), ValueError, ["running_means[0] None", "got a Tensor"]),
    (
        lambda: join(normalised=[True, False], means=[V, None]),
        ValueError,
        ["running_means and running_vars", "mixture"],
    ),
    (lambda: join(eps=-1.0), ValueError, ["eps >= 0", "got -1.0"]),
    (lambda: join(eps=float("nan")), ValueError, ["eps >= 0", "got nan"]),
    (lambda: join(eps="1e-5"), TypeError, ["eps", "number", "got str"]),
    (lambda: join(**RUNNING, training=True, momentum=None), TypeError, ["momentum", "got NoneType"]),
    (lambda: join(**RUNNING, training=True, momentum="0.1"), TypeError, ["momentum", "got str"]),
    (lambda: join(**RUNNING, training=True, momentum=True), TypeError, ["momentum", "got bool"]),
    (lambda: join(**RUNNING, training=True, momentum=torch.ones(3)), ValueError, ["momentum", "got [3]"]),
    (
        lambda: join([Y[:1, :, :1, :1]], training=True),
        ValueError,
        ["more than 1 value per channel", "got", "[1, 4, 1, 1]"],
    ),
]
BN_RELU = [
    (lambda: norm([Y]), TypeError, ["x", "Tensor", "got list"]),
    (lambda: norm(Y.long()), TypeError, ["x", "float32", "got int64"]),
    (lambda: norm(V), ValueError, ["x", "[N, C, *]", "got [4]"]),
    (lambda: norm(w=W3), ValueError, ["weight", "[C]=[4]", "got [3]"]),
    (lambda: norm(b=W3), ValueError, ["bias", "[C]=[4]", "got [3]"]),
    (lambda: norm(w=1.0), TypeError, ["weight", "Tensor", "got float"]),
    (lambda: norm(mean=V, var=W3), ValueError, ["running_var", "[C]=[4]", "got [3]"]),
    (lambda: norm(mean=V), ValueError, ["running_mean and running_var", "both or neither", "got one"]),
    (lambda: norm(eps=-0.1), ValueError, ["eps >= 0", "got -0.1"]),
    (lambda: norm(mean=V.clone(), var=V.clone(), momentum=None), TypeError, ["momentum", "got NoneType"]),
    (lambda: norm(backend="triton5"), fk.BackendUnavailable, ["backend", "got 'triton5'"]),
    (lambda: norm(Y[:1, :, :1, :1]), ValueError, ["more than 1 value per channel", "[1, 4, 1, 1]"]),
]
CONV_BN_RELU = [
    (lambda: conv(None), TypeError, ["x", "Tensor", "got NoneType"]),
    (lambda: conv(Y[0]), ValueError, ["x", "[N, C, H, W]", "got [4, 6, 6]"]),
    (lambda: conv(weight=CONV[:, :3]), ValueError, ["conv_weight", "C_in=4", "got [5, 3, 3, 3]"]),
    (lambda: conv(weight=CONV[0]), ValueError, ["conv_weight", "got [4, 3, 3]"]),
    (lambda: conv(weight=CONV[:0]), ValueError, ["conv_weight", "got [0, 4, 3, 3]"]),
    (lambda: conv(weight=CONV[:, :, :0]), ValueError, ["conv_weight", "got [5, 4, 0, 3]"]),
    (lambda: conv(weight=CONV.long()), TypeError, ["conv_weight", "got int64"]),
    (lambda: conv(weight=CONV.double()), TypeError, ["conv_weight", "float32", "float64"]),
    (lambda: conv(weight=CONV.to("meta")), ValueError, ["conv_weight", "cpu", "got meta"]),
    (lambda: conv(conv_bias=V), ValueError, ["conv_bias", "[C_out]=[5]", "got [4]"]),
    (lambda: conv(conv_bias=torch.ones(5, device="meta")), ValueError, ["conv_bias", "cpu", "got meta"]),
    (lambda: conv(conv_bias=1.0), TypeError, ["conv_bias", "Tensor", "got float"]),
    (lambda: conv(conv_bias=torch.ones(5).double()), TypeError, ["conv_bias", "float32", "float64"]),
    (lambda: conv(w=V), ValueError, ["conv_bn_relu: expected weight", "[C]=[5]", "got [4]"]),
    (lambda: conv(groups=3), ValueError, ["conv_weight", "groups=3"]),
    (lambda: conv(weight=CONV[:, :2], groups=2), ValueError, ["groups", "got"]),
    (lambda: conv(groups=0), ValueError, ["groups", "0"]),
    (lambda: conv(stride=0), ValueError, ["stride", "got 0"]),
    (lambda: conv(stride=(1, 1.0)), ValueError, ["stride", "pair of ints", "got (1, 1.0)"]),
    (lambda: conv(stride=(1,)), ValueError, ["stride", "pair of ints", "got (1,)"]),
    (lambda: conv(dilation=0), ValueError, ["dilation", "got 0"]),
    (lambda: conv(padding=-1), ValueError, ["padding", "got -1"]),
    (lambda: conv(padding="wide"), ValueError, ["padding", "got 'wide'"]),
    (lambda: conv(padding="same", stride=2), ValueError, ["padding", "'valid'", "got 'same'"]),
    (lambda: conv(stride="2"), TypeError, ["stride", "got str"]),
    (lambda: conv(Y[..., :1, :1], padding=0), ValueError, ["x", "3", "got [2, 4, 1, 1]"]),
    (lambda: conv(Y[..., :1], padding=(1, 0)), ValueError, ["x", "at least 3 padded", "padding (1, 0)"]),
    (lambda: conv(dilation=(1, 4)), ValueError, ["x", "at least 9 padded", "padding (1, 1)"]),
    (lambda: conv(backend="gpu"), fk.BackendUnavailable, ["backend", "got 'gpu'"]),
]
DROP_PATH_MASK = [
    (lambda: fk.drop_path_mask(0, 0.5), ValueError, ["num_branches", "1 to 8", "got 0"]),
    (lambda: fk.drop_path_mask(9, 0.5), ValueError, ["num_branches", "1 to 8", "got 9"]),
    (lambda: fk.drop_path_mask(3, -0.1), ValueError, ["p in [0, 1]", "got -0.1"]),
    (lambda: fk.drop_path_mask(3, 1.1), ValueError, ["p in [0, 1]", "got 1.1"]),
    (lambda: fk.drop_path_mask(3, float("nan")), ValueError, ["p in [0, 1]", "got nan"]),
    (lambda: fk.drop_path_mask(3, 0.5, -1), ValueError, ["batch_size", "got -1"]),
]
MODULES = [
    ("DropPathJoin", lambda: fk.DropPathJoin(1.5), ValueError, ["p in [0, 1]", "got 1.5"]),
    ("MeanJoin", lambda: fk.MeanJoin("max"), ValueError, ["pool", "'before'", "got 'max'"]),
    ("DropPathJoin", lambda: fk.DropPathJoin(0.1, pool="max"), ValueError, ["pool", "'before'", "got 'max'"]),
    ("DropPathJoin", lambda: fk.DropPathJoin(0.1, "pixel"), ValueError, ["granularity", "'batch'", "got 'pixel'"]),
    ("BNReLUJoin", lambda: fk.BNReLUJoin(2, 4)([Y]), ValueError, ["expected 2 inputs", "got 1"]),
    ("BNReLUJoin", lambda: fk.BNReLUJoin(0, 4), ValueError, ["num_branches", "1 to 8", "got 0"]),
    ("BNReLUJoin", lambda: fk.BNReLUJoin(2, 4, pool="max"), ValueError, ["pool", "got 'max'"]),
    ("BNReLUJoin", lambda: fk.BNReLUJoin(2, 4, normalised=[True]), ValueError, ["normalised", "(2)", "got 1"]),
    (
        "BNReLUJoin",
        lambda: fk.BNReLUJoin(1, 4, normalised=[False]),
        ValueError,
        ["a branch that is normalised", "[False]"],
    ),
    ("fuse", lambda: fk.fuse("model"), TypeError, ["model", "torch.nn.Module", "got str"]),
]
FUNCTIONS = {
    "bn_relu_join": BN_RELU_JOIN,
    "bn_relu": BN_RELU,
    "conv_bn_relu": CONV_BN_RELU,
    "drop_path_mask": DROP_PATH_MASK,
}
CALLS = [(op, lambda f=f, op=op: f(JOINS[op]), error, words) for op in JOINS for f, error, words in COMMON]
CALLS += [(op, *call) for op, calls in FUNCTIONS.items() for call in calls]
CALLS += MODULES


@pytest.mark.parametrize(
    ("op", "call", "error", "words"), CALLS, ids=[f"{i}-{op}-{words[0]}" for i, (op, _, _, words) in enumerate(CALLS)]
)
def test_wrong_call(op, call, error, words):
    if "'cpu'" in words:  # named where there is no tensor for it, not where it is missing
        need_backend("cpu")
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    # conv_bn_relu is a composition: what bn_relu finds, it may report in its own name
    assert message.startswith(f"{op}: ") or (op == "conv_bn_relu" and message.startswith("bn_relu: ")), message
    for word in ("expected", *words):
        assert word in message, f"{word!r} is not in {message!r}"


def test_momentum():
    with pytest.raises(TypeError, match="bn_relu: expected momentum of dtype float32, .* got complex64"):
        norm(mean=torch.zeros(4), var=torch.ones(4), momentum=torch.tensor(1j))


def test_a_wrong_call_changes_nothing():
    mean, var = torch.zeros(4), torch.ones(4)
    for bad in (dict(backend="gpu"), dict(eps=-1.0), dict(pool="max")):
        with pytest.raises((ValueError, fk.BackendUnavailable)):
            join([Y], means=[mean], variances=[var], training=True, **bad)
    assert (mean == 0).all() and (var == 1).all()


# --- dispatch ----------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends whose launchers were asked for."""
    names: list[str] = []
    launcher = backends.launcher
    monkeypatch.setattr(backends, "launcher", lambda name: names.append(name) or launcher(name))
    monkeypatch.delenv("FRACTAL_BACKEND", raising=False)
    return names


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "extension", lambda name="cpu": (None, "it was not built; do this"))
    monkeypatch.delenv("FRACTAL_BACKEND", raising=False)


def test_precedence(ran, cpu_backend, monkeypatch):
    def used(**kwargs) -> str:
        ran.clear()
        fk.masked_mean_join(YS, **kwargs)
        return ran[-1]

    assert used() == "cpu"
    monkeypatch.setenv("FRACTAL_BACKEND", "reference")
    assert used() == "reference" and used(backend="cpu") == "cpu"
    with fk.use_backend("cpu"):
        assert used() == "cpu" and used(backend="reference") == "reference"
        with fk.use_backend("reference"):
            assert used() == "reference"
        assert used() == "cpu"
    assert used() == "reference"
    monkeypatch.setenv("FRACTAL_BACKEND", "")
    assert used() == "cpu"


def test_backward_runs_where_forward_ran(ran, cpu_backend):
    y = Y.clone().requires_grad_()
    with fk.use_backend("reference"):
        out = join([y], training=True)
    out.sum().backward()
    assert set(ran) == {"reference"}


def test_use_backend_is_undone_by_an_exception():
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert not backends._override.names


def test_use_backend_is_of_its_thread(cpu_backend):
    def elsewhere():
        before = backends.resolve("join", None, torch.device("cpu"), torch.float32)
        with fk.use_backend("cpu"):
            return before, backends.resolve("join", None, torch.device("cpu"), torch.float32)

    with fk.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result() == ("cpu", "cpu")
        assert backends.resolve("join", None, torch.device("cpu"), torch.float32) == "reference"


def test_unknown_backends(monkeypatch):
    known = "one of cpu, cuda, triton, reference, got 'x'"
    with pytest.raises(fk.BackendUnavailable, match=f"use_backend: expected name {known}"):
        with fk.use_backend("x"):
            pass
    monkeypatch.setenv("FRACTAL_BACKEND", "x")
    with pytest.raises(fk.BackendUnavailable, match=f"expected FRACTAL_BACKEND {known}"):
        fk.masked_mean_join(YS)


def test_named_backend_never_falls_back(ran, no_extension, monkeypatch):
    assert "cpu" not in fk.available_backends()
    for op, call in (
        ("masked_mean_join", lambda **k: fk.masked_mean_join(YS, **k)),
        ("bn_relu_join", lambda **k: join(**k)),
        ("bn_relu", lambda **k: norm(**k)),
    ):
        with pytest.raises(fk.BackendUnavailable, match=f"{op}: expected backend .* got 'cpu': it was not built"):
            call(backend="cpu")
        with monkeypatch.context() as patch:
            patch.setenv("FRACTAL_BACKEND", "cpu")
            with pytest.raises(fk.BackendUnavailable, match=f"{op}: expected FRACTAL_BACKEND .* it was not built"):
                call()
        assert not ran
        call()
        assert set(ran) == {"reference"}  # automatic may fall back
        ran.clear()
    with pytest.raises(fk.BackendUnavailable, match="use_backend: expected name .* got 'cpu': it was not built"):
        with fk.use_backend("cpu"):
            pass


def test_block():
    w = [torch.randn(4, 3, 3, 3), torch.randn(2, 2, 3, 3)]
    x, path = torch.randn(2, 3, 4, 4), full_path(1, 2).keep[0]
    with pytest.raises(ValueError, match=r"fractal_block: expected weights of 2\*\*\(C-1\) rows, C from 1 to 8, got 3"):
        fk.fractal_block(x, [*w, w[1]], None, None, path)
    with pytest.raises(
        ValueError, match=r"fractal_block: expected x of 3 channels, as weights\[0\], got \[2, 5, 4, 4\]"
    ):
        fk.fractal_block(torch.randn(2, 5, 4, 4), w, None, None, path)
    with pytest.raises(ValueError, match=r"fractal_block: expected weights\[1\] of shape \[2, 2, 3, 3\], got \[2, 1"):
        fk.fractal_block(x, [w[0], w[1][:, :1]], None, None, path)
    for i, weights in ((0, [w[0].to("meta"), w[1]]), (1, [w[0], w[1].to("meta")])):  # nobody reads what is not there
        with pytest.raises(ValueError, match=rf"fractal_block: expected weights\[{i}\] on cpu, got meta"):
            fk.fractal_block(x, weights, None, None, path)
    with pytest.raises(ValueError, match="fractal_block: expected gamma on cpu, got meta"):
        fk.fractal_block(x, w, torch.ones(3, 2, device="meta"), None, path)
    with pytest.raises(TypeError, match="fractal_block: expected weights to be a list of Tensors, got NoneType"):
        fk.fractal_block(x, None, None, None, path)
    with pytest.raises(TypeError, match=r"fractal_block: expected weights\[1\] to be a Tensor, got NoneType"):
        fk.fractal_block(x, [w[0], None], None, None, path)
    moments = {name: torch.ones(3, 2, requires_grad=name == "mean") for name in ("mean", "var")}
    with pytest.raises(ValueError, match="fractal_block: expected mean that requires no gradient"):
        fk.fractal_block(x, w, None, None, path, **moments)
    with pytest.raises(TypeError, match="fractal_block: expected path to be a Tensor, got list"):
        fk.fractal_block(x, w, None, None, path.tolist())
    with pytest.raises(ValueError, match="fractal_block: expected dropout in .0, 1., got 'a'"):
        fk.fractal_block(x, w, None, None, path, dropout="a")
    with pytest.raises(ValueError, match=r"fractal_block: expected path bool of shape \[2, 2\] or \[2, 2, 2\], got"):
        fk.fractal_block(x, w, None, None, path[:1])
    with pytest.raises(ValueError, match=r"fractal_block: expected gamma of shape \[3, 2\], got \[2\]"):
        fk.fractal_block(x, w, torch.ones(2), None, path)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fk.fractal_block(torch.randn(1, 3, 1, 1), w, None, None, path, pool=None)
    with pytest.raises(ValueError, match="expected the path to keep a branch of the join of row 1, got none"):
        fk.fractal_block(x, w, None, None, torch.zeros_like(path))
    with pytest.raises(TypeError, match=r"fractal_block: expected x of dtype .* got int64"):
        fk.fractal_block(x.long(), w, None, None, path)
    with pytest.raises(ValueError, match="fractal_block: expected path on the CPU, or with dense=True on cpu, got"):
        fk.fractal_block(x, w, None, None, path.to("meta"))
    with pytest.raises(TypeError, match=r"fractal_block: expected weights\[1\] of x's dtype torch.float32, got .*64"):
        fk.fractal_block(x, [w[0], w[1].double()], None, None, path)
    with pytest.raises(ValueError, match=r"fractal_block: expected weights\[0\] of four dimensions and not empty, got"):
        fk.fractal_block(x[:, :0], [w[0][:, :0], w[1]], None, None, path)
    with pytest.raises(ValueError, match=r"fractal_block: expected x of shape .*, H and W >= 1, .* got \[2, 3, 0, 4\]"):
        fk.fractal_block(x[:, :, :0], w, None, None, path, pool=None)
    with pytest.raises(ValueError, match=r"Path: expected keep bool"):
        Path(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"Path: expected keep to be a Tensor, got list"):
        Path([True])


def test_momentum_elsewhere_and_eps_that_is_no_number():
    x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="bn_relu: expected momentum on cpu, got meta"):
        fk.bn_relu(x, None, None, mean, var, True, torch.tensor(0.1, device="meta"))
    with pytest.raises(TypeError, match="bn_relu: expected eps to be a number, got bool"):
        fk.bn_relu(x, None, None, None, None, True, eps=True)
    with pytest.raises(ValueError, match="conv_bn_relu: expected x of at least 5 padded pixels .* padding valid"):
        fk.conv_bn_relu(x[..., :4], torch.randn(2, 3, 3, 5), *[None] * 4, True, padding="valid")
    path, weights = torch.ones(1, 1, dtype=torch.bool), [torch.randn(4, 3, 3, 3)]
    with pytest.raises(TypeError, match="fractal_block: expected dense True or False, got 'x'"):
        fk.fractal_block(x, weights, None, None, path, dense="x")
