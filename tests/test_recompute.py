"""What is computed again in backward: the same gradients, to the last bit, and nothing kept for them."""

import copy
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import fractal_kernels as fk
from fractal_kernels.ops import recompute
from fractal_kernels.ops.conv import conv2d_1x1_pooled

GPU = True  # these tests run on a GPU's backends too, as those of test_ops.py do

KINDS = {  # what may be computed again, of a convolution's output y [N, 16, H, W]
    "bn_relu": lambda y, v, **o: fk.bn_relu(y, *v, *map(torch.zeros_like, v), training=True, **o),
    "frozen": lambda y, v, **o: fk.bn_relu(y, *v, v[0].detach(), v[0].detach() + 2, training=False, **o),
    "no affine": lambda y, v, **o: fk.bn_relu(y, None, None, None, None, training=True, **o),
    "join": lambda y, v, **o: fk.bn_relu_join(
        [y, y.flip(0)], None, None, None, None, torch.tensor([[1, 0, 1], [0, 1, 1]]), True, pool="before", **o
    ),
}


def draw(dtype=torch.float32, layout=torch.channels_last):
    torch.manual_seed(0)
    tensors = [torch.randn(3, 16, 8, 8), torch.randn(16, 16, 3, 3), torch.randn(16, 16, 1, 1), *torch.rand(2, 16)]
    moved = [t.to(dtype).contiguous(memory_format=layout) if t.dim() == 4 else t for t in tensors]
    return [t.requires_grad_() for t in moved]


def network(kind, backend, tensors, again=True, reads=None):
    """Convolution, join, and two readers of its output: a 3x3 and a 1x1 convolution; ``reads`` sees the output."""
    x, w, w_1x1, *vectors = tensors
    h = KINDS[kind](F.conv2d(x, w, padding=1), vectors, backend=backend)
    if reads is not None:
        reads(h)
    with fk.recomputed(h if again else x):
        return F.conv2d(h, w, padding=1), F.conv2d(h, w_1x1)


def gradients(outs, tensors, **options):
    used = [t for t in tensors if t.requires_grad]
    return torch.autograd.grad(sum((o * o).sum() for o in outs), used, allow_unused=True, **options)


