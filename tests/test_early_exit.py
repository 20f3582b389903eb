"""Early exit against its definition: every column on everything, the first sure one chosen."""

import json
from types import SimpleNamespace

import pytest
import torch
from fractalnet import FractalNet

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("yaml")

from fractalnet import anytime, evaluate, sources  # noqa: E402
from fractalnet.__main__ import main  # noqa: E402

OPTIONS = {"fused": {}, "composed": {"activation": "silu"}, "stem": {"stem": "resnet"}}


def network(**options):
    """Logits wide enough for every confidence to split the batch."""
    size = 20 if options.get("stem") else 8
    net = FractalNet(4, 3, (4, 6), image_size=size, **options).double()
    for _ in range(4):
        net(torch.randn(8, 3, size, size, dtype=torch.float64))
    x = torch.randn(24, 3, size, size, dtype=torch.float64)
    for column in range(3):
        net.recalibrate([x], column)
    with torch.no_grad():
        net.head.weight.mul_(4)
    return net.eval(), x


@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_definition(name):
    net, x = network(**OPTIONS[name])
    every = torch.stack([net(x, column=c) for c in range(3)])
    chosen = set()
    for confidence in (0.0, 0.5, 0.7, 0.9, 1.0):
        column = torch.full((len(x),), 2)
        for c in (1, 0):
            column[every[c].softmax(1).amax(1) >= confidence] = c
        result = net.early_exit(x, confidence)
        assert torch.equal(result.column, column)
        torch.testing.assert_close(result.logits, every[column, torch.arange(len(x))], rtol=1e-12, atol=1e-12)
        assert not result.logits.requires_grad
        chosen.add(tuple(column.bincount(minlength=3).tolist()))
    assert (24, 0, 0) in chosen and any(min(counts) > 0 for counts in chosen)  # the cases differ


def test_only_what_is_left_is_computed():
    net, x = network(stem="resnet")
    seen, stems = [], []
    net.head.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    net.stem.register_forward_pre_hook(lambda m, inputs: stems.append(len(inputs[0])))
    result = net.early_exit(x, 0.7)
    counts = result.column.bincount(minlength=3).tolist()
    assert min(counts) > 0
    assert seen == [24, 24 - counts[0], counts[2]] and stems == [24]
    seen.clear()
    net.early_exit(x, 0.0)
    assert seen == [24]  # nothing is left for the others


def test_empty_batch():
    net, x = network()
    logits, column = net.early_exit(x[:0])
    assert logits.shape == (0, 4) and column.shape == (0,) and column.dtype == torch.int64


def test_errors():
    net, x = network()
    for confidence in (-0.1, 1.5, float("nan"), "high", None, True):
        with pytest.raises(ValueError, match=r"early_exit: expected confidence in \[0, 1\], got"):
            net.early_exit(x, confidence)
    with pytest.raises(ValueError, match="early_exit: expected a model in evaluation mode"):
        net.train().early_exit(x)


@pytest.mark.parametrize("dtype, bias, confidence", [(torch.bfloat16, 8, 0.9995), (torch.float64, 20, 1 - 1e-10)])
def test_rounded_probabilities(dtype, bias, confidence):
    """One that bfloat16 would round to 1, or float32 of a network in fp64, does not count as sure."""
    net, x = FractalNet(4, 3, (4, 6), image_size=8).eval().to(dtype), torch.randn(24, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([bias, 0, 0, 0]))  # a probability of 0.99899, and of 1 - 6e-9
    less = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert net(x, column=0).to(less).softmax(1).amax() == 1
    result = net.early_exit(x, confidence)
    assert result.column.unique().tolist() == [2] and result.logits.dtype == dtype


def test_a_probability_of_the_threshold_is_sure():
    net = FractalNet(4, 3, (4,), image_size=8).eval()
    torch.nn.init.zeros_(net.head.weight)
    assert net.early_exit(torch.randn(5, 3, 8, 8), 0.25).column.unique().tolist() == [0]


def test_times_until_an_answer(monkeypatch):
    """From the start of every part, for all of them; the first two rounds warm up."""
    net, x = network()
    now, parts = [0.0], []

    def answers(self, part):
        parts.append(len(part))
        for column in range(3):
            now[0] += (len(parts) - 1) // 3 - 1 if len(parts) > 6 else 100  # three parts are a round
            yield column, 0, torch.zeros(len(part), 4)

    monkeypatch.setattr(anytime, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(anytime, "CHUNK", 10)
    monkeypatch.setattr(FractalNet, "anytime", answers)
    rows = anytime.answers(net, x, torch.zeros(24, dtype=torch.long))
    assert parts == [10, 10, 4] * 7 and [row["accuracy"] for row in rows] == [1] * 3
    assert [row["ms"] for row in rows] == pytest.approx([9e3, 18e3, 27e3])  # of rounds of 1 to 5 seconds an answer
    table = [line.split() for line in anytime.answers_table(rows, 24).splitlines()]
    assert table[2:] == [["column", str(c), str(net.depth(c)), "100.00%", f"{9e3 * (c + 1):.1f}"] for c in range(3)]


def test_command(tmp_path, capsys, monkeypatch, packed):
    monkeypatch.setattr(evaluate, "PASSES", 1)
    torch.set_num_threads(1)
    split = sources.tensors(sources.load("digits"))
    config = {"num_classes": 10, "columns": 2, "channels": (4, 6), "in_channels": 1, "image_size": 8}
    model = FractalNet(**config)
    model.recalibrate([split.train_x[:200]]).recalibrate([split.train_x[:200]], 0)
    (tmp_path / "model.pt").write_bytes(packed(model, config))
    out = tmp_path / "new" / "anytime"
    assert main(["anytime", "--checkpoint", str(tmp_path / "model.pt"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"anytime.json", "anytime.png"}
    assert (out / "anytime.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in json.loads((out / "anytime.json").read_text())["rows"]}
    assert set(rows) == {"full", "column 0", "column 1", *(f"confidence {p:g}" for p in anytime.CONFIDENCES)}
    model.eval()
    for name, row in rows.items():
        if row["confidence"] is None:
            logits = model(split.test_x, column=row["column"])
        else:
            logits, column = model.early_exit(split.test_x, row["confidence"])
            assert row["shares"] == pytest.approx((column.bincount(minlength=2) / 360).tolist())
        accuracy = (logits.argmax(1) == split.test_y).float().mean().item()
        assert row["accuracy"] == pytest.approx(accuracy) and row["ms"] > 0, name
        assert f"{accuracy:.2%}" in printed
    assert main(["anytime", "--checkpoint", str(tmp_path / "none.pt"), "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
