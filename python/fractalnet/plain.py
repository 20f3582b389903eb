"""Plain networks of equal depth: what the paper compares FractalNet with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fractal_kernels import ConvBNReLU

from .layers import (
    STEM_CHANNELS,
    check,
    check_flags,
    check_network,
    init_conv,
    is_whole,
    new_head,
    plain_step,
    resnet_stem,
)


class _Step(ConvBNReLU):
    """A step with dropout where the fractal blocks have it: between convolution and batch norm."""

    rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(F.dropout(y, self.rate, self.training) if self.rate else y)

    def layers(self) -> list[nn.Module]:
        conv, *others = plain_step(self)
        return [conv, *([nn.Dropout(self.rate)] if self.rate else []), *others]


class PlainNet(nn.Module):
    """The deepest column of a FractalNet as a network of its own: no joins, no drop-path, no residuals.

    B blocks of ``depth_per_block`` steps (3x3 convolution, batch norm, ReLU) and a 2x2 pool, global average, linear.

    Args:
        num_classes: outputs of the classifier.
        depth_per_block: steps per block; 2**(C-1) makes the network as deep as a FractalNet of C columns.
        channels: K of every block; its length is B.
        in_channels, image_size: of the images, [N, in_channels, image_size, image_size].
        dropout: rate per block between convolution and batch norm, or None.
        pool, last_pool, stem, conv_bias, bn_affine, init, momentum, eps: as in :class:`fractalnet.FractalNet`.
    Shape:
        images [N, in_channels, S, S] to logits [N, num_classes].
    Raises:
        ValueError: naming the argument.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 4.
    Example:
        >>> import torch
        >>> net = PlainNet(10, 4, (16, 32), image_size=8)
        >>> net(torch.randn(4, 3, 8, 8)).shape, net.depth()
        (torch.Size([4, 10]), 8)
    """

    def __init__(
        self,
        num_classes: int,
        depth_per_block: int,
        channels: Sequence[int],
        *,
        in_channels: int = 3,
        image_size: int = 32,
        dropout: Sequence[float] | None = None,
        pool: str = "max",
        last_pool: bool = True,
        stem: str | None = None,
        conv_bias: bool = False,
        bn_affine: bool = True,
        init: str = "xavier",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check("PlainNet", "depth_per_block", is_whole(depth_per_block), "a whole number >= 1", depth_per_block)
        check_network(
            "PlainNet",
            num_classes=num_classes,
            channels=channels,
            in_channels=in_channels,
            image_size=image_size,
            dropout=dropout,
            pool=pool,
            last_pool=last_pool,
            stem=stem,
            init=init,
            momentum=momentum,
            eps=eps,
        )
        check_flags("PlainNet", conv_bias=conv_bias, bn_affine=bn_affine)
        self.channels, self.image_size, self.depth_per_block = tuple(channels), image_size, depth_per_block
        norm = {"momentum": momentum, "eps": eps}
        self.stem = resnet_stem(in_channels, init, conv_bias, bn_affine, **norm) if stem else nn.Identity()
        width = STEM_CHANNELS if stem else in_channels
        self.blocks = nn.ModuleList()
        for b, out_width in enumerate(channels):
            block = nn.Sequential()
            for _ in range(depth_per_block):
                step = _Step(width, out_width, bias=conv_bias, affine=bn_affine, **norm)
                step.rate = dropout[b] if dropout else 0.0
                init_conv(step.conv.weight, init, width * 9, out_width * 9)
                if conv_bias:
                    nn.init.zeros_(step.conv.bias)
                block.append(step)
                width = out_width
            if last_pool or b < len(channels) - 1:
                block.append(nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2))
            self.blocks.append(block)
        self.head = new_head(self, width, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """As :meth:`FractalNet.reset_classifier`."""
        self.head = new_head(self, self.channels[-1], num_classes)

    def depth(self) -> int:
        """Convolutions in a row, the stem's among them."""
        return len(self.blocks) * self.depth_per_block + (not isinstance(self.stem, nn.Identity))

    def block_layers(self, b: int) -> list[nn.Module]:
        """Block b in modules of ``torch.nn``, with copies of its weights and statistics."""
        steps = [step.layers() if isinstance(step, _Step) else [copy.copy(step)] for step in self.blocks[b]]
        return [layer for layers in steps for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))
