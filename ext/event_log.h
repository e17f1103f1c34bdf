/* event_log.h (hot path): writing the event log; the C interface that the engine core calls.
 *
 * A ps_log appends records (event_record.h) to memory-mapped, preallocated segment files of one folder. One thread at a
 * time writes (the engine holds its lock); of the log's own two threads one syncs and looks after the folder, the other
 * touches pages ahead of the writer, prepares the next segment, seals full ones and watches the clock. What must stay
 * true: a record is in the page cache before append returns, so killing the process loses nothing; where the disk has no
 * room, or the folder is gone, append says so and has changed nothing; and what the log tells of itself is one state.
 *
 * Words. position: bytes ever written, over all segments; synced: the position up to which a power cut loses nothing.
 * spare: the next segment, allocated before it is needed. sealed: a segment that is full, synced and cut to its length.
 */
#ifndef PENSTOCK_EVENT_LOG_H
#define PENSTOCK_EVENT_LOG_H

#include "event_record.h"

enum { PS_LOG_FORMAT = 1, PS_SEGMENT_HEAD = 4096, PS_MARKS = 2, PS_LOG_MAX_SOURCES = 64 };
#define PS_LOG_MAGIC 0x31474f4c4e4550ULL /* "PENLOG1" */
#define PS_SYNC_ALWAYS 0
#define PS_SYNC_NEVER (-1)

typedef struct { /* the first bytes of a segment; written once, but for the marks */
    uint64_t magic;
    uint32_t format, crc; /* crc: of the fields from log_id on, up to the marks */
    uint64_t log_id, number;
    int64_t first_sequence, created;
    uint64_t capacity;
} ps_segment_head;

typedef struct { /* two, written in turn, so that one of them is always whole; at offsets 1024 and 2048 */
    uint64_t turn;
    uint64_t synced; /* offset up to which records are on disk */
    uint64_t end;    /* sealed: offset behind the last record; else 0 */
    int64_t last_sequence;
    uint32_t crc, pad;
} ps_segment_mark;

/* ok; slow: what was appended is on disk much later than the policy says; refusing: the disk failed, or has no room for
 * the next segment; gone: the folder, or the segment in it, was removed or replaced. Only in the last two nothing is
 * appended. From no room, and from a folder that comes back, the log recovers by itself. */
enum { PS_LOG_OK, PS_LOG_SLOW, PS_LOG_REFUSING, PS_LOG_GONE };

typedef struct ps_log ps_log;

typedef struct {
    uint64_t position, synced; /* bytes */
    uint64_t segments;         /* made since open */
    uint64_t number;           /* of the segment that is written */
    uint64_t syncs, rolls, waits;  /* waits: rolls that found no spare */
    uint64_t longest_sync_us;
    uint64_t clock_steps;
    int64_t last_step_us;
    int state;
    int error;                 /* why the log is refusing or gone; 0 otherwise */
    int spare_error;           /* why there is no next segment yet: appends go on while the current one has room */
    int64_t unsynced_us;       /* age, at most, of the oldest byte that is not on disk; 0: there is none */
    int64_t longest_unsynced_us;
    uint64_t late_syncs;       /* syncs that came half a second later than the policy says, or more */
    int64_t last_late_us;      /* the age of what the last of them brought to the disk */
} ps_log_stats;

typedef struct {
    /* Where a record of `bytes` may be written, with `more` bytes of room behind it in the same segment, so that a record
     * that follows cannot fail; NULL: it is not (ps_log_refused). Nothing is in the log before commit. */
    ps_record *(*reserve)(ps_log *, uint32_t bytes, uint32_t more);
    /* The record filled in at the place that reserve gave, all but crc and length, is in the log. */
    void (*commit)(ps_log *, ps_record *, uint32_t bytes);
    uint64_t (*position)(const ps_log *);
} ps_log_api;

const ps_log_api *ps_log_get_api(void);
/* Opens the folder for writing behind what is there: a new segment `number` is made; where the disk has no room for it,
 * and the log holds events already, appends are refused until there is. watched: paths that must go on naming what they name now. `prelude` holds n_prelude records'
 * bodies (schema numbers 0, 1, ...), written at the start of every segment; marks: where the watermarks stand.
 * NULL and *error (an errno) on failure. */
ps_log *ps_log_open(const char *folder, const char *const *watched, int n_watched, uint64_t log_id, uint64_t number,
                    int64_t next_sequence, uint64_t segment_bytes, int64_t sync_us, int64_t max_age_us,
                    const char *const *prelude, const uint32_t *prelude_bytes, int n_prelude, int64_t *const *marks,
                    int n_marks, int *error);
/* Closing, in two steps: stop syncs, ends the threads, and lets everybody out of ps_log_wait; free, called when nobody is
 * left in there, seals the current segment, or removes it where it holds nothing, and frees the log: 0 or an errno. */
void ps_log_stop(ps_log *);
int ps_log_free(ps_log *);
/* In a child process after a fork: lets go of the parent's log without touching its files. */
void ps_log_abandon(ps_log *);
int ps_log_state(const ps_log *);
/* Looks at the folder now; the log does it itself twenty times a second, and before it says that something is on disk. */
void ps_log_look(ps_log *);
/* Why the log is refusing or gone: an errno, 0 where it is neither; why the last reserve gave NULL. */
int ps_log_error(const ps_log *);
int ps_log_refused(const ps_log *);
/* Waits until everything up to a position is on disk, asking for it. 0 or an errno. */
int ps_log_wait(ps_log *, uint64_t position);
/* Begins a new segment now, unless the current one is new; the writer's to call. 0 or an errno. */
int ps_log_begin(ps_log *);
/* Other schemas from now on: the next append begins a new segment, which has them. The writer's to call. 0 or an errno,
 * and then nothing has changed. */
int ps_log_set_prelude(ps_log *, const char *const *prelude, const uint32_t *prelude_bytes, int n_prelude);
/* Whether a new segment can be begun without waiting for its file. */
int ps_log_has_spare(ps_log *);
/* The next append begins a new segment. */
void ps_log_roll(ps_log *);
void ps_log_get_stats(ps_log *, ps_log_stats *);
/* The newest whole mark of a segment's header; 0 where none is. */
int ps_segment_last_mark(const char *base, ps_segment_mark *out);
void ps_segment_put_mark(char *base, uint64_t turn, uint64_t synced, uint64_t end, int64_t last_sequence);
uint32_t ps_segment_head_crc(const ps_segment_head *);

#endif
