// What a VMM does with a userfaultfd before it hands it over, as Firecracker does it. For the stand-ins beside this file.
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct mapping {
    char *base;
    size_t size, offset;  // bytes
};

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    _exit(2);
}

// A userfaultfd that reports removals.
static int make_uffd(void) {
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0) die("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    if (ioctl(uffd, UFFDIO_API, &api)) die("UFFDIO_API");
    return uffd;
}

static void register_range(int uffd, char *base, size_t size) {
    struct uffdio_register range = {.range = {(uintptr_t)base, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_REGISTER, &range)) die("UFFDIO_REGISTER");
}

static void send_piece(int sock, const char *data, size_t size, int fd) {
    struct iovec part = {(void *)data, size};
    char control[CMSG_SPACE(sizeof fd)] = {0};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control, message.msg_controllen = sizeof control;
        struct cmsghdr *head = CMSG_FIRSTHDR(&message);
        head->cmsg_level = SOL_SOCKET, head->cmsg_type = SCM_RIGHTS, head->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(head), &fd, sizeof fd);
    }
    if (sendmsg(sock, &message, MSG_NOSIGNAL) != (ssize_t)size) die("sendmsg");
}

// Connects and sends the message. `how` is letters: s (split into pieces), l (late), f (the descriptor with the last piece),
// k (page_size_kib only), x (no more than half of it, then hang up).
static void hand_over(const char *path, int uffd, const struct mapping *maps, int count, const char *how) {
    char text[4096];
    size_t size = 0;
    text[size++] = '[';
    for (int r = 0; r < count; r++) {
        size += sprintf(text + size, "%s{\"base_host_virt_addr\":%llu,\"size\":%zu,\"offset\":%zu,", r ? "," : "",
                        (unsigned long long)(uintptr_t)maps[r].base, maps[r].size, maps[r].offset);
        if (!strchr(how, 'k')) size += sprintf(text + size, "\"page_size\":%d,", PAGE);
        size += sprintf(text + size, "\"page_size_kib\":%d}", PAGE);
    }
    text[size++] = ']';
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(sock, (struct sockaddr *)&address, sizeof address)) die("connect");
    if (strchr(how, 'l')) usleep(150000);
    if (strchr(how, 'x')) {
        send_piece(sock, text, size / 2, uffd);
        close(sock);
        pause();
    }
    if (!strchr(how, 's')) {
        send_piece(sock, text, size, uffd);
        return;
    }
    size_t sent = 0, piece = size / 3;
    for (int part = 0; part < 3; part++) {
        size_t length = part == 2 ? size - sent : piece;
        int here = strchr(how, 'f') ? part == 2 : part == 0;
        send_piece(sock, text + sent, length, here ? uffd : -1);
        sent += length;
        usleep(5000);
    }
}
