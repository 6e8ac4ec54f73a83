/* Queries, keys and values of attention from one product: norms of heads, rotation of pairs, heads before rows. */

#include "vector.h"

typedef uint64_t pairs __attribute__((vector_size(4 * WIDTH)));

INLINE vec swap_pairs(vec x) { return (vec)(((pairs)x >> 32) | ((pairs)x << 32)); }

/* turn (2 n), n pairs of cosine and sine -> (c, c) and (-s, s) for each. */
INLINE void spread(const float *turn, float *cosine, float *sine, long head_dim) {
    for (long i = 0; i < head_dim; i += 2) {
        cosine[i] = cosine[i + 1] = turn[i];
        sine[i] = -turn[i + 1], sine[i + 1] = turn[i + 1];
    }
}

INLINE void row_heads(const float *x, const float *gain, const float *bias, const float *cosine, const float *sine,
                      float *to, long step, float *stats, long heads, long head_dim, float eps) {
    for (long head = 0; head < heads; head++, x += head_dim, to += step) {
        float mean, rstd;
        moments(x, head_dim, eps, &mean, &rstd);
        if (stats) stats[2 * head] = mean, stats[2 * head + 1] = rstd;
        for (long i = 0; i < head_dim; i += WIDTH) {
            long n = head_dim - i;
            vec v = (load_some(x + i, n) - all(mean)) * all(rstd) * load_some(gain + i, n) + load_some(bias + i, n);
            store_some(to + i, v * load_some(cosine + i, n) + swap_pairs(v) * load_some(sine + i, n), n);
        }
    }
}

INLINE void row_heads_backward(const float *dto, long step, const float *x, const float *gain, const float *cosine,
                               const float *sine, const float *stats, float *dx, float *dgain, float *dbias,
                               long heads, long head_dim) {
    for (long head = 0; head < heads; head++, x += head_dim, dx += head_dim, dto += step) {
        vec mean = all(stats[2 * head]), rstd = all(stats[2 * head + 1]), s = {}, t = {};
        for (long i = 0; i < head_dim; i += WIDTH) {
            long n = head_dim - i;
            vec d = load_some(dto + i, n), normal = (load_some(x + i, n) - mean) * rstd;
            d = d * load_some(cosine + i, n) - swap_pairs(d) * load_some(sine + i, n);
            if (dgain) {
                store_some(dbias + i, load_some(dbias + i, n) + d, n);
                store_some(dgain + i, load_some(dgain + i, n) + d * normal, n);
            }
            d *= load_some(gain + i, n);
            store_some(dx + i, d, n);
            s += d, t += d * normal;
        }
        vec over = all(1.0f / head_dim), s_mean = all(sum(s)) * over, t_mean = all(sum(t)) * over;
        for (long i = 0; i < head_dim; i += WIDTH) {
            long n = head_dim - i;
            vec normal = (load_some(x + i, n) - mean) * rstd;
            store_some(dx + i, rstd * (load_some(dx + i, n) - s_mean - normal * t_mean), n);
        }
    }
}

/* Calls with the usual width known to the compiler. */
#define WITH_WIDTH(function, ...) (head_dim == 64 ? function(__VA_ARGS__, 64) : function(__VA_ARGS__, head_dim))

INLINE void row_forward(const float *x, const float *q_gain, const float *q_bias, const float *k_gain,
                        const float *k_bias, const float *cosine, const float *sine, float *q, float *k, float *v,
                        long q_step, long step, float *stats, long heads, float eps, long head_dim) {
    long wide = heads * head_dim;
    if (q) row_heads(x, q_gain, q_bias, cosine, sine, q, q_step, stats, heads, head_dim, eps);
    row_heads(x + wide, k_gain, k_bias, cosine, sine, k, step, stats ? stats + 2 * heads : NULL, heads, head_dim, eps);
    for (long head = 0; head < heads; head++)
        memcpy(v + head * step, x + 2 * wide + head * head_dim, sizeof(float) * head_dim);
}

