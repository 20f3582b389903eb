"""Studies of the paper's claims on real data: does depth hurt, and what do two sets of running statistics buy?

Both train on scikit-learn's digits, print what they find (`depth` draws it too), and keep every number as JSON.
"""

from __future__ import annotations

import copy
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import drop_path, evaluate, outputs, plots, sources
from .augment import Augment
from .config import Schedule
from .files import folder_for, require, write
from .model import FractalNet
from .plain import PlainNet
from .schedules import factor

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


@dataclass(frozen=True)
class Recipe:
    """SGD, its learning rate falling to zero along a half cosine; images moved by up to `shift` pixels."""

    epochs: int
    lr: float
    batch_size: int = BATCH
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    shift: int = 0


DEMO = {"columns": 3, "channels": (32, 64, 128)}  # the network of `make demo`


# --- depth -----------------------------------------------------------------------------------------


def network(kind: str, columns: int, data: sources.Dataset) -> FractalNet | PlainNet:
    """A network of B * 2**(C-1) layers: "plain", or a FractalNet that drops nothing ("whole"), "local"ly or by the
    "mixture"."""
    shape = {"num_classes": len(data.classes), "in_channels": data.channels, "image_size": data.image_size}
    if kind == "plain":
        return PlainNet(depth_per_block=2 ** (columns - 1), channels=CHANNELS, **shape)
    return FractalNet(columns=columns, channels=CHANNELS, **shape, **DROPS[kind])


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


