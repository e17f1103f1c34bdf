/* event_log.c (hot path): the event log's writer and its two threads; event_log.h says what it is and defines the words.
 *
 * One thread keeps the promise: it syncs, says so at once, and looks whether the folder is still there. The other takes
 * care of what may be late: it touches pages, makes the spare, cuts and closes what is full. What must stay true: the
 * writer touches only memory, but to take the spare; nothing stands between a sync and `synced` but the disk.
 */
#define _GNU_SOURCE
#include "event_log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum { AHEAD = 4 << 20, PIECE = 256 << 10, TICK_US = 10000, RETRY_US = 500000, STEP_US = 1000000, NAME = 64 };
enum { MARK_US = 100000, NICE = 10, LOOK_US = 50000, LATE_US = 500000, LATE_FOR_US = 5000000 };

typedef struct segment {
    struct segment *next;
    char *base;
    uint64_t capacity, at, number, before; /* before: position of its offset 0 */
    uint64_t touched;                      /* offset up to which pages are there for writing; the caring thread's */
    uint64_t synced;                       /* offset up to which it is on disk; the syncing thread's */
    uint64_t marked;                       /* what the newest mark says of it */
    int64_t first_sequence;
    int fd;
    uint64_t turn, turn_written;
    int64_t marked_us;
    int64_t last_sequence;
} segment;

typedef struct { /* a path, and what was there when the log was opened */
    char *path;
    dev_t device;
    ino_t inode;
} place;

enum { GONE = ESTALE };

struct ps_log {
    /* the writer's own */
    segment *current;
    segment *shell; /* the struct for the next segment: no malloc while scoring */
    int64_t next_sequence; /* of the next event: one more than the last event's */
    uint64_t log_id, segment_bytes;
    int used;       /* atomic: the current segment holds an event or a score */
    int64_t opened_us; /* atomic: monotonic time at which it got the first one */
    char *prelude;  /* bodies of the schema records, one after the other */
    uint32_t *prelude_bytes;
    int n_prelude;
    int stale; /* the current segment has other schemas */
    int64_t **marks;
    int n_marks;
    /* shared */
    uint64_t position;     /* atomic: written by the writer */
    uint64_t synced;       /* atomic: written by the syncing thread */
    int halt;              /* atomic: why nothing is appended, the one word that the append reads: `error`, or GONE */
    int error, gone, room; /* atomic. error: the disk failed, for good; gone: the folder is not where it was; room: why no
                            * next segment can be had */
    int roll;              /* atomic */
    int refused;           /* atomic: why the last reserve was refused */
    pthread_mutex_t lock;
    pthread_cond_t wake, care, done, made;
    segment *sealing, *sealing_end; /* full: left by the writer for the syncing thread */
    segment *cutting, *cutting_end; /* on disk: left by that for the caring thread */
    int spare_fd;          /* -1: none yet */
    char *spare_base;
    int making;            /* somebody makes the spare, without the lock */
    int spare_error;       /* why there is none */
    uint64_t wanted;       /* a waiter wants this position on disk */
    int stop, stopped, folder_changed;
    int hurry;             /* atomic: the caring thread has something better to do than to touch pages */
    int64_t clean_us;      /* atomic: what was written before this is on disk */
    int64_t late_us;       /* atomic: when a sync was last done that came too late; 0: never */
    int64_t longest_unsynced_us, last_late_us; /* lock */
    uint64_t late_syncs;                       /* lock */
    /* the threads' */
    pthread_t syncing, caring;
    int ending;            /* the syncing thread has ended */
    int64_t sync_us, max_age_us;
    int dir;
    place *places;
    int n_places;
    pid_t owner;
    uint64_t syncs, rolls, waits, longest_sync_us, clock_steps;
    int64_t last_step_us;
};

