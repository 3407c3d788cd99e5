"""Serves the memory of a restored VM page by page over userfaultfd, in a process of its own."""