def fit(model: FractalNet | PlainNet, data: sources.Dataset, recipe: Recipe, seed: int, bar: Any) -> dict[str, Any]:
    """Trains in place; the losses of the first WATCHED training images before it, every few epochs, and after it.

    One seed gives every kind of network the same batches: drop-path draws from a generator of its own. The seconds are
    the processor's, of the training alone.
    """
    images, paths = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1_000_000))
    options = {key: getattr(recipe, key) for key in ("lr", "momentum", "nesterov", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **options)
    augment = Augment.of(data, translate=recipe.shift, padding="black")
    pixels, labels = data.train.x, data.train.y
    x, y = augment.eval()(pixels[:WATCHED]), labels[:WATCHED]
    history = [{"epoch": 0, "losses": losses(model, x, y)}]
    steps = recipe.epochs * math.ceil(len(labels) / recipe.batch_size)
    step, seconds, cosine = 0, 0.0, Schedule("cosine")
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        start = time.process_time()
        for part in torch.randperm(len(labels), generator=images).split(recipe.batch_size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * factor(cosine, step / steps, 1)
            how = {"path": model.sample_path(len(part), paths)} if isinstance(model, FractalNet) else {}
            loss = F.cross_entropy(model(augment(pixels[part], (seed, step)), **how), labels[part])
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
    require("sklearn", "matplotlib", "tqdm")
    from tqdm import tqdm

    recipe = Recipe(epochs, lr)
    with folder_for(out):
        data = sources.load("digits")
        split = sources.tensors(data)
        runs: list[dict[str, Any]] = []
        total = len(columns) * len(kinds) * len(seeds) * epochs
        with tqdm(total=total, unit="epoch", dynamic_ncols=True, mininterval=quiet()) as bar:
            for count in columns:
                for kind in kinds:
                    for seed in seeds:
                        bar.set_description(f"{plots.KINDS[kind][1]}, C = {count}", refresh=False)
                        torch.manual_seed(seed)
                        model = network(kind, count, data)
                        trained = fit(model, data, recipe, seed, bar)
                        run = {"kind": kind, "columns": count, "depth": model.depth(), "seed": seed}
                        run["parameters"] = sum(p.numel() for p in model.parameters())
                        runs.append(run | trained | {"holdout": answers(model, split.test_x, split.test_y)})
        found = report(recipe, data) | {"channels": CHANNELS, "watched": WATCHED, "runs": runs}
        files = {"depth.json": outputs.as_json(found)}
        files |= {"depth.png": plots.depth(runs), "columns.png": plots.columns(runs)}
        write(out, files)
        print(f"\n{depth_table(runs)}\n\nwrote {', '.join(files)} to {out}")
    return found


def quiet() -> float:
    """Seconds between two states of a bar: a log needs fewer."""
    return 0.5 if sys.stderr.isatty() else 30


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
            loss = fmean([run["history"][-1]["losses"][name] for run in group])
            accuracies = [run["holdout"][name]["accuracy"] for run in group]
            spread = f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(group) > 1 else ""
            figures = [f"{group[0]['parameters']:,}", f"{loss:.3f}", f"{fmean(accuracies):.1%}{spread}"]
            lines.append(
                [label, str(group[0]["depth"]), *figures, f"{fmean([run['cpu_seconds'] for run in group]):.0f}"]
            )
    return evaluate.grid([head, *lines])


# --- two sets of running statistics ----------------------------------------------------------------


def statistics(epochs: int, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """The demo's network with one set of running statistics and with two: `python -m fractalnet study statistics`.

    One training per seed and number of sets. Statistics do not act on training, so both reach the same weights; what
    differs is what they are evaluated with.
    """
    require("sklearn", "tqdm")
    from tqdm import tqdm

    recipe = Recipe(epochs, 0.02, batch_size=64, nesterov=True, weight_decay=5e-4, shift=1)
    with folder_for(out):
        data = sources.load("digits")
        with tqdm(total=2 * len(seeds) * epochs, unit="epoch", dynamic_ncols=True, mininterval=quiet()) as bar:
            runs = [statistics_run(recipe, data, seed, bar) for seed in seeds]
        found = report(recipe, data) | {"network": DEMO, "runs": runs}
        files = {"statistics.json": outputs.as_json(found)}
        write(out, files)
        print(f"\n{statistics_table(runs)}\n\nwrote {', '.join(files)} to {out}")
    return found


def statistics_run(recipe: Recipe, data: sources.Dataset, seed: int, bar: Any) -> dict[str, Any]:
    """Hold-out loss and accuracy of the full network and the deepest column alone, by where the statistics are from."""
    shape = {"num_classes": len(data.classes), "in_channels": data.channels, "image_size": data.image_size}
    split = sources.tensors(data)
    found: dict[str, Any] = {}
    weights: list[list[Tensor]] = []
    for sets in (False, True):
        torch.manual_seed(seed)
        model = FractalNet(**DEMO, **shape, split_stats=sets)
        fit(model, data, recipe, seed, bar)
        deepest = model.columns - 1
        weights.append([p.detach().clone() for p in model.parameters()])
        found["two sets" if sets else "one set"] = two(model, split)
        loader = split.train_x.split(recipe.batch_size)
        full = two(model.recalibrate(loader), split)["full"]
        alone = two(model.recalibrate(loader, deepest), split)["deepest column"]
        found[("two sets" if sets else "one set") + ", recalibrated"] = {"full": full, "deepest column": alone}
    same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return {"seed": seed, "scores": found, "same_weights": same}


def two(model: FractalNet, split: sources.Split) -> dict[str, dict[str, float]]:
    scores = answers(model, split.test_x, split.test_y)
    return {"full": scores["full"], "deepest column": scores[f"column {model.columns - 1}"]}


def statistics_table(runs: Sequence[dict[str, Any]]) -> str:
    """What `statistics` found, to be read: means over the seeds and, in brackets, the range."""
    head = ["running statistics", "full: accuracy", "loss", "deepest column alone: accuracy", "loss"]
    lines = []
    for name in runs[0]["scores"]:
        cells = [name]
        for who in ("full", "deepest column"):
            accuracies, all_losses = ([run["scores"][name][who][key] for run in runs] for key in ("accuracy", "loss"))
            cells.append(f"{fmean(accuracies):.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})")
            cells.append(f"{fmean(all_losses):.4f}")
        lines.append(cells)
    return evaluate.grid([head, *lines])


# --- files -----------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a run ran on; not the exact kernel, which says nothing about results that are kept."""
    versions = outputs.versions() | {"system": f"{platform.system()} {platform.machine()}"}
    return {"versions": versions, "threads": torch.get_num_threads()}


def report(recipe: Recipe, data: sources.Dataset) -> dict[str, Any]:
    """What belongs beside the figures of a run."""
    return {"recipe": asdict(recipe), **machine(), "data": data.describe()}
