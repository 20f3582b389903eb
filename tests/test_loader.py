"""Views and batches: every drawn view against plain indexing, the same batches on every rank and with any workers."""

import itertools
import math

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image")

from fractalnet import sources, trained  # noqa: E402
from fractalnet.augment import (  # noqa: E402
    Augment,
    centre_crop,
    random_resized_crop,
    short_side,
    ten_crop,
    to_tensor,
)
from fractalnet.files import UserError  # noqa: E402
from fractalnet.formats import Files, Folder, Images  # noqa: E402
from fractalnet.loader import Loader  # noqa: E402

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def some(count, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def normal(x, std=True):
    mean, scale = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD if std else (1.0,) * 3))
    return (x / 255 - mean) / scale


@pytest.fixture
def files(tmp_path):
    """Ten PNG files of 20 to 40 pixels."""
    names, sizes = [], []
    for i in range(10):
        array = np.random.default_rng(i).integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
        names.append(f"{i}.png".encode())
        sizes.append((tmp_path / f"{i}.png").stat().st_size)
    return Files(Folder(str(tmp_path), np.array(names), np.array(sizes)), torch.arange(10))


# --- views of a batch --------------------------------------------------------------------------


def views(image, t, padding):
    """Every view of one image, by NumPy: mirrored or not, moved by dy, dx."""
    x, border = image.numpy(), ((0, 0), (t, t), (t, t))
    if padding == "black":
        wide = normal(torch.from_numpy(np.pad(x, border))).numpy()
    else:
        wide = np.pad(normal(image).numpy(), border, mode="reflect" if padding == "reflect" else "constant")
    side = x.shape[-1]
    for mirror, dy, dx in itertools.product((False, True), range(2 * t + 1), range(2 * t + 1)):
        view = wide[:, dy : dy + side, dx : dx + side]
        yield view[:, :, ::-1] if mirror else view


