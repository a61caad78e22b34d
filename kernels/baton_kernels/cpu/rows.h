/* What is done to a row of numbers before it is multiplied: read as float32, normalised, or gated. */
#ifndef BATON_ROWS_H
#define BATON_ROWS_H

#include <float.h>

#include "vector.h"

/* NaN as the least number, infinities as the greatest and the least. */
INLINE vfloat finite(vfloat x) {
    x = choose(x > splat(-FLT_MAX), x, splat(-FLT_MAX));
    return choose(x < splat(FLT_MAX), x, splat(FLT_MAX));
}

/* `size` numbers of any dtype as float32. */
INLINE void read_row_as(float *to, const void *from, size_t size, enum dtype dtype) {
    size_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, load_as(from, i, dtype));
    for (; i < size; i++) to[i] = load_one(from, i, dtype);
}

static inline void read_row(float *to, const void *from, size_t size, enum dtype dtype) {
    if (dtype == FLOAT32) {
        memcpy(to, from, 4 * size);
    } else if (dtype == BFLOAT16) {
        read_row_as(to, from, size, BFLOAT16);
    } else if (dtype == FLOAT8) {
        read_row_as(to, from, size, FLOAT8);
    } else {
        read_row_as(to, from, size, FLOAT16);
    }
}

INLINE void write_row_as(void *to, const float *from, size_t size, enum dtype dtype) {
    size_t i = 0;
    for (; i + LANES <= size; i += LANES) store_as(to, i, load(from + i), dtype);
    for (; i < size; i++) store_one(to, i, from[i], dtype);
}

static inline void write_row(void *to, const float *from, size_t size, enum dtype dtype) {
    if (dtype == FLOAT32) {
        memcpy(to, from, 4 * size);
    } else if (dtype == BFLOAT16) {
        write_row_as(to, from, size, BFLOAT16);
    } else if (dtype == FLOAT8) {
        write_row_as(to, from, size, FLOAT8);
    } else {
        write_row_as(to, from, size, FLOAT16);
    }
}

/* Divides a row by its root mean square and multiplies it by `weight` (Zhang and Sennrich, 2019). */
static inline void normalise_row(float *row, const float *weight, size_t size, float eps) {
    vfloat squares = splat(0.0f);
    float rest = 0.0f;
    size_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(row + i) * load(row + i);
    for (; i < size; i++) rest += row[i] * row[i];
    float scale = 1.0f / __builtin_sqrtf((sum_lanes(squares)[0] + rest) / (float)size + eps);
    for (i = 0; i + LANES <= size; i += LANES) store(row + i, load(row + i) * scale * load(weight + i));
    for (; i < size; i++) row[i] *= scale * weight[i];
}

/* x times its logistic function (Elfwing et al., 2018). */
INLINE vfloat silu(vfloat x) { return x / (vexp(-x) + 1.0f); }

#endif
