"""What a program has written to a terminal."""

from __future__ import annotations

import os
import select


def written(ours: int, patience_s: float = 1.0) -> str:
    """All of it, of a pseudo terminal: the kernel hands it over in pieces, some a moment later.

    Args:
        ours: the file descriptor of this side.
        patience_s: after the last piece.
    """
    found = b""
    while select.select([ours], [], [], patience_s)[0]:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        found += piece
    return found.decode()
