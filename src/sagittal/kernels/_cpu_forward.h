/* A MedNeXt block where nothing is kept for a backward pass, one instruction set; included by _cpu.c after _cpu_pointwise.h.
 *
 * The memory sets the time of large volumes, so the moments of the norm are taken while the convolution's result is in registers, and what is
 * not read again soon is stored past the caches. The convolution reads copies of some rows in which neighbours along W lie side by side and
 * edges are zeros: in the tensor itself voxels are so far apart that they would share few lines of the first cache.
 */

/* Sums of some voxels' distances from a pivot. */
struct ISA(running) {
    vf pivot, sum, squares;
    int64_t count;
};

INLINE void ISA(count_in)(struct ISA(running) *moments, vf value) {
    const vf distance = value - moments->pivot;
    moments->sum += distance;
    moments->squares += distance * distance;
}

INLINE void ISA(store_moments)(const struct ISA(running) *moments, float *mean, int64_t channels) {
    const vf shift = moments->sum * (1.0f / (float)moments->count);
    ISA(store)(mean, moments->pivot + shift);
    ISA(store)(mean + channels, moments->squares - moments->sum * shift);
}

/* Copy the rows that a box needs of plane `id` to where the kernel expects them: (lanes of channels, W with edges, LANES) for each row. */
INLINE void ISA(sweep_copy)(const struct sweep *job, const struct box *box, int64_t id, float *plane, int64_t lane_stride) {
    const int64_t C = job->as.channels, H = job->as.in[1], W = job->as.in[2], row = sweep_row(job), P = job->as.kernel / 2;
    const int64_t rows = box->h1 - box->h0 + job->as.kernel - 1, wide = (box->c1 - box->c0) / LANES;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t ih = box->h0 - P + r;
        float *to = plane + r * row * LANES;
        const float *from = job->as.x + (((box->n * job->as.in[0] + id) * H + ih) * W) * C + box->c0;
        for (int64_t v = 0; v < wide; v++) {
            float *lane = to + v * lane_stride;
            if (ih < 0 || ih >= H) {
                memset(lane, 0, (size_t)(row * LANES) * sizeof *lane);
                continue;
            }
            memset(lane, 0, (size_t)(P * LANES) * sizeof *lane);
            memset(lane + (P + W) * LANES, 0, (size_t)((row - P - W) * LANES) * sizeof *lane);
        }
        if (ih < 0 || ih >= H) continue;
        for (int64_t w = 0; w < W; w++)
            for (int64_t v = 0; v < wide; v++)
                ISA(store)(to + v * lane_stride + (P + w) * LANES, ISA(load)(from + w * C + v * LANES));
    }
}

/* Eight voxels along W; planes[] are the copies that the kernel's planes fall on, or NULL outside. */
INLINE void ISA(sweep_tile)(const float *const *planes, const float *taps, int64_t row, vf *sum, const int K, const int KD) {
    for (int kd = 0; kd < KD; kd++) {
        if (!planes[kd]) continue;
        for (int kh = 0; kh < K; kh++) {
            const float *x = planes[kd] + kh * row * LANES, *tap = taps + (kd * K + kh) * K * LANES;
#pragma GCC unroll 7
            for (int kw = 0; kw < K; kw++) {
                const vf factor = ISA(load)(tap + kw * LANES);
#pragma GCC unroll 8
                for (int t = 0; t < 8; t++) sum[t] += factor * ISA(load)(x + (t + kw) * LANES);
            }
        }
    }
}

