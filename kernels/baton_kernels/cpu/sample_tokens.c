/* Draws a token of each row: temperature, min_p, top_k, top_p, without a sort, as kernels/baton_kernels/gpu/sample_tokens.py does.
 *
 * The token that is just kept is found by bisecting over its depth. Of equals the lowest ids are kept; NaN counts as
 * the least likely.
 */

#include "depths.h"

struct sampling { /* kernels/baton_kernels/cpu/sample_tokens.py */
    int64_t *tokens;
    const void *logits;
    int64_t num_rows, size;
    const int64_t *lines;      /* of the logits */
    const float *temperatures; /* above 0 */
    const int32_t *top_k;      /* 0: off */
    const double *top_p;       /* 1: off */
    const float *depths;       /* how far below the likeliest a token may lie; infinite: any */
    const uint64_t *numbers;   /* random in [0, 1), times 2^64 */
    int32_t dtype, num_threads;
};

struct work {
    const struct sampling *sampling;
    int64_t next_row;
    int failed;
};

/* What may be drawn: all above the depth `bound`, as bits, and the first `num_equals` at it. */
struct kept {
    int32_t bound;
    int64_t num_equals;
};

/* The tokens' own depths next to `bound`: the last to it, the first below it. */
static void neighbours(const struct row *row, int32_t bound, int32_t *last, int32_t *first_below) {
    vint most = {0}, least = (vint){0} + DEEPEST;
    for (int64_t i = 0; i < row->size; i += LANES) {
        vint depths = depth_bits(row, i), is_in = depths <= bound;
        vint inside = depths & is_in, outside = depths | (is_in & DEEPEST);
        vint is_more = inside > most, is_less = outside < least;
        most = (inside & is_more) | (most & ~is_more);
        least = (outside & is_less) | (least & ~is_less);
    }
    *last = most[0], *first_below = least[0];
    for (int lane = 1; lane < LANES; lane++) {
        if (most[lane] > *last) *last = most[lane];
        if (least[lane] < *first_below) *first_below = least[lane];
    }
}

/* The least depth, at most `bound`, down to which the tokens weigh at least `target`; those down to `bound` do. */
static int32_t reaching(const struct row *row, int32_t bound, int64_t target) {
    int32_t low = 0;
    while (low < bound) {
        int32_t middle = low + (bound - low) / 2, last, first_below;
        neighbours(row, middle, &last, &first_below);
        if (mass(row, middle) < target) {
            low = first_below;
        } else {
            bound = last;
        }
    }
    return low;
}

/* Those down to `bound`; with top_k, no more than that. */
static struct kept likeliest(const struct row *row, int32_t bound, int64_t top_k) {
    int64_t num_kept = count(row, 0, row->size, bound);
    if (top_k > 0 && top_k < num_kept) {
        bound = kth(row, bound, top_k);
        num_kept = top_k;
    }
    return (struct kept){bound, num_kept - count(row, 0, row->size, bound - 1)};
}

/* Of these, the fewest that reach `top_p` of their weight (Holtzman et al., 2019). */
static struct kept nucleus(const struct row *row, struct kept kept, double top_p) {
    int64_t mass_above = mass(row, kept.bound - 1), num_equals = kept.num_equals;
    double share = top_p * (double)(mass_above + num_equals * weight_of(kept.bound));
    int64_t target = share > 1.0 ? (int64_t)__builtin_ceil(share) : 1;
    if (target <= mass_above) {
        kept.bound = reaching(row, kept.bound - 1, target);
        mass_above = mass(row, kept.bound - 1);
        num_equals = row->size;
    }
    int64_t weight = weight_of(kept.bound), enough = (target - mass_above + weight - 1) / (weight ? weight : 1);
    kept.num_equals = enough < num_equals ? enough : num_equals;
    return kept;
}

/* The first token whose cumulative weight, of those kept, is above `threshold`. */
static int64_t token_at(const struct row *row, struct kept kept, int64_t threshold) {
    int64_t sum = 0, num_left = kept.num_equals, weight = weight_of(kept.bound), last = 0;
    for (int64_t first = 0; first < row->size; first += CHUNK) {
        int64_t end = chunk_end(row, first), above = chunk_mass(row, first, end, kept.bound - 1);
        int64_t equals = num_left ? count(row, first, end, kept.bound) - count(row, first, end, kept.bound - 1) : 0;
        if (equals > num_left) equals = num_left;
        if (sum + above + equals * weight <= threshold) {
            sum += above + equals * weight;
            num_left -= equals;
            continue;
        }
        for (last = first; last < end; last++) {
            int32_t depth = (int32_t)float_to_bits(row->depths[last]);
            if (depth > kept.bound || (depth == kept.bound && num_left-- <= 0)) continue;
            sum += (int64_t)row->weights[last];
            if (sum > threshold) return last;
        }
    }
    return last; /* never: together they weigh more */
}

static int64_t draw(const struct row *row, const struct sampling *sampling, int64_t index) {
    float depth = sampling->depths[index];
    struct kept kept = {(int32_t)float_to_bits(depth), 0};
    if (depth < __builtin_inff() || sampling->top_k[index]) { /* else nothing that has a weight is left out */
        kept = likeliest(row, kept.bound, sampling->top_k[index]);
    }
    if (sampling->top_p[index] < 1.0) kept = nucleus(row, kept, sampling->top_p[index]);
    int64_t total = mass(row, kept.bound - 1) + kept.num_equals * weight_of(kept.bound);
    return token_at(row, kept, (int64_t)(((unsigned __int128)sampling->numbers[index] * (uint64_t)total) >> 64));
}

static void draw_share(void *argument) {
    struct work *work = argument;
    const struct sampling *sampling = work->sampling;
    enum dtype dtype = (enum dtype)sampling->dtype;
    struct row row;
    for (int64_t index; (index = NEXT_ITEM(&work->next_row)) < sampling->num_rows;) {
        size_t line = (size_t)(sampling->lines[index] * sampling->size) * bytes_of(dtype);
        const char *from = (const char *)sampling->logits + line;
        if (!read_depths(&row, from, sampling->size, dtype, sampling->temperatures[index])) {
            __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        sampling->tokens[index] = draw(&row, sampling, index);
    }
}

/* 0, or 1 where there is no memory to work in. */
EXPORT int baton_sample(const struct sampling *sampling) {
    struct work work = {sampling, 0, 0};
    run_team(draw_share, &work, sampling->num_rows > 1 ? sampling->num_threads : 1);
    return work.failed;
}
