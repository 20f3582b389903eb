"""What the library is measured against: the join and the network as public PyTorch code has them,
and a clean dense network for torch.compile.

Nothing here uses the library. A network takes its weights from a `fractalnet.FractalNet` with
`load_from`, so that a benchmark can hold the outputs together before it looks at the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import LOCAL_DROP, draw_mask

# --- joins -------------------------------------------------------------------------------------


def eager_mean_join(inputs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The join as public implementations write it: stack, mask, sum, divide. 5k + 3 tensor passes.

    inputs: k tensors [N, C, H, W]; mask: [k] or [k, N], nonzero = kept.
    """
    stacked = torch.stack(tuple(inputs))
    mask = mask.to(stacked.dtype).view(len(inputs), -1, 1, 1, 1)
    # In their dtype: a sum under CUDA's autocast is float32, and what reads it would cast it back.
    alive = mask.sum(dim=0, dtype=mask.dtype).clamp(min=1)
    return (stacked * mask).sum(dim=0, dtype=stacked.dtype) / alive


def eager_mean_join_last(inputs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The same of channels_last tensors, stacked as they lie in memory.

    A stack of them as they are is a copy into NCHW, which every convolution that reads the join would turn back.
    """
    return eager_mean_join([x.permute(0, 2, 3, 1) for x in inputs], mask).permute(0, 3, 1, 2)


def eager_bn_relu_join(
    inputs: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    mask: Tensor,
    join: Callable[[Sequence[Tensor], Tensor], Tensor] = eager_mean_join,
) -> Tensor:
    """Batch norm and ReLU on each branch, then one of the joins above."""
    return join([F.relu_(norm(y)) for y, norm in zip(inputs, norms, strict=True)], mask)


def clean_mean_join(inputs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The same maths with nothing in a compiler's way: no stack, one expression."""
    weights = mask.to(inputs[0].dtype).view(len(inputs), -1, 1, 1, 1)
    total = inputs[0] * weights[0]
    for i in range(1, len(inputs)):
        total = total + inputs[i] * weights[i]
    return total * (1.0 / weights.sum(dim=0).clamp(min=1))


def clean_bn_relu_join(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    mask: Tensor,
) -> Tensor:
    """Batch norm in training and ReLU on each branch, then the clean join."""
    branches = [
        F.relu(F.batch_norm(y, mean, var, weight, bias, training=True))
        for y, mean, var, weight, bias in zip(inputs, running_means, running_vars, weights, biases, strict=True)
    ]
    return clean_mean_join(branches, mask)


# --- networks ----------------------------------------------------------------------------------


def columns_ending(columns: int) -> list[list[int]]:
    """Per row of a block, the columns that have a conv ending there: row r ends column c when
    its conv, which spans 2**(columns-1-c) rows, does."""
    rows = 2 ** (columns - 1)
    return [[c for c in range(columns) if (r + 1) % (rows >> c) == 0] for r in range(rows)]


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU in place; 3×3, but for the last `small` channels, which are 1×1.

    Where it meets wider columns (`joined` channels), a 1×1 projection follows.
    """

    def __init__(self, in_channels: int, out_channels: int, small: int = 0, joined: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - small, 3, padding=1, bias=False)
        self.conv_1x1 = nn.Conv2d(in_channels, small, 1, bias=False) if small else None
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        wider = joined is not None and joined > out_channels
        self.projection = nn.Conv2d(out_channels, joined, 1, bias=False) if wider else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.conv_1x1 is not None:
            y = torch.cat([y, self.conv_1x1(x)], 1)
        y = self.relu(self.bn(y))
        return y if self.projection is None else self.projection(y)


class Block(nn.Module):
    """The grid of one fractal block: column c, of widths[c] channels, is a list of 2**c conv blocks."""

    def __init__(self, in_channels: int, widths: Sequence[int], kernel_mix: float) -> None:
        super().__init__()
        self.ending = columns_ending(len(widths))
        rows = len(self.ending)
        joined = [max(widths[c] for c in columns) for columns in self.ending]

        def cell(c: int, j: int) -> ConvBlock:
            span = rows >> c
            source = in_channels if j == 0 else joined[j * span - 1]
            small = widths[c] - max(1, round(kernel_mix * widths[c]))
            return ConvBlock(source, widths[c], small, joined[(j + 1) * span - 1])

        self.grid = nn.ModuleList(nn.ModuleList(cell(c, j) for j in range(2**c)) for c in range(len(widths)))


class Grid(nn.Module):
    """Blocks and a linear head; what the two networks below share. The options are those of `FractalNet`."""

    def __init__(
        self,
        num_classes: int,
        columns: int,
        channels: Sequence[int],
        *,
        in_channels: int = 3,
        image_size: int = 32,
        local_drop: float = LOCAL_DROP,
        column_widths: Sequence[float] | None = None,
        kernel_mix: float = 1.0,
        stem: str | None = None,
        last_pool: bool = True,
    ) -> None:
        super().__init__()
        self.columns, self.channels, self.local_drop = columns, tuple(channels), local_drop
        self.pools = [last_pool or b < len(channels) - 1 for b in range(len(channels))]
        self.stem = nn.Identity()
        if stem:
            conv = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
            in_channels, image_size = 64, image_size // 4
        shares, sources = column_widths or (1,) * columns, (in_channels, *channels)
        self.blocks = nn.ModuleList(
            Block(i, [round(share * o) for share in shares], kernel_mix)
            for i, o in zip(sources, channels, strict=False)
        )
        if image_size >> sum(self.pools) < 1:
            raise ValueError(f"Grid: expected image_size >= {2 ** sum(self.pools)}, got {image_size}")
        self.head = nn.Linear(channels[-1], num_classes)

    def load_from(self, model: nn.Module) -> None:
        """Copies weights and the running statistics of the full network from a `fractalnet.FractalNet`."""
        pairs = [(self.head.weight, model.head.weight), (self.head.bias, model.head.bias)]
        norms = [(self.stem[1], model.stem[0].bn)] if len(list(self.stem.children())) else []
        pairs += [(self.stem[0].weight, model.stem[0].conv.weight)] if norms else []
        for b, block in enumerate(self.blocks):
            for c, column in enumerate(block.grid):
                for j, cell in enumerate(column):
                    theirs = model.blocks[b]
                    unit = theirs.unit(c, j, theirs.set_of(c, j, 0))
                    pairs.append((cell.conv.weight, unit.weight))
                    pairs += [(cell.conv_1x1.weight, unit.weight_1x1)] if cell.conv_1x1 else []
                    pairs += [(cell.projection.weight, unit.projection)] if cell.projection else []
                    pairs += [(cell.bn.weight, unit.gamma), (cell.bn.bias, unit.beta)]
                    pairs += [(cell.bn.running_mean, unit.running_mean), (cell.bn.running_var, unit.running_var)]
        for ours, norm in norms:
            for name in ("weight", "bias", "running_mean", "running_var"):
                pairs.append((getattr(ours, name), getattr(norm, name)))
        with torch.no_grad():
            for target, source in pairs:
                target.copy_(source)

    def full_masks(self, samples: int | None = None) -> Tensor:
        """Nothing dropped: ones of shape [B, R, C], or [B, R, C, samples]."""
        shape = (len(self.channels), 2 ** (self.columns - 1), self.columns)
        return torch.ones(*shape if samples is None else (*shape, samples), dtype=torch.bool)


class PublicFractalNet(Grid):
    """The network as widely used public PyTorch FractalNets are written, for NCHW tensors; channels_last ones stay so.

    Every conv runs at every step. Each join, those of a single column included, stacks its inputs
    and applies a per-sample mask drawn on the spot: the first half of the batch keeps one column
    per sample throughout the network, the other half drops each input with probability
    `local_drop`, unless `drops` is false. Each column is pooled before the last join of its block.
    """

    drops = True

    def draw_masks(self, samples: int, kept_column: Tensor, columns: list[int]) -> Tensor:
        """Mask [k, samples] of one join of `columns`; nothing waits for the device."""
        single = torch.stack([kept_column == column for column in columns])
        local = draw_mask(len(columns), samples - len(kept_column), self.local_drop, device=kept_column.device)
        return torch.cat([single, local], dim=1)

    def join(self, outs: list[Tensor], mask: Tensor | None) -> Tensor:
        last = outs[0].is_contiguous(memory_format=torch.channels_last) and not outs[0].is_contiguous()
        if mask is not None:
            return (eager_mean_join_last if last else eager_mean_join)(outs, mask)
        if not last:
            return torch.stack(outs).mean(dim=0)
        return torch.stack([out.permute(0, 2, 3, 1) for out in outs]).mean(dim=0).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """masks: [B, R, C] or [B, R, C, N], nonzero = kept; None draws them in training."""
        samples = x.shape[0]
        kept_column = torch.randint(self.columns, (samples // 2,), device=x.device)
        x = self.stem(x)
        for b, block in enumerate(self.blocks):
            outs = [x] * self.columns
            for r, ending in enumerate(block.ending):
                last = r + 1 == len(block.ending) and self.pools[b]
                current = []
                for c in ending:
                    out = block.grid[c][(r + 1) * 2**c // len(block.ending) - 1](outs[c])
                    current.append(F.max_pool2d(out, 2) if last else out)
                mask = None
                if masks is not None:
                    mask = masks[b, r, ending[0] :]  # columns that end together are the last ones
                elif self.training and self.drops:
                    mask = self.draw_masks(samples, kept_column, ending)
                x = self.join(current, mask)
                for c in ending:
                    outs[c] = x
        return self.head(x.mean((2, 3)))


class DenseFractalNet(Grid):
    """A clean dense network for torch.compile(fullgraph=True); meant for channels_last tensors.

    Every conv runs at every step, the masks are a tensor argument, and a join is one expression,
    Σ mask_i·branch_i / count, that a compiler can fuse with what surrounds it.
    """

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        """masks: bool [B, R, C] (one draw for the batch) or [B, R, C, N]."""
        x = self.stem(x)
        weights = masks.to(x.dtype).reshape(*masks.shape[:3], -1, 1, 1, 1)
        for b, block in enumerate(self.blocks):
            outs = [x] * self.columns
            for r, ending in enumerate(block.ending):
                total = count = 0
                for c in ending:
                    cell = block.grid[c][(r + 1) * 2**c // len(block.ending) - 1]
                    branch = cell(outs[c])
                    if r + 1 == len(block.ending) and self.pools[b]:
                        branch = F.max_pool2d(branch, 2)
                    total = total + weights[b, r, c] * branch
                    count = count + weights[b, r, c]
                x = total * (1.0 / count.clamp(min=1))
                for c in ending:
                    outs[c] = x
        return self.head(x.mean((2, 3)))
