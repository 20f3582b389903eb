"""The candidates of the elementwise kernels' tiles: which there are, that they change no bit, their code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, on_backend

from fractal_kernels.library import POOL, Flags

pytest.importorskip("triton", reason="Triton is not installed")
import triton_aot  # noqa: E402
from test_triton import AFTER, BEFORE, HALF, PLAIN, SINGLE, interpreted  # noqa: E402

from fractal_kernels.triton import config, tuning  # noqa: E402
from fractal_kernels.triton.config import Case, Choice  # noqa: E402

HERE = Path(__file__).resolve().parent
FILES = ("test_tiles.py", "test_tuning.py")
LAUNCHERS = triton_aot.launchers
CASE = Case("join_forward", HALF, 3, 0, True, True, True, 64, bits=20, device=0)


SIZES = [(d, c, last) for d in (2, 4) for c in (1, 3, 16, 64, 96, 100, 512, 70000) for last in (True, False)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("elements", [1, 4])
def test_candidates(size, elements):
    """The rule first; few; each a power of two of whole warps, and a thread's load as wide as the rule's."""
    for k in range(1, 9):
        rule = config.tile(k, elements, *size)
        for kernel in config.ELEMENTWISE:
            found = config.candidates(kernel, k, elements, *size)
            assert found[0] == (*rule, config.WARPS, config.PROGRAMS_PER_PROCESSOR)
            assert 5 <= len(found) <= 12 and len(set(found)) == len(found)
            for sites, channels, warps, programs in found:
                per_thread = sites * channels // (32 * warps)
                assert per_thread * 32 * warps == sites * channels and sites >= 1 and programs >= 1
                assert sites & (sites - 1) == channels & (channels - 1) == 0
                assert per_thread in (n := rule.sites * rule.channels // 128, 2 * n)
                assert channels == rule.channels if not size[2] else channels % min(n, rule.channels) == 0
        for kernel in ("channel_stats", "join_backward_reduce"):  # they add up: no choice
            (choice,) = config.candidates(kernel, k, elements, *size)
            assert choice[:3] == (*rule, config.WARPS) and 2 <= choice.programs_per_processor <= 4


def test_rows_are_of_one_channel():
    for dtype, row in ((SINGLE, 4), (HALF, 8)):
        assert config.row_of(dtype, False, 1, 16) == row
        assert config.row_of(dtype, True, 1, 16) == 1  # channels_last
        assert config.row_of(dtype, False, 2, 16) == 1  # more than 65535 channels: a lane walks several
        assert config.row_of(dtype, False, 1, 18) == 1


def test_a_class_has_one_list_of_candidates():
    """Else a choice that is tuned for one call of a class would be none for another."""
    lists = {}
    for channels in range(1, 700):
        for channels_last in (True, False):
            case = CASE._replace(channels=channels, channels_last=channels_last)
            assert lists.setdefault(case.key(), case.candidates()) == case.candidates()
    assert len(lists) > 20


def test_key():
    assert CASE.key() == "join_forward-bfloat16-k3-no_pool-mask-norm-channels_last-c64w64-sites2^19"
    changes = dict(
        kernel="join_backward_apply", dtype=SINGLE, branches=2, pool=int(Flags.POOL_AFTER), masked=False, norm=False,
        channels_last=False, channels=65, bits=21,
    )  # fmt: skip
    assert set(changes) == set(Case._fields) - {"device"}
    keys = {CASE._replace(**{name: value}).key() for name, value in changes.items()} | {CASE.key()}
    assert len(keys) == len(changes) + 1
    assert CASE._replace(channels=63).key() == CASE._replace(device=1).key() == CASE.key()
    assert CASE._replace(pool=int(Flags.POOL_BEFORE)).key() != CASE._replace(pool=int(Flags.POOL_AFTER)).key()


def of_key(key):
    """A call of this class."""
    kernel, dtype, k, pool, mask, norm, layout, channels, sites = key.split("-")
    pools = {name: flag for flag, name in config.POOLS.items()}
    case = Case(
        kernel, getattr(torch, dtype), int(k[1:]), pools[pool], mask == "mask", norm == "norm",
        layout == "channels_last", 0, int(sites.removeprefix("sites2^")) + 1, 0,
    )  # fmt: skip
    most = int(channels[1:].split("w")[0])
    calls = (case._replace(channels=c) for c in range(most, most // 2, -1))
    return next(call for call in calls if call.key() == key)


def test_key_names_a_call():
    for channels in (3, 64, 96, 1000):
        for channels_last in (True, False):
            key = CASE._replace(channels=channels, channels_last=channels_last).key()
            assert of_key(key).key() == key


def tensors(dtype, k, flags, channels_last, masked, norm, shape):
    """Outputs to be written and the arguments of both launchers."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, c, h, w = shape
    small = (n, c, h // 2, w // 2) if flags & POOL else shape
    ys = [torch.randn(shape).to(dtype, memory_format=form) for _ in range(k)]
    out, grad = (torch.randn(small).to(dtype, memory_format=form) for _ in range(2))
    dys = [torch.empty_like(y) for y in ys]
    vectors = [[torch.rand(c) + 0.5 for _ in range(k)] if norm else [] for _ in range(4)]
    mask = torch.rand(k, n) < 0.7 if masked else None
    sums = [torch.randn(k, c), torch.randn(k, c), torch.full((k,), float(n * h * w))] if norm else []
    forward = (out, ys, mask, *vectors, 1e-5, int(flags), channels_last)
    apply = (dys, grad, ys, mask, *vectors, sums, 1e-5, int(flags), channels_last)
    return {"join_forward": ([out], forward), "join_backward_apply": (dys, apply)}


SAME = [
    (dtype, k, flags, channels_last, k != 1, norm)
    for k in (1, 3, 8)
    for flags in (PLAIN, BEFORE, AFTER)
    for channels_last in (True, False)
    for dtype, norm in [(HALF, True) if k == 3 else (SINGLE, flags != PLAIN)]
]


def everything(expected, case, launch, outputs):
    """Stands in for the tuning: runs every candidate and compares."""
    assert len(case.candidates()) >= 5
    # The interpreter has no warps, and more programs than these few sites fill.
    for choice in {o[:2] if INTERPRETED else o: o for o in case.candidates()}.values():
        for out in outputs:
            out.fill_(float("nan"))
        launch(choice)
        assert not any(out.isnan().any() for out in outputs), choice
        expected += [] if expected else [out.clone() for out in outputs]
        assert all(map(torch.equal, outputs, expected)), choice
    return choice


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SAME, ids=str)
def test_every_candidate_gives_the_same_bits(setting, monkeypatch):
    """Sites that end within a tile, channels that end within one, and windows that the edge cuts off."""
    with on_backend("triton"):
        shape = (16, 136, 29, 31)
        if INTERPRETED:
            shape = (2, 40, 3, 5) if setting[3] else (2, 2, 21, 25)
        for kernel, (outputs, args) in tensors(*setting, shape).items():
            expected = []
            monkeypatch.setattr(config, "look_up", lambda case: None)
            monkeypatch.setattr(tuning, "tune", partial(everything, expected))
            getattr(LAUNCHERS, kernel)(*args)
            assert len(expected) == len(outputs)


