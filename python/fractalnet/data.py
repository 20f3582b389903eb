"""Recipes and data sets, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recipe", "Split", "UserError", "batches", "load", "load_recipe", "recipes", "require", "shifted", "write"]

DATA = ("digits",)


class UserError(Exception):
    """What the person who runs a command can mend; shown as one line."""


def require(*modules: str) -> None:
    """Raises UserError unless these modules of the demo's extra packages can be imported."""
    packages = {"sklearn": "scikit-learn", "yaml": "PyYAML"}
    missing = []
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{packages.get(name, name)} ({error})")
    if missing:
        raise UserError(f"missing: {', '.join(missing)}; pip install fractal-kernels[demo]")


# --- recipes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A training run: SGD with Nesterov momentum, the learning rate falling to zero along a half cosine."""

    name: str
    data: str
    model: dict[str, Any]
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    shift: int = 0

    def __post_init__(self) -> None:
        for field, least in (("epochs", 1), ("batch_size", 1), ("shift", 0)):
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise UserError(f"recipe {self.name}: expected {field} to be a whole number >= {least}, got {value!r}")
        for field in ("lr", "momentum", "weight_decay"):
            value = getattr(self, field)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise UserError(f"recipe {self.name}: expected {field} to be a number >= 0, got {value!r}")
        if self.data not in DATA:
            raise UserError(f"recipe {self.name}: expected data to be one of {', '.join(DATA)}, got {self.data!r}")
        if not isinstance(self.model, dict):
            raise UserError(f"recipe {self.name}: expected model to be FractalNet's arguments, got {self.model!r}")


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(name: str, **overrides: Any) -> Recipe:
    """The recipe of this name, with every override that is not None in place of its own value."""
    if name not in recipes():
        raise UserError(f"unknown recipe {name!r}; there is: {', '.join(recipes())}")
    require("yaml")
    import yaml

    values = yaml.safe_load((resources.files(__package__) / "recipes" / f"{name}.yaml").read_text("utf-8"))
    known = set(Recipe.__dataclass_fields__) - {"name"}
    if unknown := sorted(set(values) - known):
        raise UserError(f"recipe {name}: unknown key {', '.join(unknown)}; there is: {', '.join(sorted(known))}")
    return Recipe(name, **(values | {key: value for key, value in overrides.items() if value is not None}))


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W], normalised with mean and std of the training images, and their labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: float
    std: float

    @property
    def background(self) -> float:
        """The value of an empty pixel."""
        return -self.mean / self.std

    def describe(self) -> dict[str, Any]:
        """The facts about the split that belong beside its results."""
        facts = {key: value for key, value in asdict(self).items() if not isinstance(value, Tensor)}
        return facts | {"train_images": len(self.train_y), "test_images": len(self.test_y)}


def load(name: str) -> Split:
    """The data set of this name; the hold-out, 20 % of every class, is the same in every run."""
    if name not in DATA:
        raise UserError(f"unknown data {name!r}; there is: {', '.join(DATA)}")
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    mean, std = images[train].mean().item(), images[train].std().item()
    images = (images - mean) / std
    return Split(images[train], labels[train], images[test], labels[test], len(digits.target_names), mean, std)


def shifted(x: Tensor, most: int, background: float, generator: torch.Generator | None = None) -> Tensor:
    """Every image moved by its own draw of -most to most pixels along both axes."""
    if most == 0:
        return x
    n, channels, height, width = x.shape
    wide = torch.nn.functional.pad(x, (most,) * 4, value=background)
    by = torch.randint(2 * most + 1, (2, n, 1), generator=generator)
    rows, columns = by[0] + torch.arange(height), by[1] + torch.arange(width)
    image, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
    return wide[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def batches(split: Split, recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The training images once, in random order, augmented."""
    for part in torch.randperm(len(split.train_y), generator=generator).split(recipe.batch_size):
        yield shifted(split.train_x[part], recipe.shift, split.background, generator), split.train_y[part]


# --- files -------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[Path]:
    """Makes a folder that can be written to; folders that it made vanish again if nothing was put there."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise UserError(f"cannot write to the folder {path}: {error.strerror or error}") from error
        yield path
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files so that each is its old or its new self at any moment, and never half of it.

    All of them are first written under temporary names in the same folder and flushed to the disk, then renamed.
    Whatever interrupts that, no temporary file stays.
    """
    pending = {folder / f".{name}.{os.getpid()}.tmp": folder / name for name in files}
    try:
        for temporary, target in pending.items():
            with open(temporary, "wb") as file:
                file.write(files[target.name])
                file.flush()
                os.fsync(file.fileno())
        for temporary, target in pending.items():
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
    finally:
        for temporary in pending:
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
