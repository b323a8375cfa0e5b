/* The range of many numbers, and their 8-bit codes: round(x / scale) + zero (Jacob et al. 2018). */
#include <immintrin.h>
#include <stdint.h>

#include "export.h"
#include "parallel.h"

#define LANES 16
#define PART 65536 /* numbers of an item of work */
#define PARTS 256  /* at most */
#define INLINE static inline __attribute__((always_inline))
#define TAIL(count) ((__mmask16)((count) >= LANES ? 0xffff : (1u << (count)) - 1))

struct numbers {
    const void *x;
    uint8_t *y;
    int64_t count, part;
    float inverse, *ranges; /* (2, PARTS) */
    int zero;
};

static int64_t parts_of(struct numbers *n) {
    int64_t parts = (n->count + PART - 1) / PART;
    if (parts > PARTS) parts = PARTS;
    n->part = ((n->count + parts - 1) / parts + LANES - 1) / LANES * LANES;
    return (n->count + n->part - 1) / n->part;
}

#define WORK(suffix, type, load)                                                                 \
    static void range_part_##suffix(void *context, long item, int thread) {                      \
        (void)thread;                                                                            \
        const struct numbers *n = context;                                                       \
        const type *x = n->x;                                                                    \
        int64_t i = item * n->part, end = i + n->part < n->count ? i + n->part : n->count;       \
        __m512 low = load(x + i, 0xffff & TAIL(end - i)), high = low;                            \
        __mmask16 odd = 0;                                                                       \
        if (end - i < LANES) low = high = _mm512_set1_ps(_mm512_cvtss_f32(low));                 \
        for (; i < end; i += LANES) {                                                            \
            __mmask16 mask = TAIL(end - i);                                                      \
            __m512 v = load(x + i, mask);                                                        \
            odd |= _mm512_mask_cmp_ps_mask(mask, v, v, _CMP_UNORD_Q);                            \
            low = _mm512_mask_min_ps(low, mask, low, v);                                         \
            high = _mm512_mask_max_ps(high, mask, high, v);                                      \
        }                                                                                        \
        n->ranges[item] = odd ? __builtin_nanf("") : _mm512_reduce_min_ps(low);                  \
        n->ranges[PARTS + item] = odd ? __builtin_nanf("") : _mm512_reduce_max_ps(high);         \
    }                                                                                            \
                                                                                                 \
    /* range (2): the smallest and the largest of x (count > 0), both NaN if one is. */          \
    FEWSTEP_EXPORT void fewstep_range_##suffix(float *range, const void *x, int64_t count,       \
                                               int threads) {                                    \
        float ranges[2 * PARTS];                                                                 \
        struct numbers n = {x, 0, count, 0, 0, ranges, 0};                                       \
        int64_t parts = parts_of(&n);                                                            \
        parallel_for(parts, threads, range_part_##suffix, &n);                                   \
        float low = ranges[0], high = ranges[PARTS];                                             \
        for (int64_t i = 1; i < parts; i++) {                                                    \
            if (!(low <= ranges[i])) low = low == low ? ranges[i] : low;                         \
            if (!(high >= ranges[PARTS + i])) high = high == high ? ranges[PARTS + i] : high;    \
        }                                                                                        \
        range[0] = low;                                                                          \
        range[1] = high;                                                                         \
    }                                                                                            \
                                                                                                 \
    static void codes_part_##suffix(void *context, long item, int thread) {                      \
        (void)thread;                                                                            \
        const struct numbers *n = context;                                                       \
        const type *x = n->x;                                                                    \
        int64_t i = item * n->part, end = i + n->part < n->count ? i + n->part : n->count;       \
        __m512 inverse = _mm512_set1_ps(n->inverse);                                             \
        __m512i zero = _mm512_set1_epi32(n->zero), none = _mm512_setzero_si512();                \
        for (; i < end; i += LANES) {                                                            \
            __mmask16 mask = TAIL(end - i);                                                      \
            __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(load(x + i, mask), inverse));           \
            v = _mm512_max_epi32(_mm512_add_epi32(v, zero), none);                               \
            _mm_mask_storeu_epi8(n->y + i, mask, _mm512_cvtusepi32_epi8(v));                     \
        }                                                                                        \
    }                                                                                            \
                                                                                                 \
    /* y (count): the codes of x. */                                                             \
    FEWSTEP_EXPORT void fewstep_codes_##suffix(uint8_t *y, const void *x, int64_t count,         \
                                               float inverse, int zero, int threads) {           \
        struct numbers n = {x, y, count, 0, inverse, 0, zero};                                   \
        parallel_for(parts_of(&n), threads, codes_part_##suffix, &n);                            \
    }

INLINE __m512 load_f32(const float *p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

INLINE __m512 load_bf16(const uint16_t *p, __mmask16 mask) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

WORK(f32, float, load_f32)
WORK(bf16, uint16_t, load_bf16)
