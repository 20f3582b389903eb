"""Run by test_device_twin.py in a process of its own: what holds on a device that is not the CPU."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import device_twin as twin
import fractalnet
import pytest
import torch
import torch.nn.functional as F
from fractalnet import config, devices, train
from fractalnet.drop_path import column_path, full_path
from torch import nn

import fractal_kernels as fk
from benchmarks.baselines import PublicFractalNet
from fractal_kernels.schedule import live_units, schedule

FUSED = [
    {},
    {"conv_bias": True, "bn_affine": False},
    {"stats": "all", "pool_order": "after_join"},
    {"split_stats": False, "last_pool": False},
    {"momentum": None},
    {"pool": "avg", "stem": "resnet", "image_size": 32},
]
COMPOSED = [
    {"kernel_mix": 0.5},
    {"column_widths": [1, 0.5, 0.5], "activation": "silu"},
    {"kernel_mix": 0.25, "momentum": None},
]
DROPOUT = [{"dropout": [0.1, 0.1]}, {"dropout": [0.1, 0.1], "dropout_place": "activation"}]
Y = torch.arange(6) % 5


@contextmanager
def going_on():
    """Inside, the host does not wait for the device."""
    twin.waits.clear()
    yield
    assert twin.waits == []


def there(t: torch.Tensor) -> torch.Tensor:
    return t.to(twin.NAME)


def same(ours, theirs, **tolerance):
    """``ours`` are on the device, ``theirs`` are not."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(twin.memory(a.detach()), b.detach(), **tolerance)


def two_nets(options, dtype=torch.float32):
    size = options.get("image_size", 8)
    here = fractalnet.FractalNet(5, 3, (16, 16), **{"image_size": 8} | options).to(dtype)
    return here, copy.deepcopy(here).to(twin.NAME), torch.randn(6, 3, size, size, dtype=dtype)


def state(net):
    return [v for name, v in net.state_dict().items() if "extra_state" not in name]


def work_of(net, optimizer):
    def work(x, y, path, dense):
        loss = F.cross_entropy(net(x, path=path, dense=dense).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return work


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, fused=True)


def test_the_twin():
    """It notices what the other tests rely on."""
    t, other = there(torch.arange(3.0)), torch.arange(3.0)
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        t + other
    with pytest.raises(RuntimeError, match="tensors of two devices"):
        torch.stack([t, other])
    assert type(t * torch.tensor(2.0)) is twin.Twin and t.device.type == twin.NAME
    for read in (
        lambda: t[0].item(),
        lambda: bool(t.any()),
        lambda: t.cpu(),
        lambda: there(other),
        lambda: t.copy_(other),
        lambda: t[t > 1],
        lambda: t[other.long()],
        lambda: (t > 1).nonzero(),
        lambda: other.copy_(t, non_blocking=True),
        lambda: t.to("cpu", non_blocking=True),
        lambda: torch.tensor([1.0], device=twin.NAME),
    ):
        twin.waits.clear()
        read()
        assert twin.waits
    with going_on():
        twin.copies.clear()
        other.to(twin.NAME, non_blocking=True)
        t.copy_(other, non_blocking=True)
        assert len(twin.copies) == 2
        assert torch.empty(2, device=twin.NAME).device.type == (t[t.long()] + 1).device.type == twin.NAME
    with twin.kernels(), pytest.raises(AssertionError, match="join_forward was given tensors on .*cpu"):
        fk.backends.launcher("cuda").join_forward(t, [other], None, [], [], [], [], 0.0, 0, True)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("options", [*FUSED, *COMPOSED], ids=str)
def test_training_and_evaluation(options, granularity, dense):
    """In float64, by the reference: to the last digits what the CPU finds."""
    here, net, x = two_nets(options | {"granularity": granularity}, torch.float64)
    works = work_of(here, sgd(here)), work_of(net, sgd(net))
    exact = {"rtol": 1e-8, "atol": 1e-9}
    images, y = there(x), there(Y)
    for _ in range(3):
        path = here.sample_path(6)
        theirs = works[0](x, Y, path, dense)
        with going_on():
            ours = works[1](images, y, path, dense)
        same([ours], [theirs], **exact)
    same(state(net), state(here), **exact)
    here.eval(), net.eval()
    with torch.no_grad():
        theirs = [here(x), here(x, column=0), here(x, column=2), *(out for _, _, out in here.anytime(x))]
        with going_on():
            ours = [
                net(images),
                net(images, column=0),
                net(images, column=2),
                *(out for _, _, out in net.anytime(images)),
            ]
    same(ours, theirs, **exact)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
