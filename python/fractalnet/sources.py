"""Data sets by name: embedded, from the Hugging Face hub or a local copy of it, and folders of one's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .augment import Augment, centre_crop, short_side, to_tensor
from .drop_path import generator_for
from .files import UserError, require
from .formats import Files, Images, OtherSize, cifar_binary, decode, decoded, each, folder, one_line, parquet, rows

MEMORY = 2 << 30  # bytes of decoded images up to which a set is kept in memory
SAMPLE = 1000  # training images of which mean and std of a streamed set are taken
STREAMED_SIZE = 224


@dataclass(frozen=True)
class Hub:
    """A data set of the hub. train: all of these splits. binary: CIFAR's binary files, label bytes, file of names."""

    repository: str
    config: str
    label: str = "label"
    train: tuple[str, ...] = ("train",)
    test: str = "test"
    binary: tuple[str, tuple[str, ...], str, int, str] | None = None


CIFAR10 = ("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1)
CIFAR100 = ("cifar-100-binary", ("train.bin",), "test.bin", 2)
SVHN = ("ufldl-stanford/svhn", "cropped_digits")
HUB = {
    "cifar10": Hub("uoft-cs/cifar10", "plain_text", binary=(*CIFAR10, "batches.meta.txt")),
    "cifar100": Hub("uoft-cs/cifar100", "cifar100", "fine_label", binary=(*CIFAR100, "fine_label_names.txt")),
    "svhn": Hub(*SVHN),
    "svhn-extra": Hub(*SVHN, train=("train", "extra")),
    "imagenet": Hub("ILSVRC/imagenet-1k", "", test="validation"),
}
NAMES = ("digits", *HUB, "folder:PATH", "parquet:PATH")


@dataclass(frozen=True)
class Dataset:
    """Training and test images; mean and std per channel, of training images in [0, 1].

    Of streamed sets (`Files`) these are taken of a fixed sample of 1,000 training images, cropped as in evaluation.
    image_size: the side of what the network sees; of images in memory, their height and width are equal.
    """

    name: str
    train: Images | Files
    test: Images | Files
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def streamed(self) -> bool:
        """Whether images are decoded while training, since they do not fit into memory or differ in size."""
        return isinstance(self.train, Files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of labels and pixels; of streamed sets, of labels and of the files' names and sizes."""
        digest = hashlib.sha256(repr((self.classes, self.channels)).encode())
        for split in (self.train, self.test):
            digest.update(split.y.numpy().tobytes())
            if isinstance(split, Images):
                digest.update(repr((tuple(split.x.shape), split.scale)).encode())
                digest.update(split.x.numpy())
            else:
                for fact in split.encoded.facts():
                    digest.update(fact)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The facts about the data that belong beside its results."""
        return {
            "name": self.name,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "classes": len(self.classes),
            "channels": self.channels,
            "image_size": self.image_size,
            "streamed": self.streamed,
            "mean": list(self.mean),
            "std": list(self.std),
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W], normalised, and their labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def tensors(data: Dataset, augment: Augment | None = None) -> Split:
    """A set that fits into memory as tensors, normalised and nothing else."""
    normal = (augment or Augment.of(data)).eval()
    return Split(normal(data.train.x), data.train.y, normal(data.test.x), data.test.y)


def load(spec: str, root: Path | None = None, image_size: int | None = None) -> Dataset:
    """The data set of a name such as ``cifar10``, or of a path: ``folder:PATH``, ``parquet:PATH``.

    Args:
        spec: one of `NAMES`. root: a local copy of a set that is on the hub; or where that path is now.
        image_size: side of the network's input. Images of another size are streamed, cropped and scaled to it; without
            it a set's images must be of one size, or too many for memory (then 224).
    Raises:
        UserError: whatever is wrong with the files, before anything is trained.
    Example:
        >>> data = load("digits")
        >>> tuple(data.train.x.shape), len(data.classes)
        ((1437, 1, 8, 8), 10)
    """
    kind, _, path = spec.partition(":")
    if image_size is not None and (type(image_size) is not int or image_size < 1):
        raise UserError(f"image_size: expected a whole number >= 1, got {image_size!r}")
    if kind in ("folder", "parquet") and path:
        return assemble(spec, *(folder if kind == "folder" else parquet)(Path(root or path).expanduser()), image_size)
    if spec == "digits":
        if root is not None:
            raise UserError(f"data digits: expected no root, it comes with scikit-learn, got {root}")
        return in_memory(spec, *digits(), image_size)
    if spec not in HUB:
        raise UserError(f"unknown data {spec!r}; there is: {', '.join(NAMES)}")
    hub = HUB[spec]
    if root is None:
        return assemble(spec, *download(spec, hub), image_size)
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data {spec}: expected a folder as root, got {root}")
    if hub.binary:
        for place in (root, root / hub.binary[0]):
            if any((place / name).exists() for name in (*hub.binary[1], hub.binary[2])):
                return in_memory(spec, *cifar(place, hub), image_size)
    return assemble(spec, *parquet(root, hub.train, (hub.test,), hub.config, hub.label), image_size)


# --- where images come from --------------------------------------------------------------------


def digits() -> tuple[list[Images], tuple[str, ...]]:
    """scikit-learn's handwritten digits; the hold-out, 20 % of every class, is the same in every run."""
    require("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    x, y = torch.from_numpy(found.images).byte().unsqueeze(1), torch.from_numpy(found.target).long()
    parts = train_test_split(range(len(y)), test_size=0.2, stratify=found.target, random_state=0)
    return [Images(x[part], y[part], 16.0) for part in parts], tuple(map(str, found.target_names))


def cifar(place: Path, hub: Hub) -> tuple[list[Images], tuple[str, ...]]:
    """CIFAR's binary version; classes are numbers where the file of their names is missing."""
    _, train, test, labels, names = hub.binary
    count = 10 if labels == 1 else 100
    try:
        classes = tuple((place / names).read_text("utf-8").split())
    except FileNotFoundError:
        classes = tuple(map(str, range(count)))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place / names}: cannot be read: {error}") from error
    if len(classes) != count:
        raise UserError(f"{place / names}: expected {count} names, got {len(classes)}")
    return [cifar_binary([place / f for f in files], count, labels) for files in (train, (test,))], classes


def download(name: str, hub: Hub) -> tuple[list[Files], tuple[str, ...]]:
    """The set from the hub, or from the cache where an earlier download left it."""
    require("PIL", "datasets")
    import datasets

    try:
        tables = datasets.load_dataset(hub.repository, hub.config or None, split=[*hub.train, hub.test])
    except Exception as error:  # no network, no access, no space: errors of several libraries without a common base
        raise UserError(
            f"data {name}: cannot download it from the Hugging Face hub ({one_line(error)}); get the parquet files of "
            f"https://huggingface.co/datasets/{hub.repository} otherwise, put them in FOLDER/data and say where that "
            f"is: --data.root FOLDER"
        ) from error
    *train, test = tables
    train = datasets.concatenate_datasets(train)
    places = [f"{hub.repository} {split}" for split in ("+".join(hub.train), hub.test)]
    facts = [[(place, len(t), t.dataset_size or 0)] for place, t in zip(places, (train, test), strict=True)]
    splits = [rows(table, hub.label, fact) for table, fact in zip((train, test), facts, strict=True)]
    if splits[0][1] != splits[1][1]:
        raise UserError(f"data {name}: expected the same classes in {places[0]} and {places[1]}, got others")
    return [files for files, _ in splits], splits[0][1]


# --- what becomes of them ----------------------------------------------------------------------


def assemble(name: str, splits: list[Files], classes: tuple[str, ...], image_size: int | None) -> Dataset:
    """Images in memory where they fit and need no scaling; else files, and statistics of a sample."""
    first = decode(splits[0].encoded, 0)[0]
    height, width = first.height, first.width
    small = sum(len(s) for s in splits) * 3 * height * width < MEMORY
    if small and (image_size is None or (height, width) == (image_size, image_size)):
        try:
            return in_memory(name, decoded(splits, height, width), classes, image_size)
        except OtherSize:
            if image_size is None:
                raise
    train, size = splits[0], image_size or STREAMED_SIZE
    chosen = torch.randperm(len(train), generator=generator_for(0), device="cpu")[:SAMPLE].sort().values.tolist()
    views = each(lambda i: to_tensor(centre_crop(train.open(chosen[i]), size, short_side(size))), len(chosen))
    mean, std = statistics(torch.stack(views), train.scale)
    return Dataset(name, train, splits[1], classes, 3, size, mean, std)


def in_memory(name: str, splits: list[Images], classes: tuple[str, ...], image_size: int | None) -> Dataset:
    train, test = splits
    channels, height, width = train.x.shape[1:]
    if height != width or image_size not in (None, height):
        wanted = f"images of {image_size} pixels" if image_size else "square images, or --data.image_size"
        raise UserError(f"data {name}: expected {wanted}, got {width}x{height}")
    return Dataset(name, train, test, classes, channels, height, *statistics(train.x, train.scale))


def statistics(x: Tensor, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, from counts of the 256 values: exact, whatever the number of pixels."""
    values = torch.arange(256, dtype=torch.float64) / scale
    mean, std = [], []
    for channel in x.unbind(1):
        counts = sum(torch.bincount(part.flatten(), minlength=256) for part in channel.split(4096)).double()
        mean.append(float(values @ counts / counts.sum()))
        spread = ((values - mean[-1]) ** 2 @ counts / counts.sum()).sqrt()
        std.append(float(spread) if (counts > 0).sum() > 1 else 0.0)  # of one value the mean is rounded
    return tuple(mean), tuple(std)
