"""Synchronised batch norm: statistics and sums over the ranks of a process group, one collective each.

Every rank gathers what all of them found and adds it up in the order of the ranks, so that all have the same bits.
A rank whose batch is empty takes part with a count of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .library import _LIB


class Name(NamedTuple):
    """What a module keeps of its group: groups can be neither copied nor pickled."""

    name: str


def name_of(op: str, group: object) -> str:
    """A process group as the operators take it: by name; None: the empty one, nothing is synchronised."""
    if group is None:
        return ""
    if isinstance(group, Name):
        return group.name
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: expected group None or a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return str(group.group_name)


def _gathered(t: Tensor, group: str) -> Tensor:
    """[ranks, *shape]."""
    try:
        ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]
    except RuntimeError as error:  # of a module that came from another process
        message = f"sync_batch_norm: expected the process group {group!r} to be there; call it again here"
        raise RuntimeError(message) from error
    parts = [torch.empty_like(t) for _ in range(ranks.size())]
    dist.all_gather(parts, t, group=ranks)
    return torch.stack(parts)


def merge(mean: Tensor, var: Tensor, count: Tensor, group: str) -> None:
    """Statistics [n, C], [n, C], [n] become those of all ranks' values, in place (Chan et al. 1983)."""
    means, vars, counts = _gathered(torch.cat([mean, var, count.unsqueeze(1)], 1), group).split(
        [mean.shape[1], mean.shape[1], 1], 2
    )
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean.copy_((means * share).sum(0))
    var.copy_(((vars + (means - mean).square()) * share).sum(0))
    count.copy_(total.squeeze(1))


_LIB.define("sync_stats(Tensor mean, Tensor var, Tensor count, str group) -> (Tensor, Tensor, Tensor)")
_LIB.define("sync_sums(Tensor sums, str group) -> Tensor")


@torch.library.impl(_LIB, "sync_stats", "CompositeExplicitAutograd")
def _sync_stats(mean: Tensor, var: Tensor, count: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    out = mean.clone(), var.clone(), count.clone()
    merge(*out, group)
    return out


@torch.library.impl(_LIB, "sync_sums", "CompositeExplicitAutograd")
def add(sums: Tensor, group: str) -> Tensor:
    """The sum over all ranks."""
    return _gathered(sums, group).sum(0)


@torch.library.register_fake("fractal_kernels::sync_stats", lib=_LIB)
def _sync_stats_fake(mean: Tensor, var: Tensor, count: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(var), torch.empty_like(count)


@torch.library.register_fake("fractal_kernels::sync_sums", lib=_LIB)
def _sync_sums_fake(sums: Tensor, group: str) -> Tensor:
    return torch.empty_like(sums)
