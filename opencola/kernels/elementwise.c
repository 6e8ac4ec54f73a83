/* GELU in its tanh form, and the norm, modulation and gated residual of an adaptive block, each in one pass.

   Sums over rows are kept for every thread: `sums` has one part for each, zero at first, which the caller adds up. Within
   a part, up to BLOCK rows are summed aside before they are added, so that the error does not grow with all the rows. */

#include "vector.h"

/* to += x */
INLINE void add(float *to, vec x, long n) { store_some(to, load_some(to, n) + x, n); }

/* y = gelu(x + bias): x, y (rows, width); bias (width) or none. */
void gelu(const float *x, const float *bias, float *y, long rows, long width, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < width; i += WIDTH) {
            vec v = load_some(x + row * width + i, width - i);
            if (bias) v += load_some(bias + i, width - i);
            store_some(y + row * width + i, v * gelu_gate(v), width - i);
        }
}

/* dx = dy gelu'(x + bias); sums (threads, 2, width) or none: the sum of dx over rows, and room. */
void gelu_backward(const float *dy, const float *x, const float *bias, float *dx, float *sums, long rows, long width,
                   long threads) {
    long share = (rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *total = sums + thread * 2 * width, *aside = total + width;
        long end = least((thread + 1) * share, rows);
        for (long row = thread * share; row < end; row++) {
            for (long i = 0; i < width; i += WIDTH) {
                long at = row * width + i, n = width - i;
                vec v = load_some(x + at, n);
                if (bias) v += load_some(bias + i, n);
                vec s = gelu_gate(v);
                vec slope = all(1.5957691216f) + all(0.2140644488f) * v * v; /* of 2 u in x */
                vec d = load_some(dy + at, n) * (s + v * s * (all(1.0f) - s) * slope);
                store_some(dx + at, d, n);
                if (sums) add(aside + i, d, n);
            }
            if (sums && (row % BLOCK == BLOCK - 1 || row == end - 1)) flush(total, aside, width);
        }
    }
}

/* The residual h += gate (y + bias), and u = norm(h) (1 + scale) + shift of it.

   h, y, out, u (rows, width), out = h where there is no y; bias (width) or none; gate, shift, scale (M, width) with a
   stride from row to row, of which a row takes the one at its index, or all the first where index is none; either half is
   left out where its y or u is none; stats (rows, 2) or none: mean and 1 / deviation. */
void residual_norm(const float *h, const float *y, const float *bias, const float *gate, long gate_stride, float *out,
                   const float *shift, const float *scale, long stride, const int64_t *index, float *u, float *stats,
                   long rows, long width, float eps, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        long at = row * width, m = index ? index[row] : 0;
        const float *x = h + at;
        if (y) {
            const float *g = gate + m * gate_stride;
            for (long i = 0; i < width; i += WIDTH) {
                long n = width - i;
                vec v = load_some(y + at + i, n);
                if (bias) v += load_some(bias + i, n);
                store_some(out + at + i, load_some(x + i, n) + load_some(g + i, n) * v, n);
            }
            x = out + at;
        }
        if (!u) continue;
        float mean, rstd;
        moments(x, width, eps, &mean, &rstd);
        if (stats) stats[2 * row] = mean, stats[2 * row + 1] = rstd;
        const float *a = scale + m * stride, *b = shift + m * stride;
        normalise(x, mean, rstd, a, b, u + at, width);
    }
}

/* Its gradients: dh of the h that came in, dy unless none. dout, du: of what came out, either none; out, stats: from
   there. sums (threads, 4, M + 1, width) or none: of shift, scale, gate, and the dh of each index; and room. */
void residual_norm_backward(const float *dout, const float *du, const float *out, const float *stats,
                            const float *scale, long stride, const float *y, const float *bias, const float *gate,
                            long gate_stride, const int64_t *index, float *dh, float *dy, float *sums, long count,
                            long rows, long width, long threads) {
    long share = (rows + threads - 1) / threads, part = (count + 1) * width;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        float *total = sums + thread * 4 * part, *aside = total + count * width;
        long end = least((thread + 1) * share, rows), first = thread * share;
        for (long row = first; row < end; row++) {
            long at = row * width, m = index ? index[row] : 0;
            const float *x = out + at, *a = scale + m * stride, *g = gate + m * gate_stride;
            if (du) {
                vec mean = all(stats[2 * row]), rstd = all(stats[2 * row + 1]), s = {}, t = {};
                for (long i = 0; i < width; i += WIDTH) {
                    long n = width - i;
                    vec d = load_some(du + at + i, n), normal = (load_some(x + i, n) - mean) * rstd;
                    if (sums) add(aside + i, d, n), add(aside + part + i, d * normal, n);
                    d *= all(1.0f) + load_some(a + i, n);
                    s += d, t += d * normal; /* d is zero behind the end */
                }
                vec over = all(1.0f / width), s_mean = all(sum(s)) * over, t_mean = all(sum(t)) * over;
                for (long i = 0; i < width; i += WIDTH) {
                    long n = width - i;
                    vec normal = (load_some(x + i, n) - mean) * rstd;
                    vec d = load_some(du + at + i, n) * (all(1.0f) + load_some(a + i, n));
                    d = rstd * (d - s_mean - normal * t_mean);
                    if (dout) d += load_some(dout + at + i, n);
                    store_some(dh + at + i, d, n);
                }
            }
            if (y) {
                const float *total_dh = du ? dh : dout;
                for (long i = 0; i < width; i += WIDTH) {
                    long n = width - i;
                    vec d = load_some(total_dh + at + i, n);
                    if (dy) store_some(dy + at + i, load_some(g + i, n) * d, n);
                    if (!sums) continue;
                    vec v = load_some(y + at + i, n);
                    if (bias) add(aside + 3 * part + i, d, n), v += load_some(bias + i, n);
                    add(aside + 2 * part + i, d * v, n);
                }
            }
            int last = row == end - 1 || row % BLOCK == BLOCK - 1 || (index && index[row + 1] != m);
            if (!sums || !last) continue;
            for (int which = du ? 0 : 2; which < (y ? bias ? 4 : 3 : 2); which++)
                flush(total + which * part + m * width, aside + which * part, width);
        }
    }
}
