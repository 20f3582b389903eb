"""Studies of the paper's claims on real data: does depth hurt, and what do two sets of running statistics buy?

Both train on scikit-learn's digits, draw and print what they find, and keep every number as JSON.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data, drop_path, evaluate, plots, train
from .data import Recipe, Split
from .model import FractalNet
from .plain import PlainNet

__all__ = ["depth", "depth_table", "fit", "losses", "statistics", "statistics_table"]

CHANNELS = (16, 32, 32)
BATCH, LR, EPOCHS = 50, 0.02, 40  # the paper's batch and learning rate (section 4.3)
WATCHED, EVERY = 500, 5  # training images whose loss is followed, and epochs between two looks
KINDS = tuple(plots.KINDS)
DEFAULT_KINDS = ("plain", "whole", "mixture")
DROPS: dict[str, dict[str, float]] = {
    "whole": {"local_drop": 0.0, "global_ratio": 0.0},
    "local": {"global_ratio": 0.0},
    "mixture": {},
}


# --- depth -----------------------------------------------------------------------------------------


def network(kind: str, columns: int, split: Split) -> FractalNet | PlainNet:
    """A network of B * 2**(C-1) layers: "plain", or a FractalNet that drops nothing ("whole"), "local"ly or by the
    "mixture"."""
    shape = {"in_channels": split.train_x.shape[1], "image_size": split.train_x.shape[2]}
    if kind == "plain":
        return PlainNet(split.classes, 2 ** (columns - 1), CHANNELS, **shape)
    return FractalNet(split.classes, columns, CHANNELS, **shape, **DROPS[kind])


def contenders(model: FractalNet | PlainNet) -> dict[str, dict[str, Any]]:
    """What has a loss of its own, and the arguments that run it."""
    if isinstance(model, PlainNet):
        return {"plain": {}}
    full = {"path": drop_path.full_path(len(model.blocks), model.columns)}
    return {"full": full} | {f"column {c}": {"column": c} for c in range(model.columns)}


@torch.no_grad()
def losses(model: FractalNet | PlainNet, x: Tensor, y: Tensor, batch: int = 100) -> dict[str, float]:
    """Loss of the network and of each column alone, normalised with the batches' own statistics.

    That is the loss that training lowers: running statistics lag behind weights that move. The model stays as it is.
    """
    copied = copy.deepcopy(model).train()
    parts = list(zip(x.split(batch), y.split(batch), strict=True))
    return {
        name: sum(F.cross_entropy(copied(a, **how), b, reduction="sum").item() for a, b in parts) / len(y)
        for name, how in contenders(model).items()
    }


def fit(model: FractalNet | PlainNet, split: Split, recipe: Recipe, seed: int, bar: Any) -> dict[str, Any]:
    """Trains in place; the losses of the first WATCHED training images before it, every few epochs, and after it.

    One seed gives every kind of network the same batches: drop-path draws from a generator of its own. The seconds are
    the processor's, of the training alone.
    """
    images, paths = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1_000_000))
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, fused=True)
    x, y = split.train_x[:WATCHED], split.train_y[:WATCHED]
    history = [{"epoch": 0, "losses": losses(model, x, y)}]
    steps = recipe.epochs * math.ceil(len(split.train_y) / recipe.batch_size)
    step, seconds = 0, 0.0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        start = time.process_time()
        for part, labels in data.batches(split, recipe, images):
            for group in optimizer.param_groups:
                group["lr"] = train.cosine(recipe.lr, step, steps)
            how = {"path": model.sample_path(len(labels), paths)} if isinstance(model, FractalNet) else {}
            loss = F.cross_entropy(model(part, **how), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
        seconds += time.process_time() - start
        if epoch % EVERY == 0 or epoch == recipe.epochs:
            history.append({"epoch": epoch, "losses": losses(model, x, y)})
        bar.update()
    return {"history": history, "cpu_seconds": seconds}


@torch.no_grad()
def answers(model: FractalNet | PlainNet, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Loss and accuracy in evaluation, with the running statistics."""
    model.eval()
    return {
        name: evaluate.score(torch.cat([model(part, **how) for part in x.split(evaluate.CHUNK)]), y)
        for name, how in contenders(model).items()
    }