static int64_t clock_us(clockid_t which) {
    struct timespec t;
    clock_gettime(which, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

uint32_t ps_segment_head_crc(const ps_segment_head *h) {
    return ps_crc32c(ps_crc32c(0, &h->magic, 12), &h->log_id, sizeof *h - offsetof(ps_segment_head, log_id));
}

static uint32_t mark_crc(const ps_segment_mark *m) { return ps_crc32c(0x6d61726b, m, offsetof(ps_segment_mark, crc)); }

static ps_segment_mark *mark_at(char *base, int i) { return (ps_segment_mark *)(base + 1024 * (1 + i)); }

int ps_segment_last_mark(const char *base, ps_segment_mark *out) {
    int found = 0;
    for (int i = 0; i < PS_MARKS; i++) {
        ps_segment_mark m;
        memcpy(&m, mark_at((char *)base, i), sizeof m);
        if (m.turn && mark_crc(&m) == m.crc && (!found || m.turn > out->turn)) {
            *out = m;
            found = 1;
        }
    }
    return found;
}

void ps_segment_put_mark(char *base, uint64_t turn, uint64_t synced, uint64_t end, int64_t last_sequence) {
    ps_segment_mark m = {.turn = turn, .synced = synced, .end = end, .last_sequence = last_sequence};
    m.crc = mark_crc(&m);
    memcpy(mark_at(base, (int)(turn % PS_MARKS)), &m, sizeof m);
}

static void put_mark(segment *s, uint64_t synced, uint64_t end) {
    ps_segment_put_mark(s->base, ++s->turn, synced, end, s->last_sequence);
}

static int halted(const ps_log *L) { return __atomic_load_n(&L->halt, __ATOMIC_ACQUIRE); }

/* The caller holds the lock. Whoever waits is told. */
static void set_halt(ps_log *L) {
    __atomic_store_n(&L->halt, L->error ? L->error : L->gone ? GONE : 0, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&L->done);
}

/* The disk failed: nothing more is taken. */
static void fail(ps_log *L, int error) {
    pthread_mutex_lock(&L->lock);
    if (!L->error) __atomic_store_n(&L->error, error, __ATOMIC_RELEASE);
    set_halt(L);
    pthread_mutex_unlock(&L->lock);
}

static int failed(const ps_log *L) { return __atomic_load_n(&L->error, __ATOMIC_ACQUIRE); }

/* ---- the state, which answers, readiness, metrics and messages all read ------------------------------------------- */

/* Bytes that are not on disk were written after clean_us: how long ago at most, 0 where there are none. */
static int64_t unsynced_us(const ps_log *L, int64_t now) {
    if (__atomic_load_n(&L->synced, __ATOMIC_ACQUIRE) >= __atomic_load_n(&L->position, __ATOMIC_ACQUIRE)) return 0;
    int64_t age = now - __atomic_load_n(&L->clean_us, __ATOMIC_ACQUIRE);
    return age > 0 ? age : 0;
}

static int64_t late_after(const ps_log *L) { return L->sync_us + LATE_US; }

int ps_log_state(const ps_log *L) {
    if (__atomic_load_n(&L->gone, __ATOMIC_ACQUIRE)) return PS_LOG_GONE;
    if (failed(L) || __atomic_load_n(&L->room, __ATOMIC_ACQUIRE)) return PS_LOG_REFUSING;
    if (L->sync_us == PS_SYNC_NEVER) return PS_LOG_OK;
    int64_t now = clock_us(CLOCK_MONOTONIC), late = __atomic_load_n(&L->late_us, __ATOMIC_ACQUIRE);
    /* For a while, so that it can be seen, and is not said again with every sync. */
    if (unsynced_us(L, now) > late_after(L) || (late && now - late < LATE_FOR_US)) return PS_LOG_SLOW;
    return PS_LOG_OK;
}

int ps_log_error(const ps_log *L) {
    int error = failed(L);
    if (error) return error;
    if (__atomic_load_n(&L->gone, __ATOMIC_ACQUIRE)) return GONE;
    return __atomic_load_n(&L->room, __ATOMIC_ACQUIRE);
}

int ps_log_refused(const ps_log *L) { return __atomic_load_n(&L->refused, __ATOMIC_RELAXED); }

static int moved(const place *p) {
    struct stat now;
    if (!stat(p->path, &now)) return now.st_ino != p->inode || now.st_dev != p->device;
    return errno == ENOENT || errno == ENOTDIR || errno == ESTALE || errno == ELOOP;
}

static void set_gone(ps_log *L, int gone) {
    if (gone == __atomic_load_n(&L->gone, __ATOMIC_RELAXED)) return;
    pthread_mutex_lock(&L->lock);
    __atomic_store_n(&L->gone, gone, __ATOMIC_RELEASE);
    set_halt(L);
    pthread_mutex_unlock(&L->lock);
}

static int misplaced(const ps_log *L) {
    for (int i = 0; i < L->n_places; i++)
        if (moved(&L->places[i])) return 1;
    return 0;
}

/* Whether the folder, and the segment in it, is where a next start would look for it. It may come back. */
static void look(ps_log *L, const segment *s) {
    struct stat own;
    set_gone(L, (s->fd >= 0 && !fstat(s->fd, &own) && own.st_nlink == 0) || misplaced(L));
}

void ps_log_look(ps_log *L) {
    if (misplaced(L)) set_gone(L, 1);
}

/* ---- segments -------------------------------------------------------------------------------------------------- */

static void spare_name(const ps_log *L, char *out) { snprintf(out, NAME, "spare-%d", (int)L->owner); }

/* A file of segment_bytes, allocated and mapped. 0 or an errno, and nothing is left behind. */
static int allocate(ps_log *L, const char *name, int *fd, char **base) {
    *fd = openat(L->dir, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (*fd < 0) return errno;
    int error;
    do error = posix_fallocate(*fd, 0, (off_t)L->segment_bytes); /* a signal ends it early */
    while (error == EINTR);
    if (!error) {
        *base = mmap(NULL, L->segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
        /* Else the kernel reads ahead what holds nothing yet: it zeroes megabytes within one fault, 18 ms of a core. */
        if (*base != MAP_FAILED) madvise(*base, L->segment_bytes, MADV_RANDOM);
        if (*base == MAP_FAILED) error = errno;
    }
    if (error) {
        close(*fd);
        *fd = -1;
        unlinkat(L->dir, name, 0);
    }
    return error;
}

static void write_head(ps_log *L, segment *s) {
    ps_segment_head *h = (ps_segment_head *)s->base;
    h->magic = PS_LOG_MAGIC;
    h->format = PS_LOG_FORMAT;
    h->log_id = L->log_id;
    h->number = s->number;
    h->first_sequence = s->first_sequence;
    h->created = clock_us(CLOCK_REALTIME);
    h->capacity = s->capacity;
    h->crc = ps_segment_head_crc(h);
    put_mark(s, PS_SEGMENT_HEAD, 0);
}

static void put_record(ps_log *L, segment *s, ps_record *r, uint32_t bytes) {
    r->crc = ps_record_crc(r, bytes, ps_record_seed(L->log_id, s->number, s->at));
    __atomic_store_n(&r->length, bytes, __ATOMIC_RELEASE);
    s->at += bytes;
}

static ps_record *blank(ps_log *L, segment *s, int kind, int schema) {
    ps_record *r = (ps_record *)(s->base + s->at);
    r->kind = (uint8_t)kind;
    r->outcome = 0;
    r->schema = (uint16_t)schema;
    r->n_fields = 0;
    r->n_versions = 0;
    r->flags = 0;
    r->sequence = L->next_sequence;
    r->ingest_time = 0;
    return r;
}

static void write_prelude(ps_log *L, segment *s) {
    const char *from = L->prelude;
    for (int i = 0; i < L->n_prelude; i++) {
        ps_record *r = blank(L, s, PS_RECORD_SCHEMA, i);
        uint32_t bytes = PS_RECORD_HEAD + ps_pad8(L->prelude_bytes[i]);
        memcpy(r + 1, from, L->prelude_bytes[i]);
        memset((char *)(r + 1) + L->prelude_bytes[i], ' ', ps_pad8(L->prelude_bytes[i]) - L->prelude_bytes[i]);
        from += L->prelude_bytes[i];
        put_record(L, s, r, bytes);
    }
    ps_record *r = blank(L, s, PS_RECORD_MARK, 0);
    int64_t *out = (int64_t *)(r + 1);
    for (int i = 0; i < L->n_marks; i++) out[i] = *L->marks[i];
    put_record(L, s, r, PS_RECORD_HEAD + 8 * (uint32_t)L->n_marks);
}

static uint64_t prelude_size(const ps_log *L) {
    uint64_t bytes = PS_SEGMENT_HEAD + PS_RECORD_HEAD + 8 * (uint64_t)L->n_marks;
    for (int i = 0; i < L->n_prelude; i++) bytes += PS_RECORD_HEAD + ps_pad8(L->prelude_bytes[i]);
    return bytes;
}

/* A spare, made without the lock, which the caller holds; by one thread at a time. 0 or an errno. */
static int make_spare(ps_log *L) {
    while (L->making) pthread_cond_wait(&L->made, &L->lock);
    if (L->spare_fd >= 0) return 0;
    char name[NAME], *base = NULL;
    int fd;
    spare_name(L, name);
    L->making = 1;
    pthread_mutex_unlock(&L->lock);
    int error = allocate(L, name, &fd, &base);
    pthread_mutex_lock(&L->lock);
    L->making = 0;
    L->spare_error = error;
    if (!error) {
        L->spare_fd = fd;
        L->spare_base = base;
        __atomic_store_n(&L->room, 0, __ATOMIC_RELEASE); /* not ready, it would be given nothing to append */
    }
    pthread_cond_broadcast(&L->made);
    return error;
}

static void append(segment **first, segment **last, segment *s) {
    s->next = NULL;
    if (*last) (*last)->next = s;
    else *first = s;
    *last = s;
}

/* To try it would allocate, and give back, what is left of the disk. */
static int no_room(const ps_log *L) {
    struct statvfs disk;
    return !fstatvfs(L->dir, &disk) && (uint64_t)disk.f_bfree * disk.f_frsize < L->segment_bytes;
}

static int full(int error) { return error == ENOSPC || error == EDQUOT || error == EFBIG; }

/* Makes the spare the current segment; makes a spare first where the thread has not. 0 or an errno; on failure nothing
 * has changed. */
static int begin_segment(ps_log *L, uint64_t number) {
    char from[NAME], to[NAME];
    spare_name(L, from);
    int error = 0;
    pthread_mutex_lock(&L->lock);
    if (!L->shell) L->shell = calloc(1, sizeof(segment));
    if (!L->shell) error = ENOMEM;
    else if (L->spare_fd < 0 && L->spare_error == ENOSPC && no_room(L)) error = ENOSPC; /* the thread goes on trying */
    else if (L->spare_fd < 0) {
        L->waits++;
        error = make_spare(L);
    }
    if (!error) {
        snprintf(to, sizeof to, "%012llu.log", (unsigned long long)number);
        segment *s = L->shell;
        memset(s, 0, sizeof *s);
        s->base = L->spare_base;
        s->fd = L->spare_fd;
        s->capacity = L->segment_bytes;
        s->number = number;
        s->first_sequence = L->next_sequence;
        s->last_sequence = L->next_sequence - 1;
        s->at = PS_SEGMENT_HEAD;
        /* The head first: a segment that has its name has its head. */
        write_head(L, s);
        if (renameat(L->dir, from, L->dir, to)) error = errno;
        else {
            L->spare_fd = -1;
            L->shell = NULL;
            L->folder_changed = 1;
            if (L->current) {
                s->before = L->current->before + L->current->at;
                append(&L->sealing, &L->sealing_end, L->current);
                if (L->current->fd >= 0) L->rolls++;
            }
            L->current = s;
            L->stale = 0;
            write_prelude(L, s);
            s->touched = s->at;
            __atomic_store_n(&L->position, s->before + s->at, __ATOMIC_RELEASE);
            __atomic_store_n(&L->used, 0, __ATOMIC_RELEASE);
            __atomic_store_n(&L->roll, 0, __ATOMIC_RELAXED);
        }
    }
    __atomic_store_n(&L->room, error, __ATOMIC_RELEASE);
    __atomic_store_n(&L->hurry, 1, __ATOMIC_RELAXED);
    pthread_cond_signal(&L->wake);
    pthread_cond_signal(&L->care);
    pthread_mutex_unlock(&L->lock);
    return error;
}

/* In the place of a segment where the disk has no room for the first one: the next append tries again. */
static int begin_without(ps_log *L, uint64_t number) {
    segment *s = calloc(1, sizeof *s);
    if (!s) return ENOMEM;
    s->fd = -1;
    s->number = number - 1;
    s->first_sequence = L->next_sequence;
    s->last_sequence = L->next_sequence - 1;
    L->current = s;
    return 0;
}

/* ---- the writer ------------------------------------------------------------------------------------------------ */

static ps_record *refuse(ps_log *L, int error) {
    __atomic_store_n(&L->refused, error, __ATOMIC_RELAXED);
    return NULL;
}

static ps_record *log_reserve(ps_log *L, uint32_t bytes, uint32_t more) {
    segment *s = L->current;
    int halt = halted(L);
    if (__builtin_expect(halt, 0)) return refuse(L, halt);
    if (__builtin_expect(bytes > PS_RECORD_MOST, 0)) return refuse(L, EMSGSIZE);
    int roll = __atomic_load_n(&L->roll, __ATOMIC_RELAXED);
    if (__builtin_expect(roll && !L->used, 0)) {
        __atomic_store_n(&L->roll, roll = 0, __ATOMIC_RELAXED); /* it is new already */
    }
    if (__builtin_expect(s->at + bytes + more > s->capacity || roll || L->stale, 0)) {
        if (prelude_size(L) + bytes + more > L->segment_bytes) return refuse(L, EMSGSIZE);
        int error = begin_segment(L, s->number + 1);
        if (error) return refuse(L, error);
        s = L->current;
    }
    return (ps_record *)(s->base + s->at);
}

static void log_commit(ps_log *L, ps_record *r, uint32_t bytes) {
    segment *s = L->current;
    put_record(L, s, r, bytes);
    if (r->kind == PS_RECORD_EVENT) {
        __atomic_store_n(&s->last_sequence, r->sequence, __ATOMIC_RELAXED);
        L->next_sequence = r->sequence + 1;
    }
    if (__builtin_expect(!L->used, 0)) {
        __atomic_store_n(&L->opened_us, clock_us(CLOCK_MONOTONIC), __ATOMIC_RELAXED);
        __atomic_store_n(&L->used, 1, __ATOMIC_RELEASE);
    }
    if (__builtin_expect(__atomic_load_n(&L->room, __ATOMIC_RELAXED), 0)) __atomic_store_n(&L->room, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&L->position, s->before + s->at, __ATOMIC_RELEASE);
}

static uint64_t log_position(const ps_log *L) { return __atomic_load_n(&L->position, __ATOMIC_ACQUIRE); }

int ps_log_begin(ps_log *L) { return L->used ? begin_segment(L, L->current->number + 1) : 0; }

/* Copies of the bodies, one after the other, and of their sizes. 0 or ENOMEM. */
static int copy_prelude(const char *const *prelude, const uint32_t *prelude_bytes, int n, char **bodies, uint32_t **sizes) {
    uint64_t total = 0;
    for (int i = 0; i < n; i++) total += prelude_bytes[i];
    *bodies = malloc(total + 1);
    *sizes = calloc((size_t)n + 1, 4);
    if (!*bodies || !*sizes) {
        free(*bodies);
        free(*sizes);
        *bodies = NULL;
        *sizes = NULL;
        return ENOMEM;
    }
    char *to = *bodies;
    for (int i = 0; i < n; i++) {
        memcpy(to, prelude[i], prelude_bytes[i]);
        to += prelude_bytes[i];
        (*sizes)[i] = prelude_bytes[i];
    }
    return 0;
}

int ps_log_set_prelude(ps_log *L, const char *const *prelude, const uint32_t *prelude_bytes, int n_prelude) {
    char *old_bodies = L->prelude;
    uint32_t *old_sizes = L->prelude_bytes;
    int old_n = L->n_prelude;
    int error = copy_prelude(prelude, prelude_bytes, n_prelude, &L->prelude, &L->prelude_bytes);
    L->n_prelude = n_prelude;
    if (!error && prelude_size(L) + 4096 > L->segment_bytes) {
        free(L->prelude);
        free(L->prelude_bytes);
        error = EMSGSIZE;
    }
    if (error) {
        L->prelude = old_bodies;
        L->prelude_bytes = old_sizes;
        L->n_prelude = old_n;
        return error;
    }
    free(old_bodies);
    free(old_sizes);
    L->stale = 1;
    return 0;
}

int ps_log_has_spare(ps_log *L) {
    pthread_mutex_lock(&L->lock);
    int has = L->spare_fd >= 0;
    pthread_mutex_unlock(&L->lock);
    return has;
}

void ps_log_roll(ps_log *L) { __atomic_store_n(&L->roll, 1, __ATOMIC_RELAXED); }

int ps_log_wait(ps_log *L, uint64_t position) {
    if (__atomic_load_n(&L->synced, __ATOMIC_ACQUIRE) >= position) return 0;
    pthread_mutex_lock(&L->lock);
    if (L->wanted < position) L->wanted = position;
    pthread_cond_signal(&L->wake);
    while (!halted(L) && !L->stopped && __atomic_load_n(&L->synced, __ATOMIC_ACQUIRE) < position)
        pthread_cond_wait(&L->done, &L->lock);
    pthread_mutex_unlock(&L->lock);
    if (__atomic_load_n(&L->synced, __ATOMIC_ACQUIRE) >= position) return 0;
    int halt = halted(L);
    return halt ? halt : ECANCELED;
}

/* ---- the thread that syncs ------------------------------------------------------------------------------------- */

/* What of a segment is not on disk yet, up to `at`. Not fdatasync: that would write, and make read-only, the pages that
 * are ready ahead of the writer. 0 or an errno. */
static int sync_segment(ps_log *L, segment *s, uint64_t at) {
    if (at <= s->synced) return 0;
    uint64_t from = s->synced & ~(uint64_t)4095;
    if (from && s->turn != s->turn_written) { /* the marks: that they get there is enough */
        sync_file_range(s->fd, 0, 4096, SYNC_FILE_RANGE_WRITE);
        s->turn_written = s->turn;
    }
    int error;
    do error = msync(s->base + from, at - from, MS_SYNC) ? errno : 0;
    while (error == EINTR);
    if (error) fail(L, error);
    else s->synced = at;
    return error;
}

/* The mark may lag: behind it a hole is taken for a power cut's, and what was synced has none. */
static void mark_synced(segment *s, int64_t now) {
    if (s->marked == s->synced || now - s->marked_us < MARK_US) return;
    s->marked = s->synced;
    s->marked_us = now;
    put_mark(s, s->synced, 0);
}

/* Syncs what is full, then the current segment up to a position, which was read at or after `began`. */
static void sync_all(ps_log *L, segment *sealing, segment *s, uint64_t at, uint64_t position, int64_t began,
                     int folder_changed) {
    /* Whatever the policy, a sealed segment is on disk: recovery does not look for holes in it. */
    while (sealing) {
        segment *next = sealing->next;
        sync_segment(L, sealing, sealing->at);
        pthread_mutex_lock(&L->lock);
        append(&L->cutting, &L->cutting_end, sealing);
        __atomic_store_n(&L->hurry, 1, __ATOMIC_RELAXED);
        pthread_cond_signal(&L->care);
        pthread_mutex_unlock(&L->lock);
        sealing = next;
    }
    if (position <= L->synced) return;
    if (sync_segment(L, s, at)) return;
    if (folder_changed && fsync(L->dir)) fail(L, errno);
    look(L, s); /* what is on a disk where nobody will find it is not kept */
    if (halted(L)) return;
    mark_synced(s, began);
    int64_t now = clock_us(CLOCK_MONOTONIC), took = now - began, age = unsynced_us(L, now);
    pthread_mutex_lock(&L->lock);
    if ((uint64_t)took > L->longest_sync_us) L->longest_sync_us = (uint64_t)took;
    if (L->sync_us != PS_SYNC_NEVER) {
        if (age > L->longest_unsynced_us) L->longest_unsynced_us = age;
        if (age > late_after(L)) {
            L->late_syncs++;
            L->last_late_us = age;
            __atomic_store_n(&L->late_us, now, __ATOMIC_RELEASE);
        }
    }
    L->syncs++;
    if (folder_changed && L->current == s) L->folder_changed = 0; /* a roll meanwhile has set it again */
    __atomic_store_n(&L->synced, position, __ATOMIC_RELEASE);
    __atomic_store_n(&L->clean_us, began, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&L->done);
    pthread_cond_signal(&L->care);
    pthread_mutex_unlock(&L->lock);
}

/* The promise is one of milliseconds: the thread is not nice, and asks for short slices, for which it is given the core
 * sooner (Linux 6.12). SCHED_BATCH: when it wakes it does not push the writer off the core, but is the next. */
static void be_prompt(int policy) {
    struct { /* sched_setattr(2) */
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } ask = {.size = sizeof ask, .policy = (uint32_t)policy, .runtime = 100000};
    ask.nice = getpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid));
    if (syscall(SYS_sched_setattr, 0, &ask, 0)) {
        struct sched_param none = {0};
        pthread_setschedparam(pthread_self(), policy, &none);
    }
}

static struct timespec time_of(int64_t us) { return (struct timespec){us / 1000000, (us % 1000000) * 1000}; }

static void *keep_synced(void *argument) {
    ps_log *L = argument;
    int64_t next_look = 0, next_sync = L->sync_us > 0 ? 0 : INT64_MAX; /* however long the sync before took */
    be_prompt(L->sync_us == PS_SYNC_ALWAYS ? SCHED_OTHER : SCHED_BATCH);
    for (;;) {
        pthread_mutex_lock(&L->lock);
        if (!L->stop && !(L->wanted > L->synced && !halted(L)) && !L->sealing) {
            struct timespec until = time_of(next_look < next_sync ? next_look : next_sync);
            pthread_cond_timedwait(&L->wake, &L->lock, &until);
        }
        int stop = L->stop, folder_changed = L->folder_changed;
        int wanted = L->wanted > L->synced && !halted(L);
        segment *s = L->current, *sealing = L->sealing;
        L->sealing = L->sealing_end = NULL;
        int64_t now = clock_us(CLOCK_MONOTONIC);
        uint64_t position = __atomic_load_n(&L->position, __ATOMIC_ACQUIRE);
        uint64_t at = position - s->before;
        if (position <= L->synced) __atomic_store_n(&L->clean_us, now, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&L->lock);

        if (now >= next_look) {
            next_look = now + LOOK_US;
            look(L, s);
            if (!halted(L)) mark_synced(s, now); /* of a log that is idle now: the keeper goes by it */
        }
        if (stop || wanted || now >= next_sync) {
            if (L->sync_us > 0) next_sync = now + L->sync_us;
            /* Closing syncs whatever the policy: what is sealed is on disk. */
            sync_all(L, sealing, s, at, position, now, folder_changed);
        } else if (sealing) sync_all(L, sealing, s, at, 0, now, 0);
        if (stop) {
            pthread_mutex_lock(&L->lock);
            L->stopped = 1;
            pthread_cond_broadcast(&L->done);
            pthread_mutex_unlock(&L->lock);
            return NULL;
        }
    }
}

/* ---- the thread that takes care of the rest -------------------------------------------------------------------- */

/* Makes pages ready for writing, by a write that changes nothing, whoever else writes there; ends early where something
 * better is to be done. Not by MADV_POPULATE_WRITE: that holds the map of the process's memory, for which the engine
 * waits when its state grows; a fault does not. Returns how far it came. */
static uint64_t touch(const ps_log *L, char *base, uint64_t from, uint64_t to) {
    for (; from < to; from += 4096) {
        if (__atomic_load_n(&L->hurry, __ATOMIC_RELAXED)) return from;
        __asm__ volatile("lock; orb $0, %0" : "+m"(base[from]) : : "cc");
        /* A fault of a new page takes up to 20 us, and on a core that is shared the writer does not come before the next
         * tick of the scheduler, however nice this thread is: 19 ms at a time were measured for 4 MB. */
        if (!(from & (4 * 4096 - 1))) sched_yield();
    }
    return to;
}

/* In pieces: others that map or unmap memory meanwhile do not wait for all of it. */
static void let_go(char *base, uint64_t bytes) {
    while (bytes) {
        uint64_t piece = bytes % PIECE ? bytes % PIECE : PIECE;
        bytes -= piece;
        munmap(base + bytes, piece);
        sched_yield();
    }
}

/* Cuts a segment that is on disk to its length, and closes it. */
static void cut(ps_log *L, segment *s) {
    if (s->fd >= 0) {
        if (s->synced >= s->at) {
            put_mark(s, s->at, s->at);
            if (ftruncate(s->fd, (off_t)s->at) || fdatasync(s->fd)) fail(L, errno);
        }
        let_go(s->base, s->capacity);
        /* Its pages back to the system: the next segments take them again, warm, and the cache holds what is read. */
        for (uint64_t at = 0; at < s->at; at += PIECE) {
            posix_fadvise(s->fd, (off_t)at, PIECE, POSIX_FADV_DONTNEED);
            sched_yield();
        }
        close(s->fd);
    }
    free(s);
}

/* What was written is read-only after a sync until it is touched again, and with it what shares a large page of the
 * cache; then what lies ahead of the writer. */
static void touch_ahead(const ps_log *L, segment *s, uint64_t at, int synced) {
    if (s->fd < 0) return;
    uint64_t page = at & ~(uint64_t)4095, to = page + PIECE < s->touched ? page + PIECE : s->touched;
    if (synced && page < to && touch(L, s->base, page, to) < to) return;
    to = at + AHEAD < s->capacity ? at + AHEAD : s->capacity;
    uint64_t from = (s->touched > at ? s->touched : at) & ~(uint64_t)4095;
    if (to < from + AHEAD / 4 && to < s->capacity) return;
    s->touched = touch(L, s->base, from, to);
}

/* A next segment could not get its name: whether it could now. */
static void try_names(ps_log *L) {
    char from[NAME], to[NAME + 8];
    spare_name(L, from);
    snprintf(to, sizeof to, "%s.tried", from);
    pthread_mutex_lock(&L->lock);
    if (L->spare_fd >= 0 && !renameat(L->dir, from, L->dir, to) && !renameat(L->dir, to, L->dir, from))
        __atomic_store_n(&L->room, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&L->lock);
}

static void *take_care(void *argument) {
    ps_log *L = argument;
    int64_t drift = clock_us(CLOCK_REALTIME) - clock_us(CLOCK_MONOTONIC), last_try = 0, next_tick = 0;
    uint64_t syncs = 0;
    /* On a core that it shares with the writer it is preempted as soon as the writer has work, and when it wakes it does
     * not push the writer off the core. */
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), NICE);
    struct sched_param none = {0};
    pthread_setschedparam(pthread_self(), SCHED_BATCH, &none);
    for (;;) {
        pthread_mutex_lock(&L->lock);
        if (!L->ending && !L->cutting && L->syncs == syncs) {
            struct timespec until = time_of(next_tick);
            pthread_cond_timedwait(&L->care, &L->lock, &until);
        }
        int ending = L->ending, stop = L->stop, synced = L->syncs != syncs;
        syncs = L->syncs;
        segment *s = L->current, *cutting = L->cutting;
        L->cutting = L->cutting_end = NULL;
        __atomic_store_n(&L->hurry, stop, __ATOMIC_RELAXED);
        uint64_t at = __atomic_load_n(&L->position, __ATOMIC_ACQUIRE) - s->before;
        int need_spare = L->spare_fd < 0;
        if (!L->shell) L->shell = calloc(1, sizeof(segment));
        pthread_mutex_unlock(&L->lock);

        int64_t now = clock_us(CLOCK_MONOTONIC);
        if (now >= next_tick) next_tick = now + TICK_US;
        while (cutting) {
            segment *next = cutting->next;
            cut(L, cutting);
            cutting = next;
        }
        if (ending) return NULL;
        if (stop) {
            next_tick = now + TICK_US; /* until the other thread has synced */
            continue;
        }
        /* Only this thread unmaps a segment, so that it is there although the writer may have left it. */
        if (need_spare && !halted(L) && (!L->spare_error || now - last_try >= RETRY_US)) {
            last_try = now;
            pthread_mutex_lock(&L->lock);
            char *base = make_spare(L) ? NULL : L->spare_base;
            pthread_mutex_unlock(&L->lock);
            if (base) touch(L, base, 0, AHEAD / 4 < L->segment_bytes ? AHEAD / 4 : L->segment_bytes);
        } else if (!need_spare && __atomic_load_n(&L->room, __ATOMIC_ACQUIRE) && now - last_try >= RETRY_US) {
            last_try = now;
            try_names(L);
        }
        touch_ahead(L, s, at, synced);
        if (L->max_age_us > 0 && __atomic_load_n(&L->used, __ATOMIC_ACQUIRE)
            && now - __atomic_load_n(&L->opened_us, __ATOMIC_RELAXED) > L->max_age_us)
            ps_log_roll(L);
        int64_t now_drift = clock_us(CLOCK_REALTIME) - clock_us(CLOCK_MONOTONIC);
        if (now_drift - drift > STEP_US || drift - now_drift > STEP_US) {
            pthread_mutex_lock(&L->lock);
            L->last_step_us = now_drift - drift;
            L->clock_steps++;
            pthread_mutex_unlock(&L->lock);
        }
        drift = now_drift;
    }
}

