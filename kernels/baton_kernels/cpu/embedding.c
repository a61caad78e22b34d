/* Rows of a table for the ids of tokens; the table may be a matrix that is packed for products. */
#include "linear.h"

struct embedding {
    const void *table; /* [ids][width], or packed by baton_pack */
    int64_t width;
    int32_t dtype, is_packed;
    const int64_t *ids; /* [num_rows] */
    void *output;       /* [num_rows][width] */
};

struct work {
    const struct embedding *embedding;
    int64_t num_rows;
};

static int begin_embedding(void *memory, const void *arguments, int64_t num_rows, int slot) {
    struct work *work = memory;
    (void)slot;
    *work = (struct work){arguments, num_rows};
    return 0;
}

static int embed_share(void *argument) {
    const struct work *work = argument;
    const struct embedding *e = work->embedding;
    int64_t index = team_index(), size = team_size();
    size_t bytes = (size_t)e->width * bytes_of((enum dtype)e->dtype);
    for (int64_t row = work->num_rows * index / size; row < work->num_rows * (index + 1) / size; row++) {
        char *to = (char *)e->output + (size_t)row * bytes;
        if (e->is_packed) {
            read_packed_row(to, e->table, e->ids[row], e->width, (enum dtype)e->dtype);
        } else {
            memcpy(to, (const char *)e->table + (size_t)e->ids[row] * bytes, bytes);
        }
    }
    return 0;
}

const struct kernel embedding_kernel = {begin_embedding, embed_share};
