/* pool.h (hot path): a few native threads for work that is too long for the loop.
 *
 * Jobs are owned by their submitter, who hears of finished ones through a descriptor that becomes readable. What must
 * stay true: a job given to the pool is given back exactly once, by ps_pool_collect, also when the pool closes.
 */
#ifndef PENSTOCK_POOL_H
#define PENSTOCK_POOL_H

#include <stdint.h>

typedef struct ps_job ps_job;
struct ps_job {
    void (*call)(void *arg);
    void *arg;
    void *owner;     /* the submitter's own */
    int64_t took_ns; /* set when it has run */
    ps_job *next;
};

typedef struct ps_pool ps_pool;

/* NULL where threads or the descriptor cannot be had (errno says why). */
ps_pool *ps_pool_open(int threads);
/* Waits for what runs; jobs that wait are given back unrun by a last ps_pool_collect before it. */
void ps_pool_close(ps_pool *pool);
/* Readable while finished jobs wait to be collected. */
int ps_pool_descriptor(const ps_pool *pool);
void ps_pool_submit(ps_pool *pool, ps_job *job);
/* Finished jobs, oldest first, linked by next; NULL where there are none. */
ps_job *ps_pool_collect(ps_pool *pool);

#endif
