/* pool.c (hot path): see pool.h. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

struct ps_pool {
    pthread_mutex_t mutex;
    pthread_cond_t work;
    ps_job *first, *last;           /* wait */
    ps_job *done_first, *done_last; /* finished */
    int threads, closing, fd;
    pthread_t thread[];
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *run(void *arg) {
    ps_pool *pool = arg;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->first && !pool->closing) pthread_cond_wait(&pool->work, &pool->mutex);
        if (pool->closing) break;
        ps_job *job = pool->first;
        pool->first = job->next;
        if (!pool->first) pool->last = NULL;
        pthread_mutex_unlock(&pool->mutex);
        int64_t began = now_ns();
        job->call(job->arg);
        job->took_ns = now_ns() - began;
        job->next = NULL;
        pthread_mutex_lock(&pool->mutex);
        int was_empty = !pool->done_first;
        if (pool->done_last) pool->done_last->next = job;
        else pool->done_first = job;
        pool->done_last = job;
        if (was_empty) {
            uint64_t one = 1;
            ssize_t n = write(pool->fd, &one, sizeof one); /* only fails where it is readable already */
            (void)n;
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

ps_pool *ps_pool_open(int threads) {
    ps_pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof(pthread_t));
    if (!pool) return NULL;
    pool->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (pool->fd < 0) {
        free(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    /* Signals are the main thread's. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    for (; pool->threads < threads; pool->threads++)
        if (pthread_create(&pool->thread[pool->threads], NULL, run, pool)) break;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!pool->threads) {
        ps_pool_close(pool);
        return NULL;
    }
    return pool;
}

void ps_pool_close(ps_pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    pool->closing = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->threads; i++) pthread_join(pool->thread[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
    close(pool->fd);
    free(pool);
}

int ps_pool_descriptor(const ps_pool *pool) { return pool->fd; }

void ps_pool_submit(ps_pool *pool, ps_job *job) {
    job->next = NULL;
    pthread_mutex_lock(&pool->mutex);
    if (pool->last) pool->last->next = job;
    else pool->first = job;
    pool->last = job;
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
}

ps_job *ps_pool_collect(ps_pool *pool) {
    uint64_t count;
    pthread_mutex_lock(&pool->mutex);
    ssize_t n = read(pool->fd, &count, sizeof count);
    (void)n;
    ps_job *found = pool->done_first;
    pool->done_first = pool->done_last = NULL;
    pthread_mutex_unlock(&pool->mutex);
    return found;
}
