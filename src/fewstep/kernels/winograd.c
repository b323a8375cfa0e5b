/* 3x3 convolutions, stride 1, padding 1, channels last, by Winograd's F(4x4, 3x3).
 *
 * y = A^T [sum over c of (G w G^T) * (B^T d B)] A for each tile of 4x4 outputs, which come from a
 * patch d of 6x6 inputs (Lavin & Gray 2016, section 4.1): 36 products for 16 outputs, not 144. The
 * points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: their squares are exact, and the rounding
 * error is less than half of what the usual 0, +-1, +-2 make.
 *
 * All arithmetic is float32. Tensors are float32 or bfloat16, which is widened as it is read and
 * rounded once as it is written: loops over tensors are in winograd.h.
 *
 * A block of tiles goes through three stages, one after another, in the scratch of one thread:
 *   patches    [36][in / 16][tiles][16]
 *   products   [36][columns / 32][tiles][32]    36 matrix products with
 *   weights    [36][out / 32][in][32]
 * Weights that are not prepared are made for 32 columns and CHUNK channels at a time, used for all
 * tiles of the block while the L2 cache holds them, and forgotten.
 * Every output is one sum over the channels in their order, so neither the blocks nor the threads
 * nor the rest of the batch change a bit of it. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "parallel.h"

#define TILE 4
#define PATCH 6
#define POINTS 36
#define LANES 16  /* floats of a register */
#define PANEL 32  /* columns of a product */
#define CHUNK 128 /* channels of weights that are made at a time */
#define ROWS 14   /* 2 * 14 sums, 2 of weights and 1 of patches: 31 of 32 registers */
#define SKEW 16   /* keeps the 36 planes off one another's cache sets */
#define SMALL 0.70710678118654752440f
#define LARGE 1.41421356237309504880f
#define INLINE static inline __attribute__((always_inline))

/* A weight (out, in, 3, 3): contiguous, or channels last where the next tap is `in` numbers off. */
typedef struct {
    const void *values;
    int64_t in, next_tap;
} Weight;

typedef struct {
    const void *x, *bias, *shift, *residual;
    void *y;
    const float *packed;
    float *scratch;
    Weight weight; /* in place of `packed` */
    int64_t batch, height, width, in, out;
    int64_t blocks, tiles, columns, share;
} Job;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
static int64_t high(const Job *job) { return parts(job->height, TILE); }
static int64_t wide(const Job *job) { return parts(job->width, TILE); }
static int64_t patch_plane(const Job *job) { return job->tiles * job->in + SKEW; }
static int64_t product_plane(const Job *job) { return job->tiles * job->columns + SKEW; }
static int64_t weight_plane(const Job *job) {
    return job->packed ? job->in * job->out : CHUNK * PANEL + SKEW;
}

static int64_t scratch_floats(const Job *job) {
    const int64_t weights = job->packed ? 0 : POINTS * weight_plane(job);
    return job->in + POINTS * (patch_plane(job) + product_plane(job)) + weights;
}

