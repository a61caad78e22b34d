/* What tokens' probabilities follow from, and the likeliest tokens of a row, the lowest ids of equals first. */
#include "depths.h"

#define ANYTHING 0x7f800000 /* the depth of what has no weight at all */
#define BLOCK (4 * LANES)

struct logprobs { /* kernels/baton_kernels/cpu/logprobs.py */
    int64_t *totals;        /* [num_rows]: what all tokens weigh */
    float *chosen, *depths; /* [num_rows], [num_rows][stride] */
    int64_t *likeliest;     /* [num_rows][stride] */
    const void *logits;
    int64_t num_rows, size, stride;
    const int64_t *lines, *tokens; /* of the logits; the chosen ones */
    const int64_t *counts;         /* of the likeliest that each row wants: at most `size` and `stride` */
    int32_t dtype, num_threads;
};

struct work {
    const struct logprobs *logprobs;
    int64_t next_row;
    int failed;
};

/* The `num_wanted` tokens that lie least deep, in order, and their depths. */
static void find_likeliest(const struct row *row, int64_t num_wanted, int64_t *tokens, float *depths) {
    int32_t bound = kth(row, ANYTHING, num_wanted);
    int64_t num_found = 0, num_equals = num_wanted - count(row, 0, row->size, bound - 1);
    for (int64_t first = 0; first < row->size && num_found < num_wanted; first += BLOCK) {
        int64_t end = first + BLOCK < row->size ? first + BLOCK : row->size;
        if (!count(row, first, end, bound)) continue;
        for (int64_t token = first; token < end; token++) {
            int32_t depth = (int32_t)float_to_bits(row->depths[token]);
            if (depth > bound || (depth == bound && num_equals-- <= 0)) continue;
            int64_t place = num_found++;
            for (; place && depths[place - 1] > row->depths[token]; place--) {
                depths[place] = depths[place - 1];
                tokens[place] = tokens[place - 1];
            }
            depths[place] = row->depths[token];
            tokens[place] = token;
        }
    }
}

static void look_at(const struct row *row, const struct logprobs *logprobs, int64_t index) {
    int64_t place = index * logprobs->stride, num_wanted = logprobs->counts[index];
    logprobs->totals[index] = mass(row, ANYTHING);
    logprobs->chosen[index] = row->depths[logprobs->tokens[index]];
    if (num_wanted) find_likeliest(row, num_wanted, logprobs->likeliest + place, logprobs->depths + place);
}

static void look_at_share(void *argument) {
    struct work *work = argument;
    const struct logprobs *logprobs = work->logprobs;
    enum dtype dtype = (enum dtype)logprobs->dtype;
    struct row row;
    for (int64_t index; (index = NEXT_ITEM(&work->next_row)) < logprobs->num_rows;) {
        const char *from = logprobs->logits;
        from += (size_t)(logprobs->lines[index] * logprobs->size) * bytes_of(dtype);
        if (!read_depths(&row, from, logprobs->size, dtype, 1.0f)) {
            __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        look_at(&row, logprobs, index);
    }
}

/* 0, or 1 where there is no memory to work in. */
EXPORT int baton_logprobs(const struct logprobs *logprobs) {
    struct work work = {logprobs, 0, 0};
    run_team(look_at_share, &work, logprobs->num_rows > 1 ? logprobs->num_threads : 1);
    return work.failed;
}
