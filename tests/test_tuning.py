"""The choice of tiles: candidates change no bit, where choices come from, the files, and tuning with a fake clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, on_backend

from fractal_kernels.library import Flags

pytest.importorskip("triton", reason="Triton is not installed")
import triton_aot  # noqa: E402
from test_triton import AFTER, BEFORE, HALF, PLAIN, SINGLE, gpu, interpreted  # noqa: E402

from fractal_kernels.triton import config, tuning  # noqa: E402
from fractal_kernels.triton.config import Case, Choice  # noqa: E402

HERE = Path(__file__).resolve().parent
LAUNCHERS = triton_aot.launchers
MACHINE = ("a_GPU-sm_90-torch2-triton3-fractal0", "sm_90")
CASE = Case("join_forward", HALF, 3, 0, True, True, True, 64, bits=20, device=0)
RULE, OTHER, THIRD = CASE.candidates()[:3]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    """An empty cache and an empty table, on a GPU that is not there."""
    monkeypatch.setattr(config, "chosen", {})
    monkeypatch.setenv("FRACTAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FRACTAL_TUNE", raising=False)
    if not torch.cuda.is_available():
        monkeypatch.setattr(tuning, "machine", lambda device: MACHINE)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    give_table(monkeypatch, {})
    tuning._warn.cache_clear()


def give_table(monkeypatch, entries):
    monkeypatch.setattr(tuning, "_table", lambda: {tuning.machine(0)[1]: {"measured": "", "entries": entries}})


def path_of(case=CASE):
    return tuning.cache_folder() / tuning.machine(0)[0] / f"{case.key()}.json"


def put(choice, case=CASE, **other):
    name, arch = tuning.machine(0)
    record = {"machine": name, "arch": arch, "key": case.key(), "choice": choice, "milliseconds": {}, **other}
    path_of(case).parent.mkdir(parents=True, exist_ok=True)
    path_of(case).write_text(json.dumps(record))


def forget():
    config.chosen.clear()


# --- candidates ----------------------------------------------------------------------------------

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
            assert config.candidates(kernel, k, elements, *size) == ((*rule, config.WARPS, 2),)


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


def tensors(dtype, k, flags, channels_last, masked, norm, shape):
    """Outputs to be written and the arguments of both launchers."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, c, h, w = shape
    small = (n, c, h // 2, w // 2) if flags.pool else shape
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
    suite = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(HERE / "test_tuning.py"))
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
        options = config.candidates(kernel, k, 4 if flags.pool else 1, dtype.itemsize, channels, channels_last)
        for choice in {o[:3]: o for o in options}.values():  # the grid is not compiled
            monkeypatch.setattr(config, "look_up", lambda case, choice=choice: choice)
            with triton_aot.compiling(capability) as codes:
                getattr(LAUNCHERS, kernel)(*args)
            (code,) = codes
            assert code.name == kernel and code.spills == code.stack == code.double == 0, (setting, choice, code)
            bound = 255 if flags.pool or k > 3 else config.MOST_REGISTERS[kernel]
            assert code.registers <= bound, (setting, choice, code)
            widest.append(max(_width(load) for load in code.loads))
        assert len(widest) > 1 and widest[0] <= min(widest), (setting, kernel, widest)


def _width(load):
    last = load.split(".")[-1].removeprefix("U")
    return int(last) if last.isdigit() else 32


# --- where a choice comes from -------------------------------------------------------------------


def test_order(monkeypatch):
    assert config.look_up(CASE) == RULE
    give_table(monkeypatch, {CASE.key(): list(OTHER)})
    assert config.look_up(CASE) == RULE  # found once, it is not looked for again
    forget()
    assert config.look_up(CASE) == OTHER
    put(THIRD)
    forget()
    assert config.look_up(CASE) == THIRD
    assert config.look_up(CASE._replace(bits=21)) == RULE
    assert all(type(n) is int for n in config.look_up(CASE))


def test_a_launch_takes_one_look_up(monkeypatch):
    config.look_up(CASE)
    monkeypatch.setattr(tuning, "find", None)
    assert config.look_up(Case(*CASE)) == RULE


