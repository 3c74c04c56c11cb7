"""``deepspeed.runtime.activation_checkpointing``."""

from shardwise.lazy import importing

__getattr__ = importing(__name__, {}, ("checkpointing",))
