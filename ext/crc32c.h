/* crc32c.h (hot path): CRC32C (Castagnoli, RFC 3720), by the SSE4.2 instruction of the baseline x86-64-v2.
 *
 * Checksums what is written to disk: records of the event log, blocks of snapshots. ps_crc32c(0, x) is the usual value
 * ("123456789" gives 0xE3069283), and what must stay true is that it chains: crc(crc(0, a), b) == crc(0, ab).
 *
 * The instruction takes 3 cycles and starts one per cycle, so long buffers go as three streams side by side, joined by
 * multiplying with x^(8 n) modulo the polynomial (the constants; tested). Below 3 KiB joining costs more than it saves.
 */
#ifndef PENSTOCK_CRC32C_H
#define PENSTOCK_CRC32C_H

#include <nmmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PS_CRC32C_LONG 16384
#define PS_CRC32C_SHORT 1024
#define PS_CRC32C_SHIFT_LONG 0xBF455269u   /* x^(8 * PS_CRC32C_LONG), reflected: bit 31 is x^0 */
#define PS_CRC32C_SHIFT_SHORT 0xE4172B16u /* x^(8 * PS_CRC32C_SHORT) */

/* a * b modulo the polynomial, both reflected. */
static inline uint32_t ps_crc32c_multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int i = 0; i < 32; i++) {
        product ^= b & (0u - (a >> 31));
        a <<= 1;
        b = (b >> 1) ^ (0x82F63B78u & (0u - (b & 1)));
    }
    return product;
}

static inline uint64_t ps_crc32c_word(uint64_t crc, const unsigned char *p)
{
    uint64_t word;
    memcpy(&word, p, 8);
    return _mm_crc32_u64(crc, word);
}

/* Three streams of n bytes each, n a multiple of 8; crc is the inverted register. */
static inline uint64_t ps_crc32c_three(uint64_t crc, const unsigned char *p, size_t n, uint32_t shift)
{
    uint64_t second = 0, third = 0;
    for (size_t i = 0; i < n; i += 8) {
        crc = ps_crc32c_word(crc, p + i);
        second = ps_crc32c_word(second, p + n + i);
        third = ps_crc32c_word(third, p + 2 * n + i);
    }
    crc = ps_crc32c_multiply(shift, (uint32_t)crc) ^ second;
    return ps_crc32c_multiply(shift, (uint32_t)crc) ^ third;
}

static inline uint32_t ps_crc32c(uint32_t start, const void *data, size_t n)
{
    const unsigned char *p = (const unsigned char *)data;
    uint64_t crc = (uint32_t)~start;
    while (n >= 3 * PS_CRC32C_LONG) {
        crc = ps_crc32c_three(crc, p, PS_CRC32C_LONG, PS_CRC32C_SHIFT_LONG);
        p += 3 * PS_CRC32C_LONG;
        n -= 3 * PS_CRC32C_LONG;
    }
    while (n >= 3 * PS_CRC32C_SHORT) {
        crc = ps_crc32c_three(crc, p, PS_CRC32C_SHORT, PS_CRC32C_SHIFT_SHORT);
        p += 3 * PS_CRC32C_SHORT;
        n -= 3 * PS_CRC32C_SHORT;
    }
    for (; n >= 8; p += 8, n -= 8)
        crc = ps_crc32c_word(crc, p);
    for (; n; p++, n--)
        crc = _mm_crc32_u8((uint32_t)crc, *p);
    return (uint32_t)~crc;
}

#endif
