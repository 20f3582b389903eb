"""Batch norm over ranks: two processes with parts of a batch against one process with all of it, in fp64."""

import copy
import inspect
import pickle

import fractalnet
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import two_ranks
from fractalnet.drop_path import Path, column_path, full_path, sample_path
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fractal_kernels as fk
from fractal_kernels import block_rows, sync

N = 8
# PyTorch 2.11 knows the deprecated name alone.
KEEP = "forward_sync_buffers"
KEEP = KEEP if KEEP in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
SPLITS = ((5, 3), (8, 0))


def test_no_collective_in_evaluation():
    """As of torch.nn.SyncBatchNorm, also where the statistics are the batch's own."""
    x = torch.randn(4, 3, 2, 2)
    for module, inputs in (
        (fk.BatchNormReLU2d(3, track_running_stats=False), x),
        (fk.BNReLUJoin(2, 3, track_running_stats=False), [x, x]),
    ):
        module.sync_group = sync.Name("gone")
        assert module.eval()(inputs).shape == x.shape
        with pytest.raises(RuntimeError, match="expected the process group 'gone' to be there"):
            module.train()(inputs)


class Joined(nn.Module):
    """Every module that synchronises, at the level of tensors."""

    def __init__(self):
        super().__init__()
        self.stem = fk.ConvBNReLU(3, 4)
        self.join = fk.BNReLUJoin(2, 4, activation="output", reduction="sum", stats="live")
        self.residual = fk.BNReLUJoin(2, 4, normalised=[False, True], stats="live", momentum=None)
        self.head = nn.Linear(4, 7)

    def forward(self, x, mask):
        y = self.stem(x)
        h = self.join([y, y.flip(-1)], mask)
        return self.head(self.residual([h, h.flip(-2)], mask).mean((2, 3)))


def network(kind):
    torch.manual_seed(0)
    if kind == "joined":
        return Joined().double()
    sample = kind in ("sample", "ranges", "one each", "silu one each")
    options = {"granularity": "sample" if sample else "batch", "momentum": 0.3 if kind == "full" else None}
    composed = {"composed": {"column_widths": (1, 0.5, 0.5), "kernel_mix": 0.5}}
    options |= composed.get(kind, {"activation": "silu"} if "silu" in kind else {})
    return fractalnet.FractalNet(7, 3, (4, 6), image_size=8, **options).double()


def path_of(kind):
    """A path for all of the batch, and the part of it that a rank has."""
    generator = torch.Generator().manual_seed(3)
    if kind == "joined":
        keep = fk.drop_path_mask(2, 0.4, N, generator=generator)
        return lambda first, last: keep[:, first:last]
    if kind in ("sample", "ranges"):
        ratio = 0.0 if kind == "sample" else 0.75
        path = sample_path(2, 3, N, local_drop=0.4, global_ratio=ratio, granularity="sample", generator=generator)
        return lambda first, last: Path(path.keep[..., first:last])
    if "one each" in kind:  # the ranks' samples each keep one column, and not the same one
        keep = torch.cat([column_path(2, 3, c).keep.unsqueeze(3) for c in (2,) * 5 + (0,) * 3], 3)
        return lambda first, last: Path(keep[..., first:last])
    path = {
        "full": full_path(2, 3),
        "column": column_path(2, 3, 1),
        "local": sample_path(2, 3, N, local_drop=0.6, global_ratio=0.0, generator=generator),
    }[{"composed": "local", "dense": "local", "silu": "full"}.get(kind, kind)]
    return lambda first, last: path


