"""The paper's networks by name."""

from __future__ import annotations

from typing import Any

from .model import FractalNet

__all__ = ["create", "list_models"]

_ULTRA = {"channels": (16, 32, 64, 128, 128), "num_classes": 100}
_MODELS: dict[str, dict[str, Any]] = {
    # Table 1: CIFAR and SVHN, 20 layers; dropout of the regularised rows.
    "fractalnet20": {
        "num_classes": 10,
        "columns": 3,
        "channels": (64, 128, 256, 512, 512),
        "dropout": (0.0, 0.1, 0.2, 0.3, 0.4),
    },
    # Tables 3 and 4: the supporting experiments, 5 to 160 layers.
    **{f"fractal_c{c}": {"columns": c, **_ULTRA} for c in range(1, 7)},
}


def list_models() -> list[str]:
    """The names that :func:`create` knows.

    Example:
        >>> "fractalnet20" in list_models()
        True
    """
    return sorted(_MODELS)


def create(name: str, **overrides: Any) -> FractalNet:
    """A network of the paper.

    Args:
        name: "fractalnet20" (64 to 512 channels, C = 3, with the paper's dropout) or "fractal_c1" ... "fractal_c6"
            (16 to 128 channels, 100 classes).
        overrides: any argument of :class:`FractalNet`.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 4.
    Example:
        >>> sum(p.numel() for p in create("fractal_c3").parameters())
        2125204
    """
    if name not in _MODELS:
        raise ValueError(f"create: expected name one of {', '.join(list_models())}, got {name!r}")
    return FractalNet(**{**_MODELS[name], **overrides})
