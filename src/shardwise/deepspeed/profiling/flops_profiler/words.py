"""Numbers as people read them."""

from __future__ import annotations

_PREFIXES = ("", "K", "M", "G", "T", "P", "E")


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """``1.5 M`` for 1,500,000; ``units`` chooses the prefix."""
    power = 0
    while units is None and abs(num) >= 1000 and power < len(_PREFIXES) - 1:
        num, power = num / 1000, power + 1
    if units is not None:
        power = _PREFIXES.index(units)
        num /= 1000**power
    return f"{num:.{precision}f} {_PREFIXES[power]}".rstrip()


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    return f"{number_to_string(flops, units, precision)} FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    return f"{number_to_string(macs, units, precision)} MACs"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    return number_to_string(params_num, units, precision)


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """``1.50 ms`` for 0.0015."""
    scale, name = next(((s, n) for s, n in ((1.0, "s"), (1e-3, "ms")) if duration >= s), (1e-6, "us"))
    return f"{duration / scale:.{precision}f} {name}"
