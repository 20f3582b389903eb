"""Running statistics, which the launch that ends the batch's statistics moves too: no operation of PyTorch does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from cases import LAYOUTS
from conftest import INTERPRETED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fractal_kernels import bn_relu_join, masked_mean_join
from fractal_kernels.ops import exported

GPU = True
K, C = 3, 5
MASKS = {
    "none": None,
    "batch": torch.tensor([True, False, True]),
    "sample": torch.tensor([[True, True, False, True], [False] * 4, [False, True, False, False]]),
}
# Of PyTorch's, what makes tensors or looks at them another way.
VIEWS = {"empty", "new_empty", "empty_like", "empty_strided", "unbind", "select", "permute", "as_strided", "detach",
         "view", "reshape", "result_type", "to", "resolve_conj", "contiguous"}  # fmt: skip


def inputs(layout: str = "channels_last", pixels: int = 6) -> list[torch.Tensor]:
    return [LAYOUTS[layout](torch.randn(4, C, pixels, 7) * (i + 1) + i).requires_grad_() for i in range(K)]


def expected(y: torch.Tensor, live: torch.Tensor, old: torch.Tensor, momentum: float) -> torch.Tensor:
    """[2, C]: mean and unbiased variance, moved by the live samples, in float64."""
    if not live.any():
        return old.double()
    values = y.detach().double()[live].movedim(1, 0).flatten(1)
    return old.double() * (1 - momentum) + momentum * torch.stack([values.mean(1), values.var(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 1.0, "one", "each"], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_running_statistics(mask, momentum, dtype, backend):
    """Of every branch that has a live sample, by a number or by tensors on the device, in their own dtype."""
    given = None if MASKS[mask] is None else MASKS[mask].to(torch.empty(0).device)
    live = torch.ones(K, 4, dtype=torch.bool) if given is None else given.reshape(K, -1).expand(K, 4)
    numbers = {"one": [0.25] * K, "each": [0.5, 0.25, 1.0]}.get(momentum, [momentum] * K)
    tensor = {"one": torch.tensor(0.25, dtype=torch.float64), "each": torch.tensor(numbers)}.get(momentum)
    for layout in ("channels_last", "contiguous"):
        ys = inputs(layout)
        old = torch.rand(K, 2, C).add_(0.5).to(dtype)
        means, vars = ([t.clone() for t in old[:, i]] for i in (0, 1))
        given_momentum = momentum if tensor is None else tensor
        bn_relu_join(ys, None, None, means, vars, given, True, given_momentum, stats="live", backend=backend)
        for i, y in enumerate(ys):
            moved = torch.stack([means[i], vars[i]])
            assert moved.dtype == dtype
            want = expected(y, live[i], old[i], numbers[i])
            exact = not live[i].any()
            torch.testing.assert_close(
                moved.double(), want, rtol=0 if exact else torch.finfo(dtype).eps * 4, atol=0 if exact else 2e-6
            )


def test_strided_running_statistics(backend):
    """As a view into a larger buffer may be: the rest of it stays."""
    buffer = torch.full((2, C, 4), 7.0)
    mean, var = buffer[0, :, 1], buffer[1, :, 2]
    (y,) = inputs()[:1]
    bn_relu_join([y], None, None, [mean], [var], None, True, 1.0, backend=backend)
    want = expected(y, torch.ones(4, dtype=torch.bool), torch.zeros(2, C), 1.0)
    torch.testing.assert_close(torch.stack([mean, var]).double(), want, rtol=1e-5, atol=1e-5)
    assert (buffer == 7).sum() == buffer.numel() - 2 * C


def test_a_step_between_evaluation_and_its_backward(backend):
    """The gradient is by the statistics that the evaluation used."""
    (y,) = inputs()[:1]
    grads = []
    for moves in (False, True):
        mean, var = torch.zeros(C), torch.full((C,), 4.0)
        out = bn_relu_join([y], None, None, [mean], [var], backend=backend)
        if moves:
            bn_relu_join([y], None, None, [mean], [var], training=True, backend=backend)
            assert (mean != 0).all()
        grads += torch.autograd.grad(out.sum(), y)
    assert torch.equal(*grads)


def test_inference_tensors(backend):
    with torch.inference_mode():
        mean, var = torch.zeros(C), torch.ones(C)
        bn_relu_join([inputs()[0]], None, None, [mean], [var], training=True, backend=backend)
        assert (mean != 0).all()


@pytest.mark.parametrize("kind", ["as it is", "views", "strided", "half"])
@pytest.mark.parametrize("momentum", ["number", "each"])
def test_one_batch_norm_of_two_branches(momentum, kind, backend):
    """Its statistics move by both, one after the other."""
    ys, numbers = inputs()[:2], [0.1, 0.1] if momentum == "number" else [0.5, 0.25]
    mean, var = torch.zeros(2 * C)[:: 2 if kind == "strided" else 1][:C], torch.ones(C)
    mean, var = (t.half() if kind == "half" else t for t in (mean, var))
    want = torch.stack([mean, var]).double()
    for y, number in zip(ys, numbers, strict=True):
        want = expected(y, torch.ones(4, dtype=torch.bool), want, number)
    given = 0.1 if momentum == "number" else torch.tensor(numbers)
    again = [mean[:], var[:]] if kind == "views" else [mean, var]  # other objects, the same memory
    bn_relu_join(ys, None, None, [mean, again[0]], [var, again[1]], None, True, given, backend=backend)
    tolerance = 2e-3 if kind == "half" else 2e-6
    torch.testing.assert_close(torch.stack([mean, var]).double(), want, rtol=tolerance, atol=tolerance)


class Counted(torch.Tensor):
    """A subclass that has a say in what its operators do."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


