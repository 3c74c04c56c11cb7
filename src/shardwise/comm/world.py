"""The world: this process, and its process groups and meshes.

There is one :class:`World` per default process group, as there is one default process group per process.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardwise import device as devices
from shardwise.comm.faults import Faults, install_excepthook
from shardwise.comm.group import Group
from shardwise.comm.mesh import Mesh, build_mesh
from shardwise.comm.process import Process
from shardwise.comm.shared_memory import SharedMemory
from shardwise.environment import CPU
from shardwise.errors import CommError, StrategyError, first_line


def init(device: str | torch.device | None = None, *, timeout: float = 600.0) -> World:
    """Join the process group that the launcher prepared, and return the :class:`World`.

    Args:
        device: any device type that torch has (``cuda``, which is ROCm too, ``xpu``, ``mps`` for one rank, what a
            plug-in registers, ``cpu``), with or without a number; it becomes this process's current one. By default
            this rank's own: the accelerator of number ``LOCAL_RANK``, or the CPU where there is none.
        timeout: seconds before the rendezvous itself gives up.

    Without a launcher (``WORLD_SIZE`` unset or 1) this is a world of one rank and no process group.
    A process group that the script made itself is used as it is.

    Raises:
        CommError: the launcher's variables are incomplete, or the other ranks did not come.
        DeviceError: the device is not there, or cannot do this. The CPU is never taken instead.
    """
    if World._planned is not None:
        return World._planned
    found = devices.named(device) if device is not None else default_device()
    devices.use(found)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
        if missing:
            raise CommError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {', '.join(missing)} is not",
                fix="start the script with 'shardwise launch' or torchrun",
            )
        backend = devices.backend(found, int(os.environ["WORLD_SIZE"]))
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **_after_a_restart(timeout))
            World.current(found).faults.meet(timeout)
        except RuntimeError as error:
            raise CommError(
                f"the {os.environ['WORLD_SIZE']} ranks did not find each other: {first_line(error)}",
                where=f"rank {os.environ['RANK']}",
                fix="check that all ranks started and that MASTER_ADDR:MASTER_PORT is reachable",
            ) from error
    return World.current(found)


def _after_a_restart(timeout: float) -> dict[str, Any]:
    """Where ranks that an elastic agent started anew meet.

    The agent's store outlives them, and what the ranks before wrote there, their addresses too, is no longer true.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False, timeout=timedelta(seconds=timeout))
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": size}


def default_device() -> torch.device:
    """This rank's device: see :func:`shardwise.device.of_rank`; the CPU if the launcher was told so."""
    return devices.CPU if os.environ.get(CPU) == "1" else devices.of_rank()


class World(Process):
    """This process, and the groups and meshes that were made in its default process group."""

    _current: World | None = None
    _planned: World | None = None  # in whose place all that asks for the current one works

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._groups: dict[object, Group] = {}
        self._meshes: dict[object, Mesh] = {}
        if not self.fake:
            install_excepthook(World._current_faults)

    @classmethod
    def _current_faults(cls) -> Faults | None:
        return None if cls._current is None else cls._current.faults

    def leave(self) -> None:
        """Let go of all groups, whatever is under way in them."""
        for group in self._groups.values():
            group.pg = None
        self._groups.clear()
        self._meshes.clear()
        self.default_pg = self.memory = self._abandoned = None

    @classmethod
    def current(cls, device: torch.device | None = None) -> World:
        """The World of the present default process group; made anew when that changed."""
        if cls._planned is not None:
            return cls._planned
        pg = dist.group.WORLD if dist.is_initialized() else None
        if cls._current is None or cls._current.default_pg is not pg:
            if cls._current is not None:
                cls._current.faults.stop()
            cls._current = cls(device or torch.device("cpu"))
        return cls._current

    def _make(self, partition: list[list[int]], device: torch.device, timeout: float) -> Group:
        """One group per list of ranks (every rank makes all of them); returns the one of this rank."""
        key = (str(partition), device.type, timeout)
        if key in self._groups:
            return self._groups[key]
        mine = next(ranks for ranks in partition if self.rank in ranks)
        if self.size == 1:
            group = Group(self, mine, None, False)
        elif self.fake:
            group = Group(self, mine, dist.new_group(mine, backend="fake"), builtin=device.type != "cpu")
        else:
            backend, pg = self._backend(device), None
            for ranks in partition:
                new = dist.new_group(ranks, backend=backend, timeout=timedelta(seconds=timeout))
                pg = new if ranks == mine else pg
            if not self._groups:
                self.memory = SharedMemory(self.rank, self.size, self.faults.share)
            self.faults.meet(timeout)
            group = Group(self, mine, pg, builtin=device.type != "cpu")
        self._groups[key] = group
        return group

    def _backend(self, device: torch.device) -> str:
        """What the process group speaks between such devices.

        Raises:
            CommError: it speaks nothing between them.
        """
        if device.type == "cpu":
            return "gloo"
        config = dist.get_backend_config(self.default_pg)
        backend = dist.BackendConfig(dist.Backend(config)).get_device_backend_map().get(device.type)
        if backend is None or backend == "gloo":
            raise CommError(
                f"the model is on {device} but the process group speaks {config}",
                where=f"rank {self.rank}",
                fix=f"initialise the process group with backend '{devices.backend(device, self.size)}', or move "
                "the model to the CPU",
            )
        return backend

    def control_group(self, timeout: float) -> Group:
        """A gloo group of all ranks for small host-side exchanges, also when units travel between devices."""
        return self._make([list(range(self.size))], torch.device("cpu"), timeout)

    def mesh(self, device: torch.device, shard_size: int, timeout: float) -> Mesh:
        """The mesh whose shard axis has ``shard_size`` ranks. Collective at the first call per size."""
        if self.size % shard_size:
            raise StrategyError(
                f"shard_size={shard_size} does not divide the {self.size} ranks",
                fix=f"choose a divisor of {self.size}",
            )
        key = (device.type, shard_size, timeout)
        if key not in self._meshes:
            self._meshes[key] = build_mesh(
                self, shard_size, lambda p: self._make(p, device, timeout), self.control_group(timeout)
            )
        return self._meshes[key]
