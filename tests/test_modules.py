"""The modules against their eager compositions, and drop-path masks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fractal_kernels import (
    BatchNormReLU2d,
    BNReLUJoin,
    ConvBNReLU,
    DropPathJoin,
    MeanJoin,
    conv_bn_relu,
    drop_path_mask,
    use_backend,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(fused: nn.Module, eager: nn.Module, *inputs, atol: float = 1e-11) -> None:
    """Outputs, gradients and states in training and in evaluation."""
    leaves = [t.requires_grad_() for x in inputs for t in (x if isinstance(x, list) else [x])]
    for training in (True, True, False):
        outs, grads = [], []
        for module in (fused, eager):
            out = module.train(training)(*inputs)
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
            outs.append(out)
            grads.append(torch.autograd.grad(out, [*leaves, *module.parameters()], weights))
        torch.testing.assert_close(*outs, rtol=0, atol=atol)
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=atol)
    for x, y in zip(fused.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_mean_join(backend):
    ys = [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3)]
    with use_backend(backend):
        torch.testing.assert_close(MeanJoin()(ys), torch.stack(ys).mean(0))
        mask = torch.tensor([True, False, True])
        torch.testing.assert_close(MeanJoin()(ys, mask), (ys[0] + ys[2]) / 2)
        pooled = torch.nn.functional.max_pool2d(torch.stack(ys).mean(0), 2)
        torch.testing.assert_close(MeanJoin(pool="after")(ys), pooled)
        torch.testing.assert_close(DropPathJoin(0.0, pool="after")(ys), pooled)
        assert DropPathJoin(0.5, pool="before")(ys).shape == pooled.shape
        for module in (MeanJoin(), DropPathJoin(0.5)):
            assert pickle.loads(pickle.dumps(module))(ys).shape == ys[0].shape and repr(module)


@pytest.mark.parametrize(
    "options", [dict(), dict(bias=True, stride=2), dict(kernel_size=1, padding=0, groups=2, affine=False)], ids=str
)
def test_conv_bn_relu(options, backend):
    fused = ConvBNReLU(4, 6, **options).double()
    norm = nn.BatchNorm2d(6, affine=options.get("affine", True)).double()
    eager = nn.Sequential()
    eager.add_module("conv", copy.deepcopy(fused.conv))
    eager.add_module("bn", norm)
    eager.add_module("relu", nn.ReLU())
    assert list(fused.state_dict()) == list(eager.state_dict())
    with use_backend(backend):
        assert_same(fused, eager, torch.randn(3, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    "options", [{}, {"kernel_size": 1}, {"kernel_size": (5, 3)}, {"kernel_size": 3, "dilation": (2, 1)}]
)
def test_conv_bn_relu_keeps_the_size(options):
    assert ConvBNReLU(3, 8, **options)(torch.randn(2, 3, 9, 8)).shape == (2, 8, 9, 8)
    with pytest.raises(TypeError, match="ConvBNReLU: expected kernel_size to be an int or a pair of ints, got str"):
        ConvBNReLU(3, 8, **options | {"kernel_size": "3"})


def test_same_padding_of_fewer_pixels_than_the_kernel_has():
    x, w = torch.randn(3, 4, 2, 1), torch.randn(5, 4, 5, 3)
    same, two = (conv_bn_relu(x, w, *[None] * 4, True, padding=p) for p in ("same", (2, 1)))
    torch.testing.assert_close(same, two)


class EagerJoin(nn.Module):
    def __init__(self, k: int, channels: int, pool: bool, activation: str, **options) -> None:
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels, **options) for _ in range(k))
        self.pool, self.activation = pool, activation

    def forward(self, inputs: list[Tensor]) -> Tensor:
        hs = [bn(x) for bn, x in zip(self.bns, inputs, strict=True)]
        hs = [h.relu() for h in hs] if self.activation == "branch" else hs
        out = torch.stack([nn.functional.max_pool2d(h, 2) for h in hs] if self.pool else hs).mean(0)
        return out.relu() if self.activation == "output" else out


@pytest.mark.parametrize("options", [dict(), dict(momentum=0.3, eps=1e-3), dict(affine=False)], ids=str)
@pytest.mark.parametrize("activation", ["branch", "output", "none"])
def test_bn_relu_join(options, activation, backend):
    for pool in (True, False):
        eager = EagerJoin(3, 4, pool, activation, **options).double()
        fused = BNReLUJoin(3, 4, pool="before" if pool else None, activation=activation, **options).double()
        assert list(fused.state_dict()) == list(eager.state_dict())
        with use_backend(backend):
            assert_same(fused, eager, [torch.randn(3, 4, 6, 7, dtype=torch.float64) for _ in range(3)])


# --- drop-path ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "p"), [(1, 0.5), (2, 0.15), (3, 0.15), (4, 0.5), (8, 0.9), (3, 0.0), (3, 1.0)])
def test_mask_rate(k, p):
    """Each branch survives with (1 - p) + p**k / k: on its own, or revived when all were dropped."""
    draws = 40_000
    mask = drop_path_mask(k, p, draws, generator=generator(0))
    assert mask.any(0).all()
    expected = (1 - p) + p**k / k
    error = (mask.double().mean(1) - expected).abs().max().item()
    assert error <= 5 * (expected * (1 - expected) / draws) ** 0.5 + 1e-12


def test_mask_is_reproducible():
    for n in (None, 7):
        a, b = (drop_path_mask(4, 0.5, n, generator=generator(3)) for _ in range(2))
        assert torch.equal(a, b) and a.shape == ((4,) if n is None else (4, n))
    source = generator(3)
    draws = [drop_path_mask(4, 0.5, 64, generator=source) for _ in range(2)]
    assert not torch.equal(*draws)
    state = torch.get_rng_state()
    drop_path_mask(4, 0.5, generator=generator(1))
    assert torch.equal(state, torch.get_rng_state())  # a generator leaves the global one alone
    assert drop_path_mask(3, 0.5, 0).shape == (3, 0)


@pytest.mark.parametrize("granularity", ["batch", "sample"])
def test_drop_path_join(granularity, backend):
    join = DropPathJoin(0.4, granularity)
    ys = [torch.full((16, 1, 2, 2), float(4**i)) for i in range(3)]
    subsets = {sum(4**i for i in range(3) if b >> i & 1) / bin(b).count("1"): b for b in range(1, 8)}
    seen = set()
    with use_backend(backend):
        for _ in range(60):
            values = join(ys).amax((1, 2, 3)).tolist()
            kept = [min(subsets, key=lambda mean, v=v: abs(mean - v)) for v in values]
            assert all(abs(a - b) < 1e-5 * b for a, b in zip(values, kept, strict=True))  # the mean of some branches
            assert granularity == "sample" or len(set(kept)) == 1
            seen |= {subsets[mean] for mean in kept}
        assert seen == set(range(1, 8))
        assert join.eval()(ys).unique().item() == 7.0
    assert "p=0.4" in repr(join) and "sample" in repr(DropPathJoin(0.1, "sample"))


# --- fuse --------------------------------------------------------------------------------------


def test_untracked_statistics_after_the_fact():
    """track_running_stats set to False keeps the statistics in training and uses them in evaluation, as in PyTorch."""
    ours, theirs, x = BatchNormReLU2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 3 + torch.randn(4, 3, 5, 5)
    ours.track_running_stats = theirs[0].track_running_stats = False
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean, theirs[0].running_mean)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_statistics_are_tracked_after_the_fact():
    """track_running_stats set to True where there are none: the batch's, and no error, as in PyTorch."""
    ours, theirs, x = BatchNormReLU2d(3, track_running_stats=False), nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    ours.track_running_stats = True
    torch.testing.assert_close(ours(x), theirs(x).relu())


