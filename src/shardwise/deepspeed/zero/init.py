"""``zero.Init``: models that are built a part on each rank, with the values that ordinary construction gives them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwise.comm import World
from shardwise.deepspeed.comm import init_distributed
from shardwise.deepspeed.zero.constructors import Constructors
from shardwise.deepspeed.zero.probes import mark_parked, not_marked
from shardwise.deepspeed_config import load_ds_config, read_ds_config
from shardwise.engine.parked import ParkedValues
from shardwise.errors import ConfigError

_WHERE = "zero.Init"
_open: list[Init] = []  # the blocks around the code that runs; the outermost one counts, as in DeepSpeed
_lots: dict[tuple[World, str, str | None], ParkedValues] = {}


class Init:
    """A block in which each module's parameters are split over the ranks as soon as its constructor ends.

    Constructors run as they are written, so every value is what it would be without the block under the same seed, to
    the last bit, and rank 0's values count on every rank. In memory are this rank's parts, the module that is being
    made, and some MiB of what constructors use of modules that were made before: parameters come back when they are
    used, on every rank, and may be written to. ``initialize`` or ``fully_shard`` then brings one unit at a time.

    Blocks nest: the outermost counts. Unlike DeepSpeed's, the configuration's ``bf16`` or ``fp16`` does not round what
    is built: master values have all bits, and the engine computes in the dtype of its strategy.

    Args:
        module: a model that exists already; it is split at once, and no block is needed.
        config_dict_or_path, config: where parameters will be offloaded to is where their parts are kept.
        remote_device: the same, said here: ``cpu`` or ``nvme``. By default parts are where constructors
            make values.
        enabled: ``False``: the block does nothing.
        dtype: of the floating-point tensors that are made in the block without one of their own.
        data_parallel_group, sequence_data_parallel_group: all ranks; others are refused.
        mem_efficient_linear, pin_memory, mpu, param_swapper, tensor_overrides: nothing here depends on them.
        zero_param_parallel_group, zero_quantized_weights, zero_quantized_nontrainable_weights: refused if given.

    Raises:
        ConfigError: what is not served.

    Cost: a broadcast of each parameter from rank 0. On one rank without ``nvme`` nothing is moved.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        self.enabled, self.dtype = enabled, dtype
        self._blocks: list[tuple[Constructors | None, torch.dtype | None]] = []
        if zero_quantized_weights or zero_quantized_nontrainable_weights:
            raise ConfigError("zero_quantized_weights are not served", where=_WHERE, fix="use bf16")
        if zero_param_parallel_group is not None:
            raise ConfigError(
                "zero_param_parallel_group is not served", where=_WHERE, fix="use strategy='hsdp,shard_size=...'"
            )
        for group in (data_parallel_group, sequence_data_parallel_group):
            _require_all_ranks(group)
        self._where, self._path = _place(remote_device, config if config_dict_or_path is None else config_dict_or_path)
        if enabled:
            _world()
        if enabled and module is not None:
            self._parked(module.modules())

    def __enter__(self) -> Init:
        outermost = self.enabled and not _open
        if self.enabled:
            _open.append(self)
        before = None
        if self.enabled and self.dtype is not None and self.dtype.is_floating_point:
            before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
        constructors = (
            Constructors(lambda module: self._parked([module]), not_marked).__enter__() if outermost else None
        )
        self._blocks.append((constructors, before))
        return self

    def __exit__(self, *error: Any) -> None:
        constructors, before = self._blocks.pop()
        if before is not None:
            torch.set_default_dtype(before)
        if self.enabled:
            _open.remove(self)
        if constructors is not None:
            constructors.__exit__(*error)
            if error[0] is None and (lot := self._lot()).useful:
                lot.settle()  # what constructors used last
        elif self.enabled and error[0] is None and (outermost := _outermost()) is not None:
            outermost.flush()

    def _parked(self, modules: Iterable[nn.Module]) -> None:
        lot = self._lot()
        for module in modules:
            own = [(f"{type(module).__name__}.{name}", p) for name, p in module._parameters.items() if p is not None]
            if lot.useful:
                lot.park(own)
            mark_parked(p for _, p in own)

    def _lot(self) -> ParkedValues:
        world = _world()
        key = world, self._where, self._path
        if key not in _lots:
            for old in [k for k in _lots if k[0] is not world]:
                del _lots[old]
            _lots[key] = ParkedValues(world, self._where, self._path)
        return _lots[key]


class MiCS_Init(Init):
    """:class:`Init`, for a configuration with ``mics_shard_size``: ``initialize`` splits over groups of so many ranks.

    While a model is built, its parts are spread over all ranks.
    """


def _world() -> World:
    init_distributed()
    return World.current()


def shutdown_init_context() -> None:
    """Let modules that are made from here on be ordinary ones, until :func:`restore_init_context`."""
    if (constructors := _outermost()) is not None:
        constructors.__exit__(None, None, None)
        _shut.append(constructors)


def restore_init_context() -> None:
    """Undo :func:`shutdown_init_context`."""
    if _shut:
        _shut.pop().__enter__()


_shut: list[Constructors] = []


def _outermost() -> Constructors | None:
    return _open[0]._blocks[0][0] if _open else None


def _require_all_ranks(group: Any) -> None:
    if group is not None and dist.is_initialized() and dist.get_world_size(group) != dist.get_world_size():
        raise ConfigError(
            f"a group of {dist.get_world_size(group)} of {dist.get_world_size()} ranks: values are split over all of "
            "them",
            where=_WHERE,
            fix="leave data_parallel_group out, or use strategy='hsdp,shard_size=...'",
        )


def _place(remote_device: str | None, config: Any) -> tuple[str, str | None]:
    """Where parts are kept, and the folder on the disk."""
    found, path = "device", None
    if config is not None:
        facts = read_ds_config(*load_ds_config(config))
        found, path = facts.offload_params, facts.nvme_path
    if remote_device is not None:
        if str(remote_device) not in ("none", "cpu", "nvme"):
            raise ConfigError(
                f"remote_device={remote_device!r}", where=_WHERE, fix="'cpu', 'nvme', or leave it out for the device"
            )
        found = {"none": "device"}.get(str(remote_device), str(remote_device))
    return found, path if found == "nvme" else None
