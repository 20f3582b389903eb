"""Accuracy against time: what early exit gains over the columns by themselves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .early_exit import early_exit
from .evaluate import CHUNK, alternate, contenders, grid, score
from .model import FractalNet

__all__ = ["CONFIDENCES", "measure", "table"]

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


@torch.no_grad()
def measure(model: FractalNet, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Accuracy and time of early exit at several confidences, beside the full network's and each column's own.

    Per row: ``name``, ``confidence`` (None: the full network or a ``column`` itself), ``accuracy``, ``loss``, ``ms``
    (median of rounds in which every row has its turn, for all of x) and ``shares``, the part of the samples that each
    column answered.
    """
    model.eval()
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[int], Any]] = {}

    def whole(_: int = 0, **how: Any) -> Tensor:
        return torch.cat([model(part, **how) for part in x.split(CHUNK)])

    def early(_: int = 0, confidence: float = 0.0) -> tuple[Tensor, ...]:
        parts = [early_exit(model, part, confidence) for part in x.split(CHUNK)]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    for name, how in contenders(model).items():
        calls[name] = partial(whole, **how)
        own = {"name": name, "column": how.get("column"), "confidence": None, "shares": None}
        rows.append(own | score(whole(**how), y))
    for confidence in CONFIDENCES:
        name = f"confidence {confidence:g}"
        calls[name] = partial(early, confidence=confidence)
        logits, answered = early(confidence=confidence)
        shares = (answered.bincount(minlength=model.columns) / len(y)).tolist()
        rows.append({"name": name, "confidence": confidence, **score(logits, y), "shares": shares})
    times = alternate(calls, cycle=6)
    return [row | {"ms": statistics.median(times[row["name"]])} for row in rows]


def table(rows: Sequence[dict[str, Any]], images: int) -> str:
    """What `measure` found, to be read."""
    head = ["answer of", "hold-out accuracy", f"ms, {images} images", "answered by columns 0, 1, ..."]
    lines = []
    for row in rows:
        name = row["name"]
        if row["confidence"] is None:
            label = "full network" if name == "full" else f"{name} alone"
        else:
            label = f"early exit, {name}"
        shares = ", ".join(f"{share:.0%}" for share in row["shares"] or ())
        lines.append([label, f"{row['accuracy']:.2%}", f"{row['ms']:.1f}", shares])
    return grid([head, *lines])
