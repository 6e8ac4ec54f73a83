/* Queries, keys and values of attention from one product: norms over their widths, rotation of halves, heads before rows.

   Query heads are `heads`, key and value heads `shared`; each has two halves of `half` channels. Sums over rows are as in
   norms.c. */

#include "vector.h"

/* Rows [sample][head][row][channel]: steps in floats, 1 between channels. */
typedef struct {
    float *start;
    long sample, head, row;
} rows;

/* A call (kernels/plain.py). */
typedef struct {
    float *qkv;                                     /* (batch, length, (heads + 2 shared) 2 half) */
    rows q, k, v;                                   /* or their gradients */
    const float *q_gain, *q_bias, *k_gain, *k_bias; /* of the norms, or none */
    const float *cosine, *sine;                     /* (length, half), or one for each sample, `apart` floats apart */
    float *stats;                                   /* (batch, length, 2, 2) or none: mean and 1 / deviation of q, k */
    float *dqkv, *dnorms, *sums;                    /* backward: of qkv, of the norms or none, room for these */
    long apart, batch, length, heads, shared, half, normed, threads;
    float eps;
} call;

INLINE float *of(rows x, long sample, long row) { return x.start + sample * x.sample + row * x.row; }

INLINE vec affine(vec x, vec mean, vec rstd, const float *gain, const float *bias, long n) {
    x = (x - mean) * rstd;
    return gain ? x * load_some(gain, n) + load_some(bias, n) : x;
}

/* A row's heads x, one after the other -> turned, at `to` and from there `step` apart. */
INLINE void turn(const float *x, long heads, const float *gain, const float *bias, const float *cosine,
                 const float *sine, float *to, long step, float *stats, int normed, float eps, long half) {
    float mean = 0, rstd = 1;
    if (normed) moments(x, heads * 2 * half, eps, &mean, &rstd);
    if (stats) stats[0] = mean, stats[1] = rstd;
    for (long head = 0; head < heads; head++, to += step)
        for (long i = 0; i < half; i += WIDTH) {
            long n = half - i, low = head * 2 * half + i, high = low + half;
            vec a = load_some(x + low, n), b = load_some(x + high, n);
            if (normed) {
                a = affine(a, all(mean), all(rstd), gain ? gain + low : 0, bias + low, n);
                b = affine(b, all(mean), all(rstd), gain ? gain + high : 0, bias + high, n);
            }
            vec c = load_some(cosine + i, n), s = load_some(sine + i, n);
            store_some(to + i, a * c - b * s, n), store_some(to + half + i, b * c + a * s, n);
        }
}

/* What one vector of channels gives: the gradients of gain and bias, and what its norm's gradient sums up. */
INLINE vec through_gain(vec d, const float *x, vec mean, vec rstd, const float *gain, float *dgain, float *dbias, vec *s,
                        vec *t, long n) {
    vec normal = (load_some(x, n) - mean) * rstd;
    if (dgain) {
        store_some(dgain, load_some(dgain, n) + d * normal, n);
        store_some(dbias, load_some(dbias, n) + d, n);
    }
    if (gain) d *= load_some(gain, n);
    *s += d, *t += d * normal;
    return d;
}

/* Their gradient dx from that of `turn`'s results; dgain, dbias: added to, or none. */
INLINE void turn_back(const float *from, long step, const float *x, long heads, const float *gain, const float *cosine,
                      const float *sine, const float *stats, float *dx, float *dgain, float *dbias, int normed,
                      long half) {
    vec mean = {}, rstd = {}, s = {}, t = {};
    if (normed) mean = all(stats[0]), rstd = all(stats[1]);
    for (long head = 0; head < heads; head++, from += step)
        for (long i = 0; i < half; i += WIDTH) {
            long n = half - i, low = head * 2 * half + i, high = low + half;
            vec a = load_some(from + i, n), b = load_some(from + half + i, n);
            vec cos = load_some(cosine + i, n), sin = load_some(sine + i, n);
            vec da = a * cos + b * sin, db = b * cos - a * sin;
            if (normed) {
                float *g = dgain ? dgain + low : 0, *h = dgain ? dgain + high : 0;
                da = through_gain(da, x + low, mean, rstd, gain ? gain + low : 0, g, dbias + low, &s, &t, n);
                db = through_gain(db, x + high, mean, rstd, gain ? gain + high : 0, h, dbias + high, &s, &t, n);
            }
            store_some(dx + low, da, n), store_some(dx + high, db, n);
        }
    if (!normed) return;
    long width = heads * 2 * half;
    vec over = all(1.0f / width), s_mean = all(sum(s)) * over, t_mean = all(sum(t)) * over;
    for (long i = 0; i < width; i += WIDTH) {
        long n = width - i;
        vec normal = (load_some(x + i, n) - mean) * rstd;
        store_some(dx + i, rstd * (load_some(dx + i, n) - s_mean - normal * t_mean), n);
    }
}

