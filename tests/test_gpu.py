"""The backends of a GPU (``-m gpu``): what needs one, and a network. Their flags and layouts are in test_ops.py."""

from __future__ import annotations

import mmap

import pytest
import test_batchnorm
import test_compile
import torch
from cases import Case, assert_results, assert_same_bits, draw, expect, run
from conftest import INTERPRETED, SIMULATED, TWIN, needs_gpu

from fractal_kernels import bn_relu_join, masked_mean_join, use_backend

HALF, SINGLE = torch.bfloat16, torch.float32
CASES = [Case(mask="sample"), Case(mask="sample", stats="live", pool="before"), Case(pool="after"), Case(mask="batch")]


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_network(granularity, gpu_backend):
    """A training step of a FractalNet against the reference backend: loss, gradients and running statistics."""
    import fractalnet

    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    results = []
    for name in ("reference", gpu_backend):
        torch.manual_seed(0)
        net = fractalnet.FractalNet(5, 3, (8, 16), image_size=8, granularity=granularity)
        path = net.sample_path(4, generator=torch.Generator("cpu").manual_seed(3))
        with use_backend(name):
            loss = torch.nn.functional.cross_entropy(net(x, path=path), y)
            loss.backward()
        results.append([loss, *(p.grad for p in net.parameters()), *net.buffers()])
    assert len(results[0]) > 10
    for got, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=str)
