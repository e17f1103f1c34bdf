/* page_delta.h (control path): which 4 KiB pages of a store's mapping differ from the snapshot before.
 *
 * What must stay true: a page that differs is found. No second copy of the state is kept to compare with, only 16 bytes
 * per page: two hashes, each NH (UMAC; Black, Halevi, Krawczyk, Krovetz, Rogaway 1999) over the page's 512 words under
 * a secret random key, and folded modulo 2^61 - 1. Two given pages that differ have the same NH with probability 2^-64
 * and the same fold with 2^-61, whatever they hold; the second hash is NH under the Toeplitz shift of the key, which is
 * as good as a key of its own. So a change goes unseen with probability below 2^-121, for any data that was chosen
 * without the key; and a page takes 512 multiplications, as fast as it comes from memory.
 */
#ifndef PENSTOCK_PAGE_DELTA_H
#define PENSTOCK_PAGE_DELTA_H

#include <stdint.h>

#define PS_PAGE 4096
#define PS_PAGE_WORDS (PS_PAGE / 8)

typedef struct {
    uint64_t nh[PS_PAGE_WORDS + 2];
    uint64_t fold[2][3];
} ps_page_key;

/* Hashes pages first..first + n of a mapping. hashes (two words per page, from page 0) holds those of the snapshot
 * before for pages below n_old, and gets the new ones. The numbers of the pages that differ, and of all pages from
 * n_old on, go to changed. Returns how many. */
uint64_t ps_pages_scan(const ps_page_key *key, const char *base, uint64_t first, uint64_t n, uint64_t n_old,
                       uint64_t *hashes, uint32_t *changed);
void ps_pages_gather(const char *base, const uint32_t *numbers, uint64_t n, char *to);
void ps_pages_scatter(char *base, const uint32_t *numbers, uint64_t n, const char *from);
/* Starts writing these bytes of a file to disk and waits for those before them, so that little is dirty at a time. */
void ps_write_back(int fd, uint64_t offset, uint64_t n);

#endif
