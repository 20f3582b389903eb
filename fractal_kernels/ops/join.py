"""Masked joins: ``masked_mean_join``, ``bn_relu_join`` and the autograd functions under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, checks, reference, sync
from ..library import Flags, accumulate_dtype
from . import exported
from .twice import Gradients, gradients, inputs_of, twice_differentiable

_OPS = torch.ops.fractal_kernels


def _plain_gradients(ctx: Any, grad: Tensor) -> Gradients:
    """Of a plain join: linear in ``grad``, and of its inputs only the places of maxima matter."""
    mask, *ys = ctx.saved_tensors
    like = ys or [torch.zeros_like(grad)] * ctx.branches
    dtype = accumulate_dtype(grad.dtype)
    dzs = reference.input_gradients(grad, [y.to(dtype) for y in like], mask, ctx.flags)
    return None, None, None, *(dz.to(grad.dtype) for dz in dzs)


def _known(ctx: Any, mask: Tensor | None) -> list[bool]:
    """Which branches live, where that is one answer for the batch and the host has it; or an empty list."""
    if mask is None:
        return [True] * ctx.branches
    plain = type(mask) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
    return mask.tolist() if plain and mask.dim() == 1 and ctx.backend == "cpu" else []  # else it may have no values


class _PlainJoin(torch.autograd.Function):
    """The join without normalisation; the gradient of a plain mean needs no input, so none is saved."""

    # *args: of a signature with as many names as a call has arguments, torch.compile takes it that ctx is not one.
    @staticmethod
    def forward(*args: Any) -> Tensor:
        ctx, flags, backend, mask, *ys = args
        ctx.flags, ctx.backend, ctx.branches = flags, backend, len(ys)
        ctx.save_for_backward(mask, *(ys if flags & ~Flags.SUM else ()))
        return _OPS.join_forward(ys, mask, [], [], [], [], 0.0, flags, backend)  # type: ignore[no-any-return]

    @staticmethod
    @twice_differentiable(_plain_gradients)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, *ys = ctx.saved_tensors
        if not ys and (live := _known(ctx, mask)):
            # Every branch that lives has the same gradient: it is computed once, as a + b does.
            share = grad if ctx.flags & Flags.SUM or sum(live) <= 1 else grad / sum(live)
            zeros = share if all(live) else torch.zeros_like(grad)
            return None, None, None, *(share if alive else zeros for alive in live)
        dys = _OPS.join_backward_apply(grad, ys, mask, [], [], [], [], [], ctx.branches, 0.0, ctx.flags, ctx.backend)
        return None, None, None, *dys


def _operands(ctx: Any, saved: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Inputs, mask, means, vars, weights and biases out of the tensors of a :class:`_NormJoin`."""
    k, affine = ctx.k, ctx.affine
    mask, *params = saved
    biases = k + 2 * affine  # where they end
    means, vars = params[biases : biases + k], params[biases + k : biases + 2 * k]
    return params[:k], mask, means, vars, params[k : k + affine], params[k + affine : biases]


def _normalised_gradients(ctx: Any, grad: Tensor) -> Gradients | None:
    if ctx.group:
        return None  # statistics of other ranks
    saved = inputs_of(ctx)
    ys, mask, *fixed, weights, biases = _operands(ctx, saved)
    means, vars = (None, None) if ctx.batch_stats else fixed
    out = reference.normalised_join(ys, mask, means, vars, weights, biases, ctx.eps, ctx.flags, ctx.plain)
    return gradients(ctx, out, [None] * 8 + saved, grad)


