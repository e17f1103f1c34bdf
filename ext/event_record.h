/* event_record.h (hot path): the records of the event log, as they lie in a segment; writing and checking one.
 *
 * A segment is a file: one page of header (event_log.h), then records, each on a multiple of 8 bytes, then zeros. A record
 * is a head of 32 bytes and a body. Its CRC32C covers all bytes behind the CRC, and starts from a seed made of the log's
 * id, the segment's number and the record's offset: a record that is not in its own place does not check. A checksum is no
 * signature: what a record holds is compared with its schema too (ps_record_misfit). What must stay true: nothing is read
 * from a record that was not checked, every reader of events and scores checks with ps_record_read, and a record that is
 * written is never changed.
 *
 * All integers are little endian. Bodies:
 *   SCHEMA  JSON: what the event or score records of this segment with its `schema` number hold.
 *   MARK    int64 per event type in the order of the schemas: the watermark where the segment begins.
 *   EVENT   u64 versions[n_versions] (what each touched entity got; none where the event was not applied),
 *           8-byte slots[n_fields], u8 status[n_fields] padded to 8, string bytes padded to 8.
 *   SCORE   ps_score, u64 versions[n_versions] (of what was read), slots, status and strings as above.
 * A string slot is offset and length within the record's own string bytes.
 */
#ifndef PENSTOCK_EVENT_RECORD_H
#define PENSTOCK_EVENT_RECORD_H

#include <string.h>

#include "crc32c.h"
#include "row.h"

/* Outcomes that readers must know; all of them are in decision.pxd. */
enum { PS_OUTCOME_OFF = 0, PS_OUTCOME_APPLIED = 1, PS_LAST_OUTCOME = 4 };
enum { PS_RECORD_SCHEMA = 1, PS_RECORD_MARK = 2, PS_RECORD_EVENT = 3, PS_RECORD_SCORE = 4, PS_N_RECORD_KINDS = 5 };

typedef struct {
    uint32_t crc;
    uint32_t length; /* of the whole record, a multiple of 8; written last: 0 is the end of what was written */
    uint8_t kind;
    uint8_t outcome; /* of an event: applied, late, quarantined, duplicate (decision.pxd) */
    uint16_t schema;
    uint16_t n_fields;
    uint8_t n_versions;
    uint8_t flags;
    int64_t sequence; /* of the event; a score has that of the event it is about */
    int64_t ingest_time;
} ps_record;

typedef struct {
    char id[26];
    int16_t action;
    int16_t model;  /* -1: none decided */
    int16_t failed; /* -1: nothing failed */
    double score;
    uint64_t fired;
    int64_t as_of;
    int8_t arms[8];
    uint8_t has_score;
    uint8_t outcome;
    uint8_t pad[6];
} ps_score;

/* Status of a key that was erased on request: the slot holds a random key (flag beside the status). */
#define PS_ERASED 0x20

#define PS_RECORD_HEAD ((uint32_t)sizeof(ps_record))
#define PS_RECORD_MOST ((uint32_t)8 << 20)

static inline uint32_t ps_pad8(uint32_t n) { return (n + 7) & ~7u; }

static inline uint32_t ps_record_seed(uint64_t log_id, uint64_t segment, uint64_t offset) {
    uint64_t x = (log_id ^ segment * 0x9e3779b97f4a7c15ULL) + offset * 0xd6e8feb86659fd93ULL;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ULL;
    return (uint32_t)(x >> 32);
}

static inline uint32_t ps_record_crc(const ps_record *r, uint32_t length, uint32_t seed) {
    /* The length stands in the sum by value: it is stored last. */
    uint32_t crc = ps_crc32c(seed, &length, 4);
    return ps_crc32c(crc, (const char *)r + 8, length - 8);
}

/* The record at an offset of a segment of `size` bytes: its length where it checks, 0 where none was finished, -1 where it
 * is damaged. */
static inline int64_t ps_record_check(const char *base, uint64_t size, uint64_t offset, uint64_t log_id, uint64_t segment) {
    if (offset + PS_RECORD_HEAD > size) return offset < size ? -1 : 0;
    const ps_record *r = (const ps_record *)(base + offset);
    uint32_t length = __atomic_load_n(&r->length, __ATOMIC_ACQUIRE);
    if (!length) return 0;
    if (length < PS_RECORD_HEAD || (length & 7) || length > PS_RECORD_MOST || length > size - offset) return -1;
    if (!r->kind || r->kind >= PS_N_RECORD_KINDS) return -1;
    if (ps_record_crc(r, length, ps_record_seed(log_id, segment, offset)) != r->crc) return -1;
    return length;
}