def test_same_bits_under_the_interpreter():
    suite = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES))
    running = [interpreted(*suite, "-k", "same_bits or launchers_tune", "--shard", f"{i}/2") for i in range(2)]
    for process in running:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0 and " passed" in output, output[-3000:]


MACHINE_CODE = [
    (HALF, 3, PLAIN, True, 64),
    (SINGLE, 3, PLAIN, True, 64),
    (HALF, 1, AFTER, True, 64),
    (SINGLE, 3, BEFORE, False, 64),
]
if os.environ.get("FRACTAL_AOT") == "all":
    MACHINE_CODE = [
        (dtype, k, pool | activation, last, channels)
        for dtype in (HALF, torch.float16, SINGLE)
        for k in range(1, 9)
        for pool in (Flags(0), Flags.POOL_BEFORE, Flags.POOL_AFTER)
        for activation in (Flags.RELU_BRANCH, Flags.RELU_OUTPUT)
        for last, channels in ((True, 64), (True, 256), (False, 64))
    ]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("setting", MACHINE_CODE, ids=str)
def test_machine_code_of_candidates(setting, capability, monkeypatch):
    """No spills, no float64, and loads as wide as the rule's."""
    dtype, k, flags, channels_last, channels = setting
    for kernel, (_, args) in tensors(dtype, k, flags, channels_last, True, True, (2, channels, 32, 32)).items():
        widest = []
        options = config.candidates(kernel, k, 4 if flags & POOL else 1, dtype.itemsize, channels, channels_last)
        for choice in {o[:3]: o for o in options}.values():  # the grid is not compiled
            monkeypatch.setattr(config, "look_up", lambda case, choice=choice: choice)
            with triton_aot.compiling(capability) as codes:
                getattr(LAUNCHERS, kernel)(*args)
            (code,) = codes
            assert code.name == kernel and code.spills == code.stack == code.double == 0, (setting, choice, code)
            bound = config.most_registers(kernel, k, bool(flags & POOL), channels_last)
            assert code.registers <= bound, (setting, choice, code)
            widest.append(max(_width(load) for load in code.loads))
        assert len(widest) > 1 and widest[0] <= min(widest), (setting, kernel, widest)


def _width(load):
    last = load.split(".")[-1].removeprefix("U")
    return int(last) if last.isdigit() else 32


# --- the committed table -------------------------------------------------------------------------


def test_the_table_is_packaged(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=HERE.parent, check=True, env={**os.environ, "FRACTAL_BUILD": "none"}, timeout=120)
    assert (tmp_path / "fractal_kernels/triton/tuned.json").read_text() == tuning.TABLE.read_text()


def test_committed_table():
    """For both kinds; every entry is one of today's candidates, and what is not measured has none."""
    table = json.loads(tuning.TABLE.read_text())
    assert set(table) >= {"sm_80", "sm_90"}
    for part in table.values():
        assert set(part) == {"entries", "measured"}
        assert bool(part["entries"]) != part["measured"].startswith("not yet measured")
        for key, choice in part["entries"].items():
            assert list(map(type, choice)) == [int] * 4, key
            assert Choice(*choice) in of_key(key).candidates(), key
