/* CPU kernels of MedNeXt blocks in plain C, called through ctypes (see native.py, which owns the signatures).
 *
 * Memory is (N, D, H, W, C) dense float32 with C a multiple of 16. The bodies are compiled once per instruction set and chosen at
 * run time. Threads come from the OpenMP runtime that PyTorch has already loaded (two pools would fight for the cores); without it,
 * from threads made for the call. Which thread runs a task never changes a result.
 */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_X86
#include <immintrin.h>
#if __GNUC__ >= 11 && defined(__linux__)
#define HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "_cpu_gelu.h"
#include "_cpu_jobs.h"

#define INLINE static inline __attribute__((always_inline, unused))
#define EXPORT __attribute__((visibility("default")))
#define RATIO_COEFFICIENTS                                                                                                     \
    0.130724698f, -0.108485095f, 0.0840988532f, -0.0614921264f, 0.0426026843f, -0.028507594f, 0.0188360028f, -0.0100305518f,  \
        0.00489498349f, -0.00685532205f, 0.00359526952f, 0.00247906591f, 0.000416613068f, -0.00193926762f

struct kernels {
    task_fn (*depthwise_task)(int kernel, int mode);
    task_fn (*weight_task)(int kernel, int stride);
    task_fn (*sweep_task)(int kernel, int up);
    task_fn moments, tail_backward, norm_backward, forward, forward_up, stem;
    void (*gelu)(float *, int64_t);
    void (*gelu_backward)(float *, float *, int64_t);
};

#define KERNELS                                                                                                      \
    {ISA(depthwise_task),     ISA(weight_task),        ISA(sweep_task),   ISA(moments_task),    ISA(tail_backward_task), \
     ISA(norm_backward_task), ISA(forward_task),       ISA(forward_up_task), ISA(stem_task),      ISA(gelu),             \
     ISA(gelu_backward)}

#define ISA(name) name##_portable
#define LANES 4
#define MANY_REGISTERS 0
#include "_cpu_vector.h"
#include "_cpu_depthwise.h"
#include "_cpu_pointwise.h"
#include "_cpu_forward.h"
static const struct kernels portable = KERNELS;
#include "_cpu_undef.h"

#ifdef HAS_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ISA(name) name##_avx2
#define LANES 8
#define MANY_REGISTERS 0
#include "_cpu_vector.h"
#include "_cpu_depthwise.h"
#include "_cpu_pointwise.h"
#include "_cpu_forward.h"
static const struct kernels avx2 = KERNELS;
#include "_cpu_undef.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define ISA(name) name##_avx512
#define LANES 16
#define MANY_REGISTERS 1
#include "_cpu_vector.h"
#include "_cpu_depthwise.h"
#include "_cpu_pointwise.h"
#include "_cpu_forward.h"
static const struct kernels avx512 = KERNELS;
#include "_cpu_undef.h"
#pragma GCC pop_options
#endif

#ifdef HAS_AMX
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#include "_cpu_amx.h"
#pragma GCC pop_options
#endif

