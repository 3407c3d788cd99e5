// A real virtual CPU whose memory the pager serves: a guest of a few 32-bit instructions, which come out of the memory file, too.
//
//   vcpu code                               writes the guest's code to stdout; it belongs at the beginning of the memory file
//   vcpu run SOCKET MEMORY-FILE PAGES       runs it; status 0 if all that the guest saw was right, 3 if there is no /dev/kvm for us
//
// Three times over the guest reports by a port access: a checksum over a word of each 64 bytes of its memory (KVM may have to emulate
// each instruction, where no stock kernel boots); that it has written to every page of the upper
// half; a checksum again, after the host has removed some pages, which must be zeros then.
#include <linux/kvm.h>

#include "peer.h"

enum { STRIDE = 64 };

// esi: where, ecx: how many words, one each STRIDE bytes; the checksum comes in eax. Then: edi: where, edx: how many pages to write to.
extern const char guest_begin[], guest_sum[], guest_write[], guest_end[];
__asm__(
    ".pushsection .rodata\n"
    ".code32\n"
    "guest_begin:\n"
    "guest_sum:\n"
    "  xorl %eax, %eax\n"
    "1: rol $1, %eax\n"
    "  addl (%esi), %eax\n"
    "  addl $64, %esi\n"
    "  decl %ecx\n"
    "  jnz 1b\n"
    "  out %al, $16\n"
    "guest_write:\n"
    "1: movl %edi, (%edi)\n"
    "  addl $4096, %edi\n"
    "  decl %edx\n"
    "  jnz 1b\n"
    "  out %al, $17\n"
    "guest_end:\n"
    ".code64\n"
    ".popsection\n");

static uint32_t sum(const char *memory, size_t size) {
    uint32_t value = 0, word;
    for (size_t i = 0; i < size; i += STRIDE) {
        memcpy(&word, memory + i, 4);
        value = (value << 1 | value >> 31) + word;
    }
    return value;
}

static struct kvm_run *state;

// Runs the guest from `entry` to its next report on `port`; its registers then.
static struct kvm_regs guest(int vcpu, const char *entry, struct kvm_regs regs, int port) {
    regs.rip = entry - guest_begin, regs.rflags = 2;
    if (ioctl(vcpu, KVM_SET_REGS, &regs)) die("KVM_SET_REGS");
    while (ioctl(vcpu, KVM_RUN, 0)) {
        if (errno != EINTR) die("KVM_RUN");
    }
    if (state->exit_reason != KVM_EXIT_IO || state->io.port != port) {
        fprintf(stderr, "vcpu: exit %u instead of a report on port %d\n", state->exit_reason, port);
        exit(1);
    }
    if (ioctl(vcpu, KVM_GET_REGS, &regs)) die("KVM_GET_REGS");
    return regs;
}

static int make_vcpu(int kvm, char *memory, size_t size) {
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0) die("KVM_CREATE_VM");
    struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (uintptr_t)memory};
    if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot)) die("KVM_SET_USER_MEMORY_REGION");
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    if (vcpu < 0) die("KVM_CREATE_VCPU");
    state = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (state == MAP_FAILED) die("kvm_run");
    struct kvm_sregs sregs;
    if (ioctl(vcpu, KVM_GET_SREGS, &sregs)) die("KVM_GET_SREGS");
    // Flat 32-bit protected mode, no paging: Intel SDM volume 3, 3.4.5 for the fields.
    struct kvm_segment code = {.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
    struct kvm_segment data = code;
    data.selector = 16, data.type = 3;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 |= 1;
    if (ioctl(vcpu, KVM_SET_SREGS, &sregs)) die("KVM_SET_SREGS");
    return vcpu;
}

int main(int argc, char **argv) {
    if (argc == 2) return write(1, guest_begin, guest_end - guest_begin) < 0;
    size_t size = strtoul(argv[4], NULL, 10) * PAGE, half = size / 2;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) return 3;
    int fd = open(argv[3], O_RDONLY | O_CLOEXEC);
    char *expected = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (expected == MAP_FAILED || memory == MAP_FAILED) die("mmap");
    int uffd = make_uffd();
    register_range(uffd, memory, size);
    struct mapping map = {memory, size, 0};
    hand_over(argv[2], uffd, &map, 1, "");
    int vcpu = make_vcpu(kvm, memory, size);

    struct kvm_regs all = {.rsi = 0, .rcx = size / STRIDE}, upper = {.rdi = half, .rdx = half / PAGE};
    uint32_t wanted[3], seen[3];
    wanted[0] = sum(expected, size), seen[0] = guest(vcpu, guest_sum, all, 16).rax;
    guest(vcpu, guest_write, upper, 17);
    for (size_t at = half; at < size; at += PAGE) memcpy(expected + at, &(uint32_t){at}, 4);
    wanted[1] = sum(expected, size), seen[1] = sum(memory, size);
    // Parts of both halves, also of what was written.
    for (size_t at = PAGE; at < size; at += size / 8) {
        if (madvise(memory + at, 3 * PAGE, MADV_DONTNEED)) die("madvise");
        memset(expected + at, 0, 3 * PAGE);
    }
    wanted[2] = sum(expected, size), seen[2] = guest(vcpu, guest_sum, all, 16).rax;
    for (int i = 0; i < 3; i++) printf("%08x %08x\n", wanted[i], seen[i]);
    return memcmp(wanted, seen, sizeof wanted) || memcmp(memory, expected, size);
}
