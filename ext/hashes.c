/* hashes.c (hot path): see hashes.h. Integer arithmetic only; every function is a pure function of its bytes.
 *
 * The compression functions follow the standards' own notation (FIPS 180-4, RFC 1321), one block at a time. A unit that
 * fits with padding into one block costs one compression, because the salt's whole blocks were absorbed at load.
 */
#include "hashes.h"

#include <stdlib.h>
#include <string.h>

#define FNV_OFFSET 2166136261u
#define FNV_PRIME 16777619u

static inline uint32_t rotl(uint32_t x, int r) { return (x << r) | (x >> (32 - r)); }
static inline uint32_t rotr(uint32_t x, int r) { return (x >> r) | (x << (32 - r)); }

static inline uint32_t load_le(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint32_t load_be(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

static inline void store_be(uint8_t *p, uint32_t v) {
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

/* ---- decimal text ---- */

static const char PAIRS[201] =
    "00010203040506070809101112131415161718192021222324252627282930313233343536373839404142434445464748495051525354"
    "5556575859606162636465666768697071727374757677787980818283848586878889909192939495969798" "99";

/* Ten digits of v with leading zeros. */
static inline void ten_digits(uint32_t v, uint8_t out[10]) {
    uint32_t high = v / 100000000u, low = v - high * 100000000u;
    uint32_t a = low / 10000u, b = low - a * 10000u;
    uint32_t a1 = a / 100u, b1 = b / 100u;
    memcpy(out, PAIRS + 2 * high, 2);
    memcpy(out + 2, PAIRS + 2 * a1, 2);
    memcpy(out + 4, PAIRS + 2 * (a - a1 * 100u), 2);
    memcpy(out + 6, PAIRS + 2 * b1, 2);
    memcpy(out + 8, PAIRS + 2 * (b - b1 * 100u), 2);
}

/* How many leading zeros ten_digits() wrote; zero itself keeps one digit. */
static inline uint32_t leading_zeros(uint32_t v) {
    return (v < 1000000000u) + (v < 100000000u) + (v < 10000000u) + (v < 1000000u) + (v < 100000u) + (v < 10000u) +
           (v < 1000u) + (v < 100u) + (v < 10u);
}

size_t ps_decimal(int64_t v, char out[20]) {
    uint64_t u = v < 0 ? 0u - (uint64_t)v : (uint64_t)v;
    char digits[20];
    size_t n = 0;
    do {
        digits[n++] = (char)('0' + u % 10);
        u /= 10;
    } while (u);
    size_t len = 0;
    if (v < 0) out[len++] = '-';
    while (n) out[len++] = digits[--n];
    return len;
}

/* ---- FNV-1a, 32 bits ---- */

static inline uint32_t fnv1a(uint32_t h, const char *p, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)p[i]) * FNV_PRIME;
    return h;
}

static inline uint32_t fnv1a_decimal(uint32_t v) {
    uint8_t digits[10];
    ten_digits(v, digits);
    uint32_t zeros = leading_zeros(v);
    return fnv1a(FNV_OFFSET, (const char *)digits + zeros, 10 - zeros);
}

void ps_hash_fnv_x4(const ps_hash_key *key, const char *const unit[4], const size_t len[4], uint64_t out[4]) {
    const char *p0 = unit[0], *p1 = unit[1], *p2 = unit[2], *p3 = unit[3];
    uint32_t h0 = key->h[0], h1 = h0, h2 = h0, h3 = h0;
    size_t shared = len[0];
    for (int k = 1; k < 4; k++)
        if (len[k] < shared) shared = len[k];
    for (size_t i = 0; i < shared; i++) {
        h0 = (h0 ^ (uint8_t)p0[i]) * FNV_PRIME;
        h1 = (h1 ^ (uint8_t)p1[i]) * FNV_PRIME;
        h2 = (h2 ^ (uint8_t)p2[i]) * FNV_PRIME;
        h3 = (h3 ^ (uint8_t)p3[i]) * FNV_PRIME;
    }
    h0 = fnv1a(h0, p0 + shared, len[0] - shared);
    h1 = fnv1a(h1, p1 + shared, len[1] - shared);
    h2 = fnv1a(h2, p2 + shared, len[2] - shared);
    h3 = fnv1a(h3, p3 + shared, len[3] - shared);
    const char *suffix = key->suffix;
    for (size_t i = 0; i < key->suffix_len; i++) {
        h0 = (h0 ^ (uint8_t)suffix[i]) * FNV_PRIME;
        h1 = (h1 ^ (uint8_t)suffix[i]) * FNV_PRIME;
        h2 = (h2 ^ (uint8_t)suffix[i]) * FNV_PRIME;
        h3 = (h3 ^ (uint8_t)suffix[i]) * FNV_PRIME;
    }
    if (key->algorithm == PS_FNV1A_32_TWICE) {
        uint8_t d[4][10];
        uint32_t z0 = leading_zeros(h0), z1 = leading_zeros(h1), z2 = leading_zeros(h2), z3 = leading_zeros(h3);
        ten_digits(h0, d[0]);
        ten_digits(h1, d[1]);
        ten_digits(h2, d[2]);
        ten_digits(h3, d[3]);
        h0 = h1 = h2 = h3 = FNV_OFFSET;
        for (uint32_t i = 0; i < 10; i++) { /* a leading zero leaves the state as it is */
            uint32_t n0 = (h0 ^ d[0][i]) * FNV_PRIME, n1 = (h1 ^ d[1][i]) * FNV_PRIME;
            uint32_t n2 = (h2 ^ d[2][i]) * FNV_PRIME, n3 = (h3 ^ d[3][i]) * FNV_PRIME;
            h0 = i < z0 ? h0 : n0;
            h1 = i < z1 ? h1 : n1;
            h2 = i < z2 ? h2 : n2;
            h3 = i < z3 ? h3 : n3;
        }
    }
    uint32_t m = key->modulus;
    out[0] = m ? h0 % m : h0;
    out[1] = m ? h1 % m : h1;
    out[2] = m ? h2 % m : h2;
    out[3] = m ? h3 % m : h3;
}

/* ---- MurmurHash3 x86_32 ---- */

static inline uint32_t murmur_block(uint32_t h, uint32_t k) {
    k = rotl(k * 0xcc9e2d51u, 15) * 0x1b873593u;
    return rotl(h ^ k, 13) * 5 + 0xe6546b64u;
}

static inline uint32_t murmur_blocks(uint32_t h, const uint8_t *p, size_t blocks) {
    for (size_t i = 0; i < blocks; i++) h = murmur_block(h, load_le(p + 4 * i));
    return h;
}

static inline uint32_t murmur_finish(uint32_t h, const uint8_t *tail, size_t tail_len, uint64_t total) {
    uint32_t k = 0;
    if (tail_len == 3) k ^= (uint32_t)tail[2] << 16;
    if (tail_len >= 2) k ^= (uint32_t)tail[1] << 8;
    if (tail_len >= 1) h ^= rotl((k ^ tail[0]) * 0xcc9e2d51u, 15) * 0x1b873593u;
    h ^= (uint32_t)total;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
}

/* ---- SHA-1, MD5, SHA-256: one block of 64 bytes ---- */

static void sha1_block(uint32_t h[8], const uint8_t *p) {
    uint32_t w[16], a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int t = 0; t < 16; t++) w[t] = load_be(p + 4 * t);
#define W(t) (w[(t) & 15] = rotl(w[((t) + 13) & 15] ^ w[((t) + 8) & 15] ^ w[((t) + 2) & 15] ^ w[(t) & 15], 1))
#define ROUND(a, b, c, d, e, f, k, x)           \
    do {                                        \
        e += rotl(a, 5) + (f) + (k) + (x);      \
        b = rotl(b, 30);                        \
    } while (0)
#define FIVE(f, k, X, t)                               \
    ROUND(a, b, c, d, e, f(b, c, d), k, X(t));         \
    ROUND(e, a, b, c, d, f(a, b, c), k, X((t) + 1));   \
    ROUND(d, e, a, b, c, f(e, a, b), k, X((t) + 2));   \
    ROUND(c, d, e, a, b, f(d, e, a), k, X((t) + 3));   \
    ROUND(b, c, d, e, a, f(c, d, e), k, X((t) + 4))
#define CH(x, y, z) ((z) ^ ((x) & ((y) ^ (z))))
#define PARITY(x, y, z) ((x) ^ (y) ^ (z))
#define MAJ(x, y, z) (((x) & (y)) | ((z) & ((x) | (y))))
#define FIRST(t) w[t]
    FIVE(CH, 0x5a827999u, FIRST, 0);
    FIVE(CH, 0x5a827999u, FIRST, 5);
    FIVE(CH, 0x5a827999u, FIRST, 10);
    ROUND(a, b, c, d, e, CH(b, c, d), 0x5a827999u, w[15]);
    ROUND(e, a, b, c, d, CH(a, b, c), 0x5a827999u, W(16));
    ROUND(d, e, a, b, c, CH(e, a, b), 0x5a827999u, W(17));
    ROUND(c, d, e, a, b, CH(d, e, a), 0x5a827999u, W(18));
    ROUND(b, c, d, e, a, CH(c, d, e), 0x5a827999u, W(19));
    FIVE(PARITY, 0x6ed9eba1u, W, 20);
    FIVE(PARITY, 0x6ed9eba1u, W, 25);
    FIVE(PARITY, 0x6ed9eba1u, W, 30);
    FIVE(PARITY, 0x6ed9eba1u, W, 35);
    FIVE(MAJ, 0x8f1bbcdcu, W, 40);
    FIVE(MAJ, 0x8f1bbcdcu, W, 45);
    FIVE(MAJ, 0x8f1bbcdcu, W, 50);
    FIVE(MAJ, 0x8f1bbcdcu, W, 55);
    FIVE(PARITY, 0xca62c1d6u, W, 60);
    FIVE(PARITY, 0xca62c1d6u, W, 65);
    FIVE(PARITY, 0xca62c1d6u, W, 70);
    FIVE(PARITY, 0xca62c1d6u, W, 75);
#undef W
#undef ROUND
#undef FIVE
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
    h[4] += e;
}

