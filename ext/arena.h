/* arena.h (hot path): the bytes of one row's, or one block of rows', strings. Slots hold offset and length (row.h). */
#ifndef PENSTOCK_ARENA_H
#define PENSTOCK_ARENA_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "row.h"
#include "window_state.h" /* ps_arena */

/* Appends a copy. Returns 0, or -1 where memory ran out or the arena would pass 4 GiB. */
static inline int ps_arena_append(ps_arena *arena, const char *bytes, size_t length, uint64_t *out)
{
    size_t end = (size_t)arena->used + length;
    if (end > arena->capacity) {
        size_t capacity = arena->capacity ? arena->capacity : 1024;
        char *data;
        if (end > UINT32_MAX || length > UINT32_MAX) return -1; /* before the doubling: it would never end */
        while (capacity < end) capacity *= 2;
        if (capacity > UINT32_MAX) capacity = UINT32_MAX;
        data = (char *)realloc(arena->data, capacity);
        if (!data) return -1;
        arena->data = data;
        arena->capacity = (uint32_t)capacity;
    }
    if (length) memcpy(arena->data + arena->used, bytes, length);
    *out = PS_STR(arena->used, length);
    arena->used = (uint32_t)end;
    return 0;
}

#endif
