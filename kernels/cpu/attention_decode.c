/* Rows of one token: every query head of a kv head at once, so that K and V are read once (grouped queries).
 *
 * Softmax is kept up to date slot by slot (Milakov and Gimelshein, 2018); parts of a long context are joined
 * afterwards (flash-decoding: Dao et al., 2023). How a row is split depends on its length alone, so that a request's
 * tokens do not depend on the batch that it is in.
 */
#include "attention.h"

#define SLOTS 32   /* at a time */
#define SPLIT 1024 /* slots of a split */

struct decode {
    float *queries, *keys, *values, *sums; /* [group], [SLOTS], [SLOTS], [group] rows of `padded` */
    float *weights;                        /* [group][SLOTS] */
    float *greatest, *total;               /* [group] */
};

static int64_t context_start(const struct attention *a, int64_t row) {
    return first_visible(a, a->context_lens[row] - 1);
}

int64_t num_splits(const struct attention *a, int64_t row) {
    return (a->context_lens[row] - context_start(a, row) + SPLIT - 1) / SPLIT;
}

size_t decode_bytes(const struct attention *a) {
    size_t group = (size_t)group_size(a);
    return sizeof(float) * (padded(a) * (2 * group + 2 * SLOTS) + (SLOTS + 2) * group);
}

size_t decode_record(const struct attention *a) { return (size_t)a->head_dim + 2; }

static struct decode lay_out(const struct attention *a, char *memory) {
    size_t group = (size_t)group_size(a), row = padded(a);
    memset(memory, 0, decode_bytes(a));
    struct decode d = {.queries = (float *)memory};
    d.keys = d.queries + group * row;
    d.values = d.keys + SLOTS * row;
    d.sums = d.values + SLOTS * row;
    d.weights = d.sums + group * row;
    d.greatest = d.weights + group * SLOTS;
    d.total = d.greatest + group;
    return d;
}

/* Lane j of the pick: source j / (LANES / 2), of its groups of 2 * width lanes the first or second `width`. */
#define LANE(j, width, second)                                                                                \
    (((j) / (LANES / 2)) * LANES + ((j) % (LANES / 2)) / (width) * 2 * (width) + (j) % (width) + (second) * (width))
#if LANES == 16
#define PICK(w, s)                                                                                            \
    LANE(0, w, s), LANE(1, w, s), LANE(2, w, s), LANE(3, w, s), LANE(4, w, s), LANE(5, w, s), LANE(6, w, s),   \
        LANE(7, w, s), LANE(8, w, s), LANE(9, w, s), LANE(10, w, s), LANE(11, w, s), LANE(12, w, s),           \
        LANE(13, w, s), LANE(14, w, s), LANE(15, w, s)
#elif LANES == 8
#define PICK(w, s)                                                                                            \
    LANE(0, w, s), LANE(1, w, s), LANE(2, w, s), LANE(3, w, s), LANE(4, w, s), LANE(5, w, s), LANE(6, w, s),   \
        LANE(7, w, s)
#else
#define PICK(w, s) LANE(0, w, s), LANE(1, w, s), LANE(2, w, s), LANE(3, w, s)
#endif
#define FOLD(w)                                                                                               \
    UNROLL for (int i = 0; i < (w); i++) {                                                                    \
        vfloat x = parts[2 * i], y = parts[2 * i + 1];                                                        \
        parts[i] = SHUFFLE(x, y, PICK(w, 0)) + SHUFFLE(x, y, PICK(w, 1));                                     \
    }

/* Lane j of the result is the sum of the lanes of parts[j]; parts is overwritten. */
INLINE vfloat sums_of(vfloat parts[LANES]) {
#if LANES == 16
    FOLD(8)
#endif
#if LANES >= 8
    FOLD(4)
#endif
    FOLD(2)
    FOLD(1)
    return parts[0];
}

/* Scores of SLOTS slots with one query; those beyond `count` become minus infinity. */
INLINE void score(const float *query, const float *keys, size_t row, int64_t count, float scores[SLOTS]) {
    for (size_t first = 0; first < SLOTS; first += LANES) {
        vfloat parts[LANES] = {0};
        for (size_t i = 0; i < row; i += LANES) {
            vfloat numbers = load(query + i);
            UNROLL for (size_t slot = 0; slot < LANES; slot++) {
                parts[slot] += numbers * load(keys + (first + slot) * row + i);
            }
        }
        store(scores + first, sums_of(parts));
    }
    for (int64_t slot = count; slot < SLOTS; slot++) scores[slot] = -__builtin_inff();
}

