"""Recipes: what a training run is, typed, out of YAML files and the command line.

A recipe of the paper is named by the row and the column of its table, ``fractalnet20/c10+``: a file of
``recipes/networks`` over a file of ``recipes/data``. Any other name is the path of a YAML file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, Literal  # noqa: UP035 (jsonargparse shows these names)

import torch

from .files import UserError, require

FOLDER = resources.files(__package__) / "recipes"
HEAD = ": python -m fractalnet train"  # follows the recipe's name in the first line of a run's config.yaml
PRECISIONS = Literal["fp64", "fp32", "tf32", "bf16", "fp16"]


@dataclass
class Data:
    """Images and what is done to them.

    Args:
        source: digits, cifar10, cifar100, svhn, svhn-extra, imagenet, folder:PATH or parquet:PATH (docs/data.md).
        root: the folder of a local copy; without it the Hugging Face hub is asked.
        image_size: pixels along a side that the network sees; for images of many sizes.
        mirror: flip half of the training images from left to right.
        translate: move training images by up to so many pixels along both axes.
        padding: what is beyond a moved image's border: zero after the mean subtraction, reflect, or black.
        normalise: subtract the mean of the training images' channels, or also divide by their standard deviation.
        workers: processes that read images from files (small sets live on the device and need none).
    """

    source: str
    root: Path | None = None
    image_size: int | None = None
    mirror: bool = False
    translate: int = 0
    padding: Literal["zero", "reflect", "black"] = "zero"
    normalise: Literal["mean", "std"] = "std"
    workers: int = 4


@dataclass
class Schedule:
    """The learning rate over the training, as a factor on the optimizer's.

    Args:
        kind: halving (the paper's: times `factor` whenever the remaining epochs halve), milestones, cosine or constant.
        factor: of halving and milestones.
        milestones: epochs; --epochs scales them.
        warmup: epochs in which the rate rises linearly from zero; --epochs scales it.
    """

    kind: Literal["halving", "milestones", "cosine", "constant"] = "halving"
    factor: float = 0.1
    milestones: List[float] = field(default_factory=list)  # noqa: UP006
    warmup: float = 0.0


@dataclass
class Config:
    """A training run.

    Args:
        network: arguments of fractalnet.create with its name, or of FractalNet without one.
        data: images and what is done to them.
        epochs: passes over the training images.
        batch_size: images of a batch, over all ranks.
        optimizer: any of torch.optim by name: SGD, AdamW, ...; --optimizer.lr and so on for its arguments.
        schedule: the learning rate over the training.
        accumulate: batches whose gradients are added up for one step of the optimizer.
        clip: the norm to which gradients are clipped.
        ema: decay of an exponential moving average of weights and statistics, which is then evaluated and kept.
        label_smoothing: of the training loss.
        precision: of the arithmetic: fp32 is exact, tf32 lets GPUs round factors, bf16 and fp16 are mixed.
        compile: let torch.compile have the network.
        graphs: replay training steps as CUDA graphs, one for each kind of path.
        seed: of weights, batches, augmentation, dropout and paths.
        evaluate_every: epochs between two looks at the hold-out; the last one is always measured.
        save_every: batches between two checkpoints inside an epoch; there is one at the end of every epoch.
        keep: newest checkpoints that stay, beside the one with the best hold-out accuracy.
        accelerator: cpu, cuda or auto.
        devices: of this node, or auto for all.
        nodes: machines; start the command on each by torchrun.
        strategy: ddp, fsdp or auto (ddp where there are several devices).
        sync_bn: batch statistics over all ranks.
        tensorboard: write its event files.
        compare_eager: time training steps against the eager network at the end (digits and other small sets).
    """

    network: Dict[str, Any]  # noqa: UP006
    data: Data
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable], torch.optim.Optimizer]
    schedule: Schedule = field(default_factory=Schedule)
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    label_smoothing: float = 0.0
    precision: PRECISIONS = "fp32"
    compile: bool = False
    graphs: bool = False
    seed: int = 0
    evaluate_every: int = 1
    save_every: int | None = None
    keep: int = 2
    accelerator: str = "auto"
    devices: str = "1"
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    sync_bn: bool = True
    tensorboard: bool = True
    compare_eager: bool = False


# What must be at least this.
LEAST = {
    "epochs": 1, "batch_size": 1, "accumulate": 1, "evaluate_every": 1, "save_every": 1, "keep": 1, "nodes": 1,
    "seed": 0, "data.translate": 0, "data.workers": 0, "data.image_size": 1,
}  # fmt: skip
INSIDE = {  # bounds as they are written, and whether they hold
    "clip": ("(0, inf)", lambda v: 0 < v < math.inf),
    "ema": ("(0, 1)", lambda v: 0 < v < 1),
    "label_smoothing": ("[0, 1)", lambda v: 0 <= v < 1),
    "schedule.factor": ("(0, 1]", lambda v: 0 < v <= 1),
    "schedule.warmup": ("[0, inf)", lambda v: 0 <= v < math.inf),
    "optimizer.init_args.lr": ("(0, inf)", lambda v: 0 < v < math.inf),
    "seed": ("[0, 2**63)", lambda v: 0 <= v < 2**63),
}
# What may differ between a run and its continuation: it changes neither weights nor metrics. The last line: but for
# rounding, and for which values dropout drops.
FREE = ("keep", "save_every", "tensorboard", "compare_eager", "data.root", "data.workers")
FREE += ("accelerator", "devices", "nodes", "graphs")


def paper() -> dict[str, dict[str, Any]]:
    """The paper's recipes by name, and the test errors, in per cent, that it prints for them."""
    require("yaml")
    import yaml

    return yaml.safe_load((FOLDER / "paper.yaml").read_text("utf-8"))


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return ["digits", *paper()]


def files(name: str) -> list[str]:
    """The YAML texts of a recipe, each over the ones before it."""
    if name == "digits":
        return [(FOLDER / "digits.yaml").read_text("utf-8")]
    if name in paper():
        network, _, data = name.partition("/")
        parts = (FOLDER / "data" / f"{data}.yaml", FOLDER / "networks" / f"{network}.yaml")
        return [part.read_text("utf-8") for part in parts]
    if not name.endswith((".yaml", ".yml")):
        raise UserError(f"unknown recipe {name!r}; there is: {', '.join(recipes())}, and any file that ends in .yaml")
    try:
        return [Path(name).read_text("utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"recipe {name}: cannot be read: {reason}") from error


def known_as(name: str) -> str:
    """The name of a recipe; of a run's config.yaml, the name of the recipe that was run."""
    if name in recipes():
        return name
    first = Path(name).read_text("utf-8").partition("\n")[0]
    original, said, _ = first.removeprefix("# ").partition(HEAD)
    return original if said else Path(name).stem


def parser() -> Any:
    """The options of a run, for jsonargparse."""
    require("jsonargparse")
    from jsonargparse import ArgumentParser

    prog, said = "python -m fractalnet train", "What is required is in a recipe. Other options: train --help."
    made = ArgumentParser(
        prog, f"{prog} RECIPE [options]", said, exit_on_error=False, add_help=False, allow_abbrev=False
    )
    made.add_class_arguments(Config, None)
    return made


def load(name: str, argv: Sequence[str] = (), also: str = "") -> tuple[Config, dict[str, Any]]:
    """A recipe with the options of a command line over it, and the same as plain values.

    Milestones and warm-up scale with the epochs, unless the command line gives them. `also`: options that are not a
    recipe's, for the error that lists what there is.

    Raises:
        UserError: naming the recipe or the option.
    """
    require("yaml", "jsonargparse")
    import yaml

    try:
        recipe = {key: value for text in files(name) for key, value in (yaml.safe_load(text) or {}).items()}
        json.dumps(recipe, default=str)  # refuses what contains itself
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {name}: not a YAML mapping ({' '.join(str(error).split())})") from error
    what, made = f"recipe {name}", parser()
    made.add_argument("--recipe", action="config")
    given = {a.partition("=")[0] for a in dashes(argv)}
    if "--network.name" in given and "name" not in (recipe.get("network") or {}):
        recipe = {**recipe, "network": {}}  # columns and channels of its own are not those of a network by name
    start = ["--recipe", yaml.safe_dump(recipe)]
    alone = attempt(made, start, what, also)
    check(alone, what)
    found = attempt(made, [*start, *dashes(argv)], "train", also)
    kept = {key: found.schedule[key] == alone.schedule[key] for key in ("milestones", "warmup")}
    if kept["milestones"] and not given & {"--schedule", "--schedule.milestones", "--schedule.milestones+"}:
        found.schedule.milestones = [m * found.epochs / alone.epochs for m in found.schedule.milestones]
    if kept["warmup"] and not given & {"--schedule", "--schedule.warmup"}:
        found.schedule.warmup = found.schedule.warmup * found.epochs / alone.epochs
    found.pop("recipe")
    found.network = dict(sorted(found.network.items(), key=lambda item: str(item[0])))  # in whatever order they came
    check(found, what)
    plain = yaml.safe_load(made.dump(found, skip_unset=False, skip_validation=True))
    plain.pop("recipe", None)
    return Config(**vars(made.instantiate(found))), plain


def dashes(argv: Sequence[str]) -> list[str]:
    """--batch-size is --batch_size."""
    options = (a.partition("=") for a in argv)
    return [
        (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
        for name, equals, value in options
    ]


def attempt(made: Any, argv: Sequence[str], what: str, also: str) -> Any:
    from jsonargparse import ArgumentError

    try:
        return made.parse_args(argv)
    except ArgumentError as error:
        text = " ".join(str(error).split())
        if "unrecognized arguments" in text:
            options = ", ".join([*filter(None, [also]), *(f"--{key}" for key in keys(made))])
            raise UserError(
                f"{what}: unknown argument {text.partition(': ')[2]}; the options are: {options}"
            ) from error
        raise UserError(f"{what}: {text}") from error


def keys(made: Any) -> list[str]:
    """Every option, without dashes."""
    names = (o for a in made._actions for o in a.option_strings)
    hidden = (".help", "+", "--print_config", "--print_shtab", "--recipe")
    return [n[2:] for n in names if n.startswith("--") and not n.endswith(hidden)]


def check(found: Any, what: str) -> None:
    """Bounds of numbers; types have been looked at."""
    for key, least in LEAST.items():
        value = found.get(key)
        if value is not None and value < least:
            raise UserError(f"{what}: --{key}: expected {least} or more, got {value}")
    for key, (bounds, holds) in INSIDE.items():
        value = found.get(key)
        if value is not None and not holds(value):
            raise UserError(f"{what}: --{key}: expected a number in {bounds}, got {value}")
    if found.devices != "auto" and not (found.devices.isdecimal() and int(found.devices)):
        raise UserError(f"{what}: --devices: expected a whole number >= 1 or auto, got {found.devices!r}")
    if found.strategy == "fsdp" and found.precision not in ("fp32", "tf32"):
        raise UserError(f"{what}: --precision: expected fp32 or tf32 beside --strategy fsdp, got {found.precision}")
    if found.strategy == "fsdp" and found.ema is not None:
        raise UserError(f"{what}: --ema: expected --strategy auto or ddp beside it, got fsdp")
