"""What a trained network is worth: every column by itself, and a training step's time and memory against eager."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import drop_path
from .files import UserError, require
from .model import FractalNet
from .plain import PlainNet
from .zoo import create, resolved

if TYPE_CHECKING:
    from .train import Run

Network = FractalNet | PlainNet
CHUNK = 500  # images at a time where only the result matters
BATCHES = (1, 100)  # images at a time where time is taken
TOLERANCE = 1e-3
BUSY = 1.6  # ninth decile of the times of equal steps against the first: beyond it the times say little
PASSES, BUDGET = 5, 20.0  # of a timing: passes over its work at most, and seconds after which no other one begins


def build(arguments: dict[str, Any], what: str) -> Network:
    """create(**arguments), or FractalNet(**arguments) without a name; what is not accepted is an error of `what`."""
    try:
        return create(**arguments) if "name" in arguments else FractalNet(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error


# --- accuracy and time of every column -------------------------------------------------------------


def contenders(model: Network) -> dict[str, dict[str, Any]]:
    """What can answer, and how it is called: the full network, and each column alone."""
    columns = model.columns if isinstance(model, FractalNet) else 0
    return {"full": {}} | {f"column {c}": {"column": c} for c in range(columns)}


def score(logits: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "loss": F.cross_entropy(logits, y).item(),
        "accuracy": (logits.argmax(1) == y).float().mean().item(),
    }


@torch.no_grad()
def scores(model: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Loss and accuracy of the full network and of each column alone; from 20 classes on also of the five best answers.

    Every batch is read once. Images [10, N, ...] are ten crops, of which the probabilities are averaged. Ranks that
    call it with parts of the batches all get the result of the whole.
    """
    require("torchmetrics")
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy

    model.eval()
    classes, device = model.head.out_features, model.head.weight.device
    ranks = {"accuracy": 1} | ({"accuracy_top5": 5} if classes >= 20 else {})
    asked = {name: MulticlassAccuracy(classes, k, average="micro") for name, k in ranks.items()}
    mean = MeanMetric(nan_strategy="disable")  # a loss that is no number is not left out
    found = {name: (mean.clone().to(device), MetricCollection(asked).clone().to(device)) for name in contenders(model)}
    for x, y in batches:
        for name, how in contenders(model).items():
            logits = model(x.flatten(0, 1), **how).view(len(x), *y.shape, -1) if x.dim() == 5 else model(x, **how)
            if x.dim() == 5:
                logits = logits.softmax(-1).mean(0).log()
            if len(y):  # a rank's part may be empty, which metrics do not take
                loss, accuracies = found[name]
                loss.update(F.cross_entropy(logits, y, reduction="none"))  # image by image: it ignores weights
                accuracies.update(logits, y)
    return {
        name: {"loss": loss.compute().item()} | {k: v.item() for k, v in accuracies.compute().items()}
        for name, (loss, accuracies) in found.items()
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
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


@torch.no_grad()
def measure(model: Network, found: dict[str, dict[str, float]], x: Tensor, images: int) -> list[dict[str, Any]]:
    """Per contender: depth, its scores on so many images, and the median time per image, one and many at a time."""
    model.eval()
    times: dict[int, dict[str, list[float]]] = {}
    for batch in BATCHES:
        calls = {name: lambda _, h=how: model(x[:batch], **h) for name, how in contenders(model).items()}  # noqa: B023
        times[batch] = alternate(calls, cycle=6)
    return [
        {
            "name": name,
            **({"column": None} | how),
            "depth": model.depth(**how),
            **found[name],
            "images": images,
            "timed": [len(x[:batch]) for batch in BATCHES],
            "ms_per_image": {str(batch): statistics.median(times[batch][name]) / len(x[:batch]) for batch in BATCHES},
        }
        for name, how in contenders(model).items()
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
    top = "accuracy_top5" in columns[0]
    head = ["", "depth (convs)", "hold-out accuracy", *(["of the best 5"] if top else [])]
    head += [f"ms/image, batch {n}" for n in columns[0]["timed"]]
    rows = [
        [
            "full network" if c["column"] is None else f"{c['name']} alone",
            str(c["depth"]),
            f"{c['accuracy']:.2%}",
            *([f"{c['accuracy_top5']:.2%}"] if top else []),
            *(f"{c['ms_per_image'][str(batch)]:.3f}" for batch in BATCHES),
        ]
        for c in columns
    ]
    return grid([head, *rows])


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


# The arguments of a network that do not change a training step, or that the eager baseline has too.
SHARED = ("num_classes", "columns", "channels", "in_channels", "image_size", "local_drop", "global_ratio")
SHARED += ("granularity", "mixture", "path_seed", "split_stats", "stats", "init", "momentum")


def unlike_eager(arguments: dict[str, Any]) -> list[str]:
    """The arguments of a network, by name and value, by which the eager baseline is another one."""
    defaults = {name: p.default for name, p in inspect.signature(FractalNet).parameters.items()}
    return [f"{k} {v}" for k, v in resolved(arguments).items() if k not in SHARED and v != defaults[k]]


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
    """Bytes of the distinct storages that autograd saves for backward; but not parameters and buffers, nor autocast's
    copies of weights, which a step makes whoever saves them."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # By sizes in any order: what is saved may be a view, [O, I, 3, 3] of a wide weight [O, 3, 3, I].
    weights = {tuple(sorted(p.shape)): p.dtype for p in model.parameters() if p.dim() > 1}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if weights.get(tuple(sorted(tensor.shape)), tensor.dtype) == tensor.dtype:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    del loss
    return total


def compare_steps(model: FractalNet, this: Run) -> dict[str, Any]:
    """Training steps (zero_grad, forward, backward, SGD) of the fused and the eager network, taken in turn, and what
    one forward pass with nothing dropped saves for backward. The model itself stays as it is: copies are timed.

    A figure is the mean over the paths of the median of each one's passes. The eager network draws per-sample masks.
    """
    loader = this.loader if this.loader.batch_size >= this.loader.world_size else this.loader.whole()
    x, y, _ = next(loader.epoch(0))  # the first rank's part, for which there is memory, unless it is empty
    momentum = this.optimizer.param_groups[0].get("momentum", 0.0)
    fused = build(this.arguments, this.name).to(x.device)
    fused.load_state_dict(model.state_dict())
    paths = mixture(model, len(y), 8 * model.columns, this.config.seed)
    full = drop_path.full_path(len(model.channels), model.columns)
    tied = model.global_mode == "tied"  # draws its paths itself, and runs every column beside them
    forwards = {"fused": (lambda i: fused(x)) if tied else (lambda i: fused(x, path=paths[i % len(paths)]))}
    nets: dict[str, nn.Module] = {"fused": fused}
    baseline = eager_baseline()
    if baseline is None:
        print("the eager comparison is left out: benchmarks/ is not importable here (it is in the repository's root)")
    elif unlike := unlike_eager(this.arguments):
        print(f"the eager comparison is left out: public implementations have no {', '.join(unlike)}")
        baseline = None
    else:
        shape = {"in_channels": x.shape[1], "image_size": model.image_size, "num_classes": model.head.out_features}
        drop = drop_path.rate(model.local_drop, 0)
        eager = baseline(columns=model.columns, channels=model.channels, local_drop=drop, **shape).to(x.device)
        eager.load_from(model)
        hold_together(fused, eager, next(this.holdout.whole().epoch(0))[0][:100])
        nets["eager"], forwards["eager"] = eager, lambda i: eager(x)
    saved = {"fused": saved_bytes(fused, lambda: F.cross_entropy(fused(x, path=full), y))}
    if baseline is not None:
        masks = eager.full_masks(len(y))
        saved["eager"] = saved_bytes(eager, lambda: F.cross_entropy(eager(x, masks), y))
    steps = {name: stepper(net.train(), forwards[name], y, momentum) for name, net in nets.items()}
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


def stepper(net: nn.Module, forward: Callable[[int], Tensor], y: Tensor, momentum: float) -> Callable[[int], None]:
    """A training step of `forward(i)`'s logits: zero_grad, forward, backward, SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=momentum, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        drop_path.tied_loss(forward(i), y).backward()
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
