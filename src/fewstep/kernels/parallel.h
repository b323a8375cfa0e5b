/* Loops over the threads of the OpenMP runtime that PyTorch has loaded.
 *
 * No OpenMP in the compiler is needed, and no second runtime is loaded: GOMP_parallel stays
 * undefined in our object and resolves to the one in the process (libgomp; LLVM's and Intel's have
 * it too). Without one the loop runs on the calling thread. */
#ifndef FEWSTEP_PARALLEL_H
#define FEWSTEP_PARALLEL_H

/* One item of the loop. `thread` is in [0, threads): the row of a scratch array. */
typedef void (*parallel_body)(void *context, long item, int thread);

extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

struct parallel_loop {
    parallel_body body;
    void *context;
    long items;
    long next;  /* the first item that nobody has taken */
    int entered; /* threads that have begun */
};

static inline void parallel_thread(void *argument) {
    struct parallel_loop *loop = argument;
    int thread = __atomic_fetch_add(&loop->entered, 1, __ATOMIC_RELAXED);
    for (;;) {
        long item = __atomic_fetch_add(&loop->next, 1, __ATOMIC_RELAXED);
        if (item >= loop->items) return;
        loop->body(loop->context, item, thread);
    }
}

/* body(context, item, thread) for every item in [0, items), in any order, on `threads` threads.
 * Returns when all are done. */
static inline void parallel_for(long items, int threads, parallel_body body, void *context) {
    struct parallel_loop loop = {body, context, items, 0, 0};
    if (threads > items) threads = (int)items;
    if (threads > 1 && GOMP_parallel)
        GOMP_parallel(parallel_thread, &loop, (unsigned)threads, 0);
    else
        parallel_thread(&loop);
}

#endif
