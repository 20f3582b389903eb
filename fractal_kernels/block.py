"""The fractal block as one autograd function over the operators of ``block_ops``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, compiling, cpu_conv, reference, sync
from . import block_ops as _block_ops  # noqa: F401  registers the operators
from .block_rows import live_samples
from .library import POOL, Flags, accumulate_dtype, to_layout
from .ops.exported import foreign_tool
from .ops.join import distinct
from .ops.twice import Gradients, gradients, inputs_of, twice_differentiable
from .ops.weights import wide_weights
from .schedule import plan, schedule

_OPS = torch.ops.fractal_kernels
_calls = itertools.count(1)


def _of(op: Any, x: Tensor, path: Tensor) -> Any:
    """The overload of a block's operator for this path."""
    return op.default if path.device == x.device else op.host


def _forward(*args: Any) -> list[Tensor]:
    x, path, conv_bias, gamma, beta, mean, var, dense, live, dropout, *options = args[:16]
    call = _number_of_a_call() if dropout and mean is None and torch.compiler.is_compiling() else 0
    norm, weights = (conv_bias, gamma, beta, mean, var), list(args[16:])
    op = _of(_OPS.block_forward, x, path)
    return op(x, weights, *norm, path, dense, live, dropout, *options, call)  # type: ignore[no-any-return]


class BlockOutput(NamedTuple):
    """``out``; and in training per unit: ``counts`` [U], the number of values that its statistics ran over (0: it is
    dead), their ``mean`` and biased ``var`` [U, K] (0 where dead, unless it ran all the same: ``dense``)."""

    out: Tensor
    counts: Tensor
    mean: Tensor
    var: Tensor


def _is_watched() -> bool:
    """Whether hooks see what is saved for backward, and may keep it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _runs_once() -> bool:
    """Whether the backward that runs is the last of its graph: not with ``retain_graph``, nor where it is traced."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _gradients(ctx: Any, grad: Tensor, *_unused: object) -> Gradients | None:
    """Of the block as it is defined: row by row, everything, masked."""
    dropout, eps, flags, group = (ctx.options[i] for i in (1, 2, 3, 6))
    if group or (dropout and ctx.batch_stats):
        return None  # statistics of other ranks; a noise that only the operators have
    saved = inputs_of(ctx)
    x, path, conv_bias, gamma, beta, mean, var, _ = saved[:8]
    weights: list[Any] = saved[8 : 8 + ctx.rows]
    s = schedule(ctx.rows.bit_length())
    keep: Any = path
    keep = (live_samples(s.columns, keep) if keep.dim() == 3 and flags & Flags.STATS_LIVE else keep).to(grad.device)
    fixed = [None, None] if ctx.batch_stats else [mean, var]
    source: Any = x
    branches: dict[int, Tensor] = {}
    for row, (starts, ends) in enumerate(zip(s.starts, s.ends, strict=True)):
        bias = None if conv_bias is None else conv_bias[starts[0].id : starts[-1].id + 1].flatten()
        y = torch.conv2d(source, weights[row].to(source.dtype), bias, padding=1)
        branches |= {u.id: part for u, part in zip(starts, y.chunk(len(starts), 1), strict=True)}
        means, vars = ([t[u.id] for u in ends] if t is not None else None for t in fixed)
        gammas, betas = ([t[u.id] for u in ends] if t is not None else [] for t in (gamma, beta))
        code = flags if row == ctx.rows - 1 else flags & ~POOL
        ys = [branches.pop(u.id) for u in ends]
        joined = reference.normalised_join(ys, keep[row, ends[0].column :], means, vars, gammas, betas, eps, code)
        source = joined.to(grad.dtype)
    options = [None] * 9
    return gradients(ctx, source, [x, None, conv_bias, gamma, beta, None, None, *options, *weights], grad)


@compiling.assume_constant_result
def _number_of_a_call() -> int:
    """Another for each that is traced."""
    return next(_calls)


