/* Preloaded into a process, lets its K-th chosen call on a path fail or kill it.

   FAULTS_CALLS   names with commas, of those below; "fsync" covers fdatasync, "write" all writes
   FAULTS_PATH    only calls on paths that hold this
   FAULTS_AT      the first call that is hit, from 1; 0 hits none
   FAULTS_COUNT   how many are hit from there on
   FAULTS_ERROR   the errno they give; 0 kills the process before the call
   FAULTS_LOG     a file that gets a line for each call counted */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int counted;

static int number(const char *name) {
    const char *value = getenv(name);
    return value ? atoi(value) : 0;
}

static int hit(const char *call, const char *path) {
    const char *calls = getenv("FAULTS_CALLS"), *part = getenv("FAULTS_PATH");
    if (!calls || !part || !strstr(calls, call) || !path || !strstr(path, part)) return 0;
    int n = atomic_fetch_add(&counted, 1) + 1, at = number("FAULTS_AT");
    const char *log = getenv("FAULTS_LOG");
    if (log) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        int file = syscall(SYS_open, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        syscall(SYS_write, file, line, length);
        syscall(SYS_close, file);
    }
    if (!at || n < at || n >= at + number("FAULTS_COUNT")) return 0;
    if (!number("FAULTS_ERROR")) kill(getpid(), SIGKILL);
    errno = number("FAULTS_ERROR");
    return 1;
}

static int hit_file(const char *call, int file) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return hit(call, path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int rename(const char *from, const char *to) {
    return hit("rename", from) ? -1 : NEXT(rename)(from, to);
}
int renameat(int at, const char *from, int to_at, const char *to) {
    return hit("rename", from) ? -1 : NEXT(renameat)(at, from, to_at, to);
}
int renameat2(int at, const char *from, int to_at, const char *to, unsigned int flags) {
    return hit("rename", from) ? -1 : NEXT(renameat2)(at, from, to_at, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    return hit("mkdir", path) ? -1 : NEXT(mkdir)(path, mode);
}
int fsync(int file) { return hit_file("fsync", file) ? -1 : NEXT(fsync)(file); }
int fdatasync(int file) { return hit_file("fsync", file) ? -1 : NEXT(fdatasync)(file); }
ssize_t write(int file, const void *data, size_t size) {
    return hit_file("write", file) ? -1 : NEXT(write)(file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return hit_file("write", file) ? -1 : NEXT(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return hit_file("write", file) ? -1 : NEXT(pwrite64)(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return hit_file("write", file) ? -1 : NEXT(writev)(file, parts, count);
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    return hit_file("write", file) ? -1 : NEXT(pwritev)(file, parts, count, at);
}
