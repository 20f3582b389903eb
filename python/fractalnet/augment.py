"""What is done to images on the way to the network: views drawn from a key alone, normalisation, ten crops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .drop_path import generator_for
from .files import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .sources import Dataset

PADDINGS = ("zero", "reflect", "black")
NORMALISATIONS = ("mean", "std")
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop: share of the area, width / height


@dataclass(frozen=True)
class Augment:
    r"""Normalises a batch on its device and, in training, mirrors and translates it.

    .. math:: (x / scale - mean) / std

    Args:
        mean, std: per channel, of images in [0, 1]. scale: the value of a white pixel.
        size: side of the views of streamed images; None leaves every image its size.
        mirror: half of the images, left to right.
        translate: by a uniform draw of -translate to translate pixels along both axes.
        padding: of what a translation uncovers: "zero" (the paper's "+": zero after mean subtraction), "reflect" (its
            "++"), or "black" (zero before mean subtraction).
        normalise: "mean" subtracts the mean only, "std" divides by std too.
        train: False leaves out everything random. ten_crop: evaluation views of streamed images are the whole centre
            square, for `ten_crop`.
    Example:
        >>> augment = Augment((0.5,), (0.25,), mirror=True, translate=4)
        >>> augment(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), (0, 1)).shape  # key: seed, step
        torch.Size([2, 1, 32, 32])
    """

    mean: Sequence[float]
    std: Sequence[float]
    scale: float = 255.0
    size: int | None = None
    mirror: bool = False
    translate: int = 0
    padding: str = "zero"
    normalise: str = "std"
    train: bool = True
    ten_crop: bool = False

    def __post_init__(self) -> None:
        for name, known in (("padding", PADDINGS), ("normalise", NORMALISATIONS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if type(self.translate) is not int or self.translate < 0:
            raise UserError(f"translate: expected a whole number of pixels >= 0, got {self.translate!r}")
        if self.normalise == "std" and not all(self.std):
            raise UserError(f"normalise: expected mean where a channel's std is 0, got std with std {self.std}")

    @classmethod
    def of(cls, data: Dataset, **options: Any) -> Augment:
        """The augmentation of this data set; `options` as of the class."""
        made = cls(data.mean, data.std, data.train.scale, data.image_size if data.streamed else None, **options)
        made.check_size(data.image_size, data.image_size)
        return made

    def check_size(self, height: int, width: int) -> None:
        if self.padding == "reflect" and self.translate >= min(height, width):
            raise UserError(
                f"translate: expected less than the image's {height}x{width} pixels to reflect, got {self.translate}"
            )

    def eval(self, ten_crop: bool = False) -> Augment:
        """The same without anything random."""
        return replace(self, train=False, ten_crop=ten_crop)

    def __call__(self, x: Tensor, key: tuple[int, ...] = (), *, start: int = 0, total: int | None = None) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, H, W] on x's device.

        The draws depend on `key` alone. They are made for a whole batch of `total` images, of which x holds those from
        `start` on: the parts of a batch are the same views on several ranks as in one process.
        """
        if not (self.train and self.translate):
            return self._mirrored(self._normalised(x), key, start, total)
        (height, width), t = x.shape[-2:], self.translate
        self.check_size(height, width)
        border = (t, t, t, t)
        if self.padding == "black":
            x = self._normalised(F.pad(x, border))
        else:
            x = F.pad(self._normalised(x), border, mode="reflect" if self.padding == "reflect" else "constant")
        # One indexing of a view of all windows, in place of a crop of each image.
        count = len(x) if total is None else total
        draws = torch.randint(2 * t + 1, (2, count), generator=generator_for(*key, 1), device="cpu")
        dy, dx = draws[:, start : start + len(x)].to(x.device, non_blocking=True)
        windows = x.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2t + 1, 2t + 1, H, W]
        return self._mirrored(windows[torch.arange(len(x), device=x.device), :, dy, dx], key, start, total)

    def _normalised(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != len(self.mean):
            raise ValueError(f"Augment: expected x [B, C={len(self.mean)}, H, W], got {list(x.shape)}")
        x = x.float().mul_(1 / self.scale).sub_(_per_channel(self.mean, x.device))
        return x if self.normalise == "mean" else x.div_(_per_channel(self.std, x.device))

    def _mirrored(self, x: Tensor, key: tuple[int, ...], start: int, total: int | None) -> Tensor:
        if not (self.train and self.mirror):
            return x
        count = len(x) if total is None else total
        draws = torch.randint(2, (count,), generator=generator_for(*key, 2), device="cpu")
        flipped = draws[start : start + len(x)].bool().to(x.device, non_blocking=True)
        return torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x)

    @property
    def view_size(self) -> int:
        """The side of the views of streamed images."""
        if self.size is None:
            raise UserError("size: expected the side of the views of streamed images, got None")
        return short_side(self.size) if self.ten_crop and not self.train else self.size

    def view(self, image: Image, key: tuple[int, ...]) -> Tensor:
        """uint8 [C, S, S] of a streamed image: a random resized crop in training, else the centre."""
        if self.train:
            return to_tensor(random_resized_crop(image, self.view_size, key))
        return to_tensor(centre_crop(image, self.view_size, short_side(self.size)))


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Not by a copy that waits: on a GPU it would wait for the step before."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1).to(device, non_blocking=True)


def short_side(size: int) -> int:
    """The shorter side of an evaluation image of which the centre `size` is shown: 256 for 224."""
    return round(size * 256 / 224)


def to_tensor(image: Image) -> Tensor:
    """An RGB or L image as uint8 [C, H, W]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, len(image.getbands())).permute(2, 0, 1).contiguous()


def random_resized_crop(image: Image, size: int, key: tuple[int, ...]) -> Image:
    """A part of 8 % to 100 % of the area, 3/4 to 4/3 as wide as high, scaled to [size, size]; drawn from the key alone.

    Source: Szegedy et al. 2015, arXiv:1409.4842, section 6.
    """
    from PIL.Image import Resampling

    width, height = image.size
    draws = torch.rand((10, 4), generator=generator_for(*key), device="cpu", dtype=torch.float64).tolist()
    for area, ratio, across, down in draws:
        pixels = width * height * (SCALE[0] + area * (SCALE[1] - SCALE[0]))
        shape = math.exp(math.log(RATIO[0]) + ratio * math.log(RATIO[1] / RATIO[0]))
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            break
    else:  # a very long image: its centre, in the nearest ratio that is allowed
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + w, top + h))


def centre_crop(image: Image, size: int, side: int | None = None) -> Image:
    """The centre [size, size] of the image with its shorter side scaled to `side` (default: size)."""
    from PIL.Image import Resampling

    share = size / (side or size) * min(image.size)  # of the original that is seen: one resize does both
    left, top = (image.width - share) / 2, (image.height - share) / 2
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + share, top + share))


def ten_crop(x: Tensor, size: int, pad: int = 0) -> Tensor:
    """[B, C, H, W] to [10, B, C, size, size]: the four corners, the centre, and the mirror images of these.

    pad: zeros around x first. Ten views of 32x32 images, translated as in training: ``ten_crop(x, 32, pad=4)``.
    """
    x = F.pad(x, (pad,) * 4)
    height, width = x.shape[-2:]
    if not 0 < size <= min(height, width):
        raise UserError(f"ten_crop: expected size from 1 to {min(height, width)}, got {size}")
    bottom, right = height - size, width - size
    at = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    crops = torch.stack([x[..., top : top + size, left : left + size] for top, left in at])
    return torch.cat([crops, crops.flip(-1)])
