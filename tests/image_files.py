"""Writes small data sets in the formats that they really come in; image i of a split holds pixels(i)."""

import io

import datasets
import numpy as np
import torch
from PIL import Image


def pixels(i, height=8, width=8, channels=3):
    generator = torch.Generator().manual_seed(i)
    return torch.randint(256, (height, width, channels), generator=generator, dtype=torch.uint8).numpy()


def encoded(array, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, kind, **options)
    return file.getvalue()


def write_folder(root, test="test", kind="png", size=(8, 8), count=3, channels=3):
    """Two classes; image i of a split holds pixels(i)."""
    for split, per_class in (("train", count), (test, 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for j in range(per_class):
                array = pixels(label * per_class + j, *size, channels)
                form = "JPEG" if kind == "jpg" else kind.upper()
                (root / split / name / f"{j}.{kind}").write_bytes(encoded(array, form))
    return root


def write_parquet(root, counts, sub="data", names=("cat", "dog"), image="image", label="label", size=(8, 8), files=1):
    """As the hub stores them: PNG or JPEG bytes with a path, features in the schema's metadata; row i is pixels(i)."""
    (root / sub).mkdir(parents=True, exist_ok=True)
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    for split, count in counts.items():
        kind = "PNG" if size == (8, 8) or size == (32, 32) else "JPEG"
        rows = [{"bytes": encoded(pixels(i, *size), kind), "path": f"{i}.png"} for i in range(count)]
        table = datasets.Dataset.from_dict(
            {image: rows, label: [i % len(names) for i in range(count)]}, features=features
        )
        for part in range(files):
            shard = table.shard(files, part, contiguous=True) if files > 1 else table
            shard.to_parquet(root / sub / f"{split}-{part:05}-of-{files:05}.parquet")
    return root


def write_cifar(root, labels, train, test, count=4, top=10):
    for name in (*train, test):
        generator = np.random.default_rng(len(name))
        rows = [
            bytes(generator.integers(0, top, labels, dtype=np.uint8)) + pixels(i, 32, 32).tobytes()
            for i in range(count)
        ]
        (root / name).write_bytes(b"".join(rows))
    return root


def expected(count, *size):
    return torch.stack([torch.from_numpy(pixels(i, *size)).permute(2, 0, 1) for i in range(count)])


def damaged_jpeg():
    return encoded(pixels(0, 64, 64), "JPEG")[:-40]
