/* Rows of many tokens, as in attention_prefill.c, where AMX multiplies and all is bfloat16.
 *
 * Everything is computed transposed: scores [slots][queries] = keys times queries, and sums [head_dim][queries] =
 * values turned over times weights. So keys are read as they lie in pages, and softmax takes a vector of queries at a
 * time. The queries of all heads of a kv head stand side by side in strips of 32 columns.
 *
 * Weights are relative to a base that follows the greatest score only where that has left it far behind, so that sums
 * are seldom rescaled (as in FlashAttention-4: Zadouri et al., 2026).
 */
#include "paged_rows.h"

#if AMX

#include "transpose.h"

#define SLOTS 128   /* at a time */
#define QUERIES 512 /* of a block: query tokens times heads of a kv head */
#define STRIP 32    /* queries */
#define FAR 8.0f    /* so many powers of two weights may grow before sums are rescaled */
#define STEP (AMX_ROWS * STRIP * 4) /* bytes of a strip that a tile's row is multiplied with */

struct prefill {
    size_t depth;       /* head_dim, to whole tiles */
    uint16_t *queries;  /* of each strip [depth / 2][STRIP][2] */
    float *sums;        /* of each strip [depth][STRIP]; of 32 dimensions the even ones come first */
    uint16_t *copies;   /* [SLOTS][depth], of slots that are no whole tile in a page */
    uint16_t *values;   /* [depth / 16][SLOTS / 32] tiles of [16 dimensions][32 slots] */
    float *scores;      /* [SLOTS][STRIP] */
    uint16_t *weights;  /* [SLOTS / 2][STRIP][2] */
    float *base, *total; /* [queries], scores in powers of two */
    int32_t *from, *to; /* [queries] the positions that each query sees, the last one included */
    float scale;        /* of scores, to powers of two */
};

/* A block's queries: token by token, and of each token head by head. */
struct block {
    int64_t row, kv_head, first_token, first_position, num_queries;
};

/* 16 slots of the context, each so many bytes after the last; 0 where there are none. */
struct tile {
    const char *rows;
    size_t stride;
};

static size_t depth_of(const struct attention *a) {
    return ((size_t)a->head_dim + AMX_DEPTH - 1) / AMX_DEPTH * AMX_DEPTH;
}

static int64_t block_tokens(const struct attention *a) {
    int64_t tokens = QUERIES / group_size(a);
    return tokens > 0 ? tokens : 1;
}

static size_t block_columns(const struct attention *a) {
    return ((size_t)(block_tokens(a) * group_size(a)) + STRIP - 1) / STRIP * STRIP;
}

int64_t num_query_blocks_amx(const struct attention *a, int64_t row) {
    int64_t tokens = a->step->row_bounds[row + 1] - a->step->row_bounds[row];
    return (tokens + block_tokens(a) - 1) / block_tokens(a);
}

size_t prefill_bytes_amx(const struct attention *a) {
    size_t columns = block_columns(a), depth = depth_of(a);
    return 6 * columns * depth + 4 * SLOTS * depth + 6 * SLOTS * STRIP + 16 * columns;
}

static struct prefill lay_out(const struct attention *a, char *memory) {
    size_t columns = block_columns(a), depth = depth_of(a);
    struct prefill p = {.depth = depth, .sums = (float *)memory};
    p.queries = (uint16_t *)(p.sums + columns * depth);
    p.copies = p.queries + columns * depth;
    p.values = p.copies + SLOTS * depth;
    p.scores = (float *)(p.values + SLOTS * depth);
    p.weights = (uint16_t *)(p.scores + SLOTS * STRIP);
    p.base = (float *)(p.weights + SLOTS * STRIP);
    p.total = p.base + columns;
    p.from = (int32_t *)(p.total + columns);
    p.to = p.from + columns;
    p.scale = a->key_scale / __builtin_sqrtf((float)a->head_dim) * 1.44269504f;
    return p;
}

