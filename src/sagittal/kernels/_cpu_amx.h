/* The pointwise half of a MedNeXt block with its matrix products in bfloat16 on AMX tiles; included by _cpu.c once.
 *
 * As in _cpu_pointwise.h a task holds some voxels in the caches through the whole chain. What enters a product is rounded to bfloat16,
 * sums are float32, and all else is float32 as well. A tile instruction multiplies 16 rows of 32 numbers with 16 rows of 16 pairs: the
 * left operand lies by rows, the right one in pairs, each word holding two neighbours in depth. Depths are padded with zeros to 32.
 */

/* GCC's tile instructions do not tell that they read memory. */
#define AMX_FENCE() __asm__ volatile("" ::: "memory")

static int64_t amx_padded(int64_t depth) { return divide_up(depth, 32) * 32; }

struct __attribute__((packed)) amx_config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

static void amx_begin(void) {
    struct amx_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.bytes[tile] = 64;
        config.rows[tile] = 16;
    }
    AMX_FENCE();
    _tile_loadconfig(&config);
}

/* Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns. */
#define AMX_BLOCK(TALL, WIDE)                                                                         \
    do {                                                                                              \
        const uint16_t *left = a + i * lda;                                                           \
        const uint32_t *right = b + j;                                                                \
        if (add) {                                                                                    \
            _tile_loadd(0, c + i * ldc + j, ldc * 4);                                                 \
            if (WIDE) _tile_loadd(1, c + i * ldc + j + 16, ldc * 4);                                  \
            if (TALL) _tile_loadd(2, c + (i + 16) * ldc + j, ldc * 4);                                \
            if (TALL && WIDE) _tile_loadd(3, c + (i + 16) * ldc + j + 16, ldc * 4);                   \
        } else {                                                                                      \
            _tile_zero(0);                                                                            \
            if (WIDE) _tile_zero(1);                                                                  \
            if (TALL) _tile_zero(2);                                                                  \
            if (TALL && WIDE) _tile_zero(3);                                                          \
        }                                                                                             \
        for (int64_t k = 0; k < depth; k += 32, left += 32, right += 16 * columns) {                  \
            _tile_loadd(4, left, lda * 2);                                                            \
            _tile_loadd(6, right, columns * 4);                                                       \
            _tile_dpbf16ps(0, 4, 6);                                                                  \
            if (WIDE) _tile_loadd(7, right + 16, columns * 4);                                        \
            if (WIDE) _tile_dpbf16ps(1, 4, 7);                                                        \
            if (TALL) _tile_loadd(5, left + 16 * lda, lda * 2);                                       \
            if (TALL) _tile_dpbf16ps(2, 5, 6);                                                        \
            if (TALL && WIDE) _tile_dpbf16ps(3, 5, 7);                                                \
        }                                                                                             \
        _tile_stored(0, c + i * ldc + j, ldc * 4);                                                    \
        if (WIDE) _tile_stored(1, c + i * ldc + j + 16, ldc * 4);                                     \
        if (TALL) _tile_stored(2, c + (i + 16) * ldc + j, ldc * 4);                                   \
        if (TALL && WIDE) _tile_stored(3, c + (i + 16) * ldc + j + 16, ldc * 4);                      \
    } while (0)

/* c (rows, columns) = a b, or c + a b where `add`; rows and columns multiples of 16, depth of 32; b (depth / 2, columns) in pairs. */
static __attribute__((noinline)) void amx_product(const uint16_t *a, int64_t lda, const uint32_t *b, float *c, int64_t rows,
                                                  int64_t depth, int64_t columns, int add) {
    const int64_t ldc = columns;
    int64_t j = 0;
    AMX_FENCE();
    for (; j + 32 <= columns; j += 32) {
        int64_t i = 0;
        for (; i + 32 <= rows; i += 32) AMX_BLOCK(1, 1);
        if (i < rows) AMX_BLOCK(0, 1);
    }
    if (j < columns) {
        int64_t i = 0;
        for (; i + 32 <= rows; i += 32) AMX_BLOCK(1, 0);
        if (i < rows) AMX_BLOCK(0, 0);
    }
    AMX_FENCE();
}

