/* Runs kernels one after the other in one team of threads, which so is woken once for all of them. */
#include "calls.h"
#include "threads.h"
#include "vector.h"

static const struct kernel *const kernels[] = {
    &linear_kernel, &linear_int8_kernel, &attention_kernel, &embedding_kernel, &angles_kernel, &argmax_kernel,
};

struct call {
    int64_t kernel; /* index into `kernels` */
    const void *arguments;
    const int64_t *num_rows; /* where there are others than the run's, at least 1; or NULL */
};

struct run {
    const struct call *calls;
    int64_t num_calls, num_rows;
    int has_failed;
    /* Of every other call: one begins while some threads may still end the last one, but before its barrier has let
     * anybody go on, all have ended the one before that. */
    int is_over[2];
    char works[2][WORK_BYTES] __attribute__((aligned(64)));
};

static void run_share(void *argument) {
    struct run *run = argument;
    for (int64_t i = 0; i < run->num_calls; i++) {
        const struct call *call = run->calls + i;
        const struct kernel *kernel = kernels[call->kernel];
        int turn = (int)(i % 2);
        void *work = run->works[turn];
        if (team_index() == 0) {
            int has_failed = __atomic_load_n(&run->has_failed, __ATOMIC_RELAXED);
            int64_t num_rows = call->num_rows ? *call->num_rows : run->num_rows;
            if (!has_failed) has_failed = kernel->begin(work, call->arguments, num_rows, turn);
            run->is_over[turn] = has_failed;
            if (has_failed) __atomic_store_n(&run->has_failed, 1, __ATOMIC_RELAXED);
        }
        team_barrier();
        if (run->is_over[turn]) return;
        if (kernel->share(work)) __atomic_store_n(&run->has_failed, 1, __ATOMIC_RELAXED);
    }
}

/* num_rows: of states. 0, or 1 where there is no memory to work in. */
EXPORT int baton_run(const struct call *calls, int64_t num_calls, int64_t num_rows, int32_t num_threads) {
    if (num_rows == 0) return 0;
    struct run run = {.calls = calls, .num_calls = num_calls, .num_rows = num_rows};
    run_team(run_share, &run, num_threads);
    return run.has_failed;
}
