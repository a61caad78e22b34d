/* See threads.h. The functions of the OpenMP runtime are handed over by address: a library that linked one itself
 * would bring a second pool of threads that fights the first for the cores. */
#include "threads.h"
#include "vector.h"

#include <pthread.h>
#include <stdlib.h>

static void (*run_parallel)(team_function, void *, unsigned, unsigned); /* GOMP_parallel */
static void (*wait_for_all)(void);                                      /* GOMP_barrier */
static int (*index_in_team)(void);                                      /* omp_get_thread_num */
static int (*size_of_team)(void);                                       /* omp_get_num_threads */

struct memory {
    void *slots[NUM_SLOTS];
    size_t sizes[NUM_SLOTS];
};
static pthread_key_t memory_key;
static pthread_once_t memory_once = PTHREAD_ONCE_INIT;

EXPORT void baton_use_threads(void *parallel, void *barrier, void *index, void *size) {
    memcpy(&run_parallel, &parallel, sizeof parallel); /* ISO C has no cast from object to function */
    memcpy(&wait_for_all, &barrier, sizeof barrier);
    memcpy(&index_in_team, &index, sizeof index);
    memcpy(&size_of_team, &size, sizeof size);
}

void run_team(team_function function, void *argument, int num_threads) {
    if (num_threads > 1 && run_parallel) {
        run_parallel(function, argument, (unsigned)num_threads, 0);
    } else {
        function(argument);
    }
}

int team_index(void) { return index_in_team ? index_in_team() : 0; }

int team_size(void) { return size_of_team ? size_of_team() : 1; }

void team_barrier(void) {
    if (team_size() > 1) wait_for_all();
}

static void free_memory(void *argument) {
    struct memory *memory = argument;
    for (int slot = 0; slot < NUM_SLOTS; slot++) free(memory->slots[slot]);
    free(memory);
}

static void make_key(void) { pthread_key_create(&memory_key, free_memory); }

void *scratch(int slot, size_t num_bytes) {
    pthread_once(&memory_once, make_key);
    struct memory *memory = pthread_getspecific(memory_key);
    if (!memory) {
        memory = calloc(1, sizeof *memory);
        if (!memory || pthread_setspecific(memory_key, memory)) return NULL;
    }
    if (memory->sizes[slot] < num_bytes) {
        free(memory->slots[slot]);
        memory->sizes[slot] = (num_bytes + 63) / 64 * 64;
        memory->slots[slot] = aligned_alloc(64, memory->sizes[slot]);
        if (!memory->slots[slot]) memory->sizes[slot] = 0;
    }
    return memory->slots[slot];
}
