"""The kernel benchmarks of a GPU, rehearsed on the CPU: contenders agree and run, and rows hold what plots read."""

from __future__ import annotations

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_gpu, bench_gpu_ops

SHAPE = (4, 16, 8, 8)
LAYOUTS = (torch.channels_last, torch.contiguous_format)
CASES = [(torch.bfloat16, LAYOUTS[0]), (torch.float16, LAYOUTS[1]), (torch.float32, LAYOUTS[1])]


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e-3 + 1e3 * (other.at - self.at)


class Graph:
    replayed = 0

    def replay(self):
        Graph.replayed += 1


@contextmanager
def graph(_):
    yield


@pytest.fixture
def rows(monkeypatch):
    """What is recorded; benchmarks run on small tensors of the CPU, and torch.compile traces only."""
    for module in (bench_gpu, bench_gpu_ops):
        for name, value in {"DEVICE": "cpu", "SHAPE": SHAPE, "REPEATS": 2, "ROUNDS": 2}.items():
            monkeypatch.setattr(module, name, value)
    for function in (bench_gpu.filled, bench_gpu.case, bench_gpu.measure):
        changed = tuple(SHAPE if type(value) is tuple else value for value in function.__defaults__)
        monkeypatch.setattr(function, "__defaults__", changed)
    cuda = {"CUDAGraph": Graph, "graph": graph, "Event": Event, "synchronize": lambda: None}
    cuda |= {"get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1024)}
    cuda |= {"reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 1, "max_memory_allocated": lambda: 9}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode=None, **options: compiler(f, backend="aot_eager", **options), raising=True
    )
    found = []
    yield found
    for made in (bench_gpu.compiled, bench_gpu_ops.end_of_block, bench_gpu_ops.conv_block):
        made.cache_clear()
    torch._dynamo.reset()


class Benchmark:
    """pytest-benchmark's, which times nothing here."""

    group = ""

    def pedantic(self, function, **options):
        function()


def comparing(rows):
    def compare(group, what, contenders, rounds, cycle=None, extra=None, case=None):
        for contender in contenders.values():
            contender(0)
        timed = {name: {"figure": 1.0} for name in contenders}
        rows.append((group, set(contenders), extra({"contenders": timed}) if extra else {}, case))

    return compare


@pytest.mark.parametrize("dtype, layout", CASES, ids=str)
@pytest.mark.parametrize("kernel", ["forward", "apply", "reduce", "stats", "mean", "forward_pool", "apply_pool"])
def test_kernels(rows, kernel, dtype, layout):
    for k in (1, 3):
        bench_gpu.measure(Benchmark(), comparing(rows), kernel, dtype, layout, "cpu", k)
    for (group, contenders, extra, case), k in zip(rows, (1, 3), strict=True):
        assert group == "gpu" and contenders == {"ours", "copy"} and 0 < extra["device_share_of_copy"]
        assert case["branches"] == k and case["shape"] == list(SHAPE) and case["op"] == kernel
    assert Graph.replayed


@pytest.mark.parametrize("dtype, layout", CASES[::2], ids=str)
@pytest.mark.parametrize("op", ["bn_relu_join", "masked_mean_join"])
def test_joins(rows, op, dtype, layout):
    with torch._functorch.config.patch(donated_buffer=False):
        for direction in ("forward", "backward"):
            bench_gpu.test_against_compile(Benchmark(), comparing(rows), None, op, direction, dtype, layout, "cpu")
    assert [row[1] for row in rows] == [{"ours", "eager", *bench_gpu.MODES}] * 2
    assert rows[0][2]["device_ms"] > 0 and rows[1][3]["direction"] == "backward"


def test_what_they_keep(rows):
    recorded = []
    for quantity in ("saved", "peak"):
        bench_gpu_ops.test_memory(Benchmark(), lambda *row, **options: recorded.append(row), quantity, "cpu")
    (_, _, saved), (_, _, peak) = recorded
    assert 0 < saved["contenders"]["ours"]["figure"] < saved["contenders"]["eager"]["figure"]
    assert peak["ratios"]["compiled"]["figures"] == 1 and peak["contenders"]["ours"]["figure"] == 8e-6


@pytest.mark.parametrize("name", ["test_end_of_a_residual_block", "test_conv_bn_relu"])
def test_what_they_are_part_of(rows, name):
    getattr(bench_gpu_ops, name)(Benchmark(), comparing(rows), "cpu")
    assert rows[0][1] == {"ours", "eager", *bench_gpu.MODES}


def test_rows_of_convolutions(rows):
    bench_gpu_ops.test_row_of_convs(comparing(rows), (2, 16, 32, 4, 3))
    ((group, contenders, extra, _),) = rows
    assert group == "gpu_rule" and contenders == {"ours", "separate"} and extra["device_ms_separate"] > 0