@pytest.mark.parametrize("options", [*FUSED, *COMPOSED, *DROPOUT], ids=str)
def test_mixed_precision_on_the_kernels(options, granularity):
    """The kernels' arguments are all on the device."""
    here, net, x = two_nets(options | {"granularity": granularity})
    images, y, work = there(x), there(Y), work_of(net, sgd(net))
    path = here.sample_path(6)
    with twin.kernels(), torch.autocast(twin.NAME, torch.bfloat16), going_on():
        loss = work(images, y, path, False)
    if "dropout" not in options:
        assert (twin.memory(loss) - F.cross_entropy(here(x, path=path), Y)).abs() < 0.1
    assert all(p.dtype == torch.float32 and twin.memory(p).isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    "options",
    [
        "--data.translate 1 --data.mirror true",
        "--accumulate 2 --label_smoothing 0.1 --clip 1 --network.dropout [.1,.1,.1]",
        "--network.granularity sample --optimizer AdamW",
        "--network.granularity sample --network.kernel_mix 0.5",
        "--network.global_mode tied --ema 0.9",
    ],
)
def test_a_training_goes_on(monkeypatch, options):
    """Between two epochs nothing waits: neither the loader and its augmentation, nor the step, nor the scheduler."""
    monkeypatch.setattr("lightning.fabric.accelerators.cpu.CPUAccelerator.setup_device", lambda self, device: None)
    found, plain = config.load("digits", options.split())
    fabric = devices.fabric_for(found)
    monkeypatch.setattr(fabric.strategy, "_root_device", torch.device(twin.NAME, 0))
    fabric.launch()
    run = train.Run(found, plain, "digits", fabric)
    run.model.train()
    batches = run.loader.epoch(0, 0)
    for _ in range(4):
        with going_on():
            run.step(*next(batches))
    assert run.net.head.weight.device.type == twin.NAME and run.steps == 4 and twin.memory(run.loss) > 0


def test_launches_of_a_step():
    """Of 20 layers in float32: what a GPU is to be given as little of as possible."""
    blocks, columns = 5, 3
    net, public = (
        cls(10, columns, (16,) * blocks, image_size=32).to(twin.NAME)
        for cls in (fractalnet.FractalNet, PublicFractalNet)
    )
    x, y = there(torch.randn(4, 3, 32, 32)), there(torch.zeros(4, dtype=torch.long))

    def launches(model, path):
        optimizer = sgd(model)
        for _ in range(2):
            twin.launched.clear()
            loss = F.cross_entropy(model(x) if path is None else model(x, path=path), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return len(twin.launched)

    with twin.kernels():
        assert launches(net, full_path(blocks, columns)) <= 173
        assert launches(net, column_path(blocks, columns, 0)) <= 83
        assert launches(net, column_path(blocks, columns, 2)) <= 198
    assert launches(public, None) > 4 * 173


class Strict:
    """Captures by running once, where neither the host waits nor anything is copied from it."""

    def __init__(self):
        self.captured = 0

    def warm(self, call):
        return call()

    def capture(self, call):
        twin.copies.clear()
        with going_on():
            out = call()
        assert twin.copies == []
        self.captured += 1
        return (lambda: None), out

    def forget(self):
        pass


@pytest.mark.parametrize("options", [*FUSED, *COMPOSED, *DROPOUT, {"granularity": "sample"}], ids=str)
def test_what_a_graph_records_needs_no_host(options):
    _, net, x = two_nets(options)
    optimizer, capturer = sgd(net), Strict()
    step = fractalnet.GraphedStep(net, optimizer, work_of(net, optimizer), warmup=1, capturer=capturer)
    images, y = there(x), there(Y)
    paths = [net.sample_path(6) for _ in range(24)]
    with twin.kernels(), going_on():
        for path in paths:
            step(images, y, path)
    kinds = {path.column for path in paths if sum(p.column == path.column for p in paths) > 1}
    assert capturer.captured == len(kinds) and not step.problem


@pytest.mark.parametrize("mask", [None, "batch", "sample"])
@pytest.mark.parametrize("pool", [None, "before", "after"])
def test_joins(mask, pool):
    """The same bits as on the CPU, by the same launchers."""
    masks = {None: None, "batch": torch.tensor([True, False, True]), "sample": torch.rand(3, 4) > 0.4}
    ys = [torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last) for _ in range(3)]
    weights = [torch.randn(8) for _ in ys]
    found = []
    with twin.kernels():
        for move in (there, lambda t: t.clone(memory_format=torch.preserve_format)):
            inputs = [move(y).requires_grad_() for y in ys]
            ws, m = [move(w).requires_grad_() for w in weights], None if mask is None else move(masks[mask])
            running = [[move(torch.ones(8)) for _ in ys] for _ in range(2)]
            out = [], inputs, ws, *running
            share = move(torch.tensor(0.3))
            with going_on():
                for stats in ("all", "live"):
                    for momentum in (0.1, share):
                        options = {"training": True, "momentum": momentum, "stats": stats, "pool": pool}
                        out[0].append(fk.bn_relu_join(inputs, ws, ws, *running, m, **options))
                out[0].append(fk.bn_relu_join(inputs, ws, None, *running, m))
                out[0].append(fk.masked_mean_join(inputs, m, pool=pool))
                sum(o.square().sum() for o in out[0]).backward()
            found.append([*out[0], *(t.grad for t in (*inputs, *ws)), *running[0], *running[1]])
    same(*found, rtol=0, atol=0)


