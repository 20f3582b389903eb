"""Drop-path over a training: rates, mixtures, sequences of paths, tied columns, data-parallel ranks."""

import fractalnet
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import two_ranks
from fractalnet import tied_loss
from fractalnet.drop_path import column_path, full_path, generator_for, rate, sample_path
from torch.nn.parallel import DistributedDataParallel

from fractal_kernels import drop_path_mask


def small(**options):
    torch.manual_seed(0)
    return fractalnet.FractalNet(7, 3, (4, 6), image_size=8, **options)


def test_rates_are_linear_between_knots():
    knots = [(10, 0.0), (20, 0.2), (40, 0.1)]
    steps = [0, 10, 15, 20, 30, 40, 1000]
    assert [rate(knots, s) for s in steps] == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.15, 0.1, 0.1])
    assert rate(0.3, 5) == 0.3
    net = small(local_drop=np.array([[0, 0.1], [4, 0.3]]), global_ratio=[(np.int64(0), np.float32(0.5))])
    assert rate(net.local_drop, 2) == pytest.approx(0.2) and rate(net.global_ratio, 9) == 0.5


def test_the_networks_rates_move_with_its_steps():
    net = small(local_drop=[(0, 0.0), (100, 1.0)], global_ratio=[(0, 0.0), (60, 0.0), (61, 1.0)])
    first = [net.sample_path(2) for _ in range(1)]
    assert bool(first[0].keep[:, -1].all())  # nothing is dropped at rate 0
    later = [net.sample_path(2) for _ in range(99)]
    assert all(p.column is None for p in later[:59]) and all(p.column is not None for p in later[60:])
    kept = [p.keep[:, -1].float().mean() for p in later[:59]]
    assert sum(kept[40:]) < sum(kept[:19])


