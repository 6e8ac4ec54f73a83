/* Products of two matrices of float32 that are rounded to bfloat16 on their way into scratch; sums are float32.

   Both sides come to lie in tiles of SIDE x 2 SIDE numbers, a kilobyte, as the tile instructions want them: of the left
   side a tile has SIDE rows of 2 SIDE terms; of the right side SIDE pairs of terms of SIDE columns. Where there are no
   tile instructions, those on vectors of pairs read the same. Either way every number of the result is one sum in one
   order, whatever the number of rows or threads; the two ways round differently. Denormal numbers count as zeros. */

#include <stdlib.h>

#include "vector.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#else
#define TILES 0
#endif

enum {
    SIDE = 16,           /* of a square of the result */
    TERMS = 2 * SIDE,    /* of a tile */
    TILE = SIDE * TERMS, /* numbers of a tile */
    STEPS = 12,          /* tiles in a row for which two rows of either side stay in the first cache */
    ROWS = 64,           /* of the left side that are brought into order at a time */
    SPAN = 32,           /* tiles in a row after which sums may leave the second cache */
    RIGHT = 1 << 19      /* numbers of the right side that stay in the second cache */
};

typedef uint16_t half; /* a bfloat16 */
typedef struct {
    const float *from;
    long row, term; /* from one to the next; one of them is 1 */
    long rows, terms;
} Matrix;

/* SIDE x SIDE pairs */
INLINE void transpose(__m512i v[SIDE]) {
    __m512i w[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) {
        int at = i / 4 * 4 + i % 4 / 2;
        v[i] = i % 2 ? _mm512_unpackhi_epi64(w[at], w[at + 2]) : _mm512_unpacklo_epi64(w[at], w[at + 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* now lane j of v[4 g + i] is column 4 j + i of rows 4 g to 4 g + 3 */
        w[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x44);
        w[4 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x44);
        w[8 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xee);
        w[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(w[i], w[4 + i], 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(w[i], w[4 + i], 0xdd);
        v[8 + i] = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0x88);
        v[12 + i] = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0xdd);
    }
}

INLINE __m512 load_first(const float *from, long n) {
    return n >= SIDE ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(n > 0 ? (1 << n) - 1 : 0, from);
}

/* The tile at a row and a term, zeros beyond the matrix: rows of terms, or pairs of terms of the rows. */
INLINE void pack_tile(Matrix m, long row, long term, int pairs, half *to) {
    const short swap[TERMS] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const float *from = m.from + row * m.row + term * m.term;
    long rows = m.rows - row, terms = m.terms - term;
    __m512i v[SIDE];
    int along = m.term == 1;
    if (rows >= SIDE && terms >= TERMS) {
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) {
            const float *one = from + (along ? i * m.row : 2 * i * m.term), *two = one + (along ? SIDE : m.term);
            v[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(two), _mm512_loadu_ps(one));
        }
    } else {
        for (int i = 0; i < SIDE; i++) {
            const float *one = from + (along ? i * m.row : 2 * i * m.term), *two = one + (along ? SIDE : m.term);
            long first = along ? (i < rows ? terms : 0) : 2 * i < terms ? rows : 0;
            long second = along ? (i < rows ? terms - SIDE : 0) : 2 * i + 1 < terms ? rows : 0;
            v[i] = (__m512i)_mm512_cvtne2ps_pbh(load_first(two, second), load_first(one, first));
        }
    }
    if (!along) {
        __m512i order = _mm512_loadu_si512(swap);
#pragma GCC unroll 16
        for (int i = 0; i < SIDE; i++) v[i] = _mm512_permutexvar_epi16(order, v[i]);
    }
    if (along == pairs) transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * TERMS, v[i]);
}

/* Strips of SIDE rows from a row to another, each of `steps` tiles from a term on. */
INLINE void pack_strips(Matrix m, long row, long end, long term, long steps, int pairs, half *to) {
    long strips = (end - row + SIDE - 1) / SIDE;
    if (m.term == 1) {
        for (long i = 0; i < strips; i++)
            for (long k = 0; k < steps; k++)
                pack_tile(m, row + i * SIDE, term + k * TERMS, pairs, to + (i * steps + k) * TILE);
        return;
    }
    m.row = 1; /* which the compiler should know, as it does of m.term above */
    for (long k = 0; k < steps; k++) /* in the order of memory, again */
        for (long i = 0; i < strips; i++)
            pack_tile(m, row + i * SIDE, term + k * TERMS, pairs, to + (i * steps + k) * TILE);
}

