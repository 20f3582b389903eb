"""Device functions of the kernels. Tuples run over the branches, or over (branch, element of the 2x2 window).

z = (y - mean)*scale + shift is centred first: exact where |mean| >> std. The same rules as csrc/join.h: NaN passes
through a ReLU and wins a window, a window's gradient goes to its first maximum, a ReLU's is zero at zero.
"""

import triton
import triton.language as tl


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)  # NaN passes through, as in PyTorch


@triton.jit
def gate(z, g):
    return tl.where(z <= 0, 0.0, g)


@triton.jit
def larger(a, m):
    return tl.where((a > m) | (a != a), a, m)  # a NaN wins, as in PyTorch


@triton.jit
def divide(q, by):
    """Quotient and remainder."""
    whole = q // by
    return whole, q - whole * by


@triton.jit
def channels(BC: tl.constexpr, WIDE: tl.constexpr):
    """The channels of this program, [1, BC]."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    return c.to(tl.int64) if WIDE else c


@triton.jit
def row_max(x, V: tl.constexpr):
    return tl.max(x, 1, keep_dims=True) if V > 1 else x


@triton.jit
def row_sum(x, V: tl.constexpr):
    return tl.sum(x, 1, keep_dims=True) if V > 1 else x


@triton.jit
def sites(tile, count, pixels, width, BP: tl.constexpr, POOL: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
          V: tl.constexpr = 1):  # fmt: skip
    """Of a tile: which sites exist, and their sample, row and column (without pooling, pixel; FLAT: pixel of all
    samples), [BP, 1] each. V > 1: of every V-th, [BP // V, 1]."""
    first = tile * tl.full([1, 1], BP, tl.int64 if WIDE else tl.int32)
    i = tl.arange(0, BP // V)[:, None] * V
    if FLAT:
        p = first + i
        return i < count - first, p * 0, p * 0, p
    n, p = divide(first, pixels)
    more, p = divide(p.to(tl.int32) + i, pixels)  # 64-bit divisions are slow: one for the tile
    h = p * 0
    if POOL:
        h, p = divide(p, width)
    if WIDE:
        h, p = h.to(tl.int64), p.to(tl.int64)
    return i < count - first, n + more, h, p


@triton.jit
def offset(n, h, p, sn, sh, sp, STEP: tl.constexpr, UNIT: tl.constexpr):
    """Of the first element of each site; UNIT: pixels are contiguous, STEP: from one site to the next."""
    off = n * sn + h * STEP * sh
    if UNIT:
        return off + p * STEP
    return off + p * STEP * sp


@triton.jit
def within(c, sc, CL: tl.constexpr):
    return c if CL else c * sc


@triton.jit
def vector(pointer, c, C):
    return tl.load(pointer + c, c < C, other=0.0).to(tl.float32)


@triton.jit
def parameters(mean, var, weight, bias, c, C, eps, HAS_W: tl.constexpr, HAS_B: tl.constexpr):
    """mean, invstd, scale and shift of a branch, [1, BC] each."""
    m = vector(mean, c, C)
    invstd = tl.math.rsqrt(vector(var, c, C) + eps)
    scale = invstd * vector(weight, c, C) if HAS_W else invstd
    shift = vector(bias, c, C) if HAS_B else m * 0
    return m, invstd, scale, shift


@triton.jit
def element(y, off, e: tl.constexpr, ok, sh, sp, CL: tl.constexpr):
    """y at element e of each window: (0, 0), (0, 1), (1, 0), (1, 1)."""
    at = off + (e // 2) * sh + (e % 2) * (sp if CL else 1)  # one by one: both strides together may pass 32 bits
    return tl.load(y + at, ok, other=0.0).to(tl.float32)


@triton.jit
def all_parameters(means, vars, weights, biases, c, C, eps, K: tl.constexpr, NORM: tl.constexpr, HAS_W: tl.constexpr,
                   HAS_B: tl.constexpr):  # fmt: skip
    """Tuples over the branches of mean, invstd, scale and shift; of zeros without normalisation."""
    ms, invstds, scales, shifts = (), (), (), ()
    for b in tl.static_range(K):
        if NORM:
            m, r, s, t = parameters(means[b], vars[b], weights[b], biases[b], c, C, eps, HAS_W, HAS_B)
        else:
            m, r, s, t = 0.0, 0.0, 0.0, 0.0
        ms, invstds, scales, shifts = ms + (m,), invstds + (r,), scales + (s,), shifts + (t,)
    return ms, invstds, scales, shifts


@triton.jit
def all_offsets(n, h, p, c, sn, sc, sh, sp, K: tl.constexpr, STEP: tl.constexpr, CL: tl.constexpr):
    """Tuple over the branches: where a tile's elements are, [BP, BC]."""
    offs = ()
    for b in tl.static_range(K):
        offs = offs + (offset(n, h, p, sn[b], sh[b], sp[b], STEP, not CL) + within(c, sc[b], CL),)
    return offs


@triton.jit
def all_live(mask, n, there, mk, mn, K: tl.constexpr, MASK: tl.constexpr):
    """Tuple over the branches: which sites live, [BP, 1]; and how many branches do."""
    lives = ()
    live_count = n.to(tl.float32) * 0
    for b in tl.static_range(K):
        live = there
        if MASK:
            live = there & (tl.load(mask + b * mk + n * mn, there, other=0) != 0)
        lives = lives + (live,)
        live_count += live.to(tl.float32)
    return lives, live_count


@triton.jit
def join_weight(live_count, K: tl.constexpr, MASK: tl.constexpr, SUM: tl.constexpr):
    """What the sum over the branches is multiplied with."""
    weight = 1.0
    if not SUM:
        if MASK:
            weight = 1.0 / tl.maximum(live_count, 1.0)
        else:
            weight = 1.0 / K
    return weight


@triton.jit
def all_values(ys, offs, reads, ms, scales, shifts, sh, sp, h, w, H, W, K: tl.constexpr, NP: tl.constexpr,
               NORM: tl.constexpr, CL: tl.constexpr):  # fmt: skip
    """Tuples over (branch, element of the window): z, and y - mean."""
    zs, ds = (), ()
    for b in tl.static_range(K):
        for e in tl.static_range(NP):
            ok = reads[b]
            if NP == 4:
                ok = ok & (2 * h + e // 2 < H) & (2 * w + e % 2 < W)
            d = element(ys[b], offs[b], e, ok, sh[b], sp[b], CL)
            z = d
            if NORM:
                d = d - ms[b]
                z = d * scales[b] + shifts[b]
            zs, ds = zs + (z,), ds + (d,)
    return zs, ds


@triton.jit
def total(values, lives, e: tl.constexpr, weight, K: tl.constexpr, NP: tl.constexpr, MASK: tl.constexpr,
          RELU: tl.constexpr):  # fmt: skip
    """weight * sum_b act(values[b, e]) over the live branches."""
    j = 0.0
    for b in tl.static_range(K):
        v = values[b * NP + e]
        v = relu(v) if RELU else v
        j = j + (tl.where(lives[b], v, 0.0) if MASK else v)
    return j * weight


@triton.jit
def window_max(values, first: tl.constexpr):
    m = values[first]
    for e in tl.static_range(1, 4):
        m = larger(values[first + e], m)
    return m


@triton.jit
def route(values, first: tl.constexpr, m, g):
    """Splits g over a window: all of it to the first element that equals the maximum m; of a window that holds NaN, to
    the first NaN (or an infinity before it)."""
    out = ()
    top = tl.where(m == m, m, float("inf"))  # of NaN infinity, which only NaN is not below
    for e in tl.static_range(4):
        below = values[first + e] < top
        out = out + (tl.where(below, 0.0, g),)
        g = tl.where(below, g, 0.0)
    return out


@triton.jit
def maxima(zs, K: tl.constexpr):
    """Tuple over the branches of the maximum of each window."""
    out = ()
    for b in tl.static_range(K):
        out = out + (window_max(zs, b * 4),)
    return out


@triton.jit
def totals(zs, lives, weight, K: tl.constexpr, MASK: tl.constexpr, RELU: tl.constexpr):
    """Tuple over the elements of a window of the joined values."""
    out = ()
    for e in tl.static_range(4):
        out = out + (total(zs, lives, e, weight, K, 4, MASK, RELU),)
    return out


@triton.jit
def site_gradients(zs, g, lives, weight, K: tl.constexpr, MASK: tl.constexpr, RELU_BRANCH: tl.constexpr,
                   RELU_OUTPUT: tl.constexpr, POOL_BEFORE: tl.constexpr, POOL_AFTER: tl.constexpr):  # fmt: skip
    """Tuple over (branch, element): the gradient at z, from that of the output."""
    g = g * weight
    out = ()
    if POOL_AFTER:
        js = totals(zs, lives, weight, K, MASK, RELU_BRANCH)
        m = window_max(js, 0)
        g = gate(m, g) if RELU_OUTPUT else g
        rs = route(js, 0, m, g)
        for i in tl.static_range(4 * K):
            out = out + (gate(zs[i], rs[i % 4]) if RELU_BRANCH else rs[i % 4],)
    elif POOL_BEFORE:
        ms = maxima(zs, K)
        if RELU_OUTPUT:
            g = gate(total(ms, lives, 0, weight, K, 1, MASK, RELU_BRANCH), g)
        for b in tl.static_range(K):
            out = out + route(zs, b * 4, ms[b], gate(ms[b], g) if RELU_BRANCH else g)
    else:
        if RELU_OUTPUT:
            g = gate(total(zs, lives, 0, weight, K, 1, MASK, RELU_BRANCH), g)
        for b in tl.static_range(K):
            out = out + (gate(zs[b], g) if RELU_BRANCH else g,)
    return out


@triton.jit
def merged(number, mean, m2):
    """Chan's merge over the rows: how many values, their mean and the sum of their squared deviations, [1, BC] each."""
    n = tl.sum(number, 0, keep_dims=True)
    centre = tl.sum(mean * number, 0, keep_dims=True) * (1.0 / tl.maximum(n, 1.0))
    return n, centre, tl.sum(m2 + number * (mean - centre) * (mean - centre), 0, keep_dims=True)


@triton.jit
def all_within(lives, inside, K: tl.constexpr):
    out = ()
    for b in tl.static_range(K):
        out = out + (lives[b] & inside,)
    return out


@triton.jit
def also_dropped(lives, there, counted, K: tl.constexpr):
    """Tuple over the branches: the sites that live, and the dropped ones of branches whose statistics saw them."""
    out = ()
    for b in tl.static_range(K):
        out = out + (lives[b] | (there & counted[b]),)
    return out


@triton.jit
def accumulate(sums, dzs, ds, lives, K: tl.constexpr, NP: tl.constexpr, MASK: tl.constexpr):
    """sums + (dz, dz*d), summed over the window."""
    out = ()
    for b in tl.static_range(K):
        dz, dzd = sums[2 * b], sums[2 * b + 1]
        for e in tl.static_range(NP):
            v, vd = dzs[b * NP + e], dzs[b * NP + e] * ds[b * NP + e]
            dz += tl.where(lives[b], v, 0.0) if MASK else v
            dzd += tl.where(lives[b], vd, 0.0) if MASK else vd  # statistics of a dropped branch may be NaN
        out = out + (dz, dzd)
    return out


@triton.jit
def all_of(value, K: tl.constexpr):
    out = ()
    for _ in tl.static_range(K):
        out = out + (value,)
    return out


@triton.jit
def corrections(sum_dz, sum_dzx, counts, scales, invstds, c, C, K: tl.constexpr, BATCH: tl.constexpr):
    """Tuples over the branches: dy = scale*dz + centre + slope*(y - mean), of those that have statistics."""
    centres, slopes, counted = (), (), ()
    for b in tl.static_range(K):
        centre, slope, has = 0.0, 0.0, False
        if BATCH:
            n = tl.load(counts + b + tl.zeros([1, 1], tl.int32))  # no scalar: the interpreter has none that are bool
            has = n > 0
            factor = -scales[b] / tl.maximum(n, 1.0)
            centre = factor * vector(sum_dz + b * C, c, C)
            slope = factor * vector(sum_dzx + b * C, c, C) * invstds[b]
        centres, slopes, counted = centres + (centre,), slopes + (slope,), counted + (has,)
    return centres, slopes, counted
