/* As linear.c, with weights of 8 bits, a scale for each 32 inputs of an output, and states of 16 bits.
 *
 * Each row is transformed in float32 and then rounded to 16 bits with a scale of its own, so that the greatest number
 * becomes 32,767: next to 8-bit weights that loses nothing, however far a few states stand out (Dettmers et al.,
 * LLM.int8(), 2022, on how far they do). The products of 32 inputs are summed exactly, in 32 bits, those sums in
 * float32. A panel holds groups of 32 inputs: bfloat16 scales [32], then weights [16][32][2]; a 32-bit lane is two
 * inputs of one output, what the processor multiplies and adds up at once.
 *
 * Many rows of bfloat16 states are multiplied by AMX instead, in bfloat16: each panel of weights is widened and then
 * multiplied as in linear_amx.h. 8-bit weights are exact in bfloat16, so only their products with the scales are
 * rounded, and states that were normalised, as linear.c rounds them too: of normally distributed numbers the error
 * grows from 0.54 to 0.58 percent. AMX's products of 8 bits would take two for states of 16 bits, and a pass over the
 * sums for each group. Up to FEW_ROWS, a tile of them, integers take less time than widening does. So it depends on
 * how many rows a call has how they are rounded, and beyond that a row's numbers do not depend on the others.
 */
#include "linear.h"
#include "linear_amx.h"

#define GROUP 32 /* inputs that share a scale */
#define PAIRS (GROUP / 2)
#define FEW_ROWS 12

struct group {
    uint16_t scales[PANEL];
    int8_t weights[PAIRS][PANEL][2];
};

typedef int8_t vchars __attribute__((vector_size(2 * LANES)));
typedef int16_t vshort __attribute__((vector_size(2 * LANES))), vpairs __attribute__((vector_size(4 * LANES)));

struct work {
    const struct linear *linear;
    int32_t *rows; /* of each tile of rows: [pairs][rows of the tile], a pair being two signed 16-bit numbers */
    float *scales; /* [block_rows] */
    int in_bfloat16; /* `rows` are as in linear_amx.h, without scales */
    size_t groups;
    int64_t num_rows, block_rows;
    struct shares panels;
};

/* 2 * LANES weights with 16 bits each: LANES pairs. */
INLINE vint load_pairs(const int8_t *from) {
#if LANES == 16
    return (vint)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
    return (vint)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
#else
    vchars chars;
    memcpy(&chars, from, sizeof chars);
    return (vint)__builtin_convertvector(chars, vpairs);
#endif
}

/* In each lane, the two products of `weights` and `states` are added. */
INLINE vint add_products(vint sums, vint weights, int32_t states) {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(states));
#elif LANES == 16
    return sums + (vint)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(states));
#elif LANES == 8
    return sums + (vint)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(states));
#elif defined(__SSE2__)
    return sums + (vint)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32(states));
#else
    vint even = (vint)((vuint)weights << 16) >> 16, odd = weights >> 16;
    return sums + even * (int32_t)(int16_t)states + odd * (states >> 16);
#endif
}

static size_t num_groups(int64_t inputs) { return (size_t)(inputs + GROUP - 1) / GROUP; }

EXPORT int64_t baton_packed_bytes_int8(int64_t num_outputs, int64_t num_inputs) {
    return (num_outputs + PANEL - 1) / PANEL * (int64_t)(num_groups(num_inputs) * sizeof(struct group));
}

/* weights: [num_outputs][num_inputs], -127 to 127; scales: bfloat16 [num_outputs][groups of 32 inputs]; packed: zeroed,
 * baton_packed_bytes_int8. */
EXPORT void baton_pack_int8(void *packed, const int8_t *weights, const uint16_t *scales, int64_t num_outputs,
                            int64_t num_inputs) {
    size_t groups = num_groups(num_inputs), inputs = (size_t)num_inputs;
    for (size_t output = 0; output < (size_t)num_outputs; output++) {
        struct group *to = (struct group *)packed + output / PANEL * groups;
        size_t column = output % PANEL;
        for (size_t g = 0; g < groups; g++) to[g].scales[column] = scales[output * groups + g];
        for (size_t k = 0; k < inputs; k++) {
            to[k / GROUP].weights[k % GROUP / 2][column][k % 2] = weights[output * inputs + k];
        }
    }
}

/* Rounds `size` numbers, to a whole vector, to 16 bits; NaN and infinity make the scale NaN. */
static float round_row(int16_t *to, const float *row, size_t size) {
    vfloat greatest = splat(0.0f), spoilt = splat(0.0f);
    for (size_t i = 0; i < size; i += LANES) {
        vfloat x = load(row + i);
        greatest = vmax(vmax(x, -x), greatest);
        spoilt += x * 0.0f;
    }
    float most = max_lanes(greatest)[0], factor = most > 0.0f ? 32767.0f / most : 0.0f;
    for (size_t i = 0; i < size; i += LANES) {
        vfloat shifted = load(row + i) * factor + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
        vshort shorts = __builtin_convertvector((vint)((vuint)shifted - 0x4b400000u), vshort);
        memcpy(to + i, &shorts, sizeof shorts);
    }
    return most / 32767.0f + sum_lanes(spoilt)[0];
}