def test_modules():
    parts = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    parts += [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, momentum=None), nn.ReLU()]
    eager = nn.Sequential(*parts)
    assert len(fk.fuse(eager, recompute=True).fused) == 2
    net, x = copy.deepcopy(eager).to(twin.NAME), torch.randn(4, 3, 8, 8)
    images = there(x)
    eager(x).square().sum().backward()
    with going_on():
        net(images).square().sum().backward()
    same([*net.state_dict().values()], [*eager.state_dict().values()])
    same([p.grad for p in net.parameters()], [p.grad for p in eager.parameters()], rtol=1e-4, atol=1e-3)
    ys = [there(torch.randn(4, 3, 4, 4)).requires_grad_() for _ in range(3)]
    with going_on():
        for granularity in ("batch", "sample"):
            fk.DropPathJoin(0.3, granularity=granularity)(ys).sum().backward()
            assert (
                fk.drop_path_mask(3, 0.3, 4 if granularity == "sample" else None, device=twin.NAME).device.type
                == twin.NAME
            )


def test_paths_of_a_block():
    path = torch.tensor([[False, True], [True, True]])
    live = torch.stack(live_units(schedule(2), path))
    weights = [torch.randn(8, 3, 3, 3), torch.randn(4, 4, 3, 3)]
    x, many = torch.randn(5, 3, 8, 8), torch.rand(2, 2, 5) > 0.4
    gamma, beta = torch.rand(2, 3, 4) + 0.5
    cases = [(p, {}) for p in (path, many)] + [(many, {"stats": "live"}), (path, {"dense": True})]
    cases += [(path, {"dense": True, "live": live}), (many, {"dense": True})]
    for p, options in cases:
        params = [t.requires_grad_() for t in (*weights, gamma, beta)]
        theirs = fk.fractal_block(x, weights, gamma, beta, p, **options)
        expected = torch.autograd.grad(theirs.out.square().sum(), params)
        *ws, g, b = (there(t.detach()).requires_grad_() for t in params)
        images, away = there(x), {k: there(v) if k == "live" else v for k, v in options.items()}
        for where in (p, there(p)) if options.get("dense") else (p,):
            with going_on():
                ours = fk.fractal_block(images, ws, g, b, where, **away)
                found = torch.autograd.grad(ours.out.square().sum(), [*ws, g, b])
            same(ours, theirs, rtol=1e-4, atol=1e-4)
            same(found, expected, rtol=1e-3, atol=1e-3)


def test_what_is_trained_moves_on():
    """Statistics taken anew, columns of their own, early exits, columns that are tied."""
    here, net, x = two_nets({})
    batches = [x, torch.randn(6, 3, 8, 8)]
    images = [there(b) for b in batches]
    for column in (None, 2):
        here.recalibrate(batches, column=column)
        with going_on():
            net.recalibrate(images, column=column)
    same(state(net), state(here), rtol=1e-4, atol=1e-5)
    here.eval(), net.eval()
    same(net.early_exit(images[0], 0.3), here.early_exit(x, 0.3), rtol=1e-4, atol=1e-4)
    same([net.extract_column(1)(images[0])], [here.extract_column(1)(x)], rtol=1e-4, atol=1e-4)
    tied = fractalnet.FractalNet(5, 3, (16,), image_size=8, global_mode="tied").to(twin.NAME)
    y = there(Y)
    with going_on():
        fractalnet.tied_loss(tied(images[0]), y).backward()