class Mode(TorchDispatchMode):
    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_strided_parameters(backend):
    y, (w, b) = inputs()[0], torch.randn(2, 2 * C)[:, ::2]
    strided = bn_relu_join([y], [w], [b], None, None, training=True, backend=backend)
    assert torch.equal(
        strided, bn_relu_join([y], [w.contiguous()], [b.contiguous()], None, None, training=True, backend=backend)
    )


def test_the_backward_of_a_mask_without_values():
    """A fake tensor has none, outside of its mode too."""
    with FakeTensorMode():
        ys, mask = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)], torch.tensor([True, False])
    masked_mean_join(ys, mask).sum().backward()
    assert ys[1].grad.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("who", ["mode", "input", "weight"])
def test_who_is_to_see_the_operators_does(who, backend):
    """Modes and subclasses of tensors, whichever argument is one."""
    y, weight, Counted.seen = inputs()[0], torch.ones(C), []
    y, weight = (Counted(t) if who == name else t for t, name in ((y, "input"), (weight, "weight")))
    with Mode() if who == "mode" else nullcontext() as mode:
        out = bn_relu_join([y.requires_grad_()], [weight], None, None, None, training=True, backend=backend)
        torch.autograd.grad(out.sum(), y)
    seen = [n for n in (mode.seen if mode else Counted.seen) if n.startswith("fractal_kernels.")]
    wanted = ["channel_stats", "join_forward", "join_backward_reduce", "join_backward_apply"]
    assert [n.split(".")[1] for n in seen] == wanted[who == "weight" :]


def test_the_other_sign_in_memory(backend):
    """The imaginary part of a conjugate, say: PyTorch negates when it is read."""
    y, other = (t.detach() for t in inputs()[:2])
    momentum = torch.tensor([0.25, 0.5])
    found = []
    for flipped in (False, True):
        given = [torch.complex(torch.zeros(()), -t).conj().imag if flipped else t for t in (y, momentum)]
        assert all(t.is_neg() == flipped for t in given)
        running = [[torch.zeros(C) for _ in range(2)] for _ in range(2)]
        options = {"training": True, "momentum": given[1], "backend": backend}
        found += [bn_relu_join([given[0], other], None, None, *running, **options), *running[0], *running[1]]
    for want, got in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("transform", [torch.func.vjp, torch.func.functionalize])
