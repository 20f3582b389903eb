"""Where the choice of a tile comes from: the cache, the table, the rule, and tuning with a fake clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, needs_gpu, on_backend

pytest.importorskip("triton", reason="Triton is not installed")
from test_tiles import CASE, LAUNCHERS, tensors  # noqa: E402
from test_triton import PLAIN, SINGLE  # noqa: E402

from fractal_kernels.triton import config, tuning  # noqa: E402
from fractal_kernels.triton.config import Case  # noqa: E402

HERE = Path(__file__).resolve().parent
MACHINE = ("a_GPU-sm_90-torch2-triton3-fractal0", "sm_90")
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


# --- where a choice comes from -------------------------------------------------------------------


def test_order(monkeypatch):
    assert config.look_up(CASE) == RULE
    give_table(monkeypatch, {CASE.key(): list(OTHER)})
    assert config.look_up(CASE) == RULE  # found once, it is not looked for again
    config.chosen.clear()
    assert config.look_up(CASE) == OTHER
    put(THIRD)
    config.chosen.clear()
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
    config.chosen.clear()
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
        config.chosen.clear()
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
    config.chosen.clear()  # another process
    monkeypatch.delenv("FRACTAL_TUNE")
    assert config.look_up(CASE) == THIRD
    record = json.loads(path_of().read_text())
    assert record["milliseconds"]["x".join(map(str, OTHER))] == 0.5
    assert len(record["milliseconds"]) == len(CASE.candidates())
    assert [p.name for p in path_of().parent.iterdir()] == [path_of().name]  # no temporary file is left


def test_noise_is_no_gain(monkeypatch, asked):
    assert tuned(Clock(monkeypatch, {OTHER: 0.99})) == RULE
    config.chosen.clear()
    assert config.look_up(CASE) == RULE  # it is kept too: the next process does not tune again


def test_not_unless_asked(monkeypatch):
    for value in ("", "0"):
        monkeypatch.setenv("FRACTAL_TUNE", value)
        config.chosen.clear()
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
import test_tuning
from fractal_kernels.triton import tuning
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


@pytest.mark.gpu
@needs_gpu
def test_capture_does_not_tune(asked):
    with on_backend("triton"):
        _, args = tensors(SINGLE, 2, PLAIN, True, True, True, (32, 64, 16, 16))["join_forward"]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        os.environ.pop("FRACTAL_TUNE")  # the kernel must be compiled before the capture
        LAUNCHERS.join_forward(*args)
        os.environ["FRACTAL_TUNE"] = "1"
        config.chosen.clear()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=stream):
            LAUNCHERS.join_forward(*args)
        assert not tuning.cache_folder().exists()
        LAUNCHERS.join_forward(*args)
        assert len(list(tuning.cache_folder().glob("*/*.json"))) == 1


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