@pytest.mark.parametrize(
    "case", [CASE._replace(device=None), CASE._replace(kernel="channel_stats"), CASE._replace(bits=0)], ids=str
)
def test_what_has_no_choice(case, monkeypatch):
    """Neither a file is read nor anything tuned."""
    monkeypatch.setenv("FRACTAL_TUNE", "1")
    monkeypatch.setattr(tuning, "_load", None)
    assert config.look_up(case) == case.candidates()[0]


def test_of_another_version(monkeypatch):
    """Other versions have another folder; a table's choice that is no candidate any more is ignored."""
    put(OTHER)
    monkeypatch.setattr(tuning, "machine", lambda device: ("a_GPU-sm_90-torch3-triton3-fractal0", "sm_90"))
    assert config.look_up(CASE) == RULE
    forget()
    give_table(monkeypatch, {CASE.key(): [3, 5, 7, 9]})
    assert config.look_up(CASE) == RULE


def test_machine(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU/80GB [x]")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    tuning.machine.cache_clear()
    name, arch = tuning.machine(0)
    tuning.machine.cache_clear()
    assert arch == "sm_90" and name.startswith("Some_GPU_80GB_x_-sm_90-torch")
    assert torch.__version__ in name and "triton3" in name and "fractal0" in name


def test_folder(monkeypatch):
    assert str(tuning.cache_folder()) == os.environ["FRACTAL_CACHE_DIR"]
    monkeypatch.delenv("FRACTAL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(tuning.cache_folder()) == "/x/fractal_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/y")
    assert str(tuning.cache_folder()) == "/home/y/.cache/fractal_kernels"


DAMAGED = {
    "empty": b"",
    "truncated": b'{"machine": "a_GPU',
    "binary": b"\xff\xfe\x00",
    "list": b"[1, 2]",
    "null": b"null",
    "foreign": b'{"hello": 1}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged(damage):
    put(OTHER)
    path_of().write_bytes(DAMAGED[damage])
    with pytest.warns(RuntimeWarning) as caught:
        assert config.look_up(CASE) == RULE
        forget()
        assert config.look_up(CASE) == RULE
    (message,) = (str(w.message) for w in caught)  # once
    assert message.startswith(f"fractal_kernels: ignored {path_of()}: ") and not message.endswith(": ")


@pytest.mark.parametrize(
    "wrong", [{"machine": "another"}, {"key": "another"}, {"choice": [1, 2]}, {"choice": "x"}, {"choice": [3, 5, 7, 9]}]
)
def test_foreign(wrong):
    put(**{"choice": OTHER, **wrong})
    ((what, value),) = wrong.items()
    with pytest.warns(RuntimeWarning, match=rf"ignored .*json: expected {what} .*, got ") as caught:
        assert config.look_up(CASE) == RULE
    assert str(caught[0].message).endswith(repr(value))


# --- tuning --------------------------------------------------------------------------------------


class Clock:
    """Stands in for the timer: a candidate takes the time that it is given, everything else a millisecond."""

    def __init__(self, monkeypatch, times=()):
        self.times, self.ran = dict(times), []
        monkeypatch.setattr(tuning, "_milliseconds", self)

    def __call__(self, launch):
        launch()
        return self.times.get(self.ran[-1], 1.0)

    def launch(self, out):
        def run(choice):
            self.ran.append(choice)
            out.fill_(1.0)

        return run


def tuned(clock, case=CASE):
    out = torch.zeros(4)
    assert config.look_up(case) is None
    return tuning.tune(case, clock.launch(out), [out])


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setenv("FRACTAL_TUNE", "1")


def test_fastest(monkeypatch, asked):
    clock = Clock(monkeypatch, {OTHER: 0.5, THIRD: 0.4})
    assert tuned(clock) == THIRD
    assert set(clock.ran) == set(CASE.candidates())
    assert config.look_up(CASE) == THIRD
    forget()  # another process
    monkeypatch.delenv("FRACTAL_TUNE")
    assert config.look_up(CASE) == THIRD
    record = json.loads(path_of().read_text())
    assert record["milliseconds"]["x".join(map(str, OTHER))] == 0.5
    assert len(record["milliseconds"]) == len(CASE.candidates())
    assert [p.name for p in path_of().parent.iterdir()] == [path_of().name]  # no temporary file is left


def test_noise_is_no_gain(monkeypatch, asked):
    assert tuned(Clock(monkeypatch, {OTHER: 0.99})) == RULE
    forget()
    assert config.look_up(CASE) == RULE  # it is kept too: the next process does not tune again


def test_not_unless_asked(monkeypatch):
    for value in (None, "", "0"):
        if value is not None:
            monkeypatch.setenv("FRACTAL_TUNE", value)
        forget()
        assert config.look_up(CASE) == RULE
    assert not tuning.cache_folder().exists()


def test_what_the_table_has_is_tuned_too(monkeypatch, asked):
    give_table(monkeypatch, {CASE.key(): list(OTHER)})
    assert config.look_up(CASE) is None


def test_not_during_capture(monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert config.look_up(CASE) == RULE
    give_table(monkeypatch, {CASE.key(): list(OTHER)})
    assert config.look_up(CASE) == OTHER
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert config.look_up(CASE) is None  # after the capture


def test_failing_candidates(monkeypatch, asked):
    """One that raises, one whose outputs differ and one that writes nothing, all of them fast."""
    lazy, wrong = CASE.candidates()[3:5]  # the one before writes what the rule does
    clock = Clock(monkeypatch, {OTHER: 0.1, wrong: 0.1, lazy: 0.1, THIRD: 0.8})
    out = torch.zeros(4)

    def launch(choice):
        clock.ran.append(choice)
        if choice == OTHER:
            raise RuntimeError("out of resource: shared memory")
        if choice != lazy:
            out.fill_(1.0 if choice != wrong else 1.0 + 2**-23)

    with pytest.warns(RuntimeWarning, match="differ from the rule's") as caught:
        assert tuning.tune(CASE, launch, [out]) == THIRD
    assert len(caught) == 2


def test_a_rule_that_fails(monkeypatch, asked):
    """No memory for a copy of the outputs, or a call that fails anyhow: the launch itself says more."""
    Clock(monkeypatch)

    def launch(choice):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.warns(RuntimeWarning, match=r"is not tuned: out of memory"):
        assert tuning.tune(CASE, launch, [torch.zeros(4)]) == RULE
    assert config.look_up(CASE) == RULE and not path_of().exists()


def test_unwritable(monkeypatch, asked, tmp_path):
    """One warning for the folder; the process keeps what it tuned. (A file in the way stops the superuser too.)"""
    (tmp_path / "cache").write_text("")
    clock = Clock(monkeypatch, {OTHER: 0.5})
    more = CASE._replace(bits=21)
    with pytest.warns(RuntimeWarning) as caught:
        assert tuned(clock) == tuned(clock, more) == OTHER
    (message,) = (str(w.message) for w in caught)
    assert str(path_of().parent) in message and "cannot be written: " in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.look_up(CASE) == config.look_up(more) == OTHER


def test_a_file_is_replaced_as_a_whole(monkeypatch):
    """What is on the disk is the file before or the file after, also where the writer dies in between."""
    put(OTHER)
    calls = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))

    def replace(old, new):
        calls.append("replace")
        assert os.path.dirname(os.path.dirname(old)) == os.path.dirname(new)  # one file system
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        tuning._keep(path_of(), "{")
    assert calls == ["fsync", "replace"]
    assert config.look_up(CASE) == OTHER
    assert [p.name for p in path_of().parent.iterdir()] == [path_of().name]


WRITER = """
import sys
from fractal_kernels.triton import tuning
from fractal_kernels.triton.config import Choice
import test_tuning
tuning.machine = lambda device: test_tuning.MACHINE
for bits in range(1, 41):
    test_tuning.put_whole(test_tuning.CASE._replace(bits=bits if sys.argv[1] == "a" else bits // 2 + 30))
"""


def put_whole(case):
    """As a process that tunes."""
    record = {"machine": MACHINE[0], "arch": MACHINE[1], "key": case.key(), "choice": OTHER, "milliseconds": {}}
    tuning._keep(path_of(case), json.dumps(record))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU that is not there")
def test_two_processes():
    """They write some of the same classes at once: each class is there, whole, and nothing else."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])}
    running = [subprocess.Popen([sys.executable, "-c", WRITER, name], env=env) for name in "ab"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    expected = {CASE._replace(bits=bits) for bits in range(1, 51)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {config.look_up(case) for case in expected} == {OTHER}
    assert {p.name for p in path_of().parent.iterdir()} == {f"{case.key()}.json" for case in expected}


@pytest.mark.gpu
def test_launchers_tune(monkeypatch, asked):
    """A call whose class is not known tries the candidates, writes what the rule would, and is known from then on."""
    with on_backend("triton"):
        if INTERPRETED:  # on the CPU nothing is tuned by itself
            monkeypatch.setattr(config, "look_up", config.chosen.get)
            monkeypatch.setattr(tuning, "_milliseconds", lambda launch: 1.0)
        calls = tensors(SINGLE, 2, PLAIN, True, True, True, (2, 8, 3, 4) if INTERPRETED else (32, 64, 16, 16))
        for kernel, (outputs, args) in calls.items():
            getattr(LAUNCHERS, kernel)(*args)
            results = [out.clone() for out in outputs]
            (file,) = tuning.cache_folder().glob(f"*/{kernel}-*.json")
            assert len(json.loads(file.read_text())["milliseconds"]) >= 5
            assert len(config.chosen) == 1 + (kernel == "join_backward_apply")
            with monkeypatch.context() as patch:
                patch.setattr(config, "look_up", lambda case: case.candidates()[0])
                getattr(LAUNCHERS, kernel)(*args)
            assert all(map(torch.equal, outputs, results))


@gpu
def test_capture_does_not_tune(asked):
    with on_backend("triton"):
        _, args = tensors(SINGLE, 2, PLAIN, True, True, True, (32, 64, 16, 16))["join_forward"]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        os.environ.pop("FRACTAL_TUNE")  # the kernel must be compiled before the capture
        LAUNCHERS.join_forward(*args)
        os.environ["FRACTAL_TUNE"] = "1"
        forget()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            LAUNCHERS.join_forward(*args)
        assert not tuning.cache_folder().exists()
        LAUNCHERS.join_forward(*args)
        assert len(list(tuning.cache_folder().glob("*/*.json"))) == 1


# --- the table -----------------------------------------------------------------------------------


def cli(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tuning", *arguments])
    tuning.main()


def test_write_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    table = tmp_path / "tuned.json"
    table.write_text(tuning.TABLE.read_text())
    monkeypatch.setattr(tuning, "TABLE", table)
    old = CASE._replace(bits=3)
    put(OTHER)
    put(THIRD, old)
    cli(monkeypatch, "--write-table")
    arch, key = tuning.machine(0)[1], CASE.key()
    assert f"{arch} {key}: None -> {list(OTHER)}" in capsys.readouterr().out.splitlines()
    put(THIRD)
    path_of(old).unlink()
    cli(monkeypatch, "--write-table")
    assert capsys.readouterr().out == f"{arch} {key}: {list(OTHER)} -> {list(THIRD)}\n"
    written = json.loads(table.read_text())
    assert written[arch]["entries"] == {key: list(THIRD), old.key(): list(THIRD)}  # merged, not replaced
    assert written[arch]["measured"] == tuning.machine(0)[0]
    assert f'"{key}": {list(THIRD)}' in table.read_text()  # a line each
    monkeypatch.undo()
    assert set(json.loads(tuning.TABLE.read_text())) == {"sm_80", "sm_90"}


def test_show(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    put(OTHER)
    path_of(CASE._replace(bits=7)).write_text("{}")
    cli(monkeypatch, "--show")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [str(tuning.cache_folder()), f"{tuning.machine(0)[0]} {CASE.key()} {list(OTHER)} {{}}"]


def test_command_line():
    command = [sys.executable, "-W", "error", "-m", "fractal_kernels.triton.tuning", "--show"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == f"{os.environ['FRACTAL_CACHE_DIR']}\n"


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