/* One plane of a box, one vector of channels. */
INLINE void ISA(sweep_plane)(const struct sweep *job, const struct box *box, const float *const *copies, const float *taps, int64_t od,
                             int64_t c, const int K) {
    enum { MOST = 64 };
    const int64_t C = job->as.channels, W = job->as.out[2], row = sweep_row(job), blocks_h = divide_up(job->as.out[1], BOX_ROWS);
    const vf init = job->as.bias ? ISA(load)(job->as.bias + c) : (vf){0};
    struct ISA(running) moments = {{0}, {0}, {0}, (box->h1 - box->h0) * W};
    for (int64_t w = 0; w < W; w += 8)
        for (int64_t oh = box->h0; oh < box->h1; oh++) {
            const float *planes[MOST];
            vf sum[8];
            float *h = job->as.y + (((box->n * job->as.out[0] + od) * job->as.out[1] + oh) * W + w) * C + c;
            for (int kd = 0; kd < job->as.kernel_d; kd++)
                planes[kd] = copies[kd] ? copies[kd] + ((oh - box->h0) * row + w) * LANES : NULL;
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++) sum[t] = init;
            ISA(sweep_tile)(planes, taps, row, sum, K, job->as.kernel_d);
            if (w == 0 && oh == box->h0) moments.pivot = sum[0];
            if (w + 8 <= W) {
#pragma GCC unroll 8
                for (int t = 0; t < 8; t++) ISA(count_in)(&moments, sum[t]);
                if (job->stream) {
#pragma GCC unroll 8
                    for (int t = 0; t < 8; t++) ISA(stream)(h + t * C, sum[t]);
                } else {
#pragma GCC unroll 8
                    for (int t = 0; t < 8; t++) ISA(store)(h + t * C, sum[t]);
                }
            } else {
                for (int t = 0; t < W - w; t++) {
                    ISA(count_in)(&moments, sum[t]);
                    ISA(store)(h + t * C, sum[t]);
                }
            }
        }
    ISA(store_moments)(&moments, job->partial + (box->part + od * blocks_h) * 2 * C + c, C);
}

INLINE void ISA(sweep)(const struct sweep *job, int64_t task, int slot, const int K) {
    enum { MOST = 64 };
    struct box box;
    sweep_box_of_task(job, task, &box);
    const int KD = job->as.kernel_d, PD = KD / 2, count = KD * K * K;
    const int64_t plane = sweep_plane(job) * LANES, lane_stride = plane * KD, wide = (box.c1 - box.c0) / LANES;
    float *ring = job->scratch + slot * job->scratch_size, *taps = ring + lane_stride * wide;
    for (int64_t v = 0; v < wide; v++)
        for (int i = 0; i < count; i++)
            ISA(store)(taps + (v * count + i) * LANES, ISA(load)(job->as.weight + i * job->as.channels + box.c0 + v * LANES));
    int64_t copied = box.d0 - PD < 0 ? 0 : box.d0 - PD;
    for (int64_t od = box.d0; od < box.d1; od++) {
        for (; copied <= od + PD && copied < job->as.in[0]; copied++)
            ISA(sweep_copy)(job, &box, copied, ring + copied % KD * plane, lane_stride);
        for (int64_t v = 0; v < wide; v++) {
            const float *copies[MOST];
            for (int kd = 0; kd < KD; kd++) {
                const int64_t id = od + kd - PD;
                copies[kd] = id >= 0 && id < job->as.in[0] ? ring + v * lane_stride + id % KD * plane : NULL;
            }
            ISA(sweep_plane)(job, &box, copies, taps + v * count * LANES, od, box.c0 + v * LANES, K);
        }
    }
    ISA(fence)();
}

#define SWEEP_TASK(NAME, K) \
    static void ISA(NAME)(void *arg, int64_t task, int slot) { ISA(sweep)(arg, task, slot, K); }
SWEEP_TASK(sweep_3, 3)
SWEEP_TASK(sweep_5, 5)
SWEEP_TASK(sweep_7, 7)

/* T voxels of the transposed convolution, every second one along W. */
INLINE void ISA(sweep_up_tile)(const struct sweep *job, const float *x, const float *weight, vf init, float *h,
                               struct ISA(running) *moments, int64_t od, int64_t oh, int64_t j0, const int K, const int E, const int T) {
    vf sum[8];
    ISA(transposed_sums)(&job->as, x, weight, init, sum, od, oh, j0, K, E, T);
    if (moments->count == 0) moments->pivot = sum[0];
    moments->count += T;
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        float *to = h + (2 * (j0 + t) + E) * job->as.channels;
        ISA(count_in)(moments, sum[t]);
        if (job->stream)
            ISA(stream)(to, sum[t]);
        else
            ISA(store)(to, sum[t]);
    }
}

