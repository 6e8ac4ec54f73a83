/* Cross-entropy of rows of logits, and its gradient, each in one pass over them. */

#include "vector.h"

/* Of each row of logits (rows, width): the loss of its target, and the place of its largest number. `sums` (rows, 2): that
   number, and the logarithm of the sum of exponentials beside it, apart so that large logits lose nothing. */
void softmax_losses(const float *logits, const int64_t *targets, float *sums, float *losses, int64_t *best, long rows,
                    long width, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * width;
        const long even = width / WIDTH * WIDTH;
        vec most = all(-INFINITY), total = {};
        ints at = {};
        for (long i = 0; i < even; i += WIDTH) {
            const vec v = load(x + i);
            const ints above = v > most;
            most = choose(above, v, most), at = (above & ((int32_t)i - (ints){})) | (~above & at);
        }
        float largest = -INFINITY;
        long place = 0;
        for (int k = 0; k < WIDTH && even; k++) /* of equal ones the first */
            if (most[k] > largest || (most[k] == largest && at[k] + k < place)) largest = most[k], place = at[k] + k;
        for (long i = even; i < width; i++)
            if (x[i] > largest) largest = x[i], place = i;
        const vec off = all(largest);
        for (long i = 0; i < width; i += WIDTH)
            total += first(exponential(load_some(x + i, width - i) - off), width - i);
        sums[2 * row] = largest, sums[2 * row + 1] = logf(sum(total));
        losses[row] = sums[2 * row + 1] + (largest - x[targets[row]]), best[row] = place;
    }
}

/* The logits become the losses' gradients, times `slopes` (rows). */
void softmax_gradient(float *logits, const int64_t *targets, const float *sums, const float *slopes, long rows,
                      long width, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++) {
        float *x = logits + row * width;
        const vec largest = all(sums[2 * row]), log_sum = all(sums[2 * row + 1]), slope = all(slopes[row]);
        for (long i = 0; i < width; i += WIDTH) {
            const long n = width - i;
            store_some(x + i, slope * exponential(load_some(x + i, n) - largest - log_sum), n);
        }
        x[targets[row]] -= slopes[row];
    }
}