/* The next offset at or behind `offset` where a record checks, or `size`: what lies between is damaged or was never
 * written. */
static inline uint64_t ps_record_resync(const char *base, uint64_t size, uint64_t offset, uint64_t log_id, uint64_t segment) {
    for (offset = (offset + 7) & ~(uint64_t)7; offset + PS_RECORD_HEAD <= size; offset += 8)
        if (*(const uint64_t *)(base + offset) && ps_record_check(base, size, offset, log_id, segment) > 0) return offset;
    return size;
}

/* Where the parts of an event's or score's body are. */
static inline const uint64_t *ps_record_versions(const ps_record *r) {
    return (const uint64_t *)((const char *)(r + 1) + (r->kind == PS_RECORD_SCORE ? sizeof(ps_score) : 0));
}
static inline const ps_slot *ps_record_slots(const ps_record *r) {
    return (const ps_slot *)(ps_record_versions(r) + r->n_versions);
}
static inline const uint8_t *ps_record_status(const ps_record *r) {
    return (const uint8_t *)(ps_record_slots(r) + r->n_fields);
}
static inline const char *ps_record_strings(const ps_record *r) {
    return (const char *)ps_record_status(r) + ps_pad8(r->n_fields);
}
/* Bytes of the parts before the strings. */
static inline uint32_t ps_record_fixed(int is_score, uint32_t n_versions, uint32_t n_fields) {
    return PS_RECORD_HEAD + (is_score ? (uint32_t)sizeof(ps_score) : 0) + 8 * n_versions + 8 * n_fields + ps_pad8(n_fields);
}

/* ---- what a record must be like to be of its schema */

/* Whether bytes are UTF-8 as RFC 3629 has it: no overlong forms, no surrogates. */
static inline int ps_is_utf8(const char *text, uint64_t n) {
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    while (p < end) {
        uint64_t word;
        if (end - p >= 8) {
            memcpy(&word, p, 8);
            if (!(word & 0x8080808080808080ULL)) {
                p += 8;
                continue;
            }
        }
        uint8_t c = p[0];
        int more = c < 0x80 ? 0 : c < 0xc2 ? -1 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : c < 0xf5 ? 3 : -1;
        if (more < 0 || end - p <= more) return 0;
        for (int i = 1; i <= more; i++)
            if ((p[i] & 0xc0) != 0x80) return 0;
        if ((c == 0xe0 && p[1] < 0xa0) || (c == 0xed && p[1] >= 0xa0) || (c == 0xf0 && p[1] < 0x90) || (c == 0xf4 && p[1] >= 0x90))
            return 0;
        p += more + 1;
    }
    return 1;
}

enum { PS_RECORD_MISFIT = -2, PS_MOST_EXPERIMENTS = sizeof(((ps_score *)0)->arms) };

enum { PS_REQUIRED = 1, PS_REQUIRED_TIME = 2 }; /* the event's time: within -2^61..2^61 microseconds */

/* One schema of a segment, as a reader wants it. */
typedef struct {
    uint8_t is_score;
    uint8_t n_versions; /* of an event that was applied (the others have none); of a score */
    uint16_t n_fields;
    const uint8_t *types;    /* ps_type per field */
    const uint8_t *required; /* per field of an event: PS_REQUIRED, PS_REQUIRED_TIME, or 0 where it can be null */
    const uint16_t *checked; /* the fields of which some present values are none: texts; of an event bools and its time */
    uint16_t n_checked;
    uint16_t n_actions, n_models, n_failures;
    uint8_t n_reasons, n_experiments;
    uint8_t n_arms[PS_MOST_EXPERIMENTS];
} ps_record_schema;

/* All schemas of a segment, by number; its schemas and its mark lie before the offset `prelude`. */
typedef struct {
    const ps_record_schema *all;
    int n;
    uint64_t prelude;
} ps_record_schemas;

static inline const char *ps_score_misfit(const ps_record *r, const ps_score *score, const ps_record_schema *s) {
    for (int i = 0; i < (int)sizeof score->id; i++)
        if (score->id[i] < '0' || score->id[i] > 'Z') return "its id is none";
    if (score->outcome != r->outcome) return "it has two outcomes";
    if (score->has_score > 1) return "whether it has a score is neither yes nor no";
    if (score->action < 0 || score->action >= s->n_actions) return "its action is none of the schema's";
    if (score->model < -1 || score->model >= s->n_models) return "its model is none of the schema's";
    if (score->failed < -1 || score->failed >= s->n_failures) return "what failed is none of the schema's failures";
    if (s->n_reasons < 64 && score->fired >> s->n_reasons) return "a rule fired that the schema does not have";
    for (int i = 0; i < s->n_experiments; i++)
        if (score->arms[i] < -1 || score->arms[i] >= s->n_arms[i]) return "an arm is none of the schema's";
    return NULL;
}