/* Numbers in memory and in registers. */
INLINE __m512 load_f32(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_f32(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
INLINE __m512 load_bf16(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
/* To the nearest, ties to even. A NaN stays one: its low half is empty, as it was read. */
INLINE void store_bf16(uint16_t *p, __m512 x) {
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
    _mm256_storeu_si256((__m256i *)p, half);
}

/* B^T d: six values to six points. */
INLINE void to_points(const __m512 d[PATCH], __m512 v[PATCH]) {
    const __m512 half = _mm512_set1_ps(0.5f), two = _mm512_set1_ps(2.0f);
    const __m512 sum = _mm512_set1_ps(2.5f);
    const __m512 small = _mm512_set1_ps(SMALL), large = _mm512_set1_ps(LARGE);
    const __m512 even_small = _mm512_fnmadd_ps(two, d[2], d[4]);
    const __m512 odd_small = _mm512_fnmadd_ps(two, d[1], d[3]);
    const __m512 even_large = _mm512_fnmadd_ps(half, d[2], d[4]);
    const __m512 odd_large = _mm512_fnmadd_ps(half, d[1], d[3]);
    v[0] = _mm512_fnmadd_ps(sum, d[2], _mm512_add_ps(d[0], d[4]));
    v[1] = _mm512_fmadd_ps(small, odd_small, even_small);
    v[2] = _mm512_fnmadd_ps(small, odd_small, even_small);
    v[3] = _mm512_fmadd_ps(large, odd_large, even_large);
    v[4] = _mm512_fnmadd_ps(large, odd_large, even_large);
    v[5] = _mm512_fnmadd_ps(sum, d[3], _mm512_add_ps(d[1], d[5]));
}

/* A^T m: six points to four outputs. */
INLINE void from_points(const __m512 m[PATCH], __m512 y[TILE]) {
    const __m512 half = _mm512_set1_ps(0.5f), two = _mm512_set1_ps(2.0f);
    const __m512 small = _mm512_set1_ps(SMALL), large = _mm512_set1_ps(LARGE);
    const __m512 even_small = _mm512_add_ps(m[1], m[2]);
    const __m512 odd_small = _mm512_mul_ps(small, _mm512_sub_ps(m[1], m[2]));
    const __m512 even_large = _mm512_add_ps(m[3], m[4]);
    const __m512 odd_large = _mm512_mul_ps(large, _mm512_sub_ps(m[3], m[4]));
    y[0] = _mm512_add_ps(m[0], _mm512_add_ps(even_small, even_large));
    y[1] = _mm512_add_ps(odd_small, odd_large);
    y[2] = _mm512_fmadd_ps(two, even_large, _mm512_mul_ps(half, even_small));
    y[3] = _mm512_fmadd_ps(two, odd_large, _mm512_fmadd_ps(half, odd_small, m[5]));
}

/* G w: three values to six points. */
INLINE void weight_to_points(const __m512 w[3], __m512 u[PATCH]) {
    const __m512 third = _mm512_set1_ps(1 / 3.0f), sixth = _mm512_set1_ps(1 / 6.0f);
    const __m512 two_thirds = _mm512_set1_ps(2 / 3.0f);
    const __m512 small = _mm512_set1_ps(LARGE / 3), large = _mm512_set1_ps(LARGE / 6);
    const __m512 last = _mm512_mul_ps(third, w[2]);
    const __m512 even_small = _mm512_fnmsub_ps(two_thirds, w[0], last);
    const __m512 even_large = _mm512_fmadd_ps(sixth, w[0], last);
    u[0] = w[0];
    u[1] = _mm512_fnmadd_ps(small, w[1], even_small);
    u[2] = _mm512_fmadd_ps(small, w[1], even_small);
    u[3] = _mm512_fmadd_ps(large, w[1], even_large);
    u[4] = _mm512_fnmadd_ps(large, w[1], even_large);
    u[5] = w[2];
}

/* Sixteen rows of sixteen become columns. */
INLINE void transpose(__m512 r[LANES]) {
    __m512 t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int k = 0; k < 2; k++) {
            const __m512d even = _mm512_castps_pd(t[i + k]), odd = _mm512_castps_pd(t[i + k + 2]);
            r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
            r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
        }
    for (int k = 0; k < 4; k++)
        for (int half = 0; half < 2; half++) { /* of each, the blocks 0 and 2, and 1 and 3 */
            const __m512 a = r[8 * half + k], b = r[8 * half + k + 4];
            t[8 * half + k] = _mm512_shuffle_f32x4(a, b, 0x88);
            t[8 * half + k + 4] = _mm512_shuffle_f32x4(a, b, 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_f32x4(t[k], t[k + 8], 0xdd);
    }
}

/* G w G^T of 16 output channels and one input channel, whose taps lie `next` numbers apart. */
static void transform_weight(const float *taps, int64_t next, int64_t plane, float *to) {
    __m512 rows[3][PATCH], w[3], u[PATCH];
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 3; k++) w[k] = _mm512_loadu_ps(taps + (3 * i + k) * next);
        weight_to_points(w, rows[i]);
    }
    for (int k = 0; k < PATCH; k++) {
        for (int i = 0; i < 3; i++) w[i] = rows[i][k];
        weight_to_points(w, u);
        for (int i = 0; i < PATCH; i++) _mm512_storeu_ps(to + (i * PATCH + k) * plane, u[i]);
    }
}

/* `rows` tiles by 32 columns, summed over the channels, onto what is `known` (a mask, all or none).
 * `rows` is a constant of each copy below. */
INLINE void multiply(int rows, const float *patches, int64_t step, const float *weights,
                     float *products, int64_t in, __mmask16 known) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        sums[r][0] = _mm512_maskz_loadu_ps(known, products + r * PANEL);
        sums[r][1] = _mm512_maskz_loadu_ps(known, products + r * PANEL + LANES);
    }
    for (int64_t c = 0; c < in; c += LANES, patches += step)
        for (int k = 0; k < LANES; k++, weights += PANEL) {
            const __m512 left = _mm512_loadu_ps(weights), right = _mm512_loadu_ps(weights + LANES);
#pragma GCC unroll 14
            for (int r = 0; r < rows; r++) {
                const __m512 value = _mm512_set1_ps(patches[r * LANES + k]);
                sums[r][0] = _mm512_fmadd_ps(value, left, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(value, right, sums[r][1]);
            }
        }
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(products + r * PANEL, sums[r][0]);
        _mm512_storeu_ps(products + r * PANEL + LANES, sums[r][1]);
    }
}

