"""What the networks share: argument errors, ResNet's first layers, initialisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from torch import Tensor, nn

from fractal_kernels import ConvBNReLU

STEM_CHANNELS = 64


def check(op: str, argument: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{op}: expected {argument} {expected}, got {got!r}")


def is_whole(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_network(
    op: str,
    *,
    num_classes: int,
    channels: Sequence[int],
    in_channels: int,
    image_size: int,
    dropout: Sequence[float] | None,
    pool: str,
    last_pool: bool,
    stem: str | None,
    init: str,
    momentum: float | None,
    eps: float,
) -> None:
    """ValueError, with the argument's name, unless a network can be built of these."""
    check(op, "num_classes", is_whole(num_classes), "a whole number >= 1", num_classes)
    widths = isinstance(channels, Sequence) and len(channels) > 0 and all(map(is_whole, channels))
    check(op, "channels", widths, "a positive width per block", channels)
    check(op, "in_channels", is_whole(in_channels), "a whole number >= 1", in_channels)
    check(op, "stem", stem in (None, "resnet"), "None or 'resnet'", stem)
    check(op, "last_pool", isinstance(last_pool, bool), "True or False", last_pool)
    least = 2 ** (len(channels) if last_pool else len(channels) - 1)
    if stem:  # it leaves a quarter of the size, rounded up
        least = 4 * least - 3
    check(op, "image_size", is_whole(image_size, least), f">= {least} for the pools", image_size)
    rates = dropout is None or (
        not isinstance(dropout, str) and isinstance(dropout, Sequence) and len(dropout) == len(channels)
    )
    check(op, "dropout", rates, "None or a rate per block", dropout)
    for b, rate in enumerate(dropout or ()):
        check(op, f"dropout[{b}]", is_number(rate) and 0 <= rate < 1, "in [0, 1)", rate)
    check(op, "pool", pool in ("max", "avg"), "'max' or 'avg'", pool)
    check(op, "init", init in ("xavier", "he"), "'xavier' or 'he'", init)
    momentum_holds = momentum is None or (is_number(momentum) and 0 <= momentum <= 1)
    check(op, "momentum", momentum_holds, "None or in [0, 1]", momentum)
    check(op, "eps", is_number(eps) and eps >= 0, "a number >= 0", eps)


def check_flags(op: str, **flags: object) -> None:
    for name, value in flags.items():
        check(op, name, isinstance(value, bool), "True or False", value)


def new_head(model: nn.Module, features: int, num_classes: int) -> nn.Linear:
    """Of a network that has weights: where they are, in their dtype and its mode."""
    check(type(model).__name__, "num_classes", is_whole(num_classes), "a whole number >= 1", num_classes)
    like = next(model.parameters())
    head = nn.Linear(features, num_classes, device=like.device, dtype=like.dtype)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head.train(model.training)


def init_conv(weight: Tensor, init: str, fan_in: int, fan_out: int) -> None:
    """Glorot's uniform ("xavier") or He's normal distribution ("he"), in place.

    The fans are arguments because a weight may hold several convolutions side by side.
    """
    if init == "xavier":
        nn.init.uniform_(weight, -(bound := math.sqrt(6 / (fan_in + fan_out))), bound)
    else:
        nn.init.normal_(weight, std=math.sqrt(2 / fan_in))


def resnet_stem(in_channels: int, init: str, conv_bias: bool, bn_affine: bool, **norm: float | None) -> nn.Sequential:
    """ResNet-34's first layers: 7x7 convolution of stride 2 to 64 channels, batch norm, ReLU, 3x3 max-pool of stride 2.

    Source:
        He et al. 2016 (arXiv:1512.03385), table 1.
    """
    step = ConvBNReLU(in_channels, STEM_CHANNELS, 7, 2, 3, bias=conv_bias, affine=bn_affine, **norm)
    init_conv(step.conv.weight, init, in_channels * 49, STEM_CHANNELS * 49)
    if step.conv.bias is not None:
        nn.init.zeros_(step.conv.bias)
    return nn.Sequential(step, nn.MaxPool2d(3, 2, 1))


def plain_step(step: ConvBNReLU) -> list[nn.Module]:
    """A copy of a step in modules of ``torch.nn``."""
    made = {"device": step.conv.weight.device, "dtype": step.conv.weight.dtype}
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"
    conv = nn.Conv2d(*(getattr(step.conv, name) for name in names), bias=step.conv.bias is not None, **made)
    norms = "num_features", "eps", "momentum", "affine", "track_running_stats"
    bn = nn.BatchNorm2d(*(getattr(step.bn, name) for name in norms), **made)
    conv.load_state_dict(step.conv.state_dict())
    bn.load_state_dict(step.bn.state_dict())
    return [conv, bn, nn.ReLU()]


def plain_stem(stem: nn.Module) -> list[nn.Module]:
    """A copy of the stem in modules of ``torch.nn``; steps and pools may be others, or have become Identities."""
    copies: list[nn.Module] = []
    for layer in [*stem] if type(stem) is nn.Sequential else [stem]:
        if type(layer) is ConvBNReLU:
            copies += plain_step(layer)
        elif type(layer) is nn.MaxPool2d:
            copies.append(copy.deepcopy(layer))
        elif type(layer) is not nn.Identity:
            raise TypeError(
                f"export: expected a stem of ConvBNReLU, MaxPool2d and Identity, got {type(layer).__name__}"
            )
    return copies
