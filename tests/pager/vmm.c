// A stand-in for Firecracker as the pager sees it: maps guest memory in several regions, creates the userfaultfd, agrees on the
// API (with EVENT_REMOVE), registers, and sends the one message. Then it plays the guest and its balloon.
//
//   vmm SOCKET MEMORY-FILE HANDSHAKE PAGES... -- run SEED MILLISECONDS THREADS   random schedule, every byte checked
//   vmm SOCKET MEMORY-FILE HANDSHAKE PAGES... -- ask                             commands on stdin, one answer a line
//
// PAGES are the sizes of the regions in pages; they follow each other in the file. HANDSHAKE: see peer.h.
//
// What a page may hold: its content in the file, until it is removed or written to; zeros after a removal; what was written last. Blocks
// of 16 pages are of two kinds. In a "locked" one each access holds the page's lock, and the content must be exactly what is
// expected. In a "free" one reads and removals run into each other: a read that began after a removal had returned must see zeros, one
// that saw zeros must not have been alone, and a page that turns to zeros while it is read must not turn back.
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "peer.h"

enum { BLOCK = 16, MAX_REGIONS = 8 };
enum { ORIGINAL, ZERO, WRITTEN };

struct page {
    pthread_mutex_t lock;
    int state;                 // of a locked page
    uint64_t stamp;            // what was written
    atomic_int started, done;  // removals of a free page
};

static char *base[MAX_REGIONS];
static size_t pages_of[MAX_REGIONS], first_of[MAX_REGIONS], total;
static int regions;
static struct page *pages;
static const char *file;  // the memory file, zeros after its end
static uint64_t ends_ns, operations;

