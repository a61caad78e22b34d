/* The greatest number of each row; the lowest index of equals. NaN counts as the least, infinities as finite. */

#include "calls.h"
#include "rows.h"
#include "threads.h"

#define CHUNK 4096

struct argmax {
    const void *rows; /* [num_rows][size] */
    int64_t size;
    int32_t dtype;
    int64_t *indices; /* [num_rows] */
};

struct work {
    const struct argmax *argmax;
    int64_t num_rows, next_row;
};

static int64_t greatest(const struct argmax *argmax, int64_t row, float *numbers) {
    float best = -FLT_MAX;
    int64_t index = 0;
    for (int64_t first = 0; first < argmax->size; first += CHUNK) {
        int64_t count = argmax->size - first < CHUNK ? argmax->size - first : CHUNK;
        const char *from = (const char *)argmax->rows + (size_t)(row * argmax->size + first) * bytes_of(argmax->dtype);
        read_row(numbers, from, (size_t)count, argmax->dtype);
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

static int find_share(void *argument) {
    struct work *work = argument;
    float *numbers = scratch(PRIVATE_SLOT, CHUNK * sizeof(float));
    for (int64_t row; numbers && (row = NEXT_ITEM(&work->next_row)) < work->num_rows;) {
        work->argmax->indices[row] = greatest(work->argmax, row, numbers);
    }
    return numbers == NULL;
}

static int begin_argmax(void *memory, const void *arguments, int64_t num_rows, int slot) {
    struct work *work = memory;
    (void)slot;
    *work = (struct work){arguments, num_rows, 0};
    return 0;
}

const struct kernel argmax_kernel = {begin_argmax, find_share};
