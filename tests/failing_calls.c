/* The n-th call on one of a job's files fails: preloaded by tests/io_driver.py.
 *
 * A file of the job is one below the directory that arm() names. Calls are counted from there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char directory[4096];
static int remaining = -1, code = 0;
static char failed[8192] = "";

void arm(const char *path, int number, int error) {
    strncpy(directory, path, sizeof directory - 1);
    remaining = number;
    code = error;
    failed[0] = 0;
}

const char *what_failed(void) { return failed; }

static int fails(const char *call, const char *path) {
    if (remaining < 0 || !path || strncmp(path, directory, strlen(directory)) != 0) return 0;
    if (remaining-- > 0) return 0;
    snprintf(failed, sizeof failed, "%s %s", call, path + strlen(directory));
    errno = code;
    return 1;
}

static int fd_fails(const char *call, int fd) {
    char link[64], path[4096];
    int kept = errno;
    if (remaining < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (n < 0) return 0;
    path[n] = 0;
    return fails(call, path);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        REAL(int, #name, const char *, int, ...); \
        return fails("open", path) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int openat(int at, const char *path, int flags, ...) {
    va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
    REAL(int, "openat", int, const char *, int, ...);
    return fails("open", path) ? -1 : real(at, path, flags, mode);
}

#define ON_FD(type, name, shown, params, args, ...) \
    type name params { \
        REAL(type, #name, __VA_ARGS__); \
        return fd_fails(shown, fd) ? -1 : real args; \
    }
ON_FD(ssize_t, read, "read", (int fd, void *b, size_t n), (fd, b, n), int, void *, size_t)
ON_FD(ssize_t, write, "write", (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
ON_FD(ssize_t, pread, "pread", (int fd, void *b, size_t n, off_t o), (fd, b, n, o), int, void *, size_t, off_t)
ON_FD(ssize_t, pread64, "pread", (int fd, void *b, size_t n, off64_t o), (fd, b, n, o), int, void *, size_t, off64_t)
ON_FD(int, fsync, "fsync", (int fd), (fd), int)
ON_FD(int, fdatasync, "fdatasync", (int fd), (fd), int)
ON_FD(int, ftruncate, "ftruncate", (int fd, off_t n), (fd, n), int, off_t)
ON_FD(int, ftruncate64, "ftruncate", (int fd, off64_t n), (fd, n), int, off64_t)
ON_FD(int, fchmod, "fchmod", (int fd, mode_t m), (fd, m), int, mode_t)
ON_FD(int, close, "close", (int fd), (fd), int)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return fails("rename", to) ? -1 : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return fails("rename", to) ? -1 : real(a, from, b, to);
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return fails("unlink", path) ? -1 : real(path);
}