/* ---- life of a log --------------------------------------------------------------------------------------------- */

static void free_log(ps_log *L) {
    if (L->spare_fd >= 0) {
        munmap(L->spare_base, L->segment_bytes);
        close(L->spare_fd);
    }
    if (L->dir >= 0) close(L->dir);
    for (int i = 0; i < L->n_places; i++) free(L->places[i].path);
    free(L->places);
    free(L->shell);
    free(L->prelude);
    free(L->prelude_bytes);
    free(L->marks);
    free(L);
}

static int remember(ps_log *L, const char *const *watched, int n) {
    L->places = calloc((size_t)n + 1, sizeof *L->places);
    if (!L->places) return ENOMEM;
    for (int i = 0; i < n; i++) {
        struct stat now;
        if (stat(watched[i], &now)) return errno;
        L->places[i] = (place){strdup(watched[i]), now.st_dev, now.st_ino};
        if (!L->places[i].path) return ENOMEM;
        L->n_places = i + 1;
    }
    return 0;
}

/* Signals are for the process's own threads. */
static int start_threads(ps_log *L) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&L->syncing, NULL, keep_synced, L);
    if (!error && (error = pthread_create(&L->caring, NULL, take_care, L))) {
        pthread_mutex_lock(&L->lock);
        L->stop = 1;
        pthread_cond_signal(&L->wake);
        pthread_mutex_unlock(&L->lock);
        pthread_join(L->syncing, NULL);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

ps_log *ps_log_open(const char *folder, const char *const *watched, int n_watched, uint64_t log_id, uint64_t number,
                    int64_t next_sequence, uint64_t segment_bytes, int64_t sync_us, int64_t max_age_us,
                    const char *const *prelude, const uint32_t *prelude_bytes, int n_prelude, int64_t *const *marks,
                    int n_marks, int *error) {
    ps_log *L = calloc(1, sizeof *L);
    if (!L) {
        *error = ENOMEM;
        return NULL;
    }
    L->spare_fd = -1;
    L->owner = getpid();
    L->log_id = log_id;
    L->next_sequence = next_sequence;
    L->segment_bytes = (segment_bytes + 4095) & ~(uint64_t)4095;
    L->sync_us = sync_us;
    L->max_age_us = max_age_us;
    L->clean_us = clock_us(CLOCK_MONOTONIC);
    *error = copy_prelude(prelude, prelude_bytes, n_prelude, &L->prelude, &L->prelude_bytes);
    L->marks = calloc((size_t)n_marks + 1, sizeof *L->marks);
    L->dir = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (!*error && !L->marks) *error = ENOMEM;
    else if (!*error && L->dir < 0) *error = errno;
    if (!*error) *error = remember(L, watched, n_watched);
    if (*error) {
        free_log(L);
        return NULL;
    }
    for (int i = 0; i < n_marks; i++) L->marks[i] = marks[i];
    L->n_prelude = n_prelude;
    L->n_marks = n_marks;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&L->lock, NULL);
    pthread_cond_init(&L->wake, &monotonic);
    pthread_cond_init(&L->care, &monotonic);
    pthread_cond_init(&L->done, NULL);
    pthread_cond_init(&L->made, NULL);
    pthread_condattr_destroy(&monotonic);
    if (prelude_size(L) + 4096 > L->segment_bytes) *error = EMSGSIZE;
    else *error = begin_segment(L, number);
    if (full(*error) && next_sequence > 0) *error = begin_without(L, number); /* there is something to read */
    if (!*error && fsync(L->dir)) *error = errno;
    if (!*error) *error = start_threads(L);
    if (*error) {
        char spare[NAME];
        spare_name(L, spare);
        unlinkat(L->dir, spare, 0);
        if (L->current && L->current->fd >= 0) {
            char name[NAME];
            snprintf(name, sizeof name, "%012llu.log", (unsigned long long)number);
            unlinkat(L->dir, name, 0);
            munmap(L->current->base, L->current->capacity);
            close(L->current->fd);
        }
        free(L->current);
        free_log(L);
        return NULL;
    }
    return L;
}

