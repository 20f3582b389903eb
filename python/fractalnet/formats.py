"""Formats of image sets on disk: image folders, parquet of the Hugging Face hub, CIFAR's binary files.

A reader gives `Files`, which decode an image on request; `decoded` makes `Images` of them.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from .files import UserError, require

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from PIL.Image import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "WEBP")
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 64  # bytes in which the end is: some writers pad their files
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel: others would be clipped
THREADS, CHUNK = min(16, 2 * (os.cpu_count() or 1)), 256
SMALL = 128 * 128  # pixels up to which decoding is mostly Python's work, and threads only wait for each other
T = TypeVar("T")


@dataclass(frozen=True)
class Images:
    """Images in memory: x uint8 [N, C, H, W], of which `scale` is white; labels y int64 [N]."""

    x: Tensor
    y: Tensor
    scale: float = 255.0

    def __len__(self) -> int:
        return len(self.y)


class Encoded(Protocol):
    """Image files, wherever they are: what can be pickled and sent to a worker process."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Where image i is, for an error."""

    def read(self, i: int) -> bytes:
        """Image i as it is on disk."""

    def facts(self) -> Iterable[bytes]:
        """Names and sizes that identify the files."""


@dataclass(frozen=True)
class Files:
    """Images that are decoded when asked for, RGB of any size; labels y int64 [N]."""

    encoded: Encoded
    y: Tensor
    scale: float = 255.0

    def __len__(self) -> int:
        return len(self.y)

    def open(self, i: int) -> Image:
        """Image i in RGB; UserError names the file that cannot be decoded."""
        return decode(self.encoded, i)[0]


# --- decoding ----------------------------------------------------------------------------------


def decode(encoded: Encoded, i: int) -> tuple[Image, bool]:
    """Image i in RGB, and whether it is grey in its file."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded.read(i)), formats=FORMATS) as image:
            check_header(image)
            return image.convert("RGB"), image.mode in ("1", "L")
    except Exception as error:  # a damaged file makes pillow's parsers raise anything from SyntaxError to struct.error
        raise UserError(f"{encoded.name(i)}: cannot be decoded: {one_line(error)}") from error


def check_header(image: Image) -> None:
    """Raises ValueError unless a file that was opened holds pixels of 8 bits."""
    if image.mode not in MODES:
        raise ValueError(f"expected 8 bits per channel, got mode {image.mode}")
    if not min(image.size):
        raise ValueError(f"expected pixels, got {image.width}x{image.height}")


def one_line(error: Exception) -> str:
    """The first line of an error, or its type where it says nothing."""
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not an image ({', '.join(FORMATS)})"  # pillow's own words end in an address in memory
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def each(function: Callable[[int], T], count: int, threads: int = THREADS) -> list[T]:
    """function(0), ..., function(count - 1) by threads; the first error, and nothing after it."""
    pool = ThreadPoolExecutor(threads)
    try:
        starts = range(0, count, CHUNK)
        parts = pool.map(lambda a: [function(i) for i in range(a, min(a + CHUNK, count))], starts)
        return [result for part in parts for result in part]
    finally:
        pool.shutdown(cancel_futures=True)


class OtherSize(UserError):
    """An image that is not of the first one's size."""


def decoded(splits: Sequence[Files], height: int, width: int) -> list[Images]:
    """Every image of the splits, with one channel if all are grey; UserError names the first that is damaged, or,
    OtherSize, of another size."""
    import numpy as np

    arrays, grey = [np.empty((len(s), 3, height, width), np.uint8) for s in splits], True
    threads = THREADS if height * width > SMALL else 1
    for split, x in zip(splits, arrays, strict=True):

        def put(i: int, split: Files = split, x: np.ndarray = x) -> bool:
            image, is_grey = decode(split.encoded, i)
            if image.size != (width, height):
                raise OtherSize(
                    f"{split.encoded.name(i)}: expected {width}x{height} pixels as the first image, got "
                    f"{image.width}x{image.height}; --data.image_size crops and scales images of any size"
                )
            x[i] = np.asarray(image).transpose(2, 0, 1)
            return is_grey

        grey = all(each(put, len(split), threads)) and grey
    arrays = [np.ascontiguousarray(x[:, :1]) if grey else x for x in arrays]
    return [Images(torch.from_numpy(x), split.y) for x, split in zip(arrays, splits, strict=True)]