def step(model, net, kind, first, last, world):
    """Two steps on samples first ... last - 1; everything that must be the same on one process and on two."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(N) % 7
    part, path = slice(first, last), path_of(kind)(first, last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(x[part], path, **({"dense": True} if kind == "dense" else {}))
        # Data parallelism averages gradients over ranks, whatever their parts of the batch are.
        (F.cross_entropy(logits, y[part], reduction="sum") * world / N).backward()
        grads = {f"grad {name}": p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
    state = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("_extra")}
    return {**grads, **state}


def both(rank, folder, kinds):
    block_rows.RANGES_PAY = 1
    for kind in kinds:
        for split in SPLITS:
            net = network(kind)
            assert (fk.sync_batch_norm(net) if kind == "joined" else net.sync_batch_norm()) in (None, 3)
            net = pickle.loads(pickle.dumps(copy.deepcopy(net)))  # as checkpoints do
            model = DistributedDataParallel(net, **{KEEP: False})
            first, last = (0, split[0]) if rank == 0 else (split[0], N)
            torch.save(step(model, net, kind, first, last, 2), f"{folder}/{kind}{split[0]}{rank}.pt")


KINDS = ("joined", "full", "column", "local", "dense", "sample", "ranges", "one each", "composed", "silu")
KINDS += ("silu one each",)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.run(both, folder, KINDS)
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(ranks, kind, split):
    net = network(kind)
    expected = step(net, net, kind, 0, N, 1)
    a, b = (torch.load(ranks / f"{kind}{split[0]}{rank}.pt") for rank in range(2))
    assert a.keys() == expected.keys()
    moved = 0
    for name, want in expected.items():
        assert torch.equal(a[name], b[name]), name  # ranks stay bit by bit together
        torch.testing.assert_close(a[name], want, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        moved += "running_mean" in name and bool((want != 0).any())
    assert moved  # statistics were tracked


def test_without_synchronisation_ranks_differ(tmp_path):
    """What the test above would see if nothing were synchronised."""
    net = network("full")
    whole, half = step(net, net, "full", 0, N, 1), None
    net = network("full")
    half = step(net, net, "full", 0, 5, 1)
    assert not torch.allclose(whole["blocks.0.running_mean"], half["blocks.0.running_mean"], rtol=1e-3)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("which", ["all", "some"])
def test_compiled(one_rank, which):
    """In one graph, and by whatever group: the modules keep its name, functions take the group."""
    group = None if which == "all" else dist.new_group([0])
    net = Joined()
    alone = copy.deepcopy(net)
    assert fk.sync_batch_norm(net, group) == 3
    x, mask = torch.randn(4, 3, 6, 6), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x, mask), alone(x, mask))
    for buffer, expected in zip(net.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    group = dist.group.WORLD if group is None else group
    function = torch.compile(
        lambda x: fk.bn_relu(x, None, None, None, None, True, group=group), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(function(x), fk.bn_relu(x, None, None, None, None, True))


def test_evaluation_waits_for_nobody(one_rank, monkeypatch):
    net, calls = fk.BNReLUJoin(2, 3, stats="live"), []
    fk.sync_batch_norm(net)
    for name in ("all_gather", "all_reduce", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, name, lambda *a, **k: calls.append(1))
    net.eval()([torch.randn(4, 3, 5, 5)] * 2, torch.ones(2, 4, dtype=torch.bool))
    assert not calls


def test_a_batch_without_live_samples_is_not_counted(one_rank):
    """By statistics of live samples, and cumulative averaging, as without a group."""
    results = []
    for synchronised in (False, True):
        net = fk.BNReLUJoin(2, 3, momentum=None, stats="live")
        if synchronised:
            fk.sync_batch_norm(net)
        for step, live in enumerate((0, 1)):
            torch.manual_seed(step)
            net([torch.randn(4, 3, 5, 5) + 5 for _ in range(2)], torch.tensor([[1] * 4, [live] * 4]))
        results.append(list(net.buffers()))
    assert [int(bn.num_batches_tracked) for bn in net.bns] == [2, 1]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_rank_may_have_one_value(one_rank):
    """Others may have more."""
    net = fractalnet.FractalNet(7, 2, (4,), image_size=1, last_pool=False, activation="silu")
    net.sync_batch_norm()
    assert net(torch.randn(1, 3, 1, 1), full_path(1, 2)).isfinite().all()
    assert not net.blocks[0].num_batches_tracked.any()  # of all ranks it is the only one
    assert net(torch.randn(2, 3, 1, 1), full_path(1, 2)).isfinite().all()
    assert (net.blocks[0].num_batches_tracked[0] == 1).all()
    norm = fk.BatchNormReLU2d(3)
    fk.sync_batch_norm(norm)
    assert norm(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_a_group_that_is_gone(one_rank):
    net = fk.BatchNormReLU2d(3)
    fk.sync_batch_norm(net)
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="sync_batch_norm: expected the process group .* to be there; call it again"):
        net(torch.randn(2, 3, 4, 4))


def test_errors():
    with pytest.raises(TypeError, match="sync_batch_norm: expected module to be a torch.nn.Module, got int"):
        fk.sync_batch_norm(3)
    net = network("full")
    with pytest.raises(ValueError, match="sync_batch_norm: expected torch.distributed to be initialised"):
        net.sync_batch_norm()
    with pytest.raises(TypeError, match="bn_relu: expected group None or a torch.distributed.ProcessGroup, got str"):
        fk.bn_relu(torch.randn(2, 3, 4, 4), None, None, None, None, True, group="world")