@pytest.mark.parametrize("padding", ["zero", "reflect", "black"])
def test_every_view_is_one_of_plain_indexing(padding):
    x, t = some(1, side=6).expand(2000, -1, -1, -1), 2
    out = Augment(MEAN, STD, mirror=True, translate=t, padding=padding)(x, (0, 1, 2))
    assert out.dtype == torch.float32 and out.shape == x.shape
    wanted = torch.stack([torch.tensor(v.copy()).flatten() for v in views(x[0], t, padding)])
    distance = torch.cdist(out.flatten(1), wanted, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(1).values.max() < 1e-5
    counts = torch.bincount(distance.argmin(1), minlength=len(wanted))
    # 50 views of 40 draws each on average: a chi-square of 49 degrees of freedom is below 94 but for 1 in 10,000.
    assert ((counts - 40) ** 2 / 40).sum() < 94


def test_pixels_are_moved_not_resampled():
    x = some(64)
    moved = Augment((0.0,) * 3, (1.0,) * 3, scale=1.0, translate=3, padding="black")(x, (7,))
    for image, out in zip(x, moved, strict=True):
        wide = torch.nn.functional.pad(image, (3,) * 4).float()
        assert any(torch.equal(wide[:, a : a + 8, b : b + 8], out) for a in range(7) for b in range(7))


def test_zero_padding_is_zero_and_black_is_a_black_pixel():
    x = torch.full((500, 3, 8, 8), 255, dtype=torch.uint8)
    white = normal(x[0])[:, 0, 0]
    for padding, border in (("zero", torch.zeros(3)), ("black", normal(x[0] * 0)[:, 0, 0])):
        out = Augment(MEAN, STD, translate=2, padding=padding)(x, (0,))
        found = out.movedim(1, -1).reshape(-1, 3)
        is_white, is_border = (torch.isclose(found, v).all(1) for v in (white, border))
        assert (is_white | is_border).all() and is_border.any() and is_white.any()


@pytest.mark.parametrize("normalise", ["mean", "std"])
def test_normalisation(normalise):
    x = some(5)
    for augment in (
        Augment(MEAN, STD, normalise=normalise),
        Augment(MEAN, STD, mirror=True, normalise=normalise).eval(),
    ):
        torch.testing.assert_close(augment(x), normal(x, normalise == "std"))


def test_scale():
    x = torch.tensor([0, 8, 16], dtype=torch.uint8).view(1, 1, 1, 3)
    assert Augment((0.5,), (0.5,), scale=16)(x).flatten().tolist() == [-1, 0, 1]


def test_draws_depend_on_the_key_alone():
    x, augment = some(50), Augment(MEAN, STD, mirror=True, translate=4)
    before = torch.get_rng_state()
    first = augment(x, (1, 2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(augment(x, (1, 2, 3)), first)
    assert not torch.equal(augment(x, (1, 2, 4)), first)


def test_parts_of_a_batch_are_drawn_as_the_whole():
    x, augment = some(11), Augment(MEAN, STD, mirror=True, translate=2)
    whole = augment(x, (5,))
    parts = [augment(x[a:b], (5,), start=a, total=11) for a, b in ((0, 4), (4, 4), (4, 11))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"padding": "edge"}, "padding: expected one of zero, reflect, black, got 'edge'"),
        ({"normalise": "max"}, "normalise: expected one of mean, std, got 'max'"),
        ({"translate": -1}, "translate: expected a whole number of pixels >= 0, got -1"),
        ({"translate": 1.5}, "translate: expected a whole number"),
        ({"std": (0.1, 0.0, 0.1)}, "normalise: expected mean where a channel's std is 0"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(UserError, match=says):
        Augment(**{"mean": MEAN, "std": STD} | options)


def test_wrong_images():
    with pytest.raises(UserError, match="translate: expected less than the image's 8x8 pixels to reflect, got 8"):
        Augment(MEAN, STD, translate=8, padding="reflect")(some(2))
    with pytest.raises(UserError, match="translate: expected less than the image's 6x8 pixels to reflect, got 6"):
        Augment(MEAN, STD, translate=6, padding="reflect")(some(2)[..., :6, :])
    with pytest.raises(ValueError, match=r"expected x \[B, C=3, H, W\], got \[2, 1, 8, 8\]"):
        Augment(MEAN, STD)(some(2, 1))
    with pytest.raises(ValueError, match=r"expected x \[B, C=3, H, W\], got \[2, 3, 8\]"):
        Augment(MEAN, STD)(some(2)[..., 0])


def test_of_a_dataset():
    digits = sources.load("digits")
    augment = Augment.of(digits, translate=1, padding="black")
    assert (augment.scale, augment.size, augment.translate) == (16, None, 1)
    x = augment.eval()(digits.train.x)
    assert abs(x.mean().item()) < 1e-5 and abs(x.std().item() - 1) < 1e-3
    with pytest.raises(UserError, match="translate: expected less than the image's 8x8 pixels to reflect, got 8"):
        Augment.of(digits, translate=8, padding="reflect")


# --- crops -------------------------------------------------------------------------------------


def test_ten_crop():
    x = some(2, side=6).float()
    crops = ten_crop(x, 4)
    assert crops.shape == (10, 2, 3, 4, 4)
    for i, (top, left) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))):
        assert torch.equal(crops[i], x[:, :, top : top + 4, left : left + 4])
        assert torch.equal(crops[5 + i], crops[i].flip(3))


def test_ten_crop_of_small_images_are_translations():
    x = some(2, side=32).float()
    crops = ten_crop(x, 32, pad=4)
    assert torch.equal(crops[4], x)
    assert torch.equal(crops[0][:, :, 4:, 4:], x[:, :, :-4, :-4]) and not crops[0][:, :, :4].any()
    assert torch.equal(ten_crop(x, 32)[3], x)
    for size in (0, 33):
        with pytest.raises(UserError, match=f"ten_crop: expected size from 1 to 32, got {size}"):
            ten_crop(x, size)


