/* Rows of one token: the query heads of a kv head together, so that K and V are read once (grouped queries).
 *
 * Softmax is kept up to date as slots go by (Milakov and Gimelshein, 2018); parts of a long context are joined
 * afterwards (flash-decoding: Dao et al., 2023). How a row is split depends on its length alone, so that a request's
 * tokens do not depend on the batch that it is in.
 *
 * Numbers go from the pages into registers; queries and sums are in the order in which `load_pair` has them.
 */
#include "paged_rows.h"

#include <stdbool.h>

#define SLOTS 64   /* at a time */
#define SPLIT 1024 /* slots of a split */
#define TILE_QUERIES 4
#define WEIGHTS (SLOTS + LANES) /* a tile of scores may end behind the last slot */

struct decode {
    float *queries, *sums;   /* [group] rows of `padded` */
    float *weights;          /* [group][WEIGHTS] */
    float *greatest, *total; /* [group] */
    char *keys, *values;     /* [SLOTS] rows of `padded`, used where rows in pages are not whole vectors */
    size_t stride;           /* bytes from one slot to the next */
};

/* Slots of a kv head that are attended to at once. */
struct chunk {
    int64_t kv_head, first, end;
};

/* Slots beside each other, and as many of those that are attended to next, or NULL: a page is asked for bit by bit while
 * the one before it is read, as asking for all of it at once would stop and wait. */
struct stretch {
    const char *keys, *values, *next_keys, *next_values;
    int64_t count;
};

static int64_t context_start(const struct attention *a, int64_t row) {
    return first_visible(a, a->step->context_lens[row] - 1);
}

int64_t num_splits(const struct attention *a, int64_t row) {
    return (a->step->context_lens[row] - context_start(a, row) + SPLIT - 1) / SPLIT;
}

static bool reads_pages(const struct attention *a) { return padded(a) == (size_t)a->head_dim; }

static size_t head_bytes(const struct attention *a) {
    size_t group = (size_t)group_size(a), row = padded(a);
    size_t copies = reads_pages(a) ? 0 : 2 * SLOTS * row * bytes_of(a->pool_dtype);
    return (sizeof(float) * group * (2 * row + WEIGHTS + 2) + copies + 63) / 64 * 64;
}

size_t decode_bytes(const struct attention *a) { return head_bytes(a) * (size_t)a->num_kv_heads; }

size_t decode_record(const struct attention *a) { return padded(a) + 2; }

/* What there is of the item's kv head `index`. */
static struct decode decode_of(const struct attention *a, char *memory, int64_t index) {
    size_t group = (size_t)group_size(a), row = padded(a);
    struct decode d = {.stride = row * bytes_of(a->pool_dtype)};
    d.queries = (float *)(memory + (size_t)index * head_bytes(a));
    d.sums = d.queries + group * row;
    d.weights = d.sums + group * row;
    d.greatest = d.weights + group * WEIGHTS;
    d.total = d.greatest + group;
    d.keys = (char *)(d.total + group);
    d.values = d.keys + SLOTS * d.stride;
    return d;
}

/* Puts a row in the order of `load_pair`, or back. */
static void reorder(float *row, float *other, size_t size, enum dtype dtype, bool back) {
    if (dtype != BFLOAT16) return;
    for (size_t first = 0; first < size; first += TILE_COLUMNS) {
        for (size_t i = 0; i < TILE_COLUMNS; i++) {
            size_t paired = i % 2 * LANES + i / 2;
            other[back ? i : paired] = row[first + (back ? paired : i)];
        }
        memcpy(row + first, other, TILE_COLUMNS * sizeof(float));
    }
}

/* A chunk's slots, beside those of the `next` one, which may have fewer; returns how many stretches they are. */
static int64_t find_stretches(const struct attention *a, int64_t row, struct chunk chunk, struct chunk next,
                              struct stretch stretches[SLOTS]) {
    int64_t num = 0;
    for (int64_t first = chunk.first; first < chunk.end; num++) {
        struct run run = find_run(a, row, chunk.kv_head, first, chunk.end), then = {0};
        int64_t same = next.first + (first - chunk.first);
        if (same < next.end) then = find_run(a, row, next.kv_head, same, next.end);
        stretches[num] = (struct stretch){run.keys, run.values, then.keys, then.values, run.count};
        first += run.count;
    }
    return num;
}