void ps_log_stop(ps_log *L) {
    pthread_mutex_lock(&L->lock);
    L->stop = 1;
    __atomic_store_n(&L->hurry, 1, __ATOMIC_RELAXED);
    pthread_cond_signal(&L->wake);
    pthread_mutex_unlock(&L->lock);
    pthread_join(L->syncing, NULL);
    pthread_mutex_lock(&L->lock);
    L->ending = 1;
    pthread_cond_signal(&L->care);
    pthread_mutex_unlock(&L->lock);
    pthread_join(L->caring, NULL);
}

int ps_log_free(ps_log *L) {
    char name[NAME];
    segment *s = L->current;
    if (L->used || s->fd < 0) {
        sync_segment(L, s, s->at);
        cut(L, s);
    } else {
        snprintf(name, sizeof name, "%012llu.log", (unsigned long long)s->number);
        unlinkat(L->dir, name, 0);
        let_go(s->base, s->capacity);
        close(s->fd);
        free(s);
    }
    if (L->spare_fd >= 0) {
        spare_name(L, name);
        unlinkat(L->dir, name, 0);
    }
    if (fsync(L->dir)) fail(L, errno);
    int error = failed(L);
    pthread_mutex_destroy(&L->lock);
    pthread_cond_destroy(&L->wake);
    pthread_cond_destroy(&L->care);
    pthread_cond_destroy(&L->done);
    pthread_cond_destroy(&L->made);
    free_log(L);
    return error;
}

