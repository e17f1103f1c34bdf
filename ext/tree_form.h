/* tree_form.h (control path): a ps_trees_form as one block of bytes, which another process makes.
 *
 * Head, then arrays of 8-byte numbers, then of 4-byte ones, then of single bytes, then the names of the features, each
 * ended by a zero byte. Numbers are in the machine's own order: the block never leaves it. What must stay true: a block
 * that reads is safe to build from, whatever bytes it holds (ps_trees_build checks what the numbers mean).
 */
#ifndef PENSTOCK_TREE_FORM_H
#define PENSTOCK_TREE_FORM_H

#include "tree_kernel.h"

#define PS_TREES_FORM_MAGIC 0x31534545525453ull /* "STREES1" */

/* Bytes of a form as a block; names: how many bytes its names take. */
size_t ps_trees_form_size(const ps_trees_form *form, size_t names);
/* Writes the block (`to` has that size, and lies on a multiple of 8). */
void ps_trees_form_write(const ps_trees_form *form, const char *names, size_t n_names, void *to);
/* Reads a block: pointers of the form go into it. Returns 0, or 1 and says in error (at least 160 bytes) what is wrong. */
int ps_trees_form_read(const void *block, size_t bytes, ps_trees_form *form, const char **names, size_t *n_names,
                       char *error);

/* Builds trees from a block, in a thread of its own whose nice value is `nice` (0: in this thread), and waits for it.
 * What holds Python's GIL must not give way to other processes, so only this does. NULL with the reason in error. */
ps_trees *ps_trees_build_block(const void *block, size_t bytes, int layout, int simd, size_t table_bytes, int nice,
                               ps_trees_form *form, const char **names, size_t *n_names, char *error);

#endif
