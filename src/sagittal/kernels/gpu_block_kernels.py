"""The Triton kernels of a MedNeXt block's tail; `gpu_block` launches them and says what they compute.

Everything lies channels-last: h is (N, L, C), the output and residual are (N, L, O). A program owns `M` voxels of one
case and walks over the R hidden channels in chunks of `BH`, so the hidden activation lives in registers only; `BC` and
`BO` are C and O rounded up to powers of two. Products take their operands in the weights' dtype and add up in float32;
float32 operands are multiplied exactly ("ieee"), because TF32 has ten bits. Sums over voxels go to one slot for each
program, which `gpu_block` adds up afterwards: no atomics, so the same bits at every run.

Constants of compilation: `LAYER` (norm over channels instead of space), `RESIDUAL`, `GRN`, `EXACT` (erf itself instead
of the polynomial) and `WIDEN` (operands to float32 before a product: Triton's interpreter cannot multiply bfloat16).
Sizes of volumes are not specialised, which would compile anew for each level of a network.
Parameters are many because Triton passes pointers and sizes one by one.
"""

# O counts output channels, as in the docstring above; Triton's language has no Python types.
# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal_cdf(v, EXACT: tl.constexpr):
    """Return the normal distribution function, which times v is GELU."""
    if EXACT:
        return 0.5 + 0.5 * tl.math.erf(v * 0.7071067811865476)
    # For half precision, an odd polynomial on [-4, 4]: off by 2.6e-5 at most, a hundredth of bfloat16's rounding; erf
    # takes twice the instructions, and at 64 hidden channels per voxel it would take longer than the memory.
    x = tl.minimum(tl.maximum(v, -4.0), 4.0)
    t = x * x
    p = 8.06285144e-11 * t - 7.00308749e-09
    p = p * t + 2.71605191e-07
    p = p * t - 6.29484757e-06
    p = p * t + 9.89068217e-05
    p = p * t - 1.13391624e-03
    p = p * t + 9.87746246e-03
    p = p * t - 6.64105793e-02
    p = p * t + 3.98922705e-01
    return 0.5 + x * p


@triton.jit
def gelu_slope(v, cdf):
    """Return the derivative of v * cdf(v)."""
    return cdf + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)


@triton.jit
def cast(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """Return x in dtype, rounded to the nearest."""
    if WIDEN and dtype == tl.bfloat16:
        # Triton's interpreter cuts float32 off, a GPU rounds it.
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, total, WIDEN: tl.constexpr):
    """Return total + a @ b, added up in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def positions(start, height, width, M: tl.constexpr):
    """Return along D, H, W where voxels start to start + M of a grid lie, (M,) each."""
    index = start.to(tl.int32) + tl.arange(0, M)
    return index // width // height, index // width % height, index % width


@triton.jit
def output_rows(case, start, L, height, width, UP: tl.constexpr, M: tl.constexpr):
    """Return the rows among the outputs of all cases that voxels start to start + M of h belong to, (M,).

    An up block's output has one plane more than h at the front of each axis that it doubles.
    """
    if UP == 0:
        return case.to(tl.int64) * L + start + tl.arange(0, M)
    high, wide = height + UP // 2 % 2, width + UP % 2
    d, y, x = positions(start, height, width, M)
    d, y, x = d + UP // 4, y + UP // 2 % 2, x + UP % 2
    return ((case.to(tl.int64) * (L // width // height + UP // 4) + d) * high + y) * wide + x


@triton.jit
def coarse_rows(case, start, L, height, width, UP: tl.constexpr, M: tl.constexpr):
    """Return the rows of an up block's input that the residual path brings to these voxels of h, and where it does."""
    d, y, x = positions(start, height, width, M)
    depth = L // width // height
    there = d >= 0
    if UP // 4 == 1:
        there, d, depth = there & (d % 2 == 0), d // 2, depth // 2 + 1
    if UP // 2 % 2 == 1:
        there, y, height = there & (y % 2 == 0), y // 2, height // 2 + 1
    if UP % 2 == 1:
        there, x, width = there & (x % 2 == 0), x // 2, width // 2 + 1
    return ((case.to(tl.int64) * depth + d) * height + y) * width + x, there


