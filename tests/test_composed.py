"""Composed blocks against fused ones and against a brute-force expansion of the recursive rule, in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fractalnet import FractalNet
from fractalnet.composed import ComposedBlock
from fractalnet.drop_path import Path, column_path, full_path, sample_path
from fractalnet.fused import FractalBlock

ACTIVATIONS = {
    "relu": lambda y: y.clamp(min=0),
    "leaky_relu": lambda y: torch.where(y > 0, y, 0.01 * y),
    "silu": lambda y: y / (1 + (-y).exp()),
    "mish": lambda y: y * (1 + y.exp()).log().tanh(),
}


def expand(columns, x, conv, join):
    """The branches (column, step, tensor) of f_C's last join, by f_{C+1}(z) = [(f_C o f_C)(z)] (+) [conv(z)]."""

    def branches(level, z, row):
        span, column = 2 ** (level - 1), columns - level
        out = [(column, row // span, conv(z, column, row // span))]
        if level > 1:
            middle = row + span // 2
            out += branches(level - 1, join(branches(level - 1, z, row), middle - 1), middle)
        return out

    return branches(columns, x, 0)


def live_samples(columns, keep):
    """Per unit, the samples whose result moves when the unit's output moves: by the gradient of a toy network."""
    gates = {(c, j): torch.ones(keep.shape[2], requires_grad=True) for c in range(columns) for j in range(2**c)}

    def join(branches, row):
        return sum(y * keep[row, c] for c, _, y in branches)

    last = expand(columns, torch.ones(keep.shape[2]), lambda z, c, j: gates[c, j] * (z + 1), join)
    grads = torch.autograd.grad(join(last, keep.shape[0] - 1).sum(), list(gates.values()), materialize_grads=True)
    return {key: grad != 0 for key, grad in zip(gates, grads, strict=True)}


def brute_force(block, x, keep, training):
    """Output of a block without dropout, and the batch statistics of its live units."""
    keep = keep if keep.dim() == 3 else keep.unsqueeze(2).expand(-1, -1, x.shape[0])
    live, stats = live_samples(block.columns, keep), {}

    def conv(z, c, j):
        u, on = block.unit(c, j), live[c, j]
        y = F.conv2d(z, u.weight, padding=1)
        if u.weight_1x1 is not None:
            y = torch.cat([y, torch.einsum("nihw,oi->nohw", z, u.weight_1x1[..., 0, 0])], 1)
        if u.conv_bias is not None:
            y = y + u.conv_bias.view(-1, 1, 1)
        mean, var = u.running_mean, u.running_var
        if training and on.any():
            kept = y[on].transpose(0, 1).flatten(1)
            mean, var = kept.mean(1), kept.var(1, correction=0)
            stats[c, j] = mean.detach(), kept.var(1).detach()
        y = (y - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + block.eps).sqrt()
        if u.gamma is not None:
            y = y * u.gamma.view(-1, 1, 1) + u.beta.view(-1, 1, 1)
        return ACTIVATIONS[block.activation](y)

    def join(branches, row, pool=None):
        width, total = max(y.shape[1] for _, _, y in branches), 0
        for c, j, y in branches:
            projection = block.unit(c, j).projection
            assert (projection is None) == (y.shape[1] == width)
            if projection is not None:
                y = torch.einsum("nihw,oi->nohw", y, projection[..., 0, 0])
            y = pool(y) if pool else y
            total = total + torch.where(keep[row, c].view(-1, 1, 1, 1), y, 0)
        kept = sum(keep[row, c].to(x.dtype) for c, _, _ in branches).clamp(min=1)
        return total / kept.view(-1, 1, 1, 1)

    branches = expand(block.columns, x, conv, join)
    before = {"before": lambda y: F.max_pool2d(y, 2), "average": lambda y: F.avg_pool2d(y, 2)}.get(block.pool)
    out = join(branches, keep.shape[0] - 1, before)
    return (F.max_pool2d(out, 2) if block.pool == "after" else out), stats


def draw(block, seed=0):
    """Every parameter and statistic of a block away from where it starts, in fp64."""
    torch.manual_seed(seed)
    block.init_weights("he")
    block.double()
    with torch.no_grad():
        for t in (block.gamma, block.beta, block.conv_bias, block.running_mean):
            if t is not None:
                t.add_(torch.randn_like(t) * 0.3)
        block.running_var.add_(torch.rand_like(block.running_var))
    return block


def paths(columns, samples):
    torch.manual_seed(columns)
    return {
        "full": full_path(1, columns),
        "column": column_path(1, columns, columns // 2),
        "local": sample_path(1, columns, samples, local_drop=0.5, global_ratio=0.0),
        "sample": sample_path(1, columns, samples, local_drop=0.5, global_ratio=0.4, granularity="sample"),
    }


def units(block):
    return [block.unit(u.column, u.step, set) for u in block.schedule.units for set in range(len(block.running_mean))]


def gradients(block):
    """The block with gradients in the place of parameters, so that unit() gives views of those."""
    twin = copy.deepcopy(block)
    for p, q in zip(twin.parameters(), block.parameters(), strict=True):
        p.data = q.grad
    return twin


def composed_twin(fused):
    widths = (fused.channels,) * fused.columns
    norm = {"conv_bias": fused.conv_bias is not None, "bn_affine": fused.gamma is not None}
    norm |= {"momentum": fused.momentum, "sets": len(fused.running_mean), "pool": fused.pool}
    twin = ComposedBlock(fused.in_channels, widths, **norm).double()
    with torch.no_grad():
        for a, b in zip(units(twin), units(fused), strict=True):
            for name, source in b._asdict().items():
                if source is not None:
                    getattr(a, name).copy_(source)
    return twin


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("columns, pool, bias, affine", [(1, None, 0, 1), (2, "before", 1, 0), (3, "after", 0, 1)])
def test_composed_equals_fused(columns, pool, bias, affine, dense, training):
    """Output, gradients, running statistics and counts of both ways to run a ReLU block of equal widths."""
    options = {"pool": pool, "conv_bias": bool(bias), "bn_affine": bool(affine), "momentum": None if bias else 0.1}
    fused = draw(FractalBlock(3, 4, columns, **options)).train(training)
    composed = composed_twin(fused).train(training)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    for kind in ("full", "local", "column", "full"):
        path, results = paths(columns, 3)[kind], []
        for block in (fused, composed):
            block.zero_grad()
            z = x.clone().requires_grad_()
            out = block(z, path.keep[0], path.alone, dense)
            (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
            results.append((out, z.grad, units(block), units(gradients(block)), block.num_batches_tracked))
        for name in results[0][2][0]._fields:
            for part in (2, 3):
                for a, b in zip(results[0][part], results[1][part], strict=True):
                    expected, got = getattr(a, name), getattr(b, name)
                    assert (expected is None) == (got is None)
                    if expected is not None:
                        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
        for part in (0, 1, 4):
            torch.testing.assert_close(results[1][part], results[0][part], rtol=1e-8, atol=1e-10)


CASES = [
    ("silu", (4,), 1.0, "before"),
    ("mish", (4, 4), 0.5, "average"),
    ("relu", (4, 2), 1.0, "before"),
    ("leaky_relu", (2, 4, 3), 0.5, "after"),
    ("relu", (8, 4, 2, 1), 0.5, "before"),
    ("silu", (2, 3, 4, 6), 0.3, None),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["full", "column", "local", "sample"])
@pytest.mark.parametrize("activation, widths, mix, pool", CASES)
def test_composed_against_the_recursive_rule(activation, widths, mix, pool, kind, training):
    options = {"activation": activation, "pool": pool, "conv_bias": len(widths) == 2}
    block = draw(ComposedBlock(3, widths, kernel_mix=mix, sets=1, **options)).train(training)
    path = paths(len(widths), 5)[kind]
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected, stats = brute_force(block, x, path.keep[0], training)
    grad, inputs = torch.randn_like(expected), [x, *block.parameters()]
    want = torch.autograd.grad(expected, inputs, grad, materialize_grads=True)
    before = [(u.running_mean.clone(), u.running_var.clone()) for u in units(block)]
    out = block(x, path.keep[0], path.alone)
    got = torch.autograd.grad(out, inputs, grad)  # raises where a gradient is None
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-9)
    for unit, (mean, var), u in zip(block.schedule.units, before, units(block), strict=True):
        batch_mean, batch_var = stats.get((unit.column, unit.step), (mean, var))
        torch.testing.assert_close(u.running_mean, 0.9 * mean + 0.1 * batch_mean)
        torch.testing.assert_close(u.running_var, 0.9 * var + 0.1 * batch_var)
        assert int(block.num_batches_tracked[0, unit.id]) == ((unit.column, unit.step) in stats)


@pytest.mark.parametrize("kind", ["full", "column", "local"])
@pytest.mark.parametrize("pool_order", ["before_join", "after_join"])
def test_fused_average_pool(pool_order, kind):
    net = FractalNet(5, 3, (4, 6), image_size=8, pool="avg", pool_order=pool_order)
    assert all(isinstance(block, FractalBlock) for block in net.blocks)
    block, path = draw(net.blocks[0]), paths(3, 3)[kind]
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x, path.keep[0], path.alone), brute_force(block, x, path.keep[0], True)[0])


COMPOSED = {"activation": "silu", "column_widths": (1, 1 / 2, 1 / 4), "kernel_mix": 0.5}


def test_paths_per_sample_are_one_graph_of_the_compiler():
    """What runs does not depend on them."""
    torch.manual_seed(0)
    net = FractalNet(5, 2, (4,), image_size=8, granularity="sample", activation="silu").double()
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for path in (net.sample_path(6), net.sample_path(6)):
        torch.testing.assert_close(compiled(x, path=path), net(x, path=path))


def test_skipping_equals_dense():
    """Loss, gradients (zeros where dead) and statistics of a whole network, over the drop-path mixture."""
    net = FractalNet(5, 3, (4, 8), image_size=8, **COMPOSED).double()
    x, target = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2])
    generator, skipped = torch.Generator().manual_seed(1), 0
    for _ in range(8):
        path, results = net.sample_path(3, generator), []
        start = {k: v.clone() for k, v in net.state_dict().items()}
        for dense in (False, True):
            net.load_state_dict(start)
            net.zero_grad()
            loss = F.cross_entropy(net(x, path=path, dense=dense), target)
            loss.backward()
            results.append(
                [loss.detach(), *(p.grad.clone() for p in net.parameters()), *map(torch.clone, net.buffers())]
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        skipped += sum(bool((w.grad == 0).all()) for block in net.blocks for w in block.weights)
    assert skipped > 0


@pytest.mark.parametrize("pool, activation", [("before", "relu"), ("after", "relu"), (None, "relu"), (None, "silu")])
def test_what_is_kept(pool, activation):
    """The input, convolution outputs before their batch norm and inner joins; a pool's input "after" the last join; and
    activations that convolutions and projections read, but for ReLUs."""
    block = ComposedBlock(3, (8, 4, 2), kernel_mix=0.5, pool=pool, activation=activation)
    block.init_weights("he")
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(t):
        if t.dim() == 4 and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    path = full_path(1, 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(torch.randn(2, 3, 8, 8, requires_grad=True), path.keep[0], path.alone)
    # Widths are of one, two and four units; joins inside are of the second and the third column, 4 wide.
    channels = 3 + 8 + 2 * 4 + 4 * 2 + 4 + (8 if pool == "after" else 0) + (4 + 4 * 2 if activation == "silu" else 0)
    assert sum(t.numel() for t in kept.values()) == 2 * 64 * channels
    assert out.requires_grad


def test_one_value_per_channel_for_a_sample():
    """A sample alone in a unit, at one pixel: no variance, no NaN, statistics stay."""
    block = draw(ComposedBlock(3, (2, 2), pool=None, sets=1))
    keep = full_path(1, 2).keep[0].unsqueeze(2).repeat(1, 1, 3)
    keep[1, 0, 1:] = False
    before = block.unit(0, 0).running_var.clone()
    x = torch.randn(3, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    block(x, keep, torch.tensor(0)).sum().backward()
    assert bool(x.grad.isfinite().all()) and torch.equal(block.unit(0, 0).running_var, before)


@pytest.mark.parametrize("clear", ["last join", "middle join", "no samples"])
def test_joins_that_keep_nothing_are_zeros_in_both(clear):
    """Per sample: an output of zeros where nothing is kept, whatever runs the block."""
    outs = []
    for activation in ("relu", "silu"):
        torch.manual_seed(0)
        net = FractalNet(5, 3, (4, 6), image_size=8, granularity="sample", activation=activation).double()
        x = torch.randn(0 if clear == "no samples" else 4, 3, 8, 8, dtype=torch.float64)
        keep = full_path(2, 3).keep.unsqueeze(-1).repeat(1, 1, 1, len(x))
        if clear == "last join":
            keep[0, -1] = False
        if clear == "middle join":
            keep[:, 1] = False
        before = [b.clone() for b in net.buffers()]
        out = net(x, path=Path(keep))
        out.sum().backward()
        assert out.shape == (len(x), 5)
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
        if clear == "no samples":
            assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
        outs.append(net.blocks[0](x, keep[0], torch.tensor(0)))
    if clear == "last join":
        assert all(bool((out == 0).all()) for out in outs)


def test_an_empty_batch_is_no_step():
    for activation in ("relu", "silu"):
        net = FractalNet(5, 2, (4,), image_size=8, activation=activation)
        assert net(torch.randn(0, 3, 8, 8), path=full_path(1, 2)).shape == (0, 5)
        assert bool((net.blocks[0].num_batches_tracked == 0).all())


@pytest.mark.parametrize("path", [full_path(1, 2), column_path(1, 2, 0)], ids=["full", "column"])
def test_an_output_can_be_changed_in_place(path):
    """Whatever the path leaves out."""
    net = FractalNet(5, 2, (4,), image_size=8, activation="silu").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = torch.autograd.grad(net(x, path=path).sum(), net.head.weight)[0]
    net.blocks[0].register_forward_hook(lambda m, x, out: out.mul_(0.5))
    out = net(x, path=path)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), net.head.weight, retain_graph=True)[0], expected / 2)
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_initial_weights_are_of_their_own_fans():
    block = ComposedBlock(16, (32, 16), kernel_mix=0.5)
    block.init_weights("xavier")
    for weight in (*block.weights, *block.weights_1x1.values(), *block.projections.values()):
        out, size, _, inside = weight.shape
        bound = (6 / (size * size * (inside + out))) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound


