"""The paper's networks by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .model import FractalNet
from .plain import PlainNet

_ULTRA = {"channels": (16, 32, 64, 128, 128), "num_classes": 100}
_FRACTAL: dict[str, dict[str, Any]] = {
    # Table 1: CIFAR and SVHN, 20 layers; dropout of the regularised rows.
    "fractalnet20": {
        "num_classes": 10,
        "columns": 3,
        "channels": (64, 128, 256, 512, 512),
        "dropout": (0.0, 0.1, 0.2, 0.3, 0.4),
    },
    # Table 1: 40 layers, thinner columns the deeper they are, 1x1 and 3x3 convolutions mixed.
    "fractalnet40": {
        "num_classes": 100,
        "columns": 4,
        "channels": (128, 256, 512, 1024, 1024),
        "column_widths": (1, 1 / 2, 1 / 4, 1 / 8),
        "kernel_mix": 0.5,
    },
    # Table 2: ImageNet, with ResNet-34's first and last layers: the last block runs at 7x7 before the global average.
    "fractalnet34": {
        "num_classes": 1000,
        "columns": 4,
        "channels": (128, 256, 512, 1024),
        "image_size": 224,
        "stem": "resnet",
        "last_pool": False,
    },
    # Tables 3 and 4: the supporting experiments, 5 to 160 layers; and two columns more, 320 and 640 layers.
    **{f"fractal_c{c}": {"columns": c, **_ULTRA} for c in range(1, 9)},
}
# Table 3: what they are compared with.
_PLAIN: dict[str, dict[str, Any]] = {f"plain_c{c}": {"depth_per_block": 2 ** (c - 1), **_ULTRA} for c in range(1, 9)}


def list_models() -> list[str]:
    """The names that :func:`create` knows.

    Example:
        >>> "fractalnet20" in list_models()
        True
    """
    return sorted((*_FRACTAL, *_PLAIN))


def resolved(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`FractalNet` of those that may name one of the networks.

    Example:
        >>> resolved({"name": "fractal_c3", "num_classes": 10})["num_classes"]
        10
    """
    named = _FRACTAL.get(arguments.get("name", ""), {})
    return {**named, **{key: value for key, value in arguments.items() if key != "name"}}


def create(name: str, **overrides: Any) -> FractalNet | PlainNet:
    """A network of the paper.

    Args:
        name: "fractalnet20" (64 to 512 channels, C = 3, with the paper's dropout), "fractalnet40" (columns of 128 to 16
            channels in the first block), "fractalnet34" (ImageNet), "fractal_c1" ... "fractal_c8" (16 to 128 channels,
            100 classes), "plain_c1" ... "plain_c8" (plain networks of the same depths).
        overrides: any argument of :class:`FractalNet`, or of :class:`PlainNet`.
    Raises:
        ValueError: another name.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 4. Of the 40-layer network the text leaves open which
        convolutions are 1x1. Half of every one's channels here: 27.5 million parameters (27,549,300 for 100 classes),
        where the paper prints 22.9, which no known reading of the text gives exactly.
    Example:
        >>> sum(p.numel() for p in create("fractal_c3").parameters())
        2125204
    """
    if not isinstance(name, str):
        raise TypeError(f"create: expected name to be a str, got {type(name).__name__}")
    if name in _FRACTAL:
        return FractalNet(**{**_FRACTAL[name], **overrides})
    if name in _PLAIN:
        return PlainNet(**{**_PLAIN[name], **overrides})
    raise ValueError(f"create: expected name one of {', '.join(list_models())}, got {name!r}")


def load(path: str | Path) -> FractalNet | PlainNet:
    """The network of a training's model.pt, in evaluation mode on the CPU. Nothing in the file is executed.

    How its images go in is in ``torch.load(path, weights_only=True)["data"]``: ``scale``, ``mean``, ``std`` and
    ``normalise``, and the names of the ``classes``.

    Args:
        path: what ``python -m fractalnet train`` has written.
    Raises:
        fractalnet.files.UserError: the file is missing, damaged, or not of a training.
    Example:
        >>> load("runs/digits/model.pt")(images)  # doctest: +SKIP
    """
    from .trained import unpack

    return unpack(Path(path))[0]
