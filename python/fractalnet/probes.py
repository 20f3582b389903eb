"""Linear classifier probes: how linearly separable the classes are after every join and after every step of a column.

Source: Alain and Bengio 2016 (arXiv:1610.01644).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import evaluate, export, outputs, plots, study, trained
from .files import folder_for, require, write
from .fused import ACTIVATIONS
from .model import FractalNet
from .sources import Split

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


@torch.no_grad()
def features(model: FractalNet, x: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """(where, depth, features [N, K]) of every join of the full network, then of every step of each column alone.

    Features are averaged over the pixels, and the last ones of a block are pooled first. A join's depth is that of the
    longest path to it. Everything is detached and in evaluation.
    """
    model.eval()
    z, depth = model.stem(x), model.depth() - len(model.blocks) * model.blocks[0].schedule.rows  # 1 with a stem
    for block in model.blocks:
        for joined in export.PlainBlock(block, folded=False).eval().joins(z):
            depth += 1
            yield "join", depth, joined.mean((2, 3))
        z = joined
    for column in range(model.columns):
        z, depth, last = x, 0, None
        for layer in model.extract_column(column):
            if last is not None and not isinstance(layer, POOLS):  # a pool belongs to the step before it
                yield f"column {column}", depth, last.mean((2, 3))
                last = None
            z = layer(z)
            if isinstance(layer, tuple(ACTIVATIONS.values())):
                depth += 1
            if isinstance(layer, (*ACTIVATIONS.values(), *POOLS)):
                last = z


def measure(model: FractalNet, split: Split) -> list[dict[str, Any]]:
    """Hold-out accuracy of a logistic regression on each of the standardised :func:`features`, trained on the training
    images: ``where``, ``depth``, ``features`` (K), ``accuracy``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = []
    train = features(model, split.train_x)
    for (where, depth, known), (_, _, new) in zip(train, features(model, split.test_x), strict=True):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(known.numpy(), split.train_y.numpy())
        accuracy = float(probe.score(new.numpy(), split.test_y.numpy()))
        rows.append({"where": where, "depth": depth, "features": known.shape[1], "accuracy": accuracy})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What `measure` found, to be read: a line per depth."""
    places = list(dict.fromkeys(row["where"] for row in rows))
    found = {(row["where"], row["depth"]): row["accuracy"] for row in rows}
    head = ["depth (convs)", *("joins of the full network" if p == "join" else f"{p} alone" for p in places)]
    lines = [
        [str(depth), *(f"{found[place, depth]:.2%}" if (place, depth) in found else "" for place in places)]
        for depth in sorted({row["depth"] for row in rows})
    ]
    return evaluate.grid([head, *lines])


def run(checkpoint: Path, root: Path | None, out: Path) -> list[dict[str, Any]]:
    """Probes a checkpoint, prints and writes: what `python -m fractalnet study probes` does."""
    require("sklearn", "matplotlib")
    model, content = trained.unpack_fractal(checkpoint)
    with folder_for(out):
        rows = measure(model, trained.split(content, root))
        found = {"recipe": content["recipe"], "seed": content["config"]["seed"], **study.machine()}
        files = {"probes.json": outputs.as_json(found | {"rows": rows}), "probes.png": plots.probes(rows)}
        write(out, files)
        print(f"{table(rows)}\n\nwrote {', '.join(files)} to {out}")
    return rows
