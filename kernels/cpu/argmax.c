/* The greatest number of each row; the lowest index of equals. NaN counts as the least, infinities as finite. */

#include "rows.h"
#include "threads.h"

#define CHUNK 4096

struct work {
    int64_t *indices;
    const void *rows;
    int64_t num_rows, size;
    enum dtype dtype;
    int64_t next_row;
    int failed;
};

static int64_t greatest(const struct work *work, int64_t row, float *numbers) {
    float best = -FLT_MAX;
    int64_t index = 0;
    for (int64_t first = 0; first < work->size; first += CHUNK) {
        int64_t count = work->size - first < CHUNK ? work->size - first : CHUNK;
        const char *from = (const char *)work->rows + (size_t)(row * work->size + first) * bytes_of(work->dtype);
        read_row(numbers, from, (size_t)count, work->dtype);
        for (int64_t i = count; i % LANES; i++) numbers[i] = -FLT_MAX;
        vfloat most = splat(-FLT_MAX);
        for (int64_t i = 0; i < count; i += LANES) {
            store(numbers + i, finite(load(numbers + i)));
            most = vmax(most, load(numbers + i));
        }
        float here = max_lanes(most)[0];
        if (here <= best) continue;
        best = here;
        for (index = 0; numbers[index] != here;) index++;
        index += first;
    }
    return index;
}

static void find_share(void *argument) {
    struct work *work = argument;
    float *numbers = scratch(PRIVATE_SLOT, CHUNK * sizeof(float));
    if (!numbers) __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
    for (int64_t row; numbers && (row = NEXT_ITEM(&work->next_row)) < work->num_rows;) {
        work->indices[row] = greatest(work, row, numbers);
    }
}

/* indices [num_rows]; rows [num_rows][size]. 0, or 1 where there is no memory to work in. */
EXPORT int baton_argmax(int64_t *indices, const void *rows, int64_t num_rows, int64_t size, int32_t dtype,
                        int32_t num_threads) {
    struct work work = {indices, rows, num_rows, size, (enum dtype)dtype, 0, 0};
    run_team(find_share, &work, num_rows > 1 ? num_threads : 1);
    return work.failed;
}