INLINE void row_backward(const float *dq, const float *dk, const float *dv, long q_step, long step, const float *x,
                         const float *q_gain, const float *k_gain, const float *cosine, const float *sine,
                         const float *stats, float *dx, float *dnorms, long heads, long head_dim) {
    long wide = heads * head_dim;
    float *dk_norm = dnorms ? dnorms + 2 * head_dim : NULL;
    if (dq)
        row_heads_backward(dq, q_step, x, q_gain, cosine, sine, stats, dx, dnorms, dnorms ? dnorms + head_dim : NULL,
                           heads, head_dim);
    else memset(dx, 0, sizeof(float) * wide);
    row_heads_backward(dk, step, x + wide, k_gain, cosine, sine, stats + 2 * heads, dx + wide, dk_norm,
                       dk_norm ? dk_norm + head_dim : NULL, heads, head_dim);
    for (long head = 0; head < heads; head++)
        memcpy(dx + 2 * wide + head * head_dim, dv + head * step, sizeof(float) * head_dim);
}

/* qkv (batch, rows, 3, heads, head_dim) -> k, v (batch, heads, rows, head_dim), q without the first `skip` rows.

   Gains and biases (head_dim) are those of the norms; turn (rows, head_dim) or, with turn_stride, one for each of the
   batch: cosine and sine of each pair; stats (batch, rows, 2, heads, 2) or none: mean and 1 / deviation. */
void split_heads(const float *qkv, const float *q_gain, const float *q_bias, const float *k_gain, const float *k_bias,
                 const float *turn, long turn_stride, float *q, float *k, float *v, float *stats, long batch,
                 long rows, long skip, long heads, long head_dim, float eps, long threads) {
    long step = rows * head_dim, q_step = (rows - skip) * head_dim;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long each = 0; each < batch * rows; each++) {
        long sample = each / rows, row = each % rows;
        float cosine[head_dim], sine[head_dim];
        spread(turn + sample * turn_stride + row * head_dim, cosine, sine, head_dim);
        float *to = row < skip ? NULL : q + sample * heads * q_step + (row - skip) * head_dim;
        long at = sample * heads * step + row * head_dim;
        WITH_WIDTH(row_forward, qkv + each * 3 * heads * head_dim, q_gain, q_bias, k_gain, k_bias, cosine, sine, to,
                   k + at, v + at, q_step, step, stats ? stats + each * 4 * heads : NULL, heads, eps);
    }
}

/* Its gradient dqkv; sums (threads, 2, 4, head_dim) or none, zero at first: the gradients of q's gain and bias and of
   k's for each thread, and room. */
void split_heads_backward(const float *dq, const float *dk, const float *dv, const float *qkv, const float *q_gain,
                          const float *k_gain, const float *turn, long turn_stride, const float *stats, float *dqkv,
                          float *sums, long batch, long rows, long skip, long heads, long head_dim, long threads) {
    long step = rows * head_dim, q_step = (rows - skip) * head_dim, all_rows = batch * rows;
    long share = (all_rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *total = sums + thread * 8 * head_dim, *aside = sums ? total + 4 * head_dim : NULL;
        long end = least((thread + 1) * share, all_rows);
        for (long each = thread * share; each < end; each++) {
            long sample = each / rows, row = each % rows, at = sample * heads * step + row * head_dim;
            float cosine[head_dim], sine[head_dim];
            spread(turn + sample * turn_stride + row * head_dim, cosine, sine, head_dim);
            const float *of = row < skip ? NULL : dq + sample * heads * q_step + (row - skip) * head_dim;
            WITH_WIDTH(row_backward, of, dk + at, dv + at, q_step, step, qkv + each * 3 * heads * head_dim, q_gain,
                       k_gain, cosine, sine, stats + each * 4 * heads, dqkv + each * 3 * heads * head_dim, aside, heads);
            if (!sums || (each % BLOCK != BLOCK - 1 && each != end - 1)) continue;
            flush(total, aside, 4 * head_dim);
        }
    }
}
