"""Drop-path: local, global and their mixture, per batch or per sample, as explicit paths.

Local: every join drops each input with probability p, at least one survives. Global: one column for the whole network.
Source: Larsson et al. 2016 (arXiv:1605.07648), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fractal_kernels.schedule import schedule

__all__ = ["Path", "column_path", "full_path", "sample_path"]


class Path:
    """Which branches the joins of a network keep.

    Attributes:
        keep: bool, [B, R, C] on the CPU (a path for the batch) or [B, R, C, N] (one per sample): whether column c is
            kept in the join of row r of block b.
        column: the column that runs alone (global drop-path), or None.
        alone: ``column is not None`` as a 0-dim integer tensor: it selects the set of running statistics as data, so
            that a compiled step is one graph.
    """

    def __init__(self, keep: Tensor, column: int | None = None) -> None:
        if keep.dim() not in (3, 4) or keep.dtype != torch.bool:
            raise ValueError(f"Path: expected keep bool [B, R, C] or [B, R, C, N], got {keep.dtype} {list(keep.shape)}")
        self.keep = keep
        self.column = column
        self.alone = torch.tensor(int(column is not None), device="cpu")

    def __repr__(self) -> str:
        return f"Path(keep={list(self.keep.shape)}, column={self.column})"


def _ends(columns: int) -> Tensor:
    s = schedule(columns)
    ends = torch.zeros(s.rows, columns, dtype=torch.bool, device="cpu")
    for row, units in enumerate(s.ends):
        for unit in units:
            ends[row, unit.column] = True
    return ends


def full_path(blocks: int, columns: int) -> Path:
    """The path that keeps everything."""
    return Path(_ends(columns).expand(blocks, -1, -1).clone())


def column_path(blocks: int, columns: int, column: int) -> Path:
    """One column alone through the whole network."""
    if not isinstance(column, int) or not 0 <= column < columns:
        raise ValueError(f"column_path: expected column from 0 to {columns - 1}, got {column!r}")
    only = torch.zeros(columns, dtype=torch.bool, device="cpu")
    only[column] = True
    return Path((_ends(columns) & only).expand(blocks, -1, -1).clone(), column)


def _local(blocks: int, columns: int, p: float, samples: int, generator: torch.Generator | None) -> Tensor:
    ends = _ends(columns).unsqueeze(-1)
    draws = torch.rand((2, blocks, *ends.shape[:2], samples), generator=generator, device="cpu")
    keep = (draws[0] >= p) & ends
    revived = torch.zeros_like(keep).scatter_(2, (draws[1] + ends).argmax(2, keepdim=True), True)
    return keep | (revived & ~keep.any(2, keepdim=True))


def sample_path(
    blocks: int,
    columns: int,
    batch_size: int,
    *,
    local_drop: float = 0.15,
    global_ratio: float = 0.5,
    granularity: str = "batch",
    generator: torch.Generator | None = None,
) -> Path:
    """Draws a path of the mixture: global with probability ``global_ratio``, else local.

    Args:
        blocks, columns: B and C. batch_size: N.
        local_drop: probability of dropping an input of a join.
        global_ratio: share of global paths: of batches, or of the samples of every batch (its last ones).
        granularity: "batch" or "sample".
        generator: a CPU generator; the same state gives the same path.
    Example:
        >>> sample_path(5, 3, 50).keep.shape
        torch.Size([5, 4, 3])
    """
    if granularity not in ("batch", "sample"):
        raise ValueError(f"sample_path: expected granularity 'batch' or 'sample', got {granularity!r}")
    for name, value in (("local_drop", local_drop), ("global_ratio", global_ratio)):
        if not 0 <= value <= 1:
            raise ValueError(f"sample_path: expected {name} in [0, 1], got {value!r}")
    if granularity == "batch":
        if torch.rand((), generator=generator, device="cpu") < global_ratio:
            return column_path(blocks, columns, int(torch.randint(columns, (), generator=generator, device="cpu")))
        return Path(_local(blocks, columns, local_drop, 1, generator)[..., 0])
    keep = _local(blocks, columns, local_drop, batch_size, generator)
    alone = round(global_ratio * batch_size)
    if alone:
        chosen = torch.randint(columns, (alone,), generator=generator, device="cpu").sort().values
        only = torch.arange(columns, device="cpu").unsqueeze(1) == chosen
        keep[..., batch_size - alone :] = _ends(columns).unsqueeze(-1) & only
    return Path(keep)
