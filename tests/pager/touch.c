// The benchmark's guest: touches pages of a memory file in a given order, one thread, and says how long that took.
//
//   touch SOCKET MEMORY-FILE PAGES READY-FD     served by the pager; it begins when READY-FD says so
//   touch - MEMORY-FILE PAGES -1                a private mapping of the file, which the kernel pages in
//
// The pages come on stdin, 4 bytes each in host order; the top bit says: write to it. Output: nanoseconds from the beginning of the
// handshake (or of the mapping) to the first instruction, and from there to the end; a checksum of what was read.
#include <time.h>

#include "peer.h"

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    size_t size = strtoul(argv[3], NULL, 10) * PAGE, count = 0;
    static uint32_t order[1 << 20];
    ssize_t got;
    while ((got = read(0, (char *)order + count, sizeof order - count)) > 0) count += got;
    count /= 4;
    uint64_t began = now_ns();
    char *memory;
    if (argv[1][0] == '-') {
        memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, open(argv[2], O_RDONLY | O_CLOEXEC), 0);
        if (memory == MAP_FAILED) die("mmap");
    } else {
        memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) die("mmap");
        int uffd = make_uffd();
        register_range(uffd, memory, size);
        struct mapping map = {memory, size, 0};
        hand_over(argv[1], uffd, &map, 1, "");
        // The pager says `ready` when what is to be there before the guest resumes is there.
        char line[16];
        if (read(atoi(argv[4]), line, sizeof line) <= 0) return 3;
    }
    uint64_t first = now_ns();
    uint32_t sum = 0, word;
    for (size_t i = 0; i < count; i++) {
        char *page = memory + (size_t)(order[i] & 0x7fffffff) * PAGE;
        memcpy(&word, page + 64, 4);
        sum = (sum << 1 | sum >> 31) + word;
        if (order[i] >> 31) page[128] = 1;
    }
    uint64_t last = now_ns();
    printf("%llu %llu %u\n", (unsigned long long)(first - began), (unsigned long long)(last - first), sum);
    return 0;
}