#if TILES
#define KEPT __asm__ volatile("" ::: "memory") /* GCC does not know that tiles read memory */

/* out, `high` by `wide` squares, gets the products of as many strips, or is added to. */
INLINE void tiles_square(const half *a, const half *b, float *out, long stride, long steps, int high, int wide,
                         int add) {
    long strip = steps * TILE, bytes = sizeof(float) * stride;
    KEPT;
    if (add) {
        _tile_loadd(0, out, bytes);
        if (wide > 1) _tile_loadd(1, out + SIDE, bytes);
        if (high > 1) _tile_loadd(2, out + SIDE * stride, bytes);
        if (high > 1 && wide > 1) _tile_loadd(3, out + SIDE * stride + SIDE, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < steps; k++, a += TILE, b += TILE) {
        _tile_loadd(6, b, 2 * TERMS);
        _tile_loadd(4, a, 2 * TERMS);
        _tile_dpbf16ps(0, 4, 6);
        if (wide > 1) _tile_loadd(7, b + strip, 2 * TERMS);
        if (wide > 1) _tile_dpbf16ps(1, 4, 7);
        if (high > 1) _tile_loadd(5, a + strip, 2 * TERMS);
        if (high > 1) _tile_dpbf16ps(2, 5, 6);
        if (high > 1 && wide > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, bytes);
    if (wide > 1) _tile_stored(1, out + SIDE, bytes);
    if (high > 1) _tile_stored(2, out + SIDE * stride, bytes);
    if (high > 1 && wide > 1) _tile_stored(3, out + SIDE * stride + SIDE, bytes);
    KEPT;
}

static void tiles_begin(void) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 2 * TERMS, shape.rows[i] = SIDE;
    KEPT;
    _tile_loadconfig(&shape);
}

static void tiles_end(void) { _tile_release(); } /* others have another shape of theirs */

/* Whether the system lets this process use tiles; what it says once holds for all threads and for forks. */
static int tiles_allowed(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return known;
}
#else
INLINE void tiles_square(const half *a, const half *b, float *out, long stride, long steps, int high, int wide,
                         int add) {}
static void tiles_begin(void) {}
static void tiles_end(void) {}
static int tiles_allowed(void) { return 0; }
#endif

/* As tiles_square, with `rows` rows. */
INLINE void vectors_square(const half *a, const half *b, float *out, long stride, long steps, long rows, int wide,
                           int add) {
    enum { HIGH = 8 };
    for (long row = 0; row < rows; row += HIGH, out += HIGH * stride) {
        __m512 sums[HIGH][2] = {};
        if (add)
#pragma GCC unroll 8
            for (int r = 0; r < HIGH; r++)
                for (int c = 0; c < wide; c++) sums[r][c] = _mm512_loadu_ps(out + r * stride + c * SIDE);
        const half *left = a + row / SIDE * steps * TILE + row % SIDE * TERMS;
        for (long k = 0; k < steps; k++)
            for (long p = 0; p < SIDE; p++) {
                const half *right = b + k * TILE + p * TERMS;
                __m512bh b0 = (__m512bh)_mm512_load_si512(right), b1 = b0;
                if (wide > 1) b1 = (__m512bh)_mm512_load_si512(right + steps * TILE);
#pragma GCC unroll 8
                for (int r = 0; r < HIGH; r++) {
                    int32_t pair;
                    memcpy(&pair, left + k * TILE + r * TERMS + 2 * p, sizeof pair);
                    __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                    sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, b0);
                    if (wide > 1) sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, b1);
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < HIGH; r++)
            for (int c = 0; c < wide; c++) _mm512_storeu_ps(out + r * stride + c * SIDE, sums[r][c]);
    }
}

INLINE void square(const half *a, const half *b, float *out, long stride, long steps, long rows, long columns, int add,
                   int tiles) {
    int high = rows > SIDE ? 2 : 1, wide = columns > SIDE ? 2 : 1;
    if (!tiles) wide > 1 ? vectors_square(a, b, out, stride, steps, rows, 2, add)
                         : vectors_square(a, b, out, stride, steps, rows, 1, add);
    else if (high > 1 && wide > 1) tiles_square(a, b, out, stride, steps, 2, 2, add);
    else if (high > 1) tiles_square(a, b, out, stride, steps, 2, 1, add);
    else if (wide > 1) tiles_square(a, b, out, stride, steps, 1, 2, add);
    else tiles_square(a, b, out, stride, steps, 1, 1, add);
}

