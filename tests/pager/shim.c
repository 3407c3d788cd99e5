// Preloaded into QEMU: replaces its mapping of the guest's RAM file by anonymous memory whose faults the pager serves, and hands the
// userfaultfd over as Firecracker does. So the real guest runs on the real pager, on a machine where Firecracker cannot.
//
//   DHG_SHIM_MEMORY=PATH  the RAM file       DHG_SHIM_SOCKET=PATH  where the pager listens
#include <dlfcn.h>
#include <sys/stat.h>

#include "peer.h"

typedef void *map_function(void *, size_t, int, int, int, off_t);

static int is_ram(int fd) {
    struct stat given, wanted;
    const char *path = getenv("DHG_SHIM_MEMORY");
    return fd >= 0 && path && !fstat(fd, &given) && !stat(path, &wanted) && given.st_dev == wanted.st_dev &&
           given.st_ino == wanted.st_ino;
}

static void *map(void *wish, size_t size, int protection, int flags, int fd, off_t offset) {
    map_function *real = (map_function *)dlsym(RTLD_NEXT, "mmap64");
    if (!(flags & MAP_PRIVATE) || !(protection & PROT_WRITE) || !is_ram(fd))
        return real(wish, size, protection, flags, fd, offset);
    char *found = real(wish, size, protection, flags | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return found;
    int uffd = make_uffd();
    register_range(uffd, found, size);
    struct mapping whole = {found, size, offset};
    hand_over(getenv("DHG_SHIM_SOCKET"), uffd, &whole, 1, "");
    return found;
}

void *mmap64(void *wish, size_t size, int protection, int flags, int fd, off_t offset) {
    return map(wish, size, protection, flags, fd, offset);
}

void *mmap(void *wish, size_t size, int protection, int flags, int fd, off_t offset) {
    return map(wish, size, protection, flags, fd, offset);
}
