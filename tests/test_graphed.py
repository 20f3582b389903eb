"""Graphed steps: a replay is the ordinary step, whatever path, rate, images and random numbers it is given.

Without a GPU the graphs are those of ``graph_twin``; ``-m gpu`` takes CUDA's.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_gpu
from fractalnet import FractalNet, PlainNet
from fractalnet.drop_path import Path, column_path, full_path
from fractalnet.graphed import GraphedStep
from graph_twin import Apart, Twin, side_by_side

from fractal_kernels import use_backend

NETS = {
    "fused": {"columns": 3, "channels": (8, 12)},
    "dropout": {"columns": 2, "channels": (8, 8), "dropout": (0.1, 0.3)},
    "cumulative": {"columns": 2, "channels": (8,), "momentum": None, "conv_bias": True, "bn_affine": False},
    "one set": {"columns": 3, "channels": (8,), "split_stats": False, "pool_order": "after_join"},
    "per sample": {"columns": 3, "channels": (8, 8), "granularity": "sample"},
    "all statistics": {"columns": 2, "channels": (8,), "granularity": "sample", "stats": "all"},
    "composed": {"columns": 3, "channels": (8, 16), "column_widths": (1, 0.5, 0.5), "kernel_mix": 0.5},
    "composed per sample": {"columns": 3, "channels": (8,), "column_widths": (1, 1, 0.5), "granularity": "sample"},
    "composed cumulative": {"columns": 3, "channels": (8,), "activation": "silu", "momentum": None},
}


def build(options, device="cpu", dtype=torch.float64):
    """A network, what steps it, and every tensor that a step changes."""
    torch.manual_seed(0)
    kind = PlainNet if "depth_per_block" in options else FractalNet
    net = kind(5, image_size=8, **options).to(device, dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=2**-4, momentum=0.9, weight_decay=1e-3, fused=True)

    def work(x, y, path, dense):
        logits = net(x) if kind is PlainNet else net(x, path=path, dense=dense)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return net, optimizer, work, lambda: changing(net, optimizer)


def changing(net, optimizer):
    moments = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    return [*net.parameters(), *net.buffers(), *moments]


def batches(number, size=6, seed=1, device="cpu", dtype=torch.float64):
    g = torch.Generator("cpu").manual_seed(seed)
    for _ in range(number):
        x = torch.randn(size, 3, 8, 8, generator=g, dtype=dtype, device="cpu")
        y = torch.randint(5, (size,), generator=g, device="cpu")
        yield x.to(device), y.to(device)


def train(call, net, optimizer, data):
    """Losses; every step has its own path, seed and learning rate."""
    losses = []
    for i, (x, y) in enumerate(data):
        torch.manual_seed(100 + i)  # of dropout
        optimizer.param_groups[0]["lr"] = 2.0 ** -(4 + i % 3)  # which float32 holds exactly: a graph has it as a tensor
        path = net.sample_path(len(x)) if isinstance(net, FractalNet) else None
        losses.append(call(x, y, path))
    return losses


def ordinary(work, dense=False):
    """Without graphs. Dropout draws as many numbers as there are values, so local steps have to be dense to draw the
    same ones."""
    return lambda x, y, path: work(x, y, path, dense and path.column is None)


def hold(got, expected, tolerance):
    assert len(got) == len(expected) > 5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(NETS))
def test_replays_equal_ordinary_steps(name, backend):
    """In fp64: losses, weights, momenta and running statistics, over every kind of path."""
    with use_backend(backend):
        results = []
        for graphed in (False, True):
            net, optimizer, work, state = build(NETS[name])
            twin = Twin(state)
            step = GraphedStep(net, optimizer, work, capturer=twin) if graphed else ordinary(work, name == "dropout")
            results.append((train(step, net, optimizer, batches(24)), state()))
        kinds = 1 if net.granularity == "sample" else net.columns + 1
        assert step.problem == "" and twin.captures == kinds and twin.replays == 24 - 2 * kinds
        hold(results[1][0], results[0][0], 1e-10)
        hold(results[1][1], results[0][1], 1e-10)


@pytest.mark.parametrize("name", list(NETS))
def test_steps_side_by_side(name):
    """The comparison of the next test, where the graphs are twins'."""
    kinds = []
    for graphed in (False, True):
        net, optimizer, work, state = build(NETS[name])
        step = GraphedStep(net, optimizer, work, capturer=Twin(state)) if graphed else ordinary(work, name == "dropout")
        kinds.append((net, optimizer, step, state))
    paths = [kinds[0][0].sample_path(6) for _ in range(24)]
    assert side_by_side(kinds, batches(24), paths, 1e-8) > 8


