/* The sparse half of a training step, for CPUs. `native.py` compiles and calls this; `pairs.py` says what each function
 * computes and does the same in plain torch.
 *
 * The file includes itself, once for float and once for double. Shapes: B rows of a batch, F latents (the encoder rows
 * of the first `frozen` get no gradient), D = d, G prefix groups, N pairs. All matrices are contiguous and row-major.
 *
 * Every sum has a fixed order: no result depends on the number of threads.
 */
#ifndef REAL

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define DIGITS 2048   /* counters of one radix pass */
#define ROWS 32       /* rows of a matrix that share partial sums */
#define FAR (48 << 20) /* bytes that no cache holds */
#define TOGETHER 256  /* candidates of which the useful ones are found first */
#define ABS(v) ((v) < 0 ? -(v) : (v))

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) { /* nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

typedef double wide_vec __attribute__((vector_size(64)));

#define FLOAT
#define REAL float
#define BITS int32_t
#define SIGN INT32_MIN
#define ROOT sqrtf
#define NAME(f) JOIN(f, _f32)
#include "kernels.c"
#undef FLOAT
#undef REAL
#undef BITS
#undef SIGN
#undef ROOT
#undef NAME

#define REAL double
#define BITS int64_t
#define SIGN INT64_MIN
#define ROOT sqrt
#define NAME(f) JOIN(f, _f64)
#include "kernels.c"

/* Stable counting sort of pairs by latent: start_F1[F + 1], order_N. */
void by_latent(const int32_t *latent, int64_t n, int64_t n_latents, int64_t *start, int32_t *order) {
    memset(start, 0, sizeof *start * (size_t)(n_latents + 1));
    for (int64_t i = 0; i < n; i++) start[latent[i] + 1]++;
    for (int64_t j = 0; j < n_latents; j++) start[j + 1] += start[j];
    for (int64_t i = 0; i < n; i++) order[start[latent[i]]++] = (int32_t)i;
    for (int64_t j = n_latents; j > 0; j--) start[j] = start[j - 1];
    start[0] = 0;
}

#else /* REAL */

typedef REAL NAME(vec) __attribute__((vector_size(64)));
typedef BITS NAME(mask) __attribute__((vector_size(64)));
typedef REAL NAME(eight) __attribute__((vector_size(8 * sizeof(REAL))));
#define VEC NAME(vec)
#define MASK NAME(mask)
#define PER_VEC ((int64_t)(64 / sizeof(REAL)))

static inline VEC NAME(load)(const REAL *from) {
    VEC v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline VEC NAME(load_some)(const REAL *from, int64_t count) {
    if (count == PER_VEC) return NAME(load)(from);
    VEC v = {0};
    for (int64_t i = 0; i < count; i++) v[i] = from[i];
    return v;
}

/* `count` screened values from place `at` on, bf16 or REAL. */
static inline VEC NAME(load_screen)(const void *screen, int low, int64_t at, int64_t count) {
    if (!low) return NAME(load_some)((const REAL *)screen + at, count);
    const uint16_t *from = (const uint16_t *)screen + at;
#ifdef FLOAT
    if (count == PER_VEC) {
        typedef uint16_t halves __attribute__((vector_size(32)));
        typedef uint32_t wholes __attribute__((vector_size(64)));
        halves bits;
        memcpy(&bits, from, sizeof bits);
        return (VEC)(__builtin_convertvector(bits, wholes) << 16);
    }
#endif
    VEC v = {0};
    for (int64_t i = 0; i < count; i++) v[i] = (REAL)from_bf16(from[i]);
    return v;
}

static inline VEC NAME(fill)(REAL value) {
    VEC v;
    for (int64_t i = 0; i < PER_VEC; i++) v[i] = value;
    return v;
}

static inline VEC NAME(size)(VEC v) { return (VEC)((MASK)v & (((MASK){0} - 1) ^ SIGN)); }

/* Bit i is set unless v[i] < least[i]: set, too, where either is NaN. */
static inline uint32_t NAME(not_below)(VEC v, VEC least) {
#if defined(__AVX512F__) && defined(FLOAT)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)least, _CMP_NLT_UQ);
#elif defined(__AVX512F__)
    return _mm512_cmp_pd_mask((__m512d)v, (__m512d)least, _CMP_NLT_UQ);
#else
    MASK below = v < least;
    uint32_t bits = 0;
    for (int64_t i = 0; i < PER_VEC; i++) bits |= (uint32_t)(below[i] == 0) << i;
    return bits;
#endif
}

static inline wide_vec NAME(load_wide)(const REAL *from) {
    NAME(eight) v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, wide_vec);
}

static inline double NAME(sum_wide)(wide_vec v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

static inline REAL NAME(sum)(VEC p) {
    for (int64_t half = PER_VEC / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; lane++) p[lane] += p[lane + half];
    return p[0];
}

/* <a, b> in a fixed order: two interleaved vectors of partial sums, added at the end, then what is left over. */
static inline REAL NAME(dot)(const REAL *restrict a, const REAL *restrict b, int64_t d) {
    VEC even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * PER_VEC <= d; i += 2 * PER_VEC) {
        even += NAME(load)(a + i) * NAME(load)(b + i);
        odd += NAME(load)(a + i + PER_VEC) * NAME(load)(b + i + PER_VEC);
    }
    if (i + PER_VEC <= d) {
        even += NAME(load)(a + i) * NAME(load)(b + i);
        i += PER_VEC;
    }
    REAL total = NAME(sum)(even + odd);
    for (; i < d; i++) total += a[i] * b[i];
    return total;
}

/* Four such products, each in the same order as alone: four streams from memory. The `a` may be one row or four. */
static inline void NAME(dot_four)(const REAL *const *a, const REAL *const *b, int64_t d, REAL *out) {
    const REAL *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *b0 = b[0], *b1 = b[1], *b2 = b[2], *b3 = b[3];
    VEC even0 = {0}, even1 = {0}, even2 = {0}, even3 = {0}, odd0 = {0}, odd1 = {0}, odd2 = {0}, odd3 = {0};
    int64_t i = 0;
    for (; i + 2 * PER_VEC <= d; i += 2 * PER_VEC) {
        even0 += NAME(load)(a0 + i) * NAME(load)(b0 + i);
        even1 += NAME(load)(a1 + i) * NAME(load)(b1 + i);
        even2 += NAME(load)(a2 + i) * NAME(load)(b2 + i);
        even3 += NAME(load)(a3 + i) * NAME(load)(b3 + i);
        odd0 += NAME(load)(a0 + i + PER_VEC) * NAME(load)(b0 + i + PER_VEC);
        odd1 += NAME(load)(a1 + i + PER_VEC) * NAME(load)(b1 + i + PER_VEC);
        odd2 += NAME(load)(a2 + i + PER_VEC) * NAME(load)(b2 + i + PER_VEC);
        odd3 += NAME(load)(a3 + i + PER_VEC) * NAME(load)(b3 + i + PER_VEC);
    }
    if (i + PER_VEC <= d) {
        even0 += NAME(load)(a0 + i) * NAME(load)(b0 + i);
        even1 += NAME(load)(a1 + i) * NAME(load)(b1 + i);
        even2 += NAME(load)(a2 + i) * NAME(load)(b2 + i);
        even3 += NAME(load)(a3 + i) * NAME(load)(b3 + i);
        i += PER_VEC;
    }
    out[0] = NAME(sum)(even0 + odd0);
    out[1] = NAME(sum)(even1 + odd1);
    out[2] = NAME(sum)(even2 + odd2);
    out[3] = NAME(sum)(even3 + odd3);
    for (; i < d; i++) {
        out[0] += a0[i] * b0[i];
        out[1] += a1[i] * b1[i];
        out[2] += a2[i] * b2[i];
        out[3] += a3[i] * b3[i];
    }
}

static inline void NAME(add_scaled)(REAL *restrict to, REAL factor, const REAL *restrict from, int64_t d) {
    for (int64_t i = 0; i < d; i++) to[i] += factor * from[i];
}

/* Four at once: one pass over `to`, four streams from memory. */
static inline void NAME(add_four)(REAL *restrict to, const REAL *f, const REAL *const *from, int64_t d) {
    const REAL *a = from[0], *b = from[1], *c = from[2], *e = from[3];
    const REAL fa = f[0], fb = f[1], fc = f[2], fe = f[3];
    int64_t i = 0;
    for (; i + PER_VEC <= d; i += PER_VEC) {
        VEC v = NAME(load)(to + i);
        v += fa * NAME(load)(a + i);
        v += fb * NAME(load)(b + i);
        v += fc * NAME(load)(c + i);
        v += fe * NAME(load)(e + i);
        memcpy(to + i, &v, sizeof v);
    }
    for (; i < d; i++) to[i] = to[i] + fa * a[i] + fb * b[i] + fc * c[i] + fe * e[i];
}

/* Sum of squares in double: no norm overflows, none is lost. */
static inline double NAME(squares)(const REAL *a, int64_t d) {
    wide_vec p0 = {0}, p1 = {0};
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) {
        wide_vec v0 = NAME(load_wide)(a + i), v1 = NAME(load_wide)(a + i + 8);
        p0 += v0 * v0;
        p1 += v1 * v1;
    }
    double total = NAME(sum_wide)(p0 + p1);
    for (; i < d; i++) total += (double)a[i] * (double)a[i];
    return total;
}