/* Two float32 each as one word of bfloat16, the first one below. */
INLINE vuint pack_pair(vfloat first, vfloat second) {
    return (((vuint)first + 0x8000) >> 16) | (((vuint)second + 0x8000) & 0xffff0000u);
}

/* 2 to each element, none above 127, within 2^-16; 0 below -126.5; NaN stays NaN. */
INLINE vfloat vexp2(vfloat x) {
    x = vmax(splat(-127.0f), x);
    vfloat shifted = x + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
    vfloat rest = x - (shifted - 12582912.0f);
    vfloat power = rest * 9.67009e-3f + 5.5503573e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1.0f;
    return power * (vfloat)(((vuint)shifted << 23) + 0x3f800000u);
}

static size_t num_strips(const struct block *b) { return ((size_t)b->num_queries + STRIP - 1) / STRIP; }

/* Queries as strips, and what each of them sees. */
static void fetch_queries(const struct attention *a, const struct prefill *p, const struct block *b) {
    int64_t group = group_size(a);
    size_t depth = p->depth, columns = num_strips(b) * STRIP, bytes = 2 * (size_t)a->head_dim;
    uint16_t rows[WORDS][2 * WORDS];
    for (size_t q = 0; q < columns; q++) {
        p->base[q] = -__builtin_inff();
        p->total[q] = 0.0f;
        p->from[q] = 0;
        p->to[q] = -1; /* there is no such query */
        if ((int64_t)q >= b->num_queries) continue;
        p->to[q] = (int32_t)(b->first_position + (int64_t)q / group);
        p->from[q] = (int32_t)first_visible(a, p->to[q]);
    }
    for (size_t q = 0; q < columns; q += WORDS) {
        char *strip = (char *)(p->queries + q / STRIP * STRIP * depth) + q % STRIP * 4;
        for (size_t k = 0; k < depth; k += AMX_DEPTH) {
            memset(rows, 0, sizeof rows);
            for (size_t i = 0; i < WORDS && (int64_t)(q + i) < b->num_queries; i++) {
                int64_t index = (int64_t)(q + i), token = b->first_token + index / group;
                int64_t head = b->kv_head * group + index % group;
                size_t at = (size_t)(token * a->states_stride + head * a->head_dim) * 2;
                size_t left = bytes - 2 * k, size = left < sizeof rows[i] ? left : sizeof rows[i];
                memcpy(rows[i], (const char *)a->query + at + 2 * k, size);
            }
            transpose_words(strip + k / 2 * STRIP * 4, STRIP * 4, rows, sizeof rows[0]);
        }
    }
    memset(p->sums, 0, columns * depth * sizeof(float));
}

/* The keys (part 0) or values (1) of 16 slots, in their page where it holds them all as tiles need them. */
static struct tile find_tile(const struct attention *a, const struct prefill *p, const struct block *b, int part,
                             int64_t first, int64_t end, char *copy) {
    size_t bytes = 2 * (size_t)a->head_dim, stride = 2 * p->depth;
    if (end - first > AMX_ROWS) end = first + AMX_ROWS;
    for (int64_t slot = 0; slot < AMX_ROWS;) {
        if (first + slot >= end) {
            memset(copy + (size_t)slot * stride, 0, (size_t)(AMX_ROWS - slot) * stride);
            break;
        }
        struct run run = find_run(a, b->row, b->kv_head, first + slot, end);
        const char *from = part ? run.values : run.keys;
        if (run.count == AMX_ROWS && bytes == stride) return (struct tile){from, stride};
        for (int64_t i = 0; i < run.count; i++, slot++) {
            memcpy(copy + (size_t)slot * stride, from + (size_t)i * bytes, bytes);
            memset(copy + (size_t)slot * stride + bytes, 0, stride - bytes);
        }
    }
    return (struct tile){copy, stride};
}

