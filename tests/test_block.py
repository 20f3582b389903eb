"""The block against a brute-force expansion of the recursive rule, and skipping against dense execution, in fp64."""

import fractalnet
import pytest
import torch
import torch.nn.functional as F
from fractalnet.drop_path import Path, column_path, full_path, sample_path

import fractal_kernels as fk
from fractal_kernels import block_rows
from fractal_kernels.block import fractal_block
from fractal_kernels.schedule import plan, schedule

THREADS = 2


@pytest.fixture(autouse=True)
def ranges_in_small_batches(monkeypatch):
    """The tests' batches are too small for ranges of columns to pay."""
    monkeypatch.setattr(block_rows, "RANGES_PAY", 1)


def brute_force(block, x, keep, training=True):
    """f_C by its recursive definition, from views of single units, plain PyTorch and autograd."""
    columns = block.columns
    used = None
    if keep.dim() == 3 and block.stats == "live":  # per unit, the samples whose result depends on it
        plans = [plan(columns, tuple(keep[..., n].flatten().tolist())).units for n in range(keep.shape[2])]
        used = {(u.column, u.step): [n for n, p in enumerate(plans) if u.id in p] for u in block.schedule.units}

    def alive(row, column):
        m = keep[row, column]
        return m if m.dim() == 0 else m.view(-1, 1, 1, 1)

    def conv(z, column, step):
        u = block.unit(column, step)
        y = F.conv2d(z, u.weight, u.conv_bias, padding=1)
        if used is not None:
            samples = torch.tensor(used[column, step], dtype=torch.long)
            return torch.zeros_like(y).index_put((samples,), norm(u, y[samples]))
        return norm(u, y)

    def norm(u, y):
        if len(y) == 0:
            return y
        mean, var = (y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)) if training else (u.running_mean, u.running_var)
        y = (y - mean.view(1, -1, 1, 1)) / (var + block.eps).sqrt().view(1, -1, 1, 1)
        if u.gamma is not None:
            y = y * u.gamma.view(1, -1, 1, 1) + u.beta.view(1, -1, 1, 1)
        return y.relu()

    def join(branches, row):
        kept = torch.stack([torch.where(alive(row, c), b, 0) for c, b in branches]).sum(0)
        return kept / sum(alive(row, c).to(x.dtype) for c, _ in branches).clamp(min=1)

    def branches(level, z, row):
        span = 2 ** (level - 1)
        out = [(columns - level, conv(z, columns - level, row // span))]
        if level > 1:
            middle = row + span // 2
            out += branches(level - 1, join(branches(level - 1, z, row), middle - 1), middle)
        return out

    last = branches(columns, x, 0)
    if block.pool == "before":
        return join([(c, F.max_pool2d(b, 2)) for c, b in last], 2 ** (columns - 1) - 1)
    return F.max_pool2d(join(last, 2 ** (columns - 1) - 1), 2)


def make_net(columns, seed, **kwargs):
    torch.manual_seed(seed)
    net = fractalnet.FractalNet(5, columns, (4, 6), image_size=8, **kwargs).double()
    with torch.no_grad():
        for block in net.blocks:
            for p in (block.gamma, block.beta, block.conv_bias, block.running_mean):
                if p is not None:
                    p.add_(torch.randn_like(p) * 0.3)
            block.running_var.add_(torch.rand_like(block.running_var))
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["full", "column", "local", "sample", "ranges", "live"])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_against_the_recursive_rule(backend, columns, kind, training):
    pool = "before_join" if columns % 2 else "after_join"
    options = {"granularity": "sample", "stats": "all" if kind == "sample" else "live"}
    net = make_net(columns, columns, pool_order=pool, conv_bias=columns > 2, **options).train(training)
    block = net.blocks[0]
    n = 7 if kind == "ranges" else 3
    x = torch.randn(n, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    path = {
        "full": full_path(1, columns),
        "column": column_path(1, columns, columns // 2),
        "local": sample_path(1, columns, 3, local_drop=0.5, global_ratio=0.0),
        "sample": sample_path(1, columns, n, local_drop=0.5, global_ratio=0.4, granularity="sample"),
        "ranges": sample_path(1, columns, n, local_drop=0.5, global_ratio=0.7, granularity="sample"),
        "live": sample_path(1, columns, n, local_drop=0.6, global_ratio=0.0, granularity="sample"),
    }[kind]
    expected = brute_force(block, x, path.keep[0], training)
    grad = torch.randn_like(expected)
    inputs = [x, *block.parameters()]
    want = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
    with fk.use_backend(backend):
        out = block(x, path.keep[0], torch.tensor(0))
        got = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-8, atol=1e-9)


def run(net, x, target, path, dense):
    net.zero_grad()
    x.grad = None
    loss = F.cross_entropy(net(x, path=path, dense=dense), target)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.mark.parametrize("columns", [2, 3, 4, 5])
def test_skipping_equals_dense(columns):
    """Loss, gradients (zeros where dead) and running statistics, over random paths of both kinds."""
    net = make_net(columns, columns, bn_affine=columns != 4)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2])
    generator = torch.Generator().manual_seed(columns)
    skipped_any = False
    for _ in range(8):
        path = net.sample_path(3, generator)
        start = {k: v.clone() for k, v in net.state_dict().items()}
        skipped = run(net, x, target, path, dense=False)
        net.load_state_dict(start)
        dense = run(net, x, target, path, dense=True)
        for a, b in zip(skipped, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        skipped_any |= any(bool((p.grad == 0).all(dim=(1, 2, 3)).any()) for p in net.blocks[0].weights)
    assert skipped_any


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_ranges_of_columns_equal_dense(columns, ratio):
    """Per sample: a column's convs on its ranges of the batch against everything on all of it."""
    net = make_net(columns, columns, granularity="sample", global_ratio=ratio, local_drop=0.4, conv_bias=columns == 3)
    x = torch.randn(9, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    target, generator = torch.arange(9) % 5, torch.Generator().manual_seed(columns)
    for turn in range(4):
        path = net.sample_path(9, generator)
        if turn == 3:  # the full samples last: ranges may come in any order
            path = Path(path.keep.flip(-1))
        results = []
        start = {k: v.clone() for k, v in net.state_dict().items()}
        for dense in (False, True):
            net.load_state_dict(start)
            results.append(run(net, x, target, path, dense))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_range_runs_its_column_only(monkeypatch):
    """The convs of a batch of one full sample and two of column 1: by count, not by time."""
    net = make_net(3, 0, granularity="sample")
    keep = torch.stack([full_path(2, 3).keep, *[column_path(2, 3, 1).keep] * 2], dim=-1)
    rows, conv2d = [], torch.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda x, w, *a, **k: (rows.append(len(x) * len(w)), conv2d(x, w, *a, **k))[1])
    net(torch.randn(3, 3, 8, 8, dtype=torch.float64), path=Path(keep))
    ran, rows[:] = sum(rows), []
    net(torch.randn(3, 3, 8, 8, dtype=torch.float64), path=Path(keep), dense=True)
    assert sum(rows) == 3 * 7 * (4 + 6) and ran == (7 + 2 * 2) * (4 + 6)


@pytest.mark.parametrize("columns", [2, 3])
def test_any_path_per_sample_equals_dense(columns):
    """Paths with holes too: joins that keep nothing, columns that are kept where they do not end."""
    net = make_net(columns, columns, granularity="sample")
    x = torch.randn(9, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(columns)
    for _ in range(12):
        keep = torch.rand(2, 2 ** (columns - 1), columns, 3, generator=generator) < 0.5
        path = Path(keep.repeat_interleave(3, -1))
        results = []
        start = {k: v.clone() for k, v in net.state_dict().items()}
        for dense in (False, True):
            net.load_state_dict(start)
            results.append(run(net, x, torch.arange(9) % 5, path, dense))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("trained", ["beta", "conv_bias"])
def test_gradients_of_one_parameter_alone(backend, trained):
    """Statistics given and no gamma; and nothing but a bias that requires a gradient."""
    w = [torch.randn(s, dtype=torch.float64) for s in ((4, 3, 3, 3), (2, 2, 3, 3))]
    x, path = torch.randn(2, 3, 4, 4, dtype=torch.float64), full_path(1, 2).keep[0]
    vectors = {name: torch.randn(3, 2, dtype=torch.float64) for name in ("beta", "conv_bias", "mean")}
    vectors[trained].requires_grad_()

    def f(t):
        given = vectors | {trained: t, "var": torch.ones(3, 2, dtype=torch.float64)}
        return fractal_block(x, w, None, given.pop("beta"), path, **given, backend=backend).out

    assert torch.autograd.gradcheck(f, (vectors[trained],), atol=1e-6)


def test_a_batch_that_is_not_finite_stays_out_of_the_other_statistics():
    net = make_net(2, 0)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    x[0, 0, 0, 0] = torch.inf
    net(x, path=full_path(2, 2))
    running = net.blocks[0].running_mean
    assert not bool(running[0].isfinite().all()) and bool(running[1].isfinite().all())
    still = fractalnet.FractalNet(5, 2, (4,), image_size=8, momentum=0.0).double()
    still(x, path=full_path(1, 2))
    assert all(bool(buffer.isfinite().all()) for buffer in still.buffers())


def test_small_batches_stay_whole(monkeypatch):
    """By the measured rule: the same batch in one convolution per row, or in ranges."""
    monkeypatch.undo()
    keep = torch.stack([full_path(1, 3).keep, column_path(1, 3, 1).keep], dim=-1)[0].repeat_interleave(8, -1)
    sizes = {}
    for side in (8, 64):
        found = block_rows.segments(3, keep, False, True, torch.empty(16, 3, side, side), 16)
        sizes[side] = [s.size for s in found]
    assert sizes == {8: [16], 64: [8, 8]}


def test_statistics_of_samples_that_do_not_live():
    """NaN in samples that keep another column reaches nothing: neither statistics nor the other samples."""
    net = make_net(2, 0, granularity="sample")
    keep = torch.stack([column_path(2, 2, 0).keep, column_path(2, 2, 1).keep, column_path(2, 2, 1).keep], dim=-1)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    x[0] = torch.nan
    for dense in (False, True):
        out = net(x, path=Path(keep), dense=dense)
        assert bool(out[1:].isfinite().all()) and bool(out[0].isnan().all())
        assert bool(net.blocks[0].running_mean[0, 1:].isfinite().all())


def test_split_convs_equal_wide(monkeypatch):
    """The rule that chooses between one wide conv and one per column does not change results."""
    net = make_net(3, 0)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    results = []
    start = {k: v.clone() for k, v in net.state_dict().items()}
    for wide in (True, False):
        net.load_state_dict(start)
        monkeypatch.setattr(block_rows, "wide_is_faster", lambda *_, wide=wide: wide)
        results.append(run(net, x, torch.tensor([0, 1, 2]), full_path(2, 3), dense=False))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_row_is_one_convolution_but_where_the_cpu_is_slower():
    units = [len(row) for row in schedule(3).starts]
    for device, expected in (("cpu", units), ("meta", [1, 1, 1, 1])):
        weights = [torch.empty(n * 512, 512, 3, 3, device=device) for n in units]
        x = torch.empty(2, 512, 4, 4, device=device)
        rows = block_rows.rows_of(weights, 512, full_path(1, 3).keep[0], False, 0, x, "", False)
        assert [len(convs) for convs in rows.convs] == expected


def test_dead_units_keep_their_statistics_and_sets_are_separate():
    net = make_net(2, 1)
    block, x = net.blocks[0], torch.randn(3, 3, 8, 8, dtype=torch.float64)
    before = block.running_mean.clone()
    net(x, column=1)
    after = block.running_mean
    assert torch.equal(after[0], before[0])  # the full network's set
    assert torch.equal(after[1, 0], before[1, 0])  # column 0 did not run
    assert not torch.equal(after[1, 1:], before[1, 1:])
    before = block.running_mean.clone()
    net(x, path=full_path(2, 2))
    assert torch.equal(block.running_mean[1], before[1])
    assert (block.running_mean[0] != before[0]).all()


def test_running_statistics_are_batch_norms():
    for momentum in (0.3, None):
        net = fractalnet.FractalNet(5, 1, (4,), image_size=8, momentum=momentum, split_stats=False).double()
        bn = torch.nn.BatchNorm2d(4, momentum=momentum).double()
        for _ in range(3):
            x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
            net(x, path=full_path(1, 1))
            bn(F.conv2d(x, net.blocks[0].unit(0, 0).weight, padding=1))
        torch.testing.assert_close(net.blocks[0].running_mean[0, 0], bn.running_mean)
        torch.testing.assert_close(net.blocks[0].running_var[0, 0], bn.running_var)


def test_gradcheck(backend):
    torch.manual_seed(0)
    w = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 2, 3, 3), (2, 2, 3, 3))]
    gamma, beta = (torch.rand(3, 2, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    path = full_path(1, 2).keep[0]

    def f(x, gamma, beta, *w):
        return fractal_block(x, w, gamma, beta, path, backend=backend).out

    assert torch.autograd.gradcheck(f, (x, gamma, beta, *w), atol=1e-6)


def test_dropout_is_between_conv_and_norm_and_repeats():
    net = make_net(2, 2, dropout=(0.5, 0.0))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for dense in (False, False):
        torch.manual_seed(7)
        results.append(torch.autograd.grad(net(x, path=full_path(2, 2), dense=dense).sum(), x)[0])
    assert torch.equal(*results)
    torch.manual_seed(8)
    assert not torch.equal(results[0], torch.autograd.grad(net(x, path=full_path(2, 2)).sum(), x)[0])

    # Numerically: a fixed dropout mask makes the loss a smooth function of the input.
    def loss(z):
        torch.manual_seed(7)
        return net(z, path=full_path(2, 2)).square().sum()

    direction = torch.randn_like(x)
    slope = (torch.autograd.grad(loss(x), x)[0] * direction).sum()
    numeric = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-5)


def test_repeats_are_bit_identical():
    torch.manual_seed(0)
    net = fractalnet.create("fractal_c3")
    x, path = torch.randn(4, 3, 32, 32), net.sample_path(4)
    grads = [torch.autograd.grad(net(x, path=path).sum(), list(net.blocks[0].parameters())) for _ in range(2)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_compiled_block_takes_paths_as_data():
    from torch._dynamo.testing import CompileCounter

    net = make_net(3, 3)
    x, target = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2])
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.compile(net, backend=counter, fullgraph=True)(x, path=full_path(2, 3))
    first = counter.frame_count
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for path in (full_path(2, 3), column_path(2, 3, 0), column_path(2, 3, 2), net.sample_path(3), net.sample_path(3)):
        compiled(x, path=path)
    assert counter.frame_count == first
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    per_sample = sample_path(2, 3, 3, local_drop=0.5, global_ratio=0.6, granularity="sample")
    for path in (
        full_path(2, 3),
        column_path(2, 3, 1),
        sample_path(2, 3, 3, local_drop=0.5, global_ratio=0),
        per_sample,
    ):
        results = []
        for f in (net, compiled):
            net.load_state_dict(start)
            net.zero_grad()
            x.grad = None
            loss = F.cross_entropy(f(x, path=path), target)
            loss.backward()
            results.append(
                [loss.detach(), x.grad, *(p.grad for p in net.parameters()), *map(torch.clone, net.buffers())]
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck(cpu_backend):
    s = (torch.randn(4, 3, 3, 3), torch.randn(2, 2, 3, 3))
    x, vector = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.rand(3, 2) + 0.5
    weights = [w.to(memory_format=torch.channels_last) for w in s]
    path = full_path(1, 2).keep[0]
    forward = torch.ops.fractal_kernels.block_forward.default
    options = (0.0, 1e-5, 10)
    arguments = (x, weights, None, vector, vector, None, None, path, False, None, *options, True, True, cpu_backend, "")
    torch.library.opcheck(forward, arguments)
    out, count, mean, var, *saved = forward(*arguments)
    backward = torch.ops.fractal_kernels.block_backward.default
    for needs in ([True, True, True], [False, True, False], [False, False, False]):
        tail = (False, True, needs, False, *options, True, cpu_backend, "")
        torch.library.opcheck(
            backward, (torch.randn_like(out), x, weights, vector, vector, mean, var, count, path, saved, *tail)
        )


def test_float64_is_none_of_autocasts_business():
    net = fractalnet.FractalNet(10, 2, (8,), image_size=8).double().eval()
    x, path = torch.randn(2, 3, 8, 8, dtype=torch.float64), full_path(1, 2)
    expected = net.blocks[0](x, path.keep[0], path.alone)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.blocks[0](x, path.keep[0], path.alone), expected)
