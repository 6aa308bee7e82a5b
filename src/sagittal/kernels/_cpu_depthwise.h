/* Depthwise convolution, one instruction set; included by _cpu.c after _cpu_vector.h.
 *
 * Every task computes a box of output rows over a block of channels and nothing else, so results do not depend on the threads.
 * Register tiles: TILE voxels along W are accumulated while the kernel's window slides over the rows.
 */

/* y[w0 + t] for t < T, forward with stride S. x, weight, y and add point at the sample and the channel. */
INLINE void ISA(forward_tile)(const struct depthwise *job, const float *x, const float *weight, vf init, float *y, const float *add,
                              int64_t od, int64_t oh, int64_t w0, const int K, const int S, const int T) {
    const int64_t C = job->channels, D = job->in[0], H = job->in[1], W = job->in[2];
    const int P = K / 2, PD = job->kernel_d / 2;
    vf sum[8];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sum[t] = init;
    for (int kd = 0; kd < job->kernel_d; kd++) {
        const int64_t id = od * S + kd - PD;
        if (id < 0 || id >= D) continue;
        for (int kh = 0; kh < K; kh++) {
            const int64_t ih = oh * S + kh - P;
            if (ih < 0 || ih >= H) continue;
            const float *row = x + (id * H + ih) * W * C;
            const float *tap = weight + (int64_t)(kd * K + kh) * K * C;
#pragma GCC unroll 7
            for (int kw = 0; kw < K; kw++) {
                const vf factor = ISA(load)(tap + kw * C);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const int offset = t * S + kw - P;
                    const int64_t iw = w0 * S + offset;
                    /* the first test is known to the compiler: only a tile's border can leave the row */
                    if ((offset >= 0 && offset <= (T - 1) * S) || (iw >= 0 && iw < W)) sum[t] += factor * ISA(load)(row + iw * C);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        const int64_t at = (w0 + t) * C;
        ISA(store)(y + at, add ? sum[t] + ISA(load)(add + at) : sum[t]);
    }
}

/* y[2 (j0 + t) + E] for t < T, in sum: the transposed convolution of stride 2 as two ordinary ones, one for each parity E of the place. */
INLINE void ISA(transposed_sums)(const struct depthwise *job, const float *x, const float *weight, vf init, vf *sum, int64_t od,
                                 int64_t oh, int64_t j0, const int K, const int E, const int T) {
    const int64_t C = job->channels, D = job->in[0], H = job->in[1], W = job->in[2];
    const int P = K / 2, PD = job->kernel_d / 2;
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) sum[t] = init;
    for (int kd = (int)((od + PD) & 1); kd < job->kernel_d; kd += 2) {
        const int64_t id = (od + PD - kd) / 2;
        if (od + PD < kd || id >= D) continue;
        for (int kh = (int)((oh + P) & 1); kh < K; kh += 2) {
            const int64_t ih = (oh + P - kh) / 2;
            if (oh + P < kh || ih >= H) continue;
            const float *row = x + (id * H + ih) * W * C;
            const float *tap = weight + (int64_t)(kd * K + kh) * K * C;
#pragma GCC unroll 4
            for (int kw = (E + P) & 1; kw < K; kw += 2) {
                const vf factor = ISA(load)(tap + kw * C);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) {
                    const int offset = t + (E + P - kw) / 2;
                    const int64_t iw = j0 + offset;
                    if ((offset >= 0 && offset <= T - 1) || (iw >= 0 && iw < W)) sum[t] += factor * ISA(load)(row + iw * C);
                }
            }
        }
    }
}

INLINE void ISA(transposed_tile)(const struct depthwise *job, const float *x, const float *weight, vf init, float *y, const float *add,
                                 int64_t od, int64_t oh, int64_t j0, const int K, const int E, const int T) {
    vf sum[8];
    ISA(transposed_sums)(job, x, weight, init, sum, od, oh, j0, K, E, T);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        const int64_t at = (2 * (j0 + t) + E) * job->channels;
        ISA(store)(y + at, add ? sum[t] + ISA(load)(add + at) : sum[t]);
    }
}

#define FORWARD_TILE(T) ISA(forward_tile)(job, x, weight, init, y, add, od, oh, w, K, S, T)
#define TRANSPOSED_TILE(E, T) ISA(transposed_tile)(job, x, weight, init, y, add, od, oh, j, K, E, T)

INLINE void ISA(forward_row)(const struct depthwise *job, const float *x, const float *weight, vf init, float *y, const float *add,
                             int64_t od, int64_t oh, const int K, const int S) {
    const int64_t W = job->out[2];
    int64_t w = 0;
    for (; w + 8 <= W; w += 8) FORWARD_TILE(8);
    if (w + 4 <= W) { FORWARD_TILE(4); w += 4; }
    if (w + 2 <= W) { FORWARD_TILE(2); w += 2; }
    if (w < W) FORWARD_TILE(1);
}

