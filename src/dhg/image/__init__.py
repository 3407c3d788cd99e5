"""What a VM boots from: kernel, initramfs and root file system, each built once and cached under its key."""
