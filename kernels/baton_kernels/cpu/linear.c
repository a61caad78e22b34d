/* y = x W^T + b (+ residual), x read as it is or normalised, y written as it is or gated; float32 sums throughout.
 *
 * A bfloat16 panel holds [inputs / 2][32][2]: as 32-bit words, the even input is the word shifted up and the odd one
 * the word with its lower half cleared, one instruction each; a CPU that multiplies bfloat16 takes words as they are,
 * those of rows rounded to bfloat16 as well, or with AMX whole tiles of them (linear_amx.h). Panels of the other dtypes
 * hold [inputs][32]. Missing inputs are zero. Few rows are bound by reading the weights once; many by multiplication
 * (Goto and van de Geijn, 2008).
 */
#include "linear.h"
#include "linear_amx.h"

struct work {
    const struct linear *linear;
    void *rows; /* of each tile of rows: [words][rows of the tile]; with AMX see linear_amx.h */
    size_t depth; /* inputs, as far as they are packed */
    size_t words; /* that many floats, or half as many pairs of bfloat16 */
    int64_t num_rows, block_rows;
    struct shares panels;
};

/* Inputs of a packed row: whole pairs, of bfloat16 whole tiles of AMX. */
static size_t packed_depth(int64_t num_inputs, enum dtype dtype) {
    size_t step = dtype == BFLOAT16 ? 32 : 2;
    return ((size_t)num_inputs + step - 1) / step * step;
}

/* Numbers in a vector: see is_gated. */
EXPORT int64_t baton_lanes(void) { return LANES; }

EXPORT int64_t baton_packed_bytes(int64_t num_outputs, int64_t num_inputs, int32_t dtype) {
    int64_t panels = (num_outputs + PANEL - 1) / PANEL;
    return panels * PANEL * (int64_t)packed_depth(num_inputs, dtype) * (int64_t)bytes_of(dtype);
}

/* Where weight (output, input) lies in packed weights, in elements. */
INLINE size_t place(size_t output, size_t input, size_t depth, enum dtype dtype) {
    size_t panel = output / PANEL * PANEL * depth, column = output % PANEL;
    if (dtype == BFLOAT16) return panel + input / 2 * 2 * PANEL + 2 * column + input % 2;
    return panel + input * PANEL + column;
}

struct packing {
    char *packed;
    const char *weights;
    size_t num_outputs, num_inputs;
    enum dtype dtype;
    size_t next_panel;
};

INLINE void pack_panel(const struct packing *p, size_t first, const enum dtype dtype) {
    size_t bytes = bytes_of(dtype), depth = packed_depth((int64_t)p->num_inputs, dtype), left = p->num_outputs - first;
    for (size_t input = 0; input < p->num_inputs; input++) {
        for (size_t output = first; output < first + (left < PANEL ? left : PANEL); output++) {
            const char *from = p->weights + (output * p->num_inputs + input) * bytes;
            memcpy(p->packed + place(output, input, depth, dtype) * bytes, from, bytes);
        }
    }
}

static void pack_share(void *argument) {
    struct packing *p = argument;
    for (size_t first; (first = PANEL * NEXT_ITEM(&p->next_panel)) < p->num_outputs;) {
        switch (p->dtype) {
            case FLOAT32: pack_panel(p, first, FLOAT32); break;
            case BFLOAT16: pack_panel(p, first, BFLOAT16); break;
            default: pack_panel(p, first, FLOAT16); break;
        }
    }
}

/* weights: [num_outputs][num_inputs]; packed: zeroed, baton_packed_bytes. */
EXPORT void baton_pack(void *packed, const void *weights, int64_t num_outputs, int64_t num_inputs, int32_t dtype,
                       int32_t num_threads) {
    struct packing p = {packed, weights, (size_t)num_outputs, (size_t)num_inputs, (enum dtype)dtype, 0};
    run_team(pack_share, &p, num_threads);
}

/* Row `id` of packed weights, as an embedding. */
void read_packed_row(void *output, const void *packed, int64_t id, int64_t num_inputs, enum dtype dtype) {
    size_t bytes = bytes_of(dtype), step = dtype == BFLOAT16 ? 2 : 1; /* inputs beside each other */
    size_t input = 0, size = (size_t)num_inputs;
    const char *from = (const char *)packed + place((size_t)id, 0, packed_depth(num_inputs, dtype), dtype) * bytes;
    char *to = output;
    for (; input + step <= size; input += step, to += step * bytes, from += step * bytes * PANEL) {
        dtype == FLOAT16 ? memcpy(to, from, 2) : memcpy(to, from, 4);
    }
    if (input < size) memcpy(to, from, bytes);
}

