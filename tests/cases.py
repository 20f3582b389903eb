"""Flags, layouts and data of the operator tests, and the comparison with the oracle."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import oracle
import torch
from torch import Tensor

from fractal_kernels import bn_relu_join
from fractal_kernels.library import Flags
from fractal_kernels.ops.join import _PlainJoin

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# No multiple of any vector, and an odd width; fewer tiles where Triton's interpreter takes a millisecond for each step.
SHAPE = (3, 5, 4, 5) if os.environ.get("TRITON_INTERPRET") == "1" else (4, 5, 6, 7)
WIDEST = torch.float64  # of the backend under test: what a test that asks for float64 gets


@dataclass(frozen=True)
class Case:
    """One setting of every flag of the join."""

    k: int = 3
    affine: bool = True
    activation: str = "branch"
    reduction: str = "mean"
    pool: str | None = None
    mask: str = "none"  # none, batch, sample
    stats: str = "all"
    training: bool = True
    normalise: bool = True
    tracked: bool = True
    plain: tuple[int, ...] = ()  # branches that are not normalised, among others that are

    def __str__(self) -> str:
        words = [f"k{self.k}", self.activation, self.reduction, f"pool_{self.pool}", f"mask_{self.mask}", self.stats]
        words += ["affine"] * self.affine + ["train" if self.training else "eval"]
        words += ["plain"] * (not self.normalise) + ["untracked"] * (not self.tracked)
        words += ["plain" + "".join(map(str, self.plain))] * bool(self.plain)
        return "-".join(words)

    @property
    def normalised(self) -> list[bool]:
        return [self.normalise and i not in self.plain for i in range(self.k)]

    @property
    def flags(self) -> dict[str, str | None]:
        return dict(reduction=self.reduction, activation=self.activation, pool=self.pool, stats=self.stats)


def all_flags() -> list[Case]:
    """Every combination of flags, with 1 to 8 branches in turn."""
    masks = (("none", "all"), ("batch", "all"), ("batch", "live"), ("sample", "all"), ("sample", "live"))
    product = itertools.product(
        (True, False), ("branch", "output", "none"), ("mean", "sum"), (None, "before", "after"), masks, (True, False)
    )
    return [
        Case(1 + i % 8, affine, activation, reduction, pool, mask, stats, training)
        for i, (affine, activation, reduction, pool, (mask, stats), training) in enumerate(product)
    ]


def plain_flags() -> list[Case]:
    """Every combination of the flags of a join without normalisation."""
    product = itertools.product(
        ("none", "branch", "output"), ("mean", "sum"), (None, "before", "after"), ("none", "batch", "sample")
    )
    return [
        Case(1 + i % 8, False, activation, reduction, pool, mask, normalise=False)
        for i, (activation, reduction, pool, mask) in enumerate(product)
    ]


# --- layouts -----------------------------------------------------------------------------------


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def channel_slice(t: Tensor) -> Tensor:
    """Channels 3 .. 3 + C of a wider channels_last buffer, whose other channels hold NaN."""
    n, c, *rest = t.shape
    buffer = torch.full((n, *rest, c + 5), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[..., 3 : 3 + c].movedim(-1, 1)
    return view.copy_(t)


def contiguous_slice(t: Tensor) -> Tensor:
    n, c, *rest = t.shape
    buffer = torch.full((n, c + 2, *rest), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[:, 1 : 1 + c]
    return view.copy_(t)


def every_second(t: Tensor) -> Tensor:
    buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[..., 1::2]
    return view.copy_(t)


def swapped(t: Tensor) -> Tensor:
    """Width before height in memory: neither layout."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def batch_last(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "contiguous": Tensor.contiguous,
    "channel_slice": channel_slice,
    "contiguous_slice": contiguous_slice,
    "every_second": every_second,
    "swapped": swapped,
    "batch_last": batch_last,
}


