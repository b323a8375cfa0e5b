/* Flash attention (Dao et al., 2022) for one type of numbers; attention.c includes it for each.
 *
 * All loops run over dwords: a pair of bfloat16 or one float32. A "depth" is one dword of a head's
 * row, a "unit" one dword of keys in the second product. The including file defines:
 *   NAME(x)             x with the type's suffix
 *   TARGET              the attribute of the instructions it needs
 *   PAIR                numbers in a dword: 2 or 1
 *   ELEMENT             one number
 *   MULTIPLY(s, a, b)   s + a b, in float32 lanes
 *   MULTIPLY_HALF       the same for half a vector
 *   EXP2(t)             2^t, for t <= 0
 *   STORE_P(p, e0, e1)  two vectors of probabilities, as numbers
 *   STORE_OUT(o, mask, x)   a vector of sums, as numbers where the mask says so
 *   pack_row            a unit of values (a function)
 */

/* scores[8 rows][16 width keys] = queries . keys; `peak` follows the rows' greatest. `last` is what
 * the last vector starts from: minus infinity where there is no key. */
TARGET INLINE void NAME(scores)(int width, const uint32_t *q, const uint32_t *keys, long depths,
                                __m512 last, float *scores, __m512 *peak) {
    __m512 sum[ROWS][3];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int w = 0; w < width; w++)
            sum[r][w] = w == width - 1 ? last : _mm512_setzero_ps();
    for (long i = 0; i < depths; i++, q += LANES, keys += LANES * width) {
        __m512i key[3];
        UNROLL for (int w = 0; w < width; w++) key[w] = _mm512_load_si512(keys + LANES * w);
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512i query = _mm512_set1_epi32((int)q[r]);
            UNROLL for (int w = 0; w < width; w++) sum[r][w] = MULTIPLY(sum[r][w], query, key[w]);
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        __m512 top = peak[r];
        UNROLL for (int w = 0; w < width; w++) {
            top = _mm512_max_ps(top, sum[r][w]);
            _mm512_store_ps(scores + r * SCORE_ROW + LANES * w, sum[r][w]);
        }
        peak[r] = top;
    }
}

/* The scores of 8 rows with `count` keys, a tile after the other. */
TARGET static void NAME(all_scores)(const uint32_t *q, const uint32_t *keys, long depths,
                                    long count, float *scores, __m512 *peak) {
    const __m512 zero = _mm512_setzero_ps();
    for (; count > 0; count -= TILE, scores += TILE, keys += TILE * depths) {
        long vectors = (count + LANES - 1) / LANES;
        __mmask16 there = first_lanes(count - (vectors - 1) * LANES);
        __m512 last = _mm512_mask_blend_ps(there, _mm512_set1_ps(-INFINITY), zero);
        if (vectors >= 3)
            NAME(scores)(3, q, keys, depths, count >= TILE ? zero : last, scores, peak);
        else if (vectors == 2)
            NAME(scores)(2, q, keys, depths, last, scores, peak);
        else
            NAME(scores)(1, q, keys, depths, last, scores, peak);
    }
}

/* p[row][key] = 2^(c score - shift); returns lanes of the row's sum. */
TARGET INLINE __m512 NAME(probabilities)(const float *scores, long vectors, float c, float shift,
                                        uint32_t *p) {
    const __m512 factor = _mm512_set1_ps(c), offset = _mm512_set1_ps(shift);
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    ELEMENT *to = (ELEMENT *)p;
    for (long j = 0; j < vectors; j += 2) {
        /* The buffer's vector after an odd last one holds no score, and nobody reads its p. */
        __m512 s0 = _mm512_load_ps(scores + j * LANES);
        __m512 s1 = _mm512_load_ps(scores + j * LANES + LANES);
        __m512 e0 = EXP2(_mm512_fmsub_ps(s0, factor, offset));
        __m512 e1 = EXP2(_mm512_fmsub_ps(s1, factor, offset));
        sum0 = _mm512_add_ps(sum0, e0);
        sum1 = _mm512_mask_add_ps(sum1, j + 1 < vectors ? 0xffff : 0, sum1, e1);
        STORE_P(to + j * LANES, e0, e1);
    }
    return _mm512_add_ps(sum0, sum1);
}

