/* siphash.h (hot path): SipHash-1-3 with 128 bits of output (Aumasson and Bernstein, "SipHash: a fast short-input PRF",
 * 2012; the output of 128 bits as in their reference description).
 *
 * For what a stranger chooses and nothing else is compared with: event ids. Who does not know the key can make no two
 * texts that share a place in a table, let alone all 128 bits. One byte behind the text says what kind it is, so that
 * texts of different kinds are never equal.
 */
#ifndef PENSTOCK_SIPHASH_H
#define PENSTOCK_SIPHASH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    uint64_t lo, hi;
} ps_hash128;

#define PS_SIP_ROTATE(x, b) ((x) << (b) | (x) >> (64 - (b)))

#define PS_SIP_ROUND                                                                                                   \
    do {                                                                                                               \
        v0 += v1; v1 = PS_SIP_ROTATE(v1, 13) ^ v0; v0 = PS_SIP_ROTATE(v0, 32);                                         \
        v2 += v3; v3 = PS_SIP_ROTATE(v3, 16) ^ v2;                                                                     \
        v0 += v3; v3 = PS_SIP_ROTATE(v3, 21) ^ v0;                                                                     \
        v2 += v1; v1 = PS_SIP_ROTATE(v1, 17) ^ v2; v2 = PS_SIP_ROTATE(v2, 32);                                         \
    } while (0)

/* The hash of the n bytes at `text` and one more, `kind`. Words are little-endian. */
static inline ps_hash128 ps_siphash(const uint64_t key[2], const void *text, size_t n, uint8_t kind) {
    uint64_t v0 = key[0] ^ 0x736f6d6570736575ULL, v1 = key[1] ^ 0x646f72616e646f6dULL ^ 0xee;
    uint64_t v2 = key[0] ^ 0x6c7967656e657261ULL, v3 = key[1] ^ 0x7465646279746573ULL;
    const unsigned char *at = (const unsigned char *)text, *end = at + (n & ~(size_t)7);
    uint64_t word;
    for (; at < end; at += 8) {
        memcpy(&word, at, 8);
        v3 ^= word;
        PS_SIP_ROUND;
        v0 ^= word;
    }
    unsigned rest = (unsigned)(n & 7);
    word = (uint64_t)kind << 8 * rest;
    for (unsigned i = 0; i < rest; i++) word |= (uint64_t)at[i] << 8 * i;
    if (rest == 7) { /* the kind fills the word: the length stands in one of its own */
        v3 ^= word;
        PS_SIP_ROUND;
        v0 ^= word;
        word = 0;
    }
    word |= (uint64_t)(n + 1) << 56;
    v3 ^= word;
    PS_SIP_ROUND;
    v0 ^= word;
    v2 ^= 0xee;
    PS_SIP_ROUND; PS_SIP_ROUND; PS_SIP_ROUND;
    ps_hash128 hash;
    hash.lo = v0 ^ v1 ^ v2 ^ v3;
    v1 ^= 0xdd;
    PS_SIP_ROUND; PS_SIP_ROUND; PS_SIP_ROUND;
    hash.hi = v0 ^ v1 ^ v2 ^ v3;
    return hash;
}

#endif
