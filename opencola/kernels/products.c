/* Products of rows with a weight that was brought into order beforehand, with what stands before and after them.

   Every number of the result is one sum in one order, whatever the number of rows or threads. */

#include <stdlib.h>

#include "vector.h"

enum {
    ROWS = WIDTH == 16 ? 8 : WIDTH == 8 ? 6 : 4, /* of a tile, so that its sums stay in registers */
    COLUMNS = 2 * WIDTH,        /* of a tile */
    DEPTH = 256,                /* terms of a sum for which a panel of the weight stays in the first cache */
    CHUNK = 384                 /* rows for which the left side stays in the second */
};

/* Floats that `pack` writes. */
long packed_size(long columns, long depth) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS * depth; }

/* weight (columns, depth) -> panels of COLUMNS columns, each (depth, COLUMNS), the last one padded by zeros. */
void pack(const float *weight, float *to, long columns, long depth) {
    for (long first = 0; first < columns; first += COLUMNS, to += depth * COLUMNS)
        for (long start = 0; start < depth; start += WIDTH) /* a line of the cache of every row at a time */
            for (long c = 0; c < COLUMNS; c++)
                for (long k = start; k < least(start + WIDTH, depth); k++)
                    to[k * COLUMNS + c] = first + c < columns ? weight[(first + c) * depth + k] : 0;
}

/* Add to the sums of a tile the products of ROWS rows and b (depth, COLUMNS), and meanwhile call the next panel near. */
INLINE void add_tile(vec sums[ROWS][2], const float *const rows[ROWS], const float *b, const float *next, long ahead,
                     long depth) {
    for (long k = 0; k < depth; k++, b += COLUMNS) {
        if (next) __builtin_prefetch(next + k * ahead, 0, 2);
        vec b0 = load(b), b1 = load(b + WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            vec a = all(rows[r][k]);
            sums[r][0] += a * b0;
            sums[r][1] += a * b1;
        }
    }
}

typedef struct {
    const float *shift, *scale; /* (M, depth) of the left side's modulated norm, which is left out without them */
    const float *gate, *onto;   /* (M, columns) and (rows, columns): the result is onto + gate * product */
    const int64_t *index;       /* (rows): which of the M is a row's; the first without it */
    const float *bias;          /* (columns), or none */
    long stride;                /* from one of the M to the next */
    float eps;
    long gelu;
} Around;

INLINE void finish(vec sums[ROWS][2], float *out, long row, long rows, long column, long columns, const Around *around) {
    for (long r = 0; r < ROWS && row + r < rows; r++)
        for (long c = 0; c < 2 && column + c * WIDTH < columns; c++) {
            long at = column + c * WIDTH, n = columns - at;
            vec y = sums[r][c];
            if (around->bias) y += load_some(around->bias + at, n);
            if (around->gelu) y *= gelu_gate(y);
            if (around->gate) {
                long which = around->index ? around->index[row + r] : 0;
                vec gate = load_some(around->gate + which * around->stride + at, n);
                y = load_some(around->onto + (row + r) * columns + at, n) + gate * y;
            }
            store_some(out + (row + r) * columns + at, y, n);
        }
}

/* out (rows, columns) = x (rows, depth) times the packed weight, with what is around. `around->index` counts from row 0. */
static void multiply(const float *x, const float *weight, float *out, long rows, long columns, long depth,
                     const Around *around, long threads) {
    long tiles = (rows + ROWS - 1) / ROWS, panels = (columns + COLUMNS - 1) / COLUMNS;
    long ahead = (COLUMNS + tiles - 1) / tiles; /* floats for every term, so that the tiles together call the panel */
    float *normal = around->shift ? malloc(4 * rows * depth) : 0;
    float *partial = aligned_alloc(64, 4 * tiles * ROWS * panels * COLUMNS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (normal) {
#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++) {
                long which = around->index ? around->index[r] * around->stride : 0;
                float mean, rstd;
                moments(x + r * depth, depth, around->eps, &mean, &rstd);
                normalise(x + r * depth, mean, rstd, around->scale + which, around->shift + which, normal + r * depth, depth);
            }
        }
        const float *left = normal ? normal : x;
        for (long first = 0; first < depth; first += DEPTH) {
            long terms = least(DEPTH, depth - first);
#pragma omp for schedule(static) nowait
            for (long panel = 0; panel < panels; panel++) {
                const float *b = weight + (panel * depth + first) * COLUMNS;
                const float *next = b + depth * COLUMNS;
                if (panel + 1 == panels) next = first + terms < depth ? weight + (first + terms) * COLUMNS : 0;
                for (long tile = 0; tile < tiles; tile++) {
                    const float *a[ROWS];
                    for (long r = 0; r < ROWS; r++) a[r] = left + least(tile * ROWS + r, rows - 1) * depth + first;
                    vec(*kept)[2] = (vec(*)[2])(partial + (panel * tiles + tile) * ROWS * COLUMNS);
                    vec sums[ROWS][2] = {};
                    if (first) memcpy(sums, kept, sizeof sums);
                    add_tile(sums, a, b, next ? next + tile * terms * ahead : 0, ahead, terms);
                    if (first + terms < depth) memcpy(kept, sums, sizeof sums);
                    else finish(sums, out, tile * ROWS, rows, panel * COLUMNS, columns, around);
                }
            }
        }
    }
    free(normal);
    free(partial);
}

/* As `multiply`, in chunks of rows. */
void product(const float *x, const float *weight, float *out, long rows, long columns, long depth, const float *shift,
             const float *scale, const float *gate, const float *onto, const int64_t *index, const float *bias,
             long stride, float eps, long gelu, long threads) {
    for (long first = 0; first < rows; first += CHUNK) {
        const int64_t *which = index ? index + first : 0;
        Around around = {shift, scale, gate, onto ? onto + first * columns : 0, which, bias, stride, eps, gelu};
        long count = least(CHUNK, rows - first);
        multiply(x + first * depth, weight, out + first * columns, count, columns, depth, &around, threads);
    }
}
