"""``drop_path_mask``: local drop-path."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import checks
from ..library import MAX_BRANCHES


def drop_path_mask(
    num_branches: int,
    p: float,
    batch_size: int | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws a local drop-path mask: every branch is dropped with probability p, and at least one survives.

    Args:
        num_branches: k, 1 to 8.
        p: probability of dropping a branch, in [0, 1]. If all are dropped, one drawn uniformly is revived.
        batch_size: N for a mask per sample, None for one draw for the batch.
        generator: source of randomness, on ``device``.
        device: where the mask is made, without a synchronisation.
    Returns:
        bool, [k] or [k, N]; True keeps the branch.
    Raises:
        ValueError: num_branches, p or batch_size out of range.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 3, local sampling.
    Example:
        >>> drop_path_mask(3, 1.0, 4).sum(0).tolist()
        [1, 1, 1, 1]
    """
    op = "drop_path_mask"
    if not isinstance(num_branches, Integral) or not 1 <= num_branches <= MAX_BRANCHES:
        raise ValueError(f"{op}: expected num_branches from 1 to {MAX_BRANCHES}, got {num_branches!r}")
    checks.probability(op, "p", p)
    if batch_size is not None and (not isinstance(batch_size, (Integral, torch.SymInt)) or batch_size < 0):
        raise ValueError(f"{op}: expected batch_size None or >= 0, got {batch_size!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: expected generator None or a torch.Generator, got {type(generator).__name__}")
    shape = (num_branches, 1 if batch_size is None else batch_size)
    # No generator where there is none: with one, a size that torch.compile does not know is refused.
    draws = torch.rand(
        shape, dtype=torch.float32, device=device, **({} if generator is None else {"generator": generator})
    )
    # The greatest is kept: if not by itself, all are less than p, and each is as likely as the others to be it.
    keep = (draws >= p).scatter_(0, draws.argmax(0, keepdim=True), True)
    return keep[:, 0] if batch_size is None else keep
