"""Data sets by name and image folders, and what is said of files that are not good."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("datasets")

from fractalnet import sources, trained  # noqa: E402
from fractalnet.augment import to_tensor  # noqa: E402
from fractalnet.files import UserError  # noqa: E402
from fractalnet.formats import Files, Images  # noqa: E402
from image_files import damaged_jpeg, encoded, expected, pixels, write_folder, write_parquet  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of `datasets` is the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


# --- names -------------------------------------------------------------------------------------


def test_digits():
    ours = sources.load("digits")
    assert ours.train.x.dtype == torch.uint8 and ours.train.scale == 16 and not ours.streamed
    split = sources.tensors(ours)
    for part, x, y in ((ours.train, split.train_x, split.train_y), (ours.test, split.test_x, split.test_y)):
        torch.testing.assert_close((part.x / 16 - ours.mean[0]) / ours.std[0], x)
        assert torch.equal(part.y, y)
    assert abs(split.train_x.mean()) < 1e-4 and abs(split.train_x.std() - 1) < 1e-4
    share = split.test_y.bincount() / torch.cat([split.train_y, split.test_y]).bincount()
    assert ((share - 0.2).abs() < 0.01).all() and torch.equal(sources.load("digits").test.x, ours.test.x)
    facts = ours.describe()
    assert (facts["train_images"], facts["test_images"], facts["classes"]) == (1437, 360, 10)
    assert (facts["channels"], facts["image_size"], facts["fingerprint"]) == (1, 8, ours.fingerprint)


@pytest.mark.parametrize("spec", ["cifar", "folder:", "digits:x", "parquet"])
def test_unknown_name(spec):
    with pytest.raises(UserError, match="unknown data .*digits, cifar10, .*folder:PATH"):
        sources.load(spec)


@pytest.mark.parametrize(
    ("spec", "root", "size", "says"),
    [
        ("cifar10", "nowhere", None, "expected a folder as root"),
        ("digits", ".", None, "no root"),
        ("folder:x", "nowhere", None, "nowhere"),
        ("digits", None, 0, "image_size: expected a whole number >= 1, got 0"),
        ("digits", None, 8.0, "image_size: expected a whole number >= 1, got 8.0"),
        ("digits", None, 32, "expected images of 32 pixels, got 8x8"),
    ],
)
def test_wrong_arguments(spec, root, size, says):
    with pytest.raises(UserError, match=says):
        sources.load(spec, root and Path(root), size)


def test_hub_without_network(tmp_path):
    """One line that says what to get and where to put it; in a process that has never seen a network."""
    code = "from fractalnet import sources; sources.load('cifar10')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | offline)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: data cifar10: cannot download" in last
    assert "https://huggingface.co/datasets/uoft-cs/cifar10" in last and last.endswith("--data.root FOLDER")


def test_hub_gives_the_same_as_its_files(tmp_path, monkeypatch):
    root = write_parquet(tmp_path, {"train": 4, "extra": 2, "test": 2}, names="0123456789", size=(32, 32))
    files = {s: [str(root / "data" / f"{s}-00000-of-00001.parquet")] for s in ("train", "extra", "test")}
    real = datasets.load_dataset

    def hub(repository, config, split):
        assert (repository, config) == ("ufldl-stanford/svhn", "cropped_digits")
        return real("parquet", data_files=files, split=split)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    there = sources.load("svhn-extra")
    monkeypatch.setattr(datasets, "load_dataset", real)
    here = sources.load("svhn-extra", root)
    assert torch.equal(there.train.x, torch.cat([expected(4, 32, 32), expected(2, 32, 32)]))
    assert there.train.y.tolist() == [0, 1, 2, 3, 0, 1] and there.fingerprint == here.fingerprint


# --- image folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(tmp_path, test):
    found = sources.load(f"folder:{write_folder(tmp_path, test)}")
    assert found.classes == ("cat", "dog") and found.channels == 3 and found.image_size == 8
    assert isinstance(found.train, Images) and torch.equal(found.train.x, expected(6))
    assert found.train.y.tolist() == [0, 0, 0, 1, 1, 1] and found.test.y.tolist() == [0, 0, 1, 1]
    values = found.train.x.double() / 255
    torch.testing.assert_close(torch.tensor(found.mean).double(), values.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(found.std).double(), values.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)


def test_of_test_and_val_with_classes_it_is_test(tmp_path):
    for split in ("cat", "dog"):
        (tmp_path / "test" / split).mkdir(parents=True)
        (tmp_path / "test" / split / "0.png").write_bytes(encoded(pixels(0)))
    assert len(sources.load(f"folder:{write_folder(tmp_path, 'val')}").test) == 2


def test_folder_of_grey_images_has_one_channel(tmp_path):
    """Of which some may be black and white."""
    found = sources.load(f"folder:{write_folder(tmp_path, channels=1)}")
    assert found.channels == 1 and len(found.mean) == 1 and torch.equal(found.train.x, expected(6, 8, 8, 1))
    Image.new("1", (8, 8), 1).save(tmp_path / "train" / "cat" / "0.png")
    found = sources.load(f"folder:{tmp_path}")
    assert found.channels == 1 and bool((found.train.x[0] == 255).all())


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_colour_image_makes_three_channels(tmp_path, split):
    write_folder(tmp_path, channels=1)
    (tmp_path / split / "cat" / "0.png").write_bytes(encoded(pixels(0)))
    found = sources.load(f"folder:{tmp_path}")
    assert found.channels == 3 and torch.equal(found.train.x[1:], expected(6, 8, 8, 1)[1:].expand(-1, 3, -1, -1))


def test_folder_of_large_images_is_streamed(tmp_path):
    found = sources.load(f"folder:{write_folder(tmp_path, kind='jpg', size=(40, 60))}", image_size=16)
    assert isinstance(found.train, Files) and found.streamed and (found.channels, found.image_size) == (3, 16)
    with Image.open(tmp_path / "train" / "dog" / "0.jpg") as image:
        assert torch.equal(to_tensor(found.train.open(3)), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert all(0.4 < m < 0.6 for m in found.mean) and all(0 < s < 0.3 for s in found.std)


def test_oblong_images_need_a_size(tmp_path):
    with pytest.raises(UserError, match="expected square images, or --data.image_size, got 12x8"):
        sources.load(f"folder:{write_folder(tmp_path, size=(8, 12))}")
    assert sources.load(f"folder:{tmp_path}", image_size=8).streamed


def test_large_sets_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MEMORY", 10 * 3 * 8 * 8)
    assert sources.load(f"folder:{write_folder(tmp_path)}").image_size == sources.STREAMED_SIZE
    monkeypatch.setattr(sources, "MEMORY", 10 * 3 * 8 * 8 + 1)
    assert not sources.load(f"folder:{tmp_path}").streamed


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("train/cat/1.png", b"", "train/cat/1.png: not a readable image: not an image"),
        ("train/cat/1.png", encoded(pixels(1))[:-20], "1.png: not a readable image: .*truncated"),
        ("train/cat/1.jpg", damaged_jpeg(), "1.jpg: not a readable image: .*truncated"),
        ("train/cat/1.png", encoded(pixels(1, 8, 9)), "1.png: expected 8x8 pixels .* got 9x8; --data.image_size"),
        (
            "train/cat/1.png",
            encoded(pixels(1, 8, 8, 2).view(np.uint16)),
            "1.png: not a readable image: expected 8 bits",
        ),
        ("test/dog/9.png", encoded(pixels(1))[:70] + b"x" * 40 + b"IEND", "9.png: cannot be decoded"),
        ("train/cat/1.png", b"P6 0 8 255\n", "1.png: not a readable image"),
        ("train/cat/notes.txt", b"", "notes.txt: expected an image"),
        ("train/bird/0.png", encoded(pixels(1)), "same classes in train and test, got bird in only one"),
        ("test/bird/0.png", encoded(pixels(1)), "same classes in train and test, got bird in only one"),
        ("train/cat/1.png", encoded(pixels(1, 9, 8)), "1.png: expected 8x8 pixels .* got 8x9"),
        ("train/cat/1.ppm", b"Pf\n8 8\n-1.0\n" + bytes(256), "1.ppm: not a readable image: expected 8 bits"),
    ],
)
def test_damaged_folder(tmp_path, file, content, says):
    write_folder(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        sources.load(f"folder:{tmp_path}")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_bytes_behind_an_image_are_no_damage(tmp_path, kind):
    write_folder(tmp_path, "val", kind=kind)
    (tmp_path / "test").mkdir()  # without labels: passed over
    (tmp_path / "test" / f"1.{kind}").write_bytes(b"")
    file = tmp_path / "train" / "cat" / f"1.{kind}"
    before = sources.load(f"folder:{tmp_path}").train.x
    file.write_bytes(file.read_bytes() + bytes(500))
    assert torch.equal(sources.load(f"folder:{tmp_path}").train.x, before)


def test_links_that_lead_nowhere_and_hidden_folders(tmp_path):
    write_folder(tmp_path, "val")
    (tmp_path / "test" / ".cache").mkdir(parents=True)  # no class
    assert len(sources.load(f"folder:{tmp_path}").test) == 4
    (tmp_path / "train" / "cat" / "9.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="9.png: cannot be read: No such file"):
        sources.load(f"folder:{tmp_path}")


def test_hidden_files_are_passed_over_and_endings_may_be_upper_case(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "train" / "cat" / "1.png"
    file.rename(file.with_name("1.PNG"))
    (tmp_path / "train" / "cat" / ".thumbs").write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    found = sources.load(f"folder:{tmp_path}")
    assert torch.equal(found.train.x, expected(6)) and found.classes == ("cat", "dog")


def test_images_of_a_few_bytes(tmp_path):
    """Shorter than the part in which a file's end is looked for."""
    found = sources.load(f"folder:{write_folder(tmp_path, kind='ppm', size=(2, 2))}")
    assert torch.equal(found.train.x, expected(6, 2, 2))