static const struct kernels *chosen = &portable;
static void (*omp_parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Choose the widest instruction set up to `limit` (0 portable, 1 AVX2, 2 AVX-512), take the OpenMP entry point (or NULL), and return
 * the set chosen. */
EXPORT int sagittal_start(void *gomp_parallel, int limit) {
    int level = 0;
    gelu_fill_table();
    memcpy(&omp_parallel, &gomp_parallel, sizeof omp_parallel);
    chosen = &portable;
#ifdef HAS_X86
    __builtin_cpu_init();
    if (limit >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        chosen = &avx2;
        level = 1;
    }
    if (limit >= 2 && level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        chosen = &avx512;
        level = 2;
    }
#else
    (void)limit;
#endif
    return level;
}

/* Return 1 where the processor multiplies bfloat16 on AMX tiles and the system lets this process do so; it must be asked once. */
EXPORT int sagittal_start_amx(void) {
#ifdef HAS_AMX
    enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
#else
    return 0;
#endif
}

struct call {
    task_fn function;
    void *arg;
    int64_t tasks;
    _Atomic int64_t next;
    _Atomic int slots;
};

static void work(void *pointer) {
    struct call *call = pointer;
    const int slot = atomic_fetch_add(&call->slots, 1);
    for (int64_t task; (task = atomic_fetch_add(&call->next, 1)) < call->tasks;) call->function(call->arg, task, slot);
}

static void *work_in_thread(void *pointer) {
    work(pointer);
    return NULL;
}

static void run_tasks(task_fn function, void *arg, int64_t tasks, int threads) {
    enum { MOST = 64 };
    struct call call = {function, arg, tasks, 0, 0};
    pthread_t made[MOST];
    int count = 0;
    if (threads > tasks) threads = (int)tasks;
    if (threads <= 1) {
        work(&call);
    } else if (omp_parallel) {
        omp_parallel(work, &call, (unsigned)threads, 0);
    } else {
        while (count < threads - 1 && count < MOST && pthread_create(&made[count], NULL, work_in_thread, &call) == 0) count++;
        work(&call);
        while (count > 0) pthread_join(made[--count], NULL);
    }
}

/* shape: N, C, input D, H, W, output D, H, W, kernel D, kernel H = W */
static struct depthwise depthwise_job(const int64_t *shape) {
    struct depthwise job = {0};
    job.samples = shape[0];
    job.channels = shape[1];
    memcpy(job.in, shape + 2, sizeof job.in);
    memcpy(job.out, shape + 5, sizeof job.out);
    job.kernel_d = (int)shape[8];
    job.kernel = (int)shape[9];
    job.partial_size = (shape[8] * shape[9] * shape[9] + 1) * shape[1];
    return job;
}

/* y = bias + add + the convolution; weight is (taps, C); mode is the stride, or TRANSPOSED for the transposed one of stride 2. */
EXPORT void sagittal_depthwise(const float *x, const float *weight, const float *bias, const float *add, float *y, const int64_t *shape,
                               int mode, int threads) {
    struct depthwise job = depthwise_job(shape);
    job.x = x;
    job.weight = weight;
    job.bias = bias;
    job.add = add;
    job.y = y;
    run_tasks(chosen->depthwise_task(job.kernel, mode), &job, depthwise_tasks(&job), threads);
}

/* Floats of partial sums that sagittal_depthwise_weight needs. */
EXPORT int64_t sagittal_depthwise_weight_space(const int64_t *shape) {
    const struct depthwise job = depthwise_job(shape);
    return weight_parts(&job) * job.partial_size;
}

struct reduction {
    const float *partial;
    float *total;
    int64_t parts, size;
};

static void reduce_task(void *arg, int64_t task, int slot) {
    enum { WIDTH = 512 };
    const struct reduction *job = arg;
    const int64_t start = task * WIDTH, count = at_most(WIDTH, job->size - start);
    double sum[WIDTH] = {0};
    (void)slot;
    for (int64_t part = 0; part < job->parts; part++)
        for (int64_t i = 0; i < count; i++) sum[i] += job->partial[part * job->size + start + i];
    for (int64_t i = 0; i < count; i++) job->total[start + i] = (float)sum[i];
}

/* total (size) = the sum over parts, in their order. */
static void reduce(const float *partial, float *total, int64_t parts, int64_t size, int threads) {
    struct reduction job = {partial, total, parts, size};
    run_tasks(reduce_task, &job, divide_up(size, 512), threads);
}

/* total (taps + 1, C): the weight's gradient and, in its last row, the bias's. partial must be zeros. */
EXPORT void sagittal_depthwise_weight(const float *x, const float *grad, float *partial, float *total, const int64_t *shape, int stride,
                                      int threads) {
    struct depthwise job = depthwise_job(shape);
    job.x = x;
    job.grad = grad;
    job.partial = partial;
    run_tasks(chosen->weight_task(job.kernel, stride), &job, weight_parts(&job) * channel_blocks(&job), threads);
    reduce(partial, total, weight_parts(&job), job.partial_size, threads);
}

static int64_t moments_chunk(int64_t channels) { return channels < 8192 / 16 ? 8192 / channels : 16; }

EXPORT int64_t sagittal_moments_space(int64_t samples, int64_t voxels, int64_t channels) {
    return samples * divide_up(voxels, moments_chunk(channels)) * 2 * channels;
}

/* mean (N, C) and reciprocal standard deviation (N, C) of x (N, voxels, C), population variance plus eps. */
EXPORT void sagittal_moments(const float *x, float *partial, float *mean, float *scale, int64_t samples, int64_t voxels, int64_t channels,
                             double eps, int threads) {
    struct moments job = {x, partial, channels, voxels, moments_chunk(channels), 0};
    job.chunks = divide_up(voxels, job.chunk);
    run_tasks(chosen->moments, &job, samples * job.chunks, threads);
    for (int64_t n = 0; n < samples; n++)
        for (int64_t c = 0; c < channels; c++) {
            double total = 0, spread = 0, between = 0, centre;
            const float *of_sample = partial + n * job.chunks * 2 * channels + c;
            for (int64_t i = 0; i < job.chunks; i++)
                total += (double)of_sample[2 * i * channels] * (double)at_most(job.chunk, voxels - i * job.chunk);
            centre = total / (double)voxels;
            for (int64_t i = 0; i < job.chunks; i++) {
                const double distance = (double)of_sample[2 * i * channels] - centre;
                spread += (double)of_sample[(2 * i + 1) * channels];
                between += distance * distance * (double)at_most(job.chunk, voxels - i * job.chunk);
            }
            mean[n * channels + c] = (float)centre;
            scale[n * channels + c] = (float)(1.0 / sqrt((spread + between) / (double)voxels + eps));
        }
}

/* shape as in depthwise_job; `up`: the transposed convolution of stride 2 */
static struct sweep sweep_job(const int64_t *shape, int up) {
    struct sweep job = {.as = depthwise_job(shape)};
    const int64_t row = sweep_plane(&job) * job.as.kernel_d + shape[8] * shape[9] * shape[9];
    job.group = row * 64 <= SWEEP_FLOATS ? 64 : row * 32 <= SWEEP_FLOATS ? 32 : 16;
    job.group = at_most(job.group, job.as.channels);
    job.scratch_size = up ? 0 : row * job.group;
    job.stream = job.as.samples * job.as.out[0] * job.as.out[1] * job.as.out[2] * job.as.channels > STREAM_FLOATS;
    return job;
}

/* Floats of scratch for each thread, and of partial sums. */
EXPORT void sagittal_sweep_space(const int64_t *shape, int64_t *sizes, int up) {
    const struct sweep job = sweep_job(shape, up);
    sizes[0] = job.scratch_size;
    sizes[1] = job.as.samples * job.as.out[0] * divide_up(job.as.out[1], BOX_ROWS) * 2 * job.as.channels;
}

/* Mean and reciprocal standard deviation of one sample. */
static void sweep_moments(const struct sweep *job, int64_t n, float *mean, float *scale, double eps) {
    const int64_t C = job->as.channels, blocks = divide_up(job->as.out[1], BOX_ROWS), parts = job->as.out[0] * blocks;
    const double voxels = (double)(job->as.out[0] * job->as.out[1] * job->as.out[2]);
    const float *partial = job->partial + n * parts * 2 * C;
    for (int64_t c = 0; c < C; c++) {
        const double pivot = partial[c];
        double total = 0, spread = 0;
        for (int64_t i = 0; i < parts; i++) {
            const double count = (double)(at_most(BOX_ROWS, job->as.out[1] - i % blocks * BOX_ROWS) * job->as.out[2]);
            const double distance = (double)partial[2 * i * C + c] - pivot;
            total += distance * count;
            spread += distance * distance * count + (double)partial[(2 * i + 1) * C + c];
        }
        total /= voxels;
        spread = spread / voxels - total * total;
        mean[c] = (float)(pivot + total);
        scale[c] = (float)(1.0 / sqrt((spread > 0 ? spread : 0) + eps));
    }
}

/* y = bias + the depthwise convolution with a kernel of 3, 5 or 7, of stride 1 or (`up`) transposed, and y's moments: mean and reciprocal standard
 * deviation (N, C). in: x, weight, bias or NULL; moments: mean, scale, partial sums. */
EXPORT void sagittal_sweep(const float *const *in, float *y, float *const *moments, float *scratch, const int64_t *shape, double eps,
                           int up, int threads) {
    struct sweep job = sweep_job(shape, up);
    const int64_t C = job.as.channels;
    job.as.x = in[0];
    job.as.weight = in[1];
    job.as.bias = in[2];
    job.as.y = y;
    job.partial = moments[2];
    job.scratch = scratch;
    job.stream = job.stream && (uintptr_t)y % 64 == 0;
    run_tasks(chosen->sweep_task(job.as.kernel, up), &job, up ? depthwise_tasks(&job.as) : sweep_tasks(&job), threads);
    for (int64_t n = 0; n < job.as.samples; n++) sweep_moments(&job, n, moments[0] + n * C, moments[1] + n * C, eps);
}

/* shape: N, voxels, C, hidden, outputs; where h is placed among zeros, also its D, H, W, else zeros */
static struct forward forward_job(const int64_t *shape) {
    struct forward job = {0};
    job.samples = shape[0];
    job.voxels = shape[1];
    job.channels = shape[2];
    job.hidden = shape[3];
    job.outputs = shape[4];
    memcpy(job.size, shape + 5, sizeof job.size);
    job.block = at_most(job.hidden, 512);
    job.chunk = job.hidden > 512 ? 120 : job.hidden > 128 ? 96 : 192;
    if (job.size[2] > job.chunk) job.chunk = job.size[2];
    job.scratch_size = job.chunk * (job.channels + job.block + job.outputs);
    job.stream = job.samples * job.voxels * job.outputs > STREAM_FLOATS;
    return job;
}

/* y of struct stem; in: x, weight_t, bias; shape: N, voxels, C, O */
EXPORT void sagittal_stem(const float *const *in, float *y, const int64_t *shape, int threads) {
    struct stem job = {in[0], in[1], in[2], y, shape[1], shape[2], shape[3], 0};
    job.stream = shape[0] * shape[1] * shape[3] > STREAM_FLOATS && (uintptr_t)y % 64 == 0;
    run_tasks(chosen->stem, &job, shape[0] * divide_up(job.voxels, STEM_ROWS), threads);
}

static void panels_task(void *arg, int64_t task, int slot) {
    const struct panels *job = arg;
    const int64_t first = task * PANEL, wide = at_most(PANEL, job->rows - first);
    float *panel = job->panels + first * job->depth;
    (void)slot;
    for (int64_t j = 0; j < wide; j++) {
        const float *row = job->weight + (first + j) * job->depth;
        for (int64_t k = 0; k < job->depth; k++) panel[k * wide + j] = job->scale ? row[k] * job->scale[k] : row[k];
    }
}

/* Floats of scratch of each thread, and of the weights in panels. */
EXPORT void sagittal_forward_space(const int64_t *shape, int64_t *sizes) {
    const struct forward job = forward_job(shape);
    sizes[0] = job.scratch_size;
    sizes[1] = job.hidden * (job.channels + job.outputs);
}

/* y of struct forward; in: h, mean, scale, expand (R, C), the norm's weight (C), expand_bias with the norm's in it, contract (O, R), its bias,
 * residual or NULL, odd or NULL. */
EXPORT void sagittal_forward(const float *const *in, float *y, float *scratch, float *weights, const int64_t *shape, int threads) {
    struct forward job = forward_job(shape);
    struct panels expand = {in[3], in[4], weights, job.hidden, job.channels};
    struct panels contract = {in[6], NULL, weights + job.hidden * job.channels, job.outputs, job.hidden};
    run_tasks(panels_task, &expand, divide_up(expand.rows, PANEL), threads);
    run_tasks(panels_task, &contract, divide_up(contract.rows, PANEL), threads);
    job.h = in[0];
    job.mean = in[1];
    job.scale = in[2];
    job.expand = expand.panels;
    job.expand_bias = in[5];
    job.contract = contract.panels;
    job.contract_bias = in[7];
    job.residual = in[8];
    job.odd = in[9];
    job.y = y;
    job.scratch = scratch;
    job.stream = job.stream && (uintptr_t)y % 64 == 0;
    if (job.size[2])
        run_tasks(chosen->forward_up, &job, job.samples * (job.size[0] + 1), threads);
    else
        run_tasks(chosen->forward, &job, job.samples * divide_up(job.voxels, job.chunk), threads);
}

/* shape: N, voxels, C, hidden, outputs, and whether the products are in bfloat16 */
static struct tail tail_job(const int64_t *shape) {
    struct tail job = {0};
    const int64_t rows = 32768 / shape[3] / 12 * 12;
    job.backward = chosen->tail_backward;
    job.voxels = shape[1];
    job.channels = shape[2];
    job.hidden = shape[3];
    job.outputs = shape[4];
    job.chunk = rows < 48 ? 48 : rows > 480 ? 480 : rows;
    job.partial_size = job.channels * job.hidden + job.hidden * job.outputs + job.hidden + job.outputs;
    job.scratch_size = job.chunk * (job.channels + 2 * job.hidden);
    job.parts = at_most(TAIL_PARTS, TAIL_PARTIAL_FLOATS / job.partial_size) / shape[0];
#ifdef HAS_AMX
    if (shape[5]) {
        job.forward = tail_forward_task_amx;
        job.backward = tail_backward_task_amx;
        job.chunk = job.hidden <= 256 ? 128 : 64;
        job.scratch_size = amx_scratch_size(job.chunk, job.channels, job.hidden, job.outputs);
        /* Fewer voxels are multiplied sooner than their sums are added up. */
        job.parts = at_most(job.parts, job.voxels / 512);
    }
#endif
    job.parts = at_most(job.parts < 1 ? 1 : job.parts, divide_up(job.voxels, job.chunk));
    return job;
}

/* sizes: floats of scratch for each thread, floats of partial sums, of one part of them, and parts of each sample. */
EXPORT void sagittal_tail_space(const int64_t *shape, int64_t *sizes) {
    const struct tail job = tail_job(shape);
    sizes[0] = job.scratch_size;
    sizes[1] = job.partial_size * job.parts * shape[0];
    sizes[2] = job.partial_size;
    sizes[3] = job.parts;
}

/* y = residual + contract(gelu(expand((h - mean) * scale))) in bfloat16; in: h, mean, scale, expand_t (C, R) in pairs, its bias, contract_t
 * (R, O) in pairs, its bias, residual or NULL. In float32 it is sagittal_forward. */
EXPORT void sagittal_tail_forward(const float *const *in, float *y, float *scratch, const int64_t *shape, int threads) {
    struct tail job = tail_job(shape);
    job.h = in[0];
    job.mean = in[1];
    job.scale = in[2];
    job.expand_t = in[3];
    job.expand_bias = in[4];
    job.contract_t = in[5];
    job.contract_bias = in[6];
    job.residual = in[7];
    job.y = y;
    job.scratch = scratch;
    job.parts = at_most(divide_up(job.voxels, job.chunk), TAIL_PARTS);
    run_tasks(job.forward, &job, shape[0] * job.parts, threads);
}

/* in: h, mean, scale, expand_t (C, R), its bias, expand (R, C) without the norm's scale, contract (O, R), grad_y. grad_a (N, voxels, C);
 * totals (N, partial size): each sample's sums over its voxels. In bfloat16 expand_t, expand and contract are pairs, and the sums of contract
 * are (O, R). */
EXPORT void sagittal_tail_backward(const float *const *in, float *grad_a, float *totals, float *partial, float *scratch,
                                   const int64_t *shape, int threads) {
    struct tail job = tail_job(shape);
    job.h = in[0];
    job.mean = in[1];
    job.scale = in[2];
    job.expand_t = in[3];
    job.expand_bias = in[4];
    job.expand = in[5];
    job.contract = in[6];
    job.grad_y = in[7];
    job.grad_a = grad_a;
    job.partial = partial;
    job.scratch = scratch;
    run_tasks(job.backward, &job, shape[0] * job.parts, threads);
    for (int64_t n = 0; n < shape[0]; n++)
        reduce(partial + n * job.parts * job.partial_size, totals + n * job.partial_size, job.parts, job.partial_size, threads);
}

/* pairs (depth rounded up to a multiple of 32, halved, columns) = weight (depth, columns) in bfloat16, as the products take it. */
EXPORT void sagittal_pack_pairs(const float *weight, uint32_t *pairs, int64_t depth, int64_t columns, int threads) {
#ifdef HAS_AMX
    struct amx_weight job = {weight, pairs, depth, columns};
    run_tasks(amx_pack_task, &job, amx_padded(depth) / 2, threads);
#else
    (void)weight, (void)pairs, (void)depth, (void)columns, (void)threads;
#endif
}

/* grad = scale_a grad + scale_h (h - mean) + shift in place, each coefficient (N, C). */
EXPORT void sagittal_norm_backward(float *grad, const float *h, const float *const *coefficients, int64_t samples, int64_t voxels,
                                   int64_t channels, int threads) {
    struct norm_backward job = {h, coefficients[0], coefficients[1], coefficients[2], coefficients[3], grad, channels, voxels, 0, 0};
    job.chunk = moments_chunk(channels);
    job.chunks = divide_up(voxels, job.chunk);
    run_tasks(chosen->norm_backward, &job, samples * job.chunks, threads);
}

struct elements {
    float *u, *grad;
    int64_t count;
};

enum { ELEMENT_CHUNK = 1 << 15 };

static void gelu_task(void *arg, int64_t task, int slot) {
    const struct elements *job = arg;
    const int64_t start = task * ELEMENT_CHUNK, count = at_most(ELEMENT_CHUNK, job->count - start);
    (void)slot;
    if (job->grad)
        chosen->gelu_backward(job->u + start, job->grad + start, count);
    else
        chosen->gelu(job->u + start, count);
}

/* u = gelu(u) in place, and where grad is given grad = grad * gelu'(u); count a multiple of 16. */
EXPORT void sagittal_gelu(float *u, float *grad, int64_t count, int threads) {
    struct elements job = {u, grad, count};
    run_tasks(gelu_task, &job, divide_up(count, ELEMENT_CHUNK), threads);
}
