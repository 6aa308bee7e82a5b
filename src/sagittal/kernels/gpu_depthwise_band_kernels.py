"""Depthwise convolutions as banded matrix products, for tensor cores; `gpu_depthwise` calls them and says when.

Along W the KW taps of a channel are a banded (Toeplitz) matrix of 16 inputs by 8 outputs: its column n holds them from
row n on. For each pair of taps along D and H one product of 16 x 16 inputs with that matrix convolves 16 pieces of a
row at once; 5 of 16 multiplications are of use with five taps, and tensor cores have more than enough of them.

Tensors as in `gpu_depthwise_kernels`: dense channels-last, bfloat16 or float16, sums in float32. A program owns
BLOCK_C channels, one for each warp, and 16 patches m, side by side, of ROWS rows by 8 columns; it walks through a run
of planes. Of each input plane it reads row r of all patches once, as a matrix (m, column), and uses it for every
output row r - kh of the patch and for every output plane in reach, whose sums wait in registers.

A matrix meets its zeros too: a value that is infinite or not a number makes the outputs of its piece not numbers,
where the plain form limits that to the kernel's reach.
"""

# Triton's compiler reads this file: it has no types in Python's sense, and adds tuples where Python would unpack.
# mypy: ignore-errors
# ruff: noqa: RUF005
import triton
import triton.language as tl

from sagittal.kernels.gpu_depthwise_kernels import _rounded, _summary


@triton.jit
def _product(a, b, sums, CUTS: tl.constexpr):
    """Return sums + a @ b for each channel; the interpreter knows no products of bfloat16."""
    if CUTS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums)


@triton.jit
def _paired(even, odd, CUTS: tl.constexpr):
    """Return (..., 2 n) of (..., n) twice, alternating; each pair goes through shared memory as a word of 32 bits."""
    low, high = even.to(tl.int16, bitcast=True), odd.to(tl.int16, bitcast=True)
    words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    if not CUTS:
        # Opaque to the compiler, which otherwise moves even and odd numbers apart, half a word at a time.
        words = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1)
    low = (words & 0xFFFF).to(tl.int16).to(even.dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(even.dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), [even.shape[0], even.shape[1], 2 * even.shape[2]])


@triton.jit
def _band(taps, row, c, c_ok, C, KW: tl.constexpr, BLOCK_C: tl.constexpr, dtype: tl.constexpr, CUTS: tl.constexpr):
    """Return the banded matrices (BLOCK_C, 16, 8) of a row of taps."""
    n, k = tl.arange(0, 8)[None, :, None], 2 * tl.arange(0, 8)[None, None, :]
    tap = k - n
    at = taps + (row * KW + tap) * C + c
    even = _rounded(tl.load(at, mask=(tap >= 0) & (tap < KW) & c_ok, other=0.0), dtype, CUTS)
    odd = _rounded(tl.load(at + C, mask=(tap >= -1) & (tap < KW - 1) & c_ok, other=0.0), dtype, CUTS)
    return tl.permute(tl.reshape(tl.join(even, odd), [BLOCK_C, 8, 16]), (0, 2, 1))


@triton.jit
def _row_of_patches(at, near, C, W, w, CUTS: tl.constexpr):
    """Load a row of all patches as (BLOCK_C, 16, 16): the even and odd columns apart, to be neighbours in a register.

    at, near, w of shapes like (BLOCK_C, 16, 8): where the even columns lie, whether row and channel exist, W's index.
    """
    even = tl.load(at, mask=near & (w >= 0) & (w < W), other=0.0)
    odd = tl.load(at + C, mask=near & (w >= -1) & (w < W - 1), other=0.0)
    return _paired(even, odd, CUTS)


@triton.jit
def _by_position(x):
    """Return (c, m, n) as (m * n, c)."""
    return tl.reshape(tl.permute(x, (1, 2, 0)), [x.shape[1] * x.shape[2], x.shape[0]])


