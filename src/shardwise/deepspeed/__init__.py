"""DeepSpeed's calls over the sharding engine: ``import shardwise.deepspeed as deepspeed`` is the change.

::

    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json", ...)
    for batch in loader:
        loss = engine(batch)
        engine.backward(loss)
        engine.step()

DeepSpeed itself is not needed. Names are imported when they are first used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from shardwise.deepspeed.refused import NAMES, error
from shardwise.lazy import importing

if TYPE_CHECKING:
    from shardwise.deepspeed.comm import init_distributed
    from shardwise.deepspeed.engine import DeepSpeedEngine
    from shardwise.deepspeed.starting import initialize

__version__ = "0.19.8"  # of the DeepSpeed whose names these are: libraries compare it
version = __version__
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8
__git_hash__ = __git_branch__ = None  # as in a DeepSpeed that was not built from a repository
_HOME = {
    "DeepSpeedConfig": "config",
    "DeepSpeedConfigError": "config",
    "DeepSpeedEngine": "engine",
    "OnDevice": "utils",
    "PipelineModule": "pipe",
    "RepeatingLoader": "runtime.dataloader",
    "add_config_arguments": "config",
    "add_tuning_arguments": "runtime.lr_schedules",
    "get_accelerator": "accelerator",
    "init_distributed": "comm",
    "initialize": "starting",
    "log_dist": "utils",
    "logger": "utils",
}
_MODULES = (
    "accelerator", "checkpoint", "checkpointing", "comm", "config", "moe", "monitor", "ops", "pipe", "profiling",
    "runtime", "utils", "zero",
)  # fmt: skip
__all__ = ["DeepSpeedEngine", "init_distributed", "initialize"]
_named = importing(__name__, _HOME, _MODULES)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        raise error(name, importing=sys._getframe(1).f_code.co_name == "_handle_fromlist")
    return _named(name)