/* floor(2^32 * abs(sin(i + 1))) (RFC 1321, 3.4) */
static const uint32_t MD5_T[64] = {
    0xd76aa478, 0xe8c7b756, 0x242070db, 0xc1bdceee, 0xf57c0faf, 0x4787c62a, 0xa8304613, 0xfd469501,
    0x698098d8, 0x8b44f7af, 0xffff5bb1, 0x895cd7be, 0x6b901122, 0xfd987193, 0xa679438e, 0x49b40821,
    0xf61e2562, 0xc040b340, 0x265e5a51, 0xe9b6c7aa, 0xd62f105d, 0x02441453, 0xd8a1e681, 0xe7d3fbc8,
    0x21e1cde6, 0xc33707d6, 0xf4d50d87, 0x455a14ed, 0xa9e3e905, 0xfcefa3f8, 0x676f02d9, 0x8d2a4c8a,
    0xfffa3942, 0x8771f681, 0x6d9d6122, 0xfde5380c, 0xa4beea44, 0x4bdecfa9, 0xf6bb4b60, 0xbebfbc70,
    0x289b7ec6, 0xeaa127fa, 0xd4ef3085, 0x04881d05, 0xd9d4d039, 0xe6db99e5, 0x1fa27cf8, 0xc4ac5665,
    0xf4292244, 0x432aff97, 0xab9423a7, 0xfc93a039, 0x655b59c3, 0x8f0ccc92, 0xffeff47d, 0x85845dd1,
    0x6fa87e4f, 0xfe2ce6e0, 0xa3014314, 0x4e0811a1, 0xf7537e82, 0xbd3af235, 0x2ad7d2bb, 0xeb86d391,
};

