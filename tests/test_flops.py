"""FLOPs by PyTorch's counter, of our operators against the same network in PyTorch's."""

from __future__ import annotations

import subprocess
import sys

import fractalnet
import pytest
import torch
from fractalnet.drop_path import full_path
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fractal_kernels import ConvBNReLU
from fractal_kernels.flops import FORMULAS


def count(module, x, backward=False, mapping=FORMULAS, **options) -> int:
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = module(x, **options)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def small(columns=3, **options) -> fractalnet.FractalNet:
    return fractalnet.FractalNet(10, columns, (16, 32), image_size=16, **options)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
def test_block(needs_x, backward):
    """A column alone: what PyTorch counts for the plain network of the same layers. Everything: all of these."""
    net = small().eval()
    x = torch.randn(2, 3, 16, 16, requires_grad=needs_x)
    expected = [count(net.extract_column(c), x, backward, {}) for c in range(3)]
    assert [count(net, x, backward, column=c) for c in range(3)] == expected
    head = count(net.head, torch.randn(2, 32, requires_grad=True), backward, {})
    assert count(net, x, backward) == sum(expected) - 2 * head


@pytest.mark.parametrize(("columns", "share"), [(3, 0.59), (4, 0.55)])
def test_what_drop_path_saves(columns, share):
    """The share of the work that is left under the paper's mixture."""
    net, x = fractalnet.FractalNet(10, columns, (16,), image_size=8).eval(), torch.randn(1, 3, 8, 8)
    full, paths, generator = count(net, x), 1500, torch.Generator().manual_seed(0)
    with torch.no_grad():
        total = sum(count(net.train(), x, path=net.sample_path(1, generator)) for _ in range(paths))
    assert abs(total / (paths * full) - share) < 0.03


def test_samples_with_paths_of_their_own():
    """Ranges of the batch that run one column count for that column only."""
    net = fractalnet.FractalNet(10, 2, (16,), image_size=32, granularity="sample", local_drop=0.0, global_ratio=1.0)
    x = torch.randn(128, 3, 32, 32)
    path = net.sample_path(128, torch.Generator().manual_seed(0))
    shallow, deep = (count(net.eval(), x, column=c) for c in range(2))
    with torch.no_grad():
        counted = count(net.train(), x, path=path)
    assert shallow < counted < deep < count(net.eval(), x)


def test_column_step():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    assert count(ConvBNReLU(16, 32), x, True) == count(model, x, True, {}) > 0


def test_costs_nothing_at_import():
    code = "import sys, fractal_kernels.flops; sys.exit('torch.utils.flop_counter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_statistics_over_all_samples_run_everything():
    net = fractalnet.FractalNet(
        10, 2, (16,), image_size=32, granularity="sample", local_drop=0.0, global_ratio=1.0, stats="all"
    )
    x, counts = torch.randn(128, 3, 32, 32), []
    for path in (net.sample_path(128), full_path(1, 2)):
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
            net(x, path=path)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
