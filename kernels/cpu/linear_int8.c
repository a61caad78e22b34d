/* As linear.c, with 8-bit weights and one scale for each output (LLM.int8(): Dettmers et al., 2022).
 *
 * Each row is transformed in float32 and then rounded to 8 bits with a scale of its own, so that the greatest number
 * becomes 127; products are summed exactly, in 32 bits. Panels hold [inputs / 4][32][4]: a 32-bit lane is four inputs of
 * one output, what the VNNI instruction multiplies and adds up at once.
 */
#include "linear.h"

#define GROUP 4 /* inputs of a lane */

typedef int8_t vint8 __attribute__((vector_size(LANES)));

struct work {
    const struct linear *linear;
    int32_t *rows; /* of each tile of rows: [groups][rows of the tile], a group being four signed bytes */
    float *scales; /* [block_rows] */
    int32_t *sums; /* [block_rows] of a row's rounded numbers */
    size_t groups;
    int64_t block_rows;
    int64_t next_panel;
    int failed;
};

/* `add_products`: in each lane, the sum of four products of `weights` and the four bytes of `states` is added.
 * WEIGHT_OFFSET: what is stored is the weight plus this. */
#if defined(__AVX512VNNI__)
#define WEIGHT_OFFSET 128 /* the instruction wants one side without a sign */
INLINE vint add_products(vint sums, vint weights, int32_t states) {
    return (vint)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(states));
}
#elif LANES == 16
#define WEIGHT_OFFSET 0
/* Two products of at most 127 * 127 fit in 16 bits; the sign moves from the weight to the state. */
INLINE vint add_products(vint sums, vint weights, int32_t states) {
    __m512i w = (__m512i)weights, x = _mm512_set1_epi32(states);
    x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), x);
    return sums + (vint)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif LANES == 8
#define WEIGHT_OFFSET 0
INLINE vint add_products(vint sums, vint weights, int32_t states) {
    __m256i w = (__m256i)weights, x = _mm256_sign_epi8(_mm256_set1_epi32(states), w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), x);
    return sums + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
#define WEIGHT_OFFSET 0
INLINE vint add_products(vint sums, vint weights, int32_t states) {
    UNROLL for (int shift = 24; shift >= 0; shift -= 8) {
        vint weight = (vint)((vuint)weights << shift) >> 24;
        sums += weight * (int32_t)(int8_t)((uint32_t)states >> (24 - shift));
    }
    return sums;
}
#endif

static size_t num_groups(int64_t inputs) { return (size_t)(inputs + GROUP - 1) / GROUP; }

EXPORT int64_t baton_packed_bytes_int8(int64_t num_outputs, int64_t num_inputs) {
    return (num_outputs + PANEL - 1) / PANEL * PANEL * (int64_t)num_groups(num_inputs) * GROUP;
}

/* weights: [num_outputs][num_inputs], -127 to 127; packed: zeroed, baton_packed_bytes_int8. */
EXPORT void baton_pack_int8(int8_t *packed, const int8_t *weights, int64_t num_outputs, int64_t num_inputs) {
    size_t groups = num_groups(num_inputs), inputs = (size_t)num_inputs;
    for (size_t output = 0; output < (size_t)num_outputs; output++) {
        int8_t *to = packed + (output / PANEL * groups * PANEL + output % PANEL) * GROUP;
        for (size_t k = 0; k < inputs; k++) {
            to[k / GROUP * PANEL * GROUP + k % GROUP] = (int8_t)(weights[output * inputs + k] + WEIGHT_OFFSET);
        }
    }
}

/* Rounds `size` numbers, to a whole vector, to 8 bits; NaN and infinity make the scale NaN. */
static float round_row(int8_t *to, const float *row, size_t size, int32_t *sum) {
    vfloat greatest = splat(0.0f), spoilt = splat(0.0f);
    vint sums = {0};
    for (size_t i = 0; i < size; i += LANES) {
        vfloat x = load(row + i);
        greatest = vmax(vmax(x, -x), greatest);
        spoilt += x * 0.0f;
    }
    float most = max_lanes(greatest)[0], factor = most > 0.0f ? 127.0f / most : 0.0f;
    for (size_t i = 0; i < size; i += LANES) {
        vfloat shifted = load(row + i) * factor + 12582912.0f; /* adding 1.5 * 2^23 rounds to a whole number */
        vint8 bytes = __builtin_convertvector((vint)((vuint)shifted - 0x4b400000u), vint8);
        sums += __builtin_convertvector(bytes, vint);
        memcpy(to + i, &bytes, sizeof bytes);
    }
    *sum = 0;
    for (int lane = 0; lane < LANES; lane++) *sum += sums[lane];
    return most / 127.0f + sum_lanes(spoilt)[0];
}

/* Rounds the block's rows and lays them out in tiles; each thread takes its share of the rows. */
static void prepare_rows(struct work *work, int64_t first_row, int64_t num_rows, float *row, size_t size) {
    float *other = row + size;
    int8_t *bytes = (int8_t *)(other + size);
    int64_t index = team_index(), team = team_size(), tile = 0;
    for (int64_t r = num_rows * index / team; r < num_rows * (index + 1) / team; r++) {
        while (tile_start(tile + 1, num_rows) <= r) tile++;
        int64_t start = tile_start(tile, num_rows), height = tile_start(tile + 1, num_rows) - start;
        read_transformed(work->linear, row, other, first_row + r);
        for (size_t k = (size_t)work->linear->num_inputs; k < size; k++) row[k] = 0.0f;
        work->scales[r] = round_row(bytes, row, size, work->sums + r);
        int32_t *to = work->rows + (size_t)start * work->groups + (size_t)(r - start);
        for (size_t k = 0; k < work->groups; k++) memcpy(to + k * (size_t)height, bytes + GROUP * k, GROUP);
    }
}

