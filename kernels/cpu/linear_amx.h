/* A panel of bfloat16 weights times a block of rows, by AMX: the same instructions in the same order for a row however
 * many others there are, so that its numbers do not depend on its batch.
 *
 * Rows lie as tiles: [tiles of 16 rows][depth / 32][16][32]; rows beyond the last one may hold anything.
 */
#ifndef BATON_LINEAR_AMX_H
#define BATON_LINEAR_AMX_H

#include "amx.h"
#include "linear.h"

#if AMX

INLINE int64_t num_amx_tiles(int64_t rows) { return (rows + AMX_ROWS - 1) / AMX_ROWS; }

/* One row of bfloat16 numbers into its place among the tiles. */
INLINE void place_row_amx(uint16_t *tiles, const uint16_t *row, int64_t index, size_t depth) {
    uint16_t *to = tiles + (size_t)(index / AMX_ROWS) * AMX_ROWS * depth + (size_t)(index % AMX_ROWS) * AMX_DEPTH;
    for (size_t k = 0; k < depth; k += AMX_DEPTH) memcpy(to + k * AMX_ROWS, row + k, 2 * AMX_DEPTH);
}

/* Before a block of so many rows is multiplied. Tiles 0 to 3: sums; 4, 5: rows; 6, 7: weights. */
INLINE void begin_rows_amx(int64_t num_rows) {
    uint8_t rows = num_rows < AMX_ROWS ? (uint8_t)num_rows : AMX_ROWS;
    amx_begin((struct amx_shape){{rows, rows, rows, rows, rows, rows, AMX_ROWS, AMX_ROWS}});
}

/* The weights that are multiplied next are asked for bit by bit in the meantime, so that memory is never idle. */
struct amx_ahead {
    const char *next, *end;
    size_t lines; /* of 64 bytes, of each of a panel's steps */
};

INLINE void prefetch_amx(struct amx_ahead *ahead) {
    for (size_t line = 0; line < ahead->lines && ahead->next < ahead->end; line++, ahead->next += 64) {
        __builtin_prefetch(ahead->next, 0, 2);
    }
}

/* sums [1 or 2 tiles of rows][16][PANEL]; `count` is a constant. */
INLINE void multiply_amx(const int count, float *sums, const uint16_t *rows, const char *panel, size_t depth,
                         struct amx_ahead *ahead) {
    const char *next = (const char *)(rows + AMX_ROWS * depth);
    AMX_ZERO(0);
    AMX_ZERO(1);
    if (count == 2) {
        AMX_ZERO(2);
        AMX_ZERO(3);
    }
    for (size_t k = 0; k < depth / AMX_DEPTH; k++) {
        const char *weights = panel + k * AMX_ROWS * PANEL * 4;
        prefetch_amx(ahead);
        AMX_LOAD(6, weights, 4 * PANEL);
        AMX_LOAD(4, (const char *)rows + k * AMX_ROWS * 64, 64);
        AMX_MULTIPLY(0, 4, 6);
        AMX_LOAD(7, weights + 64, 4 * PANEL);
        AMX_MULTIPLY(1, 4, 7);
        if (count == 2) {
            AMX_LOAD(5, next + k * AMX_ROWS * 64, 64);
            AMX_MULTIPLY(2, 5, 6);
            AMX_MULTIPLY(3, 5, 7);
        }
    }
    AMX_STORE(0, sums, 4 * PANEL);
    AMX_STORE(1, sums + 16, 4 * PANEL);
    if (count == 2) {
        AMX_STORE(2, sums + AMX_ROWS * PANEL, 4 * PANEL);
        AMX_STORE(3, sums + AMX_ROWS * PANEL + 16, 4 * PANEL);
    }
}

/* Sums of one row of a block as outputs, where all of a panel's are there; bias: of the panel, or zeros. */
INLINE void finish_panel(const struct linear *linear, int64_t row, size_t first, const float *sums,
                         const float *bias) {
    size_t at = (size_t)row * (size_t)linear->num_outputs + first;
    UNROLL for (size_t column = 0; column < PANEL; column += LANES) {
        vfloat sum = load(sums + column) + load(bias + column);
        if (linear->residual) sum += load_as(linear->residual, at + column, BFLOAT16);
        store_as(linear->output, at + column, sum, BFLOAT16);
    }
}

/* The same of the last panel, which may have fewer outputs. */
static void finish_some(const struct linear *linear, int64_t row, size_t first, const float *sums,
                        const float *bias) {
    for (size_t column = 0; first + column < (size_t)linear->num_outputs && column < PANEL; column++) {
        size_t at = (size_t)row * (size_t)linear->num_outputs + first + column;
        float sum = sums[column] + bias[column];
        if (linear->residual) sum += load_one(linear->residual, at, BFLOAT16);
        store_one(linear->output, at, sum, BFLOAT16);
    }
}

/* Outputs `first` to first + PANEL of all rows of a block. panel: [depth / 2][PANEL][2]; `has_next`: the one that lies
 * behind it is multiplied next. */
static void multiply_panel_amx(const struct linear *linear, const char *panel, int has_next, size_t first,
                               const uint16_t *rows, size_t depth, int64_t first_row, int64_t num_rows) {
    size_t bytes = depth * PANEL * 2, pairs = (size_t)(num_rows + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS);
    size_t lines = bytes / 64 / (pairs * (depth / AMX_DEPTH));
    struct amx_ahead ahead = {panel + bytes, panel + (has_next ? 2 : 1) * bytes, lines > 0 ? lines : 1};
    float sums[2 * AMX_ROWS * PANEL] __attribute__((aligned(64)));
    float bias[PANEL] = {0};
    size_t outputs = (size_t)linear->num_outputs - first;
    if (outputs > PANEL) outputs = PANEL;
    if (linear->bias) read_row_as(bias, (const uint16_t *)linear->bias + first, outputs, BFLOAT16);
    for (int64_t row = 0; row < num_rows; row += 2 * AMX_ROWS) {
        int64_t left = num_rows - row, count = left < 2 * AMX_ROWS ? left : 2 * AMX_ROWS;
        const uint16_t *tiles = rows + (size_t)row * depth;
        if (count > AMX_ROWS) {
            multiply_amx(2, sums, tiles, panel, depth, &ahead);
        } else {
            multiply_amx(1, sums, tiles, panel, depth, &ahead);
        }
        for (int64_t r = 0; r < count; r++) {
            if (outputs == PANEL) {
                finish_panel(linear, first_row + row + r, first, sums + r * PANEL, bias);
            } else {
                finish_some(linear, first_row + row + r, first, sums + r * PANEL, bias);
            }
        }
    }
}

#endif
#endif
