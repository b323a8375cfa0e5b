/* Linear layers, and 3x3 convolutions of small pictures, float32, by one matrix product.
 *
 * y = W p + bias + shift + plus for each row: p is a row of x, normed if asked (layer norm, Ba et
 * al. 2016), or the nine pixels that a convolution sees. A block of rows is laid out in the scratch
 * of one thread, [values / 16][rows][16]; the weights lie in panels of 32 outputs, [values][32],
 * and are read once for a block. They are float32 or, where that loses nothing, float16.
 *
 * Every output is one sum over its values in their order, so neither the blocks nor the threads nor
 * the other rows change a bit of it. */
#include <immintrin.h>
#include <stdint.h>

#include "export.h"
#include "gates.h"
#include "parallel.h"
#include "workspace.h"

#define LANES 16
#define PANEL 32
#define ROWS 14            /* 2 * 14 sums, 2 of weights and 1 of values: 31 of 32 registers */
#define BLOCK (1 << 17)    /* values of a block of rows: half a megabyte, of the L2 cache */
#define WORTH (1L << 20)   /* products of a thread */

/* A packed weight; `out` before the gate. */
typedef struct {
    const char *weights;
    int64_t in, out, gated, half;
} Panels;

typedef struct {
    const Panels *panels;
    float *y;
    const float *x, *bias, *shift, *plus, *norm_weight, *norm_bias;
    int64_t rows;
    int64_t height, width, high, wide;  /* of a picture and of its result; 0: no convolution */
    int64_t stride;
    float eps;
    int64_t blocks, block, share;       /* rows of the largest block, panels of a share */
    float *scratch;
    int64_t scratch_floats;
} Job;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
static int64_t taps(const Job *job) { return job->height ? 9 : 1; }
static int64_t values(const Job *job) { return taps(job) * parts(job->panels->in, LANES) * LANES; }
INLINE __mmask16 first_lanes(int64_t count) {
    return (__mmask16)(count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

/* ── rows ── */

/* One row, or one pixel of a row, at `to`; NULL is a pixel outside the picture. */
INLINE void lay(const Job *job, const float *from, float *to) {
    for (int64_t c = 0; c < job->panels->in; c += LANES, to += job->block * LANES) {
        const __mmask16 there = from ? first_lanes(job->panels->in - c) : 0;
        _mm512_store_ps(to, _mm512_maskz_loadu_ps(there, from + c));
    }
}

static void lay_normed(const Job *job, const float *from, float *to) {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int64_t c = 0; c < job->panels->in; c += LANES)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(job->panels->in - c), from + c));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)job->panels->in);
    for (int64_t c = 0; c < job->panels->in; c += LANES) {
        const __mmask16 there = first_lanes(job->panels->in - c);
        const __m512 d = _mm512_maskz_sub_ps(there, _mm512_maskz_loadu_ps(there, from + c), mean);
        squares = _mm512_fmadd_ps(d, d, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / (float)job->panels->in;
    const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f),
                                       _mm512_sqrt_ps(_mm512_set1_ps(variance + job->eps)));
    for (int64_t c = 0; c < job->panels->in; c += LANES, to += job->block * LANES) {
        const __mmask16 there = first_lanes(job->panels->in - c);
        const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(there, from + c), mean);
        const __m512 weight = _mm512_maskz_loadu_ps(there, job->norm_weight + c);
        const __m512 bias = _mm512_maskz_loadu_ps(there, job->norm_bias + c);
        _mm512_store_ps(to, _mm512_maskz_fmadd_ps(there, _mm512_mul_ps(d, scale), weight, bias));
    }
}

/* The nine pixels that a convolution with padding 1 sees. */
static void lay_pixels(const Job *job, int64_t row, float *to) {
    const int64_t image = row / (job->high * job->wide);
    const int64_t top = row / job->wide % job->high * job->stride - 1;
    const int64_t left = row % job->wide * job->stride - 1;
    const int64_t step = parts(job->panels->in, LANES) * job->block * LANES;
    for (int64_t tap = 0; tap < 9; tap++, to += step) {
        const int64_t r = top + tap / 3, c = left + tap % 3;
        const int inside = r >= 0 && r < job->height && c >= 0 && c < job->width;
        const int64_t pixel = (image * job->height + r) * job->width + c;
        lay(job, inside ? job->x + pixel * job->panels->in : 0, to);
    }
}

/* ── products ── */

INLINE __m512 weight_of(int half, const char *weights, int64_t place) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(weights + 2 * place)));
    return _mm512_loadu_ps(weights + 4 * place);
}

/* `rows` rows by 32 columns; `rows` and `half` are constants of each copy below. What lies `ahead`
 * is fetched meanwhile, one line for each value. */
