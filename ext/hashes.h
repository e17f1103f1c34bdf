/* hashes.h (hot path): the hashes that experiment platforms assign with, over (prefix, unit, suffix) as UTF-8 bytes.
 *
 * A ps_hash_key is one hash with its salt already fed: whole blocks of the prefix are absorbed at load, the rest waits
 * in `tail`. ps_hash() then absorbs only the unit and the suffix. It must equal hashing the concatenated bytes at once.
 *
 * Sources: FNV-1a, draft-eastlake-fnv (32 bits, offset 2166136261, prime 16777619); MurmurHash3 x86_32 (A. Appleby,
 * public domain description); SHA-1 and SHA-256, FIPS 180-4; MD5, RFC 1321.
 */
#ifndef PENSTOCK_HASHES_H
#define PENSTOCK_HASHES_H

#include <stdint.h>
#include <stddef.h>

enum ps_algorithm {
    PS_FNV1A_32 = 0,       /* fnv1a32(text): 32 bits */
    PS_FNV1A_32_TWICE = 1, /* fnv1a32(decimal(fnv1a32(text))): 32 bits */
    PS_MURMUR3_32 = 2,     /* murmur3_x86_32(text, seed): 32 bits */
    PS_SHA1_60 = 3,        /* first 15 hexadecimal digits of sha1(text): 60 bits */
    PS_MD5_32 = 4,         /* first 8 hexadecimal digits of md5(text): 32 bits */
    PS_SHA256_64 = 5,      /* first 8 bytes, big-endian, of sha256(text): 64 bits */
};

typedef struct {
    uint32_t h[8];       /* state after the whole blocks of the prefix */
    uint32_t algorithm;  /* enum ps_algorithm */
    uint32_t modulus;    /* ps_hash() returns hash % modulus; 0: the hash itself */
    uint32_t tail_len;   /* bytes of the prefix that did not fill a block */
    uint32_t suffix_len;
    uint64_t prefix_len;
    char *suffix;        /* owned */
    uint8_t tail[64];
} ps_hash_key;

/* Returns 0, or -1 when memory is out. Free with ps_hash_key_clear(). */
int ps_hash_key_init(ps_hash_key *key, uint32_t algorithm, uint32_t seed, uint32_t modulus, const char *prefix,
                     size_t prefix_len, const char *suffix, size_t suffix_len);
void ps_hash_key_clear(ps_hash_key *key);

/* The hash (reduced by modulus) of prefix + unit + suffix. */
uint64_t ps_hash(const ps_hash_key *key, const char *unit, size_t len);

/* Four units at once, for the FNV keys only: their multiply chains run side by side. Same values as ps_hash(). */
void ps_hash_fnv_x4(const ps_hash_key *key, const char *const unit[4], const size_t len[4], uint64_t out[4]);

/* Decimal text of v; returns its length. out has room for 20 bytes. */
size_t ps_decimal(int64_t v, char out[20]);

#endif
