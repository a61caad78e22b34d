/* Rows of logits as float32, in which no token can be the likeliest, or weighs anything, that a mask forbids. */

#include "rows.h"
#include "threads.h"

#define FORBIDDEN (-FLT_MAX)
#define LEAST (-FLT_MAX / 2) /* of what is allowed, NaN among it */

struct allowed_rows { /* kernels/baton_kernels/cpu/allowed_rows.py */
    float *to; /* [num_rows][size] */
    const void *from;
    int64_t num_rows, size;
    const int64_t *lines;        /* of `from` */
    const uint8_t *const *masks; /* a bit a token, the lowest ids in the lowest bits; NULL: all are allowed */
    int32_t dtype, num_threads;
};

struct work {
    const struct allowed_rows *rows;
    int64_t next_row;
};

static void fill(float *to, const void *from, int64_t size, const uint8_t *mask, enum dtype dtype) {
    read_row(to, from, (size_t)size, dtype);
    for (int64_t first = 0; first < size; first += 8) {
        unsigned bits = mask ? mask[first / 8] : 0xff;
        int64_t end = first + 8 < size ? first + 8 : size;
        for (int64_t i = first; i < end; i++) {
            float most = to[i] < FLT_MAX ? to[i] : FLT_MAX, value = to[i] > LEAST ? most : LEAST;
            to[i] = bits >> (i - first) & 1 ? value : FORBIDDEN;
        }
    }
}

static void fill_share(void *argument) {
    struct work *work = argument;
    const struct allowed_rows *rows = work->rows;
    enum dtype dtype = (enum dtype)rows->dtype;
    for (int64_t row; (row = NEXT_ITEM(&work->next_row)) < rows->num_rows;) {
        size_t line = (size_t)(rows->lines[row] * rows->size) * bytes_of(dtype);
        fill(rows->to + row * rows->size, (const char *)rows->from + line, rows->size, rows->masks[row], dtype);
    }
}

EXPORT void baton_allowed_rows(const struct allowed_rows *rows) {
    struct work work = {rows, 0};
    run_team(fill_share, &work, rows->num_rows > 1 ? rows->num_threads : 1);
}