/* Whether every field of a record is present, without a flag. */
static inline int ps_all_present(const uint8_t *status, uint32_t n) {
    uint64_t all = 0x0101010101010101ULL * PS_PRESENT, word, other = 0;
    uint32_t i = 0;
    for (; i + 8 <= n; i += 8) {
        memcpy(&word, status + i, 8);
        other |= word ^ all;
    }
    if (i == n) return !other;
    memcpy(&word, status + i, 8); /* padded to 8 */
    return !(other | (word ^ all) << 8 * (8 - (n - i)));
}

/* What is wrong with a record that checks, or NULL: after that its parts, its strings and its indices are within bounds.
 * field: which one it is about, or -1. */
static inline const char *ps_record_misfit(const ps_record *r, uint64_t offset, const ps_record_schemas *schemas, int *field) {
    *field = -1;
    if (r->kind == PS_RECORD_SCHEMA || r->kind == PS_RECORD_MARK)
        return offset < schemas->prelude ? NULL : "a schema or a mark stands behind the beginning of the segment";
    int is_score = r->kind == PS_RECORD_SCORE;
    if (offset < schemas->prelude) return "it stands among the schemas";
    if (r->schema >= schemas->n) return "the segment has no schema of its number";
    const ps_record_schema *s = schemas->all + r->schema;
    if (s->is_score != is_score) return is_score ? "its schema is an event's" : "its schema is a score's";
    if (r->n_fields != s->n_fields) return "it has not as many fields as its schema";
    if (r->sequence < 0) return "its sequence is negative";
    if (r->outcome > PS_LAST_OUTCOME || (!is_score && r->outcome == PS_OUTCOME_OFF)) return "there is no such outcome";
    if (r->n_versions != (is_score || r->outcome == PS_OUTCOME_APPLIED ? s->n_versions : 0))
        return "it has not as many versions as its schema";
    uint32_t fixed = ps_record_fixed(is_score, r->n_versions, r->n_fields);
    if (r->length < fixed) return "it is shorter than its fields";
    const char *wrong = is_score ? ps_score_misfit(r, (const ps_score *)(r + 1), s) : NULL;
    if (wrong) return wrong;
    const ps_slot *slots = ps_record_slots(r);
    const uint8_t *status = ps_record_status(r);
    uint64_t room = r->length - fixed, used = 0;
    int few = ps_all_present(status, s->n_fields), n = few ? s->n_checked : s->n_fields;
    for (int k = 0; k < n; k++) {
        int i = few ? s->checked[k] : k, present = (status[i] & 7) == PS_PRESENT;
        *field = i;
        if (status[i] & 0x18 || (status[i] & 7) > PS_OUTSIDE_MAX_AGE) return "there is no such status";
        if (status[i] & PS_WIDE && (!is_score || s->types[i] != PS_INT64)) return "only an integer of a score can be wide";
        if (!is_score && !present && ((status[i] & 7) != PS_NULL_VALUE || s->required[i])) return "it cannot be without a value";
        if (!present) continue;
        if (s->types[i] == PS_STRING) {
            uint64_t offset_in = PS_STR_OFFSET(slots[i].u), length = PS_STR_LENGTH(slots[i].u);
            if (offset_in + length > room) return "its text does not lie within the record";
            if (!ps_is_utf8(ps_record_strings(r) + offset_in, length)) return "its text is no UTF-8";
            used += length;
            if (used > room) return "the texts up to it are longer than the record";
        } else if (!is_score && s->required[i] == PS_REQUIRED_TIME) {
            if (slots[i].i > (int64_t)1 << 61 || slots[i].i < -((int64_t)1 << 61)) return "its time lies outside -2^61..2^61";
        } else if (s->types[i] == PS_BOOL && !is_score && slots[i].u > 1) {
            return "it is neither true nor false";
        }
    }
    *field = -1;
    return NULL;
}

/* As ps_record_check, and PS_RECORD_MISFIT where the record checks but is not of its schema. */
static inline int64_t ps_record_read(const char *base, uint64_t size, uint64_t offset, uint64_t log_id, uint64_t segment,
                                     const ps_record_schemas *schemas) {
    int field;
    int64_t length = ps_record_check(base, size, offset, log_id, segment);
    if (length > 0 && ps_record_misfit((const ps_record *)(base + offset), offset, schemas, &field)) return PS_RECORD_MISFIT;
    return length;
}

#endif