/* Norm of a row. In its own precision where that is safe, which is as exact as margins and unit rows need; otherwise in double. */
static inline REAL NAME(norm)(const REAL *a, int64_t d) {
    VEC even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * PER_VEC <= d; i += 2 * PER_VEC) {
        const VEC u = NAME(load)(a + i), v = NAME(load)(a + i + PER_VEC);
        even += u * u;
        odd += v * v;
    }
    REAL total = NAME(sum)(even + odd);
    for (; i < d; i++) total += a[i] * a[i];
    return total > (REAL)1e-20 && total < (REAL)1e20 ? ROOT(total) : (REAL)sqrt(NAME(squares)(a, d));
}

/* bf16 copy of one row, its norm, and the norm of what rounding took away. low == NULL: no copy, error 0. */
static inline void NAME(round_row)(const REAL *row, uint16_t *low, REAL *norm, REAL *error, int64_t d) {
    *norm = NAME(norm)(row, d);
    *error = 0;
    if (!low) return;
    for (int64_t i = 0; i < d; i++) low[i] = to_bf16((float)row[i]);
    double gone = 0; /* by pieces, and again in double where squares of what was lost may underflow */
    for (int64_t i = 0; i < d; i += 64) {
        REAL lost[64] = {0};
        for (int64_t n = 0; n < 64 && i + n < d; n++) lost[n] = row[i + n] - (REAL)from_bf16(low[i + n]);
        const REAL piece = NAME(norm)(lost, 64);
        gone += (double)piece * (double)piece;
    }
    *error = (REAL)sqrt(gone);
}