#define SWEEP_UP_TILE(E, T) ISA(sweep_up_tile)(job, x, weight, init, h, &moments, od, oh, j, K, E, T)

INLINE void ISA(sweep_up)(const struct sweep *job, int64_t task, const int K) {
    const struct depthwise *as = &job->as;
    const int64_t C = as->channels, W = as->out[2], even = (W + 1) / 2, odd = W / 2, blocks_h = divide_up(as->out[1], BOX_ROWS);
    struct box box;
    depthwise_box_of_task(as, task, &box);
    for (int64_t od = box.d0; od < box.d1; od++)
        for (int64_t c = box.c0; c < box.c1; c += LANES) {
            const float *x = as->x + box.n * as->in[0] * as->in[1] * as->in[2] * C + c, *weight = as->weight + c;
            const vf init = as->bias ? ISA(load)(as->bias + c) : (vf){0};
            struct ISA(running) moments = {{0}, {0}, {0}, 0};
            for (int64_t oh = box.h0; oh < box.h1; oh++) {
                float *h = as->y + ((box.n * as->out[0] + od) * as->out[1] + oh) * W * C + c;
                int64_t j = 0;
                for (; j + 8 <= odd; j += 8) {
                    SWEEP_UP_TILE(0, 8);
                    SWEEP_UP_TILE(1, 8);
                }
                for (; j < even; j++) {
                    SWEEP_UP_TILE(0, 1);
                    if (j < odd) SWEEP_UP_TILE(1, 1);
                }
            }
            ISA(store_moments)(&moments, job->partial + ((box.n * as->out[0] + od) * blocks_h + box.h0 / BOX_ROWS) * 2 * C + c, C);
        }
    ISA(fence)();
}

#define SWEEP_UP_TASK(NAME, K)                                        \
    static void ISA(NAME)(void *arg, int64_t task, int slot) {       \
        (void)slot;                                                   \
        ISA(sweep_up)(arg, task, K);                                  \
    }
SWEEP_UP_TASK(sweep_up_3, 3)
SWEEP_UP_TASK(sweep_up_5, 5)
SWEEP_UP_TASK(sweep_up_7, 7)

static task_fn ISA(sweep_task)(int kernel, int up) {
    static const task_fn table[2][3] = {{ISA(sweep_3), ISA(sweep_5), ISA(sweep_7)}, {ISA(sweep_up_3), ISA(sweep_up_5), ISA(sweep_up_7)}};
    return table[up][(kernel - 3) / 2];
}

/* hidden = gelu(bias + normed expand), then to += or = bias + residual + hidden contract: some voxels, the hidden channels a block at a time. */
INLINE void ISA(forward_rows)(const struct forward *job, const float *normed, float *hidden, const float *residual, float *to,
                              int64_t rows, int stream) {
    const int64_t C = job->channels, R = job->hidden, O = job->outputs;
    for (int64_t r = 0; r < R; r += job->block) {
        const int64_t wide = at_most(job->block, R - r);
        for (int64_t j = 0; j < wide; j += PANEL) {
            const int64_t panel = at_most(PANEL, R - r - j);
            ISA(product)(normed, C, 1, job->expand + (r + j) * C, panel, job->expand_bias + r + j, NULL, hidden + j, wide, rows, C, panel, 0);
        }
        ISA(gelu)(hidden, rows * wide);
        for (int64_t j = 0; j < O; j += PANEL) {
            const int64_t panel = at_most(PANEL, O - j);
            const float *add = r ? to + j : residual ? residual + j : NULL;
            ISA(product)(hidden, wide, 1, job->contract + j * R + r * panel, panel, r ? NULL : job->contract_bias + j, add, to + j, O, rows,
                         wide, panel, stream && wide == R);
        }
    }
}

