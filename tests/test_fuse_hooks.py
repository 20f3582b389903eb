"""fuse(): hooks of containers, which stand between a batch norm and its ReLU."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fractal_kernels import fuse


@pytest.mark.parametrize(
    "kind, at, hook",
    [
        ("register_forward_hook", "body", lambda m, x, out: out + 1 if type(out) is Tensor else None),
        ("register_forward_pre_hook", "act", lambda m, x: (x[0] + 1,) if type(x[0]) is Tensor else None),
        ("register_full_backward_hook", "act", lambda m, dx, dout: (dx[0] + 1,)),
        ("register_full_backward_pre_hook", "body", lambda m, dout: (dout[0] + 1,)),
    ],
)
def test_fuse_takes_note_of_hooks_of_containers(kind, at, hook):
    """Which see what is between a batch norm and its ReLU; what is inside of them is fused all the same."""
    inside = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    plain = nn.Sequential()
    plain.body, plain.act = nn.Sequential(*inside), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1))
    fused = copy.deepcopy(plain)
    for model in (plain, fused):
        getattr(getattr(model, at), kind)(hook)
    report = fuse(fused)
    assert report.fused == ["body.1"] and "hooks_of_a_container" in str(report)
    x, results = torch.randn(2, 3, 6, 6), []
    for model in (plain, fused):
        mine = x.clone().requires_grad_()
        out = model(mine)
        results.append([out, *torch.autograd.grad(out.square().sum(), [mine, *model.parameters()])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_fuse_takes_note_of_what_hooks_see_by_keyword():
    class Act(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, *, x: Tensor) -> Tensor:
            return self.relu(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.act = nn.BatchNorm2d(3), Act()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x=self.bn(x))

    model = Model()
    model.act.register_forward_pre_hook(lambda m, args, kwargs: None, with_kwargs=True)
    assert fuse(model).fused == []


class Body(nn.Module):
    """Ends in a batch norm, and returns it in a container."""

    def __init__(self, pack) -> None:
        super().__init__()
        self.conv, self.bn1, self.relu, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)
        self.pack = pack

    def forward(self, x: Tensor, into: list):
        into.append(x)
        return self.pack(self.bn2(self.relu(self.bn1(self.conv(x)))))


@dataclass
class Packed:
    y: Tensor


CONTAINERS = {
    "list": (lambda y: [y], lambda out: [*out][0]),
    "dict": (lambda y: OrderedDict(y=y), lambda out: out.popitem()[1]),
    "dataclass": (Packed, lambda out: out.y),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("hook", [lambda m, x, out: None, lambda m, x, out: m.pack(m.bn1(x[0]))], ids=["sees", "calls"])
def test_fuse_takes_note_of_what_hooks_see_in_containers(name, hook):
    """Of what a hooked module is given and returns, of whatever classes; and of what the hook calls."""
    pack, unpack = CONTAINERS[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.relu = Body(pack), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            seen: list = []
            out = self.body(x, seen)
            return self.relu(unpack(out)) + seen.pop()

    plain = Model()
    plain.body.register_forward_hook(hook)
    fused, x = copy.deepcopy(plain), torch.randn(2, 3, 4, 4)
    assert fuse(fused).fused == ([] if hook(plain.body, [x], None) else ["body.bn1"])
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "not traced"])
def test_fuse_again_after_hooks_of_containers_were_added(traced):
    """A ReLU that a compiler is to leave out does its work again where a hook may come before it."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.ReLU())
    assert fuse(model).fused == ["0.1"] and model[1].alone
    model[0].register_forward_hook(lambda m, x, out: out - 1 if traced or type(out) is Tensor else None)
    fuse(model)
    assert not model[1].alone
