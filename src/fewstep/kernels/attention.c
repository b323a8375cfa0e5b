/* Attention for AVX-512: softmax(q k^T scale) v, without the N x M matrix. Loops: flash.h.
 *
 * Keys and values are laid out anew once per call; 8 query rows meet 48 keys in registers. Scores
 * of 8 rows and a block of keys stay in the L1 cache between the two products. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "parallel.h"
#include "workspace.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LANES 16                /* float32 in a vector */
#define ROWS 8                  /* query rows in registers */
#define TILE 48                 /* keys in registers: ROWS x 3 sums */
#define BLOCK 384               /* keys between two looks at the greatest score */
#define SCORE_ROW (BLOCK + 32)  /* not a power of two: rows in different sets of the cache */
#define GROUP 64                /* query rows of an item at most */

struct scratch {
    float *scores; /* (ROWS, SCORE_ROW) */
    uint32_t *p;   /* (ROWS, SCORE_ROW / PAIR) */
    uint32_t *q;   /* (GROUP / LANES, depths, LANES) */
    float *o;      /* (GROUP, row) */
    float *top;    /* (GROUP): the greatest score so far, times c */
    float *total;  /* (GROUP): the sum of the weights so far */
};

struct job {
    const void *q, *k, *v;
    void *out, *memory;
    long batch, heads, n, m, d;                           /* numbers of a head: d */
    long q_batch, q_row, k_batch, k_row, v_batch, v_row;  /* strides in numbers */
    float c;                                              /* scale log2(e) */
    long depths, row;                                     /* dwords of a key, of a row of values */
    long block, blocks, group, groups;
    long key_size, value_size;                            /* dwords of a head */
    uint32_t *keys, *values;
    char *scratch;
    size_t scratch_size;
};

/* The mask of the first `count` lanes, all where there are more. */
INLINE __mmask16 first_lanes(long count) {
    return (__mmask16)(count >= LANES ? 0xffff : (1u << count) - 1);
}

INLINE long offset_of(const struct job *job, long head, long batch_stride) {
    return head / job->heads * batch_stride + head % job->heads * job->d;
}

INLINE struct scratch scratch_of(const struct job *job, int thread) {
    struct scratch s;
    s.scores = (float *)(job->scratch + (size_t)thread * job->scratch_size);
    s.p = (uint32_t *)(s.scores + ROWS * SCORE_ROW);
    s.q = s.p + ROWS * SCORE_ROW;
    s.o = (float *)(s.q + GROUP * job->depths);
    s.top = s.o + GROUP * job->row;
    s.total = s.top + GROUP;
    return s;
}

/* Sizes, and the memory of a call; 1 where there is none. */
static int plan(struct job *job, const int64_t *call, float scale, int threads, int pair) {
    job->out = (void *)call[0];
    job->q = (const void *)call[1], job->k = (const void *)call[2], job->v = (const void *)call[3];
    job->batch = call[4], job->heads = call[5];
    job->n = call[6], job->m = call[7], job->d = call[8];
    job->q_batch = call[9], job->q_row = call[10], job->k_batch = call[11], job->k_row = call[12];
    job->v_batch = call[13], job->v_row = call[14];
    job->c = scale * 1.44269504f;
    job->depths = job->d / pair;
    job->row = (job->d + LANES - 1) / LANES * LANES;
    job->block = job->d > 256 ? 3 * TILE : BLOCK; /* K and V of a block stay in the L2 cache */
    job->blocks = (job->m + job->block - 1) / job->block;
    /* Enough items for every thread; rows do not meet, so that sums are the same for any group. */
    job->group = GROUP;
    while (job->group > LANES &&
           job->batch * job->heads * ((job->n + job->group - 1) / job->group) < 8L * threads)
        job->group /= 2;
    job->groups = (job->n + job->group - 1) / job->group;
    job->key_size = (job->m + LANES - 1) / LANES * LANES * job->depths;
    job->value_size = (job->m + pair - 1) / pair * job->row;

    size_t packed = (size_t)(job->batch * job->heads * (job->key_size + job->value_size)) * 4;
    job->scratch_size = (size_t)(2 * ROWS * SCORE_ROW + GROUP * (job->depths + job->row + 2)) * 4;
    job->memory = workspace_take(packed + (size_t)threads * job->scratch_size);
    if (!job->memory) return 1;
    job->keys = job->memory;
    job->values = job->keys + job->batch * job->heads * job->key_size;
    job->scratch = (char *)(job->values + job->batch * job->heads * job->value_size);
    return 0;
}

/* to[depth][16 rows] = from[row][depth] in dwords, `row` bytes from row to row; 0 for rows that are
 * not there. `step` dwords from depth to depth. */