def test_a_transform_of_the_backward(transform, backend):
    """Of what an eager forward left."""
    y = inputs()[0]
    out = bn_relu_join([y], None, None, None, None, training=True, backend=backend)

    def backward(grad):
        return torch.autograd.grad(out, y, grad, retain_graph=True)[0]

    grad = torch.randn_like(out)
    got = transform(backward)(grad) if transform is torch.func.functionalize else transform(backward, grad)[0]
    torch.testing.assert_close(got, backward(grad))


def test_a_step_is_our_operators_alone(backend, monkeypatch):
    """Forward: statistics and join. Backward: reduction and gradients. On a GPU a merge after each reduction: three
    launches and three."""
    if backend == "reference":
        pytest.skip("the reference is PyTorch's operations")
    if INTERPRETED:
        pytest.skip("the interpreter moves tensors by PyTorch's operations")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    ys = inputs()
    params = [torch.ones(C, requires_grad=True) for _ in range(2 * K)]
    means, vars = [torch.zeros(C) for _ in range(K)], [torch.ones(C) for _ in range(K)]
    grad = torch.ones(4, C, 6, 7).to(memory_format=torch.channels_last)

    def step() -> None:
        out = bn_relu_join(ys, params[:K], params[K:], means, vars, training=True, backend=backend)
        torch.autograd.grad(out, [*ys, *params], grad)

    step()  # a first call compiles
    on_gpu = ys[0].is_cuda
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    names = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CPU]
    ours = [n.removeprefix("fractal_kernels::") for n in names if n.startswith("fractal_kernels::")]
    assert ours == ["channel_stats", "join_forward", "join_backward_reduce", "join_backward_apply"]
    computes = {n.removeprefix("aten::") for n in names if n.startswith("aten::")} - VIEWS
    assert not computes
    if on_gpu:
        launched = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if not launched:
            pytest.skip("the profiler sees no kernel here: CUPTI is not permitted")
        assert len(launched) == 6, launched


def test_statistics_that_autograd_saved_are_known_to_have_moved():
    mean, w = torch.zeros(3), torch.ones(3, requires_grad=True)
    saved = (w * mean).sum()
    bn_relu_join([torch.randn(4, 3, 5, 5)], None, None, [mean], [torch.ones(3)], training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_what_does_not_know_our_operators_moves_them_alike(monkeypatch):
    """By a momentum of each branch, of which not all are normalised, under a mask per sample; variances of a dtype of
    their own."""
    ys, mask = [torch.randn(4, 2, 3, 3) for _ in range(3)], torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 0]])
    found = []
    for tool in ("", "a test"):
        monkeypatch.setattr(exported, "foreign_tool", lambda tool=tool: tool)
        for momentum, dtype in ((torch.tensor([0.5, 0.25, 0.125]), torch.float32), (0.5, torch.float64)):
            means = [torch.zeros(2), None, torch.zeros(2)]
            moved = [torch.ones(2, dtype=dtype), None, torch.ones(2, dtype=dtype)]
            options = {"normalised": [True, False, True], "reduction": "sum"}
            out = bn_relu_join(ys, None, None, means, moved, mask, True, momentum, **options)
            found.append([out, *means[::2], *moved[::2]])
    torch.testing.assert_close(found[2:], found[:2])


def test_gradients_of_biases_alone():
    """In evaluation, with weights that are frozen."""
    ys, bias = [torch.randn(4, 2, 3, 3)], torch.zeros(2, requires_grad=True)
    out = bn_relu_join(ys, [torch.ones(2)], [bias], [torch.zeros(2)], [torch.ones(2)], activation="none")
    assert torch.equal(torch.autograd.grad(out.sum(), bias)[0], torch.full((2,), 36.0))
