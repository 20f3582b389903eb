"""Runs: what they refuse before anything changes, what they keep, and what is said of them afterwards."""

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import yaml  # noqa: E402
from fractalnet import (  # noqa: E402
    FractalNet,
    checkpoints,
    config,
    create,
    devices,
    evaluate,
    outputs,
    summary,
    train,
    trained,
)
from fractalnet.__main__ import main  # noqa: E402
from fractalnet.files import UserError  # noqa: E402
from image_files import write_folder  # noqa: E402
from test_train import quick  # noqa: E402, F401

RECIPE = {
    "network": {"columns": 2, "channels": [4, 6]},
    "data": {"source": "digits"},
    "epochs": 1,
    "batch_size": 500,
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.9}},
    "tensorboard": False,
}


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PASSES", 1)
        assert main(["train", written(folder, epochs=3, keep=9), "--out", str(folder / "run")]) == 0
    return folder / "run"


# --- before --------------------------------------------------------------------------------------


def test_a_refused_resume_deletes_nothing(tmp_path, whole, refused):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    names = [path.name for path in checkpoints.saved(out / "checkpoints")]
    (out / "metrics.jsonl").write_bytes(b"")
    again = ["train", written(tmp_path, epochs=3, keep=9), "--out", str(out), "--resume"]
    refused([*again, str(out / "checkpoints" / names[1])], ["metrics.jsonl: expected", "bytes or more", "got 0"])
    assert [path.name for path in checkpoints.saved(out / "checkpoints")] == names and len(names) == 3


