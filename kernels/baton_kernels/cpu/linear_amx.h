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

/* Rows of one panel that are multiplied and not written yet. They are written between the next products, which the
 * processor multiplies on its own in the meantime. */
struct amx_pending {
    const struct linear *linear;
    const float *sums; /* [num_rows][PANEL] */
    int64_t first_row, num_rows, num_written;
    size_t first; /* output */
    float bias[PANEL];
};

static inline void write_pending(struct amx_pending *pending, int64_t num_rows) {
    int64_t end = pending->num_written + num_rows;
    if (end > pending->num_rows) end = pending->num_rows;
    for (int64_t row = pending->num_written; row < end; row++) {
        for (size_t column = 0; column < PANEL; column += TILE_COLUMNS) {
            const float *from = pending->sums + (size_t)row * PANEL + column;
            vfloat sums[2] = {load(from) + load(pending->bias + column),
                              load(from + LANES) + load(pending->bias + column + LANES)};
            write_sums(pending->linear, pending->first_row + row, pending->first + column, sums, BFLOAT16);
        }
    }
    pending->num_written = end;
}

/* sums [1 or 2 tiles of rows][16][PANEL]; `count` is a constant. */
INLINE void multiply_amx(const int count, float *sums, const uint16_t *rows, const char *panel, size_t depth,
                         struct amx_ahead *ahead, struct amx_pending *pending) {
    const char *below = (const char *)(rows + AMX_ROWS * depth);
    int64_t steps = (int64_t)(depth / AMX_DEPTH), rows_a_step = (pending->num_rows + steps - 1) / steps;
    AMX_ZERO(0);
    AMX_ZERO(1);
    if (count == 2) {
        AMX_ZERO(2);
        AMX_ZERO(3);
    }
    for (int64_t k = 0; k < steps; k++) {
        const char *weights = panel + k * AMX_ROWS * PANEL * 4;
        AMX_LOAD(6, weights, 4 * PANEL);
        AMX_LOAD(4, (const char *)rows + k * AMX_ROWS * 64, 64);
        AMX_MULTIPLY(0, 4, 6);
        AMX_LOAD(7, weights + 64, 4 * PANEL);
        AMX_MULTIPLY(1, 4, 7);
        if (count == 2) {
            AMX_LOAD(5, below + k * AMX_ROWS * 64, 64);
            AMX_MULTIPLY(2, 5, 6);
            AMX_MULTIPLY(3, 5, 7);
        }
        prefetch_amx(ahead);
        write_pending(pending, rows_a_step);
    }
    AMX_STORE(0, sums, 4 * PANEL);
    AMX_STORE(1, sums + 16, 4 * PANEL);
    if (count == 2) {
        AMX_STORE(2, sums + AMX_ROWS * PANEL, 4 * PANEL);
        AMX_STORE(3, sums + AMX_ROWS * PANEL + 16, 4 * PANEL);
    }
}

/* A block of rows, and where its sums are kept until they are written. */
struct amx_block {
    const uint16_t *rows;
    int64_t first_row, num_rows;
    size_t depth;
    int turn; /* which of `sums` comes next */
    struct amx_pending pending;
    float sums[2][2 * AMX_ROWS * PANEL] __attribute__((aligned(64)));
};

/* Before a block is multiplied. Tiles 0 to 3: sums; 4, 5: rows; 6, 7: weights. */
static inline void begin_rows_amx(struct amx_block *block, const uint16_t *rows, size_t depth, int64_t first_row,
                                  int64_t num_rows) {
    uint8_t height = num_rows < AMX_ROWS ? (uint8_t)num_rows : AMX_ROWS;
    amx_begin((struct amx_shape){{height, height, height, height, height, height, AMX_ROWS, AMX_ROWS}});
    block->rows = rows;
    block->depth = depth;
    block->first_row = first_row;
    block->num_rows = num_rows;
    block->turn = 0;
    block->pending.num_rows = block->pending.num_written = 0;
}

/* Writes what is left. */
static inline void end_rows_amx(struct amx_block *block) {
    write_pending(&block->pending, block->pending.num_rows);
    amx_end();
}

/* Outputs `first` to first + PANEL of all rows of a block. panel: [depth / 2][PANEL][2]; `has_next`: the one that lies
 * behind it is multiplied next. */
static void multiply_panel_amx(const struct linear *linear, struct amx_block *block, const char *panel, int has_next,
                               size_t first) {
    size_t depth = block->depth, bytes = depth * PANEL * 2;
    size_t pairs = (size_t)(block->num_rows + 2 * AMX_ROWS - 1) / (2 * AMX_ROWS);
    size_t lines = bytes / 64 / (pairs * (depth / AMX_DEPTH));
    struct amx_ahead ahead = {panel + bytes, panel + (has_next ? 2 : 1) * bytes, lines > 0 ? lines : 1};
    struct amx_pending *pending = &block->pending;
    for (int64_t row = 0; row < block->num_rows; row += 2 * AMX_ROWS) {
        int64_t left = block->num_rows - row, count = left < 2 * AMX_ROWS ? left : 2 * AMX_ROWS;
        const uint16_t *tiles = block->rows + (size_t)row * depth;
        float *sums = block->sums[block->turn];
        if (count > AMX_ROWS) {
            multiply_amx(2, sums, tiles, panel, depth, &ahead, pending);
        } else {
            multiply_amx(1, sums, tiles, panel, depth, &ahead, pending);
        }
        block->turn = !block->turn;
        pending->linear = linear;
        pending->sums = sums;
        pending->first_row = block->first_row + row;
        pending->num_rows = count;
        pending->num_written = 0;
        pending->first = first;
        for (size_t column = 0; row == 0 && column < PANEL; column += LANES) {
            store(pending->bias + column, bias_from(linear, first + column, BFLOAT16));
        }
    }
}

#endif
#endif
