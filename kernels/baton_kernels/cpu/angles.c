/* Cosines and sines by which queries and keys are rotated (Su et al., 2021). */
#include <math.h>

#include "calls.h"
#include "threads.h"
#include "vector.h"

struct angles {
    const float *frequencies; /* [head_dim / 2] angle for each position */
    float scale;              /* of cosines and sines */
    int32_t dtype;
    int64_t head_dim;
    const int64_t *positions; /* [num_rows] */
    void *cosines, *sines;    /* [num_rows][head_dim]; the first half of the sines has the other sign */
};

struct work {
    const struct angles *angles;
    int64_t num_rows;
};

static int begin_angles(void *memory, const void *arguments, int64_t num_rows, int slot) {
    struct work *work = memory;
    (void)slot;
    *work = (struct work){arguments, num_rows};
    return 0;
}

static int find_share(void *argument) {
    const struct work *work = argument;
    const struct angles *a = work->angles;
    int64_t index = team_index(), size = team_size();
    size_t head_dim = (size_t)a->head_dim, half = head_dim / 2;
    for (int64_t row = work->num_rows * index / size; row < work->num_rows * (index + 1) / size; row++) {
        size_t at = (size_t)row * head_dim;
        for (size_t i = 0; i < half; i++) {
            float angle = (float)a->positions[row] * a->frequencies[i];
            float cosine = cosf(angle) * a->scale, sine = sinf(angle) * a->scale;
            store_one(a->cosines, at + i, cosine, (enum dtype)a->dtype);
            store_one(a->cosines, at + half + i, cosine, (enum dtype)a->dtype);
            store_one(a->sines, at + i, -sine, (enum dtype)a->dtype);
            store_one(a->sines, at + half + i, sine, (enum dtype)a->dtype);
        }
    }
    return 0;
}

const struct kernel angles_kernel = {begin_angles, find_share};
