"""What a DeepSpeed configuration means here: the one reader of such files, for every door.

Every key that DeepSpeed has is a row of a table (:mod:`.top_keys`, :mod:`.zero_keys`, :mod:`.section_keys`). A key in
none of them is an error that names it, so nothing is dropped silently.
"""

from shardwise.deepspeed_config.batch import resolved_batch
from shardwise.deepspeed_config.facts import DsFacts, LossScaling
from shardwise.deepspeed_config.reading import read_ds_config
from shardwise.deepspeed_config.source import load_ds_config
from shardwise.deepspeed_config.tables import all_keys

__all__ = ["DsFacts", "LossScaling", "all_keys", "load_ds_config", "read_ds_config", "resolved_batch"]
