"""The Triton backend without a GPU: under the interpreter, as machine code, and in bytes; and on one (``-m gpu``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, check, draw
from conftest import INTERPRETED, on_backend

from fractal_kernels import BackendUnavailable, available_backends, masked_mean_join
from fractal_kernels.library import POOL, Flags

pytest.importorskip("triton", reason="Triton is not installed")
import triton_aot  # noqa: E402

import fractal_kernels.triton as launchers  # noqa: E402
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
        "pools_of_odd_sizes", "other_ranks", "wide_offsets", "network", "opcheck", "statistics_of_dropped_branches",
        "dropped_branches_are_not_read", "dropped_sample", "windows_of_minus_infinity", "no_channels", "expanded",
        "only_the_gradients", "running_statistics", "strides_of_2_31", "edges", "few_programs", "windows_with_nan",
        "nothing_is_written_beside", "equals_the_oracle", "dropped_of_a_shortcut", "infinite_shortcut",
    )
)  # fmt: skip
# Of several workers, which share the cores, each has one: a second would only import PyTorch once more.
PROCESSES = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def interpreted(*command: str) -> subprocess.Popen[str]:
    """TRITON_INTERPRET must be set before Triton is imported, so it takes a process of its own."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), env.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_every_flag_under_the_interpreter():
    """Forward and gradients of every combination of flags against the float64 oracle."""
    files = [str(HERE / f"test_{name}.py") for name in ("ops", "edges", "running", "shortcut", "triton", "gpu")]
    select = f"({TESTS}) and not not_aligned"  # of a GPU's loads, and long: `make interpret` has it
    suite = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files, "-k", select)
    running = [interpreted(*suite, "--shard", f"{i}/{PROCESSES}") for i in range(PROCESSES)]
    for process in running:
        output, _ = process.communicate(timeout=1100)
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


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(mask="sample"),
        Case(mask="sample", stats="live", activation="output"),
        Case(mask="batch", pool="before"),
        Case(pool="after"),
        Case(affine=False, normalise=False, mask="sample", activation="none"),
    ],
    ids=str,
)
def test_few_programs(case, monkeypatch):
    """A program walks several tiles, and a merge's row several partials, as in tensors of a GPU's size."""
    grid = launchers._Call.grid

    def few(call, device):
        programs, blocks = grid(call, device)
        assert call.count > 2 * call.choice.sites or not call.case.channels_last
        return min(programs, 2), blocks

    monkeypatch.setattr(launchers._Call, "grid", few)
    monkeypatch.setattr(config, "merge", lambda channels: config.Tile(1, 4))
    with on_backend("triton") as backend:
        for layout in ("channels_last", "contiguous"):
            check(case, draw(case, SINGLE, (3, 3, 21, 20), [layout]), backend)


def guarded(shape: tuple[int, ...], layout: torch.memory_format) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor between numbers that nobody may write over, and these."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 8192,), 7.0)
    inner = memory[4096 : 4096 + size]
    if layout == torch.channels_last:
        n, c, h, w = shape
        return inner.view(n, h, w, c).permute(0, 3, 1, 2), [memory[:4096], memory[4096 + size :]]
    return inner.view(shape), [memory[:4096], memory[4096 + size :]]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [PLAIN, BEFORE, AFTER])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_nothing_is_written_beside_the_outputs(layout, flags):
    """Not by lanes of a tile beyond the last channel or site."""
    k, c, shape = 2, 5, (2, 5, 5, 7)
    small, last = (2, 5, 2, 3) if flags & POOL else shape, layout == torch.channels_last
    with on_backend("triton"):
        ys = [torch.randn(shape).to(memory_format=layout) for _ in range(k)]
        grad = torch.randn(small).to(memory_format=layout)
        norm = [[torch.rand(c) + 0.5 for _ in range(k)] for _ in range(4)]
        shapes = [small, shape, shape, (k, c), (k, c), (k,), *[(c,)] * (2 * k)]
        made = [guarded(s, layout if len(s) == 4 else torch.contiguous_format) for s in shapes]
        out, dy, dx, s, t, count, *running = (tensor for tensor, _ in made)
        launchers.channel_stats(s, t, count, ys, None, running, 0.1, None, last)
        launchers.join_backward_reduce(s, t, grad, ys, None, *norm, 1e-5, flags, last)
        launchers.join_forward(out, ys, None, *norm, 1e-5, flags, last)
        launchers.join_backward_apply([dy, dx], grad, ys, None, *norm, [s, t, count], 1e-5, flags, last)
    for tensor, guards in made:
        assert all((guard == 7).all() for guard in guards) and not (tensor == 7).any()


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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_machine_code_where_rows_are_cut(dtype):
    """Statistics of planes of 7x7: a load of several pixels would be of two channels."""
    y, rows, count = torch.empty(32, 64, 7, 7, dtype=dtype), torch.empty(1, 64), torch.empty(1)
    mask = torch.ones(1, 32, dtype=torch.bool)
    with triton_aot.compiling(90) as codes:
        triton_aot.launchers.channel_stats(rows, rows, count, [y], mask, [], 0.1, None, False)
    stats = codes[0]
    assert stats.name == "channel_stats" and stats.spills == stats.stack == stats.double == 0, stats
    assert stats.registers <= config.CONTIGUOUS_STATS[0], stats


def check_code(setting, code):
    dtype, k, flags, channels_last, _ = setting
    assert code.spills == 0 and code.stack == 0, (setting, code)
    assert code.double == 0, (setting, code)
    writes = {"join_forward": 1, "join_backward_apply": k}.get(code.name)
    if channels_last and k <= (3 if flags & POOL else 6):  # no element by itself
        assert not any("U16" in name for name in code.loads), (setting, code)
        assert writes is None or set(code.stores) <= {"STG.E.64", "STG.E.128"}, (setting, code)
    if code.name not in config.MOST_REGISTERS or k > 3 or flags & POOL:
        return
    row = 1 if channels_last else 16 // dtype.itemsize
    assert code.registers <= config.most_registers(code.name, k, False, channels_last, row), (setting, code)
    if channels_last:  # everything but the mask and the counts in 128 bits
        assert set(code.loads) <= {"LDG.E.128", "LDG.E.U8", "LDG.E"}, (setting, code)
        units = config.STATS_UNROLL[True] if code.name == "channel_stats" else 1
        assert code.loads["LDG.E.128"] >= units * k and code.loads.get("LDG.E", 0) <= k, (setting, code)
    else:  # a value per channel is one number to a program
        units = config.ROW_UNROLL if code.name == "channel_stats" else 1
        assert code.loads["LDG.E.128"] == units * k + (code.name.startswith("join_backward")), (setting, code)
    assert writes is None or code.stores == {"STG.E.128": writes}, (setting, code)


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(mask="sample"),
        Case(mask="sample", stats="live", pool="before"),
        Case(pool="after"),
        Case(mask="batch"),
        Case(affine=False, normalise=False, mask="sample", activation="none"),
    ],
    ids=str,
)
def test_wide_offsets(case, monkeypatch):
    """The code for tensors of more than 2**31 elements, on small ones."""
    monkeypatch.setattr("fractal_kernels.triton._is_wide", lambda tensors: True)
    with on_backend("triton") as backend:
        for layout in ("channels_last", "contiguous"):
            check(case, draw(case, SINGLE, layouts=[layout]), backend)