class _NormJoin(torch.autograd.Function):
    """The join of normalised branches. ``tensors`` is the mask, inputs, weights and biases (each k, or none), means and
    vars (each k), and of the batch's statistics the numbers of values.

    Saves these; normalised and activated values are recomputed.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:  # *args: as above
        ctx, k, affine, batch_stats, plain, eps, flags, backend, group, *tensors = args
        ctx.save_for_backward(*tensors)
        ctx.k, ctx.affine, ctx.batch_stats, ctx.plain = k, affine, batch_stats, plain
        ctx.eps, ctx.flags, ctx.backend, ctx.group = eps, flags, backend, group
        out: Tensor = _OPS.join_forward(*_operands(ctx, tensors), eps, flags, backend)
        once = torch.compiler.is_compiling() or in_checkpoint() or out.is_inference()
        ctx.version = None if once else out._version
        return out

    @staticmethod
    @twice_differentiable(_normalised_gradients)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, affine = ctx.k, ctx.affine
        saved = ctx.saved_tensors
        head = (grad, *_operands(ctx, saved))
        dws: list[Tensor | None] = [None] * affine
        dbs: list[Tensor | None] = [None] * affine
        sums: list[Tensor] = []
        needs = ctx.needs_input_grad[9:]
        if ctx.batch_stats or any(needs[k : k + 2 * affine]):
            dz, dzx = _OPS.join_backward_reduce(*head, ctx.eps, ctx.flags, ctx.backend)
            if affine:
                dws, dbs = list(dzx.unbind()), list(dz.unbind())
            if ctx.batch_stats:
                if ctx.group:  # of all ranks; gradients of weights stay this rank's, as with any data parallelism
                    dz, dzx = _OPS.sync_sums(torch.stack([dz, dzx]), ctx.group).unbind()
                sums = [dz, dzx, saved[-1]]
        dys: list[Tensor | None] = [None] * k
        if any(needs[:k]):
            dys = _OPS.join_backward_apply(*head, sums, k, ctx.eps, ctx.flags, ctx.backend)
        rest = (None,) * (2 * k + ctx.batch_stats)
        return (None,) * 9 + (*dys, *dws, *dbs, *rest)


def in_checkpoint() -> bool:
    """Whether what is saved here is computed again by a checkpoint, and is there for one use."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def can_come_again(t: Tensor) -> bool:
    """Whether :func:`again` can give this tensor: it is a normalised join's output, as the join left it."""
    node: Any = t.grad_fn
    is_join = isinstance(node, _NormJoin._backward_cls)
    return is_join and node.version == t._version


@torch.no_grad()
def again(node: Any) -> Tensor:
    """The output of the normalised join that an autograd node stands for, out of what the node saved."""
    operands = _operands(node, node.saved_tensors)
    return _OPS.join_forward(*operands, node.eps, node.flags, node.backend)  # type: ignore[no-any-return]


def masked_mean_join(
    inputs: Sequence[Tensor], mask: Tensor | None = None, *, pool: str | None = None, backend: str | None = None
) -> Tensor:
    r"""The mean of the branches that live, in one pass.

    .. math:: out_n = \sum_i m_{i,n}\, y_{i,n} \,/\, \max(\sum_i m_{i,n}, 1)

    Args:
        inputs: 1 to 8 branches [N, C, *] of one shape, dtype (float32, float64, float16, bfloat16) and device.
            channels_last, contiguous and channel slices of either are read in place, other strides are copied.
        mask: None (all live), [k] (one draw for the batch) or [k, N] (one per sample); non-zero keeps the branch.
        pool: None, or a 2x2 max-pool "before" (each branch pooled, then joined) or "after"; [N, C, H, W] only.
        backend: a name of :func:`available_backends`; None chooses.
    Returns:
        [N, C, *] (spatial size halved by a pool, rounded down) in the inputs' dtype and layout; 0 in a sample whose
        branches are all dropped. A dropped branch is never read, so a NaN in it stays there. Sums are float32 (float64
        for float64), in a fixed order: repeated calls give the same bits. The backward saves the mask only; with a
        pool the inputs too, and no indices.
    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend that was named cannot run.
    Source:
        Larsson et al. 2016 (arXiv:1605.07648), section 2 (join) and section 3 (drop-path).
    Example:
        >>> a, b = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 3.0)
        >>> masked_mean_join([a, b]).unique().item()
        2.0
        >>> masked_mean_join([a, b], torch.tensor([False, True])).unique().item()
        3.0
    """
    op = "masked_mean_join"
    ys = checks.branches(op, inputs)
    mask = checks.mask(op, mask, ys)
    flags = checks.join_options(op, "mean", "none", pool, "all")
    if pool is not None:
        checks.poolable(op, ys[0])
    return _plain_join(op, ys, mask, flags, backend)


def _plain_join(op: str, ys: list[Tensor], mask: Tensor | None, flags: int, backend: str | None) -> Tensor:
    backend = backends.resolve(op, backend, ys[0].device, ys[0].dtype)
    if exported.foreign_tool():
        return exported.join(ys, mask, [], [], [], [], 0.0, flags)
    return _PlainJoin.apply(flags, backend, mask, *distinct(ys))  # type: ignore[no-any-return, no-untyped-call]


