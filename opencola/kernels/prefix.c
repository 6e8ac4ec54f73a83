/* Attention of rows that see a prefix of the keys each: TILE rows side by side, so that no sum goes across a vector. */

#include <stdlib.h>

#include "tiles.h"

/* weights [key][TILE]: scores -> softmax over the keys below each row's limit; nobody sees beyond `keys`, and everybody
   sees the first `shared`. */
static void softmax(float *weights, const int32_t *limits, long keys, long shared) {
    for (long first = 0; first < TILE; first += WIDTH) {
        ints limit;
        memcpy(&limit, limits + first, sizeof limit);
        vec highest = all(-INFINITY), total = {};
        for (long t = 0; t < keys; t++) {
            vec score = load(weights + t * TILE + first);
            if (t >= shared) {
                score = choose(limit > (int32_t)t, score, all(-INFINITY));
                store(weights + t * TILE + first, score);
            }
            highest = larger(score, highest);
        }
        for (long t = 0; t < keys; t++) {
            vec weight = exponential(load(weights + t * TILE + first) - highest);
            total += weight;
            store(weights + t * TILE + first, weight);
        }
        for (long t = 0; t < keys; t++) store(weights + t * TILE + first, load(weights + t * TILE + first) / total);
    }
}

/* out = softmax(q k^T scale) v for rows of one head; seen (rows): how many keys a row sees; room of the size below. */
static void attend(matrix q, matrix k, matrix v, matrix out, const int64_t *seen, long rows, long width, float *room) {
    long keys = 0, shared = seen[0];
    int32_t limits[TILE];
    for (long r = 0; r < TILE; r++) {
        limits[r] = seen[least(r, rows - 1)];
        keys = most(keys, limits[r]), shared = least(shared, limits[r]);
    }
    float *turned = room, *weights = room + width * TILE;
    transpose(q, rows, width, 1 / sqrtf(width), turned);
    products(k, keys, turned, width, weights);
    softmax(weights, limits, keys, shared);
    for (long r = 0; r < rows; r++) memset(out.start + r * out.step, 0, 4 * width);
    add_over_keys(out, rows, weights, v, keys, width);
}

/* q, out (batch, rows, heads, width); k, v (batch, ..., kv_heads, width); kv_heads divides heads; width is a multiple of
   TILE; seen (batch, rows). Steps of q, then of both k and v: floats between samples, rows and heads. */
void prefix_attention(float *q, float *k, float *v, float *out, const int64_t *seen, long batch, long rows, long heads,
                      long kv_heads, long width, const int64_t *q_steps, const int64_t *steps, long threads) {
    long tiles = (rows + TILE - 1) / TILE, longest = 0;
    for (long i = 0; i < batch * rows; i++) longest = most(longest, seen[i]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = aligned_alloc(64, 4 * TILE * (longest + width));
#pragma omp for schedule(static)
        for (long i = 0; i < batch * heads * tiles; i++) {
            long b = i / (heads * tiles), h = i / tiles % heads, row = i % tiles * TILE;
            long from = b * steps[0] + h * kv_heads / heads * steps[2];
            matrix asking = {q + b * q_steps[0] + row * q_steps[1] + h * q_steps[2], q_steps[1]};
            matrix to = {out + ((b * rows + row) * heads + h) * width, heads * width};
            const int64_t *limits = seen + b * rows + row;
            attend(asking, (matrix){k + from, steps[1]}, (matrix){v + from, steps[1]}, to, limits,
                   least(TILE, rows - row), width, room);
        }
        free(room);
    }
}
