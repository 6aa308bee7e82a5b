"""Depthwise convolutions of volumes as Triton programs; `gpu_depthwise` calls them and says when.

All tensors are dense channels-last, (N, D, H, W, C): 32 channels of a voxel are 64 bytes in bfloat16, so every load of
a shifted tile is as coalesced as the unshifted one. A program owns a tile of BLOCK_H * BLOCK_W positions and BLOCK_C
channels, walks through a run of planes, and adds in float32.

Each axis has a mode of its own: 1, or 2 for stride 2, or 3 for the transposed form of stride 2. With p = k // 2:
modes 1 and 2 read x[o * mode + j - p] for tap j; in mode 3 the output 2 * m + e meets the taps of one parity only,
j = r + 2 * t with r = (e + p) % 2, and reads x[m + (e + p - r) / 2 - t]. So a program of a transposed convolution
computes outputs of one parity per axis and multiplies no zeros.

Triton decides at decoration whether it compiles or interprets: this module is imported at the first use, not before.
"""

# Triton's compiler reads this file: it has no types in Python's sense, and adds tuples where Python would unpack.
# mypy: ignore-errors
# ruff: noqa: RUF005
import triton
import triton.language as tl


@triton.jit
def _taps_of(K: tl.constexpr, MODE: tl.constexpr):
    """Return how many taps an output of an axis can meet."""
    return (K + 1) // 2 if MODE == 3 else K


