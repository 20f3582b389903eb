"""The device code of the four kernels and of the merges of their partials; one source for both layouts.

A tensor is a matrix of sites (pixels of all samples; with pooling, windows of 2x2) by channels. A program owns BC
channels and walks tiles of BP sites, ``tile, tile + programs, ...``; parameters and sums of its channels stay in
registers. In channels_last channels are contiguous, else pixels are, and the compiler orders the threads accordingly.
FLAT: pixels are evenly spaced over the samples too and nobody asks which sample one is in, so none is divided out.
Passes: each live y once, each output once. What a mask drops is not loaded: the loads are predicated, per site. WIDE:
64-bit offsets; there are (count - 1) // BP + 1 tiles, since count + BP may pass 2**31. Arithmetic is float32; sums go
to one partial per program and are merged in the order of the programs, without atomics.
"""

import triton
import triton.language as tl

from .maths import (
    accumulate,
    all_live,
    all_of,
    all_offsets,
    all_parameters,
    all_values,
    all_within,
    also_dropped,
    channels,
    corrections,
    join_weight,
    maxima,
    merged,
    offset,
    relu,
    row_max,
    row_sum,
    site_gradients,
    sites,
    total,
    totals,
    window_max,
    within,
)

MASK_STRIDES = ("mk", "mn")  # another batch, the last of an epoch, is no other program