/* centred = x - b_dec (both NULL: rows are x as they stand), and round_row of each row. */
void NAME(prepare_rows)(const REAL *x, const REAL *b_dec, REAL *centred, uint16_t *low, REAL *norm, REAL *error,
                        int64_t rows, int64_t d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const REAL *row = x + r * d;
        if (centred) {
            for (int64_t i = 0; i < d; i++) centred[r * d + i] = row[i] - b_dec[i];
            row = centred + r * d;
        }
        NAME(round_row)(row, low ? low + r * d : 0, norm + r, error + r, d);
    }
}

/* Candidates of one chunk of rows: pairs with screen + b_enc + margin not below the cut (latents below `exempt`: 0), where
 * margin = row_a * norm + row_c * error + relative * |screen| + rounding * |screen + b_enc| + absolute. Comparisons are
 * written so that NaN is a candidate. Worker w of `threads` scans its share of rows and fills places [w * capacity, ...);
 * counts[w] says how many it found, which may exceed the capacity: then only that many were stored, and the caller comes
 * again with more. The screen is REAL, or bf16 (low != 0). */
void NAME(scan)(const void *screen, int low, int64_t rows, int64_t first_row, int64_t n_latents, int64_t exempt, const REAL *b_enc,
                const REAL *row_a, const REAL *row_c, const REAL *norm, const REAL *error, double relative_, double rounding_,
                double absolute_, double cut_, int32_t *row_out, int32_t *latent_out, REAL *approx, REAL *margin, int64_t capacity,
                int64_t *counts, int threads) {
    const REAL relative = (REAL)relative_, rounding = (REAL)rounding_, absolute = (REAL)absolute_, cut = (REAL)cut_;
    const int64_t share = (rows + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int w = 0; w < threads; w++) {
        const int64_t last = (w + 1) * share < rows ? (w + 1) * share : rows, base = w * capacity;
        int64_t found = 0;
        for (int64_t r = w * share; r < last; r++) {
            const REAL a = row_a[r], c = row_c[r];
            for (int64_t j = 0; j < n_latents; j += PER_VEC) {
                const int64_t width = j + PER_VEC <= n_latents ? PER_VEC : n_latents - j;
                const VEC s = NAME(load_screen)(screen, low, r * n_latents + j, width);
                const VEC at = s + NAME(load_some)(b_enc + j, width), norms = NAME(load_some)(norm + j, width);
                const VEC errors = NAME(load_some)(error + j, width);
                const VEC reach = a * norms + c * errors + relative * NAME(size)(s) + rounding * NAME(size)(at) + absolute;
                VEC least = NAME(fill)(cut);
                if (j < exempt)
                    for (int64_t i = 0; i < PER_VEC && j + i < exempt; i++) least[i] = 0;
                uint32_t hits = NAME(not_below)(at + reach, least);
                if (width < PER_VEC) hits &= (1u << width) - 1;
                for (; hits; hits &= hits - 1) {
                    const int i = __builtin_ctz(hits);
                    if (found < capacity) {
                        row_out[base + found] = (int32_t)(first_row + r);
                        latent_out[base + found] = (int32_t)(j + i);
                        approx[base + found] = at[i];
                        margin[base + found] = reach[i];
                    }
                    found++;
                }
            }
        }
        counts[w] = found;
    }
}