def test_many_tiles(case, dtype, gpu_backend):
    """Every program of the grid walks several tiles; repeats give the same bits."""
    for layout in ("channels_last", "contiguous", "channel_slice"):
        data = draw(case, dtype, (64, 96, 56, 56), [layout])
        result, expected = run(case, data, gpu_backend), expect(case, data)
        assert_same_bits(result, run(case, data, gpu_backend))
        if dtype == SINGLE:  # a channel's sums are of many float32 terms; what they add to an input's is small
            for a, e in zip(result.grads[3:], expected.grads[3:], strict=True):
                bound = 2e-6 * max(1.0, e.abs().max().item()) * data.ys[0][:, 0].numel() ** 0.5
                assert (a.double() - e).abs().max() <= bound
            result.grads[3:] = expected.grads[3:]
        assert_results(case, data, result, expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", test_batchnorm.FAR_SHAPES, ids=str)
def test_statistics_far_from_zero(shape, layout, gpu_backend):
    test_batchnorm.test_statistics_where_the_mean_is_5000_standard_deviations(shape, layout, gpu_backend)


@needs_gpu
def test_compiled(gpu_backend):
    """The compiler's own code around the operators: a join's output, gradients and statistics, and a network's."""
    import fractalnet

    case = CASES[0]
    data = draw(case, SINGLE, (4, 16, 8, 8))
    test_compile.assert_compiled_equals_eager(
        lambda d: torch.sin(test_compile.join(d, case, gpu_backend)), data, "inductor", atol=1e-5
    )
    net, results = fractalnet.FractalNet(5, 2, (8, 16), image_size=8), []
    x, path = torch.randn(4, 3, 8, 8), fractalnet.drop_path.full_path(2, 2)
    began = {key: value.clone() for key, value in net.state_dict().items()}
    for call in (net, torch.compile(net)):
        net.load_state_dict(began)
        with use_backend(gpu_backend):
            out = call(x, path=path)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters())), *net.buffers()])
        results[-1] = [t.detach().clone() for t in results[-1]]
    for got, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_capture(case, gpu_backend):
    """A captured forward and backward, replayed on other inputs, on a stream that is not the default one."""
    first, second = (draw(case, SINGLE, (8, 32, 14, 14), seed=seed) for seed in (0, 1))
    static = first.copy()

    def step():
        args = (static.ys, static.weights, static.biases, static.running_means, static.running_vars, static.mask)
        out = bn_relu_join(*args, True, **case.flags, backend=gpu_backend)
        return [out, *torch.autograd.grad(out, static.leaves, static.grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for to, from_ in zip(static.leaves, second.leaves, strict=True):
            to.copy_(from_)
        static.grad.copy_(second.grad)
        if static.mask is not None:
            static.mask.copy_(second.mask)
    graph.replay()
    expected = run(case, second, gpu_backend)
    for a, b in zip(captured, [expected.out, *expected.grads], strict=True):
        assert torch.equal(a.detach(), b)


@needs_gpu
def test_second_device(gpu_backend):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there are {torch.cuda.device_count()}")
    ys = [torch.randn(4, 8, 6, 6, device="cuda:1") for _ in range(2)]
    expected = masked_mean_join(ys, backend="reference")
    torch.testing.assert_close(masked_mean_join(ys, backend=gpu_backend), expected)


MOST_BYTES = 16 << 30  # of one test


@pytest.fixture
def gives_memory_back():
    """Other processes of the suite share the GPU; and one may be too small."""
    if not (INTERPRETED or TWIN or SIMULATED) and (free := torch.cuda.mem_get_info()[0]) < MOST_BYTES:
        pytest.skip(f"needs {MOST_BYTES} bytes of the GPU's memory, of which {free} are free")
    yield
    torch.cuda.empty_cache()


@needs_gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_more_than_2_31_elements(layout, gpu_backend, gives_memory_back):
    """Samples at both ends of the tensors, against the same samples alone."""
    shape = (36, 64, 1024, 1024)
    ys = [torch.empty(shape, dtype=HALF, device="cuda", memory_format=layout).normal_() for _ in range(2)]
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    options = dict(training=False, activation="branch")
    out = bn_relu_join(ys, None, None, [mean] * 2, [var] * 2, backend=gpu_backend, **options)
    for n in (0, 17, 35):
        alone = [y[n : n + 1].clone(memory_format=layout) for y in ys]
        assert torch.equal(
            out[n : n + 1], bn_relu_join(alone, None, None, [mean] * 2, [var] * 2, backend=gpu_backend, **options)
        )
    del out
    stats = torch.ops.fractal_kernels.channel_stats(ys[:1], None, [], 0.0, None, gpu_backend)
    parts = [
        torch.ops.fractal_kernels.channel_stats([part], None, [], 0.0, None, gpu_backend) for part in ys[0].chunk(4)
    ]
    torch.testing.assert_close(stats[0], sum(p[0] for p in parts) / 4, rtol=1e-4, atol=1e-6)
    between = torch.stack([p[0] for p in parts]).var(0, correction=0)
    torch.testing.assert_close(stats[1], sum(p[1] for p in parts) / 4 + between, rtol=1e-4, atol=1e-6)
    grad, ops = ys.pop(), torch.ops.fractal_kernels
    norm = ([mean], [var], [var], [mean], 1e-5, 2, gpu_backend)
    sums = ops.join_backward_reduce(grad, ys, None, *norm)
    parts = [ops.join_backward_reduce(g, [y], None, *norm) for g, y in zip(grad.chunk(4), ys[0].chunk(4), strict=True)]
    for whole, *quarters in zip(sums, *parts, strict=True):  # of 4e7 terms about 1 in size
        torch.testing.assert_close(whole, sum(quarters), rtol=1e-4, atol=1.0)
    (dy,) = ops.join_backward_apply(grad, ys, None, [mean], [var], [var], [mean], [], 1, 1e-5, 2, gpu_backend)
    for n in (0, 35):
        args = (grad[n : n + 1], [ys[0][n : n + 1]], None, [mean], [var], [var], [mean], [], 1, 1e-5, 2, gpu_backend)
        assert torch.equal(dy[n : n + 1], ops.join_backward_apply(*args)[0])


FAR = 3_900_000_000  # of two bytes, so that four processes fit on a GPU; on the host a few pages are touched


def far_from(near: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The same values, some of them more than 2**31 numbers from the first."""
    if SIMULATED or INTERPRETED:
        memory = mmap.mmap(-1, 2 * FAR, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        far = torch.frombuffer(memory, dtype=torch.float16)
    else:
        far = torch.empty(FAR, dtype=torch.float16)
    return far.as_strided(near.shape, strides).copy_(near)


@pytest.mark.parametrize(
    ("shape", "strides", "pool"),
    [
        ((1, 2, 2, 2), (0, 1, 1_440_000_000, 720_000_000), "before"),  # a window's last pixel
        ((1, 2, 4, 2), (0, 1, 1_100_000_000, 550_000_000), "before"),  # a second window's row
        ((1, 2, 2, 2), (0, 2_200_000_000, 2, 1), None),  # a channel
        ((1, 3, 2, 2), (0, 1_100_000_000, 2, 1), "before"),  # a third channel, of a stride below 2**31
        ((1, 2, 2, 2), (0, 1, 1_440_000_000, 720_000_000), None),  # pixels, and those of the gradient
        ((2, 2, 2, 2), (2_200_000_000, 1, 4, 2), None),  # a sample
        ((2, 2, 2, 2), (2_200_000_000, 4, 2, 1), None),
    ],
    ids=str,
)
def test_strides_of_2_31_elements(shape, strides, pool, gpu_backend, gives_memory_back):
    channels = shape[1]
    layout = torch.channels_last if strides[1] == 1 else torch.contiguous_format
    near = torch.randn(shape).half().to(memory_format=layout)
    grad = (
        torch.randn(1, channels, shape[2] // 2, 1).half()
        if pool
        else torch.randn(shape).half().to(memory_format=layout)
    )
    stats = [torch.zeros(channels)], [torch.ones(channels)]
    results = []
    for y, g in ((near, grad), (far_from(near, strides), grad if pool else far_from(grad, strides))):
        y.requires_grad_()
        w, b = torch.ones(channels).requires_grad_(), torch.zeros(channels).requires_grad_()
        out = bn_relu_join([y], [w], [b], *stats, training=False, pool=pool, backend=gpu_backend)
        results.append([out, *torch.autograd.grad(out, [y, w, b], g)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strides", [(0, 1, 1_100_000_000), (0, 1_100_000_000, 1)], ids=str)
def test_statistics_of_strides_of_2_31_elements(strides, gpu_backend, gives_memory_back):
    near = torch.randn(1, 3, 2).half()
    far = far_from(near, strides)
    near = near.transpose(1, 2).contiguous().transpose(1, 2) if strides[1] == 1 else near
    stats = [torch.ops.fractal_kernels.channel_stats([y], None, [], 0.0, None, gpu_backend) for y in (near, far)]
    for a, b in zip(*stats, strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_almost_2_31_pixels(gpu_backend):
    """One more tile would not be counted in 32 bits. All of them are one value in memory."""
    count = 2**31 - 8
    y = torch.full((1, 1), 3.0, device="cuda").expand(count, 1)
    if gpu_backend == "cuda":  # which counts samples in 32 bits and refuses what is near their end
        with pytest.raises(RuntimeError, match="expected at most"):
            torch.ops.fractal_kernels.channel_stats([y], None, [], 0.0, None, gpu_backend)
        return
    mean, var, number = torch.ops.fractal_kernels.channel_stats([y], None, [], 0.0, None, gpu_backend)
    assert mean.item() == 3 and var.item() == 0 and number.item() == pytest.approx(count, rel=1e-5)


@pytest.mark.parametrize("mask", [None, "sample"])
def test_opcheck(mask, gpu_backend):
    y = [torch.randn(3, 4, 6, 6) for _ in range(2)]
    m = None if mask is None else torch.rand(2, 3) < 0.7
    ops, v = torch.ops.fractal_kernels, [torch.rand(4) + 0.5 for _ in range(2)]
    g = torch.randn(3, 4, 6, 6)
    for op, args in (
        (ops.channel_stats, (y, m, [*v, *v], 0.1, m if m is None else torch.rand(2), gpu_backend)),
        (ops.join_forward, (y, m, v, v, v, v, 1e-5, 2, gpu_backend)),
        (ops.join_backward_reduce, (g, y, m, v, v, v, v, 1e-5, 2, gpu_backend)),
        (ops.join_backward_apply, (g, y, m, v, v, v, v, [], 2, 1e-5, 2, gpu_backend)),
    ):
        try:
            torch.library.opcheck(op.default, args)
        except ModuleNotFoundError as error:  # of older PyTorch
            pytest.skip(f"torch.library.opcheck: {error}")