def check_labels(y: Tensor, classes: int, name: Callable[[int], str]) -> None:
    """Raises UserError where a label is not one of 0 to classes - 1."""
    if bad := ((y < 0) | (y >= classes)).nonzero().flatten().tolist():
        raise UserError(f"{name(bad[0])}: expected a label from 0 to {classes - 1}, got {y[bad[0]].item()}")


# --- image folders -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """Image files under a root; names as one array, since a million objects would be copied to every worker."""

    root: str
    names: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def read(self, i: int) -> bytes:
        return Path(self.name(i)).read_bytes()

    def facts(self) -> Iterable[bytes]:
        for name, size in zip(self.names, self.sizes, strict=True):
            yield name + b"\0%d\0" % size

    def check(self, i: int) -> None:
        """Raises UserError unless file i begins and ends as an image; much cheaper than decoding it whole."""
        from PIL import Image

        try:
            with open(self.name(i), "rb") as file, Image.open(file, formats=FORMATS) as image:
                check_header(image)
                file.seek(max(0, self.sizes[i] - TAIL))
                if (end := ENDS.get(image.format or "")) and end not in file.read():
                    file.seek(0)
                    if end not in file.read():
                        raise ValueError(f"truncated: a {image.format} file without its end")
                    image.load()  # followed by other bytes, or truncated behind a preview: decoding tells
        except Exception as error:  # as in `decode`
            raise UserError(f"{self.name(i)}: not a readable image: {one_line(error)}") from error