/* value = <centred row, encoder row> + b_enc for pairs that can still reach the cut, -1 for the others. Returns the number
 * of pairs whose value is farther from its approximation than its margin: 0, or the margin is wrong. */
int64_t NAME(refine)(const REAL *centred, const REAL *W_enc, const REAL *b_enc, const int32_t *row, const int32_t *latent,
                     const REAL *approx, const REAL *margin, double cut_, int64_t exempt, REAL *value, int64_t n, int64_t d,
                     int threads) {
    const REAL cut = (REAL)cut_;
    int64_t wrong = 0;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) reduction(+ : wrong)
    for (int64_t block = 0; block < n; block += TOGETHER) {
        const int64_t last = block + TOGETHER < n ? block + TOGETHER : n;
        int64_t wanted[TOGETHER + 4], count = 0;
        for (int64_t i = block; i < last; i++) {
            wanted[count] = i;
            const int out = approx && approx[i] + margin[i] < (latent[i] < exempt ? 0 : cut);
            count += !out;
            value[i] = -1;
        }
        for (int64_t at = 0; at < count; at += 4) {
            const REAL *rows[4], *weights[4];
            REAL sums[4];
            for (int lane = 0; lane < 4; lane++) { /* the last four may name a pair twice */
                const int64_t i = wanted[at + lane < count ? at + lane : count - 1];
                rows[lane] = centred + row[i] * d;
                weights[lane] = W_enc + (int64_t)latent[i] * d;
            }
            NAME(dot_four)(rows, weights, d, sums);
            for (int lane = 0; lane < 4 && at + lane < count; lane++) {
                const int64_t i = wanted[at + lane];
                value[i] = sums[lane] + b_enc[latent[i]];
                if (!approx) continue;
                const REAL off = value[i] - approx[i];
                wrong += ABS(off) > margin[i];
            }
        }
    }
    return wrong;
}

/* One pass of a radix select: counts of the digit at `shift` among positive values whose leading bits (above the digit)
 * equal `prefix`. Positive floats are ordered like their bits. */
void NAME(count_digits)(const REAL *value, int64_t n, int shift, int64_t prefix, int64_t *counts) {
    const int above = shift + 11;
    const int64_t mask = DIGITS - 1;
    memset(counts, 0, sizeof *counts * DIGITS);
    for (int64_t i = 0; i < n; i++) {
        BITS bits;
        memcpy(&bits, value + i, sizeof bits);
        const int counts_here = (value[i] > 0) & (above >= (int)(8 * sizeof bits) || (int64_t)(bits >> (above & (8 * sizeof bits - 1))) == prefix);
        counts[(bits >> shift) & mask] += counts_here;
    }
}