def test_damaged_streamed_file_is_named(tmp_path):
    """One whose ends are good passes the check, and is named when it is decoded."""
    write_folder(tmp_path)
    good = encoded(pixels(0))
    (tmp_path / "test" / "cat" / "1.png").write_bytes(good[:70] + bytes(20) + good[90:])
    found = sources.load(f"folder:{tmp_path}", image_size=16)
    with pytest.raises(UserError, match="test/cat/1.png: cannot be decoded"):
        found.test.open(1)


def test_incomplete_folder(tmp_path):
    with pytest.raises(UserError, match="expected folders train and test"):
        sources.load(f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="got no val"):
        sources.load(f"folder:{tmp_path}")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="expected a folder per class with images, got none"):
        sources.load(f"folder:{tmp_path}")
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir()
    with pytest.raises(UserError, match="train/cat: expected images, got an empty folder"):
        sources.load(f"folder:{tmp_path}")


# --- fingerprints ------------------------------------------------------------------------------


def test_fingerprint_of_images(tmp_path):
    first = sources.load(f"folder:{write_folder(tmp_path)}").fingerprint
    assert sources.load(f"folder:{tmp_path}").fingerprint == first
    array = pixels(0)
    array[0, 0, 0] ^= 1
    (tmp_path / "test" / "cat" / "0.png").write_bytes(encoded(array))
    assert sources.load(f"folder:{tmp_path}").fingerprint != first


