"""Numbers of bytes in words, both ways."""

from __future__ import annotations

import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def format_bytes(nbytes: float) -> str:
    """``nbytes`` for people: ``3.2 GB``, in powers of 1000 as disks are sold."""
    for unit in ("TB", "GB", "MB", "KB"):
        if nbytes >= _UNITS[unit]:
            return f"{nbytes / _UNITS[unit]:,.1f} {unit}"
    return f"{nbytes:.0f} B"


def format_count(number: float) -> str:
    """A number of things for people: ``6.74 B`` (billions), ``124.4 M``, ``33.1 K``."""
    for factor, unit, digits in ((1e9, " B", 2), (1e6, " M", 1), (1e3, " K", 1)):
        if number >= factor:
            return f"{number / factor:,.{digits}f}{unit}"
    return f"{number:.0f}"


def parse_bytes(text: int | str) -> int | None:
    """``500MB`` or ``10GiB`` in bytes; ``None`` if it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        return None
    return int(float(match[1]) * _UNITS[match[2].upper()])
