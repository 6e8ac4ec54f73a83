/* Products of rows with a weight, put in order beforehand or meanwhile, with what stands before and after them.

   Every number of the result is one sum in one order, whatever the number of rows or threads. */

#include <stdlib.h>

#include "vector.h"

enum {
    ROWS = WIDTH == 16 ? 8 : WIDTH == 8 ? 6 : 4, /* of a tile, so that its sums stay in registers */
    COLUMNS = 2 * WIDTH,        /* of a panel */
    PANELS = 4,                 /* at once, of a single row: as many sums as are under way in the processor */
    SUMS = 2 * (ROWS > PANELS ? ROWS : PANELS),
    DEPTH = 256,                /* terms of a sum for which a panel of the weight stays in the first cache */
    CHUNK = 384                 /* rows for which the left side stays in the second */
};

/* (columns, depth), steps in floats, one of them 1; or panels one after the other, as `pack` leaves them, without steps. */
typedef struct {
    const float *start;
    long column, term;
} Weight;

/* Floats that `pack` writes. */
long packed_size(long columns, long depth) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS * depth; }

/* Up to COLUMNS columns of a weight -> (terms, COLUMNS), padded by zeros. */
static void pack_panel(Weight from, long columns, long terms, float *to) {
    for (long half = 0; half < COLUMNS; half += WIDTH) {
        const long some = most(0, least(WIDTH, columns - half));
        const float *start = from.start + half * from.column;
        for (long k = 0; k < terms && from.term > 1; k++)
            store(to + k * COLUMNS + half, some ? load_some(start + k * from.term, some) : all(0));
        for (long k = 0; k < terms && from.term == 1; k += WIDTH) {
            vec square[WIDTH];
            for (long c = 0; c < WIDTH; c++)
                square[c] = c < some ? load_some(start + c * from.column + k, terms - k) : all(0);
            turn_square(square);
            for (long i = 0; i < least(WIDTH, terms - k); i++) store(to + (k + i) * COLUMNS + half, square[i]);
        }
    }
}

/* A weight (columns, depth) -> panels of COLUMNS columns, each (depth, COLUMNS). */
void pack(const float *weight, float *to, long columns, long depth, long column_step, long term_step) {
    Weight panel = {weight, column_step, term_step};
    for (long first = 0; first < columns; first += COLUMNS, panel.start += COLUMNS * column_step, to += depth * COLUMNS)
        pack_panel(panel, columns - first, depth, to);
}

