"""Runs and what else is in their folders, checkpoints under other names, and losses that are none."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")

from fractalnet import checkpoints, outputs, sources, trained  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.files import UserError  # noqa: E402
from image_files import write_folder  # noqa: E402
from test_runs import written as small  # noqa: E402
from test_train import files_of, quick, whole, written  # noqa: E402, F401  (fixtures too)

FIRST = SimpleNamespace(is_global_zero=True, barrier=lambda: None)  # the first rank, as far as files go
OPTIONS = ["--network.mixture", "alternating", "--network.activation", "silu", "--network.dropout", "null"]


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/resnet.pt",
        "checkpoints/step-best.ckpt",
        "tensorboard/other",
        "model.pt",
        "config.yaml",
        "report.md",
    ],
)
def test_files_of_others_stay(tmp_path, refused, name):
    """Without --overwrite all of them; with it those that a run does not write."""
    out = tmp_path / "run"
    file = out / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    begin = ["train", written(tmp_path, epochs=1), "--out", str(out)]
    refused(begin, [name.partition("/")[0], "which a run writes", "--overwrite", "--out"])
    assert [p for p in out.rglob("*") if p.is_file()] == [file] and file.read_text() == "precious"
    if "/" in name:
        assert main([*begin, "--overwrite"]) == 0
        assert file.read_text() == "precious" and (out / "model.pt").is_file()


def test_what_an_earlier_run_left_goes(tmp_path):
    """Before the first step: what is there afterwards is of the new run."""
    (tmp_path / "mine.txt").touch()
    for name in (*outputs.LOGS, *outputs.RESULTS):
        (tmp_path / name).touch()
    before = sorted([*tmp_path.iterdir(), tmp_path / "checkpoints"])
    for anew, left in ((False, before), (True, [tmp_path / "checkpoints", tmp_path / "mine.txt"])):
        outputs.prepare(FIRST, tmp_path, anew)
        assert sorted(tmp_path.iterdir()) == left


def test_what_a_killed_run_had_not_finished_goes(tmp_path):
    others = [".mine.pt.123.tmp", ".model.pt.before.tmp"]
    for name in (".model.pt.123.tmp", ".config.yaml.9.tmp", *others):
        (tmp_path / name).touch()
    outputs.prepare(FIRST, tmp_path, False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == others


def test_a_file_where_a_folder_will_be(tmp_path, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    begin = ["train", written(tmp_path, epochs=1, tensorboard=True), "--out", str(tmp_path / "run"), "--overwrite"]
    refused(begin, ["tensorboard", "expected a folder, or nothing, got a file"])


def test_half_a_row_of_times(tmp_path):
    """As a machine leaves it that went down: the others count, and the next one is whole."""
    (tmp_path / outputs.TIMES).write_text('{"seconds": 2.0}\n{"seconds": 4')
    log = outputs.Log(FIRST, tmp_path, SimpleNamespace(tensorboard=False), 0, 1)
    log.time({"seconds": 3.0})
    assert outputs.spent(tmp_path, "seconds") == 5.0


def test_eager_has_the_statistics_that_evaluation_takes(tmp_path):
    """Of columns alone, where the full network never ran."""
    argv = ["--compare_eager", "true", "--network.global_ratio", "1.0"]
    assert main(["train", small(tmp_path), "--out", str(tmp_path / "run"), *argv]) == 0
    assert "eager" in json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"]


def test_an_average_goes_on_with_the_paths(tmp_path):
    assert main(["train", small(tmp_path, ema=0.5), "--out", str(tmp_path / "run")]) == 0
    net = trained.unpack(tmp_path / "run" / "model.pt")[0]
    assert net.path_step == 3  # batches of 500 of 1437 images


def test_an_option_that_is_gone_is_a_difference():
    assert outputs.differences({"optimizer": {"lr": 1, "momentum": 0.9}}, {"optimizer": {"lr": 1}}, ()) == [
        "--optimizer.momentum was 0.9, is None"
    ]


def test_epochs_that_are_not_evaluated_are_rows_too(tmp_path):
    log = outputs.Log(FIRST, tmp_path, SimpleNamespace(tensorboard=False), 0, 1)
    rows = [{"epoch": 1, "holdout": {"full": {"loss": 0.5}}}, {"epoch": 2}]
    log.write(rows[1], rows)
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,holdout.full.loss", "1,0.5", "2,"]


@pytest.mark.parametrize("name", ["a.ckpt", "zz.ckpt", "step-best.ckpt"])
def test_resuming_from_a_copy(tmp_path, whole, name):  # noqa: F811
    """Whatever it is called, it is the step that it was written at which says what comes later."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    saved = checkpoints.saved(out / "checkpoints")
    copy = out / "checkpoints" / name
    shutil.copy(saved[0], copy)
    assert checkpoints.saved(out / "checkpoints") == saved  # the copy is none of the run's
    assert main(["train", "--out", str(out), "--resume", str(copy)]) == 0
    assert files_of(out) == files_of(whole)