def same(left, right):
    return all(a is b is None or torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_gradients(kind, dtype, layout, backend):
    tensors = draw(dtype, layout)
    expected = gradients(network(kind, backend, tensors, again=False), tensors)
    assert same(gradients(network(kind, backend, tensors), tensors), expected)
    assert sum(g is not None and bool(g.count_nonzero()) for g in expected) >= 3


@pytest.mark.parametrize("again", [True, False])
def test_nothing_is_kept(again, backend):
    """Nobody holds the output where it is computed again, not after a backward of a kept graph either."""
    tensors, outputs = draw(), []
    outs = network("bn_relu", backend, tensors, again, lambda h: outputs.append(weakref.ref(h)))
    assert (outputs[0]() is None) == again
    first = gradients(outs, tensors, retain_graph=True)
    assert same(gradients(outs, tensors, retain_graph=True), first)


def test_the_rest_is_saved_as_ever():
    """Hooks around the block see all that is saved but the output: offloading and checkpointing go on."""
    tensors, saved = draw(), []
    expected = gradients(network("bn_relu", None, tensors, again=False), tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t.clone(), lambda t: t):
        outs = network("bn_relu", None, tensors)
    sizes = [t.numel() for t in saved]
    assert sizes.count(tensors[0].numel()) == 2 and sizes.count(tensors[1].numel()) == 2  # x and y; the weight, twice
    assert same(gradients(outs, tensors), expected)
    again = checkpoint(lambda *t: network("bn_relu", None, t), *tensors, use_reentrant=False)
    assert same(gradients(again, tensors), expected)


def test_only_some_gradients(backend):
    """Of one reader, then of both: what is held from the first use to the last is not what a later pass sees."""
    tensors = draw()
    outs = network("bn_relu", backend, tensors)
    plain = network("bn_relu", backend, tensors, again=False)
    for chosen in (slice(0, 1), slice(1, 2), slice(0, 2)):
        expected = gradients(plain[chosen], tensors, retain_graph=True)
        assert same(gradients(outs[chosen], tensors, retain_graph=True), expected)


@pytest.mark.parametrize("changed", ["y", "weight"])
def test_what_changed_is_told(changed):
    """In what the join saved, and in what the reader did."""
    x, w, *_ = draw()
    y = F.conv2d(x, w.detach().clone(), padding=1)  # which would tell of the weight, too
    h = fk.bn_relu(y, None, None, None, None, training=True)
    with fk.recomputed(h):
        out = F.conv2d(h, w)
    with torch.no_grad():
        (y if changed == "y" else w).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("inside", [False, True])
def test_a_changed_output_is_kept(inside):
    """What was changed after the join cannot be computed again by it."""
    x, w, *_ = draw()
    grads = []
    for again in (False, True):
        h = fk.bn_relu(F.conv2d(x, w, padding=1), None, None, None, None, training=True)
        if not inside:
            h.mul_(3)
        with fk.recomputed(h if again else x):
            out = F.conv2d(h.mul_(3) if inside else h, w)
        grads.append(gradients([out], [x, w]))
    assert same(*grads)


def test_joins_in_a_checkpoint_and_readers_outside():
    """A checkpoint's tensors are there for one use: the output is kept."""
    torch.manual_seed(0)
    x, net = torch.randn(2, 16, 8, 8), nn.Sequential(*(fk.ConvBNReLU(16, 16, recompute=True) for _ in range(2)))
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net[1](checkpoint(net[0], x, use_reentrant=False)).square().sum().backward()
    assert same([p.grad for p in net.parameters()], expected)


def test_readers_in_a_checkpoint(monkeypatch):
    """A checkpoint keeps its arguments anyway: nothing is computed again."""
    monkeypatch.setattr(recompute, "again", lambda node: pytest.fail("computed again"))
    x, w, *_ = draw()
    h = fk.bn_relu(F.conv2d(x, w, padding=1), None, None, None, None, training=True)

    def read(h):
        with fk.recomputed(h):
            return F.conv2d(h, w)

    checkpoint(read, h, use_reentrant=False).sum().backward()


class Spy:
    pass


def test_no_cycles():
    """An operator that saves its own output does not hold the graph where no backward follows."""
    x, w, *_ = draw()
    h = fk.bn_relu(F.conv2d(x, w, padding=1), None, None, None, None, training=True)
    h.grad_fn.metadata["spy"] = spy = Spy()
    with fk.recomputed(h):
        out = torch.sigmoid(F.conv2d(h, w))
    there = weakref.ref(spy)
    del h, out, spy
    assert there() is None


def test_hooks_of_all_kinds():
    """Where hooks are forbidden it does nothing; one without a module is one like others."""
    tensors = draw()
    expected = gradients(network("bn_relu", None, tensors, again=False), tensors)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        outs = network("bn_relu", None, tensors)
    assert same(gradients(outs, tensors), expected)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        outs = network("bn_relu", None, tensors)
    assert same(gradients(outs, tensors), expected)


def test_pooled_projection(backend):
    """A 1x1 convolution and a max-pool at once, whatever autocast does in backward."""
    x, _, w, *_ = draw()
    grads = []
    for project in (lambda: conv2d_1x1_pooled(x, w, backend), lambda: F.max_pool2d(F.conv2d(x, w), 2)):
        out = project()
        with torch.autocast(x.device.type, torch.bfloat16):
            grads.append([out, *torch.autograd.grad(out.square().sum(), [x, w])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_of_anything_else_nothing_happens():
    x, w, *_ = draw()
    frozen = x.detach()
    for other in (x, frozen, F.relu(x), fk.bn_relu(frozen, None, None, None, None, training=True)):
        outer = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, o=outer: o.append(t) or t, lambda t: t):
            with fk.recomputed(other):
                F.conv2d(other, w)
        assert any(t is other for t in outer)
    chain = nn.Sequential(*(fk.ConvBNReLU(16, 16, recompute=True) for _ in range(2)))
    with torch.inference_mode():
        assert chain(frozen).is_inference()
    with pytest.raises(TypeError, match="recomputed: expected output to be a Tensor, got list"):
        with fk.recomputed([x]):
            pass


def test_compiled():
    tensors = draw()
    compiled = torch.compile(lambda *t: network("bn_relu", None, t), backend="aot_eager", fullgraph=True)
    expected = gradients(network("bn_relu", None, tensors), tensors)
    for a, b in zip(gradients(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_chains(fused, backend):
    """Of convolution, batch norm and ReLU one tensor a step is kept, by the module's option or fuse's."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)

    def chain(recompute):
        if not fused:
            return nn.Sequential(*(fk.ConvBNReLU(16, 16, recompute=recompute) for _ in range(4)))
        steps = [(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4)]
        net = nn.Sequential(*(layer for step in steps for layer in step))
        assert len(fk.fuse(net, recompute=recompute).fused) == 4
        return net

    nets = [chain(False), chain(True)]
    nets[1].load_state_dict(nets[0].state_dict())
    grads, kept = [], []
    with fk.use_backend(backend):
        for net in (*nets, copy.deepcopy(nets[1])):
            saved: dict[int, torch.Tensor] = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, s=saved: s.setdefault(t.data_ptr(), t), lambda t: t
            ):
                out = net.train()(x)
            kept.append(sum(t.numel() == x.numel() for t in saved.values()))
            out.square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
    assert kept == [8, 5, 5]  # the image, and per step y; or y and, but of the last one, its activation
    assert same(grads[0], grads[1]) and same(grads[0], grads[2])


def test_pools_of_plain_joins(backend):
    """masked_mean_join pools as max_pool2d does, and keeps its inputs and the mask: no indices."""
    ys = [torch.randn(2, 5, 6, 7, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    parts = [torch.where(m.view(2, 1, 1, 1), y, 0) for m, y in zip(mask, ys, strict=True)]
    for pool, expected in (
        ("before", sum(F.max_pool2d(y, 2) for y in parts) / 2),
        ("after", F.max_pool2d(sum(parts) / 2, 2)),
    ):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, lambda t: t):
            out = fk.masked_mean_join(ys, mask, pool=pool, backend=backend)
        assert sum(t.nbytes for t in kept) == 3 * ys[0].nbytes + mask.nbytes
        torch.testing.assert_close(out, expected)
        gradients_of = partial(torch.autograd.grad, inputs=ys, grad_outputs=torch.randn(out.shape), retain_graph=True)
        for a, b in zip(gradients_of(out), gradients_of(expected), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="masked_mean_join: expected pool one of None, 'before', 'after', got 2"):
        fk.masked_mean_join(ys, pool=2)
    with pytest.raises(ValueError, match="masked_mean_join: expected inputs of shape .* for pooling"):
        fk.masked_mean_join([torch.ones(2, 3)], pool="after")


def test_what_was_computed_again_is_gone_after_its_last_use(monkeypatch):
    made, again = [], recompute.again

    def watched(node):
        out = again(node)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(recompute, "again", watched)
    x, w, *_ = draw()
    h = fk.bn_relu(F.conv2d(x, w, padding=1), None, None, None, None, training=True)
    with fk.recomputed(h):
        out = F.conv2d(h, w)
    out.sum().backward(retain_graph=True)
    assert made and made[0]() is None
