/* Parallel regions on the thread pool of whoever loads the library, and memory of each thread to work in. */
#ifndef BATON_THREADS_H
#define BATON_THREADS_H

#include <stddef.h>

typedef void (*team_function)(void *argument);

/* Runs `function` on up to `num_threads` threads, the calling one among them, and waits for all. */
void run_team(team_function function, void *argument, int num_threads);

/* Within a team: which of its threads this is, how many there are, and a wait for all of them. */
int team_index(void);
int team_size(void);
void team_barrier(void);

/* At least `num_bytes`, aligned to 64, the same memory at every call of one thread and slot; NULL: none left. */
enum { SHARED_SLOT = 0, PRIVATE_SLOT = 1, NUM_SLOTS = 2 };
void *scratch(int slot, size_t num_bytes);

/* The next of items 0 .. , given out to the threads of a team as they ask. */
#define NEXT_ITEM(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)

#endif
