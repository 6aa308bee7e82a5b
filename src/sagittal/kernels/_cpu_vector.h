/* Vector types of one instruction set; included by _cpu.c once for each, with ISA(name), LANES and RESIDENT set. */

typedef float ISA(vf) __attribute__((vector_size(LANES * 4)));
typedef int32_t ISA(vi) __attribute__((vector_size(LANES * 4)));
typedef float ISA(vf_memory) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define vf ISA(vf)
#define vi ISA(vi)

INLINE vf ISA(load)(const float *p) { return *(const ISA(vf_memory) *)p; }

INLINE void ISA(store)(float *p, vf value) { *(ISA(vf_memory) *)p = value; }

INLINE vf ISA(splat)(float value) { return value - (vf){0}; }

/* A compare and select that hands a NaN on. */
INLINE vf ISA(at_most)(vf x, vf limit) {
    vi above = x > limit;
    return (vf)((above & (vi)limit) | (~above & (vi)x));
}

/* exp(x) for x in [-80, 0]: 2^n times a polynomial of the rest, relative error about 1e-7. */
INLINE vf ISA(exp_negative)(vf x) {
    const vf magic = ISA(splat)(12582912.0f);
    vf shifted = x * 1.44269504f + magic;
    vf whole = shifted - magic;
    vf rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    vf y = rest * 1.98412698e-4f + 1.38888889e-3f;
    y = y * rest + 8.33333333e-3f;
    y = y * rest + 0.0416666667f;
    y = y * rest + 0.166666667f;
    y = y * rest + 0.5f;
    y = y * rest + 1.0f;
    y = y * rest + 1.0f;
    vi scale = ((vi)shifted - (vi)magic + 127) << 23;
    return y * (vf)scale;
}

/* The normal distribution: cdf(x), and exp(-x^2 / 2) in *bell.
 * cdf(-|x|) = bell * R(|x|) with R = erfcx(|x| / sqrt 2) / 2, a polynomial on [0, 5.5] fitted by weighted least squares on Chebyshev
 * nodes (absolute error of the cdf below 1e-7); one exponential serves the function and its derivative. */
INLINE vf ISA(normal_cdf)(vf x, vf *bell) {
    static const float R[] = {RATIO_COEFFICIENTS};
    vi sign = (vi)x & (vi)ISA(splat)(-0.0f);
    vf magnitude = (vf)((vi)x ^ sign);
    *bell = ISA(exp_negative)(-ISA(at_most)(magnitude * magnitude * 0.5f, ISA(splat)(80.0f)));
    vf s = ISA(at_most)(magnitude, ISA(splat)(5.5f)) * (2.0f / 5.5f) - 1.0f;
    vf ratio = ISA(splat)(R[13]);
#pragma GCC unroll 16
    for (int i = 12; i >= 0; i--) ratio = ratio * s + R[i];
    vf tail = *bell * ratio;
    vi negative = sign >> 31;
    return (vf)((negative & (vi)tail) | (~negative & (vi)(1.0f - tail)));
}

/* gelu(x) = max(x, 0) - |x| cdf(-|x|); the second part from a table of polynomials where registers can hold one (_cpu_gelu.h), absolute error
 * below 1e-7. A NaN is handed on. */
INLINE vf ISA(gelu_of)(vf x) {
#if LANES == 16
    const __m512 size = _mm512_min_ps(_mm512_set1_ps(GELU_END), _mm512_abs_ps((__m512)x)), magic = _mm512_set1_ps(12582912.0f);
    const __m512 place = _mm512_mul_ps(size, _mm512_set1_ps(GELU_STEPS / GELU_END)), shifted = _mm512_add_ps(place, magic);
    const __m512 rest = _mm512_sub_ps(place, _mm512_sub_ps(shifted, magic));
    const __m512i index = _mm512_castps_si512(shifted);
#define GELU_TERM(i) _mm512_permutex2var_ps(_mm512_load_ps(gelu_table[i]), index, _mm512_load_ps(gelu_table[i] + 16))
    __m512 y = _mm512_fmadd_ps(GELU_TERM(4), rest, GELU_TERM(3));
    y = _mm512_fmadd_ps(y, rest, GELU_TERM(2));
    y = _mm512_fmadd_ps(y, rest, GELU_TERM(1));
    y = _mm512_fmadd_ps(y, rest, GELU_TERM(0));
#undef GELU_TERM
    return (vf)_mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), (__m512)x), y);
#else
    vf bell;
    return x * ISA(normal_cdf)(x, &bell);
#endif
}

/* Store past the caches what is not read again soon; p as aligned as a vector. */
INLINE void ISA(stream)(float *p, vf value) {
#if LANES == 16
    _mm512_stream_ps(p, (__m512)value);
#else
    ISA(store)(p, value);
#endif
}

/* Wait for what went past the caches, before another thread reads it. */
INLINE void ISA(fence)(void) {
#if LANES == 16
    _mm_sfence();
#endif
}
