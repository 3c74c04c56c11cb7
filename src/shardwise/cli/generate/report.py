"""What a run took, in a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.sizes import format_bytes


def lines(ranks: Sequence[dict[str, Any]], *, alike: bool) -> list[str]:
    """Words for what the ranks measured.

    Args:
        ranks: the facts of each; see :meth:`shardwise.cli.generate.measure.Meter.facts`.
        alike: all of them computed the same text, which counts once.
    """
    tokens = ranks[0]["tokens"] if alike else sum(r["tokens"] for r in ranks)
    seconds = max(r["seconds"] for r in ranks)
    first = [r["first_s"] for r in ranks if r["first_s"] is not None]
    out = [
        f"{tokens:,} token{'s' * (tokens != 1)} in {seconds:.2f} s: {tokens / max(seconds, 1e-9):,.1f} tokens/s"
        + (f", the first after {max(first):.2f} s" if first else "")
        + f" (loading: {max(r['load_s'] for r in ranks):.2f} s)",
        f"memory{_per_rank(ranks)}: {_memory(ranks)}",
    ]
    read, busy = sum(r["read"] for r in ranks), max(r["disk_busy_s"] for r in ranks)
    if read:
        rate = sum(r["read"] / max(r["disk_busy_s"], 1e-9) for r in ranks if r["read"])
        out.append(
            f"disk: {format_bytes(read / max(tokens, 1))} per token, read at {format_bytes(rate)}/s in {busy:.2f} s"
        )
    out.append(_bound(ranks))
    return out


def _per_rank(ranks: Sequence[dict[str, Any]]) -> str:
    return f", most of {len(ranks)} ranks" if len(ranks) > 1 else ""


def _memory(ranks: Sequence[dict[str, Any]]) -> str:
    def most(name: str) -> int:
        return max(r[name] or 0 for r in ranks)

    words = [f"host {format_bytes(most('host_peak'))} at most"]
    if any(r["device_peak"] is not None for r in ranks):
        words.append(f"device {format_bytes(most('device_peak'))} at most")
    for name, what in (("held_device", "weights held on the device"), ("held_host", "weights held on the host")):
        if most(name):
            words.append(f"{what} {format_bytes(most(name))}")
    words.append(f"streamed buffers {format_bytes(most('streamed_peak'))}")
    return ", ".join(words)


def _bound(ranks: Sequence[dict[str, Any]]) -> str:
    """What the time went to, on the rank that took longest."""
    slowest = max(ranks, key=lambda r: r["seconds"])
    whole = max(slowest["seconds"], 1e-9)
    disk, others = (min(1.0, slowest[name] / whole) for name in ("disk_wait_s", "ranks_wait_s"))
    shares = {"computing": max(0.0, 1 - disk - others), "waiting for the disk": disk, "waiting for other ranks": others}
    names = {"computing": "compute", "waiting for the disk": "disk", "waiting for other ranks": "the other ranks"}
    said = ", ".join(f"{share:.0%} {what}" for what, share in shares.items() if share >= 0.005)
    return f"bound by {names[max(shares, key=lambda name: shares[name])]}: {said}"
