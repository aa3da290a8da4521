"""Bytes that are the same for the same seed, and comparing them."""

import hashlib
import random


def pattern(size, seed=0):
    """size pseudo-random bytes."""
    return random.Random(f"p2pfs {seed}").randbytes(size)


def write_file(path, size, seed=0, piece=8 << 20):
    """Writes pattern bytes piece by piece, so that large files need little memory."""
    source = random.Random(f"p2pfs {seed}")
    with open(path, "wb") as out:
        while size > 0:
            out.write(source.randbytes(min(piece, size)))
            size -= min(piece, size)
    return path


def digest(path, piece=1 << 20):
    """SHA-256 of a file, as hexadecimal text."""
    hasher = hashlib.sha256()
    with open(path, "rb", buffering=0) as source:
        while chunk := source.read(piece):
            hasher.update(chunk)
    return hasher.hexdigest()
