"""Shardwise, where a script says ``accelerate``: see :func:`shardwise.install_as`.

The modules below this one are Shardwise's own, not copies. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

if importlib.util.find_spec("shardwise") is None:  # a child that was told of this folder alone
    sys.path.append(str(Path(__file__).resolve().parents[4]))

from shardwise.aliases import VERSIONS, forwarding
from shardwise.aliases.users import check_users

__version__ = VERSIONS["accelerate"]
_NAMES = {
    "shardwise": (
        "Accelerator", "AutocastKwargs", "DDPCommunicationHookType", "DataLoaderConfiguration", "DeepSpeedPlugin",
        "DistributedDataParallelKwargs", "DistributedType", "FullyShardedDataParallelPlugin", "GradScalerKwargs",
        "InitProcessGroupKwargs", "PartialState", "ProfileKwargs", "cpu_offload", "cpu_offload_with_hook",
        "debug_launcher", "disk_offload", "dispatch_model", "find_executable_batch_size", "infer_auto_device_map",
        "init_empty_weights", "init_on_device", "load_checkpoint_and_dispatch", "notebook_launcher",
        "skip_first_batches", "synchronize_rng_states",
    ),
    "shardwise.utils": ("ParallelismConfig", "is_rich_available", "load_checkpoint_in_model", "prepare_pippy"),
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = {name.split(".")[1] for name in forwarding.HOMES if name.count(".") == 1}
__all__ = [name for name in _HOME if name != "prepare_pippy"]

forwarding.forward()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"accelerate.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'accelerate' has no attribute {name!r}")
    check_users()  # here, since names are kept nowhere: whoever imports one is looked at
    return forwarding.named(_HOME[name], name, sys._getframe(1))


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