/* A product whose last rows, beyond `rows`, are not there in c: they go through `edge` (16, columns). */
static void amx_product_rows(const uint16_t *a, int64_t lda, const uint32_t *b, float *c, float *edge, int64_t rows, int64_t depth,
                             int64_t columns) {
    const int64_t whole = rows / 16 * 16;
    if (whole) amx_product(a, lda, b, c, whole, depth, columns, 0);
    if (whole == rows) return;
    amx_product(a + whole * lda, lda, b, edge, 16, depth, columns, 0);
    memcpy(c + whole * columns, edge, (size_t)((rows - whole) * columns) * sizeof *c);
}

INLINE __m256i amx_round(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

/* Each word: `even` in its low half, `odd` in its high half. */
INLINE __m512i amx_pairs(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* Transpose 16 x 16 words. */
INLINE void amx_transpose(__m512i *x) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; half++) {
            x[i + 2 * half] = _mm512_unpacklo_epi64(y[i + half], y[i + 2 + half]);
            x[i + 2 * half + 1] = _mm512_unpackhi_epi64(y[i + half], y[i + 2 + half]);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

/* Round (x - mean) * scale, or x where there is no mean, of `rows` rows: by rows into left (padded rows, padded columns) and, where given,
 * transposed into left_t (columns, chunk). Rows up to a multiple of 32 and columns up to one become zero. */
static void amx_round_rows(const float *x, const float *mean, const float *scale, uint16_t *left, uint16_t *left_t, int64_t chunk,
                           int64_t rows, int64_t columns) {
    const int64_t wide = amx_padded(columns);
    for (int64_t start = 0; start < rows; start += 32)
        for (int64_t c = 0; c < wide; c += 16) {
            __m512i words[16];
            for (int i = 0; i < 16; i++) {
                __m256i half[2];
                for (int odd = 0; odd < 2; odd++) {
                    const int64_t row = start + 2 * i + odd;
                    __m512 value = _mm512_setzero_ps();
                    if (row < rows && c < columns) {
                        value = _mm512_loadu_ps(x + row * columns + c);
                        if (mean) value = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_loadu_ps(mean + c)), _mm512_loadu_ps(scale + c));
                    }
                    half[odd] = amx_round(value);
                    _mm256_storeu_si256((__m256i *)(left + row * wide + c), half[odd]);
                }
                words[i] = amx_pairs(half[0], half[1]);
            }
            if (left_t && c < columns) {
                amx_transpose(words);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(left_t + (c + i) * chunk + start, words[i]);
            }
        }
}

/* The normal distribution's cdf(x), and exp(-x^2 / 2) in *bell, with an absolute error of 1e-4: bfloat16 keeps no more. As in
 * _cpu_vector.h, with polynomials of a lower degree. */
INLINE __m512 amx_normal_cdf(__m512 x, __m512 *bell) {
    static const float R[] = {0.499927193f, -0.396609128f, 0.237537324f, -0.106017351f, 0.0318814591f, -0.00551708275f, 0.00040319818f};
    /* min() hands on its second operand where either is not a number */
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(12.0f), _mm512_abs_ps(x));
    const __m512 power = _mm512_mul_ps(_mm512_mul_ps(size, size), _mm512_set1_ps(-0.72134752f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm512_sub_ps(power, whole);
    const __m512 s = _mm512_min_ps(_mm512_set1_ps(5.0f), size);
    __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0551717728f), rest, _mm512_set1_ps(0.242611378f)), ratio = _mm512_set1_ps(R[6]), tail;
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693260968f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.999927998f));
    *bell = _mm512_scalef_ps(y, whole);
#pragma GCC unroll 6
    for (int i = 5; i >= 0; i--) ratio = _mm512_fmadd_ps(ratio, s, _mm512_set1_ps(R[i]));
    tail = _mm512_mul_ps(*bell, ratio);
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLT_UQ), _mm512_set1_ps(1.0f), tail);
}

/* Round gelu(u + bias) of `rows` rows into left (rows, padded columns). */
static void amx_gelu(const float *u, const float *bias, uint16_t *left, int64_t rows, int64_t columns, const struct ahead *next) {
    const int64_t wide = amx_padded(columns);
    for (int64_t i = 0; i < rows; i++) {
        fetch(next, i);
        for (int64_t c = 0; c < columns; c += 16) {
            __m512 bell;
            const __m512 x = _mm512_add_ps(_mm512_loadu_ps(u + i * columns + c), _mm512_loadu_ps(bias + c));
            const __m512 cdf = amx_normal_cdf(x, &bell);
            _mm256_storeu_si256((__m256i *)(left + i * wide + c), amx_round(_mm512_mul_ps(x, cdf)));
        }
        if (wide > columns) _mm256_storeu_si256((__m256i *)(left + i * wide + columns), _mm256_setzero_si256());
    }
}

