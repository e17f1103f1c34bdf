/* Loaded before the C library, it makes msync fail, or wait, as a file says: "errno microseconds". */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int msync(void *base, size_t bytes, int flags) {
    static int (*real)(void *, size_t, int);
    int error = 0, us = 0;
    if (!real) real = (int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "msync");
    FILE *file = fopen(getenv("FAILING_DISK"), "r");
    if (file) {
        if (fscanf(file, "%d %d", &error, &us) != 2) error = us = 0;
        fclose(file);
    }
    if (us) usleep((useconds_t)us);
    if (!error) return real(base, bytes, flags);
    errno = error;
    return -1;
}