#if AMX

/* LANES weights as floats. */
INLINE vfloat load_weights(const int8_t *from) {
#if LANES == 16
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    vfloat vector;
    for (int lane = 0; lane < LANES; lane++) vector[lane] = (float)from[lane];
    return vector;
#endif
}

/* 2 * LANES numbers as bfloat16. */
INLINE void store_pair(uint16_t *to, vfloat first, vfloat second) {
#if defined(__AVX512BF16__)
    __m512bh words = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    memcpy(to, &words, sizeof words);
#else
    store_as(to, 0, first, BFLOAT16);
    store_as(to, LANES, second, BFLOAT16);
#endif
}

/* Half a vector's lanes, from `o` on, each twice. */
#define TWICE4(o) (o), (o), (o) + 1, (o) + 1
#if LANES == 16
#define TWICE(x, o) SHUFFLE(x, x, TWICE4(o), TWICE4((o) + 2), TWICE4((o) + 4), TWICE4((o) + 6))
#elif LANES == 8
#define TWICE(x, o) SHUFFLE(x, x, TWICE4(o), TWICE4((o) + 2))
#else
#define TWICE(x, o) SHUFFLE(x, x, TWICE4(o))
#endif

/* A group's weights times their scales: bfloat16 [PAIRS][PANEL][2]. */
INLINE void widen(uint16_t *to, const struct group *group) {
    vfloat scales[2 * PANEL / LANES]; /* of the two inputs of each output */
    UNROLL for (size_t i = 0; i < PANEL / LANES; i++) {
        vfloat once = load_as(group->scales, i * LANES, BFLOAT16);
        scales[2 * i] = TWICE(once, 0);
        scales[2 * i + 1] = TWICE(once, LANES / 2);
    }
    __builtin_prefetch((const char *)group->scales + PREFETCH_BYTES);
    for (size_t k = 0; k < PAIRS; k++) {
        const int8_t *weights = group->weights[k][0];
        __builtin_prefetch((const char *)weights + PREFETCH_BYTES);
        UNROLL for (size_t i = 0; i < 2 * PANEL / LANES; i += 2, weights += 2 * LANES, to += 2 * LANES) {
            store_pair(to, load_weights(weights) * scales[i], load_weights(weights + LANES) * scales[i + 1]);
        }
    }
}

/* This thread's panels times a block of rows; `wide`: of this thread, for one panel. */
static void multiply_panels_amx(struct work *work, int64_t first, int64_t rows, uint16_t *wide) {
    size_t depth = work->groups * GROUP;
    struct amx_block block;
    begin_rows_amx(&block, (const uint16_t *)work->rows, depth, first, rows);
    for (int64_t panel; (panel = next_of_shares(&work->panels)) >= 0;) {
        const struct group *groups = (const struct group *)work->linear->weights + (size_t)panel * work->groups;
        for (size_t g = 0; g < work->groups; g++) widen(wide + g * GROUP * PANEL, groups + g);
        multiply_panel_amx(work->linear, &block, (const char *)wide, 0, (size_t)panel * PANEL);
    }
    end_rows_amx(&block);
}

#endif

/* Rounds the block's rows and lays them out in tiles; each thread takes its share of the rows. */
static void prepare_rows(struct work *work, int64_t first_row, int64_t num_rows, float *row) {
    size_t size = work->groups * GROUP;
    int16_t *shorts = (int16_t *)(row + size);
    int64_t index = team_index(), team = team_size(), tile = 0;
    for (int64_t r = num_rows * index / team; r < num_rows * (index + 1) / team; r++) {
        while (tile_start(tile + 1, num_rows) <= r) tile++;
        int64_t start = tile_start(tile, num_rows), height = tile_start(tile + 1, num_rows) - start;
        read_transformed(work->linear, row, first_row + r);
        for (size_t k = (size_t)work->linear->num_inputs; k < size; k++) row[k] = 0.0f;
#if AMX
        if (work->in_bfloat16) {
            write_row_as(shorts, row, size, BFLOAT16);
            place_row_amx((uint16_t *)work->rows, (const uint16_t *)shorts, r, size);
            continue;
        }
#endif
        work->scales[r] = round_row(shorts, row, size);
        int32_t *to = work->rows + (size_t)start * size / 2 + (size_t)(r - start);
        for (size_t k = 0; k < size / 2; k++) memcpy(to + k * (size_t)height, shorts + 2 * k, sizeof *to);
    }
}