/* 32 slots of values as tiles of 16 dimensions: of each 32 dimensions, the even ones and then the odd ones. */
static void turn_values(const struct prefill *p, const struct tile halves[2], uint16_t *to, size_t to_step) {
    uint32_t pairs[2][WORDS][WORDS] __attribute__((aligned(64))); /* of slots, by dimension */
    for (size_t first = 0; first < p->depth; first += AMX_DEPTH, to += 2 * to_step) {
        for (size_t pair = 0; pair < WORDS; pair++) {
            const struct tile *half = halves + pair / (AMX_ROWS / 2);
            const char *row = half->rows + 2 * (pair % (AMX_ROWS / 2)) * half->stride + 2 * first;
            for (size_t i = 0; i < WORDS; i += LANES) {
                vuint left, right;
                memcpy(&left, row + 4 * i, sizeof left);
                memcpy(&right, row + half->stride + 4 * i, sizeof right);
                vuint even = (left & 0xffff) | right << 16, odd = left >> 16 | (right & 0xffff0000u);
                memcpy(pairs[0][pair] + i, &even, sizeof even);
                memcpy(pairs[1][pair] + i, &odd, sizeof odd);
            }
        }
        transpose_words(to, 64, pairs[0], 64);
        transpose_words(to + to_step, 64, pairs[1], 64);
    }
}

/* Tiles of keys, and the values turned over, of slots first .. first + count. */
static void fetch_context(const struct attention *a, const struct prefill *p, const struct block *b, int64_t first,
                          int64_t count, struct tile keys[SLOTS / AMX_ROWS]) {
    const size_t tile = AMX_ROWS * AMX_DEPTH;
    int64_t end = first + count;
    for (int64_t slot = 0; slot < count; slot += AMX_DEPTH) {
        struct tile halves[2];
        for (int64_t half = 0; half < 2; half++) {
            char *copy = (char *)(p->copies + (size_t)(half * AMX_ROWS) * p->depth);
            halves[half] = find_tile(a, p, b, 1, first + slot + half * AMX_ROWS, end, copy);
        }
        turn_values(p, halves, p->values + (size_t)(slot / AMX_DEPTH) * tile, tile * (SLOTS / AMX_DEPTH));
    }
    for (int64_t slot = 0; slot < count; slot += AMX_ROWS) {
        char *copy = (char *)(p->copies + (size_t)slot * p->depth);
        keys[slot / AMX_ROWS] = find_tile(a, p, b, 0, first + slot, end, copy);
    }
}

/* sums [1 or 2 tiles of rows][16][STRIP] (+)= rows times a strip; `count` and `adds` are constants. */
INLINE void multiply_strip(const int count, const int adds, float *sums, const struct tile rows[2],
                           size_t row_step, const char *strip, size_t steps) {
    float *below = sums + AMX_ROWS * STRIP;
    if (adds) {
        AMX_LOAD(0, sums, 4 * STRIP);
        AMX_LOAD(1, sums + 16, 4 * STRIP);
        if (count == 2) {
            AMX_LOAD(2, below, 4 * STRIP);
            AMX_LOAD(3, below + 16, 4 * STRIP);
        }
    } else {
        AMX_ZERO(0);
        AMX_ZERO(1);
        if (count == 2) {
            AMX_ZERO(2);
            AMX_ZERO(3);
        }
    }
    for (size_t k = 0; k < steps; k++) {
        AMX_LOAD(6, strip + k * STEP, 4 * STRIP);
        AMX_LOAD(4, rows[0].rows + k * row_step, rows[0].stride);
        AMX_MULTIPLY(0, 4, 6);
        AMX_LOAD(7, strip + k * STEP + 64, 4 * STRIP);
        AMX_MULTIPLY(1, 4, 7);
        if (count == 2) {
            AMX_LOAD(5, rows[1].rows + k * row_step, rows[1].stride);
            AMX_MULTIPLY(2, 5, 6);
            AMX_MULTIPLY(3, 5, 7);
        }
    }
    AMX_STORE(0, sums, 4 * STRIP);
    AMX_STORE(1, sums + 16, 4 * STRIP);
    if (count == 2) {
        AMX_STORE(2, below, 4 * STRIP);
        AMX_STORE(3, below + 16, 4 * STRIP);
    }
}

