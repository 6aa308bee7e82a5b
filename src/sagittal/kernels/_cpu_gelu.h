/* |x| cdf(-|x|), the normal distribution's, as polynomials of degree 4 around 32 equidistant places in [0, 5.6]; included by _cpu.c once.
 *
 * Two vector registers hold one coefficient of all 32, and a permutation looks up sixteen of them at a time. The last polynomial, from 5.5 on, is
 * zero; the function is below 1e-7 there. */

enum { GELU_STEPS = 31 };
#define GELU_END 5.6f

static float gelu_table[5][GELU_STEPS + 1] __attribute__((aligned(64)));

/* Taylor's polynomials of degree 5 in the distance from the place, as a share of half a step, with the fifth power replaced by what lower
 * powers make of it at best (by Chebyshev's polynomial): 16 u^5 = T5(u) + 20 u^3 - 5 u. */
static void gelu_fill_table(void) {
    const double step = (double)GELU_END / GELU_STEPS, half = step / 2;
    for (int place = 0; place < GELU_STEPS; place++) {
        const double a = place * step, bell = exp(-a * a / 2) / sqrt(2 * acos(-1)), tail = erfc(a / sqrt(2)) / 2;
        double term[6] = {a * tail,
                          tail - a * bell,
                          bell * (a * a - 2) / 2,
                          bell * (4 * a - a * a * a) / 6,
                          bell * (4 - 7 * a * a + a * a * a * a) / 24,
                          bell * (-18 * a + 11 * a * a * a - a * a * a * a * a) / 120};
        double scale = 1;
        for (int i = 0; i < 6; i++, scale *= half) term[i] *= scale;
        term[3] += term[5] * 20 / 16;
        term[1] -= term[5] * 5 / 16;
        /* the places are looked up by distances in steps */
        scale = 1;
        for (int i = 0; i < 5; i++, scale *= 2) gelu_table[i][place] = (float)(term[i] * scale);
    }
}
