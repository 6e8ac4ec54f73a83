/* GELU in its tanh form. */

#include "vector.h"

/* y = x s(x), n numbers. */
void gelu(const float *x, float *y, long n, long threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < n; i += WIDTH) {
        vec v = load_some(x + i, n - i);
        store_some(y + i, v * gelu_gate(v), n - i);
    }
}