@needs_gpu
@pytest.mark.parametrize("name", list(NETS))
def test_cuda_graphs_equal_ordinary_steps(name, gpu_backend):
    """The same on a GPU, with CUDA's own graphs, in float32."""
    kinds = []
    for graphed in (False, True):
        net, optimizer, work, state = build(NETS[name], "cuda", torch.float32)
        step = GraphedStep(net, optimizer, work) if graphed else ordinary(work, name == "dropout")
        kinds.append((net, optimizer, step, state))
    paths = [kinds[0][0].sample_path(6) for _ in range(24)]
    assert side_by_side(kinds, batches(24, device="cuda", dtype=torch.float32), paths, 2e-2) > 8
    assert kinds[1][2].problem == "" and all(g.replay for g in kinds[1][2]._graphs.values())


@needs_gpu
@pytest.mark.parametrize("name", list(NETS))
def test_cuda_graphs_repeat_their_bits(name, gpu_backend):
    results = []
    for _ in range(2):
        net, optimizer, work, state = build(NETS[name], "cuda", torch.float32)
        step = GraphedStep(net, optimizer, work)
        losses = train(step, net, optimizer, batches(24, device="cuda", dtype=torch.float32))
        assert step.problem == "" and all(g.replay for g in step._graphs.values())
        results.append([*losses, *(t.clone() for t in state())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_gpu
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_graphs_of_mixed_steps(dtype, kind, gpu_backend):
    """Autocast, a scaler and clipping in the graph; an autocast around it, which keeps casts of the weights."""
    kinds = []
    for graphed in (False, True):
        net, _, _, _ = build(NETS["fused"], "cuda", torch.float32)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(net.parameters(), lr=2**-10, fused=True, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=dtype == torch.float16)

        def work(x, y, path, dense, net=net, optimizer=optimizer, scaler=scaler):
            with torch.autocast("cuda", dtype):
                loss = F.cross_entropy(net(x, path=path, dense=dense), y)
            scaler.scale(loss).backward()
            if not scaler.is_enabled():  # a fused optimizer divides by the scale itself
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        step = GraphedStep(net, optimizer, work) if graphed else ordinary(work)
        kinds.append((net, optimizer, step, lambda net=net, optimizer=optimizer: changing(net, optimizer)))
    paths = [full_path(2, 3) if i % 2 else column_path(2, 3, 2) for i in range(12)]
    with torch.autocast("cuda", dtype):
        data = batches(12, device="cuda", dtype=torch.float32)
        assert side_by_side(kinds, data, paths, 1e-1, lr=2.0**-10) > 5
    assert kinds[1][2].problem == "" and all(g.replay for g in kinds[1][2]._graphs.values())


@needs_gpu
def test_cuda_goes_on_after_a_failed_capture(gpu_backend):
    """A step that reads the device cannot be captured: it runs as it is, and so do dropout and the next graph."""
    net, optimizer, work, _ = build(NETS["dropout"], "cuda", torch.float32)
    data = list(batches(3, device="cuda", dtype=torch.float32))

    def reads(*args):
        loss = work(*args)
        loss.item()
        return loss

    step = GraphedStep(net, optimizer, reads, warmup=1)
    with pytest.warns(UserWarning, match="cannot be captured"):
        losses = [step(x, y, full_path(2, 2)) for x, y in data]
    torch.cuda.empty_cache()
    again = GraphedStep(net, optimizer, work, warmup=1)
    losses += [again(x, y, full_path(2, 2)) for x, y in data]
    assert again.problem == "" and all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("kind", ["column", "local"])
@pytest.mark.parametrize("name", list(NETS))
def test_the_host_and_the_device_exchange_nothing(name, kind, monkeypatch):
    """Neither forward nor backward copies from the host or reads the device: either would break a capture."""
    autocast = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device != ("meta",) and autocast(*device))
    net = build(NETS[name])[0].to("meta")
    path = column_path(len(net.blocks), net.columns, 1)
    if kind == "local":
        keep = full_path(len(net.blocks), net.columns).keep
        path = Path((keep if net.granularity == "batch" else keep.unsqueeze(3).repeat(1, 1, 1, 6)).to("meta"))
    x, y = torch.empty(6, 3, 8, 8, dtype=torch.float64, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    with use_backend("reference"), Apart():
        F.cross_entropy(net(x, path=path, dense=kind == "local"), y).backward()
    assert all(p.grad.device.type == "meta" for p in net.parameters())


def test_a_network_without_paths():
    results = []
    for graphed in (False, True):
        net, optimizer, work, state = build({"depth_per_block": 2, "channels": (6, 8)})
        twin = Twin(state)
        step = GraphedStep(net, optimizer, work, capturer=twin) if graphed else ordinary(work)
        results.append((train(step, net, optimizer, batches(6)), state()))
    assert (twin.captures, twin.replays) == (1, 4)
    hold(results[1][0] + results[1][1], results[0][0] + results[0][1], 1e-10)


def test_a_loss_stays_what_it_was():
    net, optimizer, work, state = build(NETS["fused"])
    step = GraphedStep(net, optimizer, work, capturer=Twin(state), warmup=1)
    path = column_path(2, 3, 0)
    losses = [step(x, y, path) for x, y in batches(5)]
    assert len({float(loss) for loss in losses}) == 5


def test_other_shapes_and_evaluation_mode_run_as_they_are():
    net, optimizer, work, state = build(NETS["fused"])
    twin = Twin(state)
    step = GraphedStep(net, optimizer, work, capturer=twin, warmup=1)
    for size in (6, 6, 6, 4, 6):
        for x, y in batches(1, size):
            step(x, y, full_path(2, 3))
    assert (twin.captures, twin.replays) == (1, 3)
    net.eval()
    for x, y in batches(1):
        step(x, y, full_path(2, 3))
    assert twin.replays == 3


def test_what_is_dropped_moves_nothing():
    """A replay with other masks than those of the capture: dead units keep their statistics."""
    net, optimizer, work, state = build(NETS["fused"])
    step = GraphedStep(net, optimizer, work, capturer=Twin(state), warmup=1)
    for x, y in batches(3):
        step(x, y, full_path(2, 3))
    shallow = Path(column_path(2, 3, 0).keep)  # a local path that happens to keep one column
    block = net.blocks[0]
    before = block.running_mean.clone(), block.num_batches_tracked.clone()
    for x, y in batches(1):
        step(x, y, shallow)
    moved = (block.num_batches_tracked - before[1]).bool()
    unit = block.find(0, 0).id
    assert moved[0, unit] and moved.sum() == 1
    assert torch.equal((block.running_mean != before[0]).any(2), moved)


def test_a_path_that_was_not_recorded_runs_as_it_is():
    net, optimizer, work, state = build(NETS["fused"])
    twin = Twin(state)
    step = GraphedStep(net, optimizer, work, capturer=twin, warmup=1)
    for x, y in batches(2):
        step(x, y, column_path(2, 3, 1))
    other = Path(full_path(2, 3).keep, column=1)
    per_sample = Path(full_path(2, 3).keep.unsqueeze(3).repeat(1, 1, 1, 6))
    for x, y in batches(2):
        step(x, y, full_path(2, 3))
    ((x, y),) = batches(1)
    for path in (other, per_sample):
        same = copy.deepcopy(net)
        torch.testing.assert_close(step(x, y, path), F.cross_entropy(same(x, path=path), y))
    assert twin.replays == 2


def test_tied_networks_and_evaluation_draw_their_own_paths():
    net, optimizer, _, _ = build({"columns": 2, "channels": (4,), "global_mode": "tied"})
    seen = []
    step = GraphedStep(net, optimizer, lambda x, y, path, dense: seen.append(path) or x.sum())
    for x, y in batches(1):
        step(x, y)
        net.eval()
        step(x, y)
    assert seen == [None, None] and net.path_step == 0


class Fails(Twin):
    def capture(self, call):
        call()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_capture_that_fails_is_said_once_and_steps_go_on():
    net, optimizer, work, state = build(NETS["fused"])
    step = GraphedStep(net, optimizer, work, capturer=Fails(state), warmup=1)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing; steps run"):
        for x, y in batches(2):
            step(x, y, full_path(2, 3))
    assert step.problem.startswith("a step cannot be captured: RuntimeError: operation not")
    assert not step._graphs  # their memory is given back
    assert optimizer.param_groups[0]["lr"] == 2**-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in batches(2):
            assert step(x, y).isfinite()


@pytest.mark.parametrize(
    "options, fused, words",
    [
        ({}, True, "CUDA graphs need a CUDA device, and the network is on cpu"),
        ({"columns": 2}, False, "expected SGD(fused=True)"),
        ({"global_mode": "tied"}, True, '"tied" draws its path'),
    ],
)
def test_what_cannot_be_captured_says_why(options, fused, words, monkeypatch):
    net = FractalNet(5, **({"columns": 2, "channels": (4,), "image_size": 8} | options))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    if options:
        from fractalnet import graphed

        problem = graphed._problem(net, optimizer, torch.device("cuda"))
    else:
        problem = GraphedStep(net, optimizer, lambda *_: None).problem
    assert words in problem


@pytest.mark.parametrize("warmup", [0, 1.5, True])
def test_wrong_warmup(warmup):
    net, optimizer, work, _ = build(NETS["fused"])
    with pytest.raises(ValueError, match=f"GraphedStep: expected warmup >= 1, got {warmup}"):
        GraphedStep(net, optimizer, work, warmup=warmup)
