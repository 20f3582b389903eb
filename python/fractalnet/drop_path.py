"""Drop-path: local, global and their mixture, per batch or per sample, as explicit paths.

Local: every join drops each input with probability p, at least one survives. Global: one column for the whole network.
Source: Larsson et al. 2016 (arXiv:1605.07648), section 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from fractal_kernels import compiling
from fractal_kernels.schedule import schedule

from .layers import check, is_number

MIXTURES = ("random", "alternating")
Rate = float | Sequence[Sequence[float]]


class Path:
    """Which branches the joins of a network keep.

    Attributes:
        keep: bool, [B, R, C] (a path for the batch) or [B, R, C, N] (one per sample), on the CPU, or for a dense
            execution on the network's device: whether column c is kept in the join of row r of block b.
        column: the column that runs alone (global drop-path), or None.
        alone: ``column is not None`` as a 0-dim integer tensor: it selects the set of running statistics as data, so
            that a compiled step is one graph.
    Raises:
        ValueError: keep of another shape or dtype.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 3. B blocks, R = 2**(C-1) rows, C columns.
    Example:
        >>> from fractalnet import FractalNet
        >>> net = FractalNet(10, 2, (8,), image_size=8)
        >>> path = Path(torch.tensor([[[False, True], [False, True]]]), column=1)  # the deeper one, two convolutions
        >>> torch.equal(net(torch.ones(2, 3, 8, 8), path=path), net(torch.ones(2, 3, 8, 8), column=1))
        True
    """

    def __init__(self, keep: Tensor, column: int | None = None) -> None:
        if not isinstance(keep, Tensor):
            raise TypeError(f"Path: expected keep to be a Tensor, got {type(keep).__name__}")
        if keep.dim() not in (3, 4) or keep.dtype != torch.bool:
            raise ValueError(f"Path: expected keep bool [B, R, C] or [B, R, C, N], got {keep.dtype} {list(keep.shape)}")
        self.keep = keep
        self.column = column
        self.alone = torch.tensor(int(column is not None), device="cpu")

    def __repr__(self) -> str:
        return f"Path(keep={list(self.keep.shape)}, column={self.column})"


@compiling.assume_constant_result  # it would trace through what is cached, and warn
def _ends(columns: int) -> Tensor:
    return torch.tensor(_ends_by_row(columns), device="cpu")


@cache  # not of a tensor: where one is first made in torch.export, it is a fake one
def _ends_by_row(columns: int) -> tuple[tuple[bool, ...], ...]:
    ends = [{unit.column for unit in row} for row in schedule(columns).ends]
    return tuple(tuple(column in row for column in range(columns)) for row in ends)


def full_path(blocks: int, columns: int) -> Path:
    """The path that keeps everything."""
    return Path(_ends(columns).expand(blocks, -1, -1).clone())


def column_path(blocks: int, columns: int, column: int) -> Path:
    """One column alone through the whole network."""
    inside = isinstance(column, int) and 0 <= column < columns
    check("column_path", "column", inside, f"from 0 to {columns - 1}", column)
    only = torch.zeros(columns, dtype=torch.bool, device="cpu")
    only[column] = True
    return Path((_ends(columns) & only).expand(blocks, -1, -1).clone(), column)


def _local(blocks: int, columns: int, p: float, samples: int, generator: torch.Generator | None) -> Tensor:
    ends = _ends(columns).unsqueeze(-1)
    draws = torch.rand((2, blocks, *ends.shape[:2], samples), generator=generator, dtype=torch.float32, device="cpu")
    keep = (draws[0] >= p) & ends
    revived = torch.zeros_like(keep).scatter_(2, (draws[1] + ends).argmax(2, keepdim=True), True)
    return keep | (revived & ~keep.any(2, keepdim=True))


def rate(value: Rate, step: int) -> float:
    """A rate at a step of the training: a number, or knots (step, rate), linear in between and constant beyond them.

    Example:
        >>> rate([(0, 0.0), (100, 0.2)], 50)
        0.1
    """
    if isinstance(value, int | float):
        return float(value)
    before = value[0]
    for knot in value:
        if knot[0] > step:
            share = (step - before[0]) / (knot[0] - before[0]) if step > before[0] else 0.0
            return before[1] + share * (knot[1] - before[1])
        before = knot
    return float(before[1])


def kept_rate(value: Rate) -> Rate:
    """A rate that nothing outside changes."""
    return value if isinstance(value, int | float) else tuple((s, r) for s, r in value)


def check_rate(op: str, name: str, value: Rate) -> None:
    """Raises ValueError unless every rate lies in [0, 1] and steps increase."""
    try:
        knots = [(0, value)] if isinstance(value, int | float) else [(s, r) for s, r in value]
    except (TypeError, ValueError):
        knots = []
    good = not isinstance(value, Iterator) and all(isinstance(v, Real) for knot in knots for v in knot)
    good = good and all(0 <= r <= 1 for _, r in knots) and all(a[0] < b[0] for a, b in pairwise(knots))
    if not knots or not good:
        raise ValueError(f"{op}: expected {name} in [0, 1], or knots (step, rate) of increasing steps, got {value!r}")


def generator_for(*key: int) -> torch.Generator:
    """The CPU generator of a key such as (seed, step): its numbers depend on nothing else, so there is no state."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))