def in_layouts(tensors: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    return [LAYOUTS[names[i % len(names)]](t) for i, t in enumerate(tensors)]


# --- data --------------------------------------------------------------------------------------


@dataclass
class Data:
    """Operands of a case. ``grad`` has the shape of the output."""

    ys: list[Tensor]
    weights: list[Tensor | None] | None
    biases: list[Tensor | None] | None
    running_means: list[Tensor | None] | None
    running_vars: list[Tensor | None] | None
    mask: Tensor | None
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return there([*self.ys, *(self.weights or []), *(self.biases or [])])

    def copy(self, dtype: torch.dtype | None = None) -> Data:
        """Fresh leaves of the same values and layouts, or all in ``dtype``."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_()

        def plain(ts: list[Tensor | None] | None) -> list[Tensor | None] | None:
            return ts and [None if t is None else t.clone() if dtype is None else t.to(dtype) for t in ts]

        return replace(
            self,
            ys=[leaf(y) for y in self.ys],
            weights=self.weights and [leaf(w) for w in self.weights],
            biases=self.biases and [leaf(b) for b in self.biases],
            running_means=plain(self.running_means),
            running_vars=plain(self.running_vars),
        )


def there(values: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in values if t is not None]


def device() -> torch.device:
    """Where tests make their tensors; random numbers are drawn on the CPU, the same for every device."""
    return torch.get_default_device()


def draw_mask(kind: str, k: int, n: int, generator: torch.Generator) -> Tensor | None:
    """Masks with dropped branches and, per sample, one sample that lost all of them."""
    if kind == "none":
        return None
    mask = (torch.rand((k,) if kind == "batch" else (k, n), generator=generator, device="cpu") < 0.6).to(device())
    if kind == "batch":
        mask[0] = True
    elif n:
        mask[:, 0], mask[0, -1] = False, True
    return mask


def draw(
    case: Case,
    dtype: torch.dtype = torch.float64,
    shape: Sequence[int] = SHAPE,
    layouts: Sequence[str] = ("channels_last",),
    seed: int = 0,
    grad_layout: str | None = None,
) -> Data:
    generator = torch.Generator("cpu").manual_seed(seed)
    channels = shape[1]
    dtype = WIDEST if dtype == torch.float64 else dtype
    parameters = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(device())

    def vectors(at: float, by: float, requires_grad: bool = False) -> list[Tensor | None]:
        drawn = [(at + by * normal(channels)).to(parameters).requires_grad_(requires_grad) for _ in range(case.k)]
        return [None if i in case.plain else t for i, t in enumerate(drawn)]

    ys = [(0.5 + (1 + i / 4) * normal(*shape)).to(dtype) for i in range(case.k)]
    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2) if case.pool else shape
    grad = normal(*pooled).to(dtype)
    tracked = case.normalise and case.tracked
    return Data(
        [y.requires_grad_() for y in in_layouts(ys, layouts)],
        vectors(1, 0.5, True) if case.affine else None,
        vectors(0, 0.5, True) if case.affine else None,
        vectors(0.3, 0.3) if tracked else None,
        [None if v is None else v.square() + 0.3 for v in vectors(1, 0.3)] if tracked else None,
        draw_mask(case.mask, case.k, shape[0], generator),
        LAYOUTS[grad_layout or layouts[0]](grad),
    )


# --- comparison --------------------------------------------------------------------------------


@dataclass
class Result:
    out: Tensor
    grads: list[Tensor]
    running: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.out, *self.grads, *self.running]


def run(case: Case, data: Data, backend: str | None) -> Result:
    """The library's forward, backward and running statistics, on copies."""
    d = data.copy()
    if case.normalise:
        out = bn_relu_join(
            d.ys,
            d.weights,
            d.biases,
            d.running_means,
            d.running_vars,
            d.mask,
            case.training,
            **case.flags,
            normalised=case.normalised if case.plain else None,
            backend=backend,
        )
    else:  # the flags that no public function combines without normalisation
        flags = Flags.SUM if case.reduction == "sum" else Flags(0)
        flags |= {"none": Flags(0), "branch": Flags.RELU_BRANCH, "output": Flags.RELU_OUTPUT}[case.activation]
        flags |= {None: Flags(0), "before": Flags.POOL_BEFORE, "after": Flags.POOL_AFTER}[case.pool]
        out = _PlainJoin.apply(int(flags), backend, d.mask, *d.ys)
    grads = torch.autograd.grad(out, d.leaves, d.grad)
    return Result(out.detach(), list(grads), there([*(d.running_means or []), *(d.running_vars or [])]))


def expect(case: Case, data: Data) -> Result:
    """The oracle's, from the same rounded operands."""
    d = data.copy(torch.float64)
    out, means, variances = oracle.join(
        d.ys,
        d.weights,
        d.biases,
        d.running_means,
        d.running_vars,
        d.mask,
        case.training,
        normalised=case.normalised,
        **case.flags,
    )
    grads = oracle.gradients(out, d.grad, d.leaves) if out.requires_grad else [torch.zeros_like(t) for t in d.leaves]
    return Result(out.detach(), grads, there([*means, *variances]))


ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(actual: Tensor, expected: Tensor, what: str = "value", slack: Tensor | float = 0.0) -> None:
    """One rounding to a half-precision dtype, and the errors of a sum in float32 (or float64), absolute."""
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return
    error, bound = (actual.to(torch.float64) - expected).abs(), bounds(actual.dtype, expected) + slack
    worst = (error - bound).flatten().argmax()
    assert bool((error <= bound).all()), (
        f"{what}: error {error.flatten()[worst].item():.3g} where {bound.flatten()[worst].item():.3g} is allowed, got "
        f"{actual.flatten()[worst].item():.6g}, expected {expected.flatten()[worst].item():.6g}; NaN: "
        f"{int(actual.isnan().sum())}"
    )


def bounds(dtype: torch.dtype, expected: Tensor) -> Tensor:
    arithmetic = (1e-12 if dtype == torch.float64 else 1e-5) * max(1.0, expected.abs().max().item())
    return arithmetic + ROUNDING[dtype] * (expected.abs() + arithmetic)


def undecided(case: Case, data: Data, actual: Result, expected: Result) -> list[Tensor]:
    """Of each gradient, twice what a rounding of the inputs to float32 changes: beside a ReLU's zero, or where two are
    the largest of a window by turns. A few in a million are, and by their sums they move what shares their channel."""
    found = [torch.zeros_like(e) for e in expected.grads]
    for seed in range(8):
        nudged = data.copy(torch.float64)
        generator = torch.Generator(device()).manual_seed(seed)
        for y in nudged.ys:
            y.data += 1e-6 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
        for slack, e, n in zip(found, expected.grads, expect(case, nudged).grads, strict=True):
            torch.maximum(slack, 2 * (n - e).abs(), out=slack)
    for slack, a, e in zip(found, actual.grads, expected.grads, strict=True):
        slack[slack <= 2 * bounds(a.dtype, e)] = 0
    for slack, a, e in list(zip(found, actual.grads, expected.grads, strict=True))[: case.k]:
        few = 2 + 1e-4 * slack.numel()
        assert (slack > 20 * bounds(a.dtype, e)).sum() <= few, "expected few gradients of inputs to be undecided"
    return found


def assert_results(case: Case, data: Data, actual: Result, expected: Result) -> None:
    k = case.k
    assert_close(actual.out, expected.out, "output")
    names = [f"{name}[{i}]" for name in ("grad of inputs", "grad of weights", "grad of biases") for i in range(k)]
    grads = list(zip(names, actual.grads, expected.grads, strict=False))
    try:
        for name, a, e in grads:
            assert_close(a, e, name)
    except AssertionError:
        if actual.out.dtype == torch.float64:
            raise
        for (name, a, e), slack in zip(grads, undecided(case, data, actual, expected), strict=True):
            assert_close(a, e, name, slack)
    names = [f"running_{name}[{i}]" for name in ("means", "vars") for i in range(k)]
    for name, a, e in zip(names, actual.running, expected.running, strict=False):
        assert_close(a, e, name)
    assert len(actual.tensors()) == len(expected.tensors())


def check(case: Case, data: Data, backend: str | None) -> Result:
    result = run(case, data, backend)
    assert_results(case, data, result, expect(case, data))
    return result


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8) if t.numel() else t.new_empty(0)


def assert_same_bits(a: Result, b: Result) -> None:
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert torch.equal(bits(x), bits(y))
