/* See threads.h. The functions of the OpenMP runtime are handed over by address: a library that linked one itself
 * would bring a second pool of threads that fights the first for the cores. */
#include "threads.h"
#include "vector.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

static void (*run_parallel)(team_function, void *, unsigned, unsigned); /* GOMP_parallel */
static int (*index_in_team)(void);                                      /* omp_get_thread_num */
static int (*size_of_team)(void);                                       /* omp_get_num_threads */

struct memory {
    void *slots[NUM_SLOTS];
    size_t sizes[NUM_SLOTS];
};
static pthread_key_t memory_key;
static pthread_once_t memory_once = PTHREAD_ONCE_INIT;

EXPORT void baton_use_threads(void *parallel, void *index, void *size) {
    memcpy(&run_parallel, &parallel, sizeof parallel); /* ISO C has no cast from object to function */
    memcpy(&index_in_team, &index, sizeof index);
    memcpy(&size_of_team, &size, sizeof size);
}

/* A team at work. Its barrier is its own, for threads meet several times a layer: OpenMP's would put them to sleep
 * where more threads than cores are known to it, and to be woken takes longer than most kernels do. */
struct team {
    team_function function;
    void *argument;
    int num_waiting, num_meetings;
};

static __thread struct team *own_team; /* NULL: of one thread */
static __thread int own_index, own_size;

static void enter(void *argument) {
    struct team *team = argument;
    own_team = team;
    own_index = index_in_team();
    own_size = size_of_team();
    team->function(team->argument);
    own_team = NULL;
}

void run_team(team_function function, void *argument, int num_threads) {
    if (num_threads > 1 && run_parallel) {
        struct team team = {.function = function, .argument = argument};
        run_parallel(enter, &team, (unsigned)num_threads, 0);
    } else {
        function(argument);
    }
}

int team_index(void) { return own_team ? own_index : 0; }

int team_size(void) { return own_team ? own_size : 1; }

INLINE void pause_a_moment(void) {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

void team_barrier(void) {
    struct team *team = own_team;
    if (!team || own_size == 1) return;
    int meeting = __atomic_load_n(&team->num_meetings, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->num_waiting, 1, __ATOMIC_ACQ_REL) == own_size) {
        __atomic_store_n(&team->num_waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->num_meetings, meeting + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&team->num_meetings, __ATOMIC_ACQUIRE) == meeting;) {
        if (spins < SPINS) {
            spins++;
            pause_a_moment();
        } else {
            sched_yield();
        }
    }
}

void share_out(struct shares *shares, int64_t num_items) {
    int64_t size = team_size();
    shares->num_items = num_items;
    shares->num_shares = size < MAX_SHARES ? size : MAX_SHARES;
    for (int64_t share = 0; share < shares->num_shares; share++) {
        __atomic_store_n(&shares->runs[share].taken, 0, __ATOMIC_RELAXED);
    }
}

int64_t end_of_own_share(const struct shares *shares) {
    return shares->num_items * (team_index() % shares->num_shares + 1) / shares->num_shares;
}

int64_t next_of_shares(struct shares *shares) {
    int64_t size = shares->num_shares, own = team_index() % size;
    for (int64_t other = 0; other < size; other++) {
        int64_t share = (own + other) % size;
        int64_t first = shares->num_items * share / size, end = shares->num_items * (share + 1) / size;
        if (__atomic_load_n(&shares->runs[share].taken, __ATOMIC_RELAXED) >= end - first) continue;
        int64_t item = first + NEXT_ITEM(&shares->runs[share].taken);
        if (item < end) return item;
    }
    return -1;
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