def depth(
    columns: Sequence[int], epochs: int, seeds: Sequence[int], lr: float, kinds: Sequence[str], out: Path
) -> dict[str, Any]:
    """Plain and fractal networks of growing depth, trained alike: what `python -m fractalnet study depth` does."""
    data.require("sklearn", "matplotlib", "tqdm")
    from tqdm import tqdm

    recipe = Recipe("depth", "digits", {"channels": CHANNELS}, epochs, BATCH, lr)
    with data.folder_for(out):
        split = data.load(recipe.data)
        runs: list[dict[str, Any]] = []
        total = len(columns) * len(kinds) * len(seeds) * epochs
        quiet = 0.5 if sys.stderr.isatty() else 30  # seconds between two states of the bar: a log needs fewer
        with tqdm(total=total, unit="epoch", dynamic_ncols=True, mininterval=quiet) as bar:
            for count in columns:
                for kind in kinds:
                    for seed in seeds:
                        bar.set_description(f"{plots.KINDS[kind][1]}, C = {count}", refresh=False)
                        torch.manual_seed(seed)
                        model = network(kind, count, split)
                        trained = fit(model, split, recipe, seed, bar)
                        run = {"kind": kind, "columns": count, "depth": model.depth(), "seed": seed}
                        run["parameters"] = sum(p.numel() for p in model.parameters())
                        runs.append(run | trained | {"holdout": answers(model, split.test_x, split.test_y)})
        found = report(recipe, split) | {"watched": WATCHED, "runs": runs}
        files = {"depth.json": as_json(found), "depth.png": plots.depth(runs), "columns.png": plots.columns(runs)}
        data.write(out, files)
        print(f"\n{depth_table(runs)}\n\nwrote {', '.join(files)} to {out}")
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def depth_table(runs: Sequence[dict[str, Any]]) -> str:
    """What `depth` found, to be read: means over the seeds."""
    head = ["", "depth", "parameters", "training loss", "hold-out accuracy", "CPU seconds"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["columns"], run["kind"]), []).append(run)
    lines = []
    for (count, kind), group in groups.items():
        names = ["plain"] if kind == "plain" else ["full"]
        if kind == "mixture":  # the only one whose columns learn to answer alone
            names.append(f"column {count - 1}")
        for name in names:
            label = plots.KINDS[kind][1] + (", deepest column alone" if name.startswith("column") else "")
            loss = mean([run["history"][-1]["losses"][name] for run in group])
            accuracies = [run["holdout"][name]["accuracy"] for run in group]
            spread = f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(group) > 1 else ""
            figures = [f"{group[0]['parameters']:,}", f"{loss:.3f}", f"{mean(accuracies):.1%}{spread}"]
            lines.append(
                [label, str(group[0]["depth"]), *figures, f"{mean([run['cpu_seconds'] for run in group]):.0f}"]
            )
    return evaluate.grid([head, *lines])


# --- two sets of running statistics ----------------------------------------------------------------


def statistics(epochs: int, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """The demo's network with one set of running statistics and with two: `python -m fractalnet study statistics`.

    One training per seed and number of sets. Statistics do not act on training, so both reach the same weights; what
    differs is what they are evaluated with.
    """
    data.require("sklearn", "matplotlib", "tqdm", "yaml")
    recipe = data.load_recipe("digits", epochs=epochs)
    with data.folder_for(out):
        split = data.load(recipe.data)
        runs = [statistics_run(recipe, split, seed) for seed in seeds]
        found = report(recipe, split) | {"runs": runs}
        files = {"statistics.json": as_json(found)}
        data.write(out, files)
        print(f"\n{statistics_table(runs)}\n\nwrote {', '.join(files)} to {out}")
    return found


def statistics_run(recipe: Recipe, split: Split, seed: int) -> dict[str, Any]:
    """Hold-out loss and accuracy of the full network and the deepest column alone, by where the statistics are from."""
    shape = {"in_channels": split.train_x.shape[1], "image_size": split.train_x.shape[2]}
    scores: dict[str, Any] = {}
    weights: list[list[Tensor]] = []
    for sets in (False, True):
        torch.manual_seed(seed)
        model = evaluate.build({"num_classes": split.classes, **recipe.model, **shape, "split_stats": sets}, "study")
        train.fit(model, split, recipe, seed)
        deepest = model.columns - 1
        weights.append([p.detach().clone() for p in model.parameters()])
        scores["two sets" if sets else "one set"] = two(model, split)
        loader = split.train_x.split(recipe.batch_size)
        full = two(model.recalibrate(loader), split)["full"]
        alone = two(model.recalibrate(loader, deepest), split)["deepest column"]
        scores[("two sets" if sets else "one set") + ", recalibrated"] = {"full": full, "deepest column": alone}
    same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return {"seed": seed, "scores": scores, "same_weights": same}


def two(model: FractalNet, split: Split) -> dict[str, dict[str, float]]:
    scores = evaluate.scores(model, split.test_x, split.test_y)
    return {"full": scores["full"], "deepest column": scores[f"column {model.columns - 1}"]}


def statistics_table(runs: Sequence[dict[str, Any]]) -> str:
    """What `statistics` found, to be read: means over the seeds and, in brackets, the range."""
    head = ["running statistics", "full: accuracy", "loss", "deepest column alone: accuracy", "loss"]
    lines = []
    for name in runs[0]["scores"]:
        cells = [name]
        for who in ("full", "deepest column"):
            accuracies, all_losses = ([run["scores"][name][who][key] for run in runs] for key in ("accuracy", "loss"))
            cells.append(f"{mean(accuracies):.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})")
            cells.append(f"{mean(all_losses):.4f}")
        lines.append(cells)
    return evaluate.grid([head, *lines])


# --- files -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a run ran on; not the exact kernel, which says nothing about results that are kept."""
    versions = train.versions() | {"system": f"{platform.system()} {platform.machine()}"}
    return {"versions": versions, "threads": torch.get_num_threads()}


def report(recipe: Recipe, split: Split) -> dict[str, Any]:
    """What belongs beside the figures of a run."""
    return {"recipe": asdict(recipe), **machine(), "data": split.describe()}


def as_json(found: dict[str, Any]) -> bytes:
    return (json.dumps(found, indent=1) + "\n").encode()
