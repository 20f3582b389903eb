"""Accuracy against time: the answers as they come, and what early exit gains over the columns by themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .early_exit import early_exit
from .evaluate import CHUNK, alternate, contenders, grid, score
from .model import FractalNet

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)


@torch.no_grad()
def answers(model: FractalNet, x: Tensor, y: Tensor, rounds: int = 5) -> list[dict[str, Any]]:
    """Per answer of `model.anytime`: its accuracy, and the median time until it is there, for all of x, in parts."""
    model.eval()
    found: dict[int, list[Tensor]] = {column: [] for column in range(model.columns)}
    elapsed: dict[int, list[float]] = {column: [] for column in found}
    for i in range(-2, rounds):
        taken = dict.fromkeys(found, 0.0)
        for part in x.split(CHUNK):
            start = time.perf_counter()
            for column, _, logits in model.anytime(part):
                if logits.is_cuda:
                    torch.cuda.synchronize()
                taken[column] += 1e3 * (time.perf_counter() - start)
                if i == -2:
                    found[column].append(logits)
        for column in found if i >= 0 else ():
            elapsed[column].append(taken[column])
    return [
        {"column": c, "depth": model.depth(c), **score(torch.cat(logits), y), "ms": statistics.median(elapsed[c])}
        for c, logits in found.items()
    ]


def answers_table(rows: Sequence[dict[str, Any]], images: int) -> str:
    """What `answers` found, to be read."""
    head = ["answer of", "depth (convs)", "hold-out accuracy", f"ms after the start, {images} images"]
    lines = [[f"column {r['column']}", str(r["depth"]), f"{r['accuracy']:.2%}", f"{r['ms']:.1f}"] for r in rows]
    return grid([head, *lines])


@torch.no_grad()
def exits(model: FractalNet, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
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

    def early(_: int = 0, *, confidence: float) -> tuple[Tensor, ...]:
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


def exits_table(rows: Sequence[dict[str, Any]], images: int) -> str:
    """What `exits` found, to be read."""
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
