"""What travels between host and guest: the frame format and the host's client."""