/* o[8 rows][16 full + 8 half columns] = o keep + p . values; o is not read the `first` time. */
TARGET INLINE void NAME(products)(int full, int half, const uint32_t *p, const uint32_t *values,
                                  long row, long units, const float *keep, int first, float *o) {
    __m512 sum[ROWS][3];
    __m256 rest[ROWS];
    const __mmask16 known = first ? 0 : 0xffff;
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int w = 0; w < full; w++) sum[r][w] = _mm512_setzero_ps();
        rest[r] = _mm256_setzero_ps();
    }
    for (long i = 0; i < units; i++, p++, values += row) {
        __m512i value[3];
        __m256i end;
        UNROLL for (int w = 0; w < full; w++) value[w] = _mm512_load_si512(values + LANES * w);
        if (half) end = _mm256_load_si256((const __m256i *)(values + LANES * full));
        UNROLL for (int r = 0; r < ROWS; r++) {
            __m512i weight = _mm512_set1_epi32((int)p[r * SCORE_ROW / PAIR]);
            UNROLL for (int w = 0; w < full; w++)
                sum[r][w] = MULTIPLY(sum[r][w], weight, value[w]);
            if (half) rest[r] = MULTIPLY_HALF(rest[r], _mm512_castsi512_si256(weight), end);
        }
    }
    /* Block by block and not one running sum, whose rounding would grow with the keys. */
    UNROLL for (int r = 0; r < ROWS; r++, o += row) {
        __m512 k = _mm512_set1_ps(keep[r]);
        UNROLL for (int w = 0; w < full; w++) {
            __m512 before = _mm512_maskz_load_ps(known, o + LANES * w);
            _mm512_store_ps(o + LANES * w, _mm512_fmadd_ps(k, before, sum[r][w]));
        }
        if (half) {
            __m256 before = _mm256_maskz_load_ps((__mmask8)known, o + LANES * full);
            before = _mm256_fmadd_ps(_mm512_castps512_ps256(k), before, rest[r]);
            _mm256_store_ps(o + LANES * full, before);
        }
    }
}

/* All columns of `products`: three vectors at a time, the last ones shared out evenly. */
TARGET static void NAME(all_products)(const uint32_t *p, const uint32_t *values, long halves,
                                      long row, long units, const float *keep, int first,
                                      float *o) {
    while (halves > 0) {
        long now = halves <= 6 ? halves : halves < 10 ? 4 : 6;
        switch (now) {
        case 1: NAME(products)(0, 1, p, values, row, units, keep, first, o); break;
        case 2: NAME(products)(1, 0, p, values, row, units, keep, first, o); break;
        case 3: NAME(products)(1, 1, p, values, row, units, keep, first, o); break;
        case 4: NAME(products)(2, 0, p, values, row, units, keep, first, o); break;
        case 5: NAME(products)(2, 1, p, values, row, units, keep, first, o); break;
        default: NAME(products)(3, 0, p, values, row, units, keep, first, o);
        }
        halves -= now, values += 8 * now, o += 8 * now;
    }
}

/* `count` keys enter the sums of 8 rows: the online softmax. `first`: nothing has entered yet. */
TARGET static void NAME(enter)(const struct job *job, const struct scratch *s, long rows, int first,
                               const uint32_t *q, const uint32_t *keys, const uint32_t *values,
                               long count) {
    const __m256 nothing = _mm256_set1_ps(-INFINITY);
    __m512 lanes[ROWS];
    float keep[ROWS] __attribute__((aligned(32))), shift[ROWS] __attribute__((aligned(32)));
    long vectors = (count + LANES - 1) / LANES;

    for (int r = 0; r < ROWS; r++) lanes[r] = _mm512_set1_ps(-INFINITY);
    NAME(all_scores)(q, keys, job->depths, count, s->scores, lanes);
    __m256 old = first ? nothing : _mm256_load_ps(s->top + rows);
    __m256 top = _mm256_max_ps(old, _mm256_mul_ps(_mm256_set1_ps(job->c), greatest_of(lanes)));
    /* Only minus infinity yet: weights of 0 and not NaN. */
    __mmask8 some = _mm256_cmp_ps_mask(top, nothing, _CMP_NEQ_UQ);
    __m256 offset = _mm256_maskz_mov_ps(some, top);
    __m512 fade = EXP2(_mm512_castps256_ps512(_mm256_sub_ps(old, offset)));
    _mm256_store_ps(s->top + rows, top);
    _mm256_store_ps(shift, offset);
    _mm256_store_ps(keep, _mm512_castps512_ps256(fade));
    for (int r = 0; r < ROWS; r++)
        lanes[r] = NAME(probabilities)(s->scores + r * SCORE_ROW, vectors, job->c, shift[r],
                                       s->p + r * SCORE_ROW / PAIR);
    __m256 total = first ? _mm256_setzero_ps() : _mm256_load_ps(s->total + rows);
    total = _mm256_fmadd_ps(total, _mm512_castps512_ps256(fade), sum_of(lanes));
    _mm256_store_ps(s->total + rows, total);
    NAME(all_products)(s->p, values, job->d / 8, job->row, (count + PAIR - 1) / PAIR, keep, first,
                       s->o + rows * job->row);
}