/* Pairs with value >= threshold (exempt latents: > 0), in order, as row starts [B + 1], rows, latents, values. A pair that
 * is dropped[i] (NULL: none) is left out. Returns their number. */
int64_t NAME(keep)(const int32_t *row, const int32_t *latent, const REAL *value, const uint8_t *dropped, int64_t n, double threshold_,
                   int64_t exempt, int64_t rows, int64_t *row_start, int32_t *row_out, int32_t *latent_out, REAL *value_out) {
    const REAL threshold = (REAL)threshold_;
    int64_t kept = 0, at = 0;
    for (int64_t i = 0; i < n; i++) {
        while (at <= row[i]) row_start[at++] = kept;
        if (latent[i] < exempt ? !(value[i] > 0) : !(value[i] > 0 && value[i] >= threshold)) continue;
        if (dropped && dropped[i]) continue;
        row_out[kept] = row[i];
        latent_out[kept] = latent[i];
        value_out[kept] = value[i];
        kept++;
    }
    while (at <= rows) row_start[at++] = kept;
    return kept;
}

/* Errors of all prefixes and gradients of the kept activations. S[B, G, D]: S[t, g] = sum over h >= g of the error
 * x_hat_h - x of row t. gradient[i] = <S[t, group], W_dec row>. loss[t] = sum over g of the squared error. */
void NAME(decode)(const REAL *x, const REAL *b_dec, const REAL *W_dec, const int64_t *row_start, const int32_t *latent,
                  const REAL *value, const int64_t *group_end, int64_t rows, int64_t d, int64_t groups, REAL *S,
                  REAL *gradient, double *loss, int threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t t = 0; t < rows; t++) {
        REAL *errors = S + t * groups * d;
        int64_t i = row_start[t];
        const int64_t end = row_start[t + 1];
        double squared = 0;
        for (int64_t g = 0; g < groups; g++) {
            REAL *e = errors + g * d;
            if (g == 0)
                for (int64_t n = 0; n < d; n++) e[n] = b_dec[n] - x[t * d + n];
            else
                memcpy(e, e - d, sizeof *e * (size_t)d);
            int64_t stop = i;
            while (stop < end && latent[stop] < group_end[g]) stop++;
            for (; i + 4 <= stop; i += 4) {
                const REAL *from[4];
                for (int n = 0; n < 4; n++) from[n] = W_dec + (int64_t)latent[i + n] * d;
                NAME(add_four)(e, value + i, from, d);
            }
            for (; i < stop; i++) NAME(add_scaled)(e, value[i], W_dec + (int64_t)latent[i] * d, d);
            squared += NAME(squares)(e, d);
        }
        loss[t] = squared;
        for (int64_t g = groups - 2; g >= 0; g--) NAME(add_scaled)(errors + g * d, 1, errors + (g + 1) * d, d);
        int64_t g = 0;
        for (i = row_start[t]; i < end; i += 4) {
            const REAL *sums[4], *weights[4];
            REAL out[4];
            const int64_t count = end - i < 4 ? end - i : 4;
            for (int64_t n = 0; n < 4; n++) { /* the last four may name a pair twice */
                const int32_t j = latent[n < count ? i + n : end - 1];
                while (j >= group_end[g]) g++;
                sums[n] = errors + g * d;
                weights[n] = W_dec + (int64_t)j * d;
            }
            NAME(dot_four)(sums, weights, d, out);
            memcpy(gradient + i, out, sizeof *out * (size_t)count);
        }
    }
}

/* <gradient, w> / (||w|| + 1e-6)^2: as a factor of w, the gradient's component along it. */
static inline REAL NAME(along)(const REAL *g, const REAL *w, int64_t d) {
    const REAL inverse = 1 / (NAME(norm)(w, d) + (REAL)1e-6);
    return NAME(dot)(g, w, d) * inverse * inverse;
}

/* Sum of squares of gradient - factor * w (w NULL: of the gradient). Overflow makes it infinite, which ends the run. */
static inline double NAME(squares_without)(const REAL *g, const REAL *w, REAL factor, int64_t d) {
    VEC even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * PER_VEC <= d; i += 2 * PER_VEC) {
        VEC u = NAME(load)(g + i), v = NAME(load)(g + i + PER_VEC);
        if (w) {
            u -= factor * NAME(load)(w + i);
            v -= factor * NAME(load)(w + i + PER_VEC);
        }
        even += u * u;
        odd += v * v;
    }
    double total = NAME(sum)(even + odd);
    for (; i < d; i++) {
        const REAL rest = w ? g[i] - factor * w[i] : g[i];
        total += rest * rest;
    }
    return total;
}

