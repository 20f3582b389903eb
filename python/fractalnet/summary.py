"""What a run would be: `train --dry-run`. Nothing is trained and, for sets that have a name, no images are needed."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fractal_kernels.flops import FORMULAS
from fractal_kernels.schedule import plan, schedule

from . import drop_path, evaluate, sources, train
from .config import Config
from .evaluate import Network
from .model import FractalNet

# Classes, channels, side and training images of the sets that are known by name.
KNOWN = {
    "cifar10": (10, 3, 32, 50_000),
    "cifar100": (100, 3, 32, 50_000),
    "svhn": (10, 3, 32, 73_257),
    "svhn-extra": (10, 3, 32, 604_388),
    "imagenet": (1000, 3, 224, 1_281_167),
}
PATHS = 2000  # drawn for the mean of the live fraction


def work(model: Network, channels: int, size: int) -> int:
    """Multiply-adds of convolutions and classifier for one image, nothing dropped."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter, torch.no_grad():
        copy.deepcopy(model).eval()(torch.zeros(1, channels, size, size))
    return counter.get_total_flops() // 2


def live_fraction(model: FractalNet) -> float:
    """The mean share of a block's convolutions that run under the model's drop-path, at the start of the training.
    Paths per sample are masked and count as all, whatever ranges of columns a CPU may skip."""
    if model.granularity == "sample":
        return 1.0
    generator = torch.Generator().manual_seed(0)
    rates = {key: drop_path.rate(getattr(model, key), 0) for key in ("local_drop", "global_ratio")}
    if model.global_mode == "tied":
        rates["global_ratio"] = 0.0
    units, live = len(schedule(model.columns).units), 0
    for _ in range(PATHS):
        path = drop_path.sample_path(1, model.columns, 1, generator=generator, **rates)
        live += len(plan(model.columns, tuple(path.keep[0].flatten().tolist())).units)
    return live / (PATHS * units)


def dry_run(config: Config, plain: dict[str, Any], name: str) -> str:
    """The resolved recipe as YAML, and what the run would cost."""
    import yaml

    facts = KNOWN.get(config.data.source)
    if facts is None:
        data = sources.load(config.data.source, config.data.root, config.data.image_size)
        facts = (len(data.classes), data.channels, data.image_size, len(data.train))
    classes, channels, size, images = facts
    size = config.data.image_size or size
    model, _ = train.network(config, config.data.source, classes, channels, size, f"recipe {name}")
    model.train()
    parameters = sum(p.numel() for p in model.parameters())
    batches = -(-images // config.batch_size)
    macs = work(model, channels, size)
    fractal = isinstance(model, FractalNet)
    share = live_fraction(model) if fractal else 1.0
    tied = fractal and model.global_mode == "tied"
    runs = share + tied  # and each column by itself, all of which together are the full network's convolutions
    few = torch.randn(2, channels, size, size)
    how = {"path": drop_path.full_path(len(model.channels), model.columns)} if fractal else {}
    saved = evaluate.saved_bytes(model, lambda: F.cross_entropy(model(few, **how), torch.zeros(2, dtype=torch.long)))
    saved *= config.batch_size / 2 * {"fp64": 2, "bf16": 0.5, "fp16": 0.5}.get(config.precision, 1)
    optimizer = train.optimizer_for(config, model, f"recipe {name}")
    moments = 1 if optimizer.param_groups[0].get("momentum") else 2 if "betas" in optimizer.param_groups[0] else 0
    copies = 2 + moments + (config.ema is not None)
    weights = copies * parameters * (8 if config.precision == "fp64" else 4)
    drawn = fractal and model.granularity == "batch"
    columns = f"C = {model.columns}, {len(model.channels)} blocks" if fractal else "plain"
    lines = [
        f"{name}: {config.data.source}, {images:,} training images {channels} x {size} x {size}, {classes} classes",
        f"network: {columns}, {model.depth()} layers, {parameters:,} parameters",
        f"steps: {config.epochs} epochs x {batches:,} batches of {config.batch_size}"
        + (f", an optimizer step every {config.accumulate}" if config.accumulate > 1 else ""),
        f"work: {macs / 1e6:,.1f} M multiply-adds per image forward, nothing dropped",
        f"live fraction under drop-path: {share:.1%} of the blocks' convolutions"
        + (f", mean of {PATHS} paths" if drawn else "")
        + ("; and every column by itself" if tied else ""),
        f"training: {3 * macs * runs * images * config.epochs / 1e15:,.2f} P multiply-adds in all (3 x forward, live)",
        f"memory, estimate: {(saved + weights) / 1e6:,.0f} MB: {saved / 1e6:,.0f} MB of activations saved for backward "
        f"(nothing dropped), {weights / 1e6:,.0f} MB of weights, gradients and the optimizer's state",
    ]
    return yaml.safe_dump(plain, sort_keys=False) + "\n" + "\n".join(lines)