INLINE void multiply(int rows, int half, const float *a, int64_t step, const char *weights,
                     const char *ahead, float *products, int64_t count) {
    __m512 sums[ROWS][2];
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += LANES, a += step)
        for (int k = 0; k < LANES; k++) {
            const __m512 left = weight_of(half, weights, 0);
            const __m512 right = weight_of(half, weights, LANES);
            weights += PANEL * (half ? 2 : 4);
            _mm_prefetch(ahead, _MM_HINT_T0);
            ahead += PANEL * (half ? 2 : 4);
#pragma GCC unroll 14
            for (int r = 0; r < rows; r++) {
                const __m512 value = _mm512_set1_ps(a[r * LANES + k]);
                sums[r][0] = _mm512_fmadd_ps(value, left, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(value, right, sums[r][1]);
            }
        }
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(products + r * PANEL, sums[r][0]);
        _mm512_store_ps(products + r * PANEL + LANES, sums[r][1]);
    }
}

typedef void Multiply(const float *, int64_t, const char *, const char *, float *, int64_t);
#define MULTIPLY(rows, half)                                                                   \
    static void multiply_##rows##_##half(const float *a, int64_t step, const char *weights,    \
                                         const char *ahead, float *products, int64_t count) {  \
        multiply(rows, half, a, step, weights, ahead, products, count);                        \
    }
#define ALL(half)                                                                              \
    MULTIPLY(1, half) MULTIPLY(2, half) MULTIPLY(3, half) MULTIPLY(4, half) MULTIPLY(5, half)  \
    MULTIPLY(6, half) MULTIPLY(7, half) MULTIPLY(8, half) MULTIPLY(9, half) MULTIPLY(10, half) \
    MULTIPLY(11, half) MULTIPLY(12, half) MULTIPLY(13, half) MULTIPLY(14, half)
ALL(0)
ALL(1)
#define NAMES(half)                                                                       \
    {multiply_1_##half,  multiply_2_##half,  multiply_3_##half,  multiply_4_##half,       \
     multiply_5_##half,  multiply_6_##half,  multiply_7_##half,  multiply_8_##half,       \
     multiply_9_##half,  multiply_10_##half, multiply_11_##half, multiply_12_##half,      \
     multiply_13_##half, multiply_14_##half}
static Multiply *const multiply_rows[2][ROWS] = {NAMES(0), NAMES(1)};

static const char *panel_of(const Job *job, int64_t panel) {
    return job->panels->weights + panel * values(job) * PANEL * (job->panels->half ? 2 : 4);
}

/* ── results ── */

/* 16 columns of a row and what is added to them. */
INLINE __m512 added(const Job *job, const float *products, int64_t row, int64_t column,
                    __mmask16 there) {
    __m512 sum = _mm512_load_ps(products);
    if (job->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, job->bias + column));
    if (job->shift) {
        const int64_t image = row / (job->high * job->wide);
        const float *shift = job->shift + image * job->panels->out + column;
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, shift));
    }
    if (job->plus) {
        const float *plus = job->plus + row * job->panels->out + column;
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, plus));
    }
    return sum;
}

static void finish(const Job *job, const float *products, int64_t row, int64_t rows,
                   int64_t panel) {
    const int64_t column = panel * PANEL, outputs = job->panels->out / 2;
    for (int64_t end = row + rows; row < end; row++, products += PANEL) {
        if (job->panels->gated) { /* 16 columns, and the 16 of their gates */
            const int64_t c = panel * LANES;
            const __mmask16 there = first_lanes(outputs - c);
            __m512 h = _mm512_load_ps(products), gate = _mm512_load_ps(products + LANES);
            if (job->bias) {
                h = _mm512_add_ps(h, _mm512_maskz_loadu_ps(there, job->bias + c));
                gate = _mm512_add_ps(gate, _mm512_maskz_loadu_ps(there, job->bias + outputs + c));
            }
            _mm512_mask_storeu_ps(job->y + row * outputs + c, there, _mm512_mul_ps(h, gelu(gate)));
            continue;
        }
        for (int64_t c = column, i = 0; i < PANEL; c += LANES, i += LANES) {
            const __mmask16 there = first_lanes(job->panels->out - c);
            if (!there) break;
            _mm512_mask_storeu_ps(job->y + row * job->panels->out + c, there,
                                  added(job, products + i, row, c, there));
        }
    }
}

/* One panel, of `count` rows in groups of nearly equal size. The first two groups fetch the next
 * panel, half of each line of 32 columns. */
