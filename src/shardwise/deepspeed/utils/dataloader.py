"""``RepeatingLoader``, where ``deepspeed.utils`` has it."""

from shardwise.deepspeed.runtime.dataloader import RepeatingLoader

__all__ = ["RepeatingLoader"]
