/* Rows of one token: every query head of a kv head at once, so that K and V are read once (grouped queries).
 *
 * Softmax is kept up to date slot by slot (Milakov and Gimelshein, 2018); parts of a long context are joined
 * afterwards (flash-decoding: Dao et al., 2023). How a row is split depends on its length alone, so that a request's
 * tokens do not depend on the batch that it is in.
 */
#include "attention.h"

#define SLOTS 16    /* at a time */
#define SPLIT 1024  /* slots of a split */

struct decode {
    float *queries, *keys, *values, *sums; /* [group], [SLOTS], [SLOTS], [group] rows of `padded` */
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
    return sizeof(float) * (padded(a) * (2 * group + 2 * SLOTS) + 2 * group);
}

size_t decode_record(const struct attention *a) { return (size_t)a->head_dim + 2; }

static struct decode lay_out(const struct attention *a, char *memory) {
    size_t group = (size_t)group_size(a), row = padded(a);
    memset(memory, 0, decode_bytes(a));
    struct decode d = {.queries = (float *)memory};
    d.keys = d.queries + group * row;
    d.values = d.keys + SLOTS * row;
    d.sums = d.values + SLOTS * row;
    d.greatest = d.sums + group * row;
    d.total = d.greatest + group;
    return d;
}

static void fetch(const struct attention *a, float *to, const char *const *addresses, int64_t count) {
    for (int64_t slot = 0; slot < count; slot++) {
        read_row(to + (size_t)slot * padded(a), addresses[slot], (size_t)a->head_dim, a->dtype);
    }
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
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (vint){__VA_ARGS__})
#endif
#define FOLD(w)                                                                                               \
    for (int i = 0; i < (w); i++) {                                                                           \
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
static void score(const float *query, const float *keys, size_t row, int64_t count, float scores[SLOTS]) {
    for (size_t first = 0; first < SLOTS; first += LANES) {
        vfloat parts[LANES] = {0};
        for (size_t i = 0; i < row; i += LANES) {
            vfloat numbers = load(query + i);
            for (size_t slot = 0; slot < LANES; slot++) {
                parts[slot] += numbers * load(keys + (first + slot) * row + i);
            }
        }
        store(scores + first, sums_of(parts));
    }
    for (int64_t slot = count; slot < SLOTS; slot++) scores[slot] = -__builtin_inff();
}

/* Turns scores into weights relative to the greatest score so far; returns what earlier sums are worth by now. */
static float weigh(float scores[SLOTS], float *greatest, float *total) {
    vfloat most = load(scores);
    for (int i = LANES; i < SLOTS; i += LANES) most = vmax(most, load(scores + i));
    float now = max_lanes(most), before = *greatest;
    now = now > before ? now : before;
    float kept = vexp(splat(before - now))[0];
    vfloat sum = splat(0.0f);
    for (int i = 0; i < SLOTS; i += LANES) {
        vfloat weights = vexp(load(scores + i) - now);
        store(scores + i, weights);
        sum += weights;
    }
    *greatest = now;
    *total = *total * kept + sum_lanes(sum);
    return kept;
}

INLINE void add_values(float *sums, float kept, const float *weights, const float *values, size_t row,
                       int64_t count, const int vectors) {
    vfloat parts[4];
    for (int v = 0; v < vectors; v++) parts[v] = load(sums + v * LANES) * kept;
    for (int64_t slot = 0; slot < count; slot++) {
        vfloat weight = splat(weights[slot]);
        for (int v = 0; v < vectors; v++) parts[v] += weight * load(values + (size_t)slot * row + v * LANES);
    }
    for (int v = 0; v < vectors; v++) store(sums + v * LANES, parts[v]);
}

static void attend_slots(const struct attention *a, const struct decode *d, int64_t count) {
    size_t row = padded(a);
    for (int64_t g = 0; g < group_size(a); g++) {
        float weights[SLOTS];
        score(d->queries + (size_t)g * row, d->keys, row, count, weights);
        float kept = weigh(weights, d->greatest + g, d->total + g);
        float *sums = d->sums + (size_t)g * row;
        size_t i = 0;
        for (; i + 4 * LANES <= row; i += 4 * LANES) {
            add_values(sums + i, kept, weights, d->values + i, row, count, 4);
        }
        for (; i < row; i += 2 * LANES) add_values(sums + i, kept, weights, d->values + i, row, count, 2);
    }
}

INLINE void prefetch_slots(const char *const *addresses, int64_t count, size_t bytes) {
    for (int64_t slot = 0; slot < count; slot++) {
        for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(addresses[slot] + byte);
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
    size_t bytes = (size_t)a->head_dim * bytes_of(a->dtype);
    const char *keys[2 * SLOTS], *values[2 * SLOTS]; /* of these slots and of the next ones */
    for (; first < end; first += SLOTS) {
        int64_t known = end - first < 2 * SLOTS ? end - first : 2 * SLOTS, count = known < SLOTS ? known : SLOTS;
        find_slots(a, row, 0, kv_head, first, known, keys);
        find_slots(a, row, 1, kv_head, first, known, values);
        prefetch_slots(keys + count, known - count, bytes);
        fetch(a, d.keys, keys, count);
        prefetch_slots(values + count, known - count, bytes);
        fetch(a, d.values, values, count);
        attend_slots(a, &d, count);
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
        float worth = vexp(splat(record[0] - greatest))[0];
        total += worth * record[1];
        for (int64_t i = 0; i < a->head_dim; i++) memory[i] += worth * record[2 + i];
    }
    write_output(a, a->row_bounds[row], head, memory, total);
}
