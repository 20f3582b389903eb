"""What a trained network is worth: every column by itself, step time and memory against eager, checkpoints."""

from __future__ import annotations

import io
import statistics
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import drop_path
from .data import Recipe, Split, UserError
from .model import FractalNet

__all__ = ["anytime", "anytime_table", "build", "compare_steps", "measure", "pack", "scores", "step_table", "table"]

FORMAT = "fractalnet checkpoint 2"
CHUNK = 500  # images at a time where only the result matters
BATCHES = (1, 100)  # images at a time where time is taken
TOLERANCE = 1e-3
BUSY = 1.6  # ninth decile of the times of equal steps against the first: beyond it the times say little
PASSES, BUDGET = 5, 20.0  # of a timing: passes over its work at most, and seconds after which no other one begins


def build(config: dict[str, Any], what: str) -> FractalNet:
    """FractalNet(**config); what it does not accept is an error of `what`."""
    try:
        return FractalNet(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error


# --- accuracy and time of every column -------------------------------------------------------------


def contenders(model: FractalNet) -> dict[str, int | None]:
    """What can answer: the full network (None) and each column alone."""
    return {"full": None} | {f"column {c}": c for c in range(model.columns)}


def score(logits: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "loss": F.cross_entropy(logits, y).item(),
        "accuracy": (logits.argmax(1) == y).float().mean().item(),
    }


@torch.no_grad()
def scores(model: FractalNet, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Loss and accuracy of the full network and of each column alone."""
    model.eval()
    return {
        name: score(torch.cat([model(part, column=column) for part in x.split(CHUNK)]), y)
        for name, column in contenders(model).items()
    }


def alternate(calls: dict[str, Callable[[int], object]], cycle: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every call in every round; a round makes each call once, so that noise hits all alike.

    Round i gets the number i % cycle; there are PASSES cycles, or fewer on a machine so slow that BUDGET is spent.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for i in range(-warmup, cycle * PASSES):
        if i > 0 and i % cycle == 0 and time.perf_counter() - begin > BUDGET:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call(i % cycle)
            if i >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


@torch.no_grad()
def measure(model: FractalNet, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Per contender: depth, loss and accuracy on x, and the median time per image, one at a time and by the hundred."""
    results = scores(model, x, y)
    times: dict[int, dict[str, list[float]]] = {}
    for batch in BATCHES:
        images = x[:batch]
        calls = {name: lambda _, c=c: model(images, column=c) for name, c in contenders(model).items()}  # noqa: B023
        times[batch] = alternate(calls, cycle=6)
    return [
        {
            "name": name,
            "column": column,
            "depth": model.depth(column),
            **results[name],
            "images": len(y),
            "ms_per_image": {str(batch): statistics.median(times[batch][name]) / len(x[:batch]) for batch in BATCHES},
        }
        for name, column in contenders(model).items()
    ]


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text, the first column to the left, the first row underlined."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(columns: Sequence[dict[str, Any]]) -> str:
    """What `measure` found, to be read."""
    head = ["", "depth (convs)", "hold-out accuracy", "ms/image, batch 1", f"ms/image, batch {BATCHES[1]}"]
    rows = [
        [
            "full network" if c["column"] is None else f"{c['name']} alone",
            str(c["depth"]),
            f"{c['accuracy']:.2%}",
            *(f"{c['ms_per_image'][str(batch)]:.3f}" for batch in BATCHES),
        ]
        for c in columns
    ]
    return grid([head, *rows])


@torch.no_grad()
def anytime(model: FractalNet, x: Tensor, y: Tensor, rounds: int = 5) -> list[dict[str, Any]]:
    """Per answer of `model.anytime`: its accuracy, and the median time until it is there, for all of x."""
    model.eval()
    rows: list[dict[str, Any]] = []
    elapsed: dict[int, list[float]] = {}
    for i in range(-2, rounds):
        start = time.perf_counter()
        for column, depth, logits in model.anytime(x):
            now = time.perf_counter()
            if i == -2:
                rows.append({"column": column, "depth": depth, **score(logits, y)})
            elif i >= 0:
                elapsed.setdefault(column, []).append(1e3 * (now - start))
    return [row | {"ms": statistics.median(elapsed[row["column"]])} for row in rows]


def anytime_table(rows: Sequence[dict[str, Any]], images: int) -> str:
    """What `anytime` found, to be read."""
    head = ["answer of", "depth (convs)", "hold-out accuracy", f"ms after the start, {images} images"]
    lines = [[f"column {r['column']}", str(r["depth"]), f"{r['accuracy']:.2%}", f"{r['ms']:.1f}"] for r in rows]
    return grid([head, *lines])


# --- training steps against eager ------------------------------------------------------------------


def eager_baseline() -> type[nn.Module] | None:
    """The network as public implementations write it; None where benchmarks/ is not at hand."""
    try:
        from benchmarks.baselines import PublicFractalNet
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "benchmarks":
            return None
        raise
    return PublicFractalNet


def mixture(model: FractalNet, batch: int, count: int, seed: int) -> list[drop_path.Path]:
    """Paths in the shares of the model's mixture, so that their mean is its mean without the luck of a few draws."""
    generator = torch.Generator().manual_seed(seed)
    blocks, columns = len(model.channels), model.columns
    local, ratio = (drop_path.rate(value, model.path_step) for value in (model.local_drop, model.global_ratio))
    if model.granularity == "sample":
        rates = {"local_drop": local, "global_ratio": ratio, "granularity": "sample", "generator": generator}
        return [drop_path.sample_path(blocks, columns, batch, **rates) for _ in range(count)]
    alone = round(count * ratio / columns)
    paths = [drop_path.column_path(blocks, columns, c) for c in range(columns) for _ in range(alone)]
    rates = {"local_drop": local, "global_ratio": 0.0, "generator": generator}
    paths += [drop_path.sample_path(blocks, columns, batch, **rates) for _ in range(count - len(paths))]
    return [paths[i] for i in torch.randperm(len(paths), generator=generator).tolist()]


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves for backward, parameters and buffers excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack_hook(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        loss = forward()  # noqa: F841 (keeps the graph, and with it the addresses, alive)
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


def compare_steps(model: FractalNet, config: dict[str, Any], split: Split, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Training steps (zero_grad, forward, backward, SGD) of the fused and the eager network, taken in turn, and what
    one forward pass with nothing dropped saves for backward. The model itself stays as it is: copies are timed.

    A figure is the mean over the paths of the median of each one's passes. The eager network draws per-sample masks.
    """
    x, y = split.train_x[: recipe.batch_size], split.train_y[: recipe.batch_size]
    fused = FractalNet(**config)
    fused.load_state_dict(model.state_dict())
    paths = mixture(model, len(y), 8 * model.columns, seed)
    full = drop_path.full_path(len(model.channels), model.columns)
    forwards = {"fused": lambda i: fused(x, path=paths[i % len(paths)])}
    nets: dict[str, nn.Module] = {"fused": fused}
    baseline = eager_baseline()
    if baseline is None:
        print("the eager comparison is left out: benchmarks/ is not importable here (it is in the repository's root)")
    else:
        keys = ("num_classes", "columns", "channels", "in_channels", "image_size")
        eager = baseline(**{key: config[key] for key in keys}, local_drop=drop_path.rate(model.local_drop, 0))
        eager.load_from(model)
        hold_together(fused, eager, split.test_x[:100])
        nets["eager"], forwards["eager"] = eager, lambda i: eager(x)
    saved = {"fused": saved_bytes(fused, lambda: F.cross_entropy(fused(x, path=full), y))}
    if baseline is not None:
        masks = eager.full_masks(len(y))
        saved["eager"] = saved_bytes(eager, lambda: F.cross_entropy(eager(x, masks), y))
    steps = {name: stepper(net.train(), forwards[name], y, recipe) for name, net in nets.items()}
    times = alternate(steps, cycle=len(paths))
    result: dict[str, Any] = {"batch_size": len(y), "paths": len(paths), "passes": len(times["fused"]) // len(paths)}
    for name, ms in times.items():
        figure = statistics.fmean(statistics.median(ms[i :: len(paths)]) for i in range(len(paths)))
        median = statistics.median(ms)
        result[name] = {"ms": figure, "median_ms": median, "saved_bytes": saved[name], "rounds_ms": ms}
    if baseline is not None:
        result["speedup"] = result["eager"]["ms"] / result["fused"]["ms"]
        result["saved_share"] = saved["fused"] / saved["eager"]
        low, *_, high = statistics.quantiles(times["eager"], n=10)  # the same work in every round
        result["scatter"] = high / low
    return result


@torch.no_grad()
def hold_together(fused: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """Raises unless both networks give the same logits: no time is worth anything with a wrong result."""
    got, expected = fused.eval()(x), eager.eval()(x)
    fused.train(), eager.train()
    error = float((got - expected).norm() / expected.norm())
    if not error <= TOLERANCE:
        raise RuntimeError(f"the fused and the eager network differ: relative error of the logits {error:.3g}")


def stepper(net: nn.Module, forward: Callable[[int], Tensor], y: Tensor, recipe: Recipe) -> Callable[[int], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=recipe.momentum, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(i), y).backward()
        optimizer.step()

    return step


def step_table(steps: dict[str, Any]) -> str:
    """What `compare_steps` found, to be read."""
    head = [f"training step, batch {steps['batch_size']}", "time, ms", "saved for backward, MB"]
    rows = [
        [label, f"{steps[name]['ms']:.2f}", f"{steps[name]['saved_bytes'] / 1e6:.2f}"]
        for name, label in (("fused", "fused"), ("eager", "eager baseline"))
        if name in steps
    ]
    if "eager" in steps:
        rows.append(
            ["fused against eager", f"{steps['speedup']:.2f}x as fast", f"{steps['saved_share']:.2f}x the bytes"]
        )
    busy = (
        f"\nThe machine was busy: equal steps differ {steps.get('scatter', 0):.1f}-fold. Measure again when it is idle."
    )
    return grid([head, *rows]) + (busy if steps.get("scatter", 0) > BUSY else "")


# --- checkpoints -----------------------------------------------------------------------------------


def pack(model: FractalNet, config: dict[str, Any], recipe: Recipe, seed: int) -> bytes:
    """A checkpoint: the state, and what is needed to build the network and to load its data again."""
    buffer = io.BytesIO()
    content = {"format": FORMAT, "config": config, "recipe": asdict(recipe), "seed": seed, "state": model.state_dict()}
    torch.save(content, buffer)
    return buffer.getvalue()


def unpack(path: FilePath) -> tuple[FractalNet, dict[str, Any]]:
    """The network of a checkpoint, and everything else that is in it. Nothing in the file is executed."""
    what = f"checkpoint {path}"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if broken := archive.testzip():
                raise UserError(f"{what}: damaged ({broken} does not match its checksum)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{what}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged file raises depends on the damage
        raise UserError(f"{what}: damaged, or not a PyTorch file ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{what}: not written by `python -m fractalnet train` (expected format {FORMAT!r})")
    try:
        model = build(content["config"], what)
        model.load_state_dict(content["state"])
        recipe = content["recipe"]["data"], content["recipe"]["name"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{what}: its content does not fit ({type(error).__name__}: {reason})") from error
    if not all(isinstance(value, str) for value in recipe):
        raise UserError(f"{what}: its content does not fit (no recipe)")
    return model.eval(), content
