"""Numbers as people read them."""

from __future__ import annotations

from shardwise.report.facts import Fact
from shardwise.sizes import format_bytes


def in_words(value: Fact | float | None, unit: str = "") -> str:
    """``12.3 ms``, ``4.6 GB``, ``1,234 tokens/s``; a dash for what is not known."""
    if isinstance(value, Fact):
        if value.name == "MFU" and value.value is not None:
            return f"{value.value:.1%}"
        return in_words(value.value, value.unit)
    if value is None:
        return "–"
    if unit == "bytes":
        return format_bytes(value)
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    if unit.endswith("/s"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}{' ' * bool(unit)}{unit}"
