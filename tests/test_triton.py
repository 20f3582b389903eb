"""The Triton backend without a GPU: under the interpreter, as machine code, and in bytes; and on one (``-m gpu``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_batchnorm
import torch
from cases import Case, assert_results, assert_same_bits, check, draw, expect, run
from conftest import INTERPRETED, on_backend

from fractal_kernels import BackendUnavailable, available_backends, bn_relu_join, masked_mean_join, use_backend
from fractal_kernels.library import Flags

pytest.importorskip("triton", reason="Triton is not installed")
import triton_aot  # noqa: E402

from fractal_kernels.triton import config  # noqa: E402

HERE = Path(__file__).resolve().parent
TRAFFIC = HERE.parent / "benchmarks" / "results" / "triton" / "traffic.json"
HALF, SINGLE = torch.bfloat16, torch.float32
PLAIN, BEFORE, AFTER = Flags.RELU_BRANCH, Flags.RELU_BRANCH | Flags.POOL_BEFORE, Flags.RELU_BRANCH | Flags.POOL_AFTER

# --- under the interpreter -----------------------------------------------------------------------

# What the interpreter is given; the whole of test_ops.py takes half an hour (make interpret).
TESTS = " or ".join(
    f"test_{name}"
    for name in (
        "all_flags", "plain_flags", "number_of_branches", "everything_dropped", "empty_batch", "mask_dtypes",
        "pools_of_odd_sizes", "other_ranks", "wide_offsets", "network",
    )
)  # fmt: skip
PROCESSES = 2


def interpreted(*command: str) -> subprocess.Popen[str]:
    """TRITON_INTERPRET must be set before Triton is imported, so it takes a process of its own."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_every_flag_under_the_interpreter():
    """Forward and gradients of every combination of flags against the float64 oracle."""
    files = (str(HERE / "test_ops.py"), str(HERE / "test_triton.py"))
    suite = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files, "-k", TESTS)
    running = [interpreted(*suite, "--shard", f"{i}/{PROCESSES}") for i in range(PROCESSES)]
    for process in running:
        output, _ = process.communicate(timeout=1800)
        assert process.returncode == 0 and " passed" in output, output[-3000:]


def test_every_byte_is_moved_once():
    """The kernels' loads and stores, counted by the interpreter, are the minimum and those of the committed table."""
    process = interpreted(str(HERE / "triton_traffic.py"))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    rows = json.loads(output)
    assert rows == json.loads(TRAFFIC.read_text())
    assert len(rows) >= 20
    for row in rows:
        assert row["bytes_per_element"] == row["minimum"], row


# --- machine code --------------------------------------------------------------------------------

SETTINGS = [
    *((dtype, k, PLAIN, True, True) for dtype in (HALF, SINGLE, torch.float16) for k in (1, 3)),
    *((dtype, 8, PLAIN, True, True) for dtype in (HALF, SINGLE)),
    *((dtype, 3, pool, True, True) for dtype in (HALF, SINGLE) for pool in (BEFORE, AFTER)),
    *((dtype, 3, PLAIN, False, False) for dtype in (HALF, SINGLE)),
    (SINGLE, 8, AFTER, True, True),
    (HALF, 3, Flags.RELU_OUTPUT | Flags.SUM, True, False),
]
if os.environ.get("FRACTAL_AOT") == "all":  # make aot
    SETTINGS = list(triton_aot.everything())


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_machine_code(setting, capability):
    with triton_aot.compiling(capability) as codes:
        triton_aot.call_all(*setting)
    assert {code.name for code in codes} == set(triton_aot.KERNELS)
    for code in codes:
        check_code(setting, code)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("wide", [False, True])
def test_machine_code_of_plain_joins(wide, monkeypatch):
    monkeypatch.setattr(triton_aot.launchers, "_is_wide", lambda tensors: wide)
    with triton_aot.compiling(90) as codes:
        for channels_last in (True, False):
            for masked in (True, False):
                triton_aot.call_plain(HALF, 3, channels_last, masked)
        if wide:
            triton_aot.call_all(HALF, 3, PLAIN, True, True)
            triton_aot.call_all(SINGLE, 2, BEFORE, False, True)
    assert len(codes) == 16 + 12 * wide
    for code in codes:
        assert code.spills == code.stack == code.double == 0, code
        assert code.registers <= 204, code


def check_code(setting, code):
    dtype, k, flags, channels_last, _ = setting
    assert code.spills == 0 and code.stack == 0, (setting, code)
    assert code.double == 0, (setting, code)
    if code.name not in config.MOST_REGISTERS or k > 3 or flags.pool:
        return
    assert code.registers <= config.MOST_REGISTERS[code.name], (setting, code)
    if channels_last:  # everything but the mask and the counts in 128 bits
        assert set(code.loads) <= {"LDG.E.128", "LDG.E.U8", "LDG.E"}, (setting, code)
        assert code.loads["LDG.E.128"] >= k and code.loads.get("LDG.E", 0) <= k, (setting, code)
        if code.name in ("join_forward", "join_backward_apply"):
            assert code.stores == {"STG.E.128": 1 if code.name == "join_forward" else k}, (setting, code)
    else:  # a value per channel is one number to a program
        assert code.loads["LDG.E.128"] == k + (code.name.startswith("join_backward")), (setting, code)


# --- dispatch ------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_named_on_the_cpu():
    with pytest.raises(BackendUnavailable, match="masked_mean_join: expected backend to be usable here, got 'triton'"):
        masked_mean_join([torch.ones(2, 3)], backend="triton")
    assert ("triton" in available_backends()) == torch.cuda.is_available()