def test_what_cannot_begin_leaves_the_run_before(tmp_path, whole, refused):  # noqa: F811
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    begin = ["train", written(tmp_path), "--out", str(out), "--overwrite"]
    refused([*begin, "--data.padding", "reflect", "--data.translate", "8"], ["translate", "8x8", "got 8"])
    assert files_of(out) == files_of(whole)


def test_diverged(tmp_path, capsys):
    """No checkpoint of it is written over those from before."""
    out = tmp_path / "run"
    begin = ["train", written(tmp_path, clip=None, accumulate=1, save_every=1), "--out", str(out)]
    assert main([*begin, "--optimizer.lr", "1e30"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "in epoch 1: the training has diverged; lower the lr, in a new run; what was written before is in" in said
    for path in checkpoints.saved(out / "checkpoints"):
        assert torch.load(path, weights_only=True)["loss"].isfinite().all()
    assert not (out / "model.pt").exists()


def test_the_same_bytes_whatever_the_order_of_options(tmp_path):
    """A run that goes on without its recipe has its options in another order."""
    again = [*OPTIONS[4:], *OPTIONS[2:4], *OPTIONS[:2]]
    for name, options in (("a", OPTIONS), ("b", again)):
        assert main(["train", written(tmp_path, epochs=1), "--out", str(tmp_path / name), *options]) == 0
    for name in ("model.pt", "config.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_comparing_leaves_out_what_is_no_run(tmp_path):
    (tmp_path / "a" / "metrics.json").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.json").write_text(json.dumps({"recipe": ["x"], "config": {}, "columns": []}))
    for i, entry in enumerate((None, 3, {"name": "full"}, {"name": "full", "accuracy": None})):
        (tmp_path / str(i)).mkdir()
        other = {"recipe": "digits", "config": {}, "columns": [entry]}
        (tmp_path / str(i) / "metrics.json").write_text(json.dumps(other))
    assert outputs.found(tmp_path) == []


def test_images_of_which_the_first_has_the_size(tmp_path):
    """Others are scaled to it."""
    write_folder(tmp_path, size=(16, 16), count=3)
    last = sorted((tmp_path / "train").rglob("*.png"))[-1]
    from PIL import Image

    Image.open(last).resize((24, 24)).save(last)
    assert sources.load(f"folder:{tmp_path}", image_size=16).streamed


def test_a_channel_of_one_value_has_no_spread():
    for value in range(256):
        assert sources.statistics(torch.full((3, 1, 2, 2), value, dtype=torch.uint8), 255.0)[1] == (0.0,)


def test_the_log_of_a_row(tmp_path, monkeypatch):
    """TensorBoard counts in batches; of a row that cannot be written to its end nothing stays."""
    log, seen = outputs.Log(FIRST, tmp_path, SimpleNamespace(tensorboard=False), 0, 5), []
    log.board = SimpleNamespace(log_metrics=lambda *row: seen.append(row), save=lambda: None)
    row = {"epoch": 2, "holdout": {"full": {"loss": 0.5}}}
    log.write(row, [row])
    assert seen == [({"epoch": 2, "holdout/full/loss": 0.5}, 10)]
    before = (tmp_path / outputs.ROWS).read_bytes()

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(outputs.os, "fsync", full)
    with pytest.raises(UserError, match="cannot write to the folder .* no space left; "):
        log.write(row, [row, row])
    assert (tmp_path / outputs.ROWS).read_bytes() == before


def test_a_folder_that_is_free_again(tmp_path, monkeypatch):
    """After data workers of a training that was killed have noticed; and where the file system has no locks."""
    fcntl, calls = pytest.importorskip("fcntl"), []
    fabric = SimpleNamespace(is_global_zero=True, broadcast=lambda taken: taken)
    for errors in ([BlockingIOError()] * 2, [OSError("no locks available")]):

        def flock(handle, how, errors=errors):
            calls.append(how)
            if errors:
                raise errors.pop()

        monkeypatch.setattr(fcntl, "flock", flock)
        with outputs.alone(fabric, tmp_path):
            pass
    assert len(calls) == 3 + 1