typedef void Multiply(const float *, int64_t, const float *, float *, int64_t, __mmask16);
#define MULTIPLY(rows)                                                                    \
    static void multiply_##rows(const float *patches, int64_t step, const float *weights, \
                                float *products, int64_t in, __mmask16 known) {           \
        multiply(rows, patches, step, weights, products, in, known);                      \
    }
MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5) MULTIPLY(6) MULTIPLY(7)
MULTIPLY(8) MULTIPLY(9) MULTIPLY(10) MULTIPLY(11) MULTIPLY(12) MULTIPLY(13) MULTIPLY(14)
static Multiply *const multiply_rows[ROWS] = {
    multiply_1, multiply_2, multiply_3,  multiply_4,  multiply_5,  multiply_6,  multiply_7,
    multiply_8, multiply_9, multiply_10, multiply_11, multiply_12, multiply_13, multiply_14};

/* One point's product of `count` tiles with one panel, in groups of nearly equal size. */
static void multiply_panel(const Job *job, int64_t count, const float *patches,
                           const float *weights, float *products, int64_t in, __mmask16 known) {
    for (int64_t groups = parts(count, ROWS), done = 0; groups > 0; groups--) {
        const int64_t rows = parts(count - done, groups);
        multiply_rows[rows - 1](patches + done * LANES, job->tiles * LANES, weights,
                                products + done * PANEL, in, known);
        done += rows;
    }
}

/* All points' products of `count` tiles with `columns`, of channels `first` to `last`. */
static void multiply_points(const Job *job, int64_t count, int64_t columns, const float *patches,
                            const float *weights, float *products, int64_t first, int64_t last) {
    for (int64_t point = 0; point < POINTS; point++)
        for (int64_t column = 0; column < columns; column += PANEL)
            multiply_panel(job, count, patches + point * patch_plane(job) + first * job->tiles,
                           weights + point * weight_plane(job) + column * job->in,
                           products + point * product_plane(job) + column * job->tiles,
                           last - first, first ? 0xffff : 0);
}

typedef struct {
    Weight weight;
    float *packed;
    int64_t out;
} Packing;

#define NAME(x) x##_f32
#define ELEMENT float
#include "winograd.h"
#undef NAME
#undef ELEMENT
#define NAME(x) x##_bf16
#define ELEMENT uint16_t
#include "winograd.h"