INLINE vint load_lanes(const char *from) {
    vint vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

/* Columns of two vectors of one panel with a tile of rows; `height` is a constant. */
INLINE void multiply(const int height, vint results[][2], const int32_t *rows, const char *weights, size_t groups) {
    vint sums[TILE_ROWS][2]; /* not `results`: in memory that others see, each step would be stored */
    UNROLL for (int r = 0; r < height; r++) sums[r][0] = sums[r][1] = (vint){0};
    for (size_t k = 0; k < groups; k++) {
        vint first = load_lanes(weights), second = load_lanes(weights + sizeof first);
        __builtin_prefetch(weights + PREFETCH_BYTES);
        __builtin_prefetch(weights + PREFETCH_BYTES + 64);
        UNROLL for (int r = 0; r < height; r++) {
            sums[r][0] = add_products(sums[r][0], first, rows[r]);
            sums[r][1] = add_products(sums[r][1], second, rows[r]);
        }
        rows += height;
        weights += PANEL * GROUP;
    }
    UNROLL for (int r = 0; r < height; r++) {
        results[r][0] = sums[r][0];
        results[r][1] = sums[r][1];
    }
}

/* Two vectors of sums of row `r` of the block as outputs. */
static void finish_sums(const struct work *work, int64_t first_row, int64_t r, size_t first, vint sums[2]) {
    const struct linear *linear = work->linear;
    vfloat numbers[2];
    for (size_t half = 0; half < 2; half++) {
        vint exact = sums[half] - WEIGHT_OFFSET * work->sums[r];
        vfloat scales = load(linear->scales + first + half * LANES) * work->scales[r];
        numbers[half] = __builtin_convertvector(exact, vfloat) * scales;
    }
    switch (linear->dtype) {
        case FLOAT32: finish(linear, first_row + r, first, numbers, FLOAT32); break;
        case BFLOAT16: finish(linear, first_row + r, first, numbers, BFLOAT16); break;
        default: finish(linear, first_row + r, first, numbers, FLOAT16); break;
    }
}

static void multiply_panel(const struct work *work, int64_t panel, int64_t first_row, int64_t num_rows) {
    size_t groups = work->groups;
    const char *weights = (const char *)work->linear->weights + (size_t)panel * PANEL * groups * GROUP;
    for (int64_t tile = 0; tile < num_tiles(num_rows); tile++) {
        int64_t start = tile_start(tile, num_rows);
        int height = (int)(tile_start(tile + 1, num_rows) - start);
        const int32_t *rows = work->rows + (size_t)start * groups;
        for (size_t column = 0; column < PANEL; column += TILE_COLUMNS) {
            size_t first = (size_t)panel * PANEL + column;
            if (first >= (size_t)work->linear->num_outputs) break;
#define MULTIPLY(n)                                                                                           \
    {                                                                                                         \
        vint sums[n][2];                                                                                      \
        multiply(n, sums, rows, weights + column * GROUP, groups);                                            \
        for (int r = 0; r < n; r++) finish_sums(work, first_row, start + r, first, sums[r]);                  \
    }
            FOR_TILE_ROWS(height, MULTIPLY)
        }
    }
}

static void multiply_share(void *argument) {
    struct work *work = argument;
    const struct linear *linear = work->linear;
    size_t size = ((size_t)linear->num_inputs + LANES - 1) / LANES * LANES;
    float *row = scratch(PRIVATE_SLOT, size * (2 * sizeof(float) + 1));
    if (!row) __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
    for (int64_t first = 0; first < linear->num_rows; first += work->block_rows) {
        int64_t left = linear->num_rows - first, rows = left < work->block_rows ? left : work->block_rows;
        if (row) prepare_rows(work, first, rows, row, size);
        if (team_index() == 0) __atomic_store_n(&work->next_panel, 0, __ATOMIC_RELAXED);
        team_barrier();
        for (int64_t panel; (panel = NEXT_ITEM(&work->next_panel)) < num_panels(linear);) {
            multiply_panel(work, panel, first, rows);
        }
        if (first + rows < linear->num_rows) team_barrier();
    }
}

/* 0, or 1 where there is no memory to work in. */
EXPORT int baton_linear_int8(const struct linear *linear) {
    struct work work = {.linear = linear, .groups = num_groups(linear->num_inputs)};
    int64_t most = ROWS_BYTES / (int64_t)(GROUP * work.groups) / TILE_ROWS * TILE_ROWS;
    if (most < TILE_ROWS) most = TILE_ROWS;
    int64_t blocks = (linear->num_rows + most - 1) / most;
    if (blocks == 0) return 0;
    work.block_rows = (linear->num_rows + blocks - 1) / blocks;
    work.rows = scratch(SHARED_SLOT, (size_t)work.block_rows * (work.groups + 2) * sizeof(int32_t));
    if (!work.rows) return 1;
    work.sums = work.rows + (size_t)work.block_rows * work.groups;
    work.scales = (float *)(work.sums + work.block_rows);
    run_team(multiply_share, &work, linear->num_threads);
    return work.failed;
}