/* Transposes the block's rows into tiles; each thread takes its share of the rows. */
static void prepare_rows(struct work *work, int64_t first_row, int64_t num_rows, float *row) {
    float *words = row + work->depth;
    for (size_t k = (size_t)work->linear->num_inputs; k < work->depth; k++) row[k] = 0.0f;
    int64_t index = team_index(), size = team_size();
    int64_t tile = 0;
    for (int64_t r = num_rows * index / size; r < num_rows * (index + 1) / size; r++) {
        read_transformed(work->linear, row, first_row + r);
#if AMX
        if (work->linear->dtype == BFLOAT16) {
            write_row_as(words, row, work->depth, BFLOAT16);
            place_row_amx(work->rows, (const uint16_t *)words, r, work->depth);
            continue;
        }
#endif
        while (tile_start(tile + 1, num_rows) <= r) tile++;
        int64_t start = tile_start(tile, num_rows), height = tile_start(tile + 1, num_rows) - start;
        const uint32_t *from = (const uint32_t *)row;
        uint32_t *to = (uint32_t *)work->rows + (size_t)start * work->words + (size_t)(r - start);
        if (work->words < work->depth) {
            write_row_as(words, row, work->depth, BFLOAT16);
            from = (const uint32_t *)words;
        }
        for (size_t k = 0; k < work->words; k++) memcpy(to + k * (size_t)height, from + k, sizeof *to);
    }
}

/* Columns of two vectors of one panel with a tile of rows; `height` is a constant. */
INLINE void multiply_pairs(const int height, vfloat results[][2], const uint32_t *rows, const void *panel,
                           size_t column, size_t words) {
    const uint32_t *weights = (const uint32_t *)panel + column;
    vfloat sums[TILE_ROWS][2]; /* not `results`: in memory that others see, each step would be stored */
    UNROLL for (int r = 0; r < height; r++) sums[r][0] = sums[r][1] = (vfloat){0};
    for (size_t k = 0; k < words; k++) {
        vuint first, second;
        memcpy(&first, weights, sizeof first);
        memcpy(&second, weights + LANES, sizeof second);
        __builtin_prefetch((const char *)weights + PREFETCH_BYTES);
        __builtin_prefetch((const char *)weights + PREFETCH_BYTES + 64);
        UNROLL for (int r = 0; r < height; r++) {
            vuint pair = rows[r] - (vuint){0};
            sums[r][0] = add_pair_products(sums[r][0], pair, first);
            sums[r][1] = add_pair_products(sums[r][1], pair, second);
        }
        rows += height;
        weights += PANEL;
    }
    UNROLL for (int r = 0; r < height; r++) {
        results[r][0] = sums[r][0];
        results[r][1] = sums[r][1];
    }
}

/* The same with rows of floats; `dtype` is a constant too. */
INLINE void multiply(const int height, const enum dtype dtype, vfloat sums[][2], const float *rows,
                     const void *panel, size_t column, size_t depth) {
    const size_t step = dtype == BFLOAT16 ? 2 : 1; /* inputs at a time */
    const char *weights = (const char *)panel + column * step * bytes_of(dtype);
    for (size_t k = 0; k < depth; k += step) {
        vfloat parts[2][2]; /* of each input */
        __builtin_prefetch(weights + PREFETCH_BYTES);
        if (step * bytes_of(dtype) > 2) __builtin_prefetch(weights + PREFETCH_BYTES + 64);
        for (size_t half = 0; half < 2; half++) {
            if (dtype == BFLOAT16) {
                vuint words;
                memcpy(&words, weights + half * sizeof words, sizeof words);
                parts[0][half] = (vfloat)(words << 16);
                parts[1][half] = (vfloat)(words & 0xffff0000u);
            } else {
                parts[0][half] = load_as(weights, LANES * half, dtype);
            }
        }
        for (size_t part = 0; part < step; part++) {
            UNROLL for (int r = 0; r < height; r++) {
                vfloat number = splat(rows[part * (size_t)height + (size_t)r]);
                sums[r][0] += number * parts[part][0];
                sums[r][1] += number * parts[part][1];
            }
        }
        rows += step * (size_t)height;
        weights += step * PANEL * bytes_of(dtype);
    }
}

