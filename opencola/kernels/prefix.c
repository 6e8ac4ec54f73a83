/* Attention of rows that see a prefix of the keys each: TILE rows side by side, or a few one by one.

   Side by side no sum goes across a vector. */

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

/* The first `keys` floats become their exponentials, of which the largest is 1; returned is their sum. */
static float exponentials(float *x, long keys) {
    vec highest = all(-INFINITY), total = {};
    float top = -INFINITY;
    for (long t = keys; t % WIDTH; t++) x[t] = -INFINITY;
    for (long t = 0; t < keys; t += WIDTH) highest = larger(load(x + t), highest);
    for (int i = 0; i < WIDTH; i++) top = highest[i] > top ? highest[i] : top;
    for (long t = 0; t < keys; t += WIDTH) {
        vec weight = exponential(load(x + t) - all(top));
        total += weight;
        store(x + t, weight);
    }
    return sum(total);
}

/* Channels of out = the weighted sum of v over the keys, times factor; several sums, of every fourth key. */
INLINE void weigh(const int vecs, matrix v, const float *weights, long keys, float factor, long n, float *out) {
    vec sums[4][4] = {};
    long t = 0;
    for (; t + 4 <= keys; t += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
            for (int c = 0; c < vecs; c++)
                sums[i][c] += all(weights[t + i]) * load_some(v.start + (t + i) * v.step + c * WIDTH, n - c * WIDTH);
    for (int i = 0; t + i < keys; i++)
        for (int c = 0; c < vecs; c++)
            sums[i][c] += all(weights[t + i]) * load_some(v.start + (t + i) * v.step + c * WIDTH, n - c * WIDTH);
    for (int c = 0; c < vecs; c++)
        store_some(out + c * WIDTH, (sums[0][c] + sums[1][c] + (sums[2][c] + sums[3][c])) * all(factor), n - c * WIDTH);
}

/* out = softmax(q k^T scale) v for a row that sees so many keys; room for their weights and WIDTH more. */
INLINE void attend_alone(const float *q, matrix k, matrix v, float *out, long keys, long width, float *room) {
    const vec scale = all(1 / sqrtf(width));
    for (long first = 0; first < keys; first += WIDTH) {
        vec square[WIDTH] = {};
        const float *key[WIDTH];
        for (long i = 0; i < WIDTH; i++) key[i] = k.start + least(first + i, keys - 1) * k.step; /* at last the last again */
        long d = 0;
        for (; d + WIDTH <= width; d += WIDTH) {
            const vec of = load(q + d);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) square[i] += of * load(key[i] + d);
        }
        for (int i = 0; i < WIDTH && d < width; i++)
            square[i] += load_some(q + d, width - d) * load_some(key[i] + d, width - d);
        store(room + first, line_sums(square) * scale);
    }
    const float factor = 1 / exponentials(room, keys);
    long c = 0;
    for (; c + 4 * WIDTH <= width; c += 4 * WIDTH) weigh(4, from_column(v, c), room, keys, factor, 4 * WIDTH, out + c);
    for (; c + 2 * WIDTH <= width; c += 2 * WIDTH) weigh(2, from_column(v, c), room, keys, factor, 2 * WIDTH, out + c);
    for (; c < width; c += WIDTH) weigh(1, from_column(v, c), room, keys, factor, width - c, out + c);
}

/* q, out (batch, rows, heads, width); k, v (batch, ..., kv_heads, width); kv_heads divides heads; seen (batch, rows); few:
   whether there are few rows. Steps of q, then of both k and v: floats between samples, rows and heads. */
void prefix_attention(float *q, float *k, float *v, float *out, const int64_t *seen, long batch, long rows, long heads,
                      long kv_heads, long width, const int64_t *q_steps, const int64_t *steps, long few, long threads) {
    long side = few ? 1 : TILE, tiles = (rows + side - 1) / side, longest = 0;
    for (long i = 0; i < batch * rows; i++) longest = most(longest, seen[i]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *room = aligned_alloc(64, 4 * TILE * (longest + width + WIDTH));
#pragma omp for schedule(static)
        for (long i = 0; i < batch * heads * tiles; i++) {
            long b = i / (heads * tiles), h = i / tiles % heads, row = i % tiles * side;
            long from = b * steps[0] + h * kv_heads / heads * steps[2];
            matrix asking = {q + b * q_steps[0] + row * q_steps[1] + h * q_steps[2], q_steps[1]};
            matrix to = {out + ((b * rows + row) * heads + h) * width, heads * width};
            matrix keys = {k + from, steps[1]}, values = {v + from, steps[1]};
            const int64_t *limits = seen + b * rows + row;
            if (few) attend_alone(asking.start, keys, values, to.start, *limits, width, room);
            else attend(asking, keys, values, to, limits, least(TILE, rows - row), width, room);
        }
        free(room);
    }
}
