/* Products of a tile, TILE rows of a matrix, with other rows. */

#pragma once

#include "vector.h"

enum {
    TILE = 16,                   /* rows of queries at once */
    VECS = TILE / WIDTH,         /* vectors of them */
    SUMS = WIDTH == 16 ? 16 : 8, /* vectors that a product sums up in registers */
    KEYS = SUMS / VECS,          /* keys whose products with a tile are computed at once */
};

/* Rows; step in floats. */
typedef struct {
    float *start;
    long step;
} matrix;

INLINE matrix from_row(matrix x, long row) { return (matrix){x.start ? x.start + row * x.step : 0, x.step}; }

INLINE matrix from_column(matrix x, long column) { return (matrix){x.start + column, x.step}; }

/* to[j][i] = a_j . b_i for `num` rows a and a transposed tile b [dim][TILE]. */
INLINE void some_products(const int num, const float *a, long step, const float *b, long dim, float *to) {
    vec total[SUMS] = {};
#pragma GCC unroll 4
    for (long d = 0; d < dim; d++)
#pragma GCC unroll 16
        for (int i = 0; i < num * VECS; i++)
            total[i] += all(a[i / VECS * step + d]) * load(b + d * TILE + i % VECS * WIDTH);
#pragma GCC unroll 16
    for (int i = 0; i < num * VECS; i++) store(to + i * WIDTH, total[i]);
}

INLINE void all_products(const float *a, long step, long n, const float *b, long dim, float *to) {
    for (long j = 0; n >= KEYS && j < n; j += KEYS) {
        long at = least(j, n - KEYS);
        some_products(KEYS, a + at * step, step, b, dim, to + at * TILE);
    }
    for (long j = 0; n < KEYS && j < n; j++) some_products(1, a + j * step, step, b, dim, to + j * TILE);
}

static void products(matrix a, long n, const float *b, long dim, float *to) {
    /* the usual steps as constants, which are parts of addresses: a fifth faster */
    if (a.step == 16) all_products(a.start, 16, n, b, dim, to);
    else if (a.step == 32) all_products(a.start, 32, n, b, dim, to);
    else if (a.step == 64) all_products(a.start, 64, n, b, dim, to);
    else if (a.step == 128) all_products(a.start, 128, n, b, dim, to);
    else all_products(a.start, a.step, n, b, dim, to);
}

/* A few rows and columns of to[r] += sum_i w[r step_r + i step_i] x[i], i < n; columns in vectors. */
INLINE void add_some(
    const int rows, const int columns, float *to, long to_step, const float *w, long step_r, long step_i,
    const float *x, long x_step, long n
) {
    vec total[SUMS], of[2];
#pragma GCC unroll 16
    for (int i = 0; i < rows * columns; i++) total[i] = load(to + i / columns * to_step + i % columns * WIDTH);
    for (int i = 0; i < rows * columns && step_i == 1; i++) /* what is next, as the sums here are short */
        __builtin_prefetch(to + (i / columns + rows) * to_step + i % columns * WIDTH, 1);
    for (long k = 0; k < n; k++) {
        for (int c = 0; c < columns; c++) of[c] = load(x + k * x_step + c * WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < rows * columns; i++)
            total[i] += all(w[i / columns * step_r + k * step_i]) * of[i % columns];
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * columns; i++) store(to + i / columns * to_step + i % columns * WIDTH, total[i]);
}

/* The same of one row and the last n < WIDTH columns. */
INLINE void add_rest(float *to, const float *w, long step, const float *x, long x_step, long n, long columns) {
    vec total = load_some(to, columns);
    for (long k = 0; k < n; k++) total += all(w[k * step]) * load_some(x + k * x_step, columns);
    store_some(to, total, columns);
}

INLINE void add_products(matrix to, long rows, const float *w, long step_r, long step_i, matrix x, long n, long dim) {
    for (long r = 0; r < rows;) {
        const int some = rows - r >= SUMS / 2 ? SUMS / 2 : rows - r >= 4 ? 4 : 1;
        for (long c = 0; c + WIDTH <= dim;) {
            const int columns = dim - c >= 2 * WIDTH ? 2 : 1;
#define ADD(rows, columns) \
    add_some(rows, columns, to.start + r * to.step + c, to.step, w + r * step_r, step_r, step_i, x.start + c, x.step, n)
            if (columns == 2 && some == SUMS / 2) ADD(SUMS / 2, 2);
            else if (columns == 2 && some == 4) ADD(4, 2);
            else if (columns == 2) ADD(1, 2);
            else if (some == SUMS / 2) ADD(SUMS / 2, 1);
            else if (some == 4) ADD(4, 1);
            else ADD(1, 1);
#undef ADD
            c += columns * WIDTH;
        }
        r += some;
    }
    for (long r = 0, c = dim - dim % WIDTH; c < dim && r < rows; r++)
        add_rest(to.start + r * to.step + c, w + r * step_r, step_i, x.start + c, x.step, n, dim - c);
}

/* A tile's rows to += sum_j w[j][row] x_j over keys j. */
static void add_over_keys(matrix to, long rows, const float *w, matrix x, long n, long dim) {
    add_products(to, rows, w, 1, TILE, x, n, dim);
}

/* Keys' rows to_j += sum_i w[j][i] x_i over the rows i of a tile. */
static void add_over_rows(matrix to, long n, const float *w, matrix x, long rows, long dim) {
    add_products(to, n, w, TILE, 1, x, rows, dim);
}

/* to [dim][TILE] = factor times rows, zeros behind them. */
static void transpose(matrix x, long rows, long dim, float factor, float *to) {
    for (long d = 0; d < dim; d += WIDTH)
        for (long first = 0; first < TILE; first += WIDTH) {
            vec square[WIDTH];
            for (long i = 0; i < WIDTH; i++)
                square[i] = first + i < rows ? load_some(x.start + (first + i) * x.step + d, dim - d) * all(factor) : all(0);
            turn_square(square);
            for (int i = 0; i < least(WIDTH, dim - d); i++) store(to + (d + i) * TILE + first, square[i]);
        }
}
