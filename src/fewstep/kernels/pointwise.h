/* Norms and GEGLU for one type of numbers; pointwise.c includes it once for each. */

/* The sums of one part of a picture. */
TARGET static void NAME(sum_part)(void *context, long item, int thread) {
    (void)thread;
    const struct norm *n = context;
    long picture = item / n->parts, part = item % n->parts, channels = n->channels;
    const ELEMENT *x = (const ELEMENT *)n->x + picture * n->pixels * channels;
    long begin = part * n->part, end = begin + n->part < n->pixels ? begin + n->part : n->pixels;
    double *sum = n->sums + 2 * item * channels, *squares = sum + channels;
    memset(sum, 0, sizeof(double) * 2 * channels);
    for (long block = begin; block < end; block += BLOCK) {
        long last = block + BLOCK < end ? block + BLOCK : end;
        for (long c = 0; c < channels; c += LANES) {
            __mmask16 mask = TAIL(channels - c);
            __m512 first = NAME(load)(x + c, mask);
            __m512 s = _mm512_setzero_ps(), q = _mm512_setzero_ps();
            for (long p = block; p < last; p++) {
                __m512 d = _mm512_sub_ps(NAME(load)(x + p * channels + c, mask), first);
                s = _mm512_add_ps(s, d);
                q = _mm512_fmadd_ps(d, d, q);
            }
            float ss[LANES], qq[LANES];
            _mm512_storeu_ps(ss, s);
            _mm512_storeu_ps(qq, q);
            for (long i = 0; i < LANES && c + i < channels; i++) {
                sum[c + i] += ss[i];
                squares[c + i] += qq[i];
            }
        }
    }
}

/* One part of a picture, normed. */
TARGET static void NAME(norm_part)(void *context, long item, int thread) {
    (void)thread;
    const struct norm *n = context;
    long picture = item / n->parts, part = item % n->parts, channels = n->channels;
    const ELEMENT *x = (const ELEMENT *)n->x + picture * n->pixels * channels;
    ELEMENT *y = (ELEMENT *)n->y + picture * n->pixels * channels;
    long begin = part * n->part, end = begin + n->part < n->pixels ? begin + n->part : n->pixels;
    const float *factor = n->factor + picture * 2 * channels, *offset = factor + channels;
    for (long p = begin; p < end; p++)
        for (long c = 0; c < channels; c += LANES) {
            __mmask16 mask = TAIL(channels - c);
            __m512 v = NAME(load)(x + p * channels + c, mask);
            v = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, factor + c),
                                _mm512_maskz_loadu_ps(mask, offset + c));
            NAME(store)(y + p * channels + c, mask, n->silu ? silu(v) : v);
        }
}

/* y (B, pixels, C) of x: normed by groups of channels, then SiLU if asked. Not 0: no memory. */
TARGET FEWSTEP_EXPORT int NAME(fewstep_group_norm)(
    void *y, const void *x, const float *weight, const float *bias, int64_t pictures,
    int64_t pixels, int64_t channels, int64_t groups, double eps, int then_silu, int threads) {
    struct norm n = {x, y, weight, bias, pixels, channels, groups, 0, 0, then_silu, eps, 0, 0};
    n.part = (PART / channels + BLOCK - 1) / BLOCK * BLOCK;
    if (n.part < BLOCK) n.part = BLOCK;
    n.parts = (pixels + n.part - 1) / n.part;
    size_t doubles = (size_t)pictures * n.parts * 2 * channels, floats = (size_t)pictures * 3 * channels;
    double *memory = workspace_take(doubles * sizeof(double) + floats * sizeof(float));
    if (!memory) return 1;
    n.sums = memory;
    n.factor = (float *)(memory + doubles);
    float *first = n.factor + pictures * 2 * channels;
    parallel_for(pictures * n.parts, threads, NAME(sum_part), &n);
    for (long b = 0; b < pictures; b++) {
        for (long c = 0; c < channels; c += LANES) {
            __mmask16 mask = TAIL(channels - c);
            const ELEMENT *row = (const ELEMENT *)x + b * pixels * channels;
            _mm512_mask_storeu_ps(first + b * channels + c, mask, NAME(load)(row + c, mask));
        }
        finish(&n, b, first + b * channels);
    }
    parallel_for(pictures * n.parts, threads, NAME(norm_part), &n);
    workspace_release(memory);
    return 0;
}

struct NAME(gated) {
    ELEMENT *y;
    const ELEMENT *x;
    long rows, width, part;
};

TARGET static void NAME(geglu_part)(void *context, long item, int thread) {
    (void)thread;
    const struct NAME(gated) *g = context;
    long end = (item + 1) * g->part < g->rows ? (item + 1) * g->part : g->rows;
    for (long r = item * g->part; r < end; r++) {
        const ELEMENT *x = g->x + 2 * r * g->width;
        ELEMENT *y = g->y + r * g->width;
        for (long c = 0; c < g->width; c += LANES) {
            __mmask16 mask = TAIL(g->width - c);
            __m512 h = NAME(load)(x + c, mask), gate = NAME(load)(x + g->width + c, mask);
            NAME(store)(y + c, mask, _mm512_mul_ps(h, gelu(gate)));
        }
    }
}

/* y (rows, width) = h gelu(gate), of x (rows, 2 width) = (h, gate). */
TARGET FEWSTEP_EXPORT void NAME(fewstep_geglu)(void *y, const void *x, int64_t rows, int64_t width,
                                               int threads) {
    struct NAME(gated) g = {y, x, rows, width, PART / (2 * width) + 1};
    parallel_for((rows + g.part - 1) / g.part, threads, NAME(geglu_part), &g);
}