static void wrong(size_t page, const char *what) {
    fprintf(stderr, "vmm: page %zu: %s\n", page, what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t rnd(uint64_t *state) {
    uint64_t x = *state;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return *state = x;
}

static char *at(size_t page) {
    int r = 0;
    while (page >= first_of[r] + pages_of[r]) r++;
    return base[r] + (page - first_of[r]) * PAGE;
}

// The end of the region that a page is in.
static size_t region_end(size_t page) {
    int r = 0;
    while (page >= first_of[r] + pages_of[r]) r++;
    return first_of[r] + pages_of[r];
}

static int is_free(size_t page) { return (page / BLOCK * 2654435761u >> 8) % 4 == 0; }

// A guard page around each: the regions do not touch.
static char *make_region(size_t count) {
    char *found = mmap(NULL, (count + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) die("mmap");
    if (mprotect(found + PAGE, count * PAGE, PROT_READ | PROT_WRITE)) die("mprotect");
    return found + PAGE;
}

static void check(size_t page, const char *seen) {
    struct page *p = &pages[page];
    const char *original = file + page * PAGE;
    if (p->state == ORIGINAL && memcmp(seen, original, PAGE)) wrong(page, "not what the file has");
    for (size_t i = 0; p->state != ORIGINAL && i < PAGE; i += 8) {
        uint64_t word;
        memcpy(&word, seen + i, 8);
        if (p->state == ZERO && word) wrong(page, "not zeros after its removal");
        if (p->state == WRITTEN && word != p->stamp) wrong(page, "not what was written");
    }
}

static void check_free(size_t page) {
    struct page *p = &pages[page];
    int done = atomic_load(&p->done);
    const volatile uint64_t *seen = (void *)at(page);
    const uint64_t *original = (void *)(file + page * PAGE);
    int zeros = 0;
    for (size_t i = 0; i < PAGE / 8; i++) {
        uint64_t word = seen[i];
        if (word == original[i] && (word || !zeros)) {
            if (word && zeros) wrong(page, "old content came back while it was read");
            if (word && done) wrong(page, "old content after its removal");
        } else if (word == 0) {
            zeros = 1;
        } else {
            wrong(page, "neither what the file has nor zeros");
        }
    }
    if (zeros && !atomic_load(&p->started)) wrong(page, "zeros without a removal");
}

static void removal(size_t first, size_t count) {
    if (madvise(at(first), count * PAGE, MADV_DONTNEED)) die("madvise");
}

static void locked_operation(size_t page, uint64_t choice, uint64_t *seed, int scratch) {
    if (choice < 12) {
        size_t count = 0, most = 1 + rnd(seed) % BLOCK;
        while (count < most && page + count < region_end(page) && !is_free(page + count) &&
               !pthread_mutex_trylock(&pages[page + count].lock))
            count++;
        if (count) removal(page, count);
        for (size_t i = 0; i < count; i++) {
            pages[page + i].state = ZERO;
            pthread_mutex_unlock(&pages[page + i].lock);
        }
        return;
    }
    struct page *p = &pages[page];
    if (pthread_mutex_trylock(&p->lock)) return;
    if (choice < 60) {
        check(page, at(page));
    } else if (choice < 70) {
        // The kernel touches it for us, as it does for a disk's buffers.
        char copy[PAGE];
        if (pwrite(scratch, at(page), PAGE, 0) != PAGE || pread(scratch, copy, PAGE, 0) != PAGE) die("scratch");
        check(page, copy);
    } else if (choice < 78) {
        // ... and writes to it without looking at it first.
        uint64_t words[PAGE / 8];
        p->stamp = rnd(seed), p->state = WRITTEN;
        for (size_t i = 0; i < PAGE / 8; i++) words[i] = p->stamp;
        if (pwrite(scratch, words, PAGE, 0) != PAGE || pread(scratch, at(page), PAGE, 0) != PAGE) die("scratch");
    } else {
        p->stamp = rnd(seed), p->state = WRITTEN;
        uint64_t *words = (void *)at(page);
        for (size_t i = 0; i < PAGE / 8; i++) words[i] = p->stamp;
    }
    pthread_mutex_unlock(&p->lock);
}

static void free_operation(size_t page, uint64_t choice, uint64_t *seed) {
    if (choice >= 15) {
        check_free(page);
        return;
    }
    size_t count = 0, most = 1 + rnd(seed) % BLOCK;
    while (count < most && page + count < region_end(page) && is_free(page + count)) count++;
    for (size_t i = 0; i < count; i++) atomic_store(&pages[page + i].started, 1);
    removal(page, count);
    for (size_t i = 0; i < count; i++) atomic_store(&pages[page + i].done, 1);
}

static void *guest(void *argument) {
    uint64_t seed = (uintptr_t)argument, count = 0;
    int scratch = memfd_create("scratch", MFD_CLOEXEC);
    size_t page = rnd(&seed) % total;
    while (now_ns() < ends_ns) {
        // Runs of neighbours, as programs have them, and jumps.
        page = rnd(&seed) % 8 ? (page + 1) % total : rnd(&seed) % total;
        uint64_t choice = rnd(&seed) % 100;
        if (is_free(page)) free_operation(page, choice, &seed);
        else locked_operation(page, choice, &seed, scratch);
        count++;
    }
    close(scratch);
    __atomic_fetch_add(&operations, count, __ATOMIC_SEQ_CST);
    return NULL;
}

static int run(uint64_t seed, uint64_t milliseconds, int threads) {
    pthread_t ids[64];
    ends_ns = now_ns() + milliseconds * 1000000;
    for (int i = 0; i < threads; i++) {
        uint64_t own = (seed * 64 + i + 1) * 0x9e3779b97f4a7c15u;
        if (pthread_create(&ids[i], NULL, guest, (void *)(uintptr_t)(own | 1))) die("pthread_create");
    }
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    // Nobody else is at it any more: every byte of every page.
    for (size_t page = 0; page < total; page++) {
        if (is_free(page)) pages[page].state = atomic_load(&pages[page].done) ? ZERO : ORIGINAL;
        check(page, at(page));
    }
    printf("%llu operations, %zu pages right\n", (unsigned long long)operations, total);
    return 0;
}

// Whether each of some pages is there, from the kernel's page tables.
static void print_present(size_t first, size_t count) {
    int maps = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    for (size_t i = 0; i < count; i++) {
        uint64_t entry = 0;
        if (pread(maps, &entry, 8, (uintptr_t)at(first + i) / PAGE * 8) != 8) die("pagemap");
        putchar(entry >> 63 ? '1' : '0');
    }
    putchar('\n');
    close(maps);
}

static int ask(void) {
    char line[128], verb;
    size_t first, count;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, " %c %zu %zu", &verb, &first, &count) != 3) return 2;
        if (verb == 'r') {  // read: prints `same` or `zero` or `other`, one a page
            for (size_t i = first; i < first + count; i++) {
                static const char zeros[PAGE];
                const char *seen = at(i);
                int zero = !memcmp(seen, zeros, PAGE), same = !memcmp(seen, file + i * PAGE, PAGE);
                printf("%s ", zero ? "zero" : same ? "same" : "other");
            }
            putchar('\n');
        } else if (verb == 't') {  // touch, and say what is there
            for (size_t i = first; i < first + count; i++) printf("%d ", *(volatile char *)at(i));
            putchar('\n');
        } else if (verb == 'd') {
            removal(first, count);
            puts("done");
        } else if (verb == 'p') {
            print_present(first, count);
        }
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv) {
    int next = 4;
    for (; next < argc && strcmp(argv[next], "--"); next++) pages_of[regions++] = strtoul(argv[next], NULL, 10);
    int uffd = make_uffd();
    struct mapping maps[MAX_REGIONS];
    for (int r = 0; r < regions; r++) {
        base[r] = make_region(pages_of[r]);
        register_range(uffd, base[r], pages_of[r] * PAGE);
        maps[r] = (struct mapping){base[r], pages_of[r] * PAGE, total * PAGE};
        first_of[r] = total, total += pages_of[r];
    }
    // The file may end within the last page; what is mapped of it after that reads as zeros.
    int fd = open(argv[2], O_RDONLY | O_CLOEXEC);
    file = mmap(NULL, total * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file == MAP_FAILED) die("memory file");
    pages = calloc(total, sizeof *pages);
    for (size_t i = 0; i < total; i++) pthread_mutex_init(&pages[i].lock, NULL);
    hand_over(argv[1], uffd, maps, regions, argv[3]);
    // Like Firecracker it keeps its copy: with the last one closed, the kernel would go on with zeros where the pager is gone.
    if (!strcmp(argv[next + 1], "ask")) return ask();
    return run(strtoull(argv[next + 2], NULL, 10), strtoull(argv[next + 3], NULL, 10), atoi(argv[next + 4]));
}