static void score(const struct prefill *p, size_t strip, const struct tile *keys, int64_t count) {
    const char *queries = (const char *)(p->queries + strip * STRIP * p->depth);
    for (int64_t slot = 0; slot < count; slot += 2 * AMX_ROWS) {
        float *to = p->scores + slot * STRIP;
        const struct tile *tiles = keys + slot / AMX_ROWS;
        if (count - slot > AMX_ROWS) {
            multiply_strip(2, 0, to, tiles, 64, queries, p->depth / AMX_DEPTH);
        } else {
            multiply_strip(1, 0, to, tiles, 64, queries, p->depth / AMX_DEPTH);
        }
    }
}

/* Minus infinity where a query does not see a slot. */
static void hide(const struct prefill *p, size_t query, int64_t first, int64_t count) {
    vint from, to;
    memcpy(&from, p->from + query, sizeof from);
    memcpy(&to, p->to + query, sizeof to);
    float *scores = p->scores + query % STRIP;
    for (int64_t slot = 0; slot < count; slot++, scores += STRIP) {
        vint position = (vint){0} + (int32_t)(first + slot);
        store(scores, choose((position >= from) & (position <= to), load(scores), splat(-__builtin_inff())));
    }
}

/* What sums of a vector of queries are worth by now, where that has changed. */
static void rescale(const struct prefill *p, size_t query, vfloat worth) {
    float *sums = p->sums + query / STRIP * STRIP * p->depth + query % STRIP;
    for (size_t d = 0; d < p->depth; d++) store(sums + d * STRIP, load(sums + d * STRIP) * worth);
    store(p->total + query, load(p->total + query) * worth);
}

/* Scores of a vector of queries into weights, in pairs of slots. */
static void weigh(const struct prefill *p, size_t query, int64_t count) {
    const float *scores = p->scores + query % STRIP;
    uint32_t *weights = (uint32_t *)p->weights + query % STRIP;
    vfloat before = load(p->base + query), most = splat(-__builtin_inff()), sum = splat(0.0f);
    for (int64_t slot = 0; slot < count; slot++) most = vmax(most, load(scores + slot * STRIP));
    most *= p->scale;
    vint is_far = most > before + FAR;
    vfloat base = choose(is_far, most, before);
    store(p->base + query, base);
    base = choose(base < splat(-3e38f), splat(0.0f), base); /* of queries that have seen nothing yet */
    if (any_lane(is_far)) rescale(p, query, vexp2(choose(is_far, before - base, splat(0.0f))));
    int64_t slot = 0;
    for (; slot + 1 < count; slot += 2, scores += 2 * STRIP, weights += STRIP) {
        vfloat first = vexp2(load(scores) * p->scale - base), second = vexp2(load(scores + STRIP) * p->scale - base);
        vuint pair = pack_pair(first, second);
        sum += first + second;
        memcpy(weights, &pair, sizeof pair);
    }
    for (; slot % AMX_DEPTH; slot += 2, scores += 2 * STRIP, weights += STRIP) {
        vfloat last = slot < count ? vexp2(load(scores) * p->scale - base) : splat(0.0f);
        vuint pair = pack_pair(last, splat(0.0f));
        sum += last;
        memcpy(weights, &pair, sizeof pair);
    }
    store(p->total + query, load(p->total + query) + sum);
}

static void add_values(const struct prefill *p, size_t strip, int64_t count) {
    const size_t tile = AMX_ROWS * AMX_DEPTH * 2, dimensions = tile * (SLOTS / AMX_DEPTH);
    for (size_t d = 0; d < p->depth; d += 2 * AMX_ROWS) {
        const char *values = (const char *)p->values + d / AMX_ROWS * dimensions;
        struct tile rows[2] = {{values, 64}, {values + dimensions, 64}};
        multiply_strip(2, 1, p->sums + (strip * p->depth + d) * STRIP, rows, tile, (const char *)p->weights,
                       (size_t)(count + AMX_DEPTH - 1) / AMX_DEPTH);
    }
}