static void md5_block(uint32_t h[8], const uint8_t *p) {
    uint32_t w[16], a = h[0], b = h[1], c = h[2], d = h[3];
    for (int t = 0; t < 16; t++) w[t] = load_le(p + 4 * t);
#define STEP(a, b, c, d, f, k, s, i) a = b + rotl(a + (f) + w[(k) & 15] + MD5_T[i], s)
#define F1(x, y, z) ((z) ^ ((x) & ((y) ^ (z))))
#define F2(x, y, z) ((y) ^ ((z) & ((x) ^ (y))))
#define F3(x, y, z) ((x) ^ (y) ^ (z))
#define F4(x, y, z) ((y) ^ ((x) | ~(z)))
#define FOUR(F, i, m, o, s0, s1, s2, s3)                          \
    STEP(a, b, c, d, F(b, c, d), (m) * (i) + (o), s0, i);         \
    STEP(d, a, b, c, F(a, b, c), (m) * ((i) + 1) + (o), s1, (i) + 1); \
    STEP(c, d, a, b, F(d, a, b), (m) * ((i) + 2) + (o), s2, (i) + 2); \
    STEP(b, c, d, a, F(c, d, a), (m) * ((i) + 3) + (o), s3, (i) + 3)
    FOUR(F1, 0, 1, 0, 7, 12, 17, 22);
    FOUR(F1, 4, 1, 0, 7, 12, 17, 22);
    FOUR(F1, 8, 1, 0, 7, 12, 17, 22);
    FOUR(F1, 12, 1, 0, 7, 12, 17, 22);
    FOUR(F2, 16, 5, 1, 5, 9, 14, 20);
    FOUR(F2, 20, 5, 1, 5, 9, 14, 20);
    FOUR(F2, 24, 5, 1, 5, 9, 14, 20);
    FOUR(F2, 28, 5, 1, 5, 9, 14, 20);
    FOUR(F3, 32, 3, 5, 4, 11, 16, 23);
    FOUR(F3, 36, 3, 5, 4, 11, 16, 23);
    FOUR(F3, 40, 3, 5, 4, 11, 16, 23);
    FOUR(F3, 44, 3, 5, 4, 11, 16, 23);
    FOUR(F4, 48, 7, 0, 6, 10, 15, 21);
    FOUR(F4, 52, 7, 0, 6, 10, 15, 21);
    FOUR(F4, 56, 7, 0, 6, 10, 15, 21);
    FOUR(F4, 60, 7, 0, 6, 10, 15, 21);
#undef STEP
#undef FOUR
    h[0] += a;
    h[1] += b;
    h[2] += c;
    h[3] += d;
}