INLINE void split_row(const call *c, long sample, long row, long half) {
    long head_dim = 2 * half, each = sample * c->length + row, turned = sample * c->apart + row * half;
    const float *q = c->qkv + each * (c->heads + 2 * c->shared) * head_dim;
    const float *k = q + c->heads * head_dim, *v = k + c->shared * head_dim;
    const float *cosine = c->cosine + turned, *sine = c->sine + turned;
    float *stats = c->stats ? c->stats + each * 4 : 0, *to = of(c->v, sample, row);
    turn(q, c->heads, c->q_gain, c->q_bias, cosine, sine, of(c->q, sample, row), c->q.head, stats, c->normed, c->eps,
         half);
    turn(k, c->shared, c->k_gain, c->k_bias, cosine, sine, of(c->k, sample, row), c->k.head, stats ? stats + 2 : 0,
         c->normed, c->eps, half);
    for (long head = 0; head < c->shared; head++, v += head_dim, to += c->v.head)
        memcpy(to, v, sizeof(float) * head_dim);
}

INLINE void split_row_back(const call *c, long sample, long row, float *sums, long half) {
    long head_dim = 2 * half, each = sample * c->length + row, turned = sample * c->apart + row * half;
    long wide = c->heads * head_dim, narrow = c->shared * head_dim, start = each * (wide + 2 * narrow);
    const float *q = c->qkv + start, *cosine = c->cosine + turned, *sine = c->sine + turned;
    const float *stats = c->stats + each * 4, *from = of(c->v, sample, row);
    float *dq = c->dqkv + start, *dk = dq + wide, *dv = dk + narrow, *k_sums = sums ? sums + 2 * wide : 0;
    turn_back(of(c->q, sample, row), c->q.head, q, c->heads, c->q_gain, cosine, sine, stats, dq, sums, sums + wide,
              c->normed, half);
    turn_back(of(c->k, sample, row), c->k.head, q + wide, c->shared, c->k_gain, cosine, sine, stats + 2, dk, k_sums,
              k_sums + narrow, c->normed, half);
    for (long head = 0; head < c->shared; head++, from += c->v.head, dv += head_dim)
        memcpy(dv, from, sizeof(float) * head_dim);
}

/* Calls with the usual widths known to the compiler. */
#define WITH_HALF(function, ...)                       \
    switch (c->half) {                                 \
    case 8: function(__VA_ARGS__, 8); break;           \
    case 16: function(__VA_ARGS__, 16); break;         \
    case 32: function(__VA_ARGS__, 32); break;         \
    default: function(__VA_ARGS__, c->half);           \
    }

void rotated_heads(const call *c) {
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1)
    for (long each = 0; each < c->batch * c->length; each++) {
        long sample = each / c->length, row = each % c->length;
        WITH_HALF(split_row, c, sample, row)
    }
}

/* dnorms: of q's gain, q's bias, k's gain, k's bias, one after the other. */
void rotated_heads_backward(const call *c) {
    long all_rows = c->batch * c->length, blocks = (all_rows + BLOCK - 1) / BLOCK;
    long n = 2 * (c->heads + c->shared) * 2 * c->half;
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1)
    for (long block = 0; block < blocks; block++) {
        float *sums = c->sums ? c->sums + block * n : 0;
        if (sums) memset(sums, 0, sizeof(float) * n);
        for (long each = block * BLOCK; each < least((block + 1) * BLOCK, all_rows); each++) {
            long sample = each / c->length, row = each % c->length;
            WITH_HALF(split_row_back, c, sample, row, sums)
        }
    }
    if (c->dnorms) add_up(c->sums, blocks, n, n, c->dnorms);
}
