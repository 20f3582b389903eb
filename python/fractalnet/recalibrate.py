"""Running statistics taken anew, for the network that will answer: the full one or a column alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import drop_path

if TYPE_CHECKING:
    from .model import FractalNet


@torch.no_grad()
def recalibrate(
    model: FractalNet, loader: Iterable[Tensor | Sequence[Tensor]], column: int | None = None
) -> FractalNet:
    r"""Takes the running statistics anew, with the weights as they are: averages over the batches of a loader.

    .. math:: \mu = \frac1n \sum_b \mu_b, \qquad \sigma^2 = \frac1n \sum_b \sigma_b^2

    with every batch's mean and unbiased variance per channel, as ``torch.nn.BatchNorm2d(momentum=None)`` averages.

    Nothing is dropped and set 0 is written, or the column runs alone and its own units of the last set are. Where a
    network has one set for both (``split_stats=False``), a column's statistics replace those of its units for the full
    network too. A stem is shared: its statistics are taken with ``column=None`` only. Dropout is off, no random number
    is drawn, and everything but these statistics and their batch counts stays as it was; after an error they do too.

    Args:
        model: the network, in whatever mode.
        loader: batches of images [N, C, H, W], or (images, ...) of which the rest is ignored.
        column: this column alone instead of the full network.
    Returns:
        The model.
    Raises:
        ValueError: the loader has no batch, or there is no such column. TypeError: what it gives are no batches.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 3: columns as networks of their own.
    Example:
        >>> from fractalnet import FractalNet
        >>> net = FractalNet(10, 2, (8,), image_size=8)
        >>> images = torch.randn(6, 3, 8, 8)
        >>> deepest = net.recalibrate([(images, torch.zeros(6))], column=1).eval()(images, column=1)
        >>> torch.allclose(deepest, net.train()(images, column=1), atol=0.1)  # the batch's statistics
        True
    """
    try:
        batches_of_images = iter(loader)
    except TypeError as error:
        raise TypeError(f"recalibrate: expected loader to be iterable, got {type(loader).__name__}") from error
    if column is None:
        path = drop_path.full_path(len(model.blocks), model.columns)
    elif isinstance(column, int) and not isinstance(column, bool) and 0 <= column < model.columns:
        path = drop_path.column_path(len(model.blocks), model.columns, column)
    else:
        raise ValueError(f"recalibrate: expected column None or from 0 to {model.columns - 1}, got {column!r}")
    normalising = [m for m in model.modules() if hasattr(m, "num_batches_tracked")]
    options = [(m, name, getattr(m, name)) for m in normalising for name in ("momentum", "dropout") if hasattr(m, name)]
    modes = [(m, m.training) for m in model.modules()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(model.parameters()).device
    done = False
    try:
        for module in normalising:
            module.momentum = None  # averages cumulatively
            module.num_batches_tracked.zero_()
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        batches = 0
        for batch in batches_of_images:
            images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
            if not isinstance(images, Tensor):
                raise TypeError(
                    "recalibrate: expected loader to give batches of images, Tensors or (Tensor, ...), got "
                    f"{type(batch).__name__}"
                )
            model(images.to(device), path=path)
            batches += 1
        if not batches:
            raise ValueError("recalibrate: expected a loader of at least one batch, got an empty one")
        done = True
    finally:
        for name, buffer in model.named_buffers():
            if not done or (column is not None and not name.startswith("blocks.")):
                buffer.copy_(before[name])
            elif name.endswith("num_batches_tracked"):  # 0: of a unit or a set that did not run
                buffer.copy_(torch.where(buffer == 0, before[name], buffer))
        for module, name, value in options:
            setattr(module, name, value)
        for module, training in modes:
            module.training = training
    return model
