/* Rows of many tokens: blocks of queries against blocks of slots (FlashAttention: Dao et al., 2022).
 *
 * The queries of all heads of a kv head stand side by side as columns, so that a block of K and V, converted to
 * float32 once, serves them all, and softmax, kept up to date block by block, takes a vector of queries at a time.
 */
#include "paged_rows.h"

#define SLOTS 48         /* at a time; a multiple of TILE_ROWS */
#define QUERIES 192      /* of a block: query tokens times heads of a kv head; a multiple of TILE_COLUMNS */
#define COLUMNS TILE_COLUMNS

struct prefill {
    size_t num_columns;      /* queries of a block, and as many more as fill the last vectors */
    float *queries;          /* [head_dim][num_columns] */
    float *keys, *values;    /* [SLOTS][padded] */
    float *sums;             /* [num_columns][padded] */
    float *weights;          /* [SLOTS][COLUMNS] */
    float *greatest, *total; /* [num_columns] */
    int32_t *from, *to;      /* [num_columns] the positions that each query sees, the last one included */
};

/* A block's queries: token by token, and of each token head by head. */
struct block {
    int64_t row, kv_head, first_token, first_position, num_queries;
};

static int64_t block_tokens(const struct attention *a) {
    int64_t tokens = QUERIES / group_size(a);
    return tokens > 0 ? tokens : 1;
}

static size_t block_columns(const struct attention *a) {
    return ((size_t)(block_tokens(a) * group_size(a)) + COLUMNS - 1) / COLUMNS * COLUMNS;
}

int64_t num_query_blocks(const struct attention *a, int64_t row) {
#if AMX
    if (is_for_amx(a)) return num_query_blocks_amx(a, row);
#endif
    int64_t tokens = a->step->row_bounds[row + 1] - a->step->row_bounds[row];
    return (tokens + block_tokens(a) - 1) / block_tokens(a);
}

size_t prefill_bytes(const struct attention *a) {
#if AMX
    if (is_for_amx(a)) return prefill_bytes_amx(a);
#endif
    size_t columns = block_columns(a), row = padded(a);
    return sizeof(float) * (2 * columns * row + 2 * SLOTS * row + SLOTS * COLUMNS + 4 * columns);
}

static struct prefill lay_out(const struct attention *a, char *memory) {
    size_t columns = block_columns(a), row = padded(a);
    memset(memory, 0, prefill_bytes(a));
    struct prefill p = {.num_columns = columns, .queries = (float *)memory};
    p.keys = p.queries + columns * row;
    p.values = p.keys + SLOTS * row;
    p.sums = p.values + SLOTS * row;
    p.weights = p.sums + columns * row;
    p.greatest = p.weights + SLOTS * COLUMNS;
    p.total = p.greatest + columns;
    p.from = (int32_t *)(p.total + columns);
    p.to = p.from + columns;
    return p;
}

static void fetch_queries(const struct attention *a, const struct prefill *p, const struct block *b) {
    int64_t group = group_size(a);
    for (int64_t q = 0; q < (int64_t)p->num_columns; q++) {
        p->greatest[q] = -__builtin_inff();
        p->to[q] = -1; /* there is no such query */
        if (q >= b->num_queries) continue;
        p->to[q] = (int32_t)(b->first_position + q / group);
        p->from[q] = (int32_t)first_visible(a, p->to[q]);
        read_query(a, b->first_token + q / group, b->kv_head * group + q % group, p->values);
        for (int64_t k = 0; k < a->head_dim; k++) p->queries[(size_t)k * p->num_columns + (size_t)q] = p->values[k];
    }
}

/* Scores of a tile of slots with the queries of some columns; `row` is a constant, or else slow. */
INLINE void score_tile(const struct attention *a, const struct prefill *p, size_t column, size_t slot,
                       const size_t row) {
    vfloat sums[TILE_ROWS][2];
    UNROLL for (int r = 0; r < TILE_ROWS; r++) sums[r][0] = sums[r][1] = splat(0.0f);
    multiply_tile(TILE_ROWS, sums, p->keys + slot * row, row, 1, p->queries + column, p->num_columns,
                  (size_t)a->head_dim);
    float *to = p->weights + slot * COLUMNS;
    UNROLL for (int r = 0; r < TILE_ROWS; r++) {
        store(to + r * COLUMNS, sums[r][0]);
        store(to + r * COLUMNS + LANES, sums[r][1]);
    }
}

static void score(const struct attention *a, const struct prefill *p, size_t column, size_t count) {
    size_t row = padded(a);
    for (size_t slot = 0; slot < count; slot += TILE_ROWS) {
        if (row == 64) {
            score_tile(a, p, column, slot, 64);
        } else if (row == 128) {
            score_tile(a, p, column, slot, 128);
        } else {
            score_tile(a, p, column, slot, row);
        }
    }
}