/* The same slots as one stretch of rows of whole vectors. */
static int64_t copy_stretches(const struct attention *a, const struct decode *d, struct stretch *stretches,
                              int64_t num) {
    size_t bytes = (size_t)a->head_dim * bytes_of(a->pool_dtype), slot = 0;
    for (int64_t s = 0; s < num; s++) {
        for (size_t i = 0; i < (size_t)stretches[s].count; i++, slot++) {
            memcpy(d->keys + slot * d->stride, stretches[s].keys + i * bytes, bytes);
            memcpy(d->values + slot * d->stride, stretches[s].values + i * bytes, bytes);
        }
    }
    stretches[0] = (struct stretch){.keys = d->keys, .values = d->values, .count = (int64_t)slot};
    return 1;
}

/* Slots of a tile of scores: a vector has those of all its queries. */
INLINE int tile_slots(const int queries) { return LANES / (queries == 3 ? 4 : queries); }

/* Scores of up to tile_slots slots with so many queries, which are `row` numbers apart. */
INLINE void score_tile(const int queries, const enum dtype dtype, const float *query, size_t row,
                       const char *keys, size_t stride, int64_t count, const char *next, float *scores) {
    const int slots = tile_slots(queries);
    vfloat parts[LANES] = {0};
    for (size_t i = 0; i < row; i += TILE_COLUMNS) {
        vfloat numbers[TILE_QUERIES][2];
        UNROLL for (int q = 0; q < queries; q++) {
            numbers[q][0] = load(query + (size_t)q * row + i);
            numbers[q][1] = load(query + (size_t)q * row + i + LANES);
        }
        UNROLL for (int s = 0; s < slots; s++) {
            size_t slot = (size_t)(s < count ? s : count - 1) * stride; /* what is beyond is not ours to read */
            vfloat key[2];
            load_pair(key, keys + slot, i, dtype);
            if (next) prefetch_pair(next + slot, i, dtype);
            UNROLL for (int q = 0; q < queries; q++) {
                parts[q * slots + s] += numbers[q][0] * key[0];
                parts[q * slots + s] += numbers[q][1] * key[1];
            }
        }
    }
    float sums[LANES];
    store(sums, sums_of(parts));
    UNROLL for (int q = 0; q < queries; q++) {
        memcpy(scores + q * WEIGHTS, sums + q * slots, (size_t)slots * sizeof(float));
    }
}

INLINE void score_stretches(const int queries, const enum dtype dtype, const struct decode *d, int64_t head,
                            size_t row, const struct stretch *stretches, int64_t num) {
    const int slots = tile_slots(queries);
    float *scores = d->weights + head * WEIGHTS;
    for (const struct stretch *s = stretches; s < stretches + num; s++) {
        for (int64_t slot = 0; slot < s->count; slot += slots) {
            size_t at = (size_t)slot * d->stride;
            const char *next = head == 0 && s->next_keys ? s->next_keys + at : NULL;
            score_tile(queries, dtype, d->queries + (size_t)head * row, row, s->keys + at, d->stride,
                       s->count - slot, next, scores + slot);
        }
        scores += s->count;
    }
}

/* Turns scores into weights relative to the greatest score so far; returns what earlier sums are worth by now. */
INLINE float weigh(float scores[SLOTS], int64_t count, float *greatest, float *total) {
    for (int64_t slot = count; slot < SLOTS; slot++) scores[slot] = -__builtin_inff();
    vfloat most = splat(*greatest), sum = splat(0.0f);
    UNROLL for (int i = 0; i < SLOTS; i += LANES) most = vmax(most, load(scores + i));
    most = max_lanes(most);
    UNROLL for (int i = 0; i < SLOTS; i += LANES) {
        vfloat weights = vexp_negative(load(scores + i) - most);
        store(scores + i, weights);
        sum += weights;
    }
    float kept = vexp_negative(splat(*greatest) - most)[0];
    *greatest = most[0];
    *total = *total * kept + sum_lanes(sum)[0];
    return kept;
}

