/* LayerNorm and RMSNorm with a sum before or behind them, and SwiGLU, each in one pass.

   Sums over rows are made of BLOCK rows at a time, and these added up in double precision: the same for any number of
   threads. */

#include "vector.h"

/* 1 / sqrt(mean square + eps) of n floats. */
INLINE float inverse_size(const float *x, long n, float eps) {
    vec squares = {}, more = {};
    long i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        vec a = load(x + i), b = load(x + i + WIDTH);
        squares += a * a, more += b * b;
    }
    for (; i < n; i += WIDTH) {
        vec a = load_some(x + i, n - i);
        squares += a * a;
    }
    return 1.0f / sqrtf(sum(squares + more) / n + eps);
}

/* out = h + y, and u = norm(out) gain + bias + residual; all (rows, width), gain and bias (width).

   y, gain, bias and residual are left out where they are none, and out is h where y is. centred: LayerNorm, else RMSNorm.
   stats (rows, 2) or none: mean and 1 / size. */
void plain_norm(const float *h, const float *y, float *out, const float *gain, const float *bias, const float *residual,
                float *u, float *stats, long rows, long width, float eps, long centred, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        long at = row * width;
        const float *x = h + at;
        if (y) {
            for (long i = 0; i < width; i += WIDTH)
                store_some(out + at + i, load_some(x + i, width - i) + load_some(y + at + i, width - i), width - i);
            x = out + at;
        }
        float mean = 0, rstd;
        if (centred) moments(x, width, eps, &mean, &rstd);
        else rstd = inverse_size(x, width, eps);
        if (stats) stats[2 * row] = mean, stats[2 * row + 1] = rstd;
        for (long i = 0; i < width; i += WIDTH) {
            long n = width - i;
            vec v = (load_some(x + i, n) - all(mean)) * all(rstd);
            if (gain) v *= load_some(gain + i, n);
            if (bias) v += load_some(bias + i, n);
            if (residual) v += load_some(residual + at + i, n);
            store_some(u + at + i, v, n);
        }
    }
}

/* Its gradients: dx of x = out, which is those of h and y; dgain and dbias (width) or none. dout, du: of what came out,
   dout or none; stats: from there. sums (rows / BLOCK, rounded up, 2, width) or none: room. */
void plain_norm_backward(const float *dout, const float *du, const float *x, const float *stats, const float *gain,
                         float *dx, float *dgain, float *dbias, float *sums, long rows, long width, long centred,
                         long threads) {
    long blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long block = 0; block < blocks; block++) {
        float *of_gain = sums + block * 2 * width, *of_bias = of_gain + width;
        if (sums) memset(of_gain, 0, sizeof(float) * 2 * width);
        for (long row = block * BLOCK; row < least((block + 1) * BLOCK, rows); row++) {
            long at = row * width;
            vec mean = all(stats[2 * row]), rstd = all(stats[2 * row + 1]), s = {}, t = {};
            for (long i = 0; i < width; i += WIDTH) {
                long n = width - i;
                vec d = load_some(du + at + i, n), normal = (load_some(x + at + i, n) - mean) * rstd;
                if (dgain) store_some(of_gain + i, load_some(of_gain + i, n) + d * normal, n);
                if (dbias) store_some(of_bias + i, load_some(of_bias + i, n) + d, n);
                if (gain) d *= load_some(gain + i, n);
                s += d, t += d * normal; /* d is zero behind the end */
            }
            vec over = all(1.0f / width), t_mean = all(sum(t)) * over, s_mean = {};
            if (centred) s_mean = all(sum(s)) * over;
            for (long i = 0; i < width; i += WIDTH) {
                long n = width - i;
                vec d = load_some(du + at + i, n), normal = (load_some(x + at + i, n) - mean) * rstd;
                if (gain) d *= load_some(gain + i, n);
                d = rstd * (d - s_mean - normal * t_mean);
                if (dout) d += load_some(dout + at + i, n);
                store_some(dx + at + i, d, n);
            }
        }
    }
    if (dgain) add_up(sums, blocks, 2 * width, width, dgain);
    if (dbias) add_up(sums + width, blocks, 2 * width, width, dbias);
}

/* y = value silu(gate), both halves of x + bias: x (rows, 2 width), the gate from column `gate` on, which is 0 or width;
   y (rows, width); bias (2 width) or none. */
void swiglu(const float *x, const float *bias, float *y, long rows, long width, long gate, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *g = x + row * 2 * width + gate, *v = x + row * 2 * width + width - gate;
        for (long i = 0; i < width; i += WIDTH) {
            long n = width - i;
            vec a = load_some(g + i, n), b = load_some(v + i, n);
            if (bias) a += load_some(bias + gate + i, n), b += load_some(bias + width - gate + i, n);
            store_some(y + row * width + i, b * a * sigmoid(a), n);
        }
    }
}

/* Its gradients: dx, and dbias (2 width) or none. sums (rows / BLOCK, rounded up, 2 width) or none: room. */
void swiglu_backward(const float *dy, const float *x, const float *bias, float *dx, float *dbias, float *sums, long rows,
                     long width, long gate, long threads) {
    long blocks = (rows + BLOCK - 1) / BLOCK, wide = 2 * width, value = width - gate;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long block = 0; block < blocks; block++) {
        float *total = sums + block * wide;
        if (dbias) memset(total, 0, sizeof(float) * wide);
        for (long row = block * BLOCK; row < least((block + 1) * BLOCK, rows); row++) {
            const float *from = x + row * wide;
            float *to = dx + row * wide;
            for (long i = 0; i < width; i += WIDTH) {
                long n = width - i;
                vec a = load_some(from + gate + i, n), b = load_some(from + value + i, n);
                if (bias) a += load_some(bias + gate + i, n), b += load_some(bias + value + i, n);
                vec d = load_some(dy + row * width + i, n), s = sigmoid(a);
                vec db = d * a * s, da = d * b * s * (all(1.0f) + a * (all(1.0f) - s));
                store_some(to + gate + i, da, n), store_some(to + value + i, db, n);
                if (!dbias) continue;
                store_some(total + gate + i, load_some(total + gate + i, n) + da, n);
                store_some(total + value + i, load_some(total + value + i, n) + db, n);
            }
        }
    }
    if (dbias) add_up(sums, blocks, wide, wide, dbias);
}