@triton.jit(do_not_specialize=MASK_STRIDES)
def channel_stats(partial, numbers, ys, mask, y_sn, y_sc, y_sh, y_sp, mk, mn, count, pixels, C, K: tl.constexpr,
                  MASK: tl.constexpr, CL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr,
                  BC: tl.constexpr, U: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """partial[program, b] = origin, mean - origin and sum of squared deviations, numbers[program, b] = how many values.
    Grid: (programs, channel blocks). Reads k tensors. For each site of the tile, relative to one of that site's values:
    U values at a time, which are on their way together, by Chan's merge; then his merge over the sites. V > 1: a site
    is a row of as many neighbouring pixels of one sample and channel, what a thread loads at once."""
    c = channels(BC, WIDE)
    for b in tl.static_range(K):
        origin = tl.zeros([BP // V, BC], tl.float32)
        mean = tl.zeros([BP // V, BC], tl.float32)
        m2 = tl.zeros([BP // V, BC], tl.float32)
        number = tl.zeros([BP // V, 1], tl.float32)
        for tile in range(tl.program_id(0), (count - 1) // BP + 1, U * tl.num_programs(0)):
            theres, values = (), ()
            for u in tl.static_range(U):
                there, n, h, p = sites(tile + u * tl.num_programs(0), count, pixels, 1, BP, False, FLAT, WIDE, V)
                if MASK:
                    there = there & (tl.load(mask + b * mk + n * mn, there, other=0) != 0)
                off = offset(n, h, p, y_sn[b], y_sh[b], y_sp[b], 1, not CL) + within(c, y_sc[b], CL)
                if V > 1:
                    off = off + tl.arange(0, V)[None, :]
                theres = theres + (there,)
                values = values + (tl.load(ys[b] + off, there & (c < C), other=0.0),)
            # Relative to one of the values, their squares lose nothing: a part of them is variance.
            first = row_max(values[0].to(tl.float32), V)
            if MASK:
                for i in tl.static_range(1, U):
                    first = tl.where(theres[U - i], row_max(values[U - i].to(tl.float32), V), first)
                first = tl.where(theres[0], row_max(values[0].to(tl.float32), V), first)
            origin = tl.where(number == 0, first, origin)
            add = theres[0].to(tl.float32)
            total, squares = mean * 0, mean * 0
            for u in tl.static_range(0 if MASK or V > 1 else 1, U):
                d = tl.where(theres[u], values[u].to(tl.float32) - first, 0.0)
                total += row_sum(d, V)
                squares += row_sum(d * d, V)
            for u in tl.static_range(1, U):
                add += theres[u].to(tl.float32)
            add *= V
            inverse = 1.0 / tl.maximum(add, 1.0)  # divisions for each site, not for each value
            ratio = add * (1.0 / tl.maximum(number + add, 1.0))
            delta = (first - origin) + total * inverse - mean
            m2 += (squares - total * (total * inverse)) + delta * delta * (number * ratio)
            mean += delta * ratio
            number += add
        base = tl.max(tl.where(number > 0, origin, float("-inf")), 0, keep_dims=True)
        base = tl.where(tl.sum(number, 0, keep_dims=True) > 0, base, 0.0)
        n_all, mean_all, m2 = merged(number, tl.where(number > 0, origin - base + mean, 0.0), m2)
        row = tl.program_id(0).to(tl.int64) * K + b
        tl.store(partial + 3 * row * C + c, base, c < C)
        tl.store(partial + (3 * row + 1) * C + c, mean_all, c < C)
        tl.store(partial + (3 * row + 2) * C + c, m2, c < C)
        tl.store(numbers + row + tl.zeros([1, 1], tl.int32), n_all)


@triton.jit(do_not_specialize=MASK_STRIDES)
def join_forward(out, ys, mask, means, vars, weights, biases, y_sn, y_sc, y_sh, y_sp, o_sn, o_sc, o_sh, o_sp, mk, mn,
                 count, pixels, width, H, W, C, eps,
                 K: tl.constexpr, NORM: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, MASK: tl.constexpr,
                 SUM: tl.constexpr, RELU_BRANCH: tl.constexpr, RELU_OUTPUT: tl.constexpr, POOL_BEFORE: tl.constexpr,
                 POOL_AFTER: tl.constexpr, CL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr,
                 BC: tl.constexpr):  # fmt: skip
    """out = act(pool(weight * sum_b pool(act(z_b)))). Grid as above. Moves k+1 tensors."""
    NP: tl.constexpr = 4 if POOL_BEFORE or POOL_AFTER else 1
    c = channels(BC, WIDE)
    ms, invstds, scales, shifts = all_parameters(means, vars, weights, biases, c, C, eps, K, NORM, HAS_W, HAS_B)
    for tile in range(tl.program_id(0), (count - 1) // BP + 1, tl.num_programs(0)):
        there, n, h, w = sites(tile, count, pixels, width, BP, NP == 4, FLAT, WIDE)
        offs = all_offsets(n, h, w, c, y_sn, y_sc, y_sh, y_sp, K, 2 if NP == 4 else 1, CL)
        lives, live_count = all_live(mask, n, there, mk, mn, K, MASK)
        reads = all_within(lives, c < C, K)
        weight = join_weight(live_count, K, MASK, SUM)
        zs, ds = all_values(ys, offs, reads, ms, scales, shifts, y_sh, y_sp, h, w, H, W, K, NP, NORM, CL)
        if POOL_BEFORE:
            j = total(maxima(zs, K), lives, 0, weight, K, 1, MASK, RELU_BRANCH)
        elif POOL_AFTER:
            j = window_max(totals(zs, lives, weight, K, MASK, RELU_BRANCH), 0)
        else:
            j = total(zs, lives, 0, weight, K, 1, MASK, RELU_BRANCH)
        j = relu(j) if RELU_OUTPUT else j
        to = offset(n, h, w, o_sn, o_sh, o_sp, 1, not CL) + within(c, o_sc, CL)
        tl.store(out + to, j.to(out.dtype.element_ty), there & (c < C))


@triton.jit(do_not_specialize=MASK_STRIDES)
def join_backward_reduce(partial, grad, ys, mask, means, vars, weights, biases, y_sn, y_sc, y_sh, y_sp, o_sn, o_sc,
                         o_sh, o_sp, mk, mn, count, pixels, width, H, W, C, eps,
                         K: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, MASK: tl.constexpr,
                         SUM: tl.constexpr, RELU_BRANCH: tl.constexpr, RELU_OUTPUT: tl.constexpr,
                         POOL_BEFORE: tl.constexpr, POOL_AFTER: tl.constexpr, CL: tl.constexpr, FLAT: tl.constexpr,
                         WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """partial[program, 2b] = sum dz_b, [program, 2b + 1] = sum dz_b*xhat_b. Grid as above. Reads k+1 tensors."""
    NP: tl.constexpr = 4 if POOL_BEFORE or POOL_AFTER else 1
    c = channels(BC, WIDE)
    ms, invstds, scales, shifts = all_parameters(means, vars, weights, biases, c, C, eps, K, True, HAS_W, HAS_B)
    sums = ()
    for _ in tl.static_range(2 * K):
        sums = sums + (tl.zeros([BP, BC], tl.float32),)
    for tile in range(tl.program_id(0), (count - 1) // BP + 1, tl.num_programs(0)):
        there, n, h, w = sites(tile, count, pixels, width, BP, NP == 4, FLAT, WIDE)
        offs = all_offsets(n, h, w, c, y_sn, y_sc, y_sh, y_sp, K, 2 if NP == 4 else 1, CL)
        lives, live_count = all_live(mask, n, there, mk, mn, K, MASK)
        reads = all_within(lives, c < C, K)
        weight = join_weight(live_count, K, MASK, SUM)
        at = offset(n, h, w, o_sn, o_sh, o_sp, 1, not CL) + within(c, o_sc, CL)
        g = tl.load(grad + at, there & (c < C), other=0.0).to(tl.float32)
        zs, ds = all_values(ys, offs, reads, ms, scales, shifts, y_sh, y_sp, h, w, H, W, K, NP, True, CL)
        dzs = site_gradients(zs, g, lives, weight, K, MASK, RELU_BRANCH, RELU_OUTPUT, POOL_BEFORE, POOL_AFTER)
        sums = accumulate(sums, dzs, ds, lives, K, NP, MASK)
    to = partial + tl.program_id(0).to(tl.int64) * (2 * K * C) + c
    for b in tl.static_range(K):
        tl.store(to + 2 * b * C, tl.sum(sums[2 * b], 0, keep_dims=True), c < C)
        dzx = tl.sum(sums[2 * b + 1], 0, keep_dims=True)
        dzx = tl.where(dzx == 0, 0.0, dzx * invstds[b])  # of a dropped branch it may be infinite
        tl.store(to + (2 * b + 1) * C, dzx, c < C)


@triton.jit(do_not_specialize=MASK_STRIDES)
def join_backward_apply(dys, grad, ys, mask, means, vars, weights, biases, sum_dz, sum_dzx, counts, y_sn, y_sc, y_sh,
                        y_sp, d_sn, d_sc, d_sh, d_sp, o_sn, o_sc, o_sh, o_sp, mk, mn, count, pixels, width, H, W, C,
                        eps, K: tl.constexpr, NORM: tl.constexpr, BATCH: tl.constexpr, ALL: tl.constexpr,
                        READS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, MASK: tl.constexpr,
                        SUM: tl.constexpr, RELU_BRANCH: tl.constexpr, RELU_OUTPUT: tl.constexpr,
                        POOL_BEFORE: tl.constexpr, POOL_AFTER: tl.constexpr, CL: tl.constexpr, FLAT: tl.constexpr,
                        WIDE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """dy = scale*(dz - sum_dz/n - xhat*sum_dzx/n), the last two with batch statistics only. Grid as above, over windows
    that may be cut off by the edge, of which no output came. Reads k+1 tensors (READS: of a plain mean one), writes k.
    ALL: the statistics ran over dropped samples too, which therefore have a gradient."""
    NP: tl.constexpr = 4 if POOL_BEFORE or POOL_AFTER else 1
    c = channels(BC, WIDE)
    ms, invstds, scales, shifts = all_parameters(means, vars, weights, biases, c, C, eps, K, NORM, HAS_W, HAS_B)
    centres, slopes, counted = corrections(sum_dz, sum_dzx, counts, scales, invstds, c, C, K, BATCH)
    for tile in range(tl.program_id(0), (count - 1) // BP + 1, tl.num_programs(0)):
        there, n, h, w = sites(tile, count, pixels, width, BP, NP == 4, FLAT, WIDE)
        lives, live_count = all_live(mask, n, there, mk, mn, K, MASK)
        weight = join_weight(live_count, K, MASK, SUM)
        whole = there & (c < C)
        if NP == 4:
            whole = whole & (2 * h + 1 < H) & (2 * w + 1 < W)
        at = offset(n, h, w, o_sn, o_sh, o_sp, 1, not CL) + within(c, o_sc, CL)
        g = tl.load(grad + at, whole, other=0.0).to(tl.float32)
        if READS:
            offs = all_offsets(n, h, w, c, y_sn, y_sc, y_sh, y_sp, K, 2 if NP == 4 else 1, CL)
            reads = all_within(also_dropped(lives, there, counted, K) if ALL else lives, c < C, K)
            zs, ds = all_values(ys, offs, reads, ms, scales, shifts, y_sh, y_sp, h, w, H, W, K, NP, NORM, CL)
            dzs = site_gradients(zs, g, lives, weight, K, MASK, RELU_BRANCH, RELU_OUTPUT, POOL_BEFORE, POOL_AFTER)
        else:
            dzs = all_of(g * weight, K)
            ds = dzs
        tos = all_offsets(n, h, w, c, d_sn, d_sc, d_sh, d_sp, K, 2 if NP == 4 else 1, CL)
        for b in tl.static_range(K):
            for e in tl.static_range(NP):
                v = dzs[b * NP + e] * scales[b] if NORM else dzs[b * NP + e]
                v = tl.where(lives[b], v, 0.0) if MASK else v
                ok = there & (c < C)
                if BATCH:
                    v += tl.where(counted[b], centres[b] + slopes[b] * ds[b * NP + e], 0.0)
                    v = v if ALL or not MASK else tl.where(lives[b], v, 0.0)
                if NP == 4:
                    ok = ok & (2 * h + e // 2 < H) & (2 * w + e % 2 < W)
                to = tos[b] + (e // 2) * d_sh[b] + (e % 2) * (d_sp[b] if CL else 1)  # as in element()
                tl.store(dys[b] + to, v.to(dys[b].dtype.element_ty), ok)


@triton.jit(do_not_specialize=("programs",))
def merge_stats(mean, var, counts, partial, numbers, running, momentum, momenta, programs, C, K: tl.constexpr,
                UPDATE: tl.constexpr, HAS_M: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Chan's merge of the partials: each row of the tile takes every BG-th in the order of the programs, then the rows
    are merged; and the running statistics of a branch that had values, K means and K variances. Grid: (channel blocks,
    branch)."""
    b = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    base = tl.load(partial + 3 * b * C + c, c < C, other=0.0)
    number = tl.zeros([BG, 1], tl.float32)
    mean_rows = tl.zeros([BG, BC], tl.float32)
    m2_rows = tl.zeros([BG, BC], tl.float32)
    for first in range(0, programs, BG):
        g = first + tl.arange(0, BG)[:, None]
        row = g * K + b
        there = g < programs
        n = tl.load(numbers + row, there, other=0.0)
        inside = there & (c < C)
        origin = tl.load(partial + 3 * row * C + c, inside, other=0.0)
        part = tl.load(partial + (3 * row + 1) * C + c, inside, other=0.0)
        m2 = tl.load(partial + (3 * row + 2) * C + c, inside, other=0.0)
        delta = tl.where(n > 0, origin - base + part, 0.0) - mean_rows
        ratio = n / tl.maximum(number + n, 1.0)
        mean_rows += delta * ratio
        m2_rows += tl.where(n > 0, m2, 0.0) + delta * delta * (number * ratio)
        number += n
    n_all, mean_all, m2_all = merged(number, mean_rows, m2_rows)
    mean_all += base
    biased = m2_all / tl.maximum(n_all, 1.0)
    tl.store(mean + b * C + c, mean_all, c < C)
    tl.store(var + b * C + c, biased, c < C)
    if tl.program_id(0) == 0:
        tl.store(counts + b + tl.zeros([1, 1], tl.int32), n_all)
    if UPDATE:
        keep = tl.load(momenta + b) if HAS_M else momentum
        unbiased = biased * (n_all / tl.maximum(n_all - 1.0, 1.0))
        for i in tl.static_range(K):
            if b == i:
                ok = (n_all > 0) & (c < C)
                old_mean, old_var = tl.load(running[i] + c, ok, other=0.0), tl.load(running[K + i] + c, ok, other=0.0)
                tl.store(running[i] + c, (1 - keep) * old_mean + keep * mean_all, ok)
                tl.store(running[K + i] + c, (1 - keep) * old_var + keep * unbiased, ok)


@triton.jit(do_not_specialize=("programs",))
def merge_sums(sum_dz, sum_dzx, partial, programs, C, K: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr):
    """Sums of the partials in the order of the programs. Grid: (channel blocks, 2k)."""
    i = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    s = tl.zeros([BG, BC], tl.float32)
    for first in range(0, programs, BG):
        g = first + tl.arange(0, BG)[:, None]
        s += tl.load(partial + (g * (2 * K) + i) * C + c, (g < programs) & (c < C), other=0.0)
    out = tl.sum(s, 0, keep_dims=True)
    if i % 2 == 0:
        tl.store(sum_dz + (i // 2) * C + c, out, c < C)
    else:
        tl.store(sum_dzx + (i // 2) * C + c, out, c < C)