static void ISA(forward_task)(void *arg, int64_t task, int slot) {
    const struct forward *job = arg;
    const int64_t C = job->channels, O = job->outputs, parts = divide_up(job->voxels, job->chunk), n = task / parts;
    const int64_t start = task % parts * job->chunk, rows = at_most(job->chunk, job->voxels - start), at = n * job->voxels + start;
    float *normed = job->scratch + slot * job->scratch_size, *hidden = normed + job->chunk * C;
    ISA(normalise)(job->h + at * C, job->mean + n * C, job->scale + n * C, normed, rows, C);
    ISA(forward_rows)(job, normed, hidden, job->residual ? job->residual + at * O : NULL, job->y + at * O, rows, job->stream);
    ISA(fence)();
}

/* y = residual + values behind a voxel of zeros, + odd at every second voxel; any but y may be NULL. */
INLINE void ISA(place_line)(float *y, const float *values, const float *residual, const float *odd, int64_t wide, int64_t O, int stream) {
    for (int64_t w = 0; w < wide; w++)
        for (int64_t c = 0; c < O; c += LANES) {
            vf sum = residual ? ISA(load)(residual + w * O + c) : (vf){0};
            if (values && w) sum += ISA(load)(values + (w - 1) * O + c);
            if (odd && w & 1) sum += ISA(load)(odd + w / 2 * O + c);
            if (stream)
                ISA(stream)(y + w * O + c, sum);
            else
                ISA(store)(y + w * O + c, sum);
        }
}

/* One plane of y. */
static void ISA(forward_up_task)(void *arg, int64_t task, int slot) {
    const struct forward *job = arg;
    const int64_t C = job->channels, O = job->outputs, D = job->size[0] + 1, H = job->size[1] + 1, W = job->size[2] + 1;
    const int64_t n = task / D, d = task % D, line = W * O, together = job->chunk / (W - 1);
    float *normed = job->scratch + slot * job->scratch_size, *hidden = normed + job->chunk * C, *out = hidden + job->chunk * job->block;
    float *y = job->y + task * H * line;
    const float *residual = job->residual ? job->residual + task * H * line : NULL;
    for (int64_t first = 0; first < (d ? 1 : H); first++)
        ISA(place_line)(y + first * line, NULL, residual ? residual + first * line : NULL, NULL, W, O, job->stream);
    for (int64_t h = 1; d && h < H; h += together) {
        const int64_t lines = at_most(together, H - h), rows = lines * (W - 1);
        const float *from = job->h + (n * job->voxels + ((d - 1) * (H - 1) + h - 1) * (W - 1)) * C;
        ISA(normalise)(from, job->mean + n * C, job->scale + n * C, normed, rows, C);
        ISA(forward_rows)(job, normed, hidden, NULL, out, rows, 0);
        for (int64_t i = 0; i < lines; i++) {
            const int64_t at = ((n * D / 2 + d / 2) * (H / 2) + (h + i) / 2) * (W / 2) * O;
            const float *odd = job->odd && d & 1 && (h + i) & 1 ? job->odd + at : NULL;
            ISA(place_line)(y + (h + i) * line, out + i * (W - 1) * O, residual ? residual + (h + i) * line : NULL, odd, W, O, job->stream);
        }
    }
    ISA(fence)();
}

static void ISA(stem_task)(void *arg, int64_t task, int slot) {
    const struct stem *job = arg;
    const int64_t parts = divide_up(job->voxels, STEM_ROWS), n = task / parts, start = task % parts * STEM_ROWS, O = job->outputs;
    (void)slot;
    ISA(product)(job->x + n * job->channels * job->voxels + start, 1, job->voxels, job->weight_t, O, job->bias, NULL,
                 job->y + (n * job->voxels + start) * O, O, at_most(STEM_ROWS, job->voxels - start), job->channels, O, job->stream);
    ISA(fence)();
}
