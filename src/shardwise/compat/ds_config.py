"""What a DeepSpeed configuration means here; see :mod:`shardwise.deepspeed_config`."""

from shardwise.deepspeed_config import DsFacts, load_ds_config, read_ds_config

__all__ = ["DsFacts", "load_ds_config", "read_ds_config"]