/* Copy a finished row to where it will not be read soon: past the caches if `far`, which saves reading the old content. */
static inline void NAME(put)(REAL *restrict to, const REAL *restrict from, int64_t d, int far) {
#ifdef __AVX512F__
    if (far && (uintptr_t)to % 64 == 0 && d % PER_VEC == 0) {
        for (int64_t i = 0; i < d; i += PER_VEC) _mm512_stream_si512((void *)(to + i), (__m512i)NAME(load)(from + i));
        return;
    }
#endif
    (void)far;
    memcpy(to, from, sizeof *to * (size_t)d);
}

/* Gradients of the weights: scale * sum over a latent's pairs; every row is written, or (add) latents with pairs are added
 * to. Frozen encoder rows get none. */
void NAME(weight_gradients)(const REAL *S, const REAL *centred, const int64_t *start, const int32_t *order, const int32_t *row,
                            const REAL *value, const REAL *gradient, const int64_t *group_end, int64_t n_latents, int64_t frozen,
                            int64_t d, int64_t groups, double scale_, REAL *W_enc, REAL *b_enc, REAL *W_dec, REAL *scratch,
                            int add, int threads) {
    const REAL scale = (REAL)scale_;
    const int far = n_latents * d * 2 * (int64_t)sizeof(REAL) > FAR;
#pragma omp parallel num_threads(threads)
    {
        REAL *decoder = scratch + omp_get_thread_num() * 2 * d, *encoder = decoder + d;
#pragma omp for schedule(dynamic, 16)
        for (int64_t j = 0; j < n_latents; j++) {
            int64_t g = 0, i = start[j];
            const int64_t end = start[j + 1];
            REAL bias = 0;
            if (add && i == end) continue;
            while (j >= group_end[g]) g++;
            memset(decoder, 0, sizeof *decoder * (size_t)(2 * d));
            if (add) {
                memcpy(decoder, W_dec + j * d, sizeof *decoder * (size_t)d);
                if (j >= frozen) memcpy(encoder, W_enc + (j - frozen) * d, sizeof *encoder * (size_t)d);
            }
            while (i < end) {
                const int count = i + 4 <= end ? 4 : 1;
                const REAL *errors[4], *inputs[4];
                REAL by_value[4], by_gradient[4];
                for (int n = 0; n < count; n++) {
                    const int64_t at = order[i + n], t = row[at];
                    errors[n] = S + (t * groups + g) * d;
                    inputs[n] = centred + t * d;
                    by_value[n] = scale * value[at];
                    by_gradient[n] = scale * gradient[at];
                    bias += gradient[at];
                }
                if (count == 4) {
                    NAME(add_four)(decoder, by_value, errors, d);
                    if (j >= frozen) NAME(add_four)(encoder, by_gradient, inputs, d);
                } else {
                    NAME(add_scaled)(decoder, by_value[0], errors[0], d);
                    if (j >= frozen) NAME(add_scaled)(encoder, by_gradient[0], inputs[0], d);
                }
                i += count;
            }
            b_enc[j] = (add ? b_enc[j] : 0) + scale * bias;
            NAME(put)(W_dec + j * d, decoder, d, far);
            if (j >= frozen) NAME(put)(W_enc + (j - frozen) * d, encoder, d, far);
        }
#ifdef __AVX512F__
        _mm_sfence();
#endif
    }
}

/* sums[block, D] = sum of factor[j] * W[j] over the block's ROWS rows. */
void NAME(weighted_rows)(const REAL *factor, const REAL *W, REAL *sums, int64_t rows, int64_t d, int threads) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t stop = (block + 1) * ROWS < rows ? (block + 1) * ROWS : rows;
        REAL *sum = sums + block * d;
        int64_t j = block * ROWS;
        memset(sum, 0, sizeof *sum * (size_t)d);
        for (; j + 4 <= stop; j += 4) {
            const REAL *from[4] = {W + j * d, W + (j + 1) * d, W + (j + 2) * d, W + (j + 3) * d};
            NAME(add_four)(sum, factor + j, from, d);
        }
        for (; j < stop; j++) NAME(add_scaled)(sum, factor[j], W + j * d, d);
    }
}

