/* Kernels that a team of threads runs one after the other: see calls.c. */
#ifndef BATON_CALLS_H
#define BATON_CALLS_H

#include <stddef.h>
#include <stdint.h>

#define WORK_BYTES 8192

struct kernel {
    /* By one thread: fills in `work`, WORK_BYTES that are aligned to 64, for `num_rows` rows; `slot`: of scratch memory that is its own until
     * the next but one kernel begins. 0, or 1 where there is no memory. */
    int (*begin)(void *work, const void *arguments, int64_t num_rows, int slot);
    /* By all threads of the team, each its share; 0, or 1 where there is no memory. Leaves no thread of the team behind
     * at a barrier, whatever it returns. */
    int (*share)(void *work);
};

extern const struct kernel linear_kernel, linear_int8_kernel, attention_kernel;
extern const struct kernel embedding_kernel, angles_kernel, argmax_kernel;

#endif
