/* Vectors of floats of this processor's width, by the compilers' vector extensions, and the functions of them. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef float unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE long most(long a, long b) { return a > b ? a : b; }

INLINE vec load(const float *from) { return *(const unaligned *)from; }

INLINE void store(float *to, vec x) { *(unaligned *)to = x; }

INLINE vec all(float x) { return x - (vec){}; }

/* The first n of WIDTH floats, zeros behind them. */
INLINE vec load_some(const float *from, long n) {
    if (n >= WIDTH) return load(from);
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, from);
#else
    vec x = {};
    memcpy(&x, from, sizeof(float) * n);
    return x;
#endif
}

INLINE void store_some(float *to, vec x, long n) {
    if (n >= WIDTH) store(to, x);
#if defined(__AVX512F__)
    else _mm512_mask_storeu_ps(to, (1u << n) - 1, (__m512)x);
#else
    else memcpy(to, &x, sizeof(float) * n);
#endif
}

INLINE float sum(vec x) {
    float part[WIDTH];
    memcpy(part, &x, sizeof part);
    for (int n = WIDTH / 2; n; n /= 2)
        for (int i = 0; i < n; i++) part[i] += part[i + n];
    return part[0];
}

/* The first n of WIDTH floats kept, zeros behind them. */
INLINE vec first(vec x, long n) {
    if (n >= WIDTH) return x;
    vec kept = {};
    memcpy(&kept, &x, sizeof(float) * n);
    return kept;
}

INLINE vec choose(ints condition, vec a, vec b) { return (vec)((condition & (ints)a) | (~condition & (ints)b)); }

INLINE vec larger(vec a, vec b) { /* compilers do not always know any other form as one instruction */
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* Lanes of a and, from WIDTH on, of b. */
INLINE vec pick(vec a, vec b, ints lanes) {
#if __has_builtin(__builtin_shuffle)
    return __builtin_shuffle(a, b, lanes);
#else
    vec x;
    for (int i = 0; i < WIDTH; i++) x[i] = lanes[i] < WIDTH ? a[lanes[i]] : b[lanes[i] - WIDTH];
    return x;
#endif
}

/* Exchange what is off the diagonal of every 2 step x 2 step of two lines, `step` apart. */
INLINE void exchange(vec *upper, vec *lower, int step) {
    ints lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
    const vec above = *upper, below = *lower;
    const ints left = (lane & step) == 0;
    *upper = pick(above, below, (left & lane) | (~left & (lane - step + WIDTH)));
    *lower = pick(above, below, (left & (lane + step)) | (~left & (lane + WIDTH)));
}

/* Lines become columns. */
INLINE void turn_square(vec square[WIDTH]) {
#pragma GCC unroll 4
    for (int step = 1; step < WIDTH; step *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++)
            if (!(i & step)) exchange(square + i, square + i + step, step);
}

/* The sum of every line. */
INLINE vec line_sums(vec square[WIDTH]) {
#pragma GCC unroll 4
    for (int step = WIDTH / 2; step; step /= 2)
#pragma GCC unroll 16
        for (int i = 0; i < step; i++) {
            exchange(square + i, square + i + step, step);
            square[i] += square[i + step];
        }
    return square[0];
}

/* e^x: 2^n (1 + polynomial) with x = n log 2 + r, at most 2 units in the last place wrong; but 0 below SMALLEST. What is
   so small beside 1 changes no sum of float32, and what would come of it in products are numbers below the smallest
   normal one, at a hundred times the cost of others. */
#define SMALLEST (-30.0f)

INLINE vec exponential(vec x) {
    const vec shifter = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to a whole number */
    ints tiny = x < all(SMALLEST);
    x = choose(x > all(88.0f), all(88.0f), x);
    vec n = x * all(1.44269504f) + shifter;
    ints whole = (ints)n - (ints)shifter;
    n -= shifter;
    vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    vec result = choose(tiny, (vec){}, (vec)((ints)p + (whole << 23)));
    return choose(x == x, result, x); /* what is not a number stays none */
}

/* 1 / x, at most 2 units in the last place wrong: an estimate and a step of Newton's take a quarter of a division. */
INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__)
    vec y = (vec)_mm512_rcp14_ps((__m512)x);
    return y * (all(2.0f) - x * y);
#else
    return all(1.0f) / x;
#endif
}

/* 0 below SMALLEST, as `exponential`. */
INLINE vec sigmoid(vec x) {
    const ints tiny = x < all(SMALLEST);
    /* a reciprocal that is not used must not be below the smallest normal number either */
    const vec y = reciprocal(all(1.0f) + exponential(-choose(tiny, all(SMALLEST), x)));
    return choose(tiny, (vec){}, y);
}

/* GELU in its tanh form is x s(x) with this s = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE vec gelu_gate(vec x) {
    return sigmoid(x * (all(1.5957691216f) + all(0.0713548162f) * x * x));
}

/* Mean and 1 / sqrt(variance + eps) of n floats. */
INLINE void moments(const float *x, long n, float eps, float *mean, float *rstd) {
    vec total = {}, squares = {};
    for (long i = 0; i < n; i += WIDTH) total += load_some(x + i, n - i);
    *mean = sum(total) / n;
    for (long i = 0; i < n; i += WIDTH) {
        vec off = first(load_some(x + i, n - i) - all(*mean), n - i);
        squares += off * off;
    }
    *rstd = 1.0f / sqrtf(sum(squares) / n + eps);
}

/* A row's normalised numbers, times 1 + scale, plus shift. */
INLINE void normalise(const float *x, float mean, float rstd, const float *scale, const float *shift, float *to, long n) {
    for (long i = 0; i < n; i += WIDTH) {
        vec normal = (load_some(x + i, n - i) - all(mean)) * all(rstd);
        store_some(to + i, normal * (all(1.0f) + load_some(scale + i, n - i)) + load_some(shift + i, n - i), n - i);
    }
}

enum { BLOCK = 64 }; /* rows whose sums are added up aside, so that no small number meets a large sum */

/* to (n) = the sum of `count` parts, each BLOCK rows' sums, `step` floats from one to the next. In double precision, so
   that thousands of them may be added; always in one order. */
INLINE void add_up(const float *parts, long count, long step, long n, float *to) {
    enum { PIECE = 64 };
    for (long start = 0; start < n; start += PIECE) {
        double total[PIECE] = {};
        long some = least(PIECE, n - start);
        for (long c = 0; c < count; c++)
            for (long i = 0; i < some; i++) total[i] += parts[c * step + start + i];
        for (long i = 0; i < some; i++) to[start + i] = total[i];
    }
}

/* to += from, from = 0 */
INLINE void flush(float *to, float *from, long n) {
    for (long i = 0; i < n; i++) to[i] += from[i];
    memset(from, 0, sizeof(float) * n);
}
