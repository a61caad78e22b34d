/* One layer's attention of a step: rotate queries and keys, store keys and values, attend; one team of threads. */
#include "paged_rows.h"

#define SPLITS_A_THREAD 4

struct work {
    const struct attention *attention;
    int64_t *item_bounds;   /* [num_rows + 1] items of a row: parts of it times sets of kv heads */
    int64_t heads_of_split; /* kv heads of an item of a row of one token; of other rows it is one */
    int64_t *record_bounds; /* [num_rows + 1] splits whose results are joined afterwards */
    float *records;         /* [splits][num_heads] of decode_record numbers */
    int64_t next_item, next_joined;
};

static int64_t num_parts(const struct attention *a, int64_t row) {
    return row < a->step->num_one_token_rows ? num_splits(a, row) : num_query_blocks(a, row);
}

/* One head's numbers by the token's angles (Su et al., 2021), which begin at `at`; `to` may be `from`. The dtypes are
 * constants: `read` of what is read, `dtype` of angles and what is written. */
INLINE void rotate_as(const enum dtype read, const enum dtype dtype, const struct attention_step *step, size_t at,
                      size_t size, const void *from, void *to) {
    size_t half = size / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        vfloat x = load_as(from, i, read), y = load_as(from, half + i, read);
        vfloat first = x * load_as(step->cosines, at + i, dtype) + y * load_as(step->sines, at + i, dtype);
        y = y * load_as(step->cosines, at + half + i, dtype) + x * load_as(step->sines, at + half + i, dtype);
        store_as(to, i, first, dtype);
        store_as(to, half + i, y, dtype);
    }
    for (; i < half; i++) {
        float x = load_one(from, i, read), y = load_one(from, half + i, read);
        float first = x * load_one(step->cosines, at + i, dtype) + y * load_one(step->sines, at + i, dtype);
        y = y * load_one(step->cosines, at + half + i, dtype) + x * load_one(step->sines, at + half + i, dtype);
        store_one(to, i, first, dtype);
        store_one(to, half + i, y, dtype);
    }
}

/* One head's numbers, normalised if the model does, and rotated. */
static void rotate(const struct attention *a, int64_t token, const float *norm, const void *from, void *to,
                   float *memory) {
    size_t size = (size_t)a->head_dim, at = (size_t)token * size;
    if (norm) {
        read_row(memory, from, size, a->dtype);
        normalise_row(memory, norm, size, a->norm_eps);
    }
#define ROTATE(d)                                                                                             \
    if (norm) {                                                                                               \
        rotate_as(FLOAT32, d, a->step, at, size, memory, to);                                                 \
    } else {                                                                                                  \
        rotate_as(d, d, a->step, at, size, from, to);                                                         \
    }
    switch (a->dtype) {
        case FLOAT32: ROTATE(FLOAT32) break;
        case BFLOAT16: ROTATE(BFLOAT16) break;
        default: ROTATE(FLOAT16) break;
    }
}

/* A head's numbers into its slot of a page. */
static void store_slot(const struct attention *a, char *slot, const void *from, float scale, float *memory) {
    size_t size = (size_t)a->head_dim;
    if (a->dtype == a->pool_dtype && scale == 1.0f) {
        memcpy(slot, from, size * bytes_of(a->dtype));
        return;
    }
    read_row(memory, from, size, a->dtype);
    for (size_t i = 0; scale != 1.0f && i < size; i++) memory[i] /= scale;
    write_row(slot, memory, size, a->pool_dtype);
}

static void prepare_token(const struct attention *a, int64_t token, float *memory) {
    size_t size = (size_t)a->head_dim, bytes = size * bytes_of(a->dtype);
    size_t at = (size_t)(token * a->states_stride) * bytes_of(a->dtype);
    for (int64_t head = 0; a->step->cosines && head < a->num_heads; head++) {
        char *query = (char *)a->query + at + (size_t)head * bytes;
        rotate(a, token, a->query_norm, query, query, memory);
    }
    int64_t page = a->step->slot_mapping[token] / a->block_size, slot = a->step->slot_mapping[token] % a->block_size;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const void *key = (const char *)a->key + at + (size_t)head * bytes;
        const void *value = (const char *)a->value + at + (size_t)head * bytes;
        if (a->step->cosines) {
            rotate(a, token, a->key_norm, key, memory + size, memory);
            key = memory + size;
        }
        store_slot(a, slot_address(a, page, 0, head, slot), key, a->key_scale, memory);
        store_slot(a, slot_address(a, page, 1, head, slot), value, a->value_scale, memory);
    }
}

