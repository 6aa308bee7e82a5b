/* The pointwise half of a MedNeXt block, one instruction set; included by _cpu.c after _cpu_vector.h.
 *
 * A task holds a few hundred voxels in the caches from the normalisation to the contraction, so the expanded activation never
 * reaches the memory. Sums over voxels go to the task's own partial buffer and are added up in a fixed order afterwards.
 */

/* c[i, :] = add[i, :] + bias + sum over k of a[i rs + k cs] b[k, :] for ROWS rows and WIDE vectors of columns. */
INLINE void ISA(product_tile)(const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb, const float *bias, const float *add,
                              float *c, int64_t ldc, int64_t depth, const int ROWS, const int WIDE, const int STREAM) {
    vf sum[12][4];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) sum[i][v] = bias ? ISA(load)(bias + v * LANES) : (vf){0};
    for (int64_t k = 0; k < depth; k++) {
        vf right[4];
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) right[v] = ISA(load)(b + k * ldb + v * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const vf left = ISA(splat)(a[i * rs + k * cs]);
#pragma GCC unroll 4
            for (int v = 0; v < WIDE; v++) sum[i][v] += left * right[v];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) {
            const int64_t at = i * ldc + v * LANES;
            const vf value = add ? sum[i][v] + ISA(load)(add + at) : sum[i][v];
            if (STREAM)
                ISA(stream)(c + at, value);
            else
                ISA(store)(c + at, value);
        }
}

#define PRODUCT_TILE(ROWS) \
    ISA(product_tile)(a + i * rs, rs, cs, b, ldb, bias, add ? add + i * ldc : NULL, c + i * ldc, ldc, depth, ROWS, WIDE, STREAM)

INLINE void ISA(product_panel)(const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb, const float *bias, const float *add,
                               float *c, int64_t ldc, int64_t rows, int64_t depth, const int TALL, const int WIDE, const int STREAM) {
    int64_t i = 0;
    for (; i + TALL <= rows; i += TALL) PRODUCT_TILE(TALL);
    for (; i + 4 <= rows; i += 4) PRODUCT_TILE(4);
    for (; i + 2 <= rows; i += 2) PRODUCT_TILE(2);
    if (i < rows) PRODUCT_TILE(1);
}

#define PRODUCT_PANEL(NAME, TALL, WIDE, STREAM)                                                                               \
    static __attribute__((noinline)) void ISA(NAME)(const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb,      \
                                                    const float *bias, const float *add, float *c, int64_t ldc, int64_t rows, \
                                                    int64_t depth) {                                                          \
        ISA(product_panel)(a, rs, cs, b, ldb, bias, add, c, ldc, rows, depth, TALL, WIDE, STREAM);                            \
    }
PRODUCT_PANEL(product_4, 6, 4, 0)
PRODUCT_PANEL(product_2, MANY_REGISTERS ? 12 : 6, 2, 0)
PRODUCT_PANEL(product_1, 12, 1, 0)
PRODUCT_PANEL(product_4_stream, 6, 4, 1)
PRODUCT_PANEL(product_2_stream, MANY_REGISTERS ? 12 : 6, 2, 1)
PRODUCT_PANEL(product_1_stream, 12, 1, 1)

#define PRODUCT_COLUMNS(NAME, WIDE)                                                                                        \
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES)                                                                    \
    (stream ? ISA(NAME##_stream) : ISA(NAME))(a, rs, cs, b + j, ldb, bias ? bias + j : NULL, add ? add + j : NULL, c + j, ldc, rows, depth)

/* The matrix product c = add + bias + a b, with c and add (rows, columns) of lines ldc apart, b (depth, columns) of lines ldb apart; columns a
 * multiple of 16. With `stream` c goes past the caches. */
static void ISA(product)(const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb, const float *bias, const float *add, float *c,
                         int64_t ldc, int64_t rows, int64_t depth, int64_t columns, int stream) {
    int64_t j = 0;
    if (MANY_REGISTERS) PRODUCT_COLUMNS(product_4, 4);
    PRODUCT_COLUMNS(product_2, 2);
    PRODUCT_COLUMNS(product_1, 1);
}

static void ISA(gelu)(float *u, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) ISA(store)(u + i, ISA(gelu_of)(ISA(load)(u + i)));
}

/* u becomes gelu(u); grad becomes grad * gelu'(u). */
static void ISA(gelu_backward)(float *u, float *grad, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const vf x = ISA(load)(u + i);
        vf bell;
        const vf cdf = ISA(normal_cdf)(x, &bell);
        ISA(store)(grad + i, ISA(load)(grad + i) * (cdf + x * bell * 0.398942280f));
        ISA(store)(u + i, ISA(gelu_of)(x));
    }
}