/* Minus infinity where a query does not see a slot. */
static void hide(const struct prefill *p, size_t column, int64_t first, int64_t count) {
    vint from, to;
    memcpy(&from, p->from + column, sizeof from);
    memcpy(&to, p->to + column, sizeof to);
    vfloat never = splat(-__builtin_inff());
    float *scores = p->weights + column % COLUMNS;
    for (int64_t slot = 0; slot < count; slot++, scores += COLUMNS) {
        vint position = (vint){0} + (int32_t)(first + slot);
        store(scores, choose((position >= from) & (position <= to), load(scores), never));
    }
}

/* Scores of one vector of queries into weights; `kept` becomes what earlier sums are worth by now. */
static void weigh(const struct prefill *p, size_t column, int64_t count, float *kept) {
    float *scores = p->weights + column % COLUMNS;
    vfloat before = load(p->greatest + column), most = before, sum = splat(0.0f);
    for (int64_t slot = 0; slot < count; slot++) most = vmax(most, load(scores + slot * COLUMNS));
    vfloat base = choose(most < splat(-3e38f), splat(0.0f), most); /* of queries that have seen nothing yet */
    for (int64_t slot = 0; slot < count; slot++) {
        vfloat weights = vexp_negative(load(scores + slot * COLUMNS) - base);
        store(scores + slot * COLUMNS, weights);
        sum += weights;
    }
    vfloat worth = vexp_negative(before - base);
    store(kept + column % COLUMNS, worth);
    store(p->greatest + column, most);
    store(p->total + column, load(p->total + column) * worth + sum);
}

/* sums = sums * kept + weights * values of a tile of queries. */
INLINE void add_values(const int height, const struct prefill *p, size_t query, const float *kept, size_t row,
                       int64_t count) {
    for (size_t column = 0; column < row; column += TILE_COLUMNS) {
        float *to = p->sums + query * row + column;
        vfloat sums[TILE_ROWS][2];
        UNROLL for (int r = 0; r < height; r++) {
            sums[r][0] = load(to + (size_t)r * row) * kept[r];
            sums[r][1] = load(to + (size_t)r * row + LANES) * kept[r];
        }
        const float *weights = p->weights + query % COLUMNS;
        multiply_tile(height, sums, weights, 1, COLUMNS, p->values + column, row, (size_t)count);
        UNROLL for (int r = 0; r < height; r++) {
            store(to + (size_t)r * row, sums[r][0]);
            store(to + (size_t)r * row + LANES, sums[r][1]);
        }
    }
}

static void add_columns(const struct attention *a, const struct prefill *p, size_t column, size_t num_queries,
                        const float *kept, int64_t count) {
    for (size_t q = 0; q < num_queries; q += TILE_ROWS) {
        size_t height = num_queries - q < TILE_ROWS ? num_queries - q : TILE_ROWS;
#define ADD(n) add_values(n, p, column + q, kept + q, padded(a), count)
        FOR_TILE_ROWS(height, ADD)
    }
}

static void attend_slots(const struct attention *a, const struct prefill *p, const struct block *b, int64_t first,
                         int64_t count) {
    for (size_t column = 0; column < (size_t)b->num_queries; column += COLUMNS) {
        size_t left = (size_t)b->num_queries - column, num_queries = left < COLUMNS ? left : COLUMNS;
        size_t last = column + num_queries - 1;
        if (first > p->to[last]) continue;
        score(a, p, column, (size_t)count);
        float kept[COLUMNS];
        for (size_t half = 0; half < COLUMNS; half += LANES) {
            if (num_queries < COLUMNS || first + count - 1 > p->to[column] || first < p->from[last]) {
                hide(p, column + half, first, count);
            }
            weigh(p, column + half, count, kept);
        }
        add_columns(a, p, column, num_queries, kept, count);
    }
}

void prefill_block(const struct attention *a, int64_t row, int64_t kv_head, int64_t index, char *memory) {
#if AMX
    if (is_for_amx(a)) {
        prefill_block_amx(a, row, kv_head, index, memory);
        return;
    }
#endif
    struct prefill p = lay_out(a, memory);
    int64_t group = group_size(a), skipped = index * block_tokens(a);
    int64_t num_tokens = a->step->row_bounds[row + 1] - a->step->row_bounds[row];
    int64_t tokens = num_tokens - skipped < block_tokens(a) ? num_tokens - skipped : block_tokens(a);
    struct block b = {row, kv_head, a->step->row_bounds[row] + skipped,
                      a->step->context_lens[row] - num_tokens + skipped, tokens * group};
    fetch_queries(a, &p, &b);
    int64_t end = b.first_position + tokens;
    for (int64_t first = first_visible(a, b.first_position); first < end; first += SLOTS) {
        int64_t count = end - first < SLOTS ? end - first : SLOTS;
        read_context(a, row, kv_head, first, first + count, p.keys, p.values);
        attend_slots(a, &p, &b, first, count);
    }
    for (int64_t q = 0; q < b.num_queries; q++) {
        write_output(a, b.first_token + q / group, kv_head * group + q % group, p.sums + (size_t)q * padded(a),
                     p.total[q]);
    }
}