def test_fingerprint_of_files(tmp_path):
    load = lambda: sources.load(f"folder:{tmp_path}", image_size=16).fingerprint  # noqa: E731
    write_folder(tmp_path)
    first = load()
    assert load() == first
    file = tmp_path / "test" / "cat" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")
    second = load()
    file.rename(file.with_name("5.png"))
    assert len({first, second, load()}) == 3


def test_the_training_says_how_images_are_normalised(tmp_path):
    """And --root where they are, before what the training said."""
    write_folder(tmp_path / "b")
    known = {"source": f"folder:{tmp_path / 'gone'}", "root": str(tmp_path / "a"), "image_size": None, "channels": 3}
    known |= {"mean": [0.1] * 3, "std": [0.5] * 3, "normalise": "std", "classes": ["cat", "dog"]}
    data, augment = trained.images_of({"data": known}, tmp_path / "b")
    assert len(data.train) and list(augment.mean) == [0.1] * 3 and list(augment.std) == [0.5] * 3
    data, augment = trained.images_of({"data": known | {"image_size": 16}}, tmp_path / "b")
    assert data.image_size == augment.size == 16
    with pytest.raises(UserError, match="expected 1 channels, got 3"):
        trained.images_of({"data": known | {"channels": 1}}, tmp_path / "b")


def test_the_sample_of_which_statistics_are_is_always_the_same(tmp_path, monkeypatch):
    write_folder(tmp_path, size=(8, 12), count=5)
    monkeypatch.setattr(sources, "SAMPLE", 3)
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found.add(sources.load(f"folder:{tmp_path}", image_size=8).mean)
    assert len(found) == 1