static const uint32_t SHA256_K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static void sha256_block(uint32_t h[8], const uint8_t *p) {
    uint32_t w[64], s[8];
    for (int t = 0; t < 16; t++) w[t] = load_be(p + 4 * t);
    for (int t = 16; t < 64; t++) {
        uint32_t x = w[t - 15], y = w[t - 2];
        w[t] = w[t - 16] + (rotr(x, 7) ^ rotr(x, 18) ^ (x >> 3)) + w[t - 7] +
               (rotr(y, 17) ^ rotr(y, 19) ^ (y >> 10));
    }
    memcpy(s, h, sizeof s);
#define ROUND(a, b, c, d, e, f, g, h, i)                                                            \
    do {                                                                                            \
        uint32_t t1 = h + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + CH(e, f, g) + SHA256_K[i] + w[i]; \
        d += t1;                                                                                    \
        h = t1 + (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + MAJ(a, b, c);                           \
    } while (0)
    for (int t = 0; t < 64; t += 8) {
        ROUND(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], t);
        ROUND(s[7], s[0], s[1], s[2], s[3], s[4], s[5], s[6], t + 1);
        ROUND(s[6], s[7], s[0], s[1], s[2], s[3], s[4], s[5], t + 2);
        ROUND(s[5], s[6], s[7], s[0], s[1], s[2], s[3], s[4], t + 3);
        ROUND(s[4], s[5], s[6], s[7], s[0], s[1], s[2], s[3], t + 4);
        ROUND(s[3], s[4], s[5], s[6], s[7], s[0], s[1], s[2], t + 5);
        ROUND(s[2], s[3], s[4], s[5], s[6], s[7], s[0], s[1], t + 6);
        ROUND(s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[0], t + 7);
    }
#undef ROUND
    for (int i = 0; i < 8; i++) h[i] += s[i];
}

