"""Where DeepSpeed's monitors write, on the trackers of this library."""

from __future__ import annotations

from shardwise.lazy import importing

_HOMES = {"MonitorMaster": "monitor", "get_monitor_config": "config"}

__getattr__ = importing(__name__, _HOMES, ("config", "monitor"))
__all__ = ["MonitorMaster", "get_monitor_config"]
