/* Winograd's convolution of tensors of one type; winograd.c includes it once for each. */

/* Sixteen numbers in a row of each of 16 output channels: (16, 16) floats, the outputs last. */
INLINE void NAME(turn)(const ELEMENT *values, int64_t next_out, int64_t ahead, float *to) {
    __m512 rows[LANES];
    for (int l = 0; l < LANES; l++) {
        rows[l] = NAME(load)(values + l * next_out);
        /* sixteen distant rows at once are too many to be foreseen */
        __builtin_prefetch(values + l * next_out + ahead);
    }
    transpose(rows);
    for (int l = 0; l < LANES; l++) _mm512_storeu_ps(to + l * LANES, rows[l]);
}

/* G w G^T of the 32 output channels from `column` and the input channels `first` to `last`:
 * (36, last - first, 32), a plane from one point to the next. */
static void NAME(transform_panel)(const Weight *weight, int64_t column, int64_t first, int64_t last,
                                  int64_t plane, float *to) {
    const int64_t next_out = 9 * weight->in, apart = weight->next_tap > 1;
    const int64_t next_in = apart ? 1 : 9, next_run = apart ? weight->next_tap : LANES;
    float taps[9 * LANES * LANES]; /* of 16 channels, as they lie in the weight */
    for (int64_t c = first; c < last; c += LANES)
        for (int64_t l = 0; l < PANEL; l += LANES) {
            const ELEMENT *values = weight->values;
            values += (column + l) * next_out + c * next_in;
            for (int64_t run = 0; run < 9; run++)
                NAME(turn)(values + run * next_run, next_out, LANES * next_in,
                           taps + run * LANES * LANES);
            for (int64_t k = 0; k < LANES; k++)
                transform_weight(taps + k * next_in * LANES, apart ? LANES * LANES : LANES, plane,
                                 to + (c - first + k) * PANEL + l);
        }
}

/* Where the 36 pixels of a patch lie; those outside the picture are `zeros`. */
static void NAME(locate)(const Job *job, int64_t tile, const ELEMENT *zeros,
                         const ELEMENT *pixels[POINTS]) {
    const int64_t image = tile / (wide(job) * high(job));
    const int64_t top = tile / wide(job) % high(job) * TILE - 1, left = tile % wide(job) * TILE - 1;
    for (int64_t p = 0; p < POINTS; p++) {
        const int64_t row = top + p / PATCH, column = left + p % PATCH;
        const int inside = row >= 0 && row < job->height && column >= 0 && column < job->width;
        const int64_t pixel = (image * job->height + row) * job->width + column;
        pixels[p] = inside ? (const ELEMENT *)job->x + pixel * job->in : zeros;
    }
}

/* B^T d B of a patch, all channels. What the patch to the right adds is fetched meanwhile. */
static void NAME(transform_patch)(const Job *job, const ELEMENT *pixels[POINTS], float *patches) {
    const int64_t plane = patch_plane(job);
    for (int64_t c = 0; c < job->in; c += LANES, patches += job->tiles * LANES) {
        __m512 rows[PATCH][PATCH], d[PATCH], v[PATCH];
        for (int i = 0; i < PATCH; i++) {
            for (int k = 0; k < PATCH; k++) {
                const ELEMENT *pixel = pixels[i * PATCH + k] + c;
                d[k] = NAME(load)(pixel);
                if (k >= PATCH - TILE) __builtin_prefetch(pixel + TILE * job->in, 0, 2);
            }
            to_points(d, rows[i]);
        }
        for (int k = 0; k < PATCH; k++) {
            for (int i = 0; i < PATCH; i++) d[i] = rows[i][k];
            to_points(d, v);
            for (int i = 0; i < PATCH; i++)
                _mm512_storeu_ps(patches + (i * PATCH + k) * plane, v[i]);
        }
    }
}

/* A^T m A of 16 columns of a tile, and what is added to it, to the tile's place in the picture. */
static void NAME(transform_product)(const Job *job, int64_t tile, int64_t column,
                                    const float *products) {
    const int64_t image = tile / (wide(job) * high(job)), plane = product_plane(job);
    const int64_t top = tile / wide(job) % high(job) * TILE, left = tile % wide(job) * TILE;
    const int64_t height = least(TILE, job->height - top), width = least(TILE, job->width - left);
    const ELEMENT *bias = job->bias, *shift = job->shift, *residual = job->residual;
    __m512 rows[TILE][PATCH], m[PATCH], y[TILE], constant = _mm512_setzero_ps();
    if (bias) constant = NAME(load)(bias + column);
    if (shift)
        constant = _mm512_add_ps(constant, NAME(load)(shift + image * job->out + column));
    for (int k = 0; k < PATCH; k++) {
        for (int i = 0; i < PATCH; i++) m[i] = _mm512_loadu_ps(products + (i * PATCH + k) * plane);
        from_points(m, y);
        for (int i = 0; i < TILE; i++) rows[i][k] = y[i];
    }
    for (int64_t i = 0; i < height; i++) {
        int64_t at = ((image * job->height + top + i) * job->width + left) * job->out + column;
        from_points(rows[i], y);
        for (int64_t k = 0; k < width; k++, at += job->out) {
            __m512 value = _mm512_add_ps(y[k], constant);
            if (residual) value = _mm512_add_ps(value, NAME(load)(residual + at));
            __builtin_prefetch((ELEMENT *)job->y + at + TILE * job->out, 1, 2);
            NAME(store)((ELEMENT *)job->y + at, value);
        }
    }
}

