"""CUDA graphs without CUDA: a step is recorded, operator by operator, and replayed on the tensors of the recording.

What a replay shares with a real one: the host's code does not run again, so whatever the step took from the host (a
path, a rate, a Python number) stays as it was; inputs, weights, statistics and momenta are read and written where they
were; and random numbers come from the generator as it stands. The operators of the block, which are opaque to the
dispatcher, are recorded from the inside, as CUDA would.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fractal_kernels import block_ops

_OPS = torch.ops.fractal_kernels
INSIDE = {
    _OPS.block_forward: block_ops._block_forward,
    _OPS.block_backward: block_ops._block_backward,
}


class Inside(TorchDispatchMode):
    """Sees every operator that runs, those inside of the block's too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if inside := INSIDE.get(func.overloadpacket):
            with self:
                return inside(*args, **kwargs)
        out = func(*args, **kwargs)
        self.see(func, args, kwargs, out)
        return out


class Recorder(Inside):
    """Every operator that runs, with what it took and returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def see(self, *call):
        self.calls.append(call)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            memory = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            fresh = [t.untyped_storage().data_ptr() not in memory for t in tensors(out)]
            if not writes and not any(fresh):
                continue  # views: they are where they were
            again = func(*args, **kwargs)
            for old, new, anew in zip(tensors(out), tensors(again), fresh, strict=True):
                if anew:
                    old.copy_(new)


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Twin:
    """Stands in for CUDA in a ``GraphedStep``. ``state()`` lists the tensors that a step changes."""

    def __init__(self, state):
        self.state, self.captures, self.replays = state, 0, 0

    def warm(self, call):
        return call()

    def forget(self):
        pass

    def capture(self, call):
        tensors, generator = self.state(), torch.get_rng_state()
        before = [t.detach().clone() for t in tensors]
        recorder = Recorder()
        with recorder:
            out = call()
        with torch.no_grad():  # a capture runs nothing
            for t, value in zip(tensors, before, strict=True):
                t.copy_(value)
        torch.set_rng_state(generator)
        self.captures += 1

        def replay():
            self.replays += 1
            recorder.replay()

        return replay, out


class Apart(Inside):
    """Refuses what a capture cannot hold, on tensors of the "meta" device: copies between it and the host. That the
    host reads nothing of it, PyTorch sees to."""

    def see(self, func, args, kwargs, out):
        # A number in a tensor of the host's is passed to a kernel by value, unless it is copied.
        copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.copy)
        seen = [t for t in (*tensors((args, kwargs)), *tensors(out)) if t.dim() or t.is_meta or copies]
        if len({t.device.type for t in seen}) > 1:
            raise AssertionError(f"{func} takes from one device to the other")


def side_by_side(kinds, data, paths, tolerance, lr=2**-4):
    """Every step from what the ordinary one began with: what it does to weights, momenta and statistics, and its loss.

    kinds: net, optimizer, step and state of the ordinary run and of the graphed one. Returns the number of replays.
    """
    (net, optimizer, step, state), (graphed, its_optimizer, its_step, its_state) = kinds
    replays = 0
    for i, ((x, y), path) in enumerate(zip(data, paths, strict=True)):
        began = [t.detach().clone() for t in state()]
        if len(began) == len(its_state()):
            with torch.no_grad():
                for to, t in zip(its_state(), began, strict=True):
                    to.copy_(t)
        losses = []
        recorded = its_step._graphs.get(path.column)
        replays += recorded is not None and recorded.replay is not None
        for call, opt in ((step, optimizer), (its_step, its_optimizer)):
            torch.manual_seed(100 + i)  # of dropout
            opt.param_groups[0]["lr"] = lr * 2.0 ** -(i % 3)  # which float32 holds exactly
            losses.append(call(x, y, path))
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
        if len(began) == len(state()):
            moved = 0
            for was, a, b in zip(began, state(), its_state(), strict=True):
                change = torch.linalg.vector_norm((a - was).double())
                # Beside a float's own: a bias before a batch norm has a gradient of nothing but rounding.
                rounding = 1e-6 * torch.linalg.vector_norm(was.double()) + 1e-7 * was.numel() ** 0.5
                assert torch.linalg.vector_norm((a - b).double()) <= tolerance * change + rounding, i
                moved += bool(change > 10 * rounding)
            assert moved > 3, i
    return replays
