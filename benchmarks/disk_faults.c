/* Fail or kill at the n-th change that a process makes under a folder; see disk_faults.py.

   cc -shared -fPIC -O1 -o faults.so disk_faults.c -ldl; LD_PRELOAD=./faults.so python …
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, FULL, READ_ONLY };

static char root[PATH_MAX];
static long seen, at;
static int kind;

void faults_arm(const char *folder, long moment, int what) {
    strncpy(root, folder, sizeof root - 1);
    seen = 0, at = moment, kind = what;
}

long faults_seen(void) { return seen; }

static int watched(int folder, const char *path) {
    char link[64], full[PATH_MAX];
    if (!root[0]) return 0;
    if (path && path[0] == '/') return !strncmp(path, root, strlen(root));
    if (folder == AT_FDCWD) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, full, sizeof full - 1);
    return n > 0 && (full[n] = 0, !strncmp(full, root, strlen(root)));
}

/* The errno with which a change must fail, or 0. A full disk lets files be removed. */
static int fault(int needs_space) {
    if (++seen < at || !at) return 0;
    if (kind == KILL || (kind == TORN && seen > at)) raise(SIGKILL);
    if (kind == READ_ONLY) return EROFS;
    return kind == FULL && needs_space ? ENOSPC : 0;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define CHANGE(folder, path, space)                                        \
    do {                                                                   \
        int error = watched(folder, path) ? fault(space) : 0;              \
        if (error) return errno = error, -1;                               \
    } while (0)

#define OPEN(name)                                                         \
    int name(const char *path, int flags, ...) {                           \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode_t mode = va_arg(rest, mode_t);                                \
        va_end(rest);                                                      \
        if (flags & (O_CREAT | O_TRUNC)) CHANGE(AT_FDCWD, path, 1);        \
        REAL(name);                                                        \
        return real(path, flags, mode);                                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                       \
    int name(int folder, const char *path, int flags, ...) {               \
        va_list rest;                                                      \
        va_start(rest, flags);                                             \
        mode_t mode = va_arg(rest, mode_t);                                \
        va_end(rest);                                                      \
        if (flags & (O_CREAT | O_TRUNC)) CHANGE(folder, path, 1);          \
        REAL(name);                                                        \
        return real(folder, path, flags, mode);                            \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *bytes, size_t n) {
    REAL(write);
    CHANGE(file, NULL, 1);
    if (at && seen == at && kind == TORN && watched(file, NULL)) {
        real(file, bytes, n / 2);
        raise(SIGKILL);
    }
    return real(file, bytes, n);
}

ssize_t writev(int file, const struct iovec *parts, int n) {
    REAL(writev);
    CHANGE(file, NULL, 1);
    return real(file, parts, n);
}

int ftruncate(int file, off_t size) { REAL(ftruncate); CHANGE(file, NULL, 1); return real(file, size); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); CHANGE(file, NULL, 1); return real(file, size); }
int fsync(int file) { REAL(fsync); CHANGE(file, NULL, 1); return real(file); }
int fchmod(int file, mode_t mode) { REAL(fchmod); CHANGE(file, NULL, 0); return real(file, mode); }
int chmod(const char *path, mode_t mode) { REAL(chmod); CHANGE(AT_FDCWD, path, 0); return real(path, mode); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); CHANGE(AT_FDCWD, path, 1); return real(path, mode); }
int rmdir(const char *path) { REAL(rmdir); CHANGE(AT_FDCWD, path, 0); return real(path); }
int unlink(const char *path) { REAL(unlink); CHANGE(AT_FDCWD, path, 0); return real(path); }
int unlinkat(int folder, const char *path, int flags) { REAL(unlinkat); CHANGE(folder, path, 0); return real(folder, path, flags); }
int rename(const char *old, const char *new) { REAL(rename); CHANGE(AT_FDCWD, new, 1); return real(old, new); }
