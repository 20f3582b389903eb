"""Errors of the public functions: op, argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import torch
from torch import Tensor

from .library import MAX_BRANCHES, Flags

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(op: str, name: str, value: object, dtypes: Sequence[torch.dtype] = DTYPES) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: expected {name} of dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: expected {name} to be dense, got {value.layout}")
    return value


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where ``x`` is; on "meta" there is none."""
    device = x.device.type
    # torch.amp.is_autocast_available would break the graph of PyTorch 2.11's compiler.
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """For what runs in the dtype of its operands, whether or not a backward runs under autocast."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def branches(op: str, inputs: object) -> list[Tensor]:
    """k tensors [N, C, *] of one shape and device. Mixed dtypes are promoted under autocast only."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        raise TypeError(f"{op}: expected inputs to be a list or tuple of Tensors, got {type(inputs).__name__}")
    if not 1 <= len(inputs) <= MAX_BRANCHES:
        raise ValueError(f"{op}: expected 1 to {MAX_BRANCHES} inputs, got {len(inputs)}")
    ys = [tensor(op, f"inputs[{i}]", y) for i, y in enumerate(inputs)]
    if ys[0].dim() < 2:
        raise ValueError(f"{op}: expected inputs[0] of shape [N, C, *], got {list(ys[0].shape)}")
    for i, y in enumerate(ys):
        if y.shape != ys[0].shape:
            raise ValueError(f"{op}: expected inputs[{i}] of shape {list(ys[0].shape)}, got {list(y.shape)}")
        if y.device != ys[0].device:
            raise ValueError(f"{op}: expected inputs[{i}] on {ys[0].device}, got {y.device}")
    if any(y.dtype != ys[0].dtype for y in ys):
        if not is_autocast(ys[0]):
            got = [str(y.dtype).removeprefix("torch.") for y in ys]
            raise TypeError(f"{op}: expected inputs of one dtype, got {', '.join(got)}")
        dtype = ys[0].dtype
        for y in ys[1:]:
            dtype = torch.promote_types(dtype, y.dtype)
        ys = [y.to(dtype) for y in ys]
    return ys


def mask(op: str, value: object, ys: list[Tensor]) -> Tensor | None:
    """A mask [k] or [k, N] as contiguous bool."""
    if value is None:
        return None
    allowed = (torch.bool, torch.uint8, torch.int32, torch.int64, *DTYPES)
    m = tensor(op, "mask", value, allowed)
    k, n = len(ys), ys[0].shape[0]
    if not (m.dim() == 1 and m.shape[0] == k) and not (m.dim() == 2 and m.shape[0] == k and m.shape[1] == n):
        raise ValueError(f"{op}: expected mask of shape [k]=[{k}] or [k, N]=[{k}, {n}], got {list(m.shape)}")
    if m.device != ys[0].device:
        raise ValueError(f"{op}: expected mask on {ys[0].device}, got {m.device}")
    if m.requires_grad:
        raise ValueError(f"{op}: expected mask without gradients: it keeps a branch or not, got one that requires them")
    return (m if m.dtype == torch.bool else m != 0).contiguous()


def per_channel(op: str, name: str, values: object, ys: list[Tensor]) -> list[Tensor | None]:
    """k tensors [C] or Nones; None stands for k Nones."""
    if values is None:
        return [None] * len(ys)
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{op}: expected {name} to be a list of Tensors or None, got {type(values).__name__}")
    if len(values) != len(ys):
        raise ValueError(f"{op}: expected {name} to have one entry per input ({len(ys)}), got {len(values)}")
    out: list[Tensor | None] = []
    for i, value in enumerate(values):
        out.append(None if value is None else channel_vector(op, f"{name}[{i}]", value, ys[0]))
    return out


def plain(op: str, normalised: object, k: int, **params: list[Tensor | None]) -> tuple[int, ...]:
    """Of k branches those that are not normalised, which have none of the parameters."""
    if normalised is None:
        return ()
    if isinstance(normalised, str) or not isinstance(normalised, Sequence):
        raise TypeError(f"{op}: expected normalised to be a list of bools or None, got {type(normalised).__name__}")
    if len(normalised) != k:
        raise ValueError(f"{op}: expected normalised to have one entry per input ({k}), got {len(normalised)}")
    for i, value in enumerate(normalised):
        if not isinstance(value, bool):
            raise TypeError(f"{op}: expected normalised[{i}] to be a bool, got {type(value).__name__}")
    found = tuple(i for i, value in enumerate(normalised) if not value)
    for name, values in params.items():
        for i in found:
            if values[i] is not None:
                raise ValueError(f"{op}: expected {name}[{i}] None, as input {i} is not normalised, got a Tensor")
    return found


def channel_vector(op: str, name: str, value: object, y: Tensor) -> Tensor:
    t = tensor(op, name, value)
    if t.dim() != 1 or t.shape[0] != y.shape[1]:
        raise ValueError(f"{op}: expected {name} of shape [C]=[{y.shape[1]}], got {list(t.shape)}")
    if t.device != y.device:
        raise ValueError(f"{op}: expected {name} on {y.device}, got {t.device}")
    return t


def choice(op: str, name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: expected {name} one of {', '.join(map(repr, allowed))}, got {value!r}")


_OPTIONS: dict[str, dict[str | None, int]] = {
    "reduction": {"mean": 0, "sum": int(Flags.SUM)},
    "activation": {"none": 0, "branch": int(Flags.RELU_BRANCH), "output": int(Flags.RELU_OUTPUT)},
    "pool": {None: 0, "before": int(Flags.POOL_BEFORE), "after": int(Flags.POOL_AFTER)},
    "stats": {"all": 0, "live": int(Flags.STATS_LIVE)},
}


def join_options(op: str, reduction: str, activation: str, pool: str | None, stats: str) -> int:
    """The options of a join as the kernels' flags."""
    flags = 0
    for (name, allowed), value in zip(_OPTIONS.items(), (reduction, activation, pool, stats), strict=True):
        choice(op, name, value, list(allowed))
        flags |= allowed[value]
    return flags


def poolable(op: str, y: Tensor) -> None:
    if y.dim() != 4 or y.shape[2] < 2 or y.shape[3] < 2:
        raise ValueError(f"{op}: expected inputs of shape [N, C, H, W] with H, W >= 2 for pooling, got {list(y.shape)}")


def eps(op: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: expected eps to be a number, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{op}: expected eps >= 0, got {value}")
    return float(value)


def probability(op: str, name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{op}: expected {name} in [0, 1], got {value!r}")


def momentum(op: str, value: object, ys: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        tensor(op, "momentum", value)
        if value.dim() != 0 and tuple(value.shape) != (len(ys),):
            raise ValueError(f"{op}: expected momentum 0-dim or of shape [k]=[{len(ys)}], got {list(value.shape)}")
        if value.device != ys[0].device:
            raise ValueError(f"{op}: expected momentum on {ys[0].device}, got {value.device}")
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: expected momentum to be a number or a Tensor, got {type(value).__name__}")


def pair(op: str, name: str, value: object, minimum: int) -> tuple[int, int]:
    """An integer or two of them, as convolutions take them."""
    values = (value, value) if isinstance(value, int) else value
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{op}: expected {name} to be an int or a pair of ints, got {type(value).__name__}")
    if len(values) != 2 or not all(isinstance(v, int) and v >= minimum for v in values):
        raise ValueError(f"{op}: expected {name} an int or a pair of ints >= {minimum}, got {value!r}")
    return values[0], values[1]