class _Block(torch.autograd.Function):
    # *args: of a signature with as many names as a call has arguments, torch.compile takes it that ctx is not one.
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx, x, path, conv_bias, gamma, beta, mean, var, *options = args[:17]
        (dense, _, dropout, eps, flags, _, fixed, backend, group), weights = options, args[17:]
        out, count, batch_mean, batch_var, *saved = _forward(*args[1:])
        ctx.batch_stats, ctx.conv_bias, ctx.rows = mean is None, conv_bias is not None, len(weights)
        ctx.options = (dense, dropout, eps, flags, fixed, backend, group)
        ctx.donates = not fixed and x.device.type == "cpu" and not _is_watched()
        stats = (batch_mean, batch_var) if mean is None else (mean, var)
        ctx.save_for_backward(x, path, conv_bias, gamma, beta, *stats, count, *weights, *saved)
        ctx.mark_non_differentiable(count, batch_mean, batch_var)
        if not torch.compiler.is_compiling():  # a compiler does not know it, and fills no zeros that nobody reads
            ctx.set_materialize_grads(False)
        return out, count, batch_mean, batch_var

    @staticmethod
    @twice_differentiable(_gradients)
    def backward(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, path, _, gamma, beta, mean, var, count, *rest = ctx.saved_tensors
        weights, saved = rest[: ctx.rows], rest[ctx.rows :]
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[16:]]
        dx, *dweights, dconv_bias, dgamma, dbeta = _of(_OPS.block_backward, x, path)(
            grad,
            x,
            weights,
            gamma,
            beta,
            mean,
            var,
            count,
            path,
            saved,
            ctx.conv_bias,
            ctx.batch_stats,
            needs,
            *ctx.options,
            ctx.donates and _runs_once(),
        )
        return (
            dx if needs[0] else None,
            None,
            dconv_bias if ctx.conv_bias else None,
            None if gamma is None else dgamma,
            None if beta is None else dbeta,
            *(None,) * 11,
            *(dweight if needed else None for dweight, needed in zip(dweights, needs[1:], strict=True)),
        )


def _cast(weights: Sequence[Tensor], dtype: torch.dtype, columns: int, path: Tensor | None) -> list[Tensor]:
    """The rows' weights as their convolutions take them; as they are where a path on the host says that none runs."""
    read = list(weights)
    rows = list(range(len(read)))
    cast = any(w.dtype != dtype for w in weights)
    if not cast and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights):
        return read
    if cast and type(path) is Tensor and not torch.compiler.is_compiling():  # of others the host has no values
        rows = [r for r, units in enumerate(plan(columns, tuple(path.flatten().tolist())).live) if units]
    for r, wide in zip(rows, wide_weights([[weights[r]] for r in rows], dtype), strict=True):
        read[r] = wide
    return read


@compiling.assume_constant_result
def _widths(rows: int) -> tuple[int, ...]:
    """How many columns start at each row."""
    return tuple(len(row) for row in schedule(rows.bit_length()).starts)