/* Turns scores into weights relative to the greatest score so far; returns what earlier sums are worth by now. */
INLINE float weigh(float scores[SLOTS], float *greatest, float *total) {
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

/* sums = sums * kept + weights * values, for as many heads as a tile has rows. */
INLINE void add_values(const int heads, const struct decode *d, int64_t head, const float *kept, size_t row,
                       int64_t count) {
    for (size_t column = 0; column < row; column += TILE_COLUMNS) {
        float *to = d->sums + (size_t)head * row + column;
        vfloat sums[TILE_ROWS][2];
        UNROLL for (int h = 0; h < heads; h++) {
            sums[h][0] = load(to + (size_t)h * row) * kept[h];
            sums[h][1] = load(to + (size_t)h * row + LANES) * kept[h];
        }
        multiply_tile(heads, sums, d->weights + head * SLOTS, SLOTS, 1, d->values + column, row, (size_t)count);
        UNROLL for (int h = 0; h < heads; h++) {
            store(to + (size_t)h * row, sums[h][0]);
            store(to + (size_t)h * row + LANES, sums[h][1]);
        }
    }
}

/* Slots of a row's context, from position `first` on. */
struct slots {
    int64_t row, kv_head, first, count;
};

/* Asks for share `index` of some slots' cache lines. */
static void prefetch_share(const struct attention *a, const struct slots *slots, int64_t index, int64_t shares) {
    int64_t first = slots->first + slots->count * index / shares;
    int64_t end = slots->first + slots->count * (index + 1) / shares;
    while (first < end) {
        struct run run = find_run(a, slots->row, slots->kv_head, first, end);
        size_t bytes = (size_t)(run.count * a->head_dim) * bytes_of(a->pool_dtype);
        for (size_t byte = 0; byte < bytes; byte += 64) {
            __builtin_prefetch(run.keys + byte);
            __builtin_prefetch(run.values + byte);
        }
        first += run.count;
    }
}

/* Reads the next slots ahead little by little: all at once would wait for the memory and then leave it idle. */
static void attend_slots(const struct attention *a, const struct decode *d, int64_t count,
                         const struct slots *next) {
    size_t row = padded(a);
    int64_t group = group_size(a);
    for (int64_t g = 0; g < group; g++) {
        prefetch_share(a, next, g, group);
        score(d->queries + (size_t)g * row, d->keys, row, count, d->weights + g * SLOTS);
    }
    for (int64_t head = 0; head < group; head += TILE_ROWS) {
        int64_t heads = group - head < TILE_ROWS ? group - head : TILE_ROWS;
        float kept[TILE_ROWS];
        for (int64_t h = 0; h < heads; h++) {
            kept[h] = weigh(d->weights + (head + h) * SLOTS, d->greatest + head + h, d->total + head + h);
        }
#define ADD(n) add_values(n, d, head, kept, row, count)
        FOR_TILE_ROWS(heads, ADD)
    }
}

void decode_split(const struct attention *a, int64_t row, int64_t kv_head, int64_t split, char *memory,
                  float *partial) {
    struct decode d = lay_out(a, memory);
    int64_t group = group_size(a), token = a->row_bounds[row], end = a->context_lens[row];
    int64_t first = context_start(a, row) + split * SPLIT;
    if (first + SPLIT < end) end = first + SPLIT;
    for (int64_t g = 0; g < group; g++) {
        read_query(a, token, kv_head * group + g, d.queries + (size_t)g * padded(a));
        d.greatest[g] = -__builtin_inff();
    }
    for (; first < end; first += SLOTS) {
        int64_t count = end - first < SLOTS ? end - first : SLOTS;
        int64_t left = end - first - count;
        struct slots next = {row, kv_head, first + count, left < SLOTS ? left : SLOTS};
        read_context(a, row, kv_head, first, first + count, d.keys, d.values);
        attend_slots(a, &d, count, &next);
    }
    for (int64_t g = 0; g < group; g++) {
        float *sums = d.sums + (size_t)g * padded(a);
        if (!partial) {
            write_output(a, token, kv_head * group + g, sums, d.total[g]);
            continue;
        }
        float *record = partial + (size_t)g * decode_record(a);
        record[0] = d.greatest[g];
        record[1] = d.total[g];
        memcpy(record + 2, sums, (size_t)a->head_dim * sizeof(float));
    }
}

/* partial: the head's record of the first split; those of the next splits are num_heads records apart. */
void combine_splits(const struct attention *a, int64_t row, int64_t head, int64_t splits, const float *partial,
                    float *memory) {
    size_t step = (size_t)a->num_heads * decode_record(a);
    float greatest = partial[0], total = 0.0f;
    for (int64_t s = 1; s < splits; s++) {
        float score = partial[(size_t)s * step];
        greatest = score > greatest ? score : greatest;
    }
    memset(memory, 0, (size_t)a->head_dim * sizeof(float));
    for (int64_t s = 0; s < splits; s++) {
        const float *record = partial + (size_t)s * step;
        float worth = vexp_negative(splat(record[0] - greatest))[0];
        total += worth * record[1];
        for (int64_t i = 0; i < a->head_dim; i++) memory[i] += worth * record[2 + i];
    }
    write_output(a, a->row_bounds[row], head, memory, total);
}