@triton.jit
def _source(m, e, t, K: tl.constexpr, MODE: tl.constexpr):
    """Return the input index and the tap's number for the t-th tap of output m (of parity e in mode 3)."""
    if MODE == 3:
        r = (e + K // 2) % 2
        return m + (e + K // 2 - r) // 2 - t, r + 2 * t
    return m * MODE + t - K // 2, t


@triton.jit
def _place(m, e, MODE: tl.constexpr):
    """Return the output index of position m."""
    if MODE == 3:
        return 2 * m + e
    return m


@triton.jit
def _rounded(x, dtype: tl.constexpr, CUTS: tl.constexpr):
    """Return float32 x in dtype, rounded to the nearest also where the conversion CUTS, as the interpreter's does."""
    if CUTS and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _summary(count, pivot, s1, s2, out, part, C, c, c_ok):
    """Store a tile's count, mean and sum of squared deviations for each channel at out (parts, 3, C).

    count (P, 1); pivot, s1, s2 (P, BLOCK_C) with the sums of (h - pivot) and its square over a position's planes.
    Sums about a value that occurred keep their digits where the mean is large against the deviation.
    """
    some = tl.maximum(count, 1.0)
    mean = tl.where(count > 0, pivot + s1 / some, 0.0)  # a position outside has sums, but counts for nothing
    squares = tl.maximum(s2 - s1 * s1 / some, 0.0)
    total = tl.sum(count, axis=0)  # (1,)
    whole = tl.sum(count * mean, axis=0) / tl.maximum(total, 1.0)
    off = mean - whole[None, :]
    squares = tl.sum(tl.where(count > 0, squares + count * off * off, 0.0), axis=0)
    base = out + part.to(tl.int64) * 3 * C + c
    tl.store(base, total + tl.zeros_like(whole), mask=c_ok)
    tl.store(base + C, whole, mask=c_ok)
    tl.store(base + 2 * C, squares, mask=c_ok)


@triton.jit
def _row(
    plane,
    offset,
    h,
    w,
    c,
    jh,
    sums,
    held,
    taps,
    H,
    W,
    C: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    HOLD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the KD sums with the part of one row of taps added."""
    row = plane + (jh - KH // 2) * W * C + offset
    for jw in tl.static_range(KW):
        if MASKED:
            hs, ws = h + (jh - KH // 2), w + (jw - KW // 2)
            near = ((hs >= 0) & (hs < H) & (ws >= 0) & (ws < W))[:, None] & (c < C)[None, :]
            value = tl.load(row + (jw - KW // 2) * C, mask=near, other=0.0).to(tl.float32)
        else:
            value = tl.load(row + (jw - KW // 2) * C).to(tl.float32)
        added = ()
        for t in tl.static_range(KD):
            if HOLD:
                tap = held[((KD - 1 - t) * KH + jh) * KW + jw]
            else:
                at = taps + (((KD - 1 - t) * KH + jh) * KW + jw) * C
                tap = tl.load(at + c, mask=c < C, other=0.0)[None, :]
            added = added + (tl.fma(value, tap, sums[t]),)
        sums = added
    return sums


@triton.jit
def _plane(
    plane,
    offset,
    h,
    w,
    c,
    sums,
    held,
    taps,
    H,
    W,
    C: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    HOLD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the KD sums with an input plane's part added; plane d meets the output d - p + t by tap KD - 1 - t."""
    if HOLD:
        for jh in tl.static_range(KH):
            sums = _row(plane, offset, h, w, c, jh, sums, held, taps, H, W, C, KD, KH, KW, HOLD, MASKED)
    else:  # unrolled, 343 taps would compile for minutes
        for jh in range(KH):
            sums = _row(plane, offset, h, w, c, jh, sums, held, taps, H, W, C, KD, KH, KW, HOLD, MASKED)
    return sums


@triton.jit
def slide(
    x,
    taps,
    bias,
    add,
    y,
    parts,
    D,
    H,
    W,
    C: tl.constexpr,
    run,
    tiles_h,
    tiles_w,
    tiles_c,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    MOMENTS: tl.constexpr,
    CUTS: tl.constexpr,
    HOLD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Convolve with stride 1: each input plane is read once per (h, w) tap and serves KD output planes.

    The KD running sums of a thread move by one at each plane; taps (KD * KH * KW, C) float32 stay in registers where
    HOLD. parts (N * tiles_h * tiles_w * runs, 3, C). Grid: (tiles * tiles_c, runs, N).
    """
    c_tile, tile = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    n, first = tl.program_id(2), tl.program_id(1) * run
    position = tl.arange(0, BLOCK_H * BLOCK_W)
    h = (tile // tiles_w) * BLOCK_H + position // BLOCK_W
    w = (tile % tiles_w) * BLOCK_W + position % BLOCK_W
    c = c_tile * BLOCK_C + tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR)
    c_ok = c < C
    ok = ((h < H) & (w < W))[:, None] & c_ok[None, :]
    offset = ((h * W + w) * C)[:, None] + c[None, :]
    zero = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    start = zero
    if HAS_BIAS:
        start += tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    held = ()
    if HOLD:
        for j in tl.static_range(KD * KH * KW):
            held = held + (tl.load(taps + j * C + c, mask=c_ok, other=0.0)[None, :],)
    # Most tiles reach no border: their loads need neither a mask nor a zero instead.
    top, left = (tile // tiles_w) * BLOCK_H, (tile % tiles_w) * BLOCK_W
    inner = (top >= KH // 2) & (top + BLOCK_H + KH // 2 <= H) & (left >= KW // 2) & (left + BLOCK_W + KW // 2 <= W)
    inner = inner & (C % BLOCK_C == 0)
    sums = ()
    for _ in tl.static_range(KD):
        sums = sums + (start,)
    pivot, s1, s2 = zero, zero, zero
    last = tl.minimum(first + run, D)
    for step in range(last - first + 2 * (KD // 2)):
        d = first + step - KD // 2
        plane = x + (n * D + d).to(tl.int64) * H * W * C
        if (d >= 0) & (d < D):
            if inner:
                sums = _plane(plane, offset, h, w, c, sums, held, taps, H, W, C, KD, KH, KW, HOLD, False)
            else:
                sums = _plane(plane, offset, h, w, c, sums, held, taps, H, W, C, KD, KH, KW, HOLD, True)
        o = d - KD // 2
        if o >= first:
            row = (n * D + o).to(tl.int64) * H * W * C
            result = sums[0]
            if HAS_ADD:
                result += tl.load(add + row + offset, mask=ok, other=0.0).to(tl.float32)
            stored = _rounded(result, y.dtype.element_ty, CUTS)
            tl.store(y + row + offset, stored, mask=ok)
            if MOMENTS:
                kept = stored.to(tl.float32)
                pivot = tl.where(o == first, kept, pivot)
                s1 += kept - pivot
                s2 += (kept - pivot) * (kept - pivot)
        moved = ()
        for t in tl.static_range(1, KD):
            moved = moved + (sums[t],)
        sums = moved + (start,)
    if MOMENTS:
        count = tl.where((h < H) & (w < W), last - first, 0).to(tl.float32)[:, None]
        part = (n * tl.num_programs(1) + tl.program_id(1)) * (tiles_h * tiles_w) + tile
        _summary(count, pivot, s1, s2, parts, part, C, c, c_ok)


@triton.jit
def gather(
    x,
    taps,
    bias,
    add,
    y,
    parts,
    D,
    H,
    W,
    C,
    OD,
    OH,
    OW,
    run,
    tiles_h,
    tiles_w,
    tiles_c,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MODE_D: tl.constexpr,
    MODE_H: tl.constexpr,
    MODE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    MOMENTS: tl.constexpr,
    CUTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Convolve in any modes, one output plane at a time.

    x (N, D, H, W, C), y (N, OD, OH, OW, C). Tiles and runs count positions m, half as many as outputs in mode 3;
    parities vary slowest in grid axis 1. parts (N * classes * runs * tiles_h * tiles_w, 3, C).
    Grid: (tiles * tiles_c, classes * runs, N).
    """
    HALF_D: tl.constexpr = MODE_D == 3
    HALF_H: tl.constexpr = MODE_H == 3
    HALF_W: tl.constexpr = MODE_W == 3
    CLASSES: tl.constexpr = (2 if HALF_D else 1) * (2 if HALF_H else 1) * (2 if HALF_W else 1)
    runs = tl.num_programs(1) // CLASSES
    parity, first = tl.program_id(1) // runs, (tl.program_id(1) % runs) * run
    e_w = parity % 2 if HALF_W else 0
    parity = parity // 2 if HALF_W else parity
    e_h = parity % 2 if HALF_H else 0
    e_d = parity // (2 if HALF_H else 1)
    c_tile, tile = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    n = tl.program_id(2)
    position = tl.arange(0, BLOCK_H * BLOCK_W)
    h = (tile // tiles_w) * BLOCK_H + position // BLOCK_W
    w = (tile % tiles_w) * BLOCK_W + position % BLOCK_W
    c = c_tile * BLOCK_C + tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR)
    c_ok = c < C
    placed = (_place(h, e_h, MODE_H) < OH) & (_place(w, e_w, MODE_W) < OW)
    ok = placed[:, None] & c_ok[None, :]
    target = ((_place(h, e_h, MODE_H) * OW + _place(w, e_w, MODE_W)) * C)[:, None] + c[None, :]
    zero = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    start = zero
    if HAS_BIAS:
        start += tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    pivot, s1, s2 = zero, zero, zero
    last = tl.minimum(first + run, (OD - e_d + 1) // 2 if HALF_D else OD)
    for step in range(last - first):
        m = first + step
        total = start
        for td in range(_taps_of(KD, MODE_D)):
            d, jd = _source(m, e_d, td, KD, MODE_D)
            plane = x + (n * D + d).to(tl.int64) * H * W * C
            rows = tl.where((d >= 0) & (d < D) & (jd < KD), H, 0)  # a plane outside has no rows
            for th in tl.static_range((KH + 1) // 2 if MODE_H == 3 else KH):
                for tw in tl.static_range((KW + 1) // 2 if MODE_W == 3 else KW):
                    hs, jh = _source(h, e_h, th, KH, MODE_H)
                    ws, jw = _source(w, e_w, tw, KW, MODE_W)
                    limit = tl.where((jh < KH) & (jw < KW), rows, 0)
                    near = (hs >= 0) & (hs < limit) & (ws >= 0) & (ws < W)
                    at = ((hs * W + ws) * C)[:, None] + c[None, :]
                    value = tl.load(plane + at, mask=near[:, None] & c_ok[None, :], other=0.0).to(tl.float32)
                    tap = taps + ((jd * KH + jh) * KW + jw) * C + c
                    real = c < tl.where(limit > 0, C, 0)
                    total += value * tl.load(tap, mask=real, other=0.0)[None, :]
        row = (n * OD + _place(m, e_d, MODE_D)).to(tl.int64) * OH * OW * C
        if HAS_ADD:
            total += tl.load(add + row + target, mask=ok, other=0.0).to(tl.float32)
        stored = _rounded(total, y.dtype.element_ty, CUTS)
        tl.store(y + row + target, stored, mask=ok)
        if MOMENTS:
            kept = stored.to(tl.float32)
            pivot = tl.where(m == first, kept, pivot)
            s1 += kept - pivot
            s2 += (kept - pivot) * (kept - pivot)
    if MOMENTS:
        count = tl.where(placed, tl.maximum(last - first, 0), 0).to(tl.float32)[:, None]
        part = (n * tl.num_programs(1) + tl.program_id(1)) * (tiles_h * tiles_w) + tile
        _summary(count, pivot, s1, s2, parts, part, C, c, c_ok)


@triton.jit
def merge(parts, merged, P, C, per_group, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Merge summaries (N, P, 3, C) of counts, means and squared deviations into (N, groups, 3, C), in a fixed order.

    Grid: (groups, tiles of C, N). The rule is that of Chan, Golub and LeVeque (1979) for pairs of samples.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    first = tl.program_id(0) * per_group
    last = tl.minimum(first + per_group, P)
    count, mean, squares = (tl.zeros([BLOCK_C], tl.float32),) * 3
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (p < last)[:, None] & c_ok[None, :]
        at = parts + (tl.program_id(2).to(tl.int64) * P + p)[:, None] * 3 * C + c[None, :]
        counts = tl.load(at, mask=ok, other=0.0)
        means = tl.load(at + C, mask=ok, other=0.0)
        within = tl.load(at + 2 * C, mask=ok, other=0.0)
        more = tl.sum(counts, axis=0)
        whole = tl.sum(counts * means, axis=0) / tl.maximum(more, 1.0)
        off = means - whole[None, :]
        within_all = tl.sum(within + counts * off * off, axis=0)
        both = tl.maximum(count + more, 1.0)
        step = whole - mean
        squares += within_all + step * step * (count * more / both)
        mean += step * (more / both)
        count += more
    to = merged + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 3 * C + c
    tl.store(to, count, mask=c_ok)
    tl.store(to + C, mean, mask=c_ok)
    tl.store(to + 2 * C, squares, mask=c_ok)


@triton.jit
def weight_parts(
    x,
    grad,
    parts,
    D,
    H,
    W,
    C: tl.constexpr,
    OD,
    OH,
    OW,
    run,
    runs,
    tiles_w,
    tiles_c,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Add up x[o * stride + j - p] * grad[o] over a tile's run of planes, for ROWS of the KH rows of taps.

    parts (splits, KD * KH * KW + 1, C) float32, the last row for the sum of grad; another kernel adds the splits, in
    a fixed order. Where STRIDE_D is 1 a plane of x is read once per (h, w) tap for KD planes of grad in registers.
    Grid: (tiles * tiles_c, N * runs, KH / ROWS).
    """
    c_tile, tile = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    n, first = tl.program_id(1) // runs, (tl.program_id(1) % runs) * run
    row = tl.program_id(2) * ROWS
    position = tl.arange(0, BLOCK_H * BLOCK_W)
    h = (tile // tiles_w) * BLOCK_H + position // BLOCK_W
    w = (tile % tiles_w) * BLOCK_W + position % BLOCK_W
    c = c_tile * BLOCK_C + tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR)
    c_ok = c < C
    ok = ((h < OH) & (w < OW))[:, None] & c_ok[None, :]
    offset = ((h * OW + w) * C)[:, None] + c[None, :]
    at = ((h * STRIDE_H * W + w * STRIDE_W) * C)[:, None] + c[None, :]
    zero = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    sums = ()
    for _ in tl.static_range(KD * ROWS * KW):
        sums = sums + (zero,)
    whole = zero
    last = tl.minimum(first + run, OD)
    grads = (zero,)  # with stride 1: planes d - p ... d + p of grad, while d runs through the planes of x
    if STRIDE_D == 1:
        for t in tl.static_range(1, KD):
            o = first - KD // 2 + t - 1
            rows = tl.where((o >= 0) & (o < OD), OH, 0)  # a plane outside has no rows
            plane = grad + (n * OD + o).to(tl.int64) * OH * OW * C
            grads = grads + (tl.load(plane + offset, mask=ok & (h < rows)[:, None], other=0.0).to(tl.float32),)
    for step in range(last - first):
        d = first + step
        o = d + KD // 2 if STRIDE_D == 1 else d
        plane = grad + (n * OD + o).to(tl.int64) * OH * OW * C
        rows = tl.where(o < OD, OH, 0)
        loaded = tl.load(plane + offset, mask=ok & (h < rows)[:, None], other=0.0).to(tl.float32)
        moved = ()
        if STRIDE_D == 1:
            for t in tl.static_range(1, KD):
                moved = moved + (grads[t],)
        grads = moved + (loaded,)
        whole += grads[KD // 2] if STRIDE_D == 1 else loaded
        added = ()
        for jr in tl.static_range(ROWS):
            for jw in tl.static_range(KW):
                hs, ws = h * STRIDE_H + row + jr - KH // 2, w * STRIDE_W + jw - KW // 2
                near = ((hs >= 0) & (hs < H) & (ws >= 0) & (ws < W))[:, None] & ok
                shift = at + (row + jr - KH // 2) * W * C
                if STRIDE_D == 1:
                    source = x + (n * D + d).to(tl.int64) * H * W * C + shift
                    value = tl.load(source + (jw - KW // 2) * C, mask=near, other=0.0).to(tl.float32)
                for jd in tl.static_range(KD):
                    if STRIDE_D == 1:
                        other = grads[KD - 1 - jd]
                    else:
                        ds = d * STRIDE_D + jd - KD // 2
                        plane = x + (n * D + ds).to(tl.int64) * H * W * C
                        rows = tl.where((ds >= 0) & (ds < D), OH, 0)
                        there = near & (h < rows)[:, None]
                        value = tl.load(plane + shift + (jw - KW // 2) * C, mask=there, other=0.0).to(tl.float32)
                        other = loaded
                    added = added + (tl.fma(value, other, sums[(jr * KW + jw) * KD + jd]),)
        sums = added
    split = (tl.program_id(1) * (tl.num_programs(0) // tiles_c) + tile).to(tl.int64)
    base = parts + split * (KD * KH * KW + 1) * C + c
    for jr in tl.static_range(ROWS):
        for jw in tl.static_range(KW):
            for jd in tl.static_range(KD):
                total = tl.sum(sums[(jr * KW + jw) * KD + jd], axis=0)
                tl.store(base + ((jd * KH + row + jr) * KW + jw) * C, total, mask=c_ok)
    if tl.program_id(2) == 0:
        tl.store(base + KD * KH * KW * C, tl.sum(whole, axis=0), mask=c_ok)
