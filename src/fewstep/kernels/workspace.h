/* Memory of a call that the calling thread keeps for its next one.
 *
 * Fresh pages cost more than the work of a small call. Up to KEPT bytes stay; a thread that ends
 * gives them back. */
#ifndef FEWSTEP_WORKSPACE_H
#define FEWSTEP_WORKSPACE_H

#include <pthread.h>
#include <stdlib.h>

#define WORKSPACE_KEPT (16u << 20)

struct workspace {
    size_t bytes;
    char padding[64 - sizeof(size_t)];
};

static pthread_key_t workspace_key;
static pthread_once_t workspace_once = PTHREAD_ONCE_INIT;

static void workspace_begin(void) { pthread_key_create(&workspace_key, free); }

/* `bytes` of memory, aligned to 64; NULL where there is none. Give it back by workspace_release. */
static inline void *workspace_take(size_t bytes) {
    pthread_once(&workspace_once, workspace_begin);
    struct workspace *kept = pthread_getspecific(workspace_key);
    pthread_setspecific(workspace_key, NULL);
    if (kept && kept->bytes >= bytes) return kept + 1;
    free(kept);
    void *made;
    if (posix_memalign(&made, 64, sizeof(struct workspace) + bytes)) return NULL;
    kept = made;
    kept->bytes = bytes;
    return kept + 1;
}

static inline void workspace_release(void *memory) {
    struct workspace *used = (struct workspace *)memory - 1;
    if (used->bytes > WORKSPACE_KEPT || pthread_setspecific(workspace_key, used)) free(used);
}

#endif
