"""Joins of three branches [32, 64, 32, 32], channels_last, against eager and compiled PyTorch and a copy; and the
column step, a convolution of such a branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fractal_kernels as fk
from benchmarks import cases
from benchmarks.baselines import clean_bn_relu_join, clean_mean_join, eager_bn_relu_join, eager_mean_join
from benchmarks.compare import hold_together
from fractal_kernels.backends import launcher, resolve

K = cases.JOIN_BRANCHES
N, C = cases.JOIN_SHAPE[:2]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MASKS = {
    "all": "none dropped",
    "sample": "15 % dropped per sample",
    "batch": "one branch dropped for the batch",
}


def make_mask(kind: str) -> Tensor:
    """Bool [K, N]; of kind "batch", every sample drops the same branch."""
    if kind == "sample":
        return cases.draw_mask(K, N, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(K, N, dtype=torch.bool)
    mask[1] = kind != "batch"
    return mask


def label(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def further(row: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as with fp32 inputs, and as eager on contiguous (NCHW) tensors."""
    names = {"ours_fp32": "vs_fp32", "eager_nchw": "vs_eager_nchw"}
    return {key: row["ratios"][name]["figures"] for name, key in names.items() if name in row["ratios"]}


class Copy:
    """A copy into memory that is there, of half as many bytes as a kernel has to read and write: it moves the same."""

    def __init__(self, tensors: float, like: Tensor) -> None:
        self.source = torch.randn(int(tensors / 2 * like.numel())).to(like.dtype)
        self.target = torch.empty_like(self.source)

    def __call__(self, _: int) -> None:
        self.target.copy_(self.source)

    def held_against(self, row: dict[str, Any], name: str) -> dict[str, float]:
        """Bytes per second of a contender, and as a share of the copy's."""
        own, copy = (2e-9 * self.source.nbytes / (1e-3 * row["contenders"][n]["figure"]) for n in (name, "copy"))
        return {"gb_per_s": own, "copy_gb_per_s": copy, "share_of_copy": own / copy}


def contiguous(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().contiguous().requires_grad_() for x in inputs]


class Norms:
    """Fp32 parameters and running statistics of K batch norms, and the eager modules that hold the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.rand(C, generator=generator).add_(0.5).requires_grad_() for _ in range(K)]
        self.biases = [torch.randn(C, generator=generator).mul_(0.1).requires_grad_() for _ in range(K)]
        self.means = [torch.zeros(C) for _ in range(K)]
        self.vars = [torch.ones(C) for _ in range(K)]
        self.modules = [nn.BatchNorm2d(C) for _ in range(K)]
        for module, weight, bias in zip(self.modules, self.weights, self.biases, strict=True):
            module.weight, module.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())

    def tensors(self) -> tuple[list[Tensor], ...]:
        return self.weights, self.biases, self.means, self.vars

    def trained(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def trained_modules(self) -> list[Tensor]:
        return [*(m.weight for m in self.modules), *(m.bias for m in self.modules)]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "all"), (torch.float32, "sample"), (torch.bfloat16, "all")],
    ids=["fp32-all", "fp32-sample", "bf16-all"],
)
def test_mean_join_forward(compare: Callable[..., None], dtype: torch.dtype, kind: str) -> None:
    """Forward without gradients, and the bandwidth that the kernel reaches as a share of a copy's.

    Like is held against like: kernel and copy both write into memory that is there; what the public
    function adds, checks, dispatch and the allocation of its output, is in "ours".
    """
    mask = make_mask(kind)
    inputs = [x.detach() for x in cases.join_inputs(dtype)[0]]
    fused = compiled(clean_mean_join)
    copy = Copy(int(mask.sum()) / N + 1, inputs[0])  # live branches read, output written
    out = torch.empty_like(inputs[0])
    launch = launcher(resolve("bench", None, torch.device("cpu"), dtype)).join_forward

    with torch.no_grad():
        expected = [eager_mean_join([x.float() for x in inputs], mask)]
        hold_together("masked_mean_join", [fk.masked_mean_join(inputs, mask)], expected, TOLERANCE[dtype])
        hold_together("compiled join", [fused(inputs, mask)], expected, TOLERANCE[dtype])
        contenders = {
            "ours": lambda i: fk.masked_mean_join(inputs, mask),
            "eager": lambda i: eager_mean_join(inputs, mask),
            "compiled": lambda i: fused(inputs, mask),
            "kernel": lambda i: launch(out, inputs, mask, [], [], [], [], 0.0, 0, True),
            "copy": copy,
        }
        if dtype != torch.float32:
            wide = [x.float() for x in inputs]
            contenders["ours_fp32"] = lambda i: fk.masked_mean_join(wide, mask)

        def extra(row: dict[str, Any]) -> dict[str, float]:
            return copy.held_against(row, "kernel") | further(row)

        compare("join", f"masked_mean_join, forward, {label(dtype)}, {MASKS[kind]}", contenders, 60, extra=extra)


def gradients(function: Callable[..., Tensor], grad: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of one forward and backward."""
    out = function()
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "all"), (torch.float32, "sample"), (torch.float32, "batch"), (torch.bfloat16, "sample")],
    ids=["fp32-all", "fp32-sample", "fp32-batch", "bf16-sample"],
)
def test_mean_join_training(compare: Callable[..., None], dtype: torch.dtype, kind: str) -> None:
    """Forward and backward. A mask of one draw for the batch reaches ours as [K], the baselines as [K, N].

    This moves the live branches, the output, its gradient and K gradients, of which those of a mask for the batch are
    two in ours: the copy says how fast that can be on this machine.
    """
    mask = make_mask(kind)
    own = mask[:, 0].clone() if kind == "batch" else mask
    inputs, grad = cases.join_inputs(dtype)
    fused = compiled(clean_mean_join)
    copy = Copy(int(mask.sum()) / N + 2 + (2 if kind == "batch" else K), inputs[0])
    wide = [x.detach().float().requires_grad_() for x in inputs]
    wide_grad = grad.float()

    contenders = {
        "ours": lambda i: gradients(lambda: fk.masked_mean_join(inputs, own), grad, inputs),
        "eager": lambda i: gradients(lambda: eager_mean_join(inputs, mask), grad, inputs),
        "compiled": lambda i: gradients(lambda: fused(inputs, mask), grad, inputs),
        "copy": copy,
    }
    expected = gradients(lambda: eager_mean_join(wide, mask), wide_grad, wide)
    for name in ("ours", "compiled"):
        hold_together(f"{name}, mean join", contenders[name](0), expected, TOLERANCE[dtype])
    if dtype != torch.float32:
        contenders["ours_fp32"] = lambda i: gradients(lambda: fk.masked_mean_join(wide, own), wide_grad, wide)
    else:
        flat, flat_grad = contiguous(inputs), grad.contiguous()
        contenders["eager_nchw"] = lambda i: gradients(lambda: eager_mean_join(flat, mask), flat_grad, flat)
    what = f"masked_mean_join, forward + backward, {label(dtype)}, {MASKS[kind]}"
    compare("join", what, contenders, 40, extra=lambda row: copy.held_against(row, "ours") | further(row))


