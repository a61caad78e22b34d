/* What products with packed weights share, whatever the weights are: arguments, tiles of rows, reading and writing.
 *
 * Weights are packed once, in panels of 32 outputs; missing outputs are zero. A block of rows is read, transformed
 * and laid out in tiles by all threads, then each thread takes panels as it is free.
 */
#ifndef BATON_LINEAR_H
#define BATON_LINEAR_H

#include "amx.h"
#include "calls.h"
#include "rows.h"
#include "threads.h"
#include "tile.h"

#define PANEL 32
#define ROWS_BYTES ((AMX ? 1024 : 640) << 10) /* of a block of rows: it has to stay in a core's own cache */
#define PREFETCH_BYTES 2048 /* ahead: the processor's own prefetching stops at each page */

enum transform { PLAIN = 0, NORMALISE = 1, GATE = 2 };

struct linear {
    const void *weights; /* packed */
    const void *bias;    /* [num_outputs] or NULL */
    const float *norm;   /* [num_inputs], where transform is NORMALISE */
    int64_t num_inputs, num_outputs;
    int32_t dtype, transform; /* dtype: of states, bias, residual and output */
    float eps;
    /* of each call, whose rows baton_run is told: */
    const void *states;   /* [num_rows][num_inputs]; gate and up beside each other, twice as long, where GATE */
    const void *residual; /* [num_rows][num_outputs] or NULL */
    void *output;         /* [num_rows][num_outputs] */
};

INLINE int64_t num_panels(const struct linear *linear) { return (linear->num_outputs + PANEL - 1) / PANEL; }

/* Tiles share the rows of a block evenly, as no tile should have few. */
INLINE int64_t num_tiles(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

INLINE int64_t tile_start(int64_t tile, int64_t rows) { return tile * rows / num_tiles(rows); }

/* Rows of a block, where blocks share `num_rows` evenly but for whole tiles. */
static inline int64_t rows_of_block(int64_t num_rows, size_t row_bytes) {
    int64_t step = AMX ? 2 * AMX_ROWS : TILE_ROWS;
    int64_t most = ROWS_BYTES / (int64_t)row_bytes / step * step;
    if (most < step) most = step;
    int64_t blocks = (num_rows + most - 1) / most, rows = (num_rows + blocks - 1) / blocks;
    return AMX ? (rows + step - 1) / step * step : rows;
}

/* One row's numbers as they are multiplied; `other`: memory of the same size. */
static inline void read_transformed(const struct linear *linear, float *row, float *other, int64_t index) {
    size_t size = (size_t)linear->num_inputs, bytes = bytes_of(linear->dtype);
    size_t stride = linear->transform == GATE ? 2 * size : size;
    const char *from = (const char *)linear->states + (size_t)index * stride * bytes;
    read_row(row, from, size, linear->dtype);
    if (linear->transform == NORMALISE) normalise_row(row, linear->norm, size, linear->eps);
    if (linear->transform == GATE) {
        read_row(other, from + size * bytes, size, linear->dtype);
        gate_row(row, other, size);
    }
}

/* Writes two vectors of one row's outputs, with bias and residual. */
INLINE void finish(const struct linear *linear, int64_t row, size_t first, vfloat sums[2], enum dtype dtype) {
    size_t num_outputs = (size_t)linear->num_outputs, at = (size_t)row * num_outputs + first;
    for (size_t half = 0; half < 2; half++) {
        size_t column = half * LANES, left = num_outputs - first;
        if (column + LANES <= left) {
            vfloat sum = sums[half];
            if (linear->bias) sum += load_as(linear->bias, first + column, dtype);
            if (linear->residual) sum += load_as(linear->residual, at + column, dtype);
            store_as(linear->output, at + column, sum, dtype);
            continue;
        }
        for (size_t lane = 0; column + lane < left && lane < LANES; lane++) {
            float sum = sums[half][lane];
            if (linear->bias) sum += load_one(linear->bias, first + column + lane, dtype);
            if (linear->residual) sum += load_one(linear->residual, at + column + lane, dtype);
            store_one(linear->output, at + column + lane, sum, dtype);
        }
    }
}

#endif