INLINE void multiply_panel(struct work *work, int64_t panel, int64_t first_row, int64_t num_rows,
                           const enum dtype dtype) {
    const struct linear *linear = work->linear;
    const char *weights = (const char *)linear->weights + (size_t)panel * PANEL * work->depth * bytes_of(dtype);
    for (int64_t tile = 0; tile < num_tiles(num_rows); tile++) {
        int64_t start = tile_start(tile, num_rows);
        int height = (int)(tile_start(tile + 1, num_rows) - start);
        const void *rows = (const uint32_t *)work->rows + (size_t)start * work->words;
        for (size_t column = 0; column < PANEL; column += TILE_COLUMNS) {
            size_t first = (size_t)panel * PANEL + column;
            if (first >= (size_t)linear->num_outputs) break;
#define MULTIPLY(n)                                                                                           \
    {                                                                                                         \
        vfloat sums[n][2] = {0};                                                                              \
        if (BFLOAT16_PRODUCTS && dtype == BFLOAT16)                                                           \
            multiply_pairs(n, sums, rows, weights, column, work->words);                                      \
        else                                                                                                  \
            multiply(n, dtype, sums, rows, weights, column, work->depth);                                     \
        for (int r = 0; r < n; r++) finish(linear, first_row + start + r, first, sums[r], dtype);             \
    }
            FOR_TILE_ROWS(height, MULTIPLY)
        }
    }
}

static void multiply_float32(struct work *work, int64_t panel, int64_t first_row, int64_t num_rows) {
    multiply_panel(work, panel, first_row, num_rows, FLOAT32);
}

static void multiply_bfloat16(struct work *work, int64_t panel, int64_t first_row, int64_t num_rows) {
    multiply_panel(work, panel, first_row, num_rows, BFLOAT16);
}

static void multiply_float16(struct work *work, int64_t panel, int64_t first_row, int64_t num_rows) {
    multiply_panel(work, panel, first_row, num_rows, FLOAT16);
}

/* This thread's panels times a block of rows. */
static void multiply_panels(struct work *work, int64_t first, int64_t rows) {
    for (int64_t panel; (panel = next_of_shares(&work->panels)) >= 0;) {
        switch (work->linear->dtype) {
            case FLOAT32: multiply_float32(work, panel, first, rows); break;
            case BFLOAT16: multiply_bfloat16(work, panel, first, rows); break;
            default: multiply_float16(work, panel, first, rows); break;
        }
    }
}

#if AMX
static void multiply_panels_amx(struct work *work, int64_t first, int64_t rows) {
    const struct linear *linear = work->linear;
    size_t bytes = work->depth * PANEL * 2;
    struct amx_block block;
    begin_rows_amx(&block, work->rows, work->depth, first, rows);
    for (int64_t panel; (panel = next_of_shares(&work->panels)) >= 0;) {
        int has_next = panel + 1 < end_of_own_share(&work->panels);
        const char *weights = (const char *)linear->weights + (size_t)panel * bytes;
        multiply_panel_amx(linear, &block, weights, has_next, (size_t)panel * PANEL);
    }
    end_rows_amx(&block);
}
#endif

static int multiply_share(void *argument) {
    struct work *work = argument;
    const struct linear *linear = work->linear;
    float *row = scratch(PRIVATE_SLOT, 2 * work->depth * sizeof(float));
    for (int64_t first = 0; first < work->num_rows; first += work->block_rows) {
        int64_t left = work->num_rows - first, rows = left < work->block_rows ? left : work->block_rows;
        if (row) prepare_rows(work, first, rows, row);
        if (team_index() == 0) share_out(&work->panels, num_panels(linear));
        team_barrier();
#if AMX
        if (linear->dtype == BFLOAT16) {
            multiply_panels_amx(work, first, rows);
        } else {
            multiply_panels(work, first, rows);
        }
#else
        multiply_panels(work, first, rows);
#endif
        if (first + rows < work->num_rows) team_barrier();
    }
    return row == NULL;
}

static int begin_linear(void *memory, const void *arguments, int64_t num_rows, int slot) {
    const struct linear *linear = arguments;
    struct work *work = memory;
    _Static_assert(sizeof *work <= WORK_BYTES, "what a kernel keeps in `work`");
    work->linear = linear;
    work->num_rows = num_rows;
    work->depth = packed_depth(linear->num_inputs, (enum dtype)linear->dtype);
    int in_pairs = (BFLOAT16_PRODUCTS || AMX) && linear->dtype == BFLOAT16;
    work->words = in_pairs ? work->depth / 2 : work->depth;
    work->block_rows = rows_of_block(num_rows, sizeof(uint32_t) * work->words);
    work->rows = scratch(slot, (size_t)(work->block_rows + AMX_ROWS) * work->words * sizeof(uint32_t));
    return work->rows == NULL;
}

const struct kernel linear_kernel = {begin_linear, multiply_share};
