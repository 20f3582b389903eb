"""A trained network as a file: what builds it, its state, and the images that it was trained on."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoints, sources
from .augment import Augment, ten_crop
from .evaluate import CHUNK, Network, build
from .files import UserError
from .formats import Images
from .loader import Loader
from .model import FractalNet

if TYPE_CHECKING:
    from .config import Data

FORMAT = "fractalnet checkpoint 3"


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state on the CPU; of sharded weights, put together by all ranks."""
    from torch.distributed.tensor import DTensor

    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in state.items()}


def pack(
    network: dict[str, Any], state: dict[str, Any], recipe: str, config: dict[str, Any], images: dict[str, Any]
) -> bytes:
    """What model.pt holds: arguments and state of the network, the run, and the images as :func:`facts` has them."""
    content = {"format": FORMAT, "network": network, "recipe": recipe, "config": config, "data": images}
    content = json.loads(json.dumps(content))  # plain values, and the same bytes whichever of them were one object
    buffer = io.BytesIO()
    torch.save(content | {"state": state}, buffer)
    return buffer.getvalue()


def facts(data: Data, augment: Augment, images: sources.Dataset) -> dict[str, Any]:
    """Which images a network was trained on, what its classes are called, and how the images were normalised."""
    found = {"source": data.source, "root": data.root and str(data.root), "image_size": data.image_size}
    found |= {"classes": list(images.classes), "channels": images.channels, "scale": augment.scale}
    return found | {"mean": list(augment.mean), "std": list(augment.std), "normalise": augment.normalise}


def for_users(content: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint, what a network's user has to know: the classes' names, and how images were normalised,
    (x / scale - mean) / std."""
    known = content["data"]
    std = known["std"] if known["normalise"] == "std" else [1.0] * len(known["mean"])
    return {name: known[name] for name in ("classes", "scale", "mean")} | {"std": std}


def images_of(content: dict[str, Any], root: Path | None) -> tuple[sources.Dataset, Augment]:
    """The data set of a checkpoint, and its normalisation."""
    known = content["data"]
    own = known["root"] and Path(known["root"])
    data = sources.load(known["source"], root or own, known["image_size"])
    if known["channels"] != data.channels:
        raise UserError(f"data {data.name}: expected {known['channels']} channels, got {data.channels}")
    classes, got = known["classes"], list(data.classes)
    if len(classes) != len(got):
        raise UserError(f"data {data.name}: expected the {len(classes)} classes of the training, got {len(got)}")
    for i, (a, b) in enumerate(zip(classes, got, strict=True)):
        if a != b:
            raise UserError(f"data {data.name}: expected class {i} to be {a!r}, as in the training, got {b!r}")
    return data, replace(Augment.of(data, normalise=known["normalise"]), mean=known["mean"], std=known["std"]).eval()


def holdout(content: dict[str, Any], root: Path | None = None, crops: int = 1, device: str = "cpu") -> Loader:
    """The hold-out of a checkpoint, in batches that `scores` can be given by `views`."""
    data, augment = images_of(content, root)
    if crops == 10 and data.streamed:
        augment = augment.eval(ten_crop=True)
    chunk = 50 if data.streamed or crops > 1 else CHUNK
    return Loader(data.test, chunk, seed=0, augment=augment, shuffle=False, device=device, workers=2)


def views(loader: Loader, crops: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of a loader, as they are or as ten crops: of images in memory after padding by an eighth of their side,
    which is the 4 zeros of CIFAR's."""
    for x, y, _ in loader.epoch(0):
        if crops == 10:
            small = isinstance(loader.images, Images)
            x = ten_crop(x, x.shape[-1] if small else loader.augment.size, pad=round(x.shape[-1] / 8) if small else 0)
        yield x, y


def split(content: dict[str, Any], root: Path | None = None) -> sources.Split:
    """The images of a checkpoint as tensors, for what takes them all at once."""
    data, augment = images_of(content, root)
    if data.streamed:
        raise UserError(f"{data.name}: expected a set that fits into memory, got one that streams from files; see eval")
    return sources.tensors(data, augment)


def unpack(path: Path) -> tuple[Network, dict[str, Any]]:
    """The network of a checkpoint, and everything else that is in it. Nothing in the file is executed."""
    what = f"checkpoint {path}"
    checkpoints.prove(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a file that is no checkpoint raises depends on what it is
        raise UserError(f"{what}: damaged, or not a PyTorch file ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        if path.name.startswith("step-"):
            raise UserError(f"{what}: is to be resumed from; the network is model.pt, which the training's end writes")
        raise UserError(f"{what}: not written by `python -m fractalnet train` (expected format {FORMAT!r})")
    try:
        model = build(content["network"], what)
        model.load_state_dict(content["state"])
        known = content["recipe"], content["data"]["source"], content["data"]["normalise"]
        itemgetter("root", "image_size", "classes", "channels", "scale", "mean", "std")(content["data"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{what}: its content does not fit ({type(error).__name__}: {reason})") from error
    if not all(isinstance(value, str) for value in known):
        raise UserError(f"{what}: its content does not fit (no recipe)")
    return model.eval(), content


def unpack_fractal(path: Path) -> tuple[FractalNet, dict[str, Any]]:
    """:func:`unpack` for what needs columns."""
    model, content = unpack(path)
    if not isinstance(model, FractalNet):
        raise UserError(f"checkpoint {path}: expected a FractalNet, got a plain network, which has no columns")
    return model, content