/* out (rows, columns) of a row's stride gets the products of packed strips, or is added to. */
static void multiply(const half *a, const half *b, float *out, long stride, long steps, long rows, long columns,
                     int add, int tiles) {
    float edge[TERMS * TERMS] __attribute__((aligned(64)));
    for (long c = 0; c < columns; c += TERMS)
        for (long r = 0; r < rows; r += TERMS) {
            const half *left = a + r * steps * TERMS, *right = b + c * steps * TERMS;
            float *to = out + r * stride + c;
            long high = least(TERMS, rows - r), wide = least(TERMS, columns - c);
            if (high % SIDE == 0 && wide % SIDE == 0) {
                square(left, right, to, stride, steps, high, wide, add, tiles);
                continue;
            }
            if (add)
                for (long i = 0; i < high; i++) memcpy(edge + i * TERMS, to + i * stride, sizeof(float) * wide);
            square(left, right, edge, TERMS, steps, high, wide, add, tiles);
            for (long i = 0; i < high; i++) memcpy(to + i * stride, edge + i * TERMS, sizeof(float) * wide);
        }
}

/* What there is: 0 nothing, 1 vectors of pairs, 2 tiles. */
long bfloat16_ways(void) { return tiles_allowed() ? 2 : 1; }

/* Pieces of at most `size` that are as equal as multiples of `unit` can be. */
INLINE long even(long total, long size, long unit) {
    long pieces = (total + size - 1) / size;
    return ((total + pieces - 1) / pieces + unit - 1) / unit * unit;
}

/* out (batch, rows, columns) = a (batch, rows, depth) times b (batch, columns, depth) transposed, both of any strides of
   which one of the last two is 1. Nothing is empty. */
void bfloat16_product(const float *a, const float *b, float *out, long batch, long rows, long columns, long depth,
                      long a_step, long a_row, long a_term, long b_step, long b_row, long b_term, long tiles,
                      long threads) {
    static _Thread_local half *kept; /* for the next call: to get its pages anew would take as long as small products */
    if (!kept) kept = aligned_alloc(64, sizeof(half) * RIGHT);
    half *right = kept;
    if (!tiles_allowed()) tiles = 0;
    long span = even((depth + TERMS - 1) / TERMS, SPAN, 1) * TERMS;
    long group = even(columns, RIGHT / span / TERMS * TERMS, TERMS);
    long parts = rows > TERMS * (threads - 1) ? 1 : threads; /* of the columns, where there are few rows */
    long high = even(rows, parts > 1 ? ROWS : least(ROWS, (rows + threads - 1) / threads), TERMS);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        half left[ROWS * STEPS * TERMS] __attribute__((aligned(64)));
        if (tiles) tiles_begin();
        for (long i = 0; i < batch; i++) {
            Matrix x = {a + i * a_step, a_row, a_term, rows, depth};
            Matrix y = {b + i * b_step, b_row, b_term, columns, depth};
            for (long term = 0; term < depth; term += span)
                for (long column = 0; column < columns; column += group) {
                    long steps = (least(span, depth - term) + TERMS - 1) / TERMS, chunk = even(steps, STEPS, 1);
                    long width = least(group, columns - column), padded = (width + SIDE - 1) / SIDE * SIDE;
                    long share = even(width, (width + threads - 1) / threads, SIDE);
                    long part = even(width, (width + parts - 1) / parts, TERMS);
#pragma omp for schedule(static)
                    for (long c = 0; c < width; c += share)
                        for (long k = 0; k < steps; k += chunk) {
                            long some = least(chunk, steps - k);
                            pack_strips(y, column + c, column + least(c + share, width), term + k * TERMS, some, 1,
                                        right + (k * padded + c * some) * TERMS);
                        }
#pragma omp for schedule(static) collapse(2)
                    for (long row = 0; row < rows; row += high)
                        for (long c = 0; c < width; c += part)
                            for (long k = 0; k < steps; k += chunk) {
                                long some = least(chunk, steps - k), height = least(high, rows - row);
                                float *to = out + (i * rows + row) * columns + column + c;
                                pack_strips(x, row, row + height, term + k * TERMS, some, 0, left);
                                multiply(left, right + (k * padded + c * some) * TERMS, to, columns, some, height,
                                         least(part, width - c), term + k > 0, tiles);
                            }
                }
        }
        if (tiles) tiles_end();
    }
}

#else
long bfloat16_ways(void) { return 0; }
void bfloat16_product(void) {}
#endif