def test_no_path_is_sampled_into_a_graph(monkeypatch):
    """Which would keep it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    net, x = small().train(), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="expected a path, got a CUDA graph capture"):
        net(x)
    assert net.path_step == 0 and net(x, path=full_path(len(net.blocks), net.columns)).isfinite().all()


def test_draws_of_zero(monkeypatch):
    """Numbers are from [0, 1): zeros drop nothing at rate 0, and revive at rate 1 what ends in a row."""
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))
    path = sample_path(1, 3, 2, local_drop=0.0, global_ratio=0.0)
    assert path.column is None and torch.equal(path.keep, full_path(1, 3).keep)
    revived = sample_path(1, 3, 2, local_drop=1.0, global_ratio=0.0).keep
    assert not (revived & ~path.keep).any() and (revived.sum(-1) == 1).all()


def test_a_networks_rates_are_its_own():
    knots = [(0, 0.0)]
    net = small(local_drop=knots)
    knots.append((1, 1.0))
    assert rate(net.local_drop, 1) == 0


def test_keys_have_generators_of_their_own():
    assert len({generator_for(0, step).initial_seed() for step in range(2000)}) == 2000


def test_tied_logits_are_of_the_full_network_and_of_columns():
    with pytest.raises(ValueError, match=r"tied_loss: expected logits .* got \[1, 2, 7\]"):
        tied_loss(torch.zeros(1, 2, 7), torch.tensor([0, 1]))


def test_alternating():
    net = small(mixture="alternating")
    assert [net.sample_path(2).column is not None for _ in range(6)] == [False, True] * 3
    third = [sample_path(1, 3, 2, global_ratio=0.3, mixture="alternating", step=s).column for s in range(100)]
    assert sum(c is not None for c in third) == 30
    per_sample = small(mixture="alternating", granularity="sample")
    for wanted in (False, True):
        used = per_sample.sample_path(50).keep.any(1)  # [B, C, N]
        assert bool((used.sum(1) == 1).all()) == wanted


def test_columns_of_samples_are_ranges_of_the_batch():
    keep = sample_path(2, 3, 40, granularity="sample").keep
    columns = keep[0, -1, :, 20:].int().argmax(0)
    assert torch.equal(columns, columns.sort(descending=True).values) and len(columns.unique()) == 3
    assert bool((keep[0, -1, :, 20:].sum(0) == 1).all())


def test_the_global_share_of_small_batches():
    """The ratio is a share of all samples, not of a batch's, rounded."""
    for n in (1, 3):
        generator = torch.Generator().manual_seed(0)
        paths = [sample_path(1, 2, n, local_drop=0.0, granularity="sample", generator=generator) for _ in range(400)]
        alone = sum(float((p.keep[0, -1].sum(0) == 1).sum()) for p in paths) / (400 * n)
        assert abs(alone - 0.5) < 0.08


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_paths_follow_from_seed_and_step(granularity):
    net = small(granularity=granularity)
    torch.manual_seed(1)
    first = [net.sample_path(4).keep for _ in range(8)]
    other = small(granularity=granularity)
    torch.manual_seed(2)  # has no influence
    assert all(torch.equal(a, other.sample_path(4).keep) for a in first)
    reseeded = small(granularity=granularity, path_seed=1)
    assert not all(torch.equal(a, reseeded.sample_path(4).keep) for a in first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_paths_do_not_depend_on_the_default_dtype(dtype):
    def draws():
        net = small(granularity="sample")
        torch.manual_seed(0)
        return [net.sample_path(9).keep for _ in range(5)] + [drop_path_mask(3, 0.3, 50)]

    expected = draws()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, draws(), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_resumed_training_goes_on_with_the_same_paths():
    net = small(path_seed=5, mixture="alternating")
    for _ in range(3):
        net.sample_path(4)
    state = net.state_dict()
    expected = [net.sample_path(4).keep for _ in range(6)]
    resumed = small()
    resumed.mixture = "alternating"
    resumed.load_state_dict(state)
    assert (resumed.path_seed, resumed.path_step) == (5, 3)
    assert all(torch.equal(a, resumed.sample_path(4).keep) for a in expected)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_tied_columns(granularity):
    """Full and column networks on one batch, each with its own statistics; the loss and its gradients add up."""
    net = small(global_mode="tied", granularity=granularity).double()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    logits = net(x)
    loss = tied_loss(logits, y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    stats = [b.clone() for b in net.buffers()]
    net.load_state_dict(start)
    path = net.sample_path(6)
    assert path.column is None
    parts = [net(x, path=path), *(net(x, column=c) for c in range(3))]
    torch.testing.assert_close(logits, torch.stack(parts))
    expected = F.cross_entropy(parts[0], y) + sum(F.cross_entropy(p, y) for p in parts[1:]) / 3
    torch.testing.assert_close(loss, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(stats, net.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    block = net.blocks[0]
    assert block.running_mean.shape[0] == 2 and bool((block.num_batches_tracked[1] == 1).all())
    assert net.eval()(x).shape == (6, 7)
    torch.testing.assert_close(tied_loss(parts[0], y), F.cross_entropy(parts[0], y))
    with pytest.raises(ValueError, match=r"tied_loss: expected logits .* got \[6\]"):
        tied_loss(torch.zeros(6), y)


def test_sampled_training_never_meets_the_tied_set():
    net = small(granularity="sample")
    net(torch.randn(4, 3, 8, 8))
    assert net.blocks[0].running_mean.shape[0] == 1


@pytest.mark.parametrize(
    "option, message",
    [
        ({"mixture": "coin"}, "expected mixture 'random' or 'alternating', got 'coin'"),
        ({"global_mode": "both"}, "expected global_mode 'sampled' or 'tied', got 'both'"),
        ({"path_seed": -1}, "expected path_seed a whole number >= 0, got -1"),
        ({"local_drop": [(0, 0.1), (0, 0.2)]}, r"expected local_drop in \[0, 1\], or knots .* got \[\(0, 0.1\)"),
        ({"local_drop": [(0, 1.1)]}, "expected local_drop in"),
        ({"global_ratio": "half"}, "expected global_ratio in"),
        ({"global_ratio": []}, "expected global_ratio in"),
        ({"local_drop": [("0", 0.1), ("5", 0.2)]}, "expected local_drop in"),
        ({"local_drop": iter([(0, 0.1), (5, 0.2)])}, "expected local_drop in"),
    ],
)
def test_errors(option, message):
    with pytest.raises(ValueError, match="FractalNet: " + message):
        small(**option)
    with pytest.raises(TypeError, match="FractalNet: expected path None or a fractalnet.Path, got Tensor"):
        small()(torch.randn(2, 3, 8, 8), path=torch.ones(2))
    with pytest.raises(ValueError, match="sample_path: expected batch_size >= 0, got -1"):
        sample_path(1, 2, -1)
    with pytest.raises(ValueError, match="sample_path: expected mixture"):
        sample_path(1, 2, 3, mixture="coin")
    with pytest.raises(ValueError, match=r"sample_path: expected global_ratio in \[0, 1\], got \[\("):
        sample_path(1, 2, 3, global_ratio=[(0, 0.1), (9, 0.2)])


def trained(rank, folder):
    for granularity in ("batch", "sample"):
        train(rank, folder, granularity)


def train(rank, folder, granularity):
    net = small(granularity=granularity)
    torch.manual_seed(100 + rank)  # ranks draw their data, and whatever else, from different generators
    parallel = DistributedDataParallel(net)  # every parameter must get a gradient on every rank, or this hangs
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    paths, sample = [], net.sample_path
    net.sample_path = lambda *a: paths.append(sample(*a)) or paths[-1]
    for _ in range(8):
        loss = F.cross_entropy(parallel(torch.randn(6, 3, 8, 8)), torch.randint(7, (6,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.save({"paths": [p.keep for p in paths], "weights": weights}, f"{folder}/{granularity}{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    two_ranks.run(trained, path := tmp_path_factory.mktemp("ranks"))
    return path


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_two_ranks(folder, granularity):
    a, b = (torch.load(folder / f"{granularity}{rank}.pt") for rank in range(2))
    same = [torch.equal(p, q) for p, q in zip(a["paths"], b["paths"], strict=True)]
    assert len(same) == 8 and (all(same) if granularity == "batch" else not any(same))
    assert torch.equal(a["weights"], b["weights"])
    columns = {tuple(p.flatten().tolist()) for p in a["paths"]}
    assert len(columns) > 2  # and they are not one path eight times


def test_a_column_path_is_global():
    path = column_path(2, 3, 1)
    assert path.column == 1 and int(path.alone) == 1


def test_tied_steps_are_never_of_one_column():
    """Whatever global_ratio says: every column runs in each of them, beside the full network."""
    net = fractalnet.FractalNet(7, 3, (4,), image_size=8, global_mode="tied", global_ratio=1.0)
    assert all(net.sample_path(4).column is None for _ in range(20))
