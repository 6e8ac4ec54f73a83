/* Attention of rows that see a prefix of the keys each. WIDTH rows side by side in a vector: no sum goes across one. */

#include <stdlib.h>

#include "vector.h"

enum { KEYS = 8, CHANNELS = 16 }; /* keys, channels of the output whose sums stay in registers */

/* out = softmax(q k^T scale) v for one head: queries, keys and values, and output with these floats from row to row.
   limits (count): keys that a row sees, at least one; turned (width, WIDTH) and weights (keys, WIDTH): room. */
static void head(const float *q, const float *k, const float *v, float *out, const int64_t *limits, long count,
                 long width, long q_apart, long apart, long out_apart, float scale, float *turned, float *weights) {
    long keys = 0, shared = limits[0];
    ints limit = {};
    for (long r = 0; r < count; r++) {
        limit[r] = limits[r];
        keys = keys > limits[r] ? keys : limits[r];
        shared = shared < limits[r] ? shared : limits[r];
    }
    for (long d = 0; d < width; d++)
        for (long r = 0; r < WIDTH; r++) turned[d * WIDTH + r] = r < count ? q[r * q_apart + d] * scale : 0;
    vec most = all(-INFINITY);
    for (long first = 0; first < keys; first += KEYS) {
        long n = keys - first < KEYS ? keys - first : KEYS;
        const float *rows[KEYS];
        for (long j = 0; j < KEYS; j++) rows[j] = k + (first + (j < n ? j : 0)) * apart;
        vec scores[KEYS] = {};
        for (long d = 0; d < width; d++) {
            vec of_rows = load(turned + d * WIDTH);
#pragma GCC unroll 8
            for (int j = 0; j < KEYS; j++) scores[j] += all(rows[j][d]) * of_rows;
        }
        for (long j = 0; j < n; j++) {
            if (first + j >= shared) scores[j] = choose(limit > (int)(first + j), scores[j], all(-INFINITY));
            most = choose(scores[j] > most, scores[j], most);
            store(weights + (first + j) * WIDTH, scores[j]);
        }
    }
    vec total = {};
    for (long t = 0; t < keys; t++) {
        vec weight = exponential(load(weights + t * WIDTH) - most);
        total += weight;
        store(weights + t * WIDTH, weight);
    }
    for (long first = 0; first < width; first += CHANNELS) {
        long n = width - first < CHANNELS ? width - first : CHANNELS;
        vec sums[CHANNELS] = {};
        for (long t = 0; t < keys; t++) {
            vec weight = load(weights + t * WIDTH);
            const float *row = v + t * apart + first;
            if (n == CHANNELS) {
#pragma GCC unroll 16
                for (int d = 0; d < CHANNELS; d++) sums[d] += all(row[d]) * weight;
            } else {
                for (long d = 0; d < n; d++) sums[d] += all(row[d]) * weight;
            }
        }
        float means[CHANNELS][WIDTH];
        for (long d = 0; d < n; d++) store(means[d], sums[d] / total);
        for (long r = 0; r < count; r++)
            for (long d = 0; d < n; d++) out[r * out_apart + first + d] = means[d][r];
    }
}

/* q, out (batch, rows, heads, width); k, v (batch, ..., kv_heads, width); kv_heads divides heads; limits (batch, rows).
   The strides of q, then of both k and v: floats between samples, rows and heads. out is contiguous. */
void prefix_attention(const float *q, const float *k, const float *v, float *out, const int64_t *limits, long batch,
                      long rows, long heads, long kv_heads, long width, const int64_t *q_strides,
                      const int64_t *strides, long threads) {
    long groups = (rows + WIDTH - 1) / WIDTH, longest = 0;
    for (long i = 0; i < batch * rows; i++) longest = longest > limits[i] ? longest : limits[i];
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = aligned_alloc(64, sizeof(vec) * (longest + width));
#pragma omp for schedule(static)
        for (long i = 0; i < batch * heads * groups; i++) {
            long b = i / (heads * groups), h = i / groups % heads, first = i % groups * WIDTH;
            long count = rows - first < WIDTH ? rows - first : WIDTH;
            long from = b * strides[0] + h * kv_heads / heads * strides[2];
            head(q + b * q_strides[0] + first * q_strides[1] + h * q_strides[2], k + from, v + from,
                 out + ((b * rows + first) * heads + h) * width, limits + b * rows + first, count, width, q_strides[1],
                 strides[1], heads * width, 1 / sqrtf(width), room, room + width * WIDTH);
        }
        free(room);
    }
}