/* Columns of two vectors of one panel with a tile of rows; `height` is a constant. */
INLINE void multiply(const int height, vfloat sums[][2], const int32_t *rows, const struct group *group,
                     size_t column, size_t groups) {
    for (size_t g = 0; g < groups; g++, group++) {
        vint exact[TILE_ROWS][2];
        UNROLL for (int r = 0; r < height; r++) exact[r][0] = exact[r][1] = (vint){0};
        __builtin_prefetch((const char *)group->scales + PREFETCH_BYTES);
        for (size_t k = 0; k < PAIRS; k++) {
            const int8_t *weights = group->weights[k][column];
            vint first = load_pairs(weights), second = load_pairs(weights + 2 * LANES);
            __builtin_prefetch((const char *)weights + PREFETCH_BYTES);
            UNROLL for (int r = 0; r < height; r++) {
                exact[r][0] = add_products(exact[r][0], first, rows[r]);
                exact[r][1] = add_products(exact[r][1], second, rows[r]);
            }
            rows += height;
        }
        vfloat first = load_as(group->scales, column, BFLOAT16);
        vfloat second = load_as(group->scales, column + LANES, BFLOAT16);
        UNROLL for (int r = 0; r < height; r++) {
            sums[r][0] += __builtin_convertvector(exact[r][0], vfloat) * first;
            sums[r][1] += __builtin_convertvector(exact[r][1], vfloat) * second;
        }
    }
}

/* Two vectors of sums of row `r` of the block as outputs. */
static void finish_sums(const struct work *work, int64_t first_row, int64_t r, size_t first, vfloat sums[2]) {
    const struct linear *linear = work->linear;
    UNROLL for (int half = 0; half < 2; half++) sums[half] *= work->scales[r];
    switch (linear->dtype) {
        case FLOAT32: finish(linear, first_row + r, first, sums, FLOAT32); break;
        case BFLOAT16: finish(linear, first_row + r, first, sums, BFLOAT16); break;
        default: finish(linear, first_row + r, first, sums, FLOAT16); break;
    }
}

static void multiply_panel(const struct work *work, int64_t panel, int64_t first_row, int64_t num_rows) {
    size_t groups = work->groups;
    const struct group *weights = (const struct group *)work->linear->weights + (size_t)panel * groups;
    for (int64_t tile = 0; tile < num_tiles(num_rows); tile++) {
        int64_t start = tile_start(tile, num_rows);
        int height = (int)(tile_start(tile + 1, num_rows) - start);
        const int32_t *rows = work->rows + (size_t)start * groups * PAIRS;
        for (size_t column = 0; column < PANEL; column += TILE_COLUMNS) {
            size_t first = (size_t)panel * PANEL + column;
            if (first >= (size_t)work->linear->num_outputs) break;
#define MULTIPLY(n)                                                                                           \
    {                                                                                                         \
        vfloat sums[n][2] = {0};                                                                              \
        multiply(n, sums, rows, weights, column, groups);                                                     \
        for (int r = 0; r < n; r++) finish_sums(work, first_row, start + r, first, sums[r]);                  \
    }
            FOR_TILE_ROWS(height, MULTIPLY)
        }
    }
}

static void multiply_panels(struct work *work, int64_t first, int64_t rows) {
    for (int64_t panel; (panel = next_of_shares(&work->panels)) >= 0;) multiply_panel(work, panel, first, rows);
}

static int multiply_share(void *argument) {
    struct work *work = argument;
    size_t depth = work->groups * GROUP, row_bytes = depth * (sizeof(float) + sizeof(int16_t));
    size_t wide_bytes = work->in_bfloat16 ? depth * PANEL * sizeof(uint16_t) : 0;
    float *row = scratch(PRIVATE_SLOT, row_bytes + wide_bytes);
    for (int64_t first = 0; first < work->num_rows; first += work->block_rows) {
        int64_t left = work->num_rows - first, rows = left < work->block_rows ? left : work->block_rows;
        if (row) prepare_rows(work, first, rows, row);
        if (team_index() == 0) share_out(&work->panels, num_panels(work->linear));
        team_barrier();
#if AMX
        if (work->in_bfloat16) {
            if (row) multiply_panels_amx(work, first, rows, (uint16_t *)((char *)row + row_bytes));
        } else {
            multiply_panels(work, first, rows);
        }
#else
        multiply_panels(work, first, rows);
#endif
        if (first + rows < work->num_rows) team_barrier();
    }
    return row == NULL;
}

static int begin_linear(void *memory, const void *arguments, int64_t num_rows, int slot) {
    const struct linear *linear = arguments;
    struct work *work = memory;
    _Static_assert(sizeof *work <= WORK_BYTES, "what a kernel keeps in `work`");
    work->linear = linear;
    work->groups = num_groups(linear->num_inputs);
    work->num_rows = num_rows;
    work->in_bfloat16 = AMX && linear->dtype == BFLOAT16 && num_rows > FEW_ROWS;
    size_t pairs = work->groups * PAIRS;
    work->block_rows = rows_of_block(num_rows, pairs * sizeof(int32_t));
    work->rows = scratch(slot, (size_t)work->block_rows * (pairs + 1) * sizeof(int32_t));
    if (!work->rows) return 1;
    work->scales = (float *)(work->rows + (size_t)work->block_rows * pairs);
    return 0;
}

const struct kernel linear_int8_kernel = {begin_linear, multiply_share};
