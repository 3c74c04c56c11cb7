"""``deepspeed.checkpointing``, where it is defined there."""

from shardwise.deepspeed.checkpointing import *  # noqa: F403
from shardwise.deepspeed.checkpointing import __all__ as __all__