def listed(path: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden files."""
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed: {error.strerror or error}") from error


def folder(root: Path) -> tuple[list[Files], tuple[str, ...]]:
    """train/CLASS/* and test/CLASS/* or val/CLASS/* of images, and the classes; every file's ends are checked."""
    require("PIL")
    # ImageNet's folder test, without labels, is beside val.
    there = (t for t in ("test", "val") if (root / t).is_dir() and any(p.is_dir() for p in listed(root / t)))
    test = next(there, "val")
    for split in ("train", test):
        if not (root / split).is_dir():
            raise UserError(f"{root}: expected folders train and test (or val) with a folder per class, got no {split}")
    classes = {s: tuple(p.name for p in listed(root / s) if p.is_dir()) for s in ("train", test)}
    if odd := sorted(set(classes["train"]) ^ set(classes[test])):
        raise UserError(f"{root}: expected the same classes in train and {test}, got {odd[0]} in only one of them")
    return [split_of(root, name, classes["train"]) for name in ("train", test)], classes["train"]


def split_of(root: Path, split: str, classes: tuple[str, ...]) -> Files:
    import numpy as np

    names, sizes, y = [], [], []
    for label, name in enumerate(classes):
        files = listed(root / split / name)
        if not files:
            raise UserError(f"{root / split / name}: expected images, got an empty folder")
        for file in files:
            if file.suffix.lower() not in SUFFIXES:
                raise UserError(f"{file}: expected an image ({', '.join(SUFFIXES)})")
            names.append(os.fsencode(file.relative_to(root)))
            try:
                sizes.append(file.stat().st_size)
            except OSError as error:  # of a link that leads nowhere
                raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
            y.append(label)
    if not names:
        raise UserError(f"{root / split}: expected a folder per class with images, got none")
    encoded = Folder(str(root), np.array(names), np.array(sizes))
    each(encoded.check, len(names))
    return Files(encoded, torch.tensor(y))


# --- parquet -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of a `datasets.Dataset` with undecoded images; `files` are (name, rows, bytes) of its parquet files."""

    table: datasets.Dataset
    column: str
    files: tuple[tuple[str, int, int], ...]

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        for name, count, _ in self.files:
            if i < count:
                return f"{name}: row {i}"
            i -= count
        raise IndexError(i)

    def read(self, i: int) -> bytes:
        image = self.table[i][self.column]
        if not image or not image["bytes"]:
            raise ValueError("expected the bytes of an image in the row, got none")
        return image["bytes"]

    def facts(self) -> Iterable[bytes]:
        return (b"%s\0%d\0%d\0" % (os.fsencode(Path(name).name), count, size) for name, count, size in self.files)


def columns(features: dict[str, Any], label: str | None, where: str) -> tuple[str, str]:
    """The columns of the images and of their classes."""
    import datasets

    images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    labels = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if label in labels or (len(labels) > 1 and (label := "label") in labels):
        labels = [label]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(f"{where}: expected one image and one class label feature, got {', '.join(features) or 'none'}")
    return images[0], labels[0]


def rows(
    table: datasets.Dataset, label: str | None, files: Sequence[tuple[str, int, int]]
) -> tuple[Files, tuple[str, ...]]:
    """A split of a table of the hub, and its classes; `label` is preferred where there are several class labels."""
    import datasets

    image, label = columns(table.features, label, files[0][0])
    classes = tuple(table.features[label].names)
    encoded = Rows(table.select_columns(image).cast_column(image, datasets.Image(decode=False)), image, tuple(files))
    y = torch.from_numpy(table.data.column(label).fill_null(-1).to_numpy().astype("int64"))  # -1: the check reports it
    check_labels(y, len(classes), encoded.name)
    return Files(encoded, y), classes


def shards(places: Iterable[Path], split: str) -> list[Path]:
    """The parquet files of a split in the first of these places that has any; none may be missing of a numbered set."""
    found = next((f for p in places if (f := sorted(p.glob(f"{split}-*.parquet")))), [])
    for file in found:
        if (number := re.search(r"-of-0*(\d+)\.parquet$", file.name)) and int(number[1]) != len(found):
            raise UserError(f"{file.parent}: expected {number[1]} files {split}-*.parquet, got {len(found)}")
    return found


def parquet(
    root: Path,
    train: Sequence[str] = ("train",),
    test: Sequence[str] = ("test", "validation"),
    sub: str = "",
    label: str | None = None,
) -> tuple[list[Files], tuple[str, ...]]:
    """SPLIT-*.parquet in root, root/data or root/sub: all splits of `train`, and the first of `test` that is there."""
    require("PIL", "datasets")
    import datasets

    places = [p for p in (root, root / "data", root / sub) if p.is_dir()]
    files = {"train": [], "test": next((f for name in test if (f := shards(places, name))), [])}
    for name in train:
        files["train"] += (part := shards(places, name))
        if not part:
            raise UserError(f"{root}: expected {name}-*.parquet there or in {root / 'data'}, got none")
    if not files["test"]:
        raise UserError(f"{root}: expected {' or '.join(test)}-*.parquet there or in {root / 'data'}, got none")
    facts, features = {}, {}
    for split, found in files.items():
        facts[split] = []
        for file in found:
            count, here = footer(file, label)
            if (features := features or here) != here:
                raise UserError(
                    f"{file}: expected the image and class label of {files['train'][0]}, got other features"
                )
            facts[split].append((str(file), count, file.stat().st_size))
        if not sum(count for _, count, _ in facts[split]):
            raise UserError(f"{found[0]}: expected images, got no rows")
    names = {split: [str(f) for f in found] for split, found in files.items()}
    try:  # makes an Arrow copy in the cache of `datasets`: rows of parquet files cannot be read one at a time
        tables = datasets.load_dataset("parquet", data_files=names, columns=list(features), split=list(names))
    except Exception as error:  # pyarrow's and datasets' own errors have no common base but this
        raise UserError(f"{root}: cannot be read: {one_line(error.__cause__ or error)}") from error
    splits = [rows(table, label, facts[split]) for split, table in zip(names, tables, strict=True)]
    return [files for files, _ in splits], splits[0][1]


def footer(file: Path, label: str | None) -> tuple[int, dict[str, Any]]:
    """A parquet file's rows, and its image and class label features."""
    import datasets
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            count, features = opened.metadata.num_rows, datasets.Features.from_arrow_schema(opened.schema_arrow)
    except Exception as error:  # as above
        raise UserError(f"{file}: not a readable parquet file: {one_line(error)}") from error
    return count, {name: features[name] for name in columns(features, label, str(file))}


# --- CIFAR's binary version --------------------------------------------------------------------


def cifar_binary(files: Sequence[Path], classes: int, labels: int) -> Images:
    """Records of `labels` label bytes, of which the last counts, and 3x32x32 pixels."""
    import numpy as np

    record, parts = labels + 3 * 32 * 32, []
    for file in files:
        try:
            data = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}") from error
        if not len(data) or len(data) % record:
            raise UserError(f"{file}: expected a multiple of {record} bytes (CIFAR's binary version), got {len(data)}")
        part = torch.from_numpy(data).view(-1, record)
        check_labels(part[:, labels - 1].long(), classes, lambda i, file=file: f"{file}: row {i}")
        parts.append(part)
    rows = torch.cat(parts)
    return Images(rows[:, labels:].reshape(-1, 3, 32, 32).contiguous(), rows[:, labels - 1].long())