static void abandon(segment *s) {
    while (s) {
        segment *next = s->next;
        if (s->fd >= 0) {
            munmap(s->base, s->capacity);
            close(s->fd);
        }
        free(s);
        s = next;
    }
}

void ps_log_abandon(ps_log *L) {
    if (!L) return;
    abandon(L->sealing);
    abandon(L->cutting);
    abandon(L->current);
    free_log(L);
}

void ps_log_get_stats(ps_log *L, ps_log_stats *out) {
    pthread_mutex_lock(&L->lock);
    int64_t age = unsynced_us(L, clock_us(CLOCK_MONOTONIC));
    *out = (ps_log_stats){.position = L->position, .synced = L->synced, .segments = L->rolls + (L->current->fd >= 0),
                          .number = L->current->number, .syncs = L->syncs, .rolls = L->rolls, .waits = L->waits,
                          .longest_sync_us = L->longest_sync_us, .clock_steps = L->clock_steps,
                          .last_step_us = L->last_step_us, .state = ps_log_state(L), .error = ps_log_error(L),
                          .spare_error = L->spare_error, .unsynced_us = age,
                          .longest_unsynced_us = age > L->longest_unsynced_us && L->sync_us != PS_SYNC_NEVER
                              ? age : L->longest_unsynced_us,
                          .late_syncs = L->late_syncs, .last_late_us = L->last_late_us};
    pthread_mutex_unlock(&L->lock);
}

static const ps_log_api api = {log_reserve, log_commit, log_position};

const ps_log_api *ps_log_get_api(void) { return &api; }
