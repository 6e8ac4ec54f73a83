/* Attention of packed training rows [clean | copy 1 | copy 2 ...], forward and backward (opencola/layers/packed.py).

A row sees the clean rows of the blocks before its own, and its own block of its own part. Worked on is one head of one
sample at a time, and of it a tile of rows of one part, which meets one or two spans of keys. Weights lie as
[key][row of the tile], so that a maximum or a sum over keys needs no sum across a vector. The backward pass computes
them again, from the logarithms of their sums. */

#include "tiles.h"

/* Rows [sample][row][head][channel]: steps in floats, 1 between channels. */
typedef struct {
    float *start;
    long sample, row, head;
} tensor;

/* A call (kernels/attention.py). */
typedef struct {
    tensor q, k, v, past_k, past_v, out;          /* past: clean rows, where they are not the first rows of k and v */
    tensor gradient, dq, dk, dv;                  /* of the backward pass */
    float *log_sums;                              /* [sample][head][row of q] */
    long samples, heads, channels, asking;        /* channels: a multiple of TILE; asking: rows of q, the last ones */
    long block, clean, copies, length, first;     /* rows of a block; clean ones; copies, rows of each, its place */
    const uint8_t *history;                       /* [sample], or none: whether noisy rows see clean ones */
    const int32_t *documents;                     /* [sample][first + length], or none: rows see only their own */
    float *scratch;                               /* scratch_each floats for every thread */
    long scratch_each, threads;
    float scale;                                  /* of scores */
} call;

/* One head of one sample. */
typedef struct {
    const call *call;
    matrix q, k, v, clean_k, clean_v, out, gradient, dq, dk, dv;
    float *log_sums, scale;
    const int32_t *documents;
    int sees_history;
    float *rows, *gradients, *sums, *weights, *slopes; /* scratch: [channels][TILE] thrice, [key][TILE] twice */
} head;

/* Keys that rows of a tile see. */
typedef struct {
    matrix k, v, dk, dv; /* dk.start may be 0: no gradient */
    long n;
    const int32_t *documents;
    int32_t from[TILE], to[TILE]; /* those of them that each row sees */
    long all_from, all_to;        /* those that all rows see */
    float *weights, *slopes;      /* [n][TILE] */
} span;

/* Rows of one part, from row `at` of q on. */
typedef struct {
    long at, rows, spans;
    span span[2];
    int32_t documents[TILE];
} tile;

INLINE ints some(const int32_t *from, int v) {
    ints x;
    memcpy(&x, from + v * WIDTH, sizeof x);
    return x;
}

/* Whether rows of the tile see a key. */
INLINE ints visible(const tile *t, const span *s, long j, int v) {
    const ints key = (int32_t)j - (ints){};
    const ints seen = (key >= some(s->from, v)) & (key < some(s->to, v));
    return s->documents ? seen & (some(t->documents, v) == s->documents[j] - (ints){}) : seen;
}

/* Scores of keys that a row may not see become -infinity. */
static void hide(const tile *t) {
    int alike = 1; /* whether its rows are of one document */
    for (int i = 1; i < TILE; i++) alike &= t->documents[i] == t->documents[0];
    for (const span *s = t->span; s < t->span + t->spans; s++)
        for (long j = 0; j < s->n; j++) {
            const int before = j >= s->all_from && j < s->all_to; /* all rows see it, if it is of their document */
            if (before && s->documents && alike && s->documents[j] == t->documents[0]) continue;
            if (before && !s->documents) {
                j = s->all_to - 1;
                continue;
            }
            for (int v = 0; v < VECS; v++) {
                float *at = s->weights + j * TILE + v * WIDTH;
                store(at, choose(visible(t, s, j, v), load(at), all(-INFINITY)));
            }
        }
}

/* Scores become their exponentials, of which the largest of a row is 1; `total`: their sums. */
static void exponentials(const tile *t, vec *top, vec *total) {
    for (int v = 0; v < VECS; v++) {
        vec largest = all(-INFINITY), sum = all(0);
        for (const span *s = t->span; s < t->span + t->spans; s++) {
            const float *at = s->weights + v * WIDTH;
            for (long n = s->n; n > 0; n--, at += TILE) largest = larger(load(at), largest);
        }
        for (const span *s = t->span; s < t->span + t->spans; s++) {
            float *at = s->weights + v * WIDTH;
            for (long n = s->n; n > 0; n--, at += TILE) {
                const vec x = exponential(load(at) - largest);
                store(at, x);
                sum += x;
            }
        }
        top[v] = largest, total[v] = sum;
    }
}

