/* Rows of many tokens: blocks of queries against blocks of slots (FlashAttention: Dao et al., 2022).
 *
 * The queries of all heads of a kv head are rows of one matrix, so that a block of K and V, converted to float32 once,
 * serves them all.
 */
#include "attention.h"

#define SLOTS 64          /* at a time */
#define QUERY_ROWS 192    /* of a block: query tokens times heads of a kv head */

struct prefill {
    float *queries; /* of each tile of rows: [head_dim][rows of the tile] */
    float *keys;    /* [padded][SLOTS] */
    float *values;  /* [SLOTS][padded] */
    float *sums;    /* [rows][padded] */
    float *scores;  /* [TILE_ROWS][SLOTS] */
    float *rows;    /* [SLOTS][padded] */
    float *row;     /* [padded] */
    float *greatest, *total; /* [rows] */
};

/* A block's rows: token by token, and of each token head by head. */
struct block {
    int64_t row, kv_head, first_token, first_position, num_rows;
};

static int64_t block_tokens(const struct attention *a) {
    int64_t tokens = QUERY_ROWS / group_size(a);
    return tokens > 0 ? tokens : 1;
}

static size_t block_rows(const struct attention *a) { return (size_t)(block_tokens(a) * group_size(a)); }

int64_t num_query_blocks(const struct attention *a, int64_t row) {
    int64_t tokens = a->row_bounds[row + 1] - a->row_bounds[row];
    return (tokens + block_tokens(a) - 1) / block_tokens(a);
}

size_t prefill_bytes(const struct attention *a) {
    size_t rows = block_rows(a), row = padded(a);
    return sizeof(float) * (2 * rows * row + 3 * SLOTS * row + TILE_ROWS * SLOTS + row + 2 * rows);
}

static struct prefill lay_out(const struct attention *a, char *memory) {
    size_t rows = block_rows(a), row = padded(a);
    memset(memory, 0, prefill_bytes(a));
    struct prefill p = {.queries = (float *)memory};
    p.keys = p.queries + rows * row;
    p.values = p.keys + SLOTS * row;
    p.sums = p.values + SLOTS * row;
    p.scores = p.sums + rows * row;
    p.rows = p.scores + TILE_ROWS * SLOTS;
    p.row = p.rows + SLOTS * row;
    p.greatest = p.row + row;
    p.total = p.greatest + rows;
    return p;
}

static void fetch_queries(const struct attention *a, const struct prefill *p, const struct block *b) {
    int64_t group = group_size(a), depth = a->head_dim;
    for (int64_t r = 0; r < b->num_rows; r++) {
        read_query(a, b->first_token + r / group, b->kv_head * group + r % group, p->row);
        int64_t start = r / TILE_ROWS * TILE_ROWS;
        int64_t height = b->num_rows - start < TILE_ROWS ? b->num_rows - start : TILE_ROWS;
        float *tile = p->queries + (size_t)(start * depth + r - start);
        for (int64_t k = 0; k < depth; k++) tile[(size_t)(k * height)] = p->row[k];
        p->greatest[r] = -__builtin_inff();
    }
}

/* Turns `SLOTS` rows of `depth` numbers, `row` apart, into columns. */
static void transpose(float *to, const float *from, size_t depth, size_t row) {
    for (size_t k = 0; k < depth; k += 8) {
        for (size_t slot = 0; slot < SLOTS; slot++) {
            for (size_t i = k; i < k + 8; i++) to[i * SLOTS + slot] = from[slot * row + i];
        }
    }
}

/* K as columns, V as rows; what lies beyond `count` slots is of earlier slots, or zero. */
static void fetch_slots(const struct attention *a, const struct prefill *p, const struct block *b, int64_t first,
                        int64_t count) {
    read_context(a, b->row, b->kv_head, first, first + count, p->rows, p->values);
    transpose(p->keys, p->rows, padded(a), padded(a));
}

/* Scores of one row into weights; slots from .. to are visible. Returns what the row's sums are worth by now. */
static float weigh(float *scores, int64_t from, int64_t to, float *greatest, float *total) {
    for (int64_t slot = 0; slot < from; slot++) scores[slot] = -__builtin_inff();
    for (int64_t slot = to; slot < SLOTS; slot++) scores[slot] = -__builtin_inff();
    vfloat most = splat(*greatest), sum = splat(0.0f);
    for (int i = 0; i < SLOTS; i += LANES) most = vmax(most, load(scores + i));
    most = max_lanes(most);
    for (int i = 0; i < SLOTS; i += LANES) {
        vfloat weights = vexp(load(scores + i) - most);
        store(scores + i, weights);
        sum += weights;
    }
    float kept = vexp(splat(*greatest) - most)[0];
    *greatest = most[0];
    *total = *total * kept + sum_lanes(sum)[0];
    return kept;
}