/* total += the sum over rows; four running sums hide the latency. */
static void ISA(add_column_sums)(const float *x, float *total, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c += LANES) {
        vf sum[4] = {{0}};
        int64_t i = 0;
        for (; i + 4 <= rows; i += 4)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) sum[r] += ISA(load)(x + (i + r) * columns + c);
        for (; i < rows; i++) sum[0] += ISA(load)(x + i * columns + c);
        ISA(store)(total + c, ISA(load)(total + c) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
    }
}

/* y = (x - mean) * scale, each over the channels; in this order, so that a mean far from zero costs no digits. */
static void ISA(normalise)(const float *x, const float *mean, const float *scale, float *y, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < columns; c += LANES)
            ISA(store)(y + i * columns + c, (ISA(load)(x + i * columns + c) - ISA(load)(mean + c)) * ISA(load)(scale + c));
}

/* Mean, and sum of squared distances from it, of one chunk of voxels, each channel. */
static void ISA(moments_task)(void *arg, int64_t task, int slot) {
    const struct moments *job = arg;
    const int64_t C = job->channels, n = task / job->chunks, start = task % job->chunks * job->chunk;
    const int64_t rows = job->voxels - start < job->chunk ? job->voxels - start : job->chunk;
    const float *x = job->x + (n * job->voxels + start) * C;
    float *mean = job->partial + task * 2 * C, *spread = mean + C;
    (void)slot;
    memset(mean, 0, (size_t)(2 * C) * sizeof *mean);
    ISA(add_column_sums)(x, mean, rows, C);
    for (int64_t c = 0; c < C; c += LANES) {
        const vf centre = ISA(load)(mean + c) * (1.0f / (float)rows);
        vf sum[2] = {{0}};
        for (int64_t i = 0; i < rows; i++) {
            const vf distance = ISA(load)(x + i * C + c) - centre;
            sum[i & 1] += distance * distance;
        }
        ISA(store)(mean + c, centre);
        ISA(store)(spread + c, sum[0] + sum[1]);
    }
}

/* grad_a = the gradient at the normalised, scaled and shifted h; partial sums: expand (C, R), contract (R, O), sums of the hidden gradient (R)
 * and of the output gradient (O). */
static void ISA(tail_backward_task)(void *arg, int64_t task, int slot) {
    const struct tail *job = arg;
    const int64_t C = job->channels, R = job->hidden, O = job->outputs;
    int64_t n, start, stop;
    float *normed = job->scratch + slot * job->scratch_size, *hidden = normed + job->chunk * C, *grad = hidden + job->chunk * R;
    float *expand = job->partial + task * job->partial_size, *contract = expand + C * R, *sums = contract + R * O;
    tail_rows_of_task(job, task, &n, &start, &stop);
    memset(expand, 0, (size_t)job->partial_size * sizeof *expand);
    for (; start < stop; start += job->chunk) {
        const int64_t rows = stop - start < job->chunk ? stop - start : job->chunk, at = n * job->voxels + start;
        const float *grad_y = job->grad_y + at * O;
        ISA(normalise)(job->h + at * C, job->mean + n * C, job->scale + n * C, normed, rows, C);
        ISA(product)(normed, C, 1, job->expand_t, R, job->expand_bias, NULL, hidden, R, rows, C, R, 0);
        ISA(product)(grad_y, O, 1, job->contract, R, NULL, NULL, grad, R, rows, O, R, 0);
        ISA(gelu_backward)(hidden, grad, rows * R);
        ISA(add_column_sums)(grad, sums, rows, R);
        ISA(add_column_sums)(grad_y, sums + R, rows, O);
        ISA(product)(normed, 1, C, grad, R, NULL, expand, expand, R, C, rows, R, 0);
        ISA(product)(hidden, 1, R, grad_y, O, NULL, contract, contract, O, R, rows, O, 0);
        ISA(product)(grad, R, 1, job->expand, C, NULL, NULL, job->grad_a + at * C, C, rows, R, C, 0);
    }
}

/* grad_h = scale_a grad_a + scale_h (h - mean) + shift, in place over grad_a: the rest of the normalisation's gradient. */
static void ISA(norm_backward_task)(void *arg, int64_t task, int slot) {
    const struct norm_backward *job = arg;
    const int64_t C = job->channels, n = task / job->chunks, start = task % job->chunks * job->chunk;
    const int64_t stop = start + job->chunk < job->voxels ? start + job->chunk : job->voxels;
    const float *scale_a = job->scale_a + n * C, *scale_h = job->scale_h + n * C, *mean = job->mean + n * C, *shift = job->shift + n * C;
    (void)slot;
    for (int64_t i = n * job->voxels + start; i < n * job->voxels + stop; i++)
        for (int64_t c = 0; c < C; c += LANES) {
            float *grad = job->grad + i * C + c;
            const vf h = (ISA(load)(job->h + i * C + c) - ISA(load)(mean + c)) * ISA(load)(scale_h + c);
            ISA(store)(grad, ISA(load)(grad) * ISA(load)(scale_a + c) + h + ISA(load)(shift + c));
        }
}
