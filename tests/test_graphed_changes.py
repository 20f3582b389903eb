"""Graphed steps whose optimizer, rates, frozen weights or processes are not those of the capture any more."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_gpu
from fractalnet import PlainNet
from fractalnet.drop_path import column_path
from fractalnet.graphed import GraphedStep, _problem
from graph_twin import Twin
from test_graphed import NETS, batches, build, hold, ordinary


def load(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_twice(optimizer):
    """The second state may come to the address of the first one."""
    load(optimizer)
    load(optimizer)


def clear(optimizer):
    optimizer.state.clear()


def set_momentum(optimizer):
    optimizer.param_groups[0]["momentum"] *= 0.5


def add_group(optimizer):
    group = optimizer.param_groups[0]
    moved = group["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": 2**-3})


def freeze_statistics(optimizer):
    NET[0].blocks[1].eval()


def freeze(optimizer):
    optimizer.param_groups[0]["params"][-1].requires_grad_(False)


def replace_moment(optimizer):
    entry = next(iter(optimizer.state.values()))
    entry["momentum_buffer"] = torch.zeros_like(entry["momentum_buffer"])


NET = []  # of the test that runs
CHANGES = [load, load_twice, clear, set_momentum, add_group, freeze, freeze_statistics, replace_moment]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("on", ["twin", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_what_changes_of_the_optimizer_is_captured_anew(change, on):
    results = []
    device, dtype = ("cuda", torch.float32) if on == "cuda" else ("cpu", torch.float64)
    for graphed in (False, True):
        net, optimizer, work, state = build(NETS["fused"], device, dtype)
        NET[:] = [net]
        twin = Twin(state) if on == "twin" else None
        step = GraphedStep(net, optimizer, work, capturer=twin, warmup=1) if graphed else ordinary(work)
        losses, path = [], column_path(2, 3, 1)
        for i, (x, y) in enumerate(batches(9, device=device, dtype=dtype)):
            if i in (3, 6):
                (change if i == 3 else set_momentum)(optimizer)
                junk = [torch.full_like(t, 1e3) for t in net.parameters()]  # where memory was given back
            losses.append(step(x, y, path))
        del junk
        results.append(losses + state())
    assert step.problem == "" and (twin is None or (twin.captures, twin.replays) == (3, 6))
    hold(results[1], results[0], 1e-10 if on == "twin" else 1e-3)


@pytest.mark.parametrize("every", [1, 3])
def test_another_momentum_every_few_steps_is_said_once_and_steps_go_on(every):
    """As OneCycleLR sets it: there is never anything to replay, or as good as nothing."""
    net, optimizer, work, state = build(NETS["fused"])
    twin = Twin(state)
    step = GraphedStep(net, optimizer, work, capturer=twin)
    with pytest.warns(UserWarning, match="settings or state, .* change so often .* steps run one kernel") as said:
        for i, (x, y) in enumerate(batches(12 * every)):
            optimizer.param_groups[0]["momentum"] = 0.9 - i // every / 100
            assert step(x, y, column_path(2, 3, 1)).isfinite()
    assert len(said) == 1 and step.problem and twin.captures == (11 if every == 3 else 0)


def test_changes_that_come_to_an_end():
    """As layers that thaw one after the other."""
    net, optimizer, work, state = build(NETS["fused"])
    twin = Twin(state)
    step = GraphedStep(net, optimizer, work, capturer=twin)
    for i, (x, y) in enumerate(batches(20)):
        if i < 10 and i % 2:
            optimizer.param_groups[0]["momentum"] -= 0.01
        step(x, y, column_path(2, 3, 1))
    assert step.problem == "" and twin.captures == 1 and twin.replays > 5


def test_another_parameter_in_its_place():
    """What a graph wrote into is not trained any more."""
    net, optimizer, work, state = build(NETS["fused"])
    optimizer.param_groups[0]["momentum"] = 0  # a fused SGD takes no new parameter beside others that have one
    step = GraphedStep(net, optimizer, work, capturer=Twin(state), warmup=1)
    for i, (x, y) in enumerate(batches(6)):
        if i == 3:
            net.head = torch.nn.Linear(net.head.in_features, 5, dtype=torch.float64)
            before = net.head.weight.detach().clone()
            optimizer.param_groups[0]["params"][-2:] = net.head.parameters()
        step(x, y, column_path(2, 3, 1))
    assert not torch.equal(net.head.weight, before)


def test_rates_as_tensors_and_as_numbers():
    results = []
    for graphed in (False, True):
        net, optimizer, work, state = build(NETS["fused"])
        step = GraphedStep(net, optimizer, work, capturer=Twin(state), warmup=1) if graphed else ordinary(work)
        losses = []
        for (x, y), rate in zip(batches(6), (0.0625, 0.0625, torch.tensor(0.5), 0.0625, 0.0625, 0.25), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            losses.append(step(x, y, column_path(2, 3, 1)))
        results.append(losses + state())
    hold(results[1], results[0], 1e-10)


def test_what_waits_for_other_processes_says_why(monkeypatch):
    """One process that cannot capture would leave them waiting."""
    net = PlainNet(5, 2, (4,), image_size=8)
    optimizer, device = torch.optim.SGD(net.parameters(), lr=0.1, fused=True), torch.device("cuda")
    assert _problem(net, optimizer, device) == ""
    parallel = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(parallel)
    assert "gradients of several processes" in _problem(parallel, optimizer, device)
    net.blocks[0][0].bn.sync_group = "0"  # as sync_batch_norm leaves it
    assert "batch norms are synchronised" in _problem(net, optimizer, device)


def test_a_capture_that_fails_after_the_backward_leaves_nothing():
    """Neither gradients, which have no values, nor what a scaler hands to the optimizer."""
    net, optimizer, _, state = build(NETS["fused"])

    class Fails(Twin):
        recording = False

        def capture(self, call):
            self.recording = True
            try:
                return call()
            finally:
                self.recording = False

    twin = Fails(state)

    def work(x, y, path, dense):
        F.cross_entropy(net(x, path=path, dense=dense), y).backward()
        if twin.recording:
            optimizer.grad_scale = optimizer.found_inf = torch.ones(())
            raise RuntimeError("not permitted")
        norm = torch.stack([p.grad.norm() for p in net.parameters()]).sum()
        optimizer.zero_grad(set_to_none=True)
        return norm

    step, ((x, y),), path = GraphedStep(net, optimizer, work, capturer=twin, warmup=1), batches(1), column_path(2, 3, 1)
    first = step(x, y, path)
    with pytest.warns(UserWarning, match="cannot be captured"):
        torch.testing.assert_close(step(x, y, path), first)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_settings_of_the_capture_are_not_the_optimizers():
    """Adam's capturable is of the capture alone; were it to stay, the next step would be another one."""
    net, _, _, state = build(NETS["fused"])
    optimizer = torch.optim.Adam(net.parameters(), lr=2**-6, fused=True)
    twin = Twin(lambda: state() + [t for held in optimizer.state.values() for t in held.values()])

    def work(x, y, path, dense):
        loss = F.cross_entropy(net(x, path=path, dense=dense), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step = GraphedStep(net, optimizer, work, capturer=twin, warmup=1)
    for x, y in batches(6):
        step(x, y, column_path(2, 3, 1))
    assert (twin.captures, twin.replays, step.problem) == (1, 5, "")
    assert not optimizer.param_groups[0]["capturable"]


def test_a_column_that_is_changed_in_place_is_another_one():
    net, optimizer, work, state = build(NETS["fused"])
    twin = Twin(state)
    step, path = GraphedStep(net, optimizer, work, capturer=twin, warmup=1), column_path(2, 3, 1)
    for i, (x, y) in enumerate(batches(4)):
        if i == 3:
            path.keep.copy_(column_path(2, 3, 2).keep)
        step(x, y, path)
    assert (twin.captures, twin.replays) == (1, 2)


def test_which_networks_and_optimizers_can_be_captured():
    for options in NETS.values():
        net, optimizer, _, _ = build(options)
        assert _problem(net, optimizer, torch.device("cuda")) == ""
    first, *others = net.parameters()
    groups = [{"params": [first], "fused": True}, {"params": others, "fused": False}]
    assert "fused=True" in _problem(net, torch.optim.SGD(groups, lr=0.1), torch.device("cuda"))


def test_a_batch_of_the_host():
    """Is on the network's device wherever a step runs: here one without memory."""
    seen, capturer = [], SimpleNamespace(warm=lambda call: call(), forget=lambda: None)
    net = PlainNet(5, 1, (4,), image_size=8).to("meta")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = GraphedStep(net, optimizer, lambda x, y, *_: seen.append((x.device, y.device)), capturer=capturer)
    for x, y in [*batches(1), *batches(1, size=3)]:  # captured if it came again, and of another shape
        step(x, y)
    assert {device.type for devices in seen for device in devices} == {"meta"} and len(seen) == 2


def test_casts_that_an_outer_autocast_keeps():
    """A replay makes its own, and ordinary steps use none of a capture's."""
    net, optimizer, work, state = build(NETS["fused"], dtype=torch.float32)
    step, path = GraphedStep(net, optimizer, work, capturer=Twin(state), warmup=1), column_path(2, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        for i, (x, y) in enumerate(batches(6, dtype=torch.float32)):
            x, y = (x[:3], y[:3]) if i == 5 else (x, y)  # another shape: an ordinary step
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                wanted = F.cross_entropy(copy.deepcopy(net)(x, path=path), y).detach()
            got = step(x, y, path)
            if i:
                torch.testing.assert_close(got, wanted, rtol=0, atol=2e-3)