/* From u without its bias and the gradient at gelu's output, both (rows, columns), rows even: gelu in pairs, the gradient at u in pairs and
 * by rows; sums += the gradient summed over the rows. */
static void amx_gelu_backward(const float *u, const float *bias, const float *grad, uint32_t *gelu, uint32_t *pairs, uint16_t *left,
                              float *sums, int64_t rows, int64_t columns, const struct ahead *next) {
    const int64_t wide = amx_padded(columns);
    for (int64_t i = 0; i < rows; i += 2) {
        fetch(next, i);
        fetch(next, i + 1);
        for (int64_t c = 0; c < columns; c += 16) {
            __m256i act[2], by_u[2];
            __m512 sum = _mm512_loadu_ps(sums + c);
            for (int odd = 0; odd < 2; odd++) {
                __m512 bell, slope;
                const __m512 x = _mm512_add_ps(_mm512_loadu_ps(u + (i + odd) * columns + c), _mm512_loadu_ps(bias + c));
                const __m512 cdf = amx_normal_cdf(x, &bell);
                slope = _mm512_fmadd_ps(_mm512_mul_ps(x, bell), _mm512_set1_ps(0.398942280f), cdf);
                slope = _mm512_mul_ps(slope, _mm512_loadu_ps(grad + (i + odd) * columns + c));
                sum = _mm512_add_ps(sum, slope);
                act[odd] = amx_round(_mm512_mul_ps(x, cdf));
                by_u[odd] = amx_round(slope);
                _mm256_storeu_si256((__m256i *)(left + (i + odd) * wide + c), by_u[odd]);
            }
            _mm512_storeu_ps(sums + c, sum);
            _mm512_storeu_si512(gelu + i / 2 * columns + c, amx_pairs(act[0], act[1]));
            _mm512_storeu_si512(pairs + i / 2 * columns + c, amx_pairs(by_u[0], by_u[1]));
        }
        if (wide > columns)
            for (int odd = 0; odd < 2; odd++)
                _mm256_storeu_si256((__m256i *)(left + (i + odd) * wide + columns), _mm256_setzero_si256());
    }
}

/* y += bias + residual. */
static void amx_add(float *y, const float *bias, const float *residual, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < columns; c += 16) {
            __m512 sum = _mm512_add_ps(_mm512_loadu_ps(y + i * columns + c), _mm512_loadu_ps(bias + c));
            if (residual) sum = _mm512_add_ps(sum, _mm512_loadu_ps(residual + i * columns + c));
            _mm512_storeu_ps(y + i * columns + c, sum);
        }
}

/* A thread's buffers, one after the other in its scratch. */
struct amx_scratch {
    float *u, *grad, *edge;
    uint32_t *gelu, *pairs;
    uint16_t *normed, *normed_t, *grad_y, *grad_y_t, *hidden;
};

static int64_t amx_scratch_size(int64_t chunk, int64_t channels, int64_t hidden, int64_t outputs) {
    const int64_t most = channels > outputs ? channels : outputs;
    return chunk * (3 * hidden + (amx_padded(channels) + channels + amx_padded(outputs) + outputs + amx_padded(hidden)) / 2) + 16 * most;
}

static struct amx_scratch amx_scratch_of(const struct tail *job, int slot) {
    const int64_t chunk = job->chunk, C = job->channels, R = job->hidden, O = job->outputs;
    struct amx_scratch own;
    own.u = job->scratch + slot * job->scratch_size;
    own.grad = own.u + chunk * R;
    own.edge = own.grad + chunk * R;
    own.gelu = (uint32_t *)(own.edge + 16 * (C > O ? C : O));
    own.pairs = own.gelu + chunk / 2 * R;
    own.normed = (uint16_t *)(own.pairs + chunk / 2 * R);
    own.normed_t = own.normed + chunk * amx_padded(C);
    own.grad_y = own.normed_t + chunk * C;
    own.grad_y_t = own.grad_y + chunk * amx_padded(O);
    own.hidden = own.grad_y_t + chunk * O;
    return own;
}

