"""Parquet of the hub and CIFAR's binary files, and what is said of files that are not good."""

import pickle

import pytest
import torch

pytest.importorskip("PIL")
datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

from fractalnet import sources  # noqa: E402
from fractalnet.augment import to_tensor  # noqa: E402
from fractalnet.files import UserError  # noqa: E402
from fractalnet.formats import Rows, columns  # noqa: E402
from image_files import damaged_jpeg, encoded, expected, pixels, write_cifar, write_parquet  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets` is the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


# --- parquet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sub", ["", "data"])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_parquet(tmp_path, sub, test):
    found = sources.load(f"parquet:{write_parquet(tmp_path, {'train': 5, test: 2}, sub, files=2)}")
    assert torch.equal(found.train.x, expected(5)) and found.train.y.tolist() == [0, 1, 0, 1, 0]
    assert found.classes == ("cat", "dog") and len(found.test) == 2


@pytest.mark.parametrize(
    ("spec", "sub", "image", "label", "classes"),
    [
        ("cifar10", "plain_text", "img", "label", 10),
        ("cifar100", "cifar100", "img", "fine_label", 100),
        ("svhn", "cropped_digits", "image", "label", 10),
    ],
)
def test_copy_of_the_hub(tmp_path, spec, sub, image, label, classes):
    names = list(map(str, range(classes)))
    write_parquet(tmp_path, {"train": 3, "test": 2}, sub, names, image, label, size=(32, 32))
    found = sources.load(spec, tmp_path)
    assert torch.equal(found.train.x, expected(3, 32, 32)) and len(found.classes) == classes and found.name == spec


def test_imagenet(tmp_path):
    write_parquet(tmp_path, {"train": 6, "test": 1, "validation": 4}, size=(40, 60), files=1)
    found = sources.load("imagenet", tmp_path, image_size=32)
    assert found.streamed and len(found.test) == 4 and found.image_size == 32
    image, sent = (to_tensor(files.open(2)) for files in (found.train, pickle.loads(pickle.dumps(found.train))))
    assert image.shape == (3, 40, 60) and torch.equal(sent, image)  # as for a worker


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    write_parquet(tmp_path, {"train": 3, "test": 2})
    first = sources.load(f"parquet:{tmp_path}")
    write_parquet(tmp_path, {"train": 3}, "other")
    table = datasets.Dataset.from_parquet(str(tmp_path / "other" / "train-00000-of-00001.parquet"))
    table.select([2, 1, 0]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    second = sources.load(f"parquet:{tmp_path}")
    assert torch.equal(second.train.x, first.train.x.flip(0)) and first.fingerprint != second.fingerprint


def test_label_of_several(tmp_path):
    write_parquet(tmp_path, {"train": 3, "test": 2})
    for file in (tmp_path / "data").iterdir():
        table = datasets.Dataset.from_parquet(str(file))
        table = table.add_column("coarse", [1] * len(table)).cast_column(
            "coarse", datasets.ClassLabel(names=["a", "b"])
        )
        table.to_parquet(file)
    assert sources.load(f"parquet:{tmp_path}").train.y.tolist() == [0, 1, 0]


def test_two_sets_in_one_folder(tmp_path):
    write_parquet(tmp_path, {"train": 3, "test": 2})
    write_parquet(tmp_path, {"train": 4}, files=2)
    with pytest.raises(UserError, match="expected 1 files train-.*, got 3"):
        sources.load(f"parquet:{tmp_path}")


def test_features_of_which_none_is_the_only_one():
    image, label = datasets.Image(), datasets.ClassLabel(names=["cat"])
    for features in ({"a": image, "b": image, "label": label}, {"a": image, "b": label, "c": label}):
        with pytest.raises(UserError, match="here: expected one image and one class label feature, got a, b, "):
            columns(features, None, "here")


def test_parquet_errors(tmp_path):
    def refused(says):
        with pytest.raises(UserError, match=says) as raised:
            sources.load(f"parquet:{tmp_path}")
        assert "\n" not in str(raised.value)

    refused("expected train-.*parquet")
    write_parquet(tmp_path, {"train": 3})
    refused("expected test or validation-.*parquet")
    write_parquet(tmp_path, {"test": 2})
    train = tmp_path / "data" / "train-00000-of-00001.parquet"
    good = train.read_bytes()

    train.write_bytes(good[:-30])
    refused("train-00000-of-00001.parquet: not a readable parquet file")
    train.write_bytes(good[:40] + bytes(200) + good[240:])  # pages, not the footer
    refused("cannot be (read|decoded)")
    write_parquet(tmp_path, {"train": 0})
    refused("train-00000-of-00001.parquet: expected images, got no rows")
    write_parquet(tmp_path, {"train": 3}, names=("cat", "cow"))
    refused("got other features")
    table = datasets.Dataset.from_dict({"a": [1]})
    table.to_parquet(train)
    refused("expected one image and one class label feature, got a")
    train.write_bytes(good)
    train.rename(train.with_name("train-00000-of-00003.parquet"))
    refused("expected 3 files train-.*, got 1")


@pytest.mark.parametrize(
    ("label", "image", "says"),
    [
        (-1, None, "row 1: expected a label from 0 to 1, got -1"),
        (None, None, "row 1: expected a label from 0 to 1, got -1"),
        (1, {"bytes": damaged_jpeg()[:300], "path": None}, "row 1: cannot be decoded"),
        (1, {"bytes": encoded(pixels(0, 9, 9)), "path": None}, "row 1: expected 8x8 pixels .* got 9x9"),
        (1, {"bytes": b"", "path": None}, "row 1: cannot be decoded: expected the bytes of an image"),
    ],
)
def test_damaged_row(tmp_path, label, image, says):
    write_parquet(tmp_path, {"train": 4, "test": 2}, files=2)
    file = tmp_path / "data" / "test-00001-of-00002.parquet"  # its row, not the split's, is named
    rows = [{"bytes": encoded(pixels(0)), "path": None}, image or {"bytes": encoded(pixels(1)), "path": None}]
    features = datasets.Features.from_arrow_schema(pq.read_schema(file))
    datasets.Dataset.from_dict({"image": rows, "label": [0, label]}, features=features).to_parquet(file)
    with pytest.raises(UserError, match=f"test-00001-of-00002.parquet: {says}"):
        sources.load(f"parquet:{tmp_path}")


# --- CIFAR's binary version --------------------------------------------------------------------

CIFAR = {
    "cifar10": (1, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 10),
    "cifar100": (2, ["train.bin"], "test.bin", 100),
}


@pytest.mark.parametrize("spec", CIFAR)
@pytest.mark.parametrize("nested", [False, True])
def test_cifar_binary(tmp_path, spec, nested):
    labels, train, test, classes = CIFAR[spec]
    place = tmp_path / {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[spec] if nested else tmp_path
    place.mkdir(exist_ok=True)
    write_cifar(place, labels, train, test, top=classes)
    found = sources.load(spec, tmp_path)
    raw = b"".join((place / name).read_bytes() for name in train)
    record = labels + 3072
    assert found.train.y.tolist() == [raw[i * record + labels - 1] for i in range(4 * len(train))]
    assert found.train.x[1].flatten().tolist() == list(raw[record + labels : 2 * record])
    assert found.train.x.shape == (4 * len(train), 3, 32, 32) and len(found.test) == 4 and len(found.classes) == classes
    assert len(found.fingerprint) == 64


def test_cifar_names(tmp_path):
    write_cifar(tmp_path, *CIFAR["cifar10"][:3])
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert sources.load("cifar10", tmp_path).classes == tuple("abcdefghij")
    (tmp_path / "batches.meta.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="batches.meta.txt: expected 10 names, got 2"):
        sources.load("cifar10", tmp_path)
    (tmp_path / "batches.meta.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match="batches.meta.txt: cannot be read: .*utf-8"):
        sources.load("cifar10", tmp_path)


def test_damaged_cifar(tmp_path):
    write_cifar(tmp_path, *CIFAR["cifar10"][:3])
    file = tmp_path / "data_batch_3.bin"
    good = file.read_bytes()
    for bad, says in (
        (good[:-1], "data_batch_3.bin: expected a multiple of 3073 bytes .*, got 12291"),
        (b"", "data_batch_3.bin: expected a multiple of 3073 bytes .*, got 0"),
        (good[:3073] + b"\x0a" + good[3074:], "data_batch_3.bin: row 1: expected a label from 0 to 9, got 10"),
    ):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=says):
            sources.load("cifar10", tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="data_batch_3.bin: cannot be read: No such file"):
        sources.load("cifar10", tmp_path)


def test_rows_are_named_by_their_file():
    rows = Rows(None, "image", (("a.parquet", 2, 10), ("b.parquet", 3, 10)))
    assert [rows.name(i) for i in (1, 2, 4)] == ["a.parquet: row 1", "b.parquet: row 0", "b.parquet: row 2"]