@triton.jit
def load_rows(pointer, row, inside, width, B: tl.constexpr):
    """Load rows (M,) of a dense matrix of `width` columns as (M, B), zeros where not `inside` (M,)."""
    columns = tl.arange(0, B)
    mask = inside[:, None] & (columns[None, :] < width)
    return tl.load(pointer + row[:, None] * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, values, row, inside, width, B: tl.constexpr, WIDEN: tl.constexpr):
    """Store what `load_rows` would load."""
    columns = tl.arange(0, B)
    mask = inside[:, None] & (columns[None, :] < width)
    tl.store(
        pointer + row[:, None] * width + columns[None, :], cast(values, pointer.dtype.element_ty, WIDEN), mask=mask
    )


@triton.jit
def load_vector(pointer, start, width, B: tl.constexpr):
    """Load B numbers from `start` of a vector that ends at `width`, in float32, zeros outside."""
    index = start + tl.arange(0, B)
    return tl.load(pointer + index, mask=index < width, other=0.0).to(tl.float32)


@triton.jit
def load_matrix(pointer, row, rows, column, columns, A: tl.constexpr, B: tl.constexpr):
    """Load an (A, B) tile at (row, column) of a dense (rows, columns) matrix, zeros outside."""
    i, j = row + tl.arange(0, A), column + tl.arange(0, B)
    mask = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(pointer + i[:, None] * columns + j[None, :], mask=mask, other=0.0)


@triton.jit
def standardised(h, mean, scale, case, start, L, C, eps, M: tl.constexpr, BC: tl.constexpr, LAYER: tl.constexpr):
    """Return (h - mean) / deviation as (M, BC) in float32, and 1 / deviation: (BC,), or (M,) for the layer norm."""
    row, inside = case.to(tl.int64) * L + start + tl.arange(0, M), tl.arange(0, M) < L - start
    x = load_rows(h, row, inside, C, BC).to(tl.float32)
    if LAYER:
        centre = tl.sum(x, 1) / C
        x = tl.where(tl.arange(0, BC)[None, :] < C, x - centre[:, None], 0.0)
        factor = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
        return x * factor[:, None], factor
    centre = load_vector(mean + case * C, 0, C, BC)
    factor = load_vector(scale + case * C, 0, C, BC)
    return (x - centre[None, :]) * factor[None, :], factor