/* ---- blocks, whatever the algorithm ---- */

static inline size_t block_size(uint32_t algorithm) {
    return algorithm == PS_MURMUR3_32 ? 4 : algorithm <= PS_FNV1A_32_TWICE ? 1 : 64;
}

static inline void absorb(uint32_t algorithm, uint32_t h[8], const uint8_t *p, size_t blocks) {
    switch (algorithm) {
    case PS_FNV1A_32:
    case PS_FNV1A_32_TWICE:
        h[0] = fnv1a(h[0], (const char *)p, blocks);
        break;
    case PS_MURMUR3_32:
        h[0] = murmur_blocks(h[0], p, blocks);
        break;
    case PS_SHA1_60:
        for (; blocks; blocks--, p += 64) sha1_block(h, p);
        break;
    case PS_MD5_32:
        for (; blocks; blocks--, p += 64) md5_block(h, p);
        break;
    default:
        for (; blocks; blocks--, p += 64) sha256_block(h, p);
    }
}

/* Feeds bytes of any length; *fill of buf's bytes wait for a whole block. */
static void feed(uint32_t algorithm, uint32_t h[8], uint8_t buf[64], size_t *fill, const uint8_t *p, size_t n) {
    size_t size = block_size(algorithm);
    if (*fill) {
        size_t take = size - *fill < n ? size - *fill : n;
        memcpy(buf + *fill, p, take);
        *fill += take;
        p += take;
        n -= take;
        if (*fill < size) return;
        absorb(algorithm, h, buf, 1);
    }
    absorb(algorithm, h, p, n / size);
    *fill = n % size;
    memcpy(buf, p + n - *fill, *fill);
}

/* Padding and the message's length in bits, then the last one or two blocks. buf holds fill < 64 bytes. */
static void finish_digest(uint32_t algorithm, uint32_t h[8], uint8_t buf[64], size_t fill, uint64_t total) {
    buf[fill++] = 0x80;
    if (fill > 56) {
        memset(buf + fill, 0, 64 - fill);
        absorb(algorithm, h, buf, 1);
        fill = 0;
    }
    memset(buf + fill, 0, 56 - fill);
    uint64_t bits = total * 8;
    if (algorithm == PS_MD5_32) {
        for (int i = 0; i < 8; i++) buf[56 + i] = (uint8_t)(bits >> (8 * i));
    } else {
        store_be(buf + 56, (uint32_t)(bits >> 32));
        store_be(buf + 60, (uint32_t)bits);
    }
    absorb(algorithm, h, buf, 1);
}

