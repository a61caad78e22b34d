/* As linear.c, with weights of 8 bits, a scale for each 32 inputs of an output, and states of 16 bits.
 *
 * Each row is transformed in float32 and then rounded to 16 bits with a scale of its own, so that the greatest number
 * becomes 32,767: next to 8-bit weights that loses nothing, however far a few states stand out (Dettmers et al.,
 * LLM.int8(), 2022, on how far they do). The products of 32 inputs are summed exactly, in 32 bits, those sums in
 * float32. A panel holds groups of 32 inputs: bfloat16 scales [32], then weights [16][32][2]; a 32-bit lane is two
 * inputs of one output, what the processor multiplies and adds up at once.
 */
#include "linear.h"

#define GROUP 32 /* inputs that share a scale */
#define PAIRS (GROUP / 2)

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

static int multiply_share(void *argument) {
    struct work *work = argument;
    const struct linear *linear = work->linear;
    float *row = scratch(PRIVATE_SLOT, work->groups * GROUP * (sizeof(float) + sizeof(int16_t)));
    for (int64_t first = 0; first < work->num_rows; first += work->block_rows) {
        int64_t left = work->num_rows - first, rows = left < work->block_rows ? left : work->block_rows;
        if (row) prepare_rows(work, first, rows, row);
        if (team_index() == 0) share_out(&work->panels, num_panels(linear));
        team_barrier();
        for (int64_t panel; (panel = next_of_shares(&work->panels)) >= 0;) {
            multiply_panel(work, panel, first, rows);
        }
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
    size_t pairs = work->groups * PAIRS;
    work->block_rows = rows_of_block(num_rows, pairs * sizeof(int32_t));
    work->rows = scratch(slot, (size_t)work->block_rows * (pairs + 1) * sizeof(int32_t));
    if (!work->rows) return 1;
    work->scales = (float *)(work->rows + (size_t)work->block_rows * pairs);
    return 0;
}

const struct kernel linear_int8_kernel = {begin_linear, multiply_share};
