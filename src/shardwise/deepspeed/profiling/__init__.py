"""``deepspeed.profiling``."""

from shardwise.lazy import importing

__getattr__ = importing(__name__, {}, ("flops_profiler",))