/* As tail_forward_task; expand_t and contract_t are in pairs. */
static void tail_forward_task_amx(void *arg, int64_t task, int slot) {
    const struct tail *job = arg;
    const int64_t C = job->channels, R = job->hidden, O = job->outputs;
    const struct amx_scratch own = amx_scratch_of(job, slot);
    int64_t n, start, stop;
    tail_rows_of_task(job, task, &n, &start, &stop);
    amx_begin();
    for (; start < stop; start += job->chunk) {
        const int64_t rows = at_most(stop - start, job->chunk), padded = amx_padded(rows), at = n * job->voxels + start;
        const struct ahead next = tail_ahead(job, n, start, stop, job->residual, job->y);
        amx_round_rows(job->h + at * C, job->mean + n * C, job->scale + n * C, own.normed, NULL, job->chunk, rows, C);
        amx_product(own.normed, amx_padded(C), (const uint32_t *)job->expand_t, own.u, padded, amx_padded(C), R, 0);
        amx_gelu(own.u, job->expand_bias, own.hidden, padded, R, &next);
        amx_product_rows(own.hidden, amx_padded(R), (const uint32_t *)job->contract_t, job->y + at * O, own.edge, rows, amx_padded(R), O);
        amx_add(job->y + at * O, job->contract_bias, job->residual ? job->residual + at * O : NULL, rows, O);
    }
    _tile_release();
}

/* As tail_backward_task; expand_t, expand and contract are in pairs, and the sums of contract are (O, R). */
static void tail_backward_task_amx(void *arg, int64_t task, int slot) {
    const struct tail *job = arg;
    const int64_t C = job->channels, R = job->hidden, O = job->outputs, chunk = job->chunk;
    const struct amx_scratch own = amx_scratch_of(job, slot);
    float *expand = job->partial + task * job->partial_size, *contract = expand + C * R, *sums = contract + R * O;
    int64_t n, start, stop;
    tail_rows_of_task(job, task, &n, &start, &stop);
    memset(expand, 0, (size_t)job->partial_size * sizeof *expand);
    amx_begin();
    for (; start < stop; start += chunk) {
        const int64_t rows = at_most(stop - start, chunk), padded = amx_padded(rows), at = n * job->voxels + start;
        const struct ahead next = tail_ahead(job, n, start, stop, job->grad_y, job->grad_a);
        const float *grad_y = job->grad_y + at * O;
        amx_round_rows(job->h + at * C, job->mean + n * C, job->scale + n * C, own.normed, own.normed_t, chunk, rows, C);
        amx_round_rows(grad_y, NULL, NULL, own.grad_y, own.grad_y_t, chunk, rows, O);
        amx_product(own.normed, amx_padded(C), (const uint32_t *)job->expand_t, own.u, padded, amx_padded(C), R, 0);
        amx_product(own.grad_y, amx_padded(O), (const uint32_t *)job->contract, own.grad, padded, amx_padded(O), R, 0);
        /* Rows beyond the last have no gradient, so that they add nothing to any sum. */
        amx_gelu_backward(own.u, job->expand_bias, own.grad, own.gelu, own.pairs, own.hidden, sums, padded, R, &next);
        add_column_sums_avx512(grad_y, sums + R, rows, O);
        amx_product(own.normed_t, chunk, own.pairs, expand, C, padded, R, 1);
        amx_product(own.grad_y_t, chunk, own.gelu, contract, O, padded, R, 1);
        amx_product_rows(own.hidden, amx_padded(R), (const uint32_t *)job->expand, job->grad_a + at * C, own.edge, rows, amx_padded(R), C);
    }
    _tile_release();
}

struct amx_weight {
    const float *weight;
    uint32_t *pairs;
    int64_t depth, columns;
};

/* Round two rows of a weight (depth, columns) into one of pairs; zeros beyond the last. */
static void amx_pack_task(void *arg, int64_t task, int slot) {
    const struct amx_weight *job = arg;
    (void)slot;
    for (int64_t c = 0; c < job->columns; c += 16) {
        __m256i half[2];
        for (int odd = 0; odd < 2; odd++) {
            const int64_t row = 2 * task + odd;
            half[odd] = amx_round(row < job->depth ? _mm512_loadu_ps(job->weight + row * job->columns + c) : _mm512_setzero_ps());
        }
        _mm512_storeu_si512(job->pairs + task * job->columns + c, amx_pairs(half[0], half[1]));
    }
}