/* Columns `from` to `to` of `count` tiles whose patches are transformed. */
static void NAME(finish)(const Job *job, int64_t first, int64_t count, int64_t from, int64_t to,
                         const float *patches, float *products, float *weights) {
    if (job->packed)
        multiply_points(job, count, to - from, patches, job->packed + from * job->in, products, 0,
                        job->in);
    for (int64_t c = 0; !job->packed && c < job->in; c += CHUNK) {
        const int64_t last = least(c + CHUNK, job->in);
        NAME(transform_panel)(&job->weight, from, c, last, weight_plane(job), weights);
        multiply_points(job, count, to - from, patches, weights, products, c, last);
    }
    for (int64_t tile = 0; tile < count; tile++)
        for (int64_t c = 0; c < to - from; c += LANES)
            NAME(transform_product)(job, first + tile, from + c,
                                    products + c / PANEL * PANEL * job->tiles + tile * PANEL +
                                        c % PANEL);
}

/* One block of tiles and one share of the columns. */
static void NAME(convolve)(void *context, long item, int thread) {
    const Job *job = context;
    const int64_t total = job->batch * high(job) * wide(job), block = item % job->blocks;
    const int64_t first = total * block / job->blocks;
    const int64_t count = total * (block + 1) / job->blocks - first;
    const int64_t from = item / job->blocks * job->share, to = least(job->out, from + job->share);
    float *zeros = job->scratch + thread * scratch_floats(job);
    float *patches = zeros + job->in, *products = patches + POINTS * patch_plane(job);
    float *weights = products + POINTS * product_plane(job);
    memset(zeros, 0, (size_t)job->in * sizeof(float));
    for (int64_t tile = 0; tile < count; tile++) {
        const ELEMENT *pixels[POINTS];
        NAME(locate)(job, first + tile, (const ELEMENT *)zeros, pixels);
        NAME(transform_patch)(job, pixels, patches + tile * LANES);
    }
    for (int64_t column = from; column < to; column += job->columns)
        NAME(finish)(job, first, count, column, least(to, column + job->columns), patches, products,
                     weights);
}

/* y (B, H, W, out) = conv3x3(x (B, H, W, in)) + bias (out) + shift (B, out) + residual (as y).
 *
 * Each of the last three may be NULL. The weights are `packed`, or NULL and `weight`, contiguous
 * (next_tap 1) or channels last (next_tap `in`). `in` is a multiple of 16; out, columns and share
 * are of 32. All tiles are parted into `blocks` of at most `tiles`, all columns into shares: a
 * block and a share are one item of a thread's work, done `columns` at a time, 32 without
 * `packed`. Returns the floats of scratch that each thread needs, and does nothing else where
 * scratch is NULL. */
FEWSTEP_EXPORT int64_t NAME(fewstep_winograd)(
    const void *x, const float *packed, const void *weight, const void *bias, const void *shift,
    const void *residual, void *y, float *scratch, int64_t next_tap, int64_t batch, int64_t height,
    int64_t width, int64_t in, int64_t out, int64_t blocks, int64_t tiles, int64_t columns,
    int64_t share, int64_t threads) {
    Job job = {x, bias, shift, residual, y, packed, scratch, {weight, in, next_tap},
               batch, height, width, in, out, blocks, tiles, columns, share};
    if (scratch)
        parallel_for((long)(blocks * parts(out, share)), (int)threads, NAME(convolve), &job);
    return scratch_floats(&job);
}

static void NAME(pack)(void *context, long item, int thread) {
    const Packing *p = context;
    const int64_t in = p->weight.in;
    (void)thread;
    NAME(transform_panel)(&p->weight, item * PANEL, 0, in, in * p->out,
                          p->packed + item * PANEL * in);
}

/* The weights above, (36, out / 32, in, 32) in float32, of a weight (out, in, 3, 3). */
FEWSTEP_EXPORT void NAME(fewstep_winograd_weights)(const void *weight, float *packed,
                                                   int64_t next_tap, int64_t in, int64_t out,
                                                   int64_t threads) {
    Packing packing = {{weight, in, next_tap}, packed, out};
    parallel_for((long)(out / PANEL), (int)threads, NAME(pack), &packing);
}