int ps_hash_key_init(ps_hash_key *key, uint32_t algorithm, uint32_t seed, uint32_t modulus, const char *prefix,
                     size_t prefix_len, const char *suffix, size_t suffix_len) {
    static const uint32_t SHA1_START[8] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    static const uint32_t SHA256_START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(key, 0, sizeof *key);
    key->algorithm = algorithm;
    key->modulus = modulus;
    if (algorithm <= PS_FNV1A_32_TWICE)
        key->h[0] = FNV_OFFSET;
    else if (algorithm == PS_MURMUR3_32)
        key->h[0] = seed;
    else
        memcpy(key->h, algorithm == PS_SHA256_64 ? SHA256_START : SHA1_START, sizeof key->h); /* MD5 starts as SHA-1 */
    size_t fill = 0;
    feed(algorithm, key->h, key->tail, &fill, (const uint8_t *)prefix, prefix_len);
    key->tail_len = (uint32_t)fill;
    key->prefix_len = prefix_len;
    key->suffix_len = (uint32_t)suffix_len;
    key->suffix = malloc(suffix_len + 1);
    if (!key->suffix) return -1;
    memcpy(key->suffix, suffix, suffix_len);
    return 0;
}

void ps_hash_key_clear(ps_hash_key *key) {
    free(key->suffix);
    key->suffix = NULL;
}

static inline uint32_t murmur_key(const ps_hash_key *key, const char *unit, size_t len) {
    uint64_t total = key->prefix_len + len + key->suffix_len;
    size_t n = key->tail_len + len + key->suffix_len;
    const uint8_t *p = (const uint8_t *)unit;
    uint8_t joined[256];
    if (n != len) {
        if (n > sizeof joined) {
            uint32_t h[8] = {key->h[0]};
            uint8_t buf[64];
            size_t fill = key->tail_len;
            memcpy(buf, key->tail, 4);
            feed(PS_MURMUR3_32, h, buf, &fill, p, len);
            feed(PS_MURMUR3_32, h, buf, &fill, (const uint8_t *)key->suffix, key->suffix_len);
            return murmur_finish(h[0], buf, fill, total);
        }
        memcpy(joined, key->tail, 4);
        memcpy(joined + key->tail_len, unit, len);
        memcpy(joined + key->tail_len + len, key->suffix, key->suffix_len);
        p = joined;
    }
    uint32_t h = murmur_blocks(key->h[0], p, n / 4);
    return murmur_finish(h, p + (n & ~(size_t)3), n & 3, total);
}

/* state is left holding the digest's words. */
static inline void digest_key(const ps_hash_key *key, const char *unit, size_t len, uint32_t state[8]) {
    uint8_t buf[64];
    size_t fill = key->tail_len;
    memcpy(state, key->h, sizeof key->h);
    memcpy(buf, key->tail, 64);
    if (fill + len + key->suffix_len < 56) { /* one block, padding included */
        memcpy(buf + fill, unit, len);
        memcpy(buf + fill + len, key->suffix, key->suffix_len);
        fill += len + key->suffix_len;
    } else {
        feed(key->algorithm, state, buf, &fill, (const uint8_t *)unit, len);
        feed(key->algorithm, state, buf, &fill, (const uint8_t *)key->suffix, key->suffix_len);
    }
    finish_digest(key->algorithm, state, buf, fill, key->prefix_len + len + key->suffix_len);
}

uint64_t ps_hash(const ps_hash_key *key, const char *unit, size_t len) {
    uint32_t h, state[8];
    uint64_t wide;
    switch (key->algorithm) {
    case PS_FNV1A_32:
        h = fnv1a(fnv1a(key->h[0], unit, len), key->suffix, key->suffix_len);
        break;
    case PS_FNV1A_32_TWICE:
        h = fnv1a_decimal(fnv1a(fnv1a(key->h[0], unit, len), key->suffix, key->suffix_len));
        break;
    case PS_MURMUR3_32:
        h = murmur_key(key, unit, len);
        break;
    case PS_MD5_32:
        digest_key(key, unit, len, state);
        h = __builtin_bswap32(state[0]); /* the digest's bytes are little-endian words */
        break;
    default:
        digest_key(key, unit, len, state);
        wide = (uint64_t)state[0] << 32 | state[1];
        if (key->algorithm == PS_SHA1_60) wide >>= 4;
        return key->modulus ? wide % key->modulus : wide;
    }
    return key->modulus ? h % key->modulus : h;
}
