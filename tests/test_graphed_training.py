"""Trainings whose steps are graphs: the application with --graphs against itself without. Without a GPU the graphs are
those of ``graph_twin``; ``-m gpu`` takes CUDA's."""

import pytest
import torch
from conftest import needs_gpu
from fractalnet.graphed import GraphedStep
from graph_twin import Twin
from test_graphed import changing


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_training(precision, monkeypatch, tmp_path):
    from fractalnet import train

    twins = []

    def graphed(net, optimizer, work):
        twins.append(Twin(lambda: changing(net, optimizer)))
        return GraphedStep(net, optimizer, work, capturer=twins[0], warmup=1)

    pytest.importorskip("lightning")
    monkeypatch.setattr(train, "GraphedStep", graphed)
    trained_alike(tmp_path, precision, "cpu", 1e-9 if precision == "fp64" else 2e-2)
    assert twins[0].captures >= 2 and twins[0].replays >= 8


@needs_gpu
@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path, capsys):
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse", reason="the options of a training are jsonargparse's")
    trained_alike(tmp_path, "fp32", "gpu", 2e-2)
    assert "not used" not in capsys.readouterr().out


def trained_alike(folder, precision, accelerator, tolerance):
    """The training application with --graphs against itself without: weights and statistics."""
    from fractalnet import config, train

    recipe = folder / "small.yaml"
    recipe.write_text(
        """
network: {columns: 2, channels: [4, 6]}
data: {source: digits}
epochs: 2
batch_size: 200
clip: 1.0
ema: 0.9
optimizer: {class_path: SGD, init_args: {lr: 0.0625, momentum: 0.9, fused: true}}
schedule: {kind: halving, factor: 0.5}
tensorboard: false
"""
    )
    states = []
    for graphs in ("false", "true"):
        options = ["--graphs", graphs, "--precision", precision, "--accelerator", accelerator]
        found, plain = config.load(str(recipe), options)
        train.run(found, plain, "small", folder / graphs)
        states.append(torch.load(folder / graphs / "model.pt", weights_only=True)["state"])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=tolerance, atol=tolerance, msg=key)


def test_training_says_why_it_has_no_graphs(tmp_path, capsys):
    pytest.importorskip("lightning")
    from fractalnet.__main__ import main

    options = ["--graphs", "true", "--epochs", "1", "--accelerator", "cpu", "--network.channels", "[4]"]
    options += ["--network.columns", "1", "--compare_eager", "false", "--tensorboard", "false"]
    assert main(["train", "digits", "--out", str(tmp_path / "run"), *options]) == 0
    assert "--graphs: not used: CUDA graphs need a CUDA device" in capsys.readouterr().out