@triton.jit(do_not_specialize=["L", "height", "width"])
def forward(
    h, mean, scale, norm_weight, norm_bias, expand, expand_bias, contract, contract_bias, gain, offset,
    residual, odd, y, L, C, R, O, height, width, eps,
    M: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
    LAYER: tl.constexpr, GRN: tl.constexpr, UP: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
    RESIDUAL: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """Write y = residual + contract(GRN(GELU(expand(norm(h))))) (+ odd), behind the front planes where `UP`.

    Passes over activations: reads h and the residual, writes y. Grid: tiles of voxels, cases. gain (N, R) and offset
    (R,) are GRN's factor and shift.
    """
    start, case = tl.program_id(0).to(tl.int64) * M, tl.program_id(1)
    dtype = expand.dtype.element_ty
    x, _ = standardised(h, mean, scale, case, start, L, C, eps, M, BC, LAYER)
    x = x * load_vector(norm_weight, 0, C, BC)[None, :] + load_vector(norm_bias, 0, C, BC)[None, :]
    x = cast(x, dtype, WIDEN)
    total = tl.zeros((M, BO), tl.float32)
    for first in range(0, R, BH):
        wide = product(x, tl.trans(load_matrix(expand, first, R, 0, C, BH, BC)), tl.zeros((M, BH), tl.float32), WIDEN)
        wide += load_vector(expand_bias, first, R, BH)[None, :]
        wide = wide * normal_cdf(wide, EXACT)
        if GRN:
            wide = wide * load_vector(gain + case * R, first, R, BH)[None, :]
            wide += load_vector(offset, first, R, BH)[None, :]
        total = product(cast(wide, dtype, WIDEN), tl.trans(load_matrix(contract, 0, O, first, R, BO, BH)), total, WIDEN)
    total += load_vector(contract_bias, 0, O, BO)[None, :]
    row, inside = output_rows(case, start, L, height, width, UP, M), tl.arange(0, M) < L - start
    if RESIDUAL:
        total += load_rows(residual, row, inside, O, BO).to(tl.float32)
    if ODD:
        coarse, there = coarse_rows(case, start, L, height, width, UP, M)
        total += load_rows(odd, coarse, inside & there, O, BO).to(tl.float32)
    store_rows(y, total, row, inside, O, BO, WIDEN)


@triton.jit
def hidden_gradient(
    x, grad, expand_tile, contract_tile, bias, gain, offset, pull, case, first, R, inside,
    M: tl.constexpr, BH: tl.constexpr, GRN: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return a chunk's gradient in front of the GELU and what goes into the contraction, (M, BH) each, in float32."""
    wide = product(x, tl.trans(expand_tile), tl.zeros((M, BH), tl.float32), WIDEN)
    wide += load_vector(bias, first, R, BH)[None, :]
    cdf = normal_cdf(wide, EXACT)
    response = wide * cdf
    along = product(grad, contract_tile, tl.zeros((M, BH), tl.float32), WIDEN)
    if GRN:
        factor = load_vector(gain + case * R, first, R, BH)[None, :]
        along = along * factor + response * load_vector(pull + case * R, first, R, BH)[None, :]
        # Voxels behind the last have a response too, of the norm's shift.
        along = tl.where(inside[:, None], along, 0.0)
        response = response * factor + load_vector(offset, first, R, BH)[None, :]
    return along * gelu_slope(wide, cdf), response


@triton.jit
def store_vector(pointer, values, start, width, B: tl.constexpr):
    """Store B numbers from `start` of a vector that ends at `width`."""
    index = start + tl.arange(0, B)
    tl.store(pointer + index, values, mask=index < width)


@triton.jit
def store_matrix(pointer, values, row, rows, columns, A: tl.constexpr, B: tl.constexpr):
    """Store an (A, B) tile at `row` of a dense (rows, columns) matrix."""
    i, j = row + tl.arange(0, A), tl.arange(0, B)
    tl.store(pointer + i[:, None] * columns + j[None, :], values, mask=(i[:, None] < rows) & (j[None, :] < columns))


@triton.jit
def through_norm(along, x, weight, factor, C, LAYER: tl.constexpr):
    """Return the gradient at h for the layer norm; for the channel norm, `along` as it is: `finish` does the rest."""
    if LAYER:
        along = along * weight[None, :]
        straight = tl.sum(along, 1) / C
        inner = tl.sum(along * x, 1) / C
        along = (along - straight[:, None] - x * inner[:, None]) * factor[:, None]
    return along


@triton.jit(do_not_specialize=["L", "height", "width", "span"])
def backward_data(
    h, mean, scale, norm_weight, norm_bias, expand, expand_bias, contract, gain, offset, pull, grad_y,
    grad_x, channel_sums, output_sums, L, C, R, O, height, width, eps, span,
    M: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
    LAYER: tl.constexpr, GRN: tl.constexpr, UP: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the gradient behind the norm's centring (at h, for the layer norm), and its sums over voxels.

    Passes: reads h and grad_y, writes grad_x. Grid: P slabs of `span` voxels, cases. channel_sums (N, P, 2, C): of the
    gradient, and of it times the standardised h; output_sums (N, P, O): of grad_y.
    """
    slab, case = tl.program_id(0), tl.program_id(1)
    slot = case * tl.num_programs(0) + slab
    dtype = expand.dtype.element_ty
    weight, shift = load_vector(norm_weight, 0, C, BC), load_vector(norm_bias, 0, C, BC)
    straight_sum, along_sum = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    output_sum = tl.zeros((BO,), tl.float32)
    begin = slab.to(tl.int64) * span
    for step in range(0, span, M):
        start = begin + step
        inside = tl.arange(0, M) < L - start
        standard, factor = standardised(h, mean, scale, case, start, L, C, eps, M, BC, LAYER)
        x = cast(standard * weight[None, :] + shift[None, :], dtype, WIDEN)
        grad = load_rows(grad_y, output_rows(case, start, L, height, width, UP, M), inside, O, BO)
        output_sum += tl.sum(grad.to(tl.float32), 0)
        along = tl.zeros((M, BC), tl.float32)
        for first in range(0, R, BH):
            rows = load_matrix(expand, first, R, 0, C, BH, BC)
            columns = load_matrix(contract, 0, O, first, R, BO, BH)
            inner, _ = hidden_gradient(
                x, cast(grad, dtype, WIDEN), rows, columns, expand_bias, gain, offset, pull, case, first, R, inside,
                M, BH, GRN, EXACT, WIDEN,
            )  # fmt: skip
            along = product(cast(inner, dtype, WIDEN), rows, along, WIDEN)
        straight_sum += tl.sum(along, 0)
        along_sum += tl.sum(along * standard, 0)
        row = case.to(tl.int64) * L + start + tl.arange(0, M)
        store_rows(grad_x, through_norm(along, standard, weight, factor, C, LAYER), row, inside, C, BC, WIDEN)
    store_vector(channel_sums + slot * 2 * C, straight_sum, 0, C, BC)
    store_vector(channel_sums + (slot * 2 + 1) * C, along_sum, 0, C, BC)
    store_vector(output_sums + slot * O, output_sum, 0, O, BO)


@triton.jit(do_not_specialize=["L", "height", "width", "span"])
def backward_weights(
    h, mean, scale, norm_weight, norm_bias, expand, expand_bias, contract, gain, offset, pull, grad_y,
    grad_expand, grad_contract, hidden_sums, L, C, R, O, height, width, eps, span,
    M: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
    LAYER: tl.constexpr, GRN: tl.constexpr, UP: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write each slab's share of the matrices' gradients, for a chunk of hidden channels.

    Passes: reads h and grad_y, once for each chunk; programs of one slab follow each other, so that all but the first
    find them in the L2 cache. Grid: chunks of BH, P slabs of `span` voxels, cases. grad_expand (N, P, R, C),
    grad_contract (N, P, R, O) transposed, hidden_sums (N, P, R).
    """
    first, slab, case = tl.program_id(0) * BH, tl.program_id(1), tl.program_id(2)
    slot = (case * tl.num_programs(1) + slab).to(tl.int64) * R
    dtype = expand.dtype.element_ty
    weight, shift = load_vector(norm_weight, 0, C, BC), load_vector(norm_bias, 0, C, BC)
    rows = load_matrix(expand, first, R, 0, C, BH, BC)
    columns = load_matrix(contract, 0, O, first, R, BO, BH)
    by_expand, by_contract = tl.zeros((BH, BC), tl.float32), tl.zeros((BH, BO), tl.float32)
    hidden_sum = tl.zeros((BH,), tl.float32)
    begin = slab.to(tl.int64) * span
    for step in range(0, span, M):
        start = begin + step
        inside = tl.arange(0, M) < L - start
        standard, _ = standardised(h, mean, scale, case, start, L, C, eps, M, BC, LAYER)
        x = cast(standard * weight[None, :] + shift[None, :], dtype, WIDEN)
        grad = load_rows(grad_y, output_rows(case, start, L, height, width, UP, M), inside, O, BO)
        grad = cast(grad, dtype, WIDEN)
        inner, response = hidden_gradient(
            x, grad, rows, columns, expand_bias, gain, offset, pull, case, first, R, inside, M, BH, GRN, EXACT, WIDEN
        )
        by_expand = product(tl.trans(cast(inner, dtype, WIDEN)), x, by_expand, WIDEN)
        by_contract = product(tl.trans(cast(response, dtype, WIDEN)), grad, by_contract, WIDEN)
        hidden_sum += tl.sum(inner, 0)
    store_matrix(grad_expand + slot * C, by_expand, first, R, C, BH, BC)
    store_matrix(grad_contract + slot * O, by_contract, first, R, O, BH, BO)
    store_vector(hidden_sums + slot, hidden_sum, first, R, BH)


@triton.jit(do_not_specialize=["L", "height", "width", "span"])
def backward_whole(
    h, mean, scale, norm_weight, norm_bias, expand, expand_bias, contract, gain, offset, pull, grad_y,
    grad_x, channel_sums, output_sums, grad_expand, grad_contract, hidden_sums, L, C, R, O, height, width, eps, span,
    M: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
    LAYER: tl.constexpr, GRN: tl.constexpr, UP: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Do what `backward_data` and `backward_weights` do at once, where all hidden channels are one chunk.

    Passes: reads h and grad_y, writes grad_x. Grid: P slabs of `span` voxels, cases.
    """
    slab, case = tl.program_id(0), tl.program_id(1)
    slot = case * tl.num_programs(0) + slab
    dtype = expand.dtype.element_ty
    weight, shift = load_vector(norm_weight, 0, C, BC), load_vector(norm_bias, 0, C, BC)
    rows, columns = load_matrix(expand, 0, R, 0, C, BH, BC), load_matrix(contract, 0, O, 0, R, BO, BH)
    by_expand, by_contract = tl.zeros((BH, BC), tl.float32), tl.zeros((BH, BO), tl.float32)
    straight_sum, along_sum = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    output_sum, hidden_sum = tl.zeros((BO,), tl.float32), tl.zeros((BH,), tl.float32)
    begin = slab.to(tl.int64) * span
    for step in range(0, span, M):
        start = begin + step
        inside = tl.arange(0, M) < L - start
        standard, factor = standardised(h, mean, scale, case, start, L, C, eps, M, BC, LAYER)
        x = cast(standard * weight[None, :] + shift[None, :], dtype, WIDEN)
        grad = load_rows(grad_y, output_rows(case, start, L, height, width, UP, M), inside, O, BO)
        output_sum += tl.sum(grad.to(tl.float32), 0)
        inner, response = hidden_gradient(
            x, cast(grad, dtype, WIDEN), rows, columns, expand_bias, gain, offset, pull, case, 0, R, inside,
            M, BH, GRN, EXACT, WIDEN,
        )  # fmt: skip
        hidden_sum += tl.sum(inner, 0)
        by_expand = product(tl.trans(cast(inner, dtype, WIDEN)), x, by_expand, WIDEN)
        by_contract = product(tl.trans(cast(response, dtype, WIDEN)), cast(grad, dtype, WIDEN), by_contract, WIDEN)
        along = product(cast(inner, dtype, WIDEN), rows, tl.zeros((M, BC), tl.float32), WIDEN)
        straight_sum += tl.sum(along, 0)
        along_sum += tl.sum(along * standard, 0)
        row = case.to(tl.int64) * L + start + tl.arange(0, M)
        store_rows(grad_x, through_norm(along, standard, weight, factor, C, LAYER), row, inside, C, BC, WIDEN)
    store_vector(channel_sums + slot * 2 * C, straight_sum, 0, C, BC)
    store_vector(channel_sums + (slot * 2 + 1) * C, along_sum, 0, C, BC)
    store_vector(output_sums + slot * O, output_sum, 0, O, BO)
    store_matrix(grad_expand + slot.to(tl.int64) * R * C, by_expand, 0, R, C, BH, BC)
    store_matrix(grad_contract + slot.to(tl.int64) * R * O, by_contract, 0, R, O, BH, BO)
    store_vector(hidden_sums + slot * R, hidden_sum, 0, R, BH)


@triton.jit(do_not_specialize=["L"])
def finish(grad, h, mean, factor, tilt, level, L, C, M: tl.constexpr, BC: tl.constexpr, WIDEN: tl.constexpr):
    """Take the norm's centring back, in place: grad = factor * grad - tilt * (h - mean) - level, (N, C) each.

    Passes: reads grad and h, writes grad. Grid: tiles of voxels, cases.
    """
    start, case = tl.program_id(0).to(tl.int64) * M, tl.program_id(1)
    row, inside = case.to(tl.int64) * L + start + tl.arange(0, M), tl.arange(0, M) < L - start
    along = load_rows(grad, row, inside, C, BC).to(tl.float32)
    x = load_rows(h, row, inside, C, BC).to(tl.float32) - load_vector(mean + case * C, 0, C, BC)[None, :]
    along = along * load_vector(factor + case * C, 0, C, BC)[None, :]
    along -= x * load_vector(tilt + case * C, 0, C, BC)[None, :] + load_vector(level + case * C, 0, C, BC)[None, :]
    store_rows(grad, along, row, inside, C, BC, WIDEN)


@triton.jit(do_not_specialize=["L", "span"])
def slab_moments(h, sums, L, C, span, M: tl.constexpr, BC: tl.constexpr):
    """Write each slab's mean and sum of squared differences from it: sums (N, P, 2, C). Reads h once.

    Tiles are merged by their means (Chan, Golub and LeVeque 1979): a difference of two large sums would lose digits.
    """
    slab, case = tl.program_id(0), tl.program_id(1)
    mean, squares = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    begin = slab.to(tl.int64) * span
    for step in range(0, span, M):
        start = begin + step
        count = tl.minimum(L - start, M).to(tl.float32)
        if count > 0:
            inside = tl.arange(0, M) < L - start
            row = case.to(tl.int64) * L + start + tl.arange(0, M)
            x = load_rows(h, row, inside, C, BC).to(tl.float32)
            centre = tl.sum(x, 0) / count
            x = tl.where(inside[:, None], x - centre[None, :], 0.0)
            rest = tl.sum(x, 0) / count  # what rounding left of the mean, far from zero
            delta, share = centre + rest - mean, count / (count + step)
            squares += tl.sum(x * x, 0) - count * rest * rest + delta * delta * (share * step)
            mean += delta * share
    slot = (case * tl.num_programs(0) + slab) * 2
    store_vector(sums + slot * C, mean, 0, C, BC)
    store_vector(sums + (slot + 1) * C, squares, 0, C, BC)


@triton.jit(do_not_specialize=["L", "height", "width", "span"])
def responses(
    h, mean, scale, norm_weight, norm_bias, expand, expand_bias, contract, grad_y, sums,
    L, C, R, O, height, width, eps, span,
    M: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
    LAYER: tl.constexpr, GRADIENT: tl.constexpr, UP: tl.constexpr, EXACT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write each slab's sum over voxels of the hidden activation squared, or (GRADIENT) times the gradient behind it.

    Passes: reads h (and grad_y), from the L2 cache for all chunks but the first. Grid: chunks of BH, P slabs of `span`
    voxels, cases. sums (N, P, R).
    """
    first, slab, case = tl.program_id(0) * BH, tl.program_id(1), tl.program_id(2)
    dtype = expand.dtype.element_ty
    weight, shift = load_vector(norm_weight, 0, C, BC), load_vector(norm_bias, 0, C, BC)
    rows = load_matrix(expand, first, R, 0, C, BH, BC)
    if GRADIENT:
        columns = load_matrix(contract, 0, O, first, R, BO, BH)
    bias = load_vector(expand_bias, first, R, BH)[None, :]
    total = tl.zeros((BH,), tl.float32)
    begin = slab.to(tl.int64) * span
    for step in range(0, span, M):
        start = begin + step
        inside = tl.arange(0, M) < L - start
        standard, _ = standardised(h, mean, scale, case, start, L, C, eps, M, BC, LAYER)
        x = cast(standard * weight[None, :] + shift[None, :], dtype, WIDEN)
        wide = product(x, tl.trans(rows), tl.zeros((M, BH), tl.float32), WIDEN) + bias
        wide = tl.where(inside[:, None], wide * normal_cdf(wide, EXACT), 0.0)
        if GRADIENT:
            grad = load_rows(grad_y, output_rows(case, start, L, height, width, UP, M), inside, O, BO)
            grad = cast(grad, dtype, WIDEN)
            total += tl.sum(wide * product(grad, columns, tl.zeros((M, BH), tl.float32), WIDEN), 0)
        else:
            total += tl.sum(wide * wide, 0)
    store_vector(sums + (case * tl.num_programs(1) + slab) * R, total, first, R, BH)
