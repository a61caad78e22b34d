/* Attention over the paged KV pool: what its parts share. Shapes as in kernels/baton_kernels/reference.py.
 *
 * The pool is [pages][layers][2][kv heads][slots a page][head_dim]. A slot that a request has not filled may hold
 * anything, NaN of another request among it, so that no slot outside a row's context is ever read.
 */
#ifndef BATON_PAGED_ROWS_H
#define BATON_PAGED_ROWS_H

#include "amx.h"
#include "calls.h"
#include "rows.h"
#include "threads.h"
#include "tile.h"

/* Of a step, whatever its layer. */
struct attention_step {
    int64_t num_tokens, num_rows, num_one_token_rows, table_width;
    const int64_t *slot_mapping; /* [num_tokens] page * block_size + slot */
    const int64_t *block_tables; /* [num_rows][table_width] */
    const int64_t *context_lens; /* [num_rows] */
    const int64_t *row_bounds;   /* [num_rows + 1] tokens of a row */
    const void *cosines, *sines; /* [num_tokens][head_dim]; NULL: queries and keys are rotated already */
};

struct attention {
    const struct attention_step *step;
    /* of the pool and the model: */
    void *pool;
    int64_t num_layers, num_heads, num_kv_heads, block_size, head_dim;
    int32_t dtype, pool_dtype; /* of states and output; of pages */
    /* of a layer: */
    int64_t layer, window;    /* window: last tokens that a query sees; 0: all */
    int64_t states_stride;    /* numbers from one token to the next, of query, key and value alike */
    void *query;              /* [num_tokens] of [num_heads][head_dim]; rotated in place */
    const void *key, *value;  /* [num_tokens] of [num_kv_heads][head_dim] */
    const float *query_norm, *key_norm; /* [head_dim] or NULL: RMSNorm of each head before it is rotated */
    float norm_eps;
    float key_scale, value_scale; /* a number is what a page holds times this; 1 unless pages are float8 */
    void *output; /* [num_tokens][num_heads][head_dim] */
};

/* Rows of float32 in scratch memory are this long; numbers beyond head_dim are zero. */
INLINE size_t padded(const struct attention *a) {
    return ((size_t)a->head_dim + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
}

INLINE int64_t group_size(const struct attention *a) { return a->num_heads / a->num_kv_heads; }

INLINE char *slot_address(const struct attention *a, int64_t page, int part, int64_t head, int64_t slot) {
    int64_t line = ((page * a->num_layers + a->layer) * 2 + part) * a->num_kv_heads + head;
    return (char *)a->pool + (size_t)((line * a->block_size + slot) * a->head_dim) * bytes_of(a->pool_dtype);
}

INLINE int64_t first_visible(const struct attention *a, int64_t position) {
    return a->window && position + 1 > a->window ? position + 1 - a->window : 0;
}

/* Slots of one row's context that lie beside each other in a page. */
struct run {
    const char *keys, *values;
    int64_t count;
};

/* Slots from position `first` on, up to position `end` or the end of the page. */
INLINE struct run find_run(const struct attention *a, int64_t row, int64_t head, int64_t first, int64_t end) {
    int64_t slot = first % a->block_size, left = a->block_size - slot;
    int64_t page = a->step->block_tables[row * a->step->table_width + first / a->block_size];
    struct run run = {slot_address(a, page, 0, head, slot), slot_address(a, page, 1, head, slot), left};
    if (end - first < left) run.count = end - first;
    return run;
}

/* Slots as rows of float32, `row` numbers apart, not scaled yet. */
static inline void read_slots(const struct attention *a, float *to, const char *from, int64_t count, size_t row) {
    size_t size = (size_t)a->head_dim;
    if (row == size) {
        read_row(to, from, (size_t)count * size, a->pool_dtype);
        return;
    }
    for (int64_t slot = 0; slot < count; slot++) {
        const char *line = from + (size_t)slot * size * bytes_of(a->pool_dtype);
        read_row(to + (size_t)slot * row, line, size, a->pool_dtype);
    }
}

/* K and V of positions first .. end, as rows of `padded` numbers. */
static inline void read_context(const struct attention *a, int64_t row, int64_t head, int64_t first, int64_t end,
                                float *keys, float *values) {
    size_t size = padded(a);
    while (first < end) {
        struct run run = find_run(a, row, head, first, end);
        read_slots(a, keys, run.keys, run.count, size);
        read_slots(a, values, run.values, run.count, size);
        keys += (size_t)run.count * size;
        values += (size_t)run.count * size;
        first += run.count;
    }
}

/* One query as float32, scaled, by what keys are to be scaled by as well. */
static inline void read_query(const struct attention *a, int64_t token, int64_t head, float *to) {
    size_t at = (size_t)(token * a->states_stride + head * a->head_dim);
    read_row(to, (const char *)a->query + at * bytes_of(a->dtype), (size_t)a->head_dim, a->dtype);
    float scale = a->key_scale / __builtin_sqrtf((float)a->head_dim);
    for (int64_t i = 0; i < a->head_dim; i++) to[i] *= scale;
}

/* The output of one head of a token: `from`, sums of values as pages hold them, divided by `total`. */
static inline void write_output(const struct attention *a, int64_t token, int64_t head, float *from, float total) {
    float scale = a->value_scale / total;
    for (int64_t i = 0; i < a->head_dim; i++) from[i] *= scale;
    size_t at = (size_t)((token * a->num_heads + head) * a->head_dim);
    write_row((char *)a->output + at * bytes_of(a->dtype), from, (size_t)a->head_dim, a->dtype);
}

/* A row of one token is split over its context, so that a single long one keeps all threads at work. */
int64_t num_splits(const struct attention *a, int64_t row);
size_t decode_bytes(const struct attention *a);
/* Some kv heads, from kv_head on. Without `partial` the output is written, else one record a head: see
 * decode_record. */
void decode_split(const struct attention *a, int64_t row, int64_t kv_head, int64_t num_kv_heads, int64_t split,
                  char *memory, float *partial);
/* Numbers of one head's record of one split: the greatest score, the sum of weights, then the weighted values. */
size_t decode_record(const struct attention *a);
void combine_splits(const struct attention *a, int64_t row, int64_t head, int64_t splits, const float *partial,
                    float *memory);

/* A longer row is split into blocks of queries. */
int64_t num_query_blocks(const struct attention *a, int64_t row);
size_t prefill_bytes(const struct attention *a);
void prefill_block(const struct attention *a, int64_t row, int64_t kv_head, int64_t block, char *memory);

/* The same by AMX, for those that it is for. */
INLINE int is_for_amx(const struct attention *a) { return AMX && a->dtype == BFLOAT16 && a->pool_dtype == BFLOAT16; }
int64_t num_query_blocks_amx(const struct attention *a, int64_t row);
size_t prefill_bytes_amx(const struct attention *a);
void prefill_block_amx(const struct attention *a, int64_t row, int64_t kv_head, int64_t block, char *memory);

#endif
