/* page_delta.c (control path): page hashes, and moving single pages; page_delta.h says why they can be trusted. */
#define _GNU_SOURCE
#include "page_delta.h"

#include <fcntl.h>
#include <string.h>

typedef unsigned __int128 u128;

#define P61 (((uint64_t)1 << 61) - 1)

static inline uint64_t fold(const uint64_t *key, u128 x) {
    u128 sum = (u128)(key[0] & P61) * ((uint64_t)x & P61) + (u128)(key[1] & P61) * ((uint64_t)(x >> 61) & P61)
               + (u128)(key[2] & P61) * (uint64_t)(x >> 122);
    uint64_t h = (uint64_t)(sum & P61) + (uint64_t)((sum >> 61) & P61) + (uint64_t)(sum >> 122);
    h = (h & P61) + (h >> 61);
    return h == P61 ? 0 : h;
}

static inline void hash_page(const ps_page_key *key, const char *page, uint64_t *out) {
    u128 a = 0, b = 0;
    const uint64_t *k = key->nh;
    for (int i = 0; i < PS_PAGE_WORDS; i += 2) {
        uint64_t m[2];
        memcpy(m, page + 8 * i, 16);
        a += (u128)(m[0] + k[i]) * (m[1] + k[i + 1]);
        b += (u128)(m[0] + k[i + 2]) * (m[1] + k[i + 3]);
    }
    out[0] = fold(key->fold[0], a);
    out[1] = fold(key->fold[1], b);
}

uint64_t ps_pages_scan(const ps_page_key *key, const char *base, uint64_t first, uint64_t n, uint64_t n_old,
                       uint64_t *hashes, uint32_t *changed) {
    uint64_t found = 0;
    for (uint64_t page = first; page < first + n; page++) {
        uint64_t fresh[2], *held = hashes + 2 * page;
        hash_page(key, base + page * PS_PAGE, fresh);
        if (page < n_old && held[0] == fresh[0] && held[1] == fresh[1]) continue;
        held[0] = fresh[0];
        held[1] = fresh[1];
        changed[found++] = (uint32_t)page;
    }
    return found;
}

void ps_pages_gather(const char *base, const uint32_t *numbers, uint64_t n, char *to) {
    for (uint64_t i = 0; i < n; i++) memcpy(to + i * PS_PAGE, base + (uint64_t)numbers[i] * PS_PAGE, PS_PAGE);
}

void ps_pages_scatter(char *base, const uint32_t *numbers, uint64_t n, const char *from) {
    for (uint64_t i = 0; i < n; i++) memcpy(base + (uint64_t)numbers[i] * PS_PAGE, from + i * PS_PAGE, PS_PAGE);
}

void ps_write_back(int fd, uint64_t offset, uint64_t n) {
    if (offset >= n)
        sync_file_range(fd, (off_t)(offset - n), (off_t)n,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    sync_file_range(fd, (off_t)offset, (off_t)n, SYNC_FILE_RANGE_WRITE);
}