/* Rows [first, first + rows) of a head: the sums over the totals. */
TARGET static void NAME(write)(const struct job *job, const struct scratch *s, long head,
                               long first, long rows) {
    long width = job->heads * job->d;
    long row = head / job->heads * job->n + first;
    ELEMENT *out = (ELEMENT *)job->out + row * width + head % job->heads * job->d;
    for (long r = 0; r < rows; r++, out += width) {
        __m512 scale = _mm512_set1_ps(1.0f / s->total[r]);
        for (long i = 0; i < job->d; i += LANES) {
            __m512 sum = _mm512_load_ps(s->o + r * job->row + i);
            STORE_OUT(out + i, first_lanes(job->d - i), _mm512_mul_ps(scale, sum));
        }
    }
}

/* One item: a group of query rows of one head, against all keys. */
TARGET static void NAME(group)(void *context, long item, int thread) {
    const struct job *job = context;
    const struct scratch scratch = scratch_of(job, thread), *s = &scratch;
    long head = item / job->groups, first = item % job->groups * job->group;
    long rows = job->n - first < job->group ? job->n - first : job->group;
    const ELEMENT *q = (const ELEMENT *)job->q + offset_of(job, head, job->q_batch);
    const uint32_t *keys = job->keys + head * job->key_size;
    const uint32_t *values = job->values + head * job->value_size;

    for (long r = 0; r < rows; r += LANES)
        transpose(s->q + r * job->depths, LANES, q + (first + r) * job->q_row,
                  job->q_row * (long)sizeof(ELEMENT), rows - r, job->depths);
    for (long m = 0; m < job->m; m += job->block) {
        long count = job->m - m < job->block ? job->m - m : job->block;
        for (long r = 0; r < rows; r += ROWS)
            NAME(enter)
            (job, s, r, m == 0, s->q + r / LANES * LANES * job->depths + r % LANES,
             keys + m * job->depths, values + m / PAIR * job->row, count);
    }
    NAME(write)(job, s, head, first, rows);
}

/* One item: a block of keys and values of one head, laid out for the two products. */
TARGET static void NAME(pack)(void *context, long item, int thread) {
    const struct job *job = context;
    long head = item / job->blocks, first = item % job->blocks * job->block;
    long count = job->m - first < job->block ? job->m - first : job->block;
    const ELEMENT *k = (const ELEMENT *)job->k + offset_of(job, head, job->k_batch);
    const ELEMENT *v = (const ELEMENT *)job->v + offset_of(job, head, job->v_batch);
    uint32_t *keys = job->keys + head * job->key_size + first * job->depths;
    uint32_t *values = job->values + head * job->value_size + first / PAIR * job->row;
    (void)thread;

    for (long tile = 0; tile < count; tile += TILE) {
        long left = count - tile;
        long width = left >= TILE ? TILE : (left + LANES - 1) / LANES * LANES;
        for (long w = 0; w < width; w += LANES)
            transpose(keys + tile * job->depths + w, width, k + (first + tile + w) * job->k_row,
                      job->k_row * (long)sizeof(ELEMENT), left - w, job->depths);
    }
    for (long j = 0; j < count; j += PAIR, values += job->row)
        NAME(pack_row)
        (values, v + (first + j) * job->v_row, j + 1 < count ? job->v_row : 0, job->d);
}

/* `call`: addresses of out, q, k, v; batch, heads, N, M, D; strides in numbers of q, k, v, for
 * batch and row each. 1 where there is no memory. */
TARGET FEWSTEP_EXPORT int NAME(fewstep_attention)(const int64_t *call, float scale, int threads) {
    struct job job;
    if (plan(&job, call, scale, threads, PAIR)) return 1;
    parallel_for(job.batch * job.heads * job.blocks, threads, NAME(pack), &job);
    parallel_for(job.batch * job.heads * job.groups, threads, NAME(group), &job);
    workspace_release(job.memory);
    return 0;
}

#undef NAME
#undef TARGET
#undef PAIR
#undef ELEMENT
#undef MULTIPLY
#undef MULTIPLY_HALF
#undef EXP2
#undef STORE_P
#undef STORE_OUT