def tied_loss(
    logits: Tensor, target: Tensor, criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    r"""The loss of a network in training with ``global_mode="tied"``; of any other logits, their criterion.

    .. math:: L = l(full) + \sum_c l(column_c) / C

    Args:
        logits: [1 + C, N, classes], the full network and every column; or [N, classes].
        target: [N]. criterion: of one network's logits.
    Source:
        the authors' implementation of global drop-path (Larsson et al. 2016, section 3).
    Example:
        >>> tied_loss(torch.zeros(4, 2, 10), torch.tensor([1, 2])).item()  # 2 log 10
        4.605170249938965
    """
    if logits.dim() == 2:
        return criterion(logits, target)
    if logits.dim() != 3 or len(logits) < 2:
        raise ValueError(f"tied_loss: expected logits [N, classes] or [1 + C, N, classes], got {list(logits.shape)}")
    full, *columns = (criterion(one, target) for one in logits)
    return full + sum(columns) / len(columns)


def sample_path(
    blocks: int,
    columns: int,
    batch_size: int,
    *,
    local_drop: float = 0.15,
    global_ratio: float = 0.5,
    granularity: str = "batch",
    mixture: str = "random",
    step: int = 0,
    generator: torch.Generator | None = None,
) -> Path:
    """Draws a path of the mixture: global with probability ``global_ratio``, else local.

    Args:
        blocks, columns: B and C. batch_size: N.
        local_drop: probability of dropping an input of a join.
        global_ratio: share of global paths: of batches, or of the samples of every batch (its last ones, column by
            column: a batch is in random order, and neighbours that keep one column may run nothing else; the deepest
            first, beside the samples that run everything, so that most of its convolutions are one for both).
        granularity: "batch" or "sample".
        mixture: "random", or "alternating": whole batches are global or local in turn, by ``step``.
        generator: a CPU generator; the same state gives the same path.
    Example:
        >>> sample_path(5, 3, 50).keep.shape
        torch.Size([5, 4, 3])
    """
    check("sample_path", "granularity", granularity in ("batch", "sample"), "'batch' or 'sample'", granularity)
    check("sample_path", "mixture", mixture in MIXTURES, "'random' or 'alternating'", mixture)
    check("sample_path", "batch_size", isinstance(batch_size, int) and batch_size >= 0, ">= 0", batch_size)
    for name, value in (("local_drop", local_drop), ("global_ratio", global_ratio)):
        check("sample_path", name, is_number(value) and 0 <= value <= 1, "in [0, 1]", value)
    if mixture == "alternating":  # the share of global steps among the first ones is always the ratio, rounded down
        global_ratio = float(int((step + 1) * global_ratio) > int(step * global_ratio))
    if granularity == "batch":
        if torch.rand((), generator=generator, dtype=torch.float32, device="cpu") < global_ratio:
            return column_path(blocks, columns, int(torch.randint(columns, (), generator=generator, device="cpu")))
        return Path(_local(blocks, columns, local_drop, 1, generator)[..., 0])
    keep = _local(blocks, columns, local_drop, batch_size, generator)
    # A whole number of samples whose mean is the ratio's share, in small batches too.
    alone = int(
        global_ratio * batch_size + float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))
    )
    if alone:
        chosen = torch.randint(columns, (alone,), generator=generator, device="cpu").sort(descending=True).values
        only = torch.arange(columns, device="cpu").unsqueeze(1) == chosen
        keep[..., batch_size - alone :] = _ends(columns).unsqueeze(-1) & only
    return Path(keep)