/* sums = sums * kept + weights * values, for so many heads and pairs of vectors from `column` on. */
INLINE void add_columns(const int heads, const int pairs, const enum dtype dtype, const struct decode *d,
                        int64_t head, const float *kept, size_t row, size_t column,
                        const struct stretch *stretches, int64_t num) {
    float *to = d->sums + (size_t)head * row + column;
    const float *weights = d->weights + head * WEIGHTS;
    vfloat sums[TILE_QUERIES][4], value[4];
    UNROLL for (int h = 0; h < heads; h++) {
        UNROLL for (int c = 0; c < 2 * pairs; c++) {
            sums[h][c] = load(to + (size_t)h * row + c * LANES) * kept[h];
        }
    }
    for (const struct stretch *s = stretches; s < stretches + num; s++) {
        const char *values = s->values, *next = head == 0 ? s->next_values : NULL;
        for (int64_t slot = 0; slot < s->count; slot++, values += d->stride, weights++) {
            UNROLL for (int p = 0; p < pairs; p++) {
                load_pair(value + 2 * p, values, column + (size_t)p * TILE_COLUMNS, dtype);
                if (next) {
                    prefetch_pair(next + (size_t)slot * d->stride, column + (size_t)p * TILE_COLUMNS, dtype);
                }
            }
            UNROLL for (int h = 0; h < heads; h++) {
                vfloat weight = splat(weights[h * WEIGHTS]);
                UNROLL for (int c = 0; c < 2 * pairs; c++) sums[h][c] += weight * value[c];
            }
        }
    }
    UNROLL for (int h = 0; h < heads; h++) {
        UNROLL for (int c = 0; c < 2 * pairs; c++) store(to + (size_t)h * row + c * LANES, sums[h][c]);
    }
}

/* Some heads with some slots; `heads` is a constant. */
INLINE void attend_heads(const int heads, const enum dtype dtype, const struct decode *d, int64_t head, size_t row,
                         const struct stretch *stretches, int64_t num, int64_t count) {
    score_stretches(heads, dtype, d, head, row, stretches, num);
    float kept[TILE_QUERIES];
    for (int h = 0; h < heads; h++) {
        kept[h] = weigh(d->weights + (head + h) * WEIGHTS, count, d->greatest + head + h, d->total + head + h);
    }
    size_t column = 0;
#if LANES == 16
    for (; column + 2 * TILE_COLUMNS <= row; column += 2 * TILE_COLUMNS) {
        add_columns(heads, 2, dtype, d, head, kept, row, column, stretches, num);
    }
#endif
    for (; column < row; column += TILE_COLUMNS) {
        add_columns(heads, 1, dtype, d, head, kept, row, column, stretches, num);
    }
}

INLINE void attend_slots(const enum dtype dtype, const struct decode *d, int64_t group, size_t row,
                         const struct stretch *stretches, int64_t num, int64_t count) {
    for (int64_t head = 0; head < group; head += TILE_QUERIES) {
        switch (group - head) {
            case 1: attend_heads(1, dtype, d, head, row, stretches, num, count); break;
            case 2: attend_heads(2, dtype, d, head, row, stretches, num, count); break;
            case 3: attend_heads(3, dtype, d, head, row, stretches, num, count); break;
            default: attend_heads(4, dtype, d, head, row, stretches, num, count); break;
        }
    }
}

static void begin_head(const struct attention *a, int64_t token, int64_t kv_head, const struct decode *d) {
    size_t size = padded(a);
    for (int64_t g = 0; g < group_size(a); g++) {
        read_query(a, token, kv_head * group_size(a) + g, d->queries + (size_t)g * size);
        reorder(d->queries + (size_t)g * size, d->weights, size, a->pool_dtype, false);
        d->greatest[g] = -__builtin_inff();
    }
}