static void compute_item(const struct work *work, int64_t row, int64_t item, char *memory) {
    const struct attention *a = work->attention;
    if (row >= a->step->num_one_token_rows) {
        prefill_block(a, row, item % a->num_kv_heads, item / a->num_kv_heads, memory);
        return;
    }
    int64_t num_sets = a->num_kv_heads / work->heads_of_split, part = item / num_sets;
    int64_t kv_head = item % num_sets * work->heads_of_split;
    float *partial = NULL;
    if (num_splits(a, row) > 1) {
        int64_t record = (work->record_bounds[row] + part) * a->num_heads + kv_head * group_size(a);
        partial = work->records + (size_t)record * decode_record(a);
    }
    decode_split(a, row, kv_head, work->heads_of_split, part, memory, partial);
}

static void join_splits(struct work *work, char *memory) {
    const struct attention *a = work->attention;
    for (int64_t item; (item = NEXT_ITEM(&work->next_joined)) < a->step->num_one_token_rows * a->num_heads;) {
        int64_t row = item / a->num_heads, head = item % a->num_heads, first = work->record_bounds[row];
        int64_t splits = work->record_bounds[row + 1] - first;
        if (!splits) continue;
        const float *partial = work->records + (size_t)(first * a->num_heads + head) * decode_record(a);
        combine_splits(a, row, head, splits, partial, (float *)memory);
    }
}

static int attend_share(void *argument) {
    struct work *work = argument;
    const struct attention *a = work->attention;
    size_t bytes = decode_bytes(a);
    if (a->step->num_rows > a->step->num_one_token_rows && prefill_bytes(a) > bytes) bytes = prefill_bytes(a);
    char *memory = scratch(PRIVATE_SLOT, bytes);
    int64_t index = team_index(), size = team_size(), tokens = a->step->num_tokens;
    for (int64_t t = tokens * index / size; memory && t < tokens * (index + 1) / size; t++) {
        prepare_token(a, t, (float *)memory);
    }
    team_barrier();
    int64_t last = work->item_bounds[a->step->num_rows] - 1, row = a->step->num_rows - 1;
    /* Backwards: the longest rows come last, and the end of a prompt sees the longest context. */
    for (int64_t item; memory && (item = last - NEXT_ITEM(&work->next_item)) >= 0;) {
        while (work->item_bounds[row] > item) row--;
        compute_item(work, row, item - work->item_bounds[row], memory);
    }
    if (work->record_bounds[a->step->num_one_token_rows]) {
        team_barrier();
        if (memory) join_splits(work, memory);
    }
    return memory == NULL;
}

static int begin_attention(void *memory, const void *arguments, int64_t num_rows_of_states, int slot) {
    const struct attention *a = arguments;
    struct work *work = memory;
    _Static_assert(sizeof *work <= WORK_BYTES, "what a kernel keeps in `work`");
    *work = (struct work){.attention = a};
    int64_t num_rows = a->step->num_rows, num_one_token_rows = a->step->num_one_token_rows;
    size_t num_bounds = (size_t)num_rows + 1;
    int64_t items = 0, records = 0, splits = 0;
    (void)num_rows_of_states; /* num_tokens */
    for (int64_t row = 0; row < num_one_token_rows; row++) {
        splits += num_splits(a, row);
        if (num_splits(a, row) > 1) records += num_splits(a, row);
    }
    /* All heads of a page are read at once where that leaves every thread enough to do. */
    work->heads_of_split = splits >= SPLITS_A_THREAD * team_size() ? a->num_kv_heads : 1;
    size_t bytes = (size_t)(records * a->num_heads) * decode_record(a) * sizeof(float);
    work->item_bounds = scratch(slot, 2 * num_bounds * sizeof(int64_t) + bytes);
    if (!work->item_bounds) return 1;
    work->record_bounds = work->item_bounds + num_bounds;
    work->records = (float *)(work->record_bounds + num_bounds);
    records = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        work->item_bounds[row] = items;
        work->record_bounds[row] = records;
        int64_t heads = row < num_one_token_rows ? work->heads_of_split : 1;
        items += num_parts(a, row) * (a->num_kv_heads / heads);
        if (row < num_one_token_rows && num_splits(a, row) > 1) records += num_splits(a, row);
    }
    work->item_bounds[num_rows] = items;
    work->record_bounds[num_rows] = records;
    return 0;
}

const struct kernel attention_kernel = {begin_attention, attend_share};
