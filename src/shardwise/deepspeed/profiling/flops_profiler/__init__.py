"""``deepspeed.profiling.flops_profiler``."""

from shardwise.deepspeed.profiling.flops_profiler.profiler import FlopsProfiler, get_model_profile

__all__ = ["FlopsProfiler", "get_model_profile"]
