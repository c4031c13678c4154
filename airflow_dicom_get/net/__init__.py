"""The association over a blocking socket, and echo, find and get on it."""
