"""FractalNet: its blocks, their paths, its columns."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fractal_kernels import compiling, sync_batch_norm
from fractal_kernels.ops.exported import foreign_tool
from fractal_kernels.schedule import MAX_COLUMNS, live_units, schedule

from . import drop_path, export
from .composed import ComposedBlock
from .drop_path import Path
from .early_exit import EarlyExit, early_exit
from .fused import ACTIVATIONS, FractalBlock
from .interchange import Hub
from .layers import (
    STEM_CHANNELS,
    check,
    check_flags,
    check_network,
    is_number,
    is_whole,
    new_head,
    plain_stem,
    resnet_stem,
)
from .recalibrate import recalibrate


class FractalNet(nn.Module, Hub):
    """FractalNet: B fractal blocks with 2x2 pooling, global average, linear classifier.

    Args:
        num_classes: outputs of the classifier.
        columns: C, 1 to 8; the deepest column of a block has 2**(C-1) convs.
        channels: K of every block; its length is B.
        in_channels, image_size: of the images, [N, in_channels, image_size, image_size].
        activation: "relu", "leaky_relu", "silu" or "mish".
        dropout: rate per block, or None.
        dropout_place: between "conv" and batch norm (the authors' code), after each unit's "activation", or once on
            the output of the "block".
        local_drop, global_ratio: rates of the drop-path of :meth:`sample_path`; numbers, or knots (step, rate) over
            training, linear in between.
        granularity: a path per "batch" or per "sample".
        mixture: global and local paths at "random", or "alternating" from step to step.
        global_mode: "sampled", or "tied" as in the authors' code: in training the full network, under local drop-path,
            and every column alone run on each batch, with the same weights and their own statistics, and
            :func:`tied_loss` weighs their losses.
        path_seed: of the sequence of paths, which depends on it and on the number of the step alone.
        stats: under paths per sample, batch statistics of a unit run over its "live" samples, and in fused blocks on
            the CPU, where it is faster, neighbouring samples that keep one column run nothing else; or over "all"
            samples, as in other implementations, and all runs.
        pool, last_pool: "max" or "avg"; whether the last block has one too.
        pool_order: of max-pools, "before_join" (each column pooled: the authors' code) or "after_join" (the authors'
            figure). For the average both are the same.
        stem: None, or "resnet": ResNet-34's first layers, which leave a quarter of the image size.
        column_widths: the columns' shares of K, shallowest first, in (0, 1]; None: all of it. Branches that are thinner
            than the widest one that they meet pass a 1x1 projection before that join.
        kernel_mix: share of a convolution's output channels that are 3x3, in (0, 1]; the others are 1x1.
        conv_bias, bn_affine: whether convs have a bias and batch norms an affine.
        split_stats: two sets of running statistics, for the full network and for columns that ran alone. Per-sample
            paths mix both kinds in a batch and use one.
        init: "xavier" or "he".
        momentum, eps: of the batch norms; momentum None averages cumulatively.
    Shape:
        images [N, in_channels, S, S] to logits [N, num_classes].
    Raises:
        ValueError: naming the argument.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648).
    Example:
        >>> net = FractalNet(10, 3, (16, 32), image_size=8)
        >>> net(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 10])
        >>> print(FractalNet(10, 3, (16, 32), image_size=8, activation="silu").info())
        block 0: composed (activation silu is not fused: the kernels compute ReLU)
        block 1: composed (activation silu is not fused: the kernels compute ReLU)
    """

    def __init__(
        self,
        num_classes: int,
        columns: int,
        channels: Sequence[int],
        *,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "relu",
        dropout: Sequence[float] | None = None,
        dropout_place: str = "conv",
        local_drop: drop_path.Rate = 0.15,
        global_ratio: drop_path.Rate = 0.5,
        granularity: str = "batch",
        mixture: str = "random",
        global_mode: str = "sampled",
        path_seed: int = 0,
        stats: str = "live",
        pool: str = "max",
        last_pool: bool = True,
        pool_order: str = "before_join",
        stem: str | None = None,
        column_widths: Sequence[float] | None = None,
        kernel_mix: float = 1.0,
        conv_bias: bool = False,
        bn_affine: bool = True,
        split_stats: bool = True,
        init: str = "xavier",
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_network(
            "FractalNet",
            num_classes=num_classes,
            channels=channels,
            in_channels=in_channels,
            image_size=image_size,
            dropout=dropout,
            pool=pool,
            last_pool=last_pool,
            stem=stem,
            init=init,
            momentum=momentum,
            eps=eps,
        )
        check_flags("FractalNet", conv_bias=conv_bias, bn_affine=bn_affine, split_stats=split_stats)
        deep = is_whole(columns) and columns <= MAX_COLUMNS
        _check("columns", deep, f"from 1 to {MAX_COLUMNS}", columns)
        _check(
            "activation", activation in tuple(ACTIVATIONS), f"one of {', '.join(map(repr, ACTIVATIONS))}", activation
        )
        places = ("conv", "activation", "block")
        _check("dropout_place", dropout_place in places, "'conv', 'activation' or 'block'", dropout_place)
        for name, share in (("local_drop", local_drop), ("global_ratio", global_ratio)):
            drop_path.check_rate("FractalNet", name, share)
        _check("granularity", granularity in ("batch", "sample"), "'batch' or 'sample'", granularity)
        _check("mixture", mixture in drop_path.MIXTURES, "'random' or 'alternating'", mixture)
        _check("global_mode", global_mode in ("sampled", "tied"), "'sampled' or 'tied'", global_mode)
        _check("path_seed", is_whole(path_seed, 0) and path_seed < 2**63, "a whole number >= 0", path_seed)
        _check("stats", stats in ("live", "all"), "'live' or 'all'", stats)
        _check("pool_order", pool_order in ("before_join", "after_join"), "'before_join' or 'after_join'", pool_order)
        _check("kernel_mix", is_number(kernel_mix) and 0 < kernel_mix <= 1, "in (0, 1]", kernel_mix)
        self.columns, self.channels, self.image_size = columns, tuple(channels), image_size
        self.local_drop, self.global_ratio = drop_path.kept_rate(local_drop), drop_path.kept_rate(global_ratio)
        self.granularity = granularity
        self.mixture, self.global_mode = mixture, global_mode
        self.path_seed, self.path_step = path_seed, 0  # kept in state_dict
        norm = {"momentum": momentum, "eps": eps}
        pooling = pool_order.removesuffix("_join") if pool == "max" else "average"
        self.stem = resnet_stem(in_channels, init, conv_bias, bn_affine, **norm) if stem else nn.Identity()
        self.blocks, self._composed = nn.ModuleList(), []
        width = STEM_CHANNELS if stem else in_channels
        for b, widths in enumerate(_widths(columns, channels, column_widths)):
            rate = dropout[b] if dropout else 0.0
            options = {
                "activation": activation,
                "dropout": rate,
                "dropout_place": dropout_place,
                "pool": pooling if last_pool or b < len(channels) - 1 else None,
                "conv_bias": conv_bias,
                "bn_affine": bn_affine,
                "sets": 2 if split_stats and (granularity == "batch" or global_mode == "tied") else 1,
                **norm,
            }
            reasons = _why_composed(activation, widths, kernel_mix, bool(rate) and dropout_place == "activation")
            if reasons:
                _check("stats", stats == "live", "'live' where a block is composed", stats)
                block = ComposedBlock(width, widths, kernel_mix=kernel_mix, **options)
            else:
                block = FractalBlock(width, widths[0], columns, stats=stats, **options)
            width = block.out_channels
            self._composed.append(reasons)
            self.blocks.append(block)
        self.head = nn.Linear(width, num_classes)
        for block in self.blocks:
            block.init_weights(init)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def info(self) -> str:
        """A line per block: fused, or composed out of PyTorch's operators and why."""
        return "\n".join(
            f"block {b}: " + (f"composed ({'; '.join(reasons)})" if reasons else "fused")
            for b, reasons in enumerate(self._composed)
        )

    def depth(self, column: int | None = None) -> int:
        """Convolutions on the longest path, of one column or of the full network: B * 2**column, and the stem's one.

        Projections are not counted, nor is the classifier.
        """
        stem = not isinstance(self.stem, nn.Identity)
        return len(self.blocks) * 2 ** (self.columns - 1 if column is None else column) + stem

    @compiling.disable
    def sample_path(self, batch_size: int, generator: torch.Generator | None = None) -> Path:
        """The next path of the drop-path mixture, drawn on the CPU.

        Without a generator it follows from ``path_seed`` and ``path_step``, the number of paths drawn so far, which
        ``state_dict`` keeps: a training that is resumed goes on with the same paths. Paths for the batch are the same
        on all ranks of a data-parallel job, whatever else their generators draw; paths per sample differ.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "FractalNet: expected a path, got a CUDA graph capture, which would keep the path sampled now; "
                "fractalnet.GraphedStep captures training steps"
            )
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "FractalNet: expected torch.nn.parallel.DistributedDataParallel, or a path given, got a replica of "
                "DataParallel, which would draw the same path in every step"
            )
        step, self.path_step = self.path_step, self.path_step + 1
        if generator is None:
            many = self.granularity == "sample" and dist.is_available() and dist.is_initialized()
            generator = drop_path.generator_for(self.path_seed, step, dist.get_rank() if many else 0)
        tied = self.global_mode == "tied"
        return drop_path.sample_path(
            len(self.blocks),
            self.columns,
            batch_size,
            local_drop=drop_path.rate(self.local_drop, step),
            global_ratio=0.0 if tied else drop_path.rate(self.global_ratio, step),
            granularity=self.granularity,
            mixture=self.mixture,
            step=step,
            generator=generator,
        )

    def reset_classifier(self, num_classes: int) -> None:
        """A new linear classifier for other classes; everything else stays, for transfer learning."""
        self.head = new_head(self, self.blocks[-1].out_channels, num_classes)
        if isinstance(made := getattr(self, "_hub_mixin_config", None), dict):  # what save_pretrained writes
            made["num_classes"] = num_classes

    def sync_batch_norm(self, group: dist.ProcessGroup | None = None) -> None:
        """Batch statistics over all ranks of a process group (None: the default one) in training: one collective per
        row of a block (of a composed one per convolution), forward and backward. See
        :func:`fractal_kernels.sync_batch_norm`.

        Raises:
            ValueError: torch.distributed is not initialised.
        """
        sync_batch_norm(self, group)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.path_seed, self.path_step])

    def set_extra_state(self, state: Tensor) -> None:
        if state.dtype not in (torch.int32, torch.int64) or state.shape != (2,):
            raise ValueError(
                "FractalNet: expected _extra_state of two integers, path_seed and path_step, got "
                f"{str(state.dtype).removeprefix('torch.')} {state.tolist()}: of a state_dict that was cast or "
                "averaged, keep the network's own: state['_extra_state'] = model.get_extra_state()"
            )
        self.path_seed, self.path_step = state.tolist()

    def forward(self, x: Tensor, path: Path | None = None, column: int | None = None, dense: bool = False) -> Tensor:
        """Logits.

        Args:
            x: images.
            path: what to keep; None: in training a sampled path, in evaluation everything. In training with
                ``global_mode="tied"`` and neither path nor column, the logits of the full network and of every column:
                [1 + C, N, classes], for :func:`tied_loss`.
            column: run this column alone instead (in evaluation with its own statistics).
            dense: run dropped branches too and mask them: slower, but what runs does not depend on the path, so that a
                network with composed blocks is one graph under ``torch.compile``.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"FractalNet: expected x to be a Tensor, got {type(x).__name__}")
        if column is not None:
            if path is not None:
                raise ValueError("FractalNet: expected path or column, got both")
            path = drop_path.column_path(len(self.blocks), self.columns, column)
        if path is not None and not isinstance(path, Path):
            raise TypeError(f"FractalNet: expected path None or a fractalnet.Path, got {type(path).__name__}")
        if path is None and not self.training:
            path = drop_path.full_path(len(self.blocks), self.columns)
            if torch.compiler.is_compiling() and (any(self._composed) or x.device.type != "cpu"):
                # The same, since nothing is dropped, and without a look at the path: one graph, CUDA's too.
                path.keep, dense = path.keep.to(x.device), True
        elif path is None:
            if tool := foreign_tool():
                raise RuntimeError(
                    f"FractalNet: expected evaluation, got {tool} in training, which would keep the path sampled "
                    "now; fractalnet.export.plain(model) is a network of PyTorch's own operators"
                )
            path = self.sample_path(x.shape[0])
            if self.global_mode == "tied":
                columns = [drop_path.column_path(len(self.blocks), self.columns, c) for c in range(self.columns)]
                x = self.stem(x)
                return torch.stack([self._logits(x, p, dense) for p in (path, *columns)])
        if path.keep.shape[0] != len(self.blocks):
            raise ValueError(f"FractalNet: expected path.keep for {len(self.blocks)} blocks, got {path.keep.shape[0]}")
        return self._logits(self.stem(x), path, dense)

    def _logits(self, x: Tensor, path: Path, dense: bool = False) -> Tensor:
        """From the stem's output on."""
        live: Sequence[Tensor | None] = [None] * len(self.blocks)
        if dense and self.training and not torch.compiler.is_compiling():
            s = schedule(self.columns)
            if path.keep.shape[1:] == (s.rows, s.columns):  # a path for the batch: of all blocks at once
                units = live_units(s, path.keep.permute(1, 2, 0))
                live = torch.stack(units).to(x.device, non_blocking=True).unbind(1)
        for block, rows, own in zip(self.blocks, path.keep.unbind(), live, strict=True):
            x = block(x, rows, path.alone, dense, own)
        return self.head(x.mean((2, 3)))

    @torch.no_grad()
    def extract_column(self, c: int, fold: bool = False) -> nn.Sequential:
        """Column c as a plain network of ``torch.nn`` modules, with copies of its weights and statistics.

        Args:
            c: column.
            fold: fold the batch norms into the convolutions and leave out dropout: a network for evaluation.
        Example:
            >>> net = FractalNet(10, 2, (8,), image_size=8).eval()
            >>> x = torch.randn(2, 3, 8, 8)
            >>> torch.allclose(net.extract_column(1)(x), net(x, column=1), atol=1e-5)
            True
        """
        inside = isinstance(c, int) and 0 <= c < self.columns
        check("extract_column", "c", inside, f"from 0 to {self.columns - 1}", c)
        layers = [] if isinstance(self.stem, nn.Identity) else plain_stem(self.stem)
        for block in self.blocks:
            layers += block.column_layers(c, set=block.running_mean.shape[0] - 1)
        column = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), copy.deepcopy(self.head))
        return export.fold(column) if fold else column.train(self.training)

    def anytime(self, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yields (column, depth, logits), shallow first: the caller stops when it has to answer.

        Columns share no activations but the stem's, which runs once, so nothing is computed twice.

        Raises:
            ValueError: the network is in training mode, in which it would move its running statistics.
        """
        if self.training:
            raise ValueError("anytime: expected a network in evaluation mode, got one in training mode; call eval()")
        x = self.stem(x)
        for column in range(self.columns):
            path = drop_path.column_path(len(self.blocks), self.columns, column)
            yield column, self.depth(column), self._logits(x, path)

    def early_exit(self, x: Tensor, confidence: float = 0.9) -> EarlyExit:
        """Every sample's answer by its first sure column: :func:`fractalnet.early_exit.early_exit`."""
        return early_exit(self, x, confidence)

    def recalibrate(self, loader: Iterable[Tensor | Sequence[Tensor]], column: int | None = None) -> FractalNet:
        """Running statistics taken anew from batches: :func:`fractalnet.recalibrate.recalibrate`."""
        return recalibrate(self, loader, column)


def _check(argument: str, holds: bool, expected: str, got: object) -> None:
    check("FractalNet", argument, holds, expected, got)


def _widths(columns: int, channels: Sequence[int], shares: Sequence[float] | None) -> list[tuple[int, ...]]:
    """Every column's width in every block."""
    if shares is None:
        return [(width,) * columns for width in channels]
    right = isinstance(shares, Sequence) and not isinstance(shares, str) and len(shares) == columns
    right = right and all(is_number(share) and 0 < share <= 1 for share in shares)
    _check("column_widths", right, f"None or {columns} shares in (0, 1]", shares)
    rows = [[width * share for share in shares] for width in channels]
    whole = all(abs(width - round(width)) < 1e-6 for row in rows for width in row)
    _check("column_widths", whole, f"shares that give whole channels of {tuple(channels)}", shares)
    return [tuple(map(round, row)) for row in rows]


def _why_composed(activation: str, widths: Sequence[int], kernel_mix: float, drops_activations: bool) -> list[str]:
    """What the fused block does not compute; nothing: the block is fused."""
    thin = ", ".join(map(str, widths))
    reasons = [
        (activation != "relu", f"activation {activation} is not fused: the kernels compute ReLU"),
        (len(set(widths)) > 1, f"columns of widths {thin} are not fused: the kernels join equal ones"),
        (kernel_mix < 1, f"kernel_mix {kernel_mix} is not fused: the block's convolutions are 3x3"),
        (drops_activations, "dropout after activations is not fused: the kernels drop before the batch norm"),
    ]
    return [reason for holds, reason in reasons if holds]