/* Scores become weights, and the weights' gradients those of the scores, times `scale`. */
static void backward_softmax(const tile *t, const float *log_sums, float scale) {
    for (int v = 0; v < VECS; v++) {
        const vec log_sum = load(log_sums + v * WIDTH);
        vec mean = all(0);
        for (const span *s = t->span; s < t->span + t->spans; s++) {
            float *at = s->weights + v * WIDTH, *slope = s->slopes + v * WIDTH;
            for (long n = s->n; n > 0; n--, at += TILE, slope += TILE) {
                const vec x = exponential(load(at) - log_sum);
                store(at, x);
                mean += x * load(slope);
            }
        }
        for (const span *s = t->span; s < t->span + t->spans; s++) {
            float *at = s->weights + v * WIDTH, *slope = s->slopes + v * WIDTH;
            for (long n = s->n; n > 0; n--, at += TILE, slope += TILE)
                store(slope, all(scale) * load(at) * (load(slope) - mean));
        }
    }
}

/* Leave out the first keys, which are of other documents than the tile's rows. */
static void skip_documents(span *s, const tile *t) {
    long skipped = 0;
    for (int met = 0; skipped < s->n; skipped++) {
        for (int i = 0; i < TILE; i++) met |= s->documents[skipped] == t->documents[i];
        if (met) break;
    }
    s->k = from_row(s->k, skipped), s->v = from_row(s->v, skipped);
    s->dk = from_row(s->dk, skipped), s->dv = from_row(s->dv, skipped);
    s->n -= skipped, s->all_to -= skipped, s->documents += skipped;
    for (int i = 0; i < TILE; i++) s->to[i] -= skipped;
}

/* The tile from `row` on of a part, of which `start` is the row among all and `first` the place of the first row. */
static tile make_tile(const head *h, int noisy, long start, long first, long length, long row) {
    const call *c = h->call;
    const long own_start = row / c->block * c->block; /* of the first row's block */
    tile t = {.at = start + row, .rows = least(TILE, length - row)};
    span clean = {h->clean_k, h->clean_v, .documents = h->documents, .all_to = c->clean};
    if (!c->past_k.start) clean.dk = h->dk, clean.dv = h->dv;
    span own = {
        from_row(h->k, start + own_start), from_row(h->v, start + own_start),
        from_row(h->dk, start + own_start), from_row(h->dv, start + own_start),
        .documents = h->documents ? h->documents + first + own_start : 0, .all_to = length,
    };
    for (long i = 0; i < TILE; i++) { /* what is beyond its rows is as its last row */
        const long at = least(row + i, length - 1), block = at / c->block * c->block;
        if (h->documents) t.documents[i] = h->documents[first + at];
        /* to a clean row its own block is the next of the clean ones */
        clean.to[i] = !noisy ? least(block + c->block, length) : h->sees_history ? least(first + block, c->clean) : 0;
        own.from[i] = block - own_start, own.to[i] = least(block + c->block, length) - own_start;
        clean.all_to = least(clean.all_to, clean.to[i]);
        own.all_from = most(own.all_from, own.from[i]), own.all_to = least(own.all_to, own.to[i]);
    }
    clean.n = clean.to[TILE - 1], own.n = own.to[TILE - 1];
    if (h->documents) skip_documents(&clean, &t);
    if (clean.n) t.span[t.spans++] = clean;
    if (noisy) t.span[t.spans++] = own;
    float *weights = h->weights, *slopes = h->slopes;
    for (span *s = t.span; s < t.span + t.spans; s++) {
        s->weights = weights, s->slopes = slopes;
        weights += s->n * TILE, slopes += s->n * TILE;
    }
    return t;
}

static void forward(const head *h, tile *t) {
    const long channels = h->call->channels;
    const matrix sums = {h->sums, channels}, out = from_row(h->out, t->at);
    vec top[VECS], total[VECS];
    float inverse[TILE];
    transpose(from_row(h->q, t->at), t->rows, channels, h->scale, h->rows);
    for (span *s = t->span; s < t->span + t->spans; s++) products(s->k, s->n, h->rows, channels, s->weights);
    hide(t);
    exponentials(t, top, total);
    memset(h->sums, 0, sizeof(float) * TILE * channels);
    for (span *s = t->span; s < t->span + t->spans; s++)
        add_over_keys(sums, t->rows, s->weights, s->v, s->n, channels);
    for (int v = 0; v < VECS; v++) store(inverse + v * WIDTH, all(1) / total[v]);
    for (long i = 0; i < t->rows; i++) {
        h->log_sums[t->at + i] = top[i / WIDTH][i % WIDTH] + logf(total[i / WIDTH][i % WIDTH]);
        for (long d = 0; d < channels; d += WIDTH)
            store(out.start + i * out.step + d, all(inverse[i]) * load(h->sums + i * channels + d));
    }
}

