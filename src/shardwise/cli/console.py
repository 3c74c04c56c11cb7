"""Where the command writes: results to stdout, everything said along the way to stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One message on stderr, unstyled: what it contains (paths, brackets) is shown as it is."""
    print(text, file=sys.stderr, flush=True)


def show_cursor() -> None:
    """Bring the cursor back on a terminal whose progress bar was ended by a signal."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")
        sys.stderr.flush()
