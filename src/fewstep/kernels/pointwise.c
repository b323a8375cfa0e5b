/* Group normalisation (Wu & He 2018) with SiLU, and GEGLU (Shazeer 2020), of rows of channels.
 *
 * Sums are taken in float32 over BLOCK pixels, of what lies beyond the picture's first pixel, and
 * in float64 beyond that: PyTorch's own sums for channels last lose three digits on large pictures.
 * Neither the number of threads nor the rest of the batch changes a bit. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "export.h"
#include "gates.h"
#include "parallel.h"
#include "workspace.h"

#define LANES 16
#define BLOCK 32
#define PART 65536 /* numbers of an item of work, about */

/* ── numbers in memory and in registers ── */

#define TAIL(count) ((__mmask16)((count) >= LANES ? 0xffff : (1u << (count)) - 1))

INLINE __m512 load_f32(const float *p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

INLINE void store_f32(float *p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }

INLINE __m512 load_bf16(const uint16_t *p, __mmask16 mask) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

__attribute__((target("avx512bf16"))) INLINE void store_bf16(uint16_t *p, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* ── the work, for each type of numbers ── */

struct norm {
    const void *x;
    void *y;
    const float *weight, *bias; /* (C) */
    long pixels, channels, groups, part, parts; /* of one picture: pixels of a part, parts */
    int silu;
    double eps;
    double *sums;  /* (B, parts, 2, C): of what lies beyond the first pixel, and of its squares */
    float *factor; /* (B, 2, C): y = x factor + offset */
};

/* Mean and deviation of each group become a factor and an offset of each channel. */
static void finish(const struct norm *n, long picture, const float *first) {
    long width = n->channels / n->groups;
    const double *sums = n->sums + picture * n->parts * 2 * n->channels;
    float *factor = n->factor + picture * 2 * n->channels, *offset = factor + n->channels;
    for (long g = 0; g < n->groups; g++) {
        double mean = 0, spread = 0;
        for (int pass = 0; pass < 2; pass++)
            for (long c = g * width; c < (g + 1) * width; c++) {
                double sum = 0, squares = 0;
                for (long p = 0; p < n->parts; p++) {
                    sum += sums[2 * p * n->channels + c];
                    squares += sums[(2 * p + 1) * n->channels + c];
                }
                double own = first[c] + sum / n->pixels;
                if (pass == 0)
                    mean += own / width;
                else
                    spread += squares - sum * sum / n->pixels +
                              n->pixels * (own - mean) * (own - mean);
            }
        double variance = spread / ((double)n->pixels * width);
        double scale = 1.0 / sqrt((variance > 0 ? variance : spread != spread ? spread : 0) + n->eps);
        for (long c = g * width; c < (g + 1) * width; c++) {
            double w = n->weight ? n->weight[c] : 1.0;
            factor[c] = (float)(scale * w);
            offset[c] = (float)((n->bias ? n->bias[c] : 0.0) - mean * scale * w);
        }
    }
}

#define NAME(x) x##_f32
#define ELEMENT float
#define TARGET
#include "pointwise.h"
#undef NAME
#undef ELEMENT
#undef TARGET
#define NAME(x) x##_bf16
#define ELEMENT uint16_t
#define TARGET __attribute__((target("avx512bf16")))
#include "pointwise.h"