def distinct(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Under torch.compile a view of what comes again: it refuses an autograd function that takes a tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    seen: list[Tensor | None] = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return seen


def normalised_join(
    op: str,
    ys: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    running_means: list[Tensor | None],
    running_vars: list[Tensor | None],
    mask: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    flags: int,
    backend: str | None,
    group: object = None,
    plain: tuple[int, ...] = (),
) -> Tensor:
    """Batch norm of every branch but the ``plain`` ones, activation, join and pooling; inputs are checked. Updates
    running statistics."""
    backend = backends.resolve(op, backend, ys[0].device, ys[0].dtype)
    synchronised = sync.name_of(op, group) if training else ""
    k, channels, dtype = len(ys), ys[0].shape[1], accumulate_dtype(ys[0].dtype)
    checks.momentum(op, momentum, ys)
    normed = [i for i in range(k) if i not in plain]
    batch_stats = training or running_means[normed[0]] is None
    per_channel = ys[0].numel() // max(channels, 1)
    if training and per_channel == 1 and not synchronised:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, got inputs of shape {list(ys[0].shape)}"
        )
    params: list[Tensor] = []
    affine = k if any(t is not None for t in (*weights, *biases)) else 0
    if affine:
        params += [ys[0].new_ones(channels, dtype=dtype) if w is None else w for w in weights]
        params += [ys[0].new_zeros(channels, dtype=dtype) if b is None else b for b in biases]
    running = [t for t in (*running_means, *running_vars) if t is not None]
    if not batch_stats and torch.is_grad_enabled() and any(t.requires_grad for t in running):
        raise ValueError(f"{op}: expected running statistics that require no gradient: they have none")
    if tool := exported.foreign_tool():
        if synchronised:
            raise RuntimeError(f"{op}: expected no process group, or evaluation, got {tool} of synchronised batch norm")
        return exported.join(
            ys, mask, running_means, running_vars, weights, biases, eps, flags, plain, batch_stats, momentum
        )
    if not batch_stats:  # with gradients copies: training may move them before the backward of this evaluation
        fixed = torch.stack(running).unbind() if torch.is_grad_enabled() else running
        params += _of_all(ys, normed, fixed[: len(normed)], fixed[len(normed) :], eps)
    params = [p if p.dtype == dtype and p.is_contiguous() else p.to(dtype).contiguous() for p in params]
    if batch_stats:
        moved = running if training else []
        mean, var, count = _statistics(ys, normed, mask, flags, backend, synchronised, moved, momentum)
        params += _of_all(ys, normed, mean.unbind(), var.unbind(), eps)
        if plain:  # nothing is counted in these
            none, counts = count.new_zeros(()), dict(zip(normed, count.unbind(), strict=True))
            count = torch.stack([counts.get(i, none) for i in range(k)])
        params.append(count)
    options = (k, affine, batch_stats, plain, eps, flags, backend, synchronised)
    return _NormJoin.apply(*options, mask, *distinct([*ys, *params]))  # type: ignore[no-any-return, no-untyped-call]