def gradient(width, height):
    """Red grows by columns, green by rows: a crop shows where it was taken."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[:, :, 0], array[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(array)


def seen(view):
    """Width and height of the part of a `gradient` that an 8x8 view shows, from its slope."""
    v = view.float()
    return [(v[c].mean(d)[6] - v[c].mean(d)[1]).item() / 5 * 8 for c, d in ((0, 0), (1, 1))]


def test_random_resized_crops_have_the_area_and_ratio_of_inception():
    image = gradient(240, 200)
    sizes = np.array([seen(to_tensor(random_resized_crop(image, 8, (0, i)))) for i in range(600)])
    area, ratio = sizes.prod(1) / (240 * 200), sizes[:, 0] / sizes[:, 1]
    assert 0.07 < area.min() < 0.12 and 0.9 < area.max() < 1.02
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.38
    # The mean of uniform areas is 0.54; that of those that fit is less, since large ones often do not.
    assert 0.45 < area.mean() < 0.54 and abs(np.log(ratio).mean()) < 0.05
    again = random_resized_crop(image, 8, (0, 5))
    assert torch.equal(to_tensor(again), to_tensor(random_resized_crop(image, 8, (0, 5))))


def test_random_resized_crop_of_a_long_image():
    """Nothing fits: the centre, 4/3 as wide as high."""
    width, height = seen(to_tensor(random_resized_crop(gradient(250, 9), 8, (0, 0))))
    assert math.isclose(width, 12, abs_tol=1) and math.isclose(height, 9, abs_tol=1)


def test_centre_crop():
    image = gradient(100, 80)
    whole = centre_crop(image, 80)
    assert torch.equal(to_tensor(whole), to_tensor(image)[:, :, 10:90])
    # The shorter side 80 becomes 40, of which the centre 20 is 40 pixels of the original.
    assert [round(s) for s in seen(to_tensor(centre_crop(image, 8, 16)))] == [40, 40]
    assert short_side(224) == 256


def test_evaluation_views_of_files(files):
    augment = Augment(MEAN, STD, size=14, mirror=True)
    for evaluation, side in ((augment.eval(), 14), (augment.eval(ten_crop=True), 16)):
        ((x, _, _),) = Loader(files, 10, seed=0, augment=evaluation, shuffle=False).epoch(0)
        wanted = torch.stack([to_tensor(centre_crop(files.open(i), side, 16)) for i in range(10)])
        torch.testing.assert_close(x, normal(wanted))


def test_ten_crops_of_files_are_of_what_they_show(files):
    """Not padded, as small images are."""
    loader = Loader(files, 10, seed=0, augment=Augment(MEAN, STD, size=14).eval(ten_crop=True), shuffle=False)
    ((x, _, _),) = loader.epoch(0)
    ((crops, _),) = trained.views(loader, 10)
    assert torch.equal(crops, ten_crop(x, 14))


# --- batches -----------------------------------------------------------------------------------

AUGMENT = Augment(MEAN, STD, mirror=True, translate=2)


def batches(loader, epoch=0, start=0):
    return list(loader.epoch(epoch, start))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) and p[2] == q[2] for p, q in zip(a, b, strict=True)
    )


@pytest.fixture
def images():
    return Images(some(23), torch.arange(23))


def test_an_epoch_is_every_image_once(images):
    loader = Loader(images, 5, seed=0, augment=Augment(MEAN, STD))
    found = batches(loader)
    assert len(loader) == len(found) == 5 and [n for _, _, n in found] == [5, 5, 5, 5, 3]
    y = torch.cat([y for _, y, _ in found])
    assert not torch.equal(y, torch.arange(23)) and torch.equal(y.sort().values, torch.arange(23))
    torch.testing.assert_close(torch.cat([x for x, _, _ in found]), normal(images.x[y]))
    with torch.device("meta"):  # stands for any other default device
        assert same(batches(loader), found)
    other = torch.cat([y for _, y, _ in batches(loader, 1)])
    assert not torch.equal(other, y)
    assert not torch.equal(torch.cat([y for _, y, _ in batches(Loader(images, 5, seed=1, augment=AUGMENT))]), y)


def test_evaluation_keeps_the_order(images):
    loader = Loader(images, 10, seed=0, augment=AUGMENT.eval(), shuffle=False)
    found = batches(loader)
    with torch.device("meta"):  # stands for any other default device
        assert same(batches(loader), found)
    assert torch.equal(torch.cat([y for _, y, _ in found]), torch.arange(23))
    torch.testing.assert_close(torch.cat([x for x, _, _ in found]), normal(images.x))


def test_resume_in_the_middle_of_an_epoch(images):
    loader = Loader(images, 4, seed=3, augment=AUGMENT)
    batches(loader, 0)
    assert same(batches(loader, 2)[3:], batches(Loader(images, 4, seed=3, augment=AUGMENT), 2, 3))
    assert batches(loader, 2, start=6) == []


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("augment", [AUGMENT, Augment(MEAN, STD)], ids=["augmented", "plain"])
def test_ranks_share_the_batch_of_one_process(images, world, augment):
    single = batches(Loader(images, 7, seed=1, augment=augment), 4)
    ranks = [Loader(images, 7, seed=1, augment=augment, rank=r, world_size=world) for r in range(world)]
    assert {len(r) for r in ranks} == {4}
    parts = [batches(r, 4) for r in ranks]
    joined = [
        (torch.cat([x for x, _, _ in p]), torch.cat([y for _, y, _ in p]), p[0][2]) for p in zip(*parts, strict=True)
    ]
    assert same(joined, single) and all(same(batches(r.whole(), 4), single) for r in ranks)
    for p in zip(*parts, strict=True):
        sizes = [len(y) for _, y, _ in p]
        assert max(sizes) - min(sizes) <= 1
    last = [x for x, _, _ in (part[-1] for part in parts)]  # of 2 images
    assert sum(map(len, last)) == 2 and all(x.shape[1:] == (3, 8, 8) for x in last)
    assert world == 2 or any(len(x) == 0 for x in last)


def test_wrong_loader(images, files):
    for options, says in (
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number >= 1, got 2.5"),
        ({"batch_size": True}, "batch_size: expected a whole number >= 1, got True"),
        ({"workers": -1}, "workers: expected a whole number >= 0"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1, got 2"),
        ({"images": files}, "size: expected the side of the views of streamed images, got None"),
    ):
        with pytest.raises(UserError, match=says):
            Loader(**{"images": images, "batch_size": 2, "seed": 0, "augment": AUGMENT} | options)


# --- streamed batches --------------------------------------------------------------------------

STREAMED = Augment(MEAN, STD, size=12, mirror=True)


def test_streamed_batches(files):
    single = Loader(files, 4, seed=0, augment=STREAMED)
    first, second = batches(single, 0), batches(single, 1)
    assert [tuple(x.shape) for x, _, _ in first] == [(4, 3, 12, 12), (4, 3, 12, 12), (2, 3, 12, 12)]
    assert sorted(torch.cat([y for _, y, _ in first]).tolist()) == list(range(10)) and not same(first, second)
    assert same(batches(single, 0, 1), first[1:])
    ranks = [batches(Loader(files, 4, seed=0, augment=STREAMED, rank=r, world_size=3)) for r in range(3)]
    for whole, *parts in zip(first, *ranks, strict=True):
        assert torch.equal(whole[0], torch.cat([x for x, _, _ in parts]))
        assert torch.equal(whole[1], torch.cat([y for _, y, _ in parts]))
    assert ranks[0][-1][0].shape == (0, 3, 12, 12)
    part = Loader(files, 4, seed=0, augment=STREAMED, world_size=3, workers=1)
    assert same(batches(part.whole(), 0), first) and same(batches(part, 0), ranks[0])
    part.close()


def test_a_view_depends_on_epoch_and_image_not_on_its_batch(files):
    plain = Augment(MEAN, STD, size=12)
    by_four, by_three = (batches(Loader(files, n, seed=0, augment=plain), 3) for n in (4, 3))
    assert torch.equal(torch.cat([x for x, _, _ in by_four]), torch.cat([x for x, _, _ in by_three]))
    ordered = Loader(files, 10, seed=0, augment=plain, shuffle=False)
    (first,), (second,) = batches(ordered, 0), batches(ordered, 1)
    assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_workers_change_nothing(files):
    """Nor does an epoch that is left before its end; and nothing is drawn from PyTorch's own generator."""
    alone, shared = (Loader(files, 3, seed=0, augment=STREAMED, workers=w) for w in (0, 2))
    before = torch.get_rng_state()
    next(iter(shared.epoch(5)))
    for epoch in (0, 1):
        assert same(batches(alone, epoch), batches(shared, epoch))
    assert torch.equal(torch.get_rng_state(), before)
    processes = shared._views._iterator._workers
    for loader in (alone, shared, shared):
        loader.close()
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)
    assert same(batches(alone, 1), batches(shared, 1))
    shared.close()


def test_what_workers_get_survives_spawn(files, monkeypatch):
    loader = Loader(files, 5, seed=0, augment=STREAMED, workers=1)
    loader._views.multiprocessing_context = "spawn"
    assert same(batches(loader, 0), batches(Loader(files, 5, seed=0, augment=STREAMED), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_names_the_damaged_file(files, workers):
    path = files.encoded.name(7)
    good = open(path, "rb").read()
    open(path, "wb").write(good[:60] + bytes(20) + good[80:])
    with pytest.raises(UserError, match="7.png: cannot be decoded") as raised:
        batches(Loader(files, 5, seed=0, augment=STREAMED, workers=workers))
    assert "\n" not in str(raised.value)
