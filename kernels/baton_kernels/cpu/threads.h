/* Parallel regions on the thread pool of whoever loads the library, and memory of each thread to work in. */
#ifndef BATON_THREADS_H
#define BATON_THREADS_H

#include <stddef.h>
#include <stdint.h>

typedef void (*team_function)(void *argument);

/* How long a thread waits at a barrier before it offers its core to others: about 10 microseconds. */
#define SPINS 200

/* Runs `function` on up to `num_threads` threads, the calling one among them, and waits for all. */
void run_team(team_function function, void *argument, int num_threads);

/* Within a team: which of its threads this is, how many there are, and a wait for all of them. */
int team_index(void);
int team_size(void);
void team_barrier(void);

/* At least `num_bytes`, aligned to 64, the same memory at every call of one thread and slot; NULL: none left. */
enum { PRIVATE_SLOT = 2, NUM_SLOTS = 3 }; /* 0 and 1: of kernels, in turn */
void *scratch(int slot, size_t num_bytes);

/* Items of which each thread of a team has a run of its own, at every call the same: what it wrote the last time is
 * still in its core's cache. Who has done with its own takes from the others. */
#define MAX_SHARES 64
struct shares {
    int64_t num_items, num_shares;
    struct {
        int64_t taken;
        char others[56]; /* a cache line for each, as each has its own thread that writes it */
    } runs[MAX_SHARES] __attribute__((aligned(64)));
};

/* By one thread, before a barrier. */
void share_out(struct shares *shares, int64_t num_items);

/* This thread's next item; -1: there are no more. */
int64_t next_of_shares(struct shares *shares);

/* Where the run of this thread's own items ends. */
int64_t end_of_own_share(const struct shares *shares);

/* The next of items 0 .. , given out to the threads of a team as they ask. */
#define NEXT_ITEM(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)

#endif