static void end_head(const struct attention *a, int64_t token, int64_t kv_head, const struct decode *d,
                     float *partial) {
    size_t size = padded(a);
    for (int64_t g = 0; g < group_size(a); g++) {
        float *sums = d->sums + (size_t)g * size;
        if (!partial) {
            reorder(sums, d->weights, size, a->pool_dtype, true);
            write_output(a, token, kv_head * group_size(a) + g, sums, d->total[g]);
            continue;
        }
        float *record = partial + (size_t)g * decode_record(a);
        record[0] = d->greatest[g];
        record[1] = d->total[g];
        memcpy(record + 2, sums, size * sizeof(float));
    }
}

static void add_slots(const struct attention *a, const struct decode *d, int64_t row, struct chunk chunk,
                      struct chunk next) {
    struct stretch stretches[SLOTS];
    int64_t num = find_stretches(a, row, chunk, next, stretches);
    if (!reads_pages(a)) num = copy_stretches(a, d, stretches, num);
    int64_t group = group_size(a), count = chunk.end - chunk.first;
    switch (a->pool_dtype) {
        case FLOAT32: attend_slots(FLOAT32, d, group, padded(a), stretches, num, count); break;
        case BFLOAT16: attend_slots(BFLOAT16, d, group, padded(a), stretches, num, count); break;
        case FLOAT8: attend_slots(FLOAT8, d, group, padded(a), stretches, num, count); break;
        default: attend_slots(FLOAT16, d, group, padded(a), stretches, num, count); break;
    }
}

/* Of slots first .. last: some of the first head, the same of the next one and so on. One beyond the last is empty. */
static struct chunk find_chunk(int64_t kv_head, int64_t num_kv_heads, int64_t first, int64_t last, int64_t index) {
    struct chunk chunk = {kv_head + index % num_kv_heads, first + index / num_kv_heads * SLOTS, last};
    if (last - chunk.first > SLOTS) chunk.end = chunk.first + SLOTS;
    return chunk;
}

/* Heads take turns, a few slots each: in a page they lie beside each other, and memory is fastest in order. */
void decode_split(const struct attention *a, int64_t row, int64_t kv_head, int64_t num_kv_heads, int64_t split,
                  char *memory, float *partial) {
    int64_t token = a->step->row_bounds[row], last = a->step->context_lens[row];
    int64_t first = context_start(a, row) + split * SPLIT;
    if (first + SPLIT < last) last = first + SPLIT;
    memset(memory, 0, head_bytes(a) * (size_t)num_kv_heads);
    for (int64_t h = 0; h < num_kv_heads; h++) {
        struct decode d = decode_of(a, memory, h);
        begin_head(a, token, kv_head + h, &d);
    }
    int64_t num_chunks = (last - first + SLOTS - 1) / SLOTS * num_kv_heads;
    for (int64_t i = 0; i < num_chunks; i++) {
        struct decode d = decode_of(a, memory, i % num_kv_heads);
        add_slots(a, &d, row, find_chunk(kv_head, num_kv_heads, first, last, i),
                  find_chunk(kv_head, num_kv_heads, first, last, i + 1));
    }
    for (int64_t h = 0; h < num_kv_heads; h++) {
        struct decode d = decode_of(a, memory, h);
        float *record = partial ? partial + (size_t)(h * group_size(a)) * decode_record(a) : NULL;
        end_head(a, token, kv_head + h, &d, record);
    }
}

/* partial: the head's record of the first split; those of the next splits are num_heads records apart. */
void combine_splits(const struct attention *a, int64_t row, int64_t head, int64_t splits, const float *partial,
                    float *memory) {
    size_t step = (size_t)a->num_heads * decode_record(a), size = padded(a);
    float greatest = partial[0], total = 0.0f;
    for (int64_t s = 1; s < splits; s++) {
        float score = partial[(size_t)s * step];
        greatest = score > greatest ? score : greatest;
    }
    memset(memory, 0, size * sizeof(float));
    for (int64_t s = 0; s < splits; s++) {
        const float *record = partial + (size_t)s * step;
        float worth = vexp_negative(splat(record[0] - greatest))[0];
        total += worth * record[1];
        for (size_t i = 0; i < size; i++) memory[i] += worth * record[2 + i];
    }
    reorder(memory, memory + size, size, a->pool_dtype, true);
    write_output(a, a->step->row_bounds[row], head, memory, total);
}
