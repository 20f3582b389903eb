"""FractalNet: parameter counts, paths, columns, extraction, statistics."""

import fractalnet
import pytest
import torch
from fractalnet.drop_path import Path, column_path, full_path, sample_path
from torch import nn
from torch.utils.checkpoint import checkpoint

from fractal_kernels import ConvBNReLU


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("columns", range(1, 7))
def test_parameters_of_the_supporting_experiments(columns):
    model = fractalnet.create(f"fractal_c{columns}")
    millions = {1: 0.26, 2: 0.85, 3: 2.13, 4: 4.78, 5: 10.18, 6: 21.10}[columns]
    assert round(count(model) / 1e6, 2) == pytest.approx(millions, abs=0.006)
    assert model.depth() == 5 * 2 ** (columns - 1)


def test_parameters_of_the_20_layer_net():
    assert count(fractalnet.create("fractalnet20")) == 33_724_618
    assert count(fractalnet.create("fractalnet20", num_classes=100)) == 33_770_788
    assert fractalnet.create("fractalnet20").depth() == 20


def test_names():
    sizes = [f"{kind}_c{c}" for kind in ("fractal", "plain") for c in range(1, 9)]
    assert fractalnet.list_models() == sorted(["fractalnet20", "fractalnet34", "fractalnet40", *sizes])
    with pytest.raises(ValueError, match="create: expected name one of fractal_c1, .*, got 'resnet'"):
        fractalnet.create("resnet")


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("split", [True, False])
def test_extracted_column_is_the_column(column, split):
    torch.manual_seed(0)
    net = fractalnet.FractalNet(7, 3, (4, 6), image_size=8, split_stats=split, conv_bias=True, dropout=(0.1, 0.2))
    for _ in range(6):
        net(torch.randn(8, 3, 8, 8))
    net.eval()
    plain = net.extract_column(column)
    assert all(type(m).__module__.startswith("torch.nn") for m in plain.modules())
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(plain(x), net(x, column=column), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in plain.modules()) == net.depth(column)
    before = plain(x)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert torch.equal(plain(x), before)  # a copy