@DTYPES
def test_bn_relu_join_training(compare: Callable[..., None], dtype: torch.dtype) -> None:
    """Batch norm in training, ReLU and masked mean, forward and backward; fp32 parameters."""
    mask = make_mask("sample")
    inputs, grad = cases.join_inputs(dtype)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    wide_grad = grad.float()
    own, own_fp32, norms, reference, other = (Norms() for _ in range(5))
    fused = compiled(clean_bn_relu_join)

    contenders = {
        "ours": lambda i: gradients(
            lambda: fk.bn_relu_join(inputs, *own.tensors(), mask, training=True), grad, [*inputs, *own.trained()]
        ),
        "eager": lambda i: gradients(
            lambda: eager_bn_relu_join(inputs, norms.modules, mask), grad, [*inputs, *norms.trained_modules()]
        ),
        "compiled": lambda i: gradients(
            lambda: fused(inputs, *other.tensors(), mask), grad, [*inputs, *other.trained()]
        ),
    }
    expected = gradients(
        lambda: eager_bn_relu_join(wide, reference.modules, mask), wide_grad, [*wide, *reference.trained_modules()]
    )
    for name in ("ours", "compiled"):
        hold_together(f"{name}, bn_relu_join", contenders[name](0), expected, TOLERANCE[dtype])
    statistics = [*(m.running_mean for m in reference.modules), *(m.running_var for m in reference.modules)]
    hold_together("ours, running statistics", [*own.means, *own.vars], statistics, TOLERANCE[dtype])
    if dtype != torch.float32:
        contenders["ours_fp32"] = lambda i: gradients(
            lambda: fk.bn_relu_join(wide, *own_fp32.tensors(), mask, training=True),
            wide_grad,
            [*wide, *own_fp32.trained()],
        )
    else:
        flat, flat_grad, flat_norms = contiguous(inputs), grad.contiguous(), Norms()
        contenders["eager_nchw"] = lambda i: gradients(
            lambda: eager_bn_relu_join(flat, flat_norms.modules, mask),
            flat_grad,
            [*flat, *flat_norms.trained_modules()],
        )
    what = f"bn_relu_join in training, forward + backward, {label(dtype)}, {MASKS['sample']}"
    compare("join", what, contenders, 30, extra=further)


def test_conv_bn_relu_training(compare: Callable[..., None]) -> None:
    """3x3 convolution from 64 to 64 channels, batch norm in training and ReLU, forward and backward."""
    x, grad = cases.join_inputs(torch.float32, branches=1)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(C, C, 3, 3, generator=generator) / C).to(memory_format=torch.channels_last).requires_grad_()
    norms = [nn.BatchNorm2d(C) for _ in range(3)]

    def wanted(norm: nn.BatchNorm2d) -> list[Tensor]:
        return [*x, weight, norm.weight, norm.bias]

    def state(norm: nn.BatchNorm2d) -> list[Tensor | None]:
        return [norm.weight, norm.bias, norm.running_mean, norm.running_var]

    def ours(norm: nn.BatchNorm2d) -> Tensor:
        return fk.conv_bn_relu(x[0], weight, *state(norm), training=True)

    def eager(norm: nn.BatchNorm2d) -> Tensor:
        return torch.batch_norm(torch.conv2d(x[0], weight, padding=1), *state(norm), True, 0.1, 1e-5, True).relu()

    fused = compiled(eager)
    contenders = {
        "ours": lambda i: gradients(lambda: ours(norms[0]), grad, wanted(norms[0])),
        "eager": lambda i: gradients(lambda: eager(norms[1]), grad, wanted(norms[1])),
        "compiled": lambda i: gradients(lambda: fused(norms[2]), grad, wanted(norms[2])),
    }
    hold_together("ours, conv_bn_relu", contenders["ours"](0), contenders["eager"](0), 1e-3)
    compare("join", "conv_bn_relu in training, forward + backward, fp32, 64 to 64 channels", contenders, 30)
