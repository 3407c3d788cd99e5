"""The host's directories for a VM: the server that answers the guest's file system, and how it is started."""