def test_without_triton(monkeypatch):
    monkeypatch.setattr("fractal_kernels.backends._has_triton", False)
    assert "triton" not in available_backends()
    with pytest.raises(BackendUnavailable, match="Triton is not installed; on Linux: pip install triton"):
        masked_mean_join([torch.ones(2, 3)], backend="triton")


def test_float64_is_refused(monkeypatch):
    monkeypatch.setattr("fractal_kernels.backends._interpreted", True)
    message = (
        "masked_mean_join: expected inputs of dtype float32, float16, bfloat16 on the backend 'triton', got float64"
    )
    with pytest.raises(TypeError, match=message):
        masked_mean_join([torch.ones(2, 3, dtype=torch.float64)], backend="triton")


# --- on a GPU ------------------------------------------------------------------------------------

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a GPU, not the interpreter")]


def gpu(test):
    for mark in on_a_gpu:
        test = mark(test)
    return test


CASES = [Case(mask="sample"), Case(mask="sample", stats="live", pool="before"), Case(pool="after"), Case(mask="batch")]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [*CASES, Case(affine=False, normalise=False, mask="sample", activation="none")], ids=str
)
def test_wide_offsets(case, monkeypatch):
    """The code for tensors of more than 2**31 elements, on small ones."""
    monkeypatch.setattr("fractal_kernels.triton._is_wide", lambda tensors: True)
    with on_backend("triton") as backend:
        for layout in ("channels_last", "contiguous"):
            check(case, draw(case, SINGLE, layouts=[layout]), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_network(granularity):
    """A training step of a FractalNet against the reference backend: loss, gradients and running statistics."""
    import fractalnet

    with on_backend("triton"):
        x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
        results = []
        for name in ("reference", "triton"):
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


@gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.float16], ids=str)
def test_many_tiles(case, dtype):
    """Every program of the grid walks several tiles; repeats give the same bits."""
    with on_backend("triton") as backend:
        for layout in ("channels_last", "contiguous", "channel_slice"):
            data = draw(case, dtype, (64, 96, 56, 56), [layout])
            result = run(case, data, backend)
            expected = expect(case, data)
            if dtype == SINGLE:
                scale = data.ys[0].numel() ** 0.5  # sums of many float32 terms
                for a, e in zip(result.grads, expected.grads, strict=True):
                    assert (a.double() - e).abs().max() <= 1e-6 * max(1.0, e.abs().max().item()) * scale
                torch.testing.assert_close(result.out.double(), expected.out, rtol=1e-5, atol=1e-5)
            else:
                assert_results(case, result, expected)
            assert_same_bits(result, run(case, data, backend))


@gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", test_batchnorm.FAR_SHAPES, ids=str)
def test_statistics_far_from_zero(shape, layout):
    with on_backend("triton") as backend:
        test_batchnorm.test_statistics_where_the_mean_is_5000_standard_deviations(shape, layout, backend)


@gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_capture(case):
    """A captured forward and backward, replayed on other inputs, on a stream that is not the default one."""
    with on_backend("triton") as backend:
        first, second = (draw(case, SINGLE, (8, 32, 14, 14), seed=seed) for seed in (0, 1))
        static = first.copy()

        def step():
            args = (static.ys, static.weights, static.biases, static.running_means, static.running_vars, static.mask)
            out = bn_relu_join(*args, True, **case.flags, backend=backend)
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
        expected = run(case, second, backend)
        for a, b in zip(captured, [expected.out, *expected.grads], strict=True):
            assert torch.equal(a.detach(), b)


@gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there are {torch.cuda.device_count()}")
    ys = [torch.randn(4, 8, 6, 6, device="cuda:1") for _ in range(2)]
    expected = masked_mean_join(ys, backend="reference")
    torch.testing.assert_close(masked_mean_join(ys, backend="triton"), expected)


@gpu
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_more_than_2_31_elements(layout):
    """Samples at both ends of the tensors, against the same samples alone."""
    shape = (36, 64, 1024, 1024)
    ys = [torch.empty(shape, dtype=HALF, device="cuda", memory_format=layout).normal_() for _ in range(2)]
    mean, var = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    options = dict(training=False, activation="branch")
    out = bn_relu_join(ys, None, None, [mean] * 2, [var] * 2, backend="triton", **options)
    for n in (0, 17, 35):
        alone = [y[n : n + 1].clone(memory_format=layout) for y in ys]
        assert torch.equal(
            out[n : n + 1], bn_relu_join(alone, None, None, [mean] * 2, [var] * 2, backend="triton", **options)
        )
    stats = torch.ops.fractal_kernels.channel_stats(ys[:1], None, "triton")
    parts = [torch.ops.fractal_kernels.channel_stats([part], None, "triton") for part in ys[0].chunk(4)]
    torch.testing.assert_close(stats[0], sum(p[0] for p in parts) / 4, rtol=1e-4, atol=1e-6)


@gpu
@pytest.mark.parametrize("mask", [None, "sample"])
def test_opcheck(mask):
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    y = [torch.randn(3, 4, 6, 6, device="cuda") for _ in range(2)]
    m = None if mask is None else torch.rand(2, 3, device="cuda") < 0.7
    ops, v = torch.ops.fractal_kernels, [torch.rand(4, device="cuda") + 0.5 for _ in range(2)]
    g = torch.randn(3, 4, 6, 6, device="cuda")
    for op, args in (
        (ops.channel_stats, (y, m, "triton")),
        (ops.join_forward, (y, m, v, v, v, v, 1e-5, 2, "triton")),
        (ops.join_backward_reduce, (g, y, m, v, v, v, v, 1e-5, 2, "triton")),
        (ops.join_backward_apply, (g, y, m, v, v, v, v, [], 2, 1e-5, 2, "triton")),
    ):
        torch.library.opcheck(op.default, args)
