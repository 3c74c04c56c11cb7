"""Meters: what is live, what was sent, what a strategy should cost."""

from shardwise.observe.stats import Stats, expected, stats

__all__ = ["Stats", "expected", "stats"]