def test_the_place_says_which_path_comes_next(tmp_path, whole, monkeypatch):
    """Where the extra state of modules is not read, as under fsdp."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    monkeypatch.setattr(FractalNet, "set_extra_state", lambda *_: None)
    first = checkpoints.saved(out / "checkpoints")[0]
    assert main(["train", "--out", str(out), "--resume", str(first)]) == 0
    assert (out / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()


def test_one_training_writes_to_a_folder(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(outputs, "WAIT", 0.3)
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "run"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    refused(["train", written(tmp_path), "--out", str(out)], [str(out), "another training writes to this folder"])
    assert not list(out.iterdir())
    os.close(other)
    assert main(["train", written(tmp_path), "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--network.num_classes", "5"], ["--network.num_classes: expected 10 or more for digits, got 5"]),
        (["--network.num_classes", "ten"], ["--network.num_classes: expected 10 or more for digits, got 'ten'"]),
        (["--network.in_channels", "3"], ["--network.in_channels: expected 1 for digits, got 3"]),
        (["--seed", str(2**63)], ["--seed: expected a number in", str(2**63)]),
        (["--schedule.warmup", ".inf"], ["--schedule.warmup: expected a number in [0, inf), got inf"]),
        (["--schedule.warmup", ".nan"], ["--schedule.warmup: expected a number in [0, inf), got nan"]),
    ],
)
def test_options_that_do_not_fit(options, words, refused, tmp_path):
    refused(["train", written(tmp_path), "--out", str(tmp_path / "run"), *options], words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ranks", "sync_bn"), [(3, False), (2, False), (3, True)])
def test_ranks_without_images_have_no_statistics(ranks, sync_bn, tmp_path):
    """Their first values would be averaged into those of the others."""
    options = ["--batch_size", "2", "--sync_bn", str(sync_bn).lower(), "--network.columns", "99"]
    fabric = SimpleNamespace(rank_zero_first=nullcontext, global_rank=0, world_size=ranks, device="cpu")
    with pytest.raises(UserError) as told:
        train.Run(*config.load(written(tmp_path), options), "small", fabric)
    refused = ranks == 3 and not sync_bn  # else what comes next: so many columns
    wanted = "--sync_bn false: expected batches of 3 or more on as many ranks, got 2" if refused else "columns"
    assert wanted in str(told.value)


def test_adafactor_has_no_sharded_weights(tmp_path):
    """Asked of a run that is not launched: the strategy of its options alone is fsdp."""
    found, plain = config.load(written(tmp_path, accelerator="cpu"), ["--optimizer", "Adafactor"])
    fabric = devices.fabric_for(found)
    train.Run(found, plain, "small", fabric)
    with pytest.raises(UserError, match="expected one of torch.optim but Adafactor: PyTorch has none .* fsdp shards"):
        train.Run(replace(found, strategy="fsdp"), plain, "small", fabric)


def test_data_of_one_class(tmp_path, refused):
    write_folder(tmp_path / "data")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "data" / split / "dog")
    source = ["--data.source", f"folder:{tmp_path / 'data'}"]
    refused(
        ["train", written(tmp_path), "--out", str(tmp_path / "run"), *source], ["expected 2 classes or more, got 1"]
    )


def test_a_recipe_that_is_no_text(tmp_path, refused):
    (tmp_path / "broken.yaml").write_bytes(b"epochs: \xff\xfe")
    refused(["train", str(tmp_path / "broken.yaml")], ["broken.yaml: cannot be read"])


def test_every_damaged_bit_is_an_error_of_the_checkpoint(tmp_path, whole):
    """Also of the archive's directory, where it may turn entries into encrypted ones, or names into none."""
    content, path = (
        bytearray(checkpoints.saved(whole / "checkpoints")[0].read_bytes()),
        tmp_path / "step-000000001.ckpt",
    )
    told = 0
    for i in range(len(content) - 2500, len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            checkpoints.prove(path)
        except UserError as error:
            told += "damaged" in str(error)
    assert told > 1000


# --- data that has moved -------------------------------------------------------------------------


def test_moved_data(tmp_path, capsys):
    """--root and --data.root say where a folder is now; its images are still proven to be the same."""
    write_folder(tmp_path / "first", count=12)
    recipe = written(tmp_path, data={"source": f"folder:{tmp_path / 'first'}"}, batch_size=8, epochs=2)
    out = tmp_path / "run"
    assert main(["train", recipe, "--out", str(out)]) == 0
    (tmp_path / "first").rename(tmp_path / "second")
    evaluation = ["eval", "--checkpoint", str(out / "model.pt")]
    assert main(evaluation) == 2
    assert main([*evaluation, "--root", str(tmp_path / "second")]) == 0
    assert main(["train", "--out", str(out), "--resume", "--data.root", str(tmp_path / "second")]) == 0
    shutil.rmtree(tmp_path / "second")
    write_folder(tmp_path / "second", count=11)
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--data.root", str(tmp_path / "second")]) == 2
    assert "holds other images now" in capsys.readouterr().err


def test_other_data(tmp_path, capsys):
    """Names and channels of the images are the network's: others are refused, not scored."""
    write_folder(tmp_path / "first", count=12)
    recipe = written(tmp_path, data={"source": f"folder:{tmp_path / 'first'}"}, batch_size=8)
    out = tmp_path / "run"
    assert main(["train", recipe, "--out", str(out)]) == 0
    classes = torch.load(out / "model.pt", weights_only=True)["data"]["classes"]
    assert len(classes) > 1
    for split in ("train", "test"):
        (tmp_path / "first" / split / classes[0]).rename(tmp_path / "first" / split / "zebra")
    for command in ("eval", "anytime"):
        capsys.readouterr()
        assert main([command, "--checkpoint", str(out / "model.pt")]) == 2
        said = capsys.readouterr().err
        assert f"expected class 0 to be {classes[0]!r}, as in the training, got {classes[1]!r}" in said


def test_ten_crops_of_small_images(whole):
    """A crop of an image of 8 pixels is off by one of them, not by half of the image."""
    _, content = trained.unpack(whole / "model.pt")
    (one, _), (ten, _) = (next(iter(trained.views(trained.holdout(content, None, n), n))) for n in (1, 10))
    assert one.shape[1:] == (1, 8, 8) and ten.shape[0] == 10
    one = one[: ten.shape[1]]
    assert any(torch.equal(crop[..., 1:, 1:], one[..., :-1, :-1]) for crop in ten)
    assert any(torch.equal(crop[..., :-1, :-1], one[..., 1:, 1:]) for crop in ten)


def test_what_a_training_leaves_is_loaded(whole, capsys):
    from fractalnet import load

    net = load(str(whole / "model.pt"))
    assert not net.training and net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match="there is no such file"):
        load(str(whole / "no.pt"))
    net.reset_classifier(3)
    assert not net.head.training and net(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    shutil.copy(whole / "model.pt", whole / "step-net.pt")
    load(whole / "step-net.pt")
    content = torch.load(whole / "model.pt", weights_only=True)
    content["state"]["_extra_state"] = content["state"]["_extra_state"].half()
    torch.save(content, whole / "cast.pt")
    with pytest.raises(UserError, match="its content does not fit .ValueError: FractalNet: expected _extra_state"):
        load(whole / "cast.pt")
    checkpoint = sorted((whole / "checkpoints").glob("step-*"))[0]
    assert main(["eval", "--checkpoint", str(checkpoint)]) == 2
    assert "is to be resumed from; the network is model.pt" in capsys.readouterr().err


# --- arithmetic ----------------------------------------------------------------------------------


def test_the_loss_of_fp64(tmp_path, monkeypatch):
    seen = []
    criterion = train.Run.criterion
    monkeypatch.setattr(train.Run, "criterion", lambda *a: seen.append(a[1].dtype) or criterion(*a))
    assert main(["train", written(tmp_path, precision="fp64"), "--out", str(tmp_path / "run")]) == 0
    assert set(seen) == {torch.float64}


def test_a_loss_that_is_no_number_is_not_left_out():
    net = FractalNet(10, 1, (4,), in_channels=1, image_size=8).eval()
    x, y = torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    x[5] = float("nan")
    found = evaluate.scores(net, zip(x.split(3), y.split(3), strict=True))
    assert found["full"]["loss"] != found["full"]["loss"]


@pytest.mark.parametrize("sync_bn", [True, False])
def test_paths_per_sample_of_several_ranks(sync_bn):
    """Together those of the batch. Where each takes statistics of its own part, each has every kind of sample."""
    net = FractalNet(5, 2, (4,), image_size=8, local_drop=0.0, granularity="sample")
    parts = []
    for rank in range(2):
        net.path_step = 3
        part = SimpleNamespace(part=lambda size, rank=rank: (size * rank // 2, size * (rank + 1) // 2))
        options = {"config": SimpleNamespace(sync_bn=sync_bn), "fabric": SimpleNamespace(world_size=2)}
        parts.append(train.Run.path(SimpleNamespace(net=net, loader=part, **options), 41).keep)
    assert [part.shape[-1] for part in parts] == [20, 21]
    net.path_step = 3
    whole = net.sample_path(41).keep  # the network's own
    kinds = [list(map(tuple, keep.flatten(0, -2).T.tolist())) for keep in (whole, *parts)]
    assert sorted(kinds[1] + kinds[2]) == sorted(kinds[0])
    assert len(set(kinds[0])) == 3  # everything, and each column alone
    assert (set(kinds[1]) == set(kinds[2]) == set(kinds[0])) != sync_bn


# --- afterwards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["activation", "silu"], ["eps", "0.001"], ["column_widths", "[1, 0.5]"]])
def test_eager_has_not_every_option(options, tmp_path, capsys):
    """The comparison is left out, with its reason, and everything else is there."""
    argv = ["--compare_eager", "true", f"--network.{options[0]}", options[1]]
    assert main(["train", written(tmp_path), "--out", str(tmp_path / "run"), *argv]) == 0
    said = capsys.readouterr().out
    assert "the eager comparison is left out: public implementations have no " + options[0] in said
    steps = json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"]
    assert "fused" in steps and "eager" not in steps


def test_arguments_that_eager_shares():
    assert evaluate.unlike_eager({"name": "fractal_c3", "num_classes": 10, "granularity": "sample"}) == []
    assert evaluate.unlike_eager({"columns": 2, "channels": (4,), "pool": "max", "eps": 1e-5}) == []
    (dropout,) = evaluate.unlike_eager({"name": "fractalnet20"})
    assert dropout.startswith("dropout (0.0, 0.1")


@pytest.mark.parametrize("what", ["measure", "compare_steps"])
def test_what_is_trained_is_kept_whatever_follows(what, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a wrong network")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a wrong network"):
        patch.setattr(evaluate, what, broken)
        main(["train", written(tmp_path, compare_eager=True), "--out", str(tmp_path / "run")])
    assert main(["eval", "--checkpoint", str(tmp_path / "run" / "model.pt")]) == 0


def test_what_is_measured_is_of_the_whole_batch(tmp_path, monkeypatch):
    """The first rank's is empty where there are more ranks than images in a batch."""
    conclude = outputs.conclude

    def of_many_ranks(this, out):
        this.loader.world_size = this.holdout.world_size = 1000
        return conclude(this, out)

    monkeypatch.setattr(outputs, "conclude", of_many_ranks)
    held = []
    monkeypatch.setattr(evaluate, "hold_together", lambda fused, eager, x: held.append(len(x)))
    assert main(["train", written(tmp_path, compare_eager=True), "--out", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"]["batch_size"] == 500 and held == [100]
    assert all(column["timed"] == [1, 100] for column in metrics["columns"])


def metrics_of(name, *options):
    _, plain = config.load(name, options)
    columns = [{"name": "full", "accuracy": 0.9, "accuracy_top5": 0.95}, {"name": "column 2", "accuracy": 0.8}]
    return {"recipe": name, "config": plain, "columns": columns}


def test_only_the_papers_recipe_is_set_beside_the_paper(tmp_path, capsys):
    name = "fractalnet20-drop/c10"
    assert outputs.compare([metrics_of(name)])
    for same in (["--epochs", "2"], ["--seed", "3", "--precision", "bf16"], ["--graphs", "true", "--devices", "2"]):
        assert outputs.compare([metrics_of(name, *same)])
    for other in (
        ["--network.columns", "2"],
        ["--data.source", "digits"],
        ["--optimizer.lr", "0.1"],
        ["--batch_size", "8"],
    ):
        assert outputs.compare([metrics_of(name, *other)]) == ""
    wrong = [metrics_of(name) | {"config": {"epochs": 0}}, metrics_of(name) | {"config": []}]
    assert outputs.compare(wrong) == ""
    for folder, text in (("a", json.dumps(metrics_of(name))), ("b", "{"), ("c", '{"recipe": 3}'), ("d", "[]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.json").write_text(text)
    (tmp_path / "e" / "metrics.json").mkdir(parents=True)
    assert main(["compare", str(tmp_path)]) == 0
    assert "fractalnet20-drop/c10, full" in capsys.readouterr().out


def test_the_best_five_are_shown():
    column = {"name": "full", "column": None, "depth": 5, "accuracy": 0.5, "timed": [1, 2]}
    column |= {"ms_per_image": {str(n): 1.0 for n in evaluate.BATCHES}}
    assert "of the best 5" not in evaluate.table([column])
    assert "75.25%" in evaluate.table([column | {"accuracy_top5": 0.7525}])


def test_work_of_composed_and_tied_networks(tmp_path, capsys):
    """1x1 convolutions as such; of tied columns each is a pass of its own."""
    assert round(summary.work(create("fractalnet40"), 3, 32) / 1e6, 1) == 604.4
    shares = []
    for mode in ("sampled", "tied"):
        options = ["--network.global_mode", mode, "--network.local_drop", "0", "--network.global_ratio", "0"]
        assert main(["train", written(tmp_path, epochs=10**6), "--dry-run", *options]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training: ")]
        shares.append(float(line.split()[1].replace(",", "")))
    assert shares[1] == pytest.approx(2 * shares[0], rel=1e-2)


def test_anytime_in_parts(monkeypatch):
    """The answers are those of all images at once, of a network in evaluation."""
    from fractalnet import anytime

    monkeypatch.setattr(anytime, "CONFIDENCES", (0.0, 0.5, 1.0))
    net = FractalNet(5, 2, (4, 6), image_size=8)
    x, y = torch.randn(11, 3, 8, 8), torch.randint(5, (11,))
    found = []
    for size in (500, 3):
        for module in (evaluate, anytime):
            monkeypatch.setattr(module, "CHUNK", size)
        rows = [*anytime.answers(net.train(), x, y, rounds=1), *anytime.exits(net.train(), x, y)]
        found.append([(r.get("name"), r["accuracy"], round(r["loss"], 4), r.get("shares")) for r in rows])
    assert found[0] == found[1] and len(found[0]) == 2 + 3 + 3
    assert found[0][5][-1] == [1.0, 0.0] and found[0][7][-1] == [0.0, 1.0]


@pytest.mark.parametrize("classes, top", [(19, False), (20, True)])
def test_scores_of_batches_of_several_sizes(classes, top):
    """As of one batch, and none has a say that is empty; and the five best answers where there are enough classes."""
    net, x, y = FractalNet(classes, 1, (4,), image_size=8), torch.randn(7, 3, 8, 8), torch.arange(7) % 5
    whole, parts = (
        evaluate.scores(net, b)["full"] for b in ([(x, y)], [(x[:6], y[:6]), (x[6:], y[6:]), (x[7:], y[7:])])
    )
    assert parts == pytest.approx(whole, rel=1e-5) and ("accuracy_top5" in whole) == top
    assert whole["loss"] == pytest.approx(torch.nn.functional.cross_entropy(net(x), y).item(), rel=1e-5)