INLINE void ISA(transposed_row)(const struct depthwise *job, const float *x, const float *weight, vf init, float *y, const float *add,
                                int64_t od, int64_t oh, const int K) {
    const int64_t even = (job->out[2] + 1) / 2, odd = job->out[2] / 2;
    int64_t j = 0;
    for (; j + 8 <= even; j += 8) TRANSPOSED_TILE(0, 8);
    for (; j + 2 <= even; j += 2) TRANSPOSED_TILE(0, 2);
    if (j < even) TRANSPOSED_TILE(0, 1);
    for (j = 0; j + 8 <= odd; j += 8) TRANSPOSED_TILE(1, 8);
    for (; j + 2 <= odd; j += 2) TRANSPOSED_TILE(1, 2);
    if (j < odd) TRANSPOSED_TILE(1, 1);
}

INLINE void ISA(depthwise_box)(const struct depthwise *job, const struct box *box, const int K, const int mode) {
    const int64_t C = job->channels, row = job->out[2] * C;
    const float *sample = job->x + box->n * job->in[0] * job->in[1] * job->in[2] * C;
    for (int64_t od = box->d0; od < box->d1; od++)
        for (int64_t oh = box->h0; oh < box->h1; oh++) {
            const int64_t at = ((box->n * job->out[0] + od) * job->out[1] + oh) * row;
            for (int64_t c = box->c0; c < box->c1; c += LANES) {
                const vf init = job->bias ? ISA(load)(job->bias + c) : (vf){0};
                const float *add = job->add ? job->add + at + c : NULL;
                if (mode == TRANSPOSED)
                    ISA(transposed_row)(job, sample + c, job->weight + c, init, job->y + at + c, add, od, oh, K);
                else
                    ISA(forward_row)(job, sample + c, job->weight + c, init, job->y + at + c, add, od, oh, K, mode);
            }
        }
}

/* A function of its own for each kernel size, so that the tiles are unrolled. */
#define DEPTHWISE_TASK(NAME, K, MODE)                                                                    \
    static void ISA(NAME)(void *arg, int64_t task, int slot) {                                          \
        const struct depthwise *job = arg;                                                               \
        struct box box;                                                                                  \
        (void)slot;                                                                                      \
        depthwise_box_of_task(job, task, &box);                                                          \
        ISA(depthwise_box)(job, &box, K, MODE);                                                          \
    }
DEPTHWISE_TASK(depthwise_3_1, 3, 1)
DEPTHWISE_TASK(depthwise_5_1, 5, 1)
DEPTHWISE_TASK(depthwise_7_1, 7, 1)
DEPTHWISE_TASK(depthwise_k_1, job->kernel, 1)
DEPTHWISE_TASK(depthwise_3_2, 3, 2)
DEPTHWISE_TASK(depthwise_5_2, 5, 2)
DEPTHWISE_TASK(depthwise_7_2, 7, 2)
DEPTHWISE_TASK(depthwise_k_2, job->kernel, 2)
DEPTHWISE_TASK(depthwise_3_t, 3, TRANSPOSED)
DEPTHWISE_TASK(depthwise_5_t, 5, TRANSPOSED)
DEPTHWISE_TASK(depthwise_7_t, 7, TRANSPOSED)
DEPTHWISE_TASK(depthwise_k_t, job->kernel, TRANSPOSED)

static task_fn ISA(depthwise_task)(int kernel, int mode) {
    static const task_fn table[3][4] = {
        {ISA(depthwise_3_1), ISA(depthwise_5_1), ISA(depthwise_7_1), ISA(depthwise_k_1)},
        {ISA(depthwise_3_2), ISA(depthwise_5_2), ISA(depthwise_7_2), ISA(depthwise_k_2)},
        {ISA(depthwise_3_t), ISA(depthwise_5_t), ISA(depthwise_7_t), ISA(depthwise_k_t)},
    };
    return table[mode == TRANSPOSED ? 2 : mode - 1][kernel == 3 ? 0 : kernel == 5 ? 1 : kernel == 7 ? 2 : 3];
}

/* grad[kh, kw] += sum over w of g[w] x[w S + kw - P], for B rows of the kernel whose input rows exist; B K sums stay in registers. */
INLINE void ISA(weight_row)(const struct depthwise *job, const float *g, const float *x, float *grad, const int K, const int S, const int B) {
    const int64_t C = job->channels, W = job->in[2], out = job->out[2], row = W * C;
    const int P = K / 2;
    int64_t first = (P + S - 1) / S, last = W - K + P < 0 ? 0 : (W - K + P) / S + 1;
    vf sum[5][7];
    if (last > out) last = out;
    if (last < first) last = first;
#pragma GCC unroll 7
    for (int b = 0; b < B; b++)
#pragma GCC unroll 7
        for (int k = 0; k < K; k++) sum[b][k] = ISA(load)(grad + (b * K + k) * C);
    for (int64_t w = first; w < last; w++) {
        const vf value = ISA(load)(g + w * C);
        const float *at = x + (w * S - P) * C;
#pragma GCC unroll 7
        for (int b = 0; b < B; b++)
#pragma GCC unroll 7
            for (int k = 0; k < K; k++) sum[b][k] += value * ISA(load)(at + b * row + k * C);
    }
    for (int64_t w = 0; w < out; w++) {
        if (w == first) w = last;
        if (w >= out) break;
        const vf value = ISA(load)(g + w * C);
#pragma GCC unroll 7
        for (int k = 0; k < K; k++) {
            const int64_t iw = w * S + k - P;
            if (iw < 0 || iw >= W) continue;
#pragma GCC unroll 7
            for (int b = 0; b < B; b++) sum[b][k] += value * ISA(load)(x + b * row + iw * C);
        }
    }
#pragma GCC unroll 7
    for (int b = 0; b < B; b++)
#pragma GCC unroll 7
        for (int k = 0; k < K; k++) ISA(store)(grad + (b * K + k) * C, sum[b][k]);
}