def test_one_value_without_running_statistics():
    """In evaluation too it is an error, as in PyTorch."""
    x, options = torch.ones(1, 3, 1, 1), {"track_running_stats": False}
    for module, inputs in ((BatchNormReLU2d(3, **options), x), (BNReLUJoin(1, 3, **options), [x])):
        with pytest.raises(ValueError, match="expected more than 1 value per channel"):
            module.eval()(inputs)


def test_frozen_batch_norms_of_a_join():
    """In evaluation mode by themselves, as fine-tuning freezes them: running statistics, which stay."""
    module, x = BNReLUJoin(2, 3), [torch.randn(4, 3, 5, 5) for _ in range(2)]
    for bn in module.bns:
        bn.eval()
    expected = copy.deepcopy(module).eval()(x)
    assert torch.equal(module(x), expected) and module.bns[0].running_mean.eq(0).all()
    module.bns[0].train()
    with pytest.raises(ValueError, match=r"BNReLUJoin: expected one training of all batch norms, got \[True, False\]"):
        module(x)
    with pytest.raises(TypeError, match="BNReLUJoin: expected inputs to be a list or tuple of Tensors, got NoneType"):
        module(None)
    with pytest.raises(TypeError, match="DropPathJoin: expected inputs.0. to be a Tensor, got NoneType"):
        DropPathJoin(0.1)([None])


def test_device_and_dtype():
    made = {"device": "meta", "dtype": torch.float64}
    for module in (ConvBNReLU(3, 4, **made), BNReLUJoin(2, 4, **made), BatchNormReLU2d(4, **made)):
        for t in (*module.parameters(), *module.buffers()):
            assert t.is_meta and t.dtype in (torch.float64, torch.int64)


def test_a_convolution_on_another_device():
    module = ConvBNReLU(16, 16).to(memory_format=torch.channels_last)
    module.conv.to("meta")
    with pytest.raises(ValueError, match="conv_bn_relu: expected conv_weight on cpu, got meta"):
        module(torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["eps", "momentum"])
def test_batch_norms_of_a_join_that_differ(name):
    module = BNReLUJoin(2, 3)
    setattr(module.bns[1], name, 0.5)
    with pytest.raises(ValueError, match=f"BNReLUJoin: expected one {name} of all batch norms, got"):
        module([torch.randn(4, 3, 5, 5)] * 2)


def test_batch_norms_of_a_join_of_volumes():
    module, inputs = BNReLUJoin(2, 3), [torch.randn(4, 3, 2, 5, 5) for _ in range(2)]
    module.bns = nn.ModuleList(nn.BatchNorm3d(3) for _ in range(2))
    eager = copy.deepcopy(module.bns)
    for training in (True, False):
        expected = sum(bn.train(training)(y).relu() for bn, y in zip(eager, inputs, strict=True)) / 2
        torch.testing.assert_close(module.train(training)(inputs), expected)


def test_batch_norms_of_a_join_of_another_class():
    """PyTorch's synchronised ones would neither be synchronised nor track anything."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(BNReLUJoin(2, 3))
    with pytest.raises(
        TypeError, match=r"BNReLUJoin: expected bns of torch.nn.BatchNorm2d, got SyncBatchNorm; .*sync_"
    ):
        module([torch.randn(4, 3, 5, 5)] * 2)