/* Add to sums the products of rows and b, of some panels (depth, COLUMNS), and meanwhile call what is next near. */
INLINE void add_tile(const int rows, const int panels, vec *sums, const float *const *a, const float *b, long apart,
                     const float *next, long ahead, long depth) {
    vec total[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows * panels; i++) total[i] = sums[i];
    for (long k = 0; k < depth; k++, b += COLUMNS) {
        if (next) __builtin_prefetch(next + k * ahead, 0, 2);
#pragma GCC unroll 8
        for (int p = 0; p < panels; p++) {
            vec b0 = load(b + p * apart), b1 = load(b + p * apart + WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vec x = all(a[r][k]);
                total[2 * (p * rows + r)] += x * b0;
                total[2 * (p * rows + r) + 1] += x * b1;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * rows * panels; i++) sums[i] = total[i];
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

/* Sums of a tile of one panel -> out, with what is around. */
INLINE void finish(const vec *sums, float *out, long row, long rows, long column, long columns, const Around *around) {
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < 2 && column + c * WIDTH < columns; c++) {
            long at = column + c * WIDTH, n = columns - at;
            vec y = sums[2 * r + c];
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

/* Columns from panel `panel` to `end` of `multiply`'s result; partial: room for all sums; room: for packed panels. */
static void some_panels(const float *x, Weight weight, float *out, long rows, long columns, long depth, long panel,
                        long end, const Around *around, vec *partial, float *room) {
    const long tiles = (rows + ROWS - 1) / ROWS, most_panels = rows == 1 ? PANELS : rows <= ROWS / 2 ? 2 : 1;
    const long ahead = (COLUMNS + tiles - 1) / most(tiles, 1); /* so many of each term: tiles together call a panel */
    for (long first = 0; first < depth; first += DEPTH) {
        const long terms = least(DEPTH, depth - first), apart = (weight.term ? DEPTH : depth) * COLUMNS;
        for (long p = panel, count; p < end; p += count) {
            const float *b = weight.start + (p * depth + first) * COLUMNS, *next = 0;
            count = end - p < most_panels ? 1 : most_panels;
            for (long i = 0; i < count && weight.term; i++, b = room) {
                const long column = (p + i) * COLUMNS;
                Weight part = {weight.start + column * weight.column + first * weight.term, weight.column, weight.term};
                pack_panel(part, columns - column, terms, room + i * apart);
            }
            if (!weight.term && count == 1) {
                if (p + 1 < end) next = b + apart;
                else if (first + terms < depth) next = weight.start + (panel * depth + first + terms) * COLUMNS;
            }
            for (long tile = 0; tile < tiles; tile++) {
                const long row = tile * ROWS, height = least(ROWS, rows - row);
                const int known = height == 1 ? 1 : height <= ROWS / 2 ? ROWS / 2 : ROWS; /* to the compiler */
                const float *a[ROWS], *call = next ? next + tile * terms * ahead : 0;
                for (long r = 0; r < ROWS; r++) a[r] = x + least(row + r, rows - 1) * depth + first;
                vec sums[SUMS] = {}, *kept = partial + (p * tiles + tile) * 2 * ROWS;
                if (first) memcpy(sums, kept, sizeof(vec) * 2 * known * count);
#define ADD(rows, panels) add_tile(rows, panels, sums, a, b, apart, call, ahead, terms)
                if (known == 1 && count == PANELS) ADD(1, PANELS);
                else if (known == 1) ADD(1, 1);
                else if (known == ROWS / 2 && count == 2) ADD(ROWS / 2, 2);
                else if (known == ROWS / 2) ADD(ROWS / 2, 1);
                else ADD(ROWS, 1);
#undef ADD
                if (first + terms < depth) memcpy(kept, sums, sizeof(vec) * 2 * known * count);
                else for (long i = 0; i < count; i++)
                    finish(sums + 2 * known * i, out, row, height, (p + i) * COLUMNS, columns, around);
            }
        }
    }
}

/* out (rows, columns) = x (rows, depth) times the weight, with what is around. `around->index` counts from row 0. */
static void multiply(const float *x, Weight weight, float *out, long rows, long columns, long depth,
                     const Around *around, long threads) {
    const long panels = (columns + COLUMNS - 1) / COLUMNS, padded = (rows + ROWS - 1) / ROWS * ROWS;
    const long each = weight.term ? PANELS * DEPTH * COLUMNS : 0;
    float *normal = around->shift ? malloc(4 * rows * depth) : 0;
    vec *partial = aligned_alloc(64, 4 * padded * panels * COLUMNS);
    float *room = aligned_alloc(64, 4 * threads * each);
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
#pragma omp for schedule(static)
        for (long thread = 0; thread < threads; thread++)
            some_panels(normal ? normal : x, weight, out, rows, columns, depth, thread * panels / threads,
                        (thread + 1) * panels / threads, around, partial, room + thread * each);
    }
    free(normal);
    free(partial);
    free(room);
}

/* As `multiply`, in chunks of rows. */
void product(const float *x, const float *weight, float *out, long rows, long columns, long depth, long column_step,
             long term_step, const float *shift, const float *scale, const float *gate, const float *onto,
             const int64_t *index, const float *bias, long stride, float eps, long gelu, long threads) {
    for (long first = 0; first < rows; first += CHUNK) {
        const int64_t *which = index ? index + first : 0;
        Around around = {shift, scale, gate, onto ? onto + first * columns : 0, which, bias, stride, eps, gelu};
        Weight by = {weight, column_step, term_step};
        multiply(x + first * depth, by, out + first * columns, least(CHUNK, rows - first), columns, depth, &around, threads);
    }
}