/* Weights of a tile's rows, and their sums scaled to them. */
static void weigh_tile(const struct attention *a, const struct prefill *p, const struct block *b, int64_t start,
                       int64_t height, int64_t first, int64_t count) {
    size_t row = padded(a);
    for (int64_t r = 0; r < height; r++) {
        int64_t position = b->first_position + (start + r) / group_size(a);
        int64_t from = first_visible(a, position) - first, to = position + 1 - first;
        if (from < 0) from = 0;
        if (to > count) to = count;
        float *scores = p->scores + r * SLOTS, *sums = p->sums + (size_t)(start + r) * row;
        if (from >= to) {
            memset(scores, 0, SLOTS * sizeof(float));
            continue;
        }
        float kept = weigh(scores, from, to, p->greatest + start + r, p->total + start + r);
        for (size_t i = 0; i < row; i += LANES) store(sums + i, load(sums + i) * kept);
    }
}

INLINE void score_tile(const int height, const struct attention *a, const struct prefill *p, int64_t start) {
    const float *queries = p->queries + (size_t)(start * a->head_dim);
    for (size_t column = 0; column < SLOTS; column += TILE_COLUMNS) {
        vfloat sums[TILE_ROWS][2];
        UNROLL for (int r = 0; r < height; r++) sums[r][0] = sums[r][1] = splat(0.0f);
        multiply_tile(height, sums, queries, 1, (size_t)height, p->keys + column, SLOTS, (size_t)a->head_dim);
        UNROLL for (int r = 0; r < height; r++) {
            store(p->scores + r * SLOTS + column, sums[r][0]);
            store(p->scores + r * SLOTS + column + LANES, sums[r][1]);
        }
    }
}

INLINE void add_values(const int height, const struct attention *a, const struct prefill *p, int64_t start,
                       int64_t count) {
    size_t row = padded(a);
    for (size_t column = 0; column < row; column += TILE_COLUMNS) {
        float *to = p->sums + (size_t)start * row + column;
        vfloat sums[TILE_ROWS][2];
        UNROLL for (int r = 0; r < height; r++) {
            sums[r][0] = load(to + (size_t)r * row);
            sums[r][1] = load(to + (size_t)r * row + LANES);
        }
        multiply_tile(height, sums, p->scores, SLOTS, 1, p->values + column, row, (size_t)count);
        UNROLL for (int r = 0; r < height; r++) {
            store(to + (size_t)r * row, sums[r][0]);
            store(to + (size_t)r * row + LANES, sums[r][1]);
        }
    }
}

static void score_rows(const struct attention *a, const struct prefill *p, int64_t start, int64_t height) {
#define SCORE(n) score_tile(n, a, p, start)
    FOR_TILE_ROWS(height, SCORE)
}

static void add_rows(const struct attention *a, const struct prefill *p, int64_t start, int64_t height,
                     int64_t count) {
#define ADD(n) add_values(n, a, p, start, count)
    FOR_TILE_ROWS(height, ADD)
}

static void attend_slots(const struct attention *a, const struct prefill *p, const struct block *b, int64_t first,
                         int64_t count) {
    for (int64_t start = 0; start < b->num_rows; start += TILE_ROWS) {
        int64_t height = b->num_rows - start < TILE_ROWS ? b->num_rows - start : TILE_ROWS;
        int64_t last_position = b->first_position + (start + height - 1) / group_size(a);
        if (first > last_position) continue;
        score_rows(a, p, start, height);
        weigh_tile(a, p, b, start, height, first, count);
        add_rows(a, p, start, height, count);
    }
}

void prefill_block(const struct attention *a, int64_t row, int64_t kv_head, int64_t index, char *memory) {
    struct prefill p = lay_out(a, memory);
    int64_t group = group_size(a), skipped = index * block_tokens(a);
    int64_t num_tokens = a->row_bounds[row + 1] - a->row_bounds[row];
    int64_t tokens = num_tokens - skipped < block_tokens(a) ? num_tokens - skipped : block_tokens(a);
    struct block b = {row, kv_head, a->row_bounds[row] + skipped,
                      a->context_lens[row] - num_tokens + skipped, tokens * group};
    fetch_queries(a, &p, &b);
    int64_t end = b.first_position + tokens;
    for (int64_t first = first_visible(a, b.first_position); first < end; first += SLOTS) {
        int64_t count = end - first < SLOTS ? end - first : SLOTS;
        fetch_slots(a, &p, &b, first, count);
        attend_slots(a, &p, &b, first, count);
    }
    for (int64_t r = 0; r < b.num_rows; r++) {
        write_output(a, b.first_token + r / group, kv_head * group + r % group, p.sums + (size_t)r * padded(a),
                     p.total[r]);
    }
}