static void attend_slots(const struct prefill *p, const struct block *b, int64_t first, int64_t count,
                         const struct tile *keys) {
    for (size_t strip = 0; strip < num_strips(b); strip++) {
        size_t query = strip * STRIP, last = query + STRIP - 1;
        if (last >= (size_t)b->num_queries) last = (size_t)b->num_queries - 1;
        if (first > p->to[last]) continue;
        score(p, strip, keys, count);
        int is_seen_by_all = last == query + STRIP - 1 && first + count - 1 <= p->to[query] && first >= p->from[last];
        for (size_t half = 0; half < STRIP; half += LANES) {
            if (!is_seen_by_all) hide(p, query + half, first, count);
            weigh(p, query + half, count);
        }
        add_values(p, strip, count);
    }
}

/* Sums divided by their weights, turned back into rows of the output. */
static void write_outputs(const struct attention *a, const struct prefill *p, const struct block *b) {
    uint32_t rows[2][WORDS][WORDS] __attribute__((aligned(64))); /* of queries: even dimensions, odd ones */
    int64_t group = group_size(a);
    for (size_t q = 0; (int64_t)q < b->num_queries; q += WORDS) {
        for (size_t half = 0; half < WORDS; half += LANES) {
            rescale(p, q + half, a->value_scale / load(p->total + q + half));
        }
        const float *sums = p->sums + q / STRIP * STRIP * p->depth + q % STRIP;
        for (size_t d = 0; d < p->depth; d += AMX_DEPTH) {
            transpose_words(rows[0], 64, sums + d * STRIP, 4 * STRIP);
            transpose_words(rows[1], 64, sums + (d + WORDS) * STRIP, 4 * STRIP);
            for (size_t i = 0; i < WORDS && (int64_t)(q + i) < b->num_queries; i++) {
                int64_t index = (int64_t)(q + i), token = b->first_token + index / group;
                int64_t head = b->kv_head * group + index % group;
                size_t left = (size_t)a->head_dim - d, at = (size_t)((token * a->num_heads + head) * a->head_dim) + d;
                uint16_t line[AMX_DEPTH];
                for (size_t k = 0; k < WORDS; k += LANES) {
                    vuint pair = pack_pair(load((float *)rows[0][i] + k), load((float *)rows[1][i] + k));
                    memcpy(line + 2 * k, &pair, sizeof pair);
                }
                memcpy((uint16_t *)a->output + at, line, 2 * (left < AMX_DEPTH ? left : AMX_DEPTH));
            }
        }
    }
}

void prefill_block_amx(const struct attention *a, int64_t row, int64_t kv_head, int64_t index, char *memory) {
    struct prefill p = lay_out(a, memory);
    int64_t skipped = index * block_tokens(a), num_tokens = a->step->row_bounds[row + 1] - a->step->row_bounds[row];
    int64_t tokens = num_tokens - skipped < block_tokens(a) ? num_tokens - skipped : block_tokens(a);
    struct block b = {row, kv_head, a->step->row_bounds[row] + skipped, a->step->context_lens[row] - num_tokens + skipped,
                      tokens * group_size(a)};
    fetch_queries(a, &p, &b);
    const uint8_t all = AMX_ROWS;
    amx_begin((struct amx_shape){{all, all, all, all, all, all, all, all}});
    int64_t end = b.first_position + tokens;
    for (int64_t first = first_visible(a, b.first_position); first < end; first += SLOTS) {
        struct tile keys[SLOTS / AMX_ROWS];
        int64_t count = end - first < SLOTS ? end - first : SLOTS;
        fetch_context(a, &p, &b, first, count, keys);
        attend_slots(&p, &b, first, count, keys);
    }
    amx_end();
    write_outputs(a, &p, &b);
}

#endif
