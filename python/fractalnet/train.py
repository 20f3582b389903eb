"""Training a FractalNet by a recipe, and the files that a run leaves."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fractal_kernels import available_backends

from . import data, evaluate, plots
from .data import Recipe, Split
from .model import FractalNet

__all__ = ["fit", "run"]


def cosine(lr: float, step: int, steps: int) -> float:
    """The learning rate at one of `steps` steps: from lr to zero along a half cosine."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(model: FractalNet, split: Split, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Trains in place, a new drop-path subnetwork every batch; returns the history and the seconds it took.

    After every epoch the full network and every column alone are evaluated on the hold-out. Nothing is chosen by
    that: the model is the one after the last epoch.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)  # of batches; paths have their own sequence
    model.path_seed, model.path_step = seed, 0
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    per_epoch = math.ceil(len(split.train_y) / recipe.batch_size)
    steps, step = recipe.epochs * per_epoch, 0
    history: list[dict[str, Any]] = []
    spent_evaluating = 0.0
    start = time.perf_counter()
    quiet = 0.1 if sys.stderr.isatty() else 10  # seconds between two states of the bar: a log needs fewer
    with tqdm(total=steps, desc="training", unit="batch", mininterval=quiet, dynamic_ncols=True) as bar:
        for epoch in range(1, recipe.epochs + 1):
            model.train()
            total = 0.0
            for x, y in data.batches(split, recipe, generator):
                rate = cosine(recipe.lr, step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item() * len(y)
                step += 1
                bar.update()
            now = time.perf_counter()
            scores = evaluate.scores(model, split.test_x, split.test_y)
            spent_evaluating += time.perf_counter() - now
            mean = total / len(split.train_y)
            history.append({"epoch": epoch, "lr": rate, "train_loss": mean, "holdout": scores})
            if not math.isfinite(mean):
                raise data.UserError(f"the loss is {mean} in epoch {epoch}: the training has diverged; lower the lr")
            full = scores["full"]["accuracy"]
            bar.set_postfix_str(f"epoch {epoch}/{recipe.epochs}, hold-out {full:.1%}", refresh=False)
    seconds = time.perf_counter() - start
    return {"history": history, "seconds": seconds, "seconds_evaluating": spent_evaluating}


def versions() -> dict[str, str]:
    """What this run ran on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.platform()}
    for package in ("fractal-kernels", "torch", "numpy", "scikit-learn", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = str(getattr(sys.modules.get(package.replace("-", "_")), "__version__", "not installed"))
    return found


def run(recipe: Recipe, seed: int, out: Path) -> dict[str, Any]:
    """Trains, measures, prints and writes: what `python -m fractalnet train` does. Returns what metrics.json holds."""
    data.require("sklearn", "matplotlib", "tqdm", "yaml")
    with data.folder_for(out):
        split = data.load(recipe.data)
        torch.manual_seed(seed)
        shape = {"in_channels": split.train_x.shape[1], "image_size": split.train_x.shape[2]}
        config = {"num_classes": split.classes, **recipe.model, **shape}
        model = evaluate.build(config, f"recipe {recipe.name}")
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{recipe.name}: {len(split.train_y)} training and {len(split.test_y)} hold-out images; "
            f"FractalNet of {model.columns} columns, {len(model.channels)} blocks, {model.depth()} layers, "
            f"{parameters:,} parameters; {recipe.epochs} epochs on {torch.get_num_threads()} threads"
        )
        trained = fit(model, split, recipe, seed)
        print(f"trained in {trained['seconds']:.0f} s; measuring ...")
        columns = evaluate.measure(model, split.test_x, split.test_y)
        steps = evaluate.compare_steps(model, config, split, recipe, seed)
        metrics = {
            "recipe": asdict(recipe),
            "seed": seed,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "backends": list(available_backends()),
            "data": split.describe(),
            "parameters": parameters,
            "training_seconds": trained["seconds"],
            "evaluating_seconds": trained["seconds_evaluating"],
            "columns": columns,
            "steps": steps,
            "history": trained["history"],
        }
        files = {
            "model.pt": evaluate.pack(model, config, recipe, seed),
            "metrics.json": (json.dumps(metrics, indent=1) + "\n").encode(),
            "loss.png": plots.losses(trained["history"]),
            "accuracy.png": plots.accuracies(columns),
            "steps.png": plots.steps(steps),
        }
        data.write(out, files)
        print(f"\n{evaluate.table(columns)}\n\n{evaluate.step_table(steps)}\n\nwrote {', '.join(files)} to {out}")
    return metrics