@triton.jit
def band_slide(
    x, taps, bias, add, y, parts, D, H, W, C: tl.constexpr, run, tiles_h, tiles_w, tiles_c,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, MOMENTS: tl.constexpr, CUTS: tl.constexpr,
    ROWS: tl.constexpr, ACROSS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolve with stride 1; arguments as of `slide`. Grid: (tiles * tiles_c, runs, N)."""
    c_tile, tile = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    sample, first = tl.program_id(2), tl.program_id(1) * run
    c = (c_tile * BLOCK_C + tl.arange(0, BLOCK_C))[:, None, None]
    c_ok = c < C
    m, n = tl.arange(0, 16)[None, :, None], tl.arange(0, 8)[None, None, :]
    h = (tile // tiles_w) * (16 // ACROSS * ROWS) + m // ACROSS * ROWS
    left = (tile % tiles_w) * (8 * ACROSS) + m % ACROSS * 8
    w, w_in = left + n, left - KW // 2 + 2 * n
    reached = c_ok & (2 * n < 8 + KW - 1)
    source = ((h - KH // 2) * W + w_in) * C + c
    target = (h * W + w) * C + c
    dtype: tl.constexpr = x.dtype.element_ty
    bands = ()
    for j in tl.static_range(KD * KH):
        bands = bands + (_band(taps, j, c, c_ok, C, KW, BLOCK_C, dtype, CUTS),)
    zero = tl.zeros([BLOCK_C, 16, 8], tl.float32)
    start = zero
    if HAS_BIAS:
        start += tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(KD * ROWS):
        sums = sums + (start,)
    pivot, s1, s2 = zero, zero, zero
    last = tl.minimum(first + run, D)
    for step in range(last - first + 2 * (KD // 2)):
        d = first + step - KD // 2
        height = tl.where((d >= 0) & (d < D), H, 0)  # a plane outside has no rows; a branch here would keep loads late
        plane = x + (sample * D + d).to(tl.int64) * H * W * C
        for r in tl.static_range(ROWS + KH - 1):
            row = h + (r - KH // 2)
            near = (row >= 0) & (row < height) & reached
            a = _row_of_patches(plane + r * W * C + source, near, C, W, w_in, CUTS)
            added = ()
            for t in tl.static_range(KD):
                for i in tl.static_range(ROWS):
                    if (r - i >= 0) & (r - i < KH):
                        added = added + (_product(a, bands[(KD - 1 - t) * KH + r - i], sums[t * ROWS + i], CUTS),)
                    else:
                        added = added + (sums[t * ROWS + i],)
            sums = added
        o = d - KD // 2
        if o >= first:
            out = (sample * D + o).to(tl.int64) * H * W * C
            for i in tl.static_range(ROWS):
                ok = (h + i < H) & (w < W) & c_ok
                result = sums[i]
                if HAS_ADD:
                    result += tl.load(add + out + i * W * C + target, mask=ok, other=0.0).to(tl.float32)
                stored = _rounded(result, dtype, CUTS)
                tl.store(y + out + i * W * C + target, stored, mask=ok)
                if MOMENTS:
                    kept = stored.to(tl.float32)
                    if i == 0:
                        pivot = tl.where(o == first, kept, pivot)
                    off = tl.where(h + i < H, kept - pivot, 0.0)
                    s1 += off
                    s2 += off * off
        moved = ()
        for t in tl.static_range(ROWS, KD * ROWS):
            moved = moved + (sums[t],)
        for _ in tl.static_range(ROWS):
            moved = moved + (start,)
        sums = moved
    if MOMENTS:
        rows = tl.minimum(tl.maximum(H - h, 0), ROWS)
        count = tl.where(w < W, rows * (last - first), 0).to(tl.float32)
        part = (sample * tl.num_programs(1) + tl.program_id(1)) * (tiles_h * tiles_w) + tile
        channel = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
        _summary(
            _by_position(count), _by_position(pivot), _by_position(s1), _by_position(s2), parts, part, C, channel,
            channel < C,
        )  # fmt: skip


@triton.jit
def band_weight_parts(
    x, grad, parts, D, H, W, C: tl.constexpr, run, runs, tiles_w, tiles_c,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, CUTS: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up x[o + j - p] * grad[o] over a tile's run of planes of x, with stride 1, for PLANES of KD planes of taps.

    A row of all patches of x, (column, m), times a row of grad, (m, n), is a matrix (column, n) whose diagonals
    column - n = jw are the taps' sums. parts (splits, KD * KH * KW + 1, C) as of `weight_parts`.
    Grid: (tiles * tiles_c, N * runs, KD / PLANES).
    """
    c_tile, tile = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    sample, first = tl.program_id(1) // runs, (tl.program_id(1) % runs) * run
    plane_of_taps = tl.program_id(2) * PLANES
    c = (c_tile * BLOCK_C + tl.arange(0, BLOCK_C))[:, None, None]
    c_ok = c < C
    top = (tile // tiles_w) * (16 // ACROSS * ROWS)
    left = (tile % tiles_w) * (8 * ACROSS)
    half, column, n = tl.arange(0, 8)[None, None, :], tl.arange(0, 16)[None, :, None], tl.arange(0, 8)[None, :, None]
    # Patches in pairs, which are the neighbours in a register here: 2 * half and 2 * half + 1.
    h_even, h_odd = top + 2 * half // ACROSS * ROWS, top + (2 * half + 1) // ACROSS * ROWS
    l_even, l_odd = left + 2 * half % ACROSS * 8, left + (2 * half + 1) % ACROSS * 8
    reached = c_ok & (column < 8 + KW - 1)
    x_even, x_odd = l_even + column - KW // 2, l_odd + column - KW // 2
    in_even, in_odd = reached & (x_even >= 0) & (x_even < W), reached & (x_odd >= 0) & (x_odd < W)
    g_even, g_odd = l_even + n, l_odd + n
    zero = tl.zeros([BLOCK_C, 16, 8], tl.float32)
    sums = ()
    for _ in tl.static_range(PLANES * KH):
        sums = sums + (zero,)
    whole = tl.zeros([BLOCK_C, 8, 8], tl.float32)
    last = tl.minimum(first + run, D)
    for step in range(last - first):
        d = first + step
        plane = x + (sample * D + d).to(tl.int64) * H * W * C
        rows = ()
        for r in tl.static_range(ROWS + KH - 1):
            a, b = h_even + (r - KH // 2), h_odd + (r - KH // 2)
            even = tl.load(plane + (a * W + x_even) * C + c, mask=in_even & (a >= 0) & (a < H), other=0.0)
            odd = tl.load(plane + (b * W + x_odd) * C + c, mask=in_odd & (b >= 0) & (b < H), other=0.0)
            rows = rows + (_paired(even, odd, CUTS),)
        for t in tl.static_range(PLANES):  # plane d of x meets plane d + p - jd of grad by tap jd
            o = d + KD // 2 - plane_of_taps - t
            height = tl.where((o >= 0) & (o < D), H, 0)
            plane = grad + (sample * D + o).to(tl.int64) * H * W * C
            for i in tl.static_range(ROWS):
                a, b = h_even + i, h_odd + i
                even = tl.load(plane + (a * W + g_even) * C + c, mask=c_ok & (g_even < W) & (a < height), other=0.0)
                odd = tl.load(plane + (b * W + g_odd) * C + c, mask=c_ok & (g_odd < W) & (b < height), other=0.0)
                whole += tl.where(o == d, even.to(tl.float32) + odd.to(tl.float32), 0.0)
                given = tl.permute(_paired(even, odd, CUTS), (0, 2, 1))
                added = ()
                for j in tl.static_range(PLANES * KH):
                    if j // KH == t:
                        added = added + (_product(rows[i + j % KH], given, sums[j], CUTS),)
                    else:
                        added = added + (sums[j],)
                sums = added
    split = (tl.program_id(1) * (tl.num_programs(0) // tiles_c) + tile).to(tl.int64)
    base = parts + split * (KD * KH * KW + 1) * C + c_tile * BLOCK_C
    channel = tl.arange(0, BLOCK_C)
    channel_ok = c_tile * BLOCK_C + channel < C
    diagonal = column - tl.arange(0, 8)[None, None, :]
    for j in tl.static_range(PLANES * KH):
        for jw in tl.static_range(KW):
            total = tl.sum(tl.sum(tl.where(diagonal == jw, sums[j], 0.0), axis=2), axis=1)
            tl.store(base + ((plane_of_taps * KH + j) * KW + jw) * C + channel, total, mask=channel_ok)
    if tl.program_id(2) == KD // 2 // PLANES:
        tl.store(base + KD * KH * KW * C + channel, tl.sum(tl.sum(whole, axis=2), axis=1), mask=channel_ok)