def _of_all(
    ys: list[Tensor], normed: list[int], means: Sequence[Tensor], vars: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """k means and k variances, of those of the branches that are normalised."""
    if len(normed) == len(ys):
        return [*means, *vars]
    own = dict(zip(normed, zip(means, vars, strict=True), strict=True))
    same = reference.unchanged(ys[0], eps)
    return [own.get(i, same)[part] for part in (0, 1) for i in range(len(ys))]


@torch.no_grad()
def _statistics(
    ys: list[Tensor],
    normed: list[int],
    mask: Tensor | None,
    flags: int,
    backend: str,
    group: str,
    running: list[Tensor],
    momentum: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values of every branch, in the batch or in those of all ranks; the running
    statistics move, of branches that had values."""
    momenta = None
    if isinstance(momentum, Tensor):
        momenta = momentum.to(accumulate_dtype(ys[0].dtype)).expand(len(ys)).contiguous()
        momentum = 0.0
    of_all = mask is not None and mask.dim() == 2 and not flags & Flags.STATS_LIVE
    mask = None if of_all else mask
    if len(normed) < len(ys):  # not by a list as an index, which would be copied to the device
        momenta = None if momenta is None else torch.stack([momenta[i] for i in normed])
        mask = None if mask is None else torch.stack([mask[i] for i in normed])
        ys = [ys[i] for i in normed]
    if not group:
        return _OPS.channel_stats(ys, mask, running, momentum, momenta, backend)  # type: ignore[no-any-return]
    mean, var, count = _OPS.sync_stats(*_OPS.channel_stats(ys, mask, [], 0.0, None, backend), group)
    if running:
        reference.update_running(running, mean, var, count, momentum if momenta is None else momenta)
    return mean, var, count


def bn_relu_join(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None,
    biases: Sequence[Tensor | None] | None,
    running_means: Sequence[Tensor | None] | None,
    running_vars: Sequence[Tensor | None] | None,
    mask: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    reduction: str = "mean",
    activation: str = "branch",
    pool: str | None = None,
    stats: str = "all",
    normalised: Sequence[bool] | None = None,
    group: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Batch norm and ReLU of every branch, their masked join and a 2x2 max-pool, fused.

    .. math:: out = pool\Bigl(\phi_o\Bigl(\tfrac1n \sum_i m_i\, pool(\phi_b(w_i \hat y_i + b_i))\Bigr)\Bigr),\quad
              \hat y_i = (y_i - \mu_i) / \sqrt{\sigma_i^2 + \epsilon}

    Args:
        inputs: 1 to 8 branches [N, C, *] (usually convolution outputs), as in :func:`masked_mean_join`.
        weights, biases: per branch [C] or None (1 and 0); None for no affine at all. Kept in float32.
        running_means, running_vars: per branch [C], updated in place when training; None: no running statistics, and
            the batch's are used in evaluation too, as in ``torch.nn.BatchNorm2d``.
        mask: as in :func:`masked_mean_join`. A branch that a [k] mask drops keeps its running statistics.
        training: normalise with the batch's statistics (biased variance), else with the running ones.
        momentum: weight of the new statistics; a tensor, 0-dim or [k], stays on the device (cumulative averaging).
        eps: added to the variance.
        reduction: "mean" over the live branches, or "sum" (residual adds, re-parameterised blocks).
        activation: "branch" (ReLU on each branch), "output" (ReLU on the join) or "none".
        pool: None, "before" (each branch pooled, then joined) or "after" (the join pooled); [N, C, H, W] only.
        stats: under a [k, N] mask, statistics of a branch over "all" samples or over its "live" ones.
        normalised: per branch, whether it has a batch norm; one without, the identity shortcut of a residual block, has
            :math:`\hat y_i = y_i`, and None for its weight, bias and running statistics. None: all have one.
        group: a torch.distributed process group over whose ranks the statistics run in training (synchronised batch
            norm; every rank makes the same calls, one of them with an empty batch too); None: this process's batch.
        backend: a name of :func:`available_backends`; None chooses.
    Returns:
        [N, C, *] (spatial size halved by a pool, rounded down) in the inputs' dtype and layout.
        Statistics and sums in float32 (float64 for float64), fixed order: repeated calls give the same bits. The
        backward saves the inputs and two vectors per branch.
    Raises:
        ValueError, TypeError: naming the argument. BackendUnavailable: the backend that was named cannot run.
    Source:
        Ioffe & Szegedy 2015 (arXiv:1502.03167); Larsson et al. 2016 (arXiv:1605.07648), sections 2 and 3.
    Example:
        >>> ys = [torch.randn(2, 3, 4, 4) for _ in range(2)]
        >>> bn_relu_join(ys, None, None, None, None, training=True, pool="before").shape
        torch.Size([2, 3, 2, 2])

        The end of a residual block, relu(bn(y) + x):

        >>> y, x = torch.randn(2, 2, 3, 4, 4).unbind()
        >>> options = dict(reduction="sum", activation="output", normalised=[True, False])
        >>> out = bn_relu_join([y, x], None, None, None, None, training=True, **options)
        >>> torch.allclose(out, (torch.nn.BatchNorm2d(3)(y) + x).relu(), atol=1e-6)
        True
    """
    op = "bn_relu_join"
    ys = checks.branches(op, inputs)
    ws, bs = checks.per_channel(op, "weights", weights, ys), checks.per_channel(op, "biases", biases, ys)
    rms = checks.per_channel(op, "running_means", running_means, ys)
    rvs = checks.per_channel(op, "running_vars", running_vars, ys)
    plain = checks.plain(op, normalised, len(ys), weights=ws, biases=bs, running_means=rms, running_vars=rvs)
    if len({t is None for of_all in (rms, rvs) for i, t in enumerate(of_all) if i not in plain}) > 1:
        raise ValueError(f"{op}: expected running_means and running_vars for all branches or for none, got a mixture")
    mask = checks.mask(op, mask, ys)
    flags = checks.join_options(op, reduction, activation, pool, stats)
    if pool is not None:
        checks.poolable(op, ys[0])
    eps = checks.eps(op, eps)
    if len(plain) == len(ys):
        checks.momentum(op, momentum, ys)
        sync.name_of(op, group)
        return _plain_join(op, ys, mask, flags, backend)
    return normalised_join(op, ys, ws, bs, rms, rvs, mask, training, momentum, eps, flags, backend, group, plain)
