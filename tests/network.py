"""Addresses for tests that talk to themselves: loopback alone."""

import socket


def free_address() -> str:
    """HOST:PORT of a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