def test_operands_that_do_not_fit():
    block, keep = ComposedBlock(3, (4, 2)), full_path(1, 2).keep[0]
    with pytest.raises(
        ValueError, match=r"ComposedBlock: expected x of shape \[N, 3, H, W\], H and W >= 2 for pooling"
    ):
        block(torch.randn(2, 3, 8, 1), keep, torch.tensor(0))
    with pytest.raises(ValueError, match=r"expected keep bool of shape \[2, 2\], got torch.float32 \[2, 2\]"):
        block(torch.randn(2, 3, 8, 8), keep.float(), torch.tensor(0))


@pytest.mark.parametrize("pool, size", [("before", 4), ("after", 4), ("average", 4), (None, 8)])
def test_where_nothing_is_kept(pool, size):
    """Nor is anything read: outputs and gradients of parameters are zeros."""
    block = ComposedBlock(3, (4, 2), activation="silu", pool=pool, conv_bias=True)
    block.init_weights("he")
    nothing = torch.zeros(2, 2, 5, dtype=torch.bool)
    out = block(torch.randn(5, 3, 8, 8), nothing, torch.tensor(0))
    out.sum().backward()
    assert out.shape == (5, 4, size, size) and not out.any()
    assert not any(p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("activation", ["relu", "silu"], ids=["fused", "composed"])
def test_export_takes_any_batch(activation):
    net = FractalNet(10, 2, (8,), image_size=8, activation=activation).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (torch.randn(3, 3, 8, 8),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), net(x))