static void backward(const head *h, tile *t) {
    const long channels = h->call->channels;
    const matrix q = from_row(h->q, t->at), gradient = from_row(h->gradient, t->at), dq = from_row(h->dq, t->at);
    float log_sums[TILE] = {};
    memcpy(log_sums, h->log_sums + t->at, sizeof(float) * t->rows);
    transpose(q, t->rows, channels, h->scale, h->rows);
    transpose(gradient, t->rows, channels, 1, h->gradients);
    for (span *s = t->span; s < t->span + t->spans; s++) {
        products(s->k, s->n, h->rows, channels, s->weights);
        products(s->v, s->n, h->gradients, channels, s->slopes);
    }
    hide(t);
    backward_softmax(t, log_sums, h->scale);
    for (long i = 0; i < t->rows; i++) memset(dq.start + i * dq.step, 0, sizeof(float) * channels);
    for (span *s = t->span; s < t->span + t->spans; s++) {
        add_over_keys(dq, t->rows, s->slopes, s->k, s->n, channels);
        if (!s->dk.start) continue;
        add_over_rows(s->dk, s->n, s->slopes, q, t->rows, channels);
        add_over_rows(s->dv, s->n, s->weights, gradient, t->rows, channels);
    }
}

INLINE matrix of_head(tensor x, long sample, long head) {
    return (matrix){x.start ? x.start + sample * x.sample + head * x.head : 0, x.row};
}

static head make_head(const call *c, long sample, long number, float *scratch) {
    const long tile = TILE * c->channels;
    head h = {
        .call = c,
        .k = of_head(c->k, sample, number), .v = of_head(c->v, sample, number),
        .q = of_head(c->q, sample, number), .out = of_head(c->out, sample, number),
        .gradient = of_head(c->gradient, sample, number), .dq = of_head(c->dq, sample, number),
        .dk = of_head(c->dk, sample, number), .dv = of_head(c->dv, sample, number),
        .log_sums = c->log_sums + (sample * c->heads + number) * c->asking,
        .documents = c->documents ? c->documents + sample * (c->first + c->length) : 0,
        .sees_history = !c->history || c->history[sample],
        .scale = c->scale,
    };
    h.rows = scratch, h.gradients = h.rows + tile, h.sums = h.gradients + tile;
    h.weights = h.sums + tile, h.slopes = h.weights + (c->scratch_each - 3 * tile) / 2;
    h.clean_k = c->past_k.start ? of_head(c->past_k, sample, number) : h.k;
    h.clean_v = c->past_v.start ? of_head(c->past_v, sample, number) : h.v;
    return h;
}

/* The rows of a tile on their way to the cache; none needs to be there. */
static void prefetch(matrix x, long row, long channels) {
    for (long i = 0; x.start && i < TILE; i++)
        for (long d = 0; d < channels; d += 16) __builtin_prefetch(x.start + (row + i) * x.step + d, 0, 2);
}

/* All tiles of one head of one sample; the rows of the next are fetched meanwhile. */
static void each_tile(const call *c, void (*work)(const head *, tile *), long i, float *scratch) {
    const long clean = c->past_k.start ? 0 : c->clean, all = clean + c->copies * c->length, skipped = all - c->asking;
    const head h = make_head(c, i / c->heads, i % c->heads, scratch);
    const long after = least(i + 1, c->samples * c->heads - 1);
    const head next = make_head(c, after / c->heads, after % c->heads, scratch);
    for (long row = 0; work == backward && row < all; row++) {
        memset(h.dk.start + row * h.dk.step, 0, sizeof(float) * c->channels);
        memset(h.dv.start + row * h.dv.step, 0, sizeof(float) * c->channels);
    }
    for (long part = 0; part <= c->copies; part++) {
        const long start = part ? clean + (part - 1) * c->length : 0, length = part ? c->length : clean;
        for (long row = most(0, skipped - start); row < length; row += TILE) {
            tile t = make_tile(&h, part > 0, start, part ? c->first : 0, length, row);
            prefetch(next.k, t.at, c->channels), prefetch(next.v, t.at, c->channels);
            t.at -= skipped;
            prefetch(next.q, t.at, c->channels), prefetch(next.gradient, t.at, c->channels);
            work(&h, &t);
        }
    }
}

/* The number of a thread is ours, as the function that tells it may be that of another OpenMP in the process. */
static void each_head(const call *c, void (*work)(const head *, tile *)) {
    const long heads = c->samples * c->heads, share = (heads + c->threads - 1) / c->threads;
#pragma omp parallel for num_threads(c->threads) if (c->threads > 1)
    for (long thread = 0; thread < c->threads; thread++)
        for (long i = thread * share; i < least((thread + 1) * share, heads); i++)
            each_tile(c, work, i, c->scratch + thread * c->scratch_each);
}

void attend_packed(const call *c) { each_head(c, forward); }

void attend_packed_backward(const call *c) { each_head(c, backward); }
