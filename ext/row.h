/* row.h (hot path): the row that carries one event's values through the engine.
 *
 * A row is n slots of 8 bytes, one status byte per slot, and one byte arena for strings. The type of a slot is
 * fixed in the Plan, never per row. A null float64 slot also holds NaN, so that a model's gather is a copy.
 */
#ifndef PENSTOCK_ROW_H
#define PENSTOCK_ROW_H

#include <stdint.h>
#include <stddef.h>

typedef union {
    double f;    /* PS_FLOAT64 */
    int64_t i;   /* PS_INT64; PS_BOOL (0 or 1); PS_TIMESTAMP (microseconds since 1970 UTC) */
    uint64_t u;  /* PS_STRING: offset into the arena in the low 32 bits, length in bytes in the high 32 */
} ps_slot;

enum ps_type { PS_FLOAT64 = 0, PS_INT64 = 1, PS_BOOL = 2, PS_TIMESTAMP = 3, PS_STRING = 4 };

/* Statuses (S17), with Feast's numbers, in the low bits of the status byte. */
enum ps_status {
    PS_INVALID = 0,
    PS_PRESENT = 1,
    PS_NULL_VALUE = 2,
    PS_NOT_FOUND = 3,
    PS_OUTSIDE_MAX_AGE = 4,
};
/* Flag on a PS_INT64 slot: the exact integer does not fit, the slot holds it as a double (S13). */
#define PS_WIDE 0x80
/* Flag beside PS_PRESENT: the value is the default= of one that was too old (S9: status OUTSIDE_MAX_AGE). */
#define PS_AGED 0x40

#define PS_STR_OFFSET(u) ((uint32_t)(u))
#define PS_STR_LENGTH(u) ((uint32_t)((u) >> 32))
#define PS_STR(offset, length) ((uint64_t)(uint32_t)(offset) | ((uint64_t)(uint32_t)(length) << 32))

#endif