/* For kernels of any size: one tap at a time. */
INLINE void ISA(weight_row_any)(const struct depthwise *job, const float *g, const float *x, float *grad, int S) {
    const int64_t C = job->channels, W = job->in[2];
    const int K = job->kernel, P = K / 2;
    for (int k = 0; k < K; k++) {
        vf sum = ISA(load)(grad + k * C);
        for (int64_t w = 0; w < job->out[2]; w++) {
            const int64_t iw = w * S + k - P;
            if (iw >= 0 && iw < W) sum += ISA(load)(g + w * C) * ISA(load)(x + iw * C);
        }
        ISA(store)(grad + k * C, sum);
    }
}

INLINE void ISA(weight_box)(const struct depthwise *job, const struct box *box, float *partial, const int K, const int S, const int B) {
    const int64_t C = job->channels, W = job->in[2], H = job->in[1], out = job->out[2];
    const int P = K / 2, PD = job->kernel_d / 2;
    const int64_t taps = (int64_t)job->kernel_d * K * K;
    for (int64_t od = box->d0; od < box->d1; od++)
        for (int64_t oh = 0; oh < job->out[1]; oh++) {
            const float *g = job->grad + ((box->n * job->out[0] + od) * job->out[1] + oh) * out * C;
            for (int64_t c = box->c0; c < box->c1; c += LANES) {
                vf total = ISA(load)(partial + taps * C + c);
                for (int64_t w = 0; w < out; w++) total += ISA(load)(g + w * C + c);
                ISA(store)(partial + taps * C + c, total);
                for (int kd = 0; kd < job->kernel_d; kd++) {
                    const int64_t id = od * S + kd - PD;
                    if (id < 0 || id >= job->in[0]) continue;
                    for (int kh = 0; kh < K;) {
                        const int64_t ih = oh * S + kh - P;
                        const float *x = job->x + ((box->n * job->in[0] + id) * H + ih) * W * C + c;
                        float *grad = partial + (int64_t)(kd * K + kh) * K * C + c;
                        if (B > 1 && kh + B <= K && ih >= 0 && ih + B <= H) {
                            ISA(weight_row)(job, g + c, x, grad, K, S, B);
                            kh += B;
                            continue;
                        }
                        if (ih >= 0 && ih < H) {
                            if (B == 0)
                                ISA(weight_row_any)(job, g + c, x, grad, S);
                            else
                                ISA(weight_row)(job, g + c, x, grad, K, S, 1);
                        }
                        kh++;
                    }
                }
            }
        }
}

#define WEIGHT_TASK(NAME, K, S, B)                                                                       \
    static void ISA(NAME)(void *arg, int64_t task, int slot) {                                          \
        const struct depthwise *job = arg;                                                               \
        struct box box;                                                                                  \
        (void)slot;                                                                                      \
        weight_box_of_task(job, task, &box);                                                             \
        ISA(weight_box)(job, &box, job->partial + box.part * job->partial_size, K, S, B);                \
    }
WEIGHT_TASK(weight_3_1, 3, 1, 3)
WEIGHT_TASK(weight_5_1, 5, 1, MANY_REGISTERS ? 5 : 2)
WEIGHT_TASK(weight_7_1, 7, 1, MANY_REGISTERS ? 3 : 1)
WEIGHT_TASK(weight_k_1, job->kernel, 1, 0)
WEIGHT_TASK(weight_3_2, 3, 2, 3)
WEIGHT_TASK(weight_5_2, 5, 2, 1)
WEIGHT_TASK(weight_7_2, 7, 2, 1)
WEIGHT_TASK(weight_k_2, job->kernel, 2, 0)

static task_fn ISA(weight_task)(int kernel, int stride) {
    static const task_fn table[2][4] = {
        {ISA(weight_3_1), ISA(weight_5_1), ISA(weight_7_1), ISA(weight_k_1)},
        {ISA(weight_3_2), ISA(weight_5_2), ISA(weight_7_2), ISA(weight_k_2)},
    };
    return table[stride - 1][kernel == 3 ? 0 : kernel == 5 ? 1 : kernel == 7 ? 2 : 3];
}
