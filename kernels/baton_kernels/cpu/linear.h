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

struct linear {
    const void *weights; /* packed */
    const void *bias;    /* [num_outputs] or NULL */
    const float *norm;   /* [num_inputs], of an RMSNorm of the states, or NULL */
    int64_t num_inputs, num_outputs;
    /* Numbers in a row of the output: num_outputs, or where `is_gated` at most half of them. Then of each 2 * LANES
     * outputs the first half are gates of the others, and SiLU(gate) * other is what is written. */
    int64_t output_width;
    int32_t dtype, is_gated; /* dtype: of states, bias, residual and output */
    float eps;
    /* of each call, whose rows baton_run is told: */
    const int64_t *row_ids; /* [num_rows] rows of states that are multiplied; NULL: all in their order */
    const void *states;   /* [rows][num_inputs] */
    const void *residual; /* [num_rows][output_width] or NULL */
    void *output;         /* [num_rows][output_width] */
};

void read_packed_row(void *output, const void *packed, int64_t id, int64_t num_inputs, enum dtype dtype);

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

/* One row's numbers as they are multiplied. */
static inline void read_transformed(const struct linear *linear, float *row, int64_t index) {
    size_t size = (size_t)linear->num_inputs, bytes = bytes_of((enum dtype)linear->dtype);
    if (linear->row_ids) index = linear->row_ids[index];
    read_row(row, (const char *)linear->states + (size_t)index * size * bytes, size, (enum dtype)linear->dtype);
    if (linear->norm) normalise_row(row, linear->norm, size, linear->eps);
}

/* Writes a vector of one row of the output from `column` on, with the residual. */
INLINE void write_vector(const struct linear *linear, int64_t row, size_t column, vfloat sum, enum dtype dtype) {
    size_t width = (size_t)linear->output_width, at = (size_t)row * width + column;
    if (column + LANES <= width) {
        if (linear->residual) sum += load_as(linear->residual, at, dtype);
        store_as(linear->output, at, sum, dtype);
        return;
    }
    for (size_t lane = 0; column + lane < width && lane < LANES; lane++) {
        float one = sum[lane];
        if (linear->residual) one += load_one(linear->residual, at + lane, dtype);
        store_one(linear->output, at + lane, one, dtype);
    }
}

/* Writes what two vectors of one row's sums, the bias among them, make: those of outputs from `first` on. */
INLINE void write_sums(const struct linear *linear, int64_t row, size_t first, vfloat sums[2], enum dtype dtype) {
    if (linear->is_gated) {
        write_vector(linear, row, first / 2, silu(sums[0]) * sums[1], dtype);
    } else {
        write_vector(linear, row, first, sums[0], dtype);
        write_vector(linear, row, first + LANES, sums[1], dtype);
    }
}

/* The bias of outputs from `first` on; 0 where there is none. */
INLINE vfloat bias_from(const struct linear *linear, size_t first, enum dtype dtype) {
    size_t left = (size_t)linear->num_outputs - first;
    if (!linear->bias || first >= (size_t)linear->num_outputs) return splat(0.0f);
    if (left >= LANES) return load_as(linear->bias, first, dtype);
    vfloat bias = splat(0.0f);
    for (size_t lane = 0; lane < left; lane++) bias[lane] = load_one(linear->bias, first + lane, dtype);
    return bias;
}

/* Writes two vectors of one row's sums. */
INLINE void finish(const struct linear *linear, int64_t row, size_t first, vfloat sums[2], enum dtype dtype) {
    sums[0] += bias_from(linear, first, dtype);
    sums[1] += bias_from(linear, first + LANES, dtype);
    write_sums(linear, row, first, sums, dtype);
}

#endif
