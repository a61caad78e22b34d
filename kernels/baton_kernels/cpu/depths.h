/* How far each token of a row of logits lies below the likeliest, and what it weighs: for sums and ranks without a
 * sort. A depth is a float of at least 0, whose bits are ordered as its values are, so that the one of some rank is
 * found by bisecting over 31 bits. Weights are whole numbers, whose sums depend on no order.
 */
#ifndef BATON_DEPTHS_H
#define BATON_DEPTHS_H

#include "rows.h"
#include "threads.h"

#define CHUNK 4096 /* tokens, whose halves of weights a lane adds up in 32 bits */
#define HALF_BITS 20
#define HALF ((float)(1 << HALF_BITS))
#define DEEPEST 0x7fffffff

/* One row: of each token how deep it lies, and its weight, exp(-depth) * 2^40; at the end tokens of no weight. */
struct row {
    float *depths, *weights;
    int64_t size; /* a multiple of LANES */
};

INLINE vint depth_bits(const struct row *row, int64_t i) { return (vint)load(row->depths + i); }

INLINE int64_t chunk_end(const struct row *row, int64_t first) {
    return first + CHUNK < row->size ? first + CHUNK : row->size;
}

/* Never inlined, so that equal depths have equal weights wherever they are computed. */
static __attribute__((noinline)) void weigh(float *weights, const float *depths, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        store(weights + i, vexp_negative(-load(depths + i)) * (HALF * HALF));
    }
}

static inline int64_t weight_of(int32_t depth) {
    float depths[LANES] = {bits_to_float((uint32_t)depth)}, weights[LANES];
    weigh(weights, depths, LANES);
    return (int64_t)weights[0];
}

/* Tokens of [first, end) no deeper than `bound`. */
static inline int64_t count(const struct row *row, int64_t first, int64_t end, int32_t bound) {
    vint less = {0};
    for (int64_t i = first; i < end; i += LANES) less += depth_bits(row, i) <= bound;
    int64_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum -= less[lane];
    return sum;
}

/* What the tokens of [first, end), at most CHUNK, weigh that are no deeper than `bound`. */
static inline int64_t chunk_mass(const struct row *row, int64_t first, int64_t end, int32_t bound) {
    vuint high = {0}, low = {0};
    for (int64_t i = first; i < end; i += LANES) {
        vfloat weights = choose(depth_bits(row, i) <= bound, load(row->weights + i), splat(0.0f));
        vint upper = __builtin_convertvector(weights * (1.0f / HALF), vint);
        high += (vuint)upper;
        low += (vuint)__builtin_convertvector(weights - __builtin_convertvector(upper, vfloat) * HALF, vint);
    }
    int64_t highs = 0, lows = 0;
    for (int lane = 0; lane < LANES; lane++) {
        highs += high[lane];
        lows += low[lane];
    }
    return (highs << HALF_BITS) + lows;
}

static inline int64_t mass(const struct row *row, int32_t bound) {
    int64_t sum = 0;
    for (int64_t first = 0; first < row->size; first += CHUNK) {
        sum += chunk_mass(row, first, chunk_end(row, first), bound);
    }
    return sum;
}

/* The least depth, at most `bound`, that at least `top_k` tokens have reached. */
static inline int32_t kth(const struct row *row, int32_t bound, int64_t top_k) {
    int32_t low = 0;
    while (low < bound) {
        int32_t middle = low + (bound - low) / 2;
        int64_t found = count(row, 0, row->size, middle);
        if (found == top_k) return middle; /* any depth between theirs and the next one's does */
        if (found < top_k) {
            low = middle + 1;
        } else {
            bound = middle;
        }
    }
    return low;
}

/* Fills the row with logits divided by `temperature`, in memory of this thread; returns 0 where there is none. */
static inline int read_depths(struct row *row, const void *from, int64_t size, enum dtype dtype, float temperature) {
    row->size = (size + LANES - 1) / LANES * LANES;
    row->depths = scratch(PRIVATE_SLOT, 2 * (size_t)row->size * sizeof(float));
    if (!row->depths) return 0;
    row->weights = row->depths + row->size;
    read_row(row->depths, from, (size_t)size, dtype);
    vfloat most = splat(-FLT_MAX);
    for (int64_t i = size; i < row->size; i++) row->depths[i] = -FLT_MAX;
    for (int64_t i = 0; i < row->size; i += LANES) {
        store(row->depths + i, finite(load(row->depths + i)));
        most = vmax(most, load(row->depths + i));
    }
    vfloat greatest = max_lanes(most);
    for (int64_t i = 0; i < row->size; i += LANES) {
        store(row->depths + i, (greatest - load(row->depths + i)) / splat(temperature));
    }
    for (int64_t i = size; i < row->size; i++) row->depths[i] = bits_to_float(DEEPEST);
    weigh(row->weights, row->depths, row->size);
    for (int64_t i = size; i < row->size; i++) row->weights[i] = 0.0f;
    return 1;
}

#endif