@pytest.mark.parametrize("options", [{}, {"column_widths": (1, 1 / 2)}, {"split_stats": False}], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_statistics_that_no_step_moved(ratio, options):
    """Without global drop-path no column ran alone, with nothing else the full network never did: each has the
    statistics that there are."""
    torch.manual_seed(0)
    net = fractalnet.FractalNet(7, 2, (4, 8), image_size=8, local_drop=0.0, global_ratio=ratio, **options)
    for _ in range(4):
        net(torch.randn(8, 3, 8, 8) + 2)
    net.eval()
    x, moved = torch.randn(5, 3, 8, 8) + 2, int(ratio)
    got = [net(x), *(net(x, column=c) for c in range(2)), net.extract_column(1)(x)]
    same = fractalnet.FractalNet(7, 2, (4, 8), image_size=8, **options)
    same.load_state_dict(net.state_dict())
    for block in same.eval().blocks:
        for statistics in (block.running_mean, block.running_var):
            statistics[:] = statistics[moved % len(statistics)].clone()
        block.num_batches_tracked.fill_(1)
    for a, b in zip(got, [same(x), *(same(x, column=c) for c in range(2)), same.extract_column(1)(x)], strict=True):
        assert torch.equal(a, b)


STEMS = {
    "no pool": lambda own: nn.Sequential(own[0], nn.Identity()),
    "steps": lambda own: nn.Sequential(ConvBNReLU(3, 9, dilation=2, groups=3), ConvBNReLU(9, 64, affine=False)),
    "a step": lambda own: ConvBNReLU(3, 64, 4, 4, padding=0, track_running_stats=False),
}


@pytest.mark.parametrize("name", STEMS)
def test_columns_have_a_stem_of_ones_own(name):
    net = fractalnet.FractalNet(7, 2, (4, 6), image_size=32, stem="resnet")
    net.stem = STEMS[name](net.stem)
    net, x = net.double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    net(x)
    net.eval()
    for fold in (False, True):
        torch.testing.assert_close(fractalnet.export.plain(net, fold=fold)(x), net(x))
        torch.testing.assert_close(net.extract_column(0, fold=fold)(x), net(x, column=0))
    program = fractalnet.export.to_exported_program(net, 0)
    torch.testing.assert_close(program.module()(x), net(x, column=0))
    net.stem = nn.Sequential(ConvBNReLU(3, 64), nn.Dropout(0.5))
    for plain in (fractalnet.export.plain, lambda net: net.extract_column(0)):
        with pytest.raises(TypeError, match="expected a stem of ConvBNReLU, MaxPool2d and Identity, got Dropout"):
            plain(net)


@pytest.mark.parametrize("name", STEMS)
def test_files_of_columns_have_a_stem_of_ones_own(name, tmp_path):
    """Or say what they cannot hold."""
    pytest.importorskip("safetensors")
    net = fractalnet.FractalNet(7, 2, (4, 6), image_size=32, stem="resnet")
    net.stem = STEMS[name](net.stem)
    if name == "no pool":
        fractalnet.export.save_column(net, 0, tmp_path / "column")
        x = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(fractalnet.export.load_column(tmp_path / "column")(x), net.eval()(x, column=0))
        return
    what = r"Conv2d of dilation \(1, 1\), got dilation \(2, 2\)|BatchNorm2d of track_running_stats True, got .* False"
    with pytest.raises(ValueError, match=f"save_column: expected ({what}), of which a column's file says nothing"):
        fractalnet.export.save_column(net, 0, tmp_path / "column")
    assert not list(tmp_path.iterdir())


def test_anytime():
    net = fractalnet.FractalNet(7, 3, (4, 6), image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    answers = list(net.anytime(x))
    assert [(c, d) for c, d, _ in answers] == [(0, 2), (1, 4), (2, 8)]
    for column, _, logits in answers:
        torch.testing.assert_close(logits, net(x, column=column))


def test_unit_is_a_view():
    net = fractalnet.FractalNet(7, 3, (4, 6), image_size=8)
    unit = net.blocks[1].unit(1, 1)
    assert unit.weight.shape == (6, 6, 3, 3)
    with torch.no_grad():
        unit.weight.fill_(3.0)
        unit.gamma.fill_(5.0)
    assert sum(float((w == 3.0).sum()) for w in net.blocks[1].weights) == 6 * 6 * 9
    assert float((net.blocks[1].gamma == 5.0).sum()) == 6
    with pytest.raises(ValueError, match="unit: expected c < 3 and j"):
        net.blocks[0].unit(0, 1)


def test_paths():
    generator = torch.Generator().manual_seed(0)
    net = fractalnet.FractalNet(7, 3, (4, 6), image_size=8)
    columns = []
    for _ in range(400):
        path = net.sample_path(4, generator)
        columns.append(path.column)
        assert bool(path.keep[:, -1].any(-1).all())
    share = sum(c is not None for c in columns) / 400
    assert abs(share - 0.5) < 0.08
    assert {c for c in columns if c is not None} == {0, 1, 2}
    again = net.sample_path(4, torch.Generator().manual_seed(3))
    assert torch.equal(again.keep, net.sample_path(4, torch.Generator().manual_seed(3)).keep)


def test_local_rate_and_survivors():
    path = sample_path(1, 3, 5000, local_drop=0.4, global_ratio=0.0, granularity="sample")
    last = path.keep[0, -1]  # all three columns meet
    assert bool(last.any(0).all())
    kept = float(last.float().mean())
    assert abs(kept - (0.6 + 0.4**3 / 3)) < 0.02
    assert bool(sample_path(2, 3, 4, local_drop=1.0, global_ratio=0.0).keep[:, -1].sum(-1).eq(1).all())


def test_global_samples_keep_one_column_everywhere():
    path = sample_path(4, 3, 10, local_drop=0.15, global_ratio=0.5, granularity="sample")
    alone = path.keep[..., 5:]
    used = alone.any(dim=1)  # [B, C, N]: the columns that a sample uses in each block
    assert bool((used.sum(1) == 1).all())
    assert bool((used == used[:1]).all())  # the same one in every block


def test_sample_granularity_trains_with_one_set():
    net = fractalnet.FractalNet(7, 3, (4, 6), image_size=8, granularity="sample")
    assert net.blocks[0].running_mean.shape[0] == 1
    loss = net(torch.randn(6, 3, 8, 8)).square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    assert net.eval()(torch.randn(2, 3, 8, 8), column=1).shape == (2, 7)


def test_evaluation_drops_nothing_and_repeats():
    net = fractalnet.FractalNet(7, 3, (4, 6), image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), net(x))
    torch.testing.assert_close(net(x), net(x, path=full_path(2, 3)))
    assert not torch.allclose(net(x), net(x, path=column_path(2, 3, 0)))


def test_state_dict_round_trip():
    a, b = (fractalnet.FractalNet(7, 3, (4, 6), image_size=8) for _ in range(2))
    a(torch.randn(4, 3, 8, 8))
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_autocast_and_half():
    net = fractalnet.FractalNet(7, 3, (8, 8), image_size=8)
    x, path = torch.randn(4, 3, 8, 8), full_path(2, 3)
    expected = net(x, path=path)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, path=path)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_errors():
    with pytest.raises(ValueError, match="FractalNet: expected image_size >= 8 for the pools, got 4"):
        fractalnet.FractalNet(7, 2, (4, 4, 4), image_size=4)
    with pytest.raises(ValueError, match="FractalNet: expected granularity 'batch' or 'sample', got 'pixel'"):
        fractalnet.FractalNet(7, 2, (4,), granularity="pixel")
    net = fractalnet.FractalNet(7, 2, (4,), image_size=8)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="expected path or column, got both"):
        net(x, path=full_path(1, 2), column=0)
    with pytest.raises(ValueError, match="expected path.keep for 1 blocks, got 2"):
        net(x, path=full_path(2, 2))
    with pytest.raises(ValueError, match="expected column from 0 to 1, got 2"):
        net(x, column=2)
    with pytest.raises(ValueError, match="sample_path: expected local_drop in"):
        sample_path(1, 2, 3, local_drop=1.5)
    with pytest.raises(ValueError, match="extract_column: expected c from 0 to 1, got 5"):
        net.extract_column(5)
    assert isinstance(net.sample_path(2), Path)