static void transpose(uint32_t *to, long step, const void *from, long row, long rows, long depths) {
    for (long d = 0; d < depths; d += LANES) {
        __mmask16 there = first_lanes(depths - d);
        __m512i a[16], b[16];
        UNROLL for (int r = 0; r < 16; r++)
            a[r] = _mm512_maskz_loadu_epi32(r < rows ? there : 0,
                                            (const char *)from + (r < rows ? r : 0) * row + d * 4);
        UNROLL for (int r = 0; r < 16; r += 2) {
            b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
            b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        }
        /* a[4g + i]: in its quarter j, depth 4j + i of the rows 4g .. 4g + 3 */
        UNROLL for (int g = 0; g < 16; g += 4) {
            a[g] = _mm512_unpacklo_epi64(b[g], b[g + 2]);
            a[g + 1] = _mm512_unpackhi_epi64(b[g], b[g + 2]);
            a[g + 2] = _mm512_unpacklo_epi64(b[g + 1], b[g + 3]);
            a[g + 3] = _mm512_unpackhi_epi64(b[g + 1], b[g + 3]);
        }
        UNROLL for (int i = 0; i < 4; i++) {
            __m512i x = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
            __m512i y = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
            __m512i z = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
            __m512i t = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
            b[i] = _mm512_shuffle_i32x4(x, y, 0x88), b[8 + i] = _mm512_shuffle_i32x4(x, y, 0xdd);
            b[4 + i] = _mm512_shuffle_i32x4(z, t, 0x88);
            b[12 + i] = _mm512_shuffle_i32x4(z, t, 0xdd);
        }
        UNROLL for (int i = 0; i < 16; i++)
            if (i < depths - d) _mm512_store_si512(to + (d + i) * step, b[i]);
    }
}

/* 2^t = 2^floor(t) times a polynomial of the rest in [0, 1), of least relative error. NaN stays NaN
 * and minus infinity gives 0: `max` returns its second operand where there is a NaN. (VREDUCEPS
 * would save two instructions and takes Zen 4 twice the time of all the others.) */
#define FLOOR(t) _mm512_roundscale_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)
#define STEP(constant) y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(constant))

/* Relative error 8e-5: bfloat16 rounds by up to 2e-3. */
INLINE __m512 exp2_short(__m512 t) {
    t = _mm512_max_ps(_mm512_set1_ps(-200.0f), t);
    __m512 x = _mm512_sub_ps(t, FLOOR(t)), y = _mm512_set1_ps(0.0780245215f);
    STEP(0.226067156f), STEP(0.695833564f), STEP(0.999925196f);
    return _mm512_scalef_ps(y, t);
}

/* Relative error 1.5e-7. */
INLINE __m512 exp2_long(__m512 t) {
    t = _mm512_max_ps(_mm512_set1_ps(-200.0f), t);
    __m512 x = _mm512_sub_ps(t, FLOOR(t)), y = _mm512_set1_ps(0.00186713028f);
    STEP(0.00901702978f), STEP(0.0557999127f), STEP(0.240164444f), STEP(0.693151295f), STEP(1.0f);
    return _mm512_scalef_ps(y, t);
}

/* Eight vectors to the greatest, or the sum, of each. */
#define EIGHT_TO_ONE(name, op)                                                                 \
    INLINE __m256 name(const __m512 *x) {                                                      \
        __m256 a[8];                                                                           \
        UNROLL for (int i = 0; i < 8; i++)                                                     \
            a[i] = op(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));          \
        UNROLL for (int i = 0; i < 8; i += 2)                                                  \
            a[i] = op(_mm256_unpacklo_ps(a[i], a[i + 1]), _mm256_unpackhi_ps(a[i], a[i + 1])); \
        UNROLL for (int i = 0; i < 8; i += 4)                                                  \
            a[i] = op(_mm256_shuffle_ps(a[i], a[i + 2], 0x44),                                 \
                      _mm256_shuffle_ps(a[i], a[i + 2], 0xee));                                \
        return op(_mm256_permute2f128_ps(a[0], a[4], 0x20),                                    \
                  _mm256_permute2f128_ps(a[0], a[4], 0x31));                                   \
    }
EIGHT_TO_ONE(greatest_of, _mm256_max_ps)
EIGHT_TO_ONE(sum_of, _mm256_add_ps)

#define BF16 __attribute__((target("avx512bf16")))

/* Two rows of values as one of pairs; `next` numbers to the second row, 0 where there is none. */
static void pack_row_bf16(uint32_t *to, const uint16_t *from, long next, long d) {
    for (long i = 0; i < d; i += LANES) {
        __mmask16 there = first_lanes(d - i);
        __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + i));
        __m512i odd = _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(next ? there : 0, from + next + i));
        _mm512_store_si512(to + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

#define NAME(x) x##_bf16
#define TARGET BF16
#define PAIR 2
#define ELEMENT uint16_t
#define MULTIPLY(s, a, b) _mm512_dpbf16_ps(s, (__m512bh)(a), (__m512bh)(b))
#define MULTIPLY_HALF(s, a, b) _mm256_dpbf16_ps(s, (__m256bh)(a), (__m256bh)(b))
#define EXP2 exp2_short
#define STORE_P(p, e0, e1) _mm512_store_si512(p, (__m512i)_mm512_cvtne2ps_pbh(e1, e0))
#define STORE_OUT(o, mask, x) _mm256_mask_storeu_epi16(o, mask, (__m256i)_mm512_cvtneps_pbh(x))
#include "flash.h"

static void pack_row_f32(uint32_t *to, const float *from, long next, long d) {
    (void)next;
    for (long i = 0; i < d; i += LANES)
        _mm512_store_si512(to + i, _mm512_maskz_loadu_epi32(first_lanes(d - i), from + i));
}

#define NAME(x) x##_f32
#define TARGET
#define PAIR 1
#define ELEMENT float
#define MULTIPLY(s, a, b) _mm512_fmadd_ps((__m512)(a), (__m512)(b), s)
#define MULTIPLY_HALF(s, a, b) _mm256_fmadd_ps((__m256)(a), (__m256)(b), s)
#define EXP2 exp2_long
#define STORE_P(p, e0, e1) (_mm512_store_ps(p, e0), _mm512_store_ps((p) + LANES, e1))
#define STORE_OUT(o, mask, x) _mm512_mask_storeu_ps(o, mask, x)
#include "flash.h"
