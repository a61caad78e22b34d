/* One layer's attention of a step: rotate queries and keys, store keys and values, attend; one team of threads. */
#include "attention.h"

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

/* The first `size / 2` numbers with the others (Su et al., 2021): `dtype`, of the angles, is a constant. */
INLINE void rotate_as(const enum dtype dtype, const void *cosines, const void *sines, size_t at, size_t size,
                      const float *head, float *rotated) {
    size_t half = size / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        vfloat x = load(head + i), y = load(head + half + i);
        store(rotated + i, x * load_as(cosines, at + i, dtype) + y * load_as(sines, at + i, dtype));
        y = y * load_as(cosines, at + half + i, dtype) + x * load_as(sines, at + half + i, dtype);
        store(rotated + half + i, y);
    }
    for (; i < half; i++) {
        float x = head[i], y = head[half + i];
        rotated[i] = x * load_one(cosines, at + i, dtype) + y * load_one(sines, at + i, dtype);
        y = y * load_one(cosines, at + half + i, dtype) + x * load_one(sines, at + half + i, dtype);
        rotated[half + i] = y;
    }
}

/* One head's numbers, normalised if the model does, rotated by the token's angles. */
static void rotate(const struct attention *a, int64_t token, const float *norm, float *head, float *rotated) {
    size_t size = (size_t)a->head_dim, at = (size_t)token * size;
    if (norm) normalise_row(head, norm, size, a->norm_eps);
    switch (a->dtype) {
        case FLOAT32: rotate_as(FLOAT32, a->step->cosines, a->step->sines, at, size, head, rotated); break;
        case BFLOAT16: rotate_as(BFLOAT16, a->step->cosines, a->step->sines, at, size, head, rotated); break;
        default: rotate_as(FLOAT16, a->step->cosines, a->step->sines, at, size, head, rotated); break;
    }
}

/* A head's numbers into its slot of a page. */
static void store_slot(const struct attention *a, char *slot, float *numbers, float scale) {
    size_t size = (size_t)a->head_dim;
    for (size_t i = 0; scale != 1.0f && i < size; i++) numbers[i] /= scale;
    write_row(slot, numbers, size, a->pool_dtype);
}

static void prepare_token(const struct attention *a, int64_t token, float *memory) {
    size_t size = (size_t)a->head_dim, bytes = size * bytes_of(a->dtype);
    float *rotated = memory + size;
    size_t at = (size_t)(token * a->states_stride) * bytes_of(a->dtype);
    for (int64_t head = 0; a->step->cosines && head < a->num_heads; head++) {
        char *query = (char *)a->query + at + (size_t)head * bytes;
        read_row(memory, query, size, a->dtype);
        rotate(a, token, a->query_norm, memory, rotated);
        write_row(query, rotated, size, a->dtype);
    }
    int64_t page = a->step->slot_mapping[token] / a->block_size, slot = a->step->slot_mapping[token] % a->block_size;
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        const char *key = (const char *)a->key + at + (size_t)head * bytes;
        const char *value = (const char *)a->value + at + (size_t)head * bytes;
        if (a->step->cosines) {
            read_row(memory, key, size, a->dtype);
            rotate(a, token, a->key_norm, memory, rotated);
        } else {
            read_row(rotated, key, size, a->dtype);
        }
        store_slot(a, slot_address(a, page, 0, head, slot), rotated, a->key_scale);
        read_row(memory, value, size, a->dtype);
        store_slot(a, slot_address(a, page, 1, head, slot), memory, a->value_scale);
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