/* The largest `most` positive values of every row stay, ties by place; the others become 0. */
void NAME(keep_top)(REAL *value, int64_t rows, int64_t columns, int64_t most, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        REAL *line = value + r * columns;
        int64_t prefix = 0, left = most, positive = 0;
        for (int64_t j = 0; j < columns; j++) {
            if (!(line[j] > 0)) line[j] = 0;
            positive += line[j] > 0;
        }
        if (positive <= most) continue;
        for (int shift = 8 * (int)sizeof(BITS) - 8; shift >= 0; shift -= 8) { /* the bits of the `most`-th largest, byte by byte */
            int32_t counts[256] = {0};
            for (int64_t j = 0; j < columns; j++) {
                BITS bits;
                memcpy(&bits, line + j, sizeof bits);
                counts[(bits >> shift) & 255] += (line[j] > 0) & ((int64_t)(bits >> shift) >> 8 == prefix);
            }
            int64_t digit = 255;
            while (counts[digit] < left) left -= counts[digit--];
            prefix = (prefix << 8) | digit;
        }
        for (int64_t j = 0; j < columns; j++) {
            BITS bits;
            memcpy(&bits, line + j, sizeof bits);
            if (line[j] > 0 && ((int64_t)bits < prefix || ((int64_t)bits == prefix && left-- <= 0))) line[j] = 0;
        }
    }
}

/* parallel[j], see `along`, for every row of W (NULL: none), and by block of ROWS rows the sum of squares of the gradient
 * without that component. */
void NAME(gradient_squares)(const REAL *gradient, const REAL *W, REAL *parallel, double *sums, int64_t rows, int64_t d, int threads) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t stop = (block + 1) * ROWS < rows ? (block + 1) * ROWS : rows;
        double total = 0;
        for (int64_t j = block * ROWS; j < stop; j++) {
            if (W) parallel[j] = NAME(along)(gradient + j * d, W + j * d, d);
            total += NAME(squares_without)(gradient + j * d, W ? W + j * d : 0, W ? parallel[j] : 0, d);
        }
        sums[block] = total;
    }
}

/* Adam over the rows of one matrix. parallel[j] * W is taken out of the gradient first (NULL: nothing), then the gradient is
 * multiplied by `clip`. unit: rows are divided by their norm plus epsilon afterwards. low: see round_row, of the new rows
 * (norm == NULL: not wanted). */
void NAME(adam)(REAL *W, const REAL *gradient, REAL *mean, REAL *square, const REAL *parallel, int64_t rows, int64_t d, double clip_,
                double beta1_, double beta2_, double eps_, double step_size_, double correction_, int unit, double unit_eps_,
                uint16_t *low, REAL *norm, REAL *error, int threads) {
    const REAL clip = (REAL)clip_, beta1 = (REAL)beta1_, beta2 = (REAL)beta2_, eps = (REAL)eps_;
    const REAL step_size = (REAL)step_size_, correction = (REAL)correction_, unit_eps = (REAL)unit_eps_;
    const REAL fresh1 = (REAL)(1 - beta1_), fresh2 = (REAL)(1 - beta2_);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < rows; j++) {
        REAL *restrict w = W + j * d, *restrict m = mean + j * d, *restrict v = square + j * d;
        const REAL *restrict g = gradient + j * d;
        const REAL factor = parallel ? parallel[j] : 0;
        for (int64_t i = 0; i < d; i++) {
            const REAL now = (g[i] - factor * w[i]) * clip;
            m[i] = beta1 * m[i] + fresh1 * now;
            v[i] = beta2 * v[i] + fresh2 * now * now;
            w[i] -= step_size * m[i] / (ROOT(v[i]) * correction + eps);
        }
        if (unit) {
            const REAL length = NAME(norm)(w, d) + unit_eps;
            for (int64_t i = 0; i < d; i++) w[i] /= length;
        }
        if (norm) NAME(round_row)(w, low ? low + j * d : 0, norm + j, error + j, d);
    }
}

#undef VEC
#undef MASK
#undef PER_VEC
#endif
