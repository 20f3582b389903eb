"""Running statistics of a network's blocks: which units move, however that is known."""

from __future__ import annotations

import copy

import fractalnet
import pytest
import torch
from fractalnet.drop_path import Path, column_path, full_path, sample_path
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fractal_kernels import fractal_block, masked_mean_join
from fractal_kernels.schedule import plan, schedule


@pytest.mark.parametrize("options", [{}, {"kernel_mix": 0.5}, {"column_widths": (1, 0.5, 0.25)}, {"momentum": None}])
@pytest.mark.parametrize("path", ["full", "column", "local"])
def test_statistics_of_paths_that_the_host_knows(options, path):
    """What moves by slices of the units that ran is what moves under a mask: also a batch with an infinity, and one of
    a single value."""
    torch.manual_seed(0)
    drawn = sample_path(2, 3, 6, global_ratio=0.0, local_drop=0.5, generator=torch.Generator().manual_seed(3))
    chosen = {"full": full_path(2, 3), "column": column_path(2, 3, 1), "local": drawn}[path]
    net = fractalnet.FractalNet(5, 3, (8, 16), image_size=8, **options).double()
    nets = [copy.deepcopy(net) for _ in range(3)]
    for x in (torch.randn(6, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.full((6, 3, 8, 8), torch.inf)):
        for own, dense in zip(nets, (False, True, True), strict=True):
            images = x.double()
            if own is nets[2]:  # blocks by themselves, which work out what lives
                for block, keep in zip(own.blocks, chosen.keep.unbind(), strict=True):
                    images = block(images, keep, chosen.alone, dense)
            else:
                own(images, path=chosen, dense=dense)
    for (name, a), b, c in zip(nets[0].named_buffers(), nets[1].buffers(), nets[2].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True, msg=name)
        assert torch.equal(b.nan_to_num(7.0), c.nan_to_num(7.0)), name
        if path == "column" and "running" in name:
            assert torch.equal(a[0], dict(net.named_buffers())[name][0]) and not torch.equal(a[1], b[0])


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"kernel_mix": 0.5}])
def test_of_all_blocks_at_once(options):
    """A dense step works out which units live once for the network; a column's has no masks at all."""
    net = fractalnet.FractalNet(5, 3, (8, 8, 8), image_size=8, **options)
    x, full, one = torch.randn(4, 3, 8, 8), full_path(3, 3), column_path(3, 3, 2)
    with Names() as dense:
        net(x, path=full, dense=True)
    assert dense.names.count("bitwise_and") == 4 and dense.names.count("bitwise_or") == 1
    with Names() as column:
        net(x, path=one)
    assert not {"bitwise_and", "where", "gt"} & set(column.names)
    assert column.names.count("_foreach_lerp_") == column.names.count("_foreach_add_") == 3


def test_live_is_checked():
    x, w = torch.randn(2, 3, 8, 8), [torch.randn(8, 3, 3, 3), torch.randn(4, 4, 3, 3)]
    path, live = torch.ones(2, 2, dtype=torch.bool), torch.tensor([True, False, True])
    out = fractal_block(x, w, None, None, path, dense=True, live=live)
    assert out.counts.tolist() == [128, 0, 128]
    for arguments, words in (
        ({"live": live}, "expected dense=True and path of shape .2, 2. beside live, got dense=False"),
        ({"live": live[:2], "dense": True}, "expected live of shape .3. on cpu, got .2. on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            fractal_block(x, w, None, None, path, **arguments)
    with pytest.raises(TypeError, match="expected live of dtype bool"):
        fractal_block(x, w, None, None, path, live=live.float(), dense=True)


@pytest.mark.parametrize("training, dense", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("column", [None, 1])
def test_without_values(training, dense, column):
    """Where tensors have no values, paths are not looked at more than they have to be."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        net = fractalnet.FractalNet(5, 2, (8, 8), image_size=8).train(training)
        x = torch.randn(2, 3, 8, 8)
        path = None if column is None and not training else column_path(2, 2, column or 0)
        net(x, path=path, dense=dense).sum().backward()
        if not training:
            assert net(x, column=column).shape == (2, 5)
        assert net.blocks[0].weights[0].grad.dtype == torch.float32
        ys = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
        joined = masked_mean_join(ys, torch.ones(2, dtype=torch.bool)).sum()
    joined.backward()
    assert ys[0].grad.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_evaluation_traced_by_make_fx(mode):
    net, x = fractalnet.FractalNet(5, 2, (8, 8), image_size=8).eval(), torch.randn(2, 3, 8, 8)
    traced = make_fx(lambda x: net(x), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("options", [{}, {"kernel_mix": 0.5}])
def test_a_dense_path_of_another_shape(options):
    net = fractalnet.FractalNet(5, 3, (8, 8), image_size=8, **options)
    for shape in ((2, 2, 3), (2, 4, 2)):
        with pytest.raises(ValueError, match=r"expected (path|keep) bool of shape .*4, 3"):
            net(torch.randn(2, 3, 8, 8), path=Path(torch.ones(shape, dtype=torch.bool)), dense=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_networks_in_half_precision(dtype, dense):
    net = fractalnet.FractalNet(5, 2, (4,), image_size=8).to(dtype)
    net(torch.randn(2, 3, 8, 8, dtype=dtype), path=full_path(1, 2), dense=dense)
    running = net.blocks[0].running_mean
    assert running.dtype == dtype and running[0].all() and not running[1].any()


def test_statistics_that_were_written_by_hand():
    """Without a count a unit has its own, unless the other set has one."""
    block = fractalnet.FractalNet(5, 2, (4,), image_size=8).eval().blocks[0]
    block.running_mean[0].fill_(5)
    assert [block.statistics(torch.tensor(alone))[0].unique().item() for alone in (0, 1)] == [5, 0]
    block.num_batches_tracked[0] += 1
    assert block.statistics(torch.tensor(1))[0].unique().item() == 5


@pytest.mark.parametrize("on", ["cpu", "reference"])
def test_a_join_of_more_branches_than_any_run_of_units_that_live(on, cpu_backend):
    """Its gradient asks for as many numbers of values, of which no slice of the units' numbers is."""
    rows = "1000 0110 0101 1100 0001 1110 1101 1101".split()
    keep = torch.tensor([[kept == "1" for kept in row] for row in rows])
    assert plan(4, tuple(keep.flatten().tolist())).units == (0, 1, 8, 9, 13, 14)
    x = torch.randn(3, 16, 4, 4)
    weights = [torch.randn(len(row) * 16, 16, 3, 3).requires_grad_() for row in schedule(4).starts]
    gamma, beta = (torch.rand(15, 16).requires_grad_() for _ in range(2))
    results = []
    for dense in (False, True):
        out = fractal_block(x, weights, gamma, beta, keep, dense=dense, backend=on).out
        results.append([out, *torch.autograd.grad(out.square().sum(), [*weights, gamma, beta])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    gradients = results[0][-2:]
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == 2  # one may be written while another is read