static void multiply_panel(const Job *job, const float *laid, int64_t first, int64_t count,
                           int64_t panel) {
    float products[ROWS * PANEL] __attribute__((aligned(64)));
    const char *weights = panel_of(job, panel), *next = panel_of(job, panel + 1);
    const int64_t groups = parts(count, ROWS);
    for (int64_t group = 0, done = 0; group < groups; group++) {
        const int64_t rows = parts(count - done, groups - group);
        const int fetches = group < (job->panels->half ? 1 : 2) && groups > 1;
        const char *ahead = fetches ? next + 64 * group : weights;
        multiply_rows[job->panels->half][rows - 1](laid + done * LANES, job->block * LANES, weights,
                                                   ahead, products, values(job));
        finish(job, products, first + done, rows, panel);
        done += rows;
    }
}

/* One block of rows and one share of the panels. */
static void work(void *context, long item, int thread) {
    const Job *job = context;
    const int64_t block = item % job->blocks, from = item / job->blocks * job->share;
    const int64_t first = job->rows * block / job->blocks;
    const int64_t count = job->rows * (block + 1) / job->blocks - first;
    const int64_t to = least(parts(job->panels->out, PANEL), from + job->share);
    float *laid = job->scratch + thread * job->scratch_floats;
    for (int64_t r = 0; r < count; r++) {
        const float *row = job->x + (first + r) * job->panels->in;
        if (job->height)
            lay_pixels(job, first + r, laid + r * LANES);
        else if (job->norm_weight)
            lay_normed(job, row, laid + r * LANES);
        else
            lay(job, row, laid + r * LANES);
    }
    for (int64_t panel = from; panel < to; panel++) multiply_panel(job, laid, first, count, panel);
}

/* Blocks and shares, so that every thread has as much. */
static void part(Job *job, int threads) {
    const int64_t panels = parts(job->panels->out, PANEL), most = BLOCK / values(job);
    job->blocks = parts(job->rows, most > ROWS ? most : ROWS);
    job->share = panels;
    if (job->blocks >= threads)
        job->blocks = least(job->rows, parts(job->blocks, threads) * threads);
    else
        job->share = parts(panels, parts(threads, job->blocks));
    job->block = parts(job->rows, job->blocks);
    job->scratch_floats = job->block * values(job);
}

static int run(Job *job, int64_t threads) {
    if (!job->rows) return 0;
    threads = least(threads, 1 + job->rows * values(job) * job->panels->out / WORTH);
    part(job, (int)threads);
    job->scratch = workspace_take((size_t)(threads * job->scratch_floats) * sizeof(float));
    if (!job->scratch) return 1;
    const int64_t items = job->blocks * parts(parts(job->panels->out, PANEL), job->share);
    parallel_for((long)items, (int)threads, work, job);
    workspace_release(job->scratch);
    return 0;
}

/* y (rows, out) = x (rows, in) W' + bias (out) + plus (as y), x normed if there is `norm_weight`.
 * With gated panels y (rows, out / 2) = h gelu(gate) instead, h and gate the halves of that, each a
 * multiple of 16; then without `plus`. Any of bias and plus may be NULL. 1: no memory. */
FEWSTEP_EXPORT int fewstep_linear(float *y, const float *x, const Panels *panels, const float *bias,
                                  const float *plus, const float *norm_weight,
                                  const float *norm_bias, float eps, int64_t rows,
                                  int64_t threads) {
    Job job = {.y = y, .x = x, .panels = panels, .bias = bias, .plus = plus, .rows = rows,
               .norm_weight = norm_weight, .norm_bias = norm_bias, .eps = eps};
    return run(&job, threads);
}

/* y (count, rows, out) = x W', normed, of `count` weights of one size. */
FEWSTEP_EXPORT int fewstep_linears(float *y, const float *x, const Panels *const *panels,
                                   const float *norm_weight, const float *norm_bias, float eps,
                                   int64_t count, int64_t rows, int64_t threads) {
    for (int64_t i = 0; i < count; i++, y += rows * panels[0]->out)
        if (fewstep_linear(y, x, panels[i], 0, 0, norm_weight, norm_bias, eps, rows, threads))
            return 1;
    return 0;
}

/* y (B, high, wide, out) = x (B, height, width, in) convolved with padding 1, 3x3, or 1x1 if
 * `height` is 0, + bias (out) + shift (B, out) + plus (as y); any of these may be NULL. */
FEWSTEP_EXPORT int fewstep_convolution(float *y, const float *x, const Panels *panels,
                                       const float *bias, const float *shift, const float *plus,
                                       int64_t rows, int64_t height, int64_t width, int64_t high,
                                       int64_t wide, int64_t stride, int64_t threads) {
    Job job = {.y = y, .x = x, .panels = panels, .bias = bias, .shift = shift, .plus = plus,
               .rows = rows, .height = height, .width = width, .high = high, .wide = wide,
               .stride = stride};
    return run(&job, threads);
}