def fractal_block(
    x: Tensor,
    weights: Sequence[Tensor],
    gamma: Tensor | None,
    beta: Tensor | None,
    path: Tensor,
    *,
    conv_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    pool: str | None = "before",
    stats: str = "all",
    group: object = None,
    dense: bool = False,
    live: Tensor | None = None,
    backend: str | None = None,
) -> BlockOutput:
    r"""A fractal block, f_C, of which only the part that lives under a path runs, forward and backward.

    .. math:: f_1(z) = conv(z), \qquad f_{C+1}(z) = (f_C \circ f_C)(z) \oplus conv(z)

    conv is 3x3 convolution, batch norm, ReLU; all columns that end at one row meet in one mean.

    Args:
        x: [N, C_in, H, W], processed in channels_last. On the CPU, where C_in and K are multiples of 16 (or C_in is
            less), convolutions are this package's, as in :func:`conv_bn_relu`: by Winograd's method, with errors within
            4e-6 of the largest value for up to 256 channels, but NaN around infinity.
        weights: R = 2**(C-1) wide weights, row r's [n_r*K, C_in (r = 0) or K, 3, 3]: the n_r columns that start there,
            shallow first (``schedule(C).starts``); copied where they are not in channels_last.
        gamma, beta, conv_bias: [U, K], U = 2**C - 1 units in the schedule's order, or None.
        path: bool [R, C] on the CPU, whether column c is kept in row r's join: only what lives runs. Or [R, C, N], a
            path per sample: joins are masked. With ``dense`` either may be on the device: the host does not look at it.
        mean, var: [U, K] statistics to normalise with (evaluation); None: the batch's (training).
        dropout: rate between the convolution and the batch norm, in training.
        pool: 2x2 max-pool of each column "before" the last join, "after" it, or None.
        stats: under a path per sample, a unit's statistics run over "all" samples, and everything runs; or over its
            "live" ones. Then, if all is on the CPU and the convolutions are large enough for that to be faster,
            neighbouring samples that keep one column alone run that column only: sort the batch's paths accordingly.
        group: a torch.distributed process group over whose ranks the statistics run in training (synchronised batch
            norm; paths for the batch must be the same on all ranks); None: this process's batch.
        dense: run everything and mask: the definition that skipping is held against, and what a CUDA graph holds.
        live: with ``dense`` and a path [R, C], which units live, bool [U] on x's device (``schedule.live_units``), for
            who computes it for many blocks at once. It is not checked.
    Returns:
        :class:`BlockOutput`. Gradients of weights that do not live are zeros; those that require none cost nothing.
        Loss, gradients and statistics equal the dense execution's. Saved for backward: the live joins, convolution
        outputs and their statistics. On the CPU the outputs' gradients are written over them, unless the graph is kept
        or saved_tensors_hooks see it.
    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend that was named cannot run.
        RuntimeError: second derivatives, or gradients of many at once, with dropout in training or over a group; an
            exporter or a transform of torch.func runs this, which does not know it.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), equation 1 and section 3.
    Example:
        >>> w = [torch.randn(2 * 4, 3, 3, 3), torch.randn(4, 4, 3, 3)]
        >>> path = torch.tensor([[False, True], [True, True]])
        >>> fractal_block(torch.randn(2, 3, 8, 8), w, None, None, path).out.shape
        torch.Size([2, 4, 4, 4])
    """
    op = "fractal_block"
    tool = foreign_tool()
    if tool and (tool != "torch.export" or mean is None):  # it keeps the operator, not its gradients
        raise RuntimeError(
            f"{op}: expected to run with this package, got {tool}{' in training' if mean is None else ''}; of a "
            "FractalNet, fractalnet.export.plain(model) is a network of PyTorch's own operators, in evaluation"
        )
    x = checks.tensor(op, "x", x)
    if x.dim() != 4 or min(x.shape[2:]) < (1 if pool is None else 2):
        raise ValueError(f"{op}: expected x of shape [N, C, H, W], H and W >= 1, or 2 for pooling, got {list(x.shape)}")
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"{op}: expected weights to be a list of Tensors, got {type(weights).__name__}")
    for r, w in enumerate(weights):
        if checks.tensor(op, f"weights[{r}]", w).dim() != 4 or 0 in w.shape:
            raise ValueError(f"{op}: expected weights[{r}] of four dimensions and not empty, got {list(w.shape)}")
        if w.dtype != x.dtype and not checks.is_autocast(x):
            raise TypeError(f"{op}: expected weights[{r}] of x's dtype {x.dtype}, got {w.dtype}")
    rows = len(weights)
    if rows not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"{op}: expected weights of 2**(C-1) rows, C from 1 to 8, got {rows}")
    widths = _widths(rows)
    units, columns = sum(widths), widths[0]
    channels = sum(w.shape[0] for w in weights) // units
    for r, w in enumerate(weights):
        expected = (widths[r] * channels, w.shape[1] if r == 0 else channels, 3, 3)
        if tuple(w.shape) != expected:
            raise ValueError(f"{op}: expected weights[{r}] of shape {list(expected)}, got {list(w.shape)}")
    if x.shape[1] != weights[0].shape[1]:
        raise ValueError(f"{op}: expected x of {weights[0].shape[1]} channels, as weights[0], got {list(x.shape)}")
    for name, t in (("gamma", gamma), ("beta", beta), ("conv_bias", conv_bias), ("mean", mean), ("var", var)):
        if t is not None and tuple(checks.tensor(op, name, t).shape) != (units, channels):
            raise ValueError(f"{op}: expected {name} of shape [{units}, {channels}], got {list(t.shape)}")
    tensors: dict[str, Tensor | None] = {f"weights[{r}]": w for r, w in enumerate(weights)}
    tensors |= {"gamma": gamma, "beta": beta, "conv_bias": conv_bias, "mean": mean, "var": var}
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device}, got {t.device}")
    for name, t in (("mean", mean), ("var", var)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: expected {name} that requires no gradient: statistics have none")
    if (mean is None) != (var is None):
        raise ValueError(f"{op}: expected mean and var both or neither, got one")
    path = checks.tensor(op, "path", path, (torch.bool,))
    per_sample = path.dim() == 3
    if tuple(path.shape) != (rows, columns) + ((x.shape[0],) if per_sample else ()):
        raise ValueError(
            f"{op}: expected path bool of shape [{rows}, {columns}] or [{rows}, {columns}, {x.shape[0]}], "
            f"got {path.dtype} {list(path.shape)}"
        )
    if path.device.type != "cpu" and not (dense and path.device == x.device):
        raise ValueError(f"{op}: expected path on the CPU, or with dense=True on {x.device}, got {path.device}")
    if live is not None:
        if not dense or per_sample:
            got = f"dense={dense} and path of shape {list(path.shape)}"
            raise ValueError(f"{op}: expected dense=True and path of shape [{rows}, {columns}] beside live, got {got}")
        if tuple(checks.tensor(op, "live", live, (torch.bool,)).shape) != (units,) or live.device != x.device:
            raise ValueError(
                f"{op}: expected live of shape [{units}] on {x.device}, got {list(live.shape)} on {live.device}"
            )
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{op}: expected dropout in [0, 1), got {dropout!r}")
    if not isinstance(dense, bool):
        raise TypeError(f"{op}: expected dense True or False, got {dense!r}")
    flags = checks.join_options(op, "mean", "branch", pool, stats)
    synchronised = sync.name_of(op, group) if mean is None else ""
    if mean is None and x.shape[0] * x.shape[2] * x.shape[3] == 1 and not synchronised:
        raise ValueError(f"{op}: expected more than 1 value per channel when training, got x of shape {list(x.shape)}")
    backend = backends.resolve(op, backend, x.device, x.dtype)
    if checks.is_autocast(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dtype = accumulate_dtype(x.dtype)
    exact = [t if t is None or t.dtype == dtype else t.to(dtype) for t in (gamma, beta, mean, var)]
    vectors = [None if t is None else t.contiguous() for t in exact]
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights, *vectors[:2], conv_bias)
    )
    bias = None if conv_bias is None else conv_bias.to(x.dtype)
    # Those of the CPU read weights of float32 as they are: there are no copies, and gradients are not rounded.
    as_they_are = bias is None and cpu_conv.computes(x, channels, backend) and all(w.dtype == dtype for w in weights)
    read = _cast(weights, dtype if as_they_are else x.dtype, columns, None if per_sample or dense else path)
    params = distinct([bias, *vectors, *read])
    run = _Block.apply if save else _forward
    result = run(
        to_layout(x, True), path, *params[:5], dense, live, float(dropout), checks.eps(op, eps), flags, save,
        torch.compiler.is_compiling(), backend, synchronised, *params[5:],
    )  # fmt: skip
    return BlockOutput(*result[:4])
