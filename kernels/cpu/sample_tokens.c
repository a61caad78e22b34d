/* Draws a token of each row: temperature, min_p, top_k, top_p, without a sort, as kernels/gpu/sample_tokens.py does.
 *
 * How far a token lies below the likeliest, after temperature, is a float of at least 0, whose bits are ordered as
 * its values are; so the token that is just kept is found by bisecting over 31 bits. Weights are whole numbers, whose
 * sums depend on no order. Of equals the lowest ids are kept; NaN counts as the least likely.
 */

#include "rows.h"
#include "threads.h"

#define CHUNK 4096 /* tokens, whose halves of weights a lane adds up in 32 bits */
#define HALF_BITS 20
#define HALF ((float)(1 << HALF_BITS))
#define DEEPEST 0x7fffffff

struct sampling { /* kernels/cpu/sample_tokens.py */
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

/* One row: of each token how deep it lies, and its weight, exp(-depth) * 2^40; at the end tokens of no weight. */
struct row {
    float *depths, *weights;
    int64_t size; /* a multiple of LANES */
};

/* What may be drawn: all above the depth `bound`, as bits, and the first `num_equals` at it. */
struct kept {
    int32_t bound;
    int64_t num_equals;
};

INLINE vint depth_bits(const struct row *row, int64_t i) { return (vint)load(row->depths + i); }

INLINE int64_t chunk_end(const struct row *row, int64_t first) {
    return first + CHUNK < row->size ? first + CHUNK : row->size;
}

/* Never inlined, so that equal depths have equal weights wherever they are computed. */
static __attribute__((noinline)) void weigh(float *weights, const float *depths, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        store(weights + i, vexp_negative(-load(depths + i)) * (HALF * HALF));
    }
}

static int64_t weight_of(int32_t depth) {
    float depths[LANES] = {bits_to_float((uint32_t)depth)}, weights[LANES];
    weigh(weights, depths, LANES);
    return (int64_t)weights[0];
}

/* Tokens of [first, end) no deeper than `bound`. */
static int64_t count(const struct row *row, int64_t first, int64_t end, int32_t bound) {
    vint less = {0};
    for (int64_t i = first; i < end; i += LANES) less += depth_bits(row, i) <= bound;
    int64_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum -= less[lane];
    return sum;
}

/* What the tokens of [first, end), at most CHUNK, weigh that are no deeper than `bound`. */
static int64_t chunk_mass(const struct row *row, int64_t first, int64_t end, int32_t bound) {
    vuint high = {0}, low = {0};
    for (int64_t i = first; i < end; i += LANES) {
        vfloat weights = choose(depth_bits(row, i) <= bound, load(row->weights + i), splat(0.0f));
        vint upper = __builtin_convertvector(weights * (1.0f / HALF), vint);
        high += (vuint)upper;
        low += (vuint)__builtin_convertvector(weights - __builtin_convertvector(upper, vfloat) * HALF, vint);
    }
    int64_t highs = 0, lows = 0;
    for (int lane = 0; lane < LANES; lane++) {
        highs += high[lane];
        lows += low[lane];
    }
    return (highs << HALF_BITS) + lows;
}

static int64_t mass(const struct row *row, int32_t bound) {
    int64_t sum = 0;
    for (int64_t first = 0; first < row->size; first += CHUNK) {
        sum += chunk_mass(row, first, chunk_end(row, first), bound);
    }
    return sum;
}

/* The least depth, at most `bound`, that at least `top_k` tokens have reached. */
static int32_t kth(const struct row *row, int32_t bound, int64_t top_k) {
    int32_t low = 0;
    while (low < bound) {
        int32_t middle = low + (bound - low) / 2;
        int64_t found = count(row, 0, row->size, middle);
        if (found == top_k) return middle; /* any depth between theirs and the next one's does */
        if (found < top_k) {
            low = middle + 1;
        } else {
            bound = middle;
        }
    }
    return low;
}

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

/* Fills the row; returns false where there is no memory for it. */
static int read_depths(struct row *row, const struct sampling *sampling, int64_t index) {
    enum dtype dtype = (enum dtype)sampling->dtype;
    int64_t size = sampling->size;
    row->size = (size + LANES - 1) / LANES * LANES;
    row->depths = scratch(PRIVATE_SLOT, 2 * (size_t)row->size * sizeof(float));
    if (!row->depths) return 0;
    row->weights = row->depths + row->size;
    const char *from = (const char *)sampling->logits + (size_t)(sampling->lines[index] * size) * bytes_of(dtype);
    read_row(row->depths, from, (size_t)size, dtype);
    vfloat most = splat(-FLT_MAX);
    for (int64_t i = size; i < row->size; i++) row->depths[i] = -FLT_MAX;
    for (int64_t i = 0; i < row->size; i += LANES) {
        store(row->depths + i, finite(load(row->depths + i)));
        most = vmax(most, load(row->depths + i));
    }
    vfloat greatest = max_lanes(most), temperature = splat(sampling->temperatures[index]);
    for (int64_t i = 0; i < row->size; i += LANES) {
        store(row->depths + i, (greatest - load(row->depths + i)) / temperature);
    }
    for (int64_t i = size; i < row->size; i++) row->depths[i] = bits_to_float(DEEPEST);
    weigh(row->weights, row->depths, row->size);
    for (int64_t i = size; i < row->size; i++) row->weights[i] = 0.0f;
    return 1;
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
    struct row row;
    for (int64_t index; (index = NEXT_ITEM(&work->next_row)) < work->sampling->num_rows;) {
        if (!read_depths(&row, work->sampling, index)) {
            __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        work->sampling->tokens[index] = draw(&row, work->sampling, index);
    }
}

/* 0, or 1 where there is no memory to work in. */
EXPORT int baton_sample(const struct sampling *sampling) {
    struct work work = {sampling, 0, 0};
    run_team(draw_share, &work, sampling->num_rows > 1 ? sampling->num_threads : 1);
    return work.failed;
}