def test_what_would_go_wrong_silently_is_refused():
    net = fractalnet.FractalNet(7, 2, (4,), image_size=8)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="expected torch.nn.parallel.DistributedDataParallel"):
        net._replicate_for_data_parallel()(x)
    with pytest.raises(ValueError, match="anytime: expected a network in evaluation mode"):
        next(net.anytime(x))
    before = [b.clone() for b in net.buffers()]
    with pytest.raises(TypeError, match=r"fractal_block: expected weights\[0\] of x's dtype torch.float64, got .*32"):
        net(x.double())
    assert all(map(torch.equal, before, net.buffers()))
    net.path_step = 70_000
    for cast in (torch.half, torch.float64, torch.int8, torch.bool):
        state = {name: value.to(cast) for name, value in net.state_dict().items()}
        with pytest.raises(ValueError, match="expected _extra_state of two integers, path_seed and path_step, got "):
            net.load_state_dict(state)
        state["_extra_state"] = net.get_extra_state()
        net.load_state_dict(state)
    assert net.path_step == 70_000
    for name in ("conv_bias", "bn_affine", "split_stats"):
        with pytest.raises(ValueError, match=f"FractalNet: expected {name} True or False, got 'no'"):
            fractalnet.FractalNet(7, 2, (4,), image_size=8, **{name: "no"})
    with pytest.raises(TypeError, match="create: expected name to be a str, got list"):
        fractalnet.create(["fractal_c3"])


def test_other_classes(tmp_path):
    net = fractalnet.FractalNet(7, 2, (4, 6), image_size=8).double()
    kept = {name: value.clone() for name, value in net.state_dict().items() if not name.startswith("head.")}
    net.reset_classifier(3)
    assert net.eval()(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 3)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in kept.items())
    with pytest.raises(ValueError, match="FractalNet: expected num_classes a whole number >= 1, got 0"):
        net.reset_classifier(0)
    if hasattr(net, "_hub_mixin_config"):
        net.save_pretrained(tmp_path)
        assert fractalnet.FractalNet.from_pretrained(tmp_path).head.out_features == 3
    plain = fractalnet.create("plain_c1")
    plain.reset_classifier(3)
    assert plain(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    net.head = torch.nn.Identity()
    net.recalibrate([torch.randn(4, 3, 8, 8, dtype=torch.float64)])


@pytest.mark.parametrize("options", [{"split_stats": False}, {"granularity": "sample"}, {}])
def test_evaluation_before_training(options):
    """Then one backward: as by the statistics that the evaluation saw."""
    net = fractalnet.FractalNet(7, 2, (4,), image_size=8, **options).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    net.eval()(x).sum().backward()
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss = net(x).sum()
    net.train()(x)
    loss.backward()
    for p, grad in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_paths_are_drawn_on_the_cpu(granularity):
    with torch.device("meta"):  # stands for any other default device
        for seed in range(4):
            path = sample_path(2, 3, 8, granularity=granularity, generator=torch.Generator("cpu").manual_seed(seed))
            assert path.keep.device.type == "cpu" and path.keep.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """With a path that was drawn once the recomputed network is the same one."""
    net, x = fractalnet.FractalNet(5, 3, (4, 8), image_size=8), torch.randn(4, 3, 8, 8, requires_grad=True)
    for _ in range(4):
        path, found = net.sample_path(4), []
        for out in (net(x, path), checkpoint(net, x, path, use_reentrant=reentrant)):
            net.zero_grad()
            out.square().sum().backward()
            found.append([p.grad.clone() for p in net.parameters()])
        assert all(map(torch.equal, *found))


def test_another_classifier_is_in_the_networks_mode():
    net = fractalnet.FractalNet(10, 2, (8,), image_size=8).eval()
    net.reset_classifier(3)
    assert not net.head.training
