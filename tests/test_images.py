"""Images on their way into a network: samples, crops and labels that nobody would see to be wrong."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from fractalnet import files, loader, sources  # noqa: E402
from fractalnet.augment import Augment, random_resized_crop  # noqa: E402
from fractalnet.formats import Files, Folder, Images, Rows  # noqa: E402
from fractalnet.loader import Loader  # noqa: E402
from image_files import write_cifar, write_parquet  # noqa: E402


@pytest.mark.parametrize("streamed", [False, True])
def test_views_follow_from_the_seed(tmp_path, streamed):
    if streamed:  # in the file: the fixture `files`
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)).save(tmp_path / "0.png")
        images = Files(Folder(str(tmp_path), np.array([b"0.png"] * 4), np.array([1] * 4)), torch.arange(4))
        augment = Augment((0.5,) * 3, (0.5,) * 3, size=12)
    else:
        images = Images(torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(9))
        augment = Augment((0.5,) * 3, (0.5,) * 3, translate=3)
    a, b = (next(iter(Loader(images, 9, seed=s, augment=augment, shuffle=False).epoch(0)))[0] for s in (0, 1))
    assert not torch.equal(a, b)


class Boxes:
    """An image that tells which part of it is asked for."""

    def __init__(self, *size):
        self.size = size

    def resize(self, _, how, box):
        return box


def test_random_resized_crops_reach_every_border():
    boxes = [random_resized_crop(Boxes(12, 10), 8, (0, i)) for i in range(300)]
    for low, high, end in ((0, 2, 12), (1, 3, 10)):
        moved = [box for box in boxes if box[high] - box[low] < end]
        assert {box[low] == 0 for box in moved} == {box[high] == end for box in moved} == {True, False}
        assert all(0 <= box[low] and box[high] <= end for box in boxes)


def test_of_a_long_image_the_centre_is_seen():
    assert random_resized_crop(Boxes(250, 9), 8, (0, 0)) == (119, 0, 131, 9)
    assert random_resized_crop(Boxes(9, 251), 8, (0, 0)) == (0, 119, 9, 131)


def test_fingerprints_are_of_labels_and_classes_too():
    data = sources.load("digits")
    other = dataclasses.replace(data, test=dataclasses.replace(data.test, y=data.test.y.flip(0)))
    named = dataclasses.replace(data, classes=("zero", *data.classes[1:]))
    assert len({data.fingerprint, other.fingerprint, named.fingerprint}) == 3
    brighter = dataclasses.replace(data, test=dataclasses.replace(data.test, scale=255.0))
    flat = dataclasses.replace(data, test=dataclasses.replace(data.test, x=data.test.x.view(-1, 1, 4, 16)))
    coloured = dataclasses.replace(data, channels=3)
    assert len({each.fingerprint for each in (data, brighter, flat, coloured)}) == 4


def test_the_sample_of_which_statistics_are_is_of_all_classes(tmp_path, monkeypatch):
    """Folders are in the order of their classes."""
    for split in ("train", "test"):
        for name, value in (("cat", 0), ("dog", 255)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(np.full((8, 12, 3), value, np.uint8)).save(tmp_path / split / name / f"{i}.png")
    monkeypatch.setattr(sources, "SAMPLE", 8)
    assert all(0.2 < mean < 0.8 for mean in sources.load(f"folder:{tmp_path}", image_size=8).mean)


def in_folders(root, array, **options):
    """The same image four times."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(array).save(root / split / name / "0.png", **options)
    return f"folder:{root}"


def test_statistics_of_a_streamed_set_are_of_what_evaluation_sees(tmp_path):
    """Of 16 pixels the inner 14."""
    array = np.full((16, 16, 3), 255, np.uint8)
    array[1:-1, 1:-1] = 51
    found = sources.load(in_folders(tmp_path, array), image_size=14)
    assert found.streamed and found.mean == pytest.approx((0.2,) * 3) and found.std == (0.0,) * 3


def test_a_file_that_is_truncated_behind_a_preview(tmp_path):
    """Streamed images are not decoded before they are trained on: the check has to find it."""
    source = in_folders(tmp_path, np.zeros((64, 64, 3), np.uint8))
    file = tmp_path / "train" / "cat" / "1.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, comment=b"\xff\xd9")
    sources.load(source, image_size=16)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(files.UserError, match="1.jpg: not a readable image"):
        sources.load(source, image_size=16)


def test_facts_of_parquet_files_are_names_rows_and_bytes():
    def facts(*file):
        return b"".join(Rows(None, "image", (file,)).facts())

    first = facts("/a/train-0.parquet", 3, 100)
    assert first == facts("/b/train-0.parquet", 3, 100)  # wherever they are
    others = facts("/a/test-0.parquet", 3, 100), facts("/a/train-0.parquet", 4, 100), facts("/a/train-0.parquet", 3, 99)
    assert len({first, *others}) == 4


def test_hub_of_other_classes(tmp_path, monkeypatch):
    for split, names in (("train", "0123456789"), ("test", "1023456789")):
        write_parquet(tmp_path / split, {split: 2}, names=names, size=(32, 32))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    real = datasets.load_dataset

    def hub(repository, config, split):
        there = {s: [str(tmp_path / s / "data" / f"{s}-00000-of-00001.parquet")] for s in split}
        return [real("parquet", data_files={s: there[s]}, split=s) for s in split]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(files.UserError, match="expected the same classes in uoft-cs/cifar10 train and"):
        sources.load("cifar10")


@pytest.mark.parametrize("byte, wrong", [(0, False), (1, True)])
def test_of_two_labels_the_last_is_checked(tmp_path, byte, wrong):
    write_cifar(tmp_path, 2, ["train.bin"], "test.bin")
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[2 * (2 + 3072) + byte] = 200
    (tmp_path / "train.bin").write_bytes(content)
    if not wrong:  # the coarse one, which is not used
        assert len(sources.load("cifar100", tmp_path).train) == 4
        return
    with pytest.raises(files.UserError, match="train.bin: row 2: expected a label from 0 to 99, got 200"):
        sources.load("cifar100", tmp_path)


def test_workers_outlive_the_signals_of_the_training():
    numbers, came = (signal.SIGINT, signal.SIGTERM), []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        loader.linger(0)
        for number in numbers:
            os.kill(os.getpid(), number)
        assert 0 < signal.alarm(0) <= loader.GRACE and not came
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
