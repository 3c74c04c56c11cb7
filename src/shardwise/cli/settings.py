"""What ``launch`` can be told, as values. Files of them are in :mod:`shardwise.cli.settings_file`.

Nothing here imports torch, so that ``shardwise config`` and every ``--help`` answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from shardwise import environment
from shardwise.errors import LaunchError, did_you_mean
from shardwise.strategy import Strategy

# What people write who come from another launcher, and what it is here.
_KNOWN_ELSEWHERE = {
    "num_processes": "nproc",
    "nproc_per_node": "nproc",
    "num_machines": "nnodes",
    "machine_rank": "node_rank",
    "main_process_ip": "rdzv_endpoint",
    "main_process_port": "rdzv_endpoint",
    "use_cpu": "cpu",
    "gpu_ids": "devices",
    "zero_stage": "strategy",
}


@dataclass(frozen=True)
class Settings:
    """Everything that can be said before the script; ``None`` where nothing was said.

    Attributes:
        nproc: ranks on each host.
        devices: the devices to use, as ``0,1``, in the words of ``CUDA_VISIBLE_DEVICES`` or its like.
        nnodes, node_rank: hosts, and this host's number.
        rdzv_endpoint, rdzv_id: where the hosts meet (``host:port``), and as which run.
        max_restarts: how often all ranks are started anew after a failure.
        min_nproc: ranks that a start after losing some has at least; as many as before if nothing was said.
        strategy, mixed_precision, gradient_accumulation_steps: what wins over the script's own.
        cpu: run on the CPU.
    """

    nproc: int | None = None
    devices: str | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    max_restarts: int | None = None
    min_nproc: int | None = None
    strategy: str | None = None
    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None
    cpu: bool | None = None

    def over(self, other: Settings) -> Settings:
        """These settings where something was said, else the other's."""
        return replace(other, **self.said())

    def said(self) -> dict[str, Any]:
        """Only what was said, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def check(self, complete: bool = True) -> None:
        """Everything that can be known to be wrong before a rank starts, but for the number of devices.

        Args:
            complete: these are all settings; otherwise flags may add to them, so that only what is said is checked.

        Raises:
            ShardwiseError: see the text; it names the flag, which is the key of a file with dashes.
        """
        if self.strategy is not None:
            Strategy.parse(self.strategy)
        if self.mixed_precision is not None and self.mixed_precision not in environment.PRECISIONS:
            raise LaunchError(
                f"--mixed-precision {self.mixed_precision} is not known",
                fix=f"one of {', '.join(environment.PRECISIONS)}",
            )
        for name, least, what in (
            ("nproc", 1, "ranks"),
            ("nnodes", 1, "hosts"),
            ("max_restarts", 0, "restarts"),
            ("min_nproc", 1, "ranks"),
            ("gradient_accumulation_steps", 1, "micro-batches"),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LaunchError(
                    f"--{name.replace('_', '-')} {value} is not a number of {what}", fix=f"give {least} or more"
                )
        self._check_endpoint()
        self._check_devices()
        if complete:
            self._check_hosts()
            self._check_shards()
            self._check_fewer()

    def _check_hosts(self) -> None:
        nnodes = self.nnodes or 1
        if self.node_rank is not None and not 0 <= self.node_rank < nnodes:
            raise LaunchError(
                f"--node-rank {self.node_rank} is not a host of {nnodes}", fix=f"give 0 to {nnodes - 1}, and --nnodes"
            )
        if nnodes > 1 and not self.rdzv_endpoint:
            raise LaunchError(
                f"{nnodes} hosts need a place to meet", fix="--rdzv-endpoint host:port, the same on every host"
            )

    def _check_endpoint(self) -> None:
        endpoint = self.rdzv_endpoint
        if endpoint:
            host, _, port = endpoint.rpartition(":")
            if not port.isdigit() or not host:
                raise LaunchError(
                    f"--rdzv-endpoint {endpoint} is not host:port", fix="write host:port, for example node0:29400"
                )
            if not 0 < int(port) < 1 << 16:
                raise LaunchError(f"--rdzv-endpoint {endpoint} has no valid port", fix="give a port of 1 to 65535")

    def _check_devices(self) -> None:
        if self.devices is None:
            return
        names = self.device_list()
        if self.cpu:
            raise LaunchError(f"--devices {self.devices} and --cpu contradict each other", fix="give one of them")
        if not names or "" in names or len(set(names)) < len(names):
            raise LaunchError(f"--devices {self.devices} is not a list of devices", fix="write 0,1 for the first two")
        if self.nproc is not None and self.nproc > len(names):
            raise LaunchError(
                f"--nproc {self.nproc} asks for more ranks than --devices {self.devices} has",
                fix=f"--nproc {len(names)}, or more devices",
            )

    def _check_shards(self) -> None:
        if self.strategy is None or self.nproc is None:
            return
        size, ranks = Strategy.parse(self.strategy).shard_size, self.nproc * (self.nnodes or 1)
        if size is not None and ranks % size:
            raise LaunchError(
                f"shard_size={size} does not divide {ranks} rank{'s' * (ranks > 1)}",
                fix="choose a divisor, or another --nproc",
            )
        if size is not None and self.min_nproc is not None and self.min_nproc % size:
            raise LaunchError(
                f"shard_size={size} does not divide --min-nproc {self.min_nproc}", fix=f"give a multiple of {size}"
            )

    def _check_fewer(self) -> None:
        if self.min_nproc is None:
            return
        if not self.max_restarts:
            raise LaunchError(
                f"--min-nproc {self.min_nproc} is about restarts, and there are none",
                fix="--max-restarts 3, or leave it out",
            )
        if (self.nnodes or 1) > 1:
            raise LaunchError(
                f"--min-nproc {self.min_nproc} on {self.nnodes} hosts: each host of several keeps its number of ranks",
                fix="leave it out; --max-restarts starts the same ranks anew, and a start by hand may have fewer hosts",
            )
        if self.nproc is not None and self.min_nproc > self.nproc:
            raise LaunchError(
                f"--min-nproc {self.min_nproc} is more than the {self.nproc} rank{'s' * (self.nproc > 1)} there "
                f"{'are' if self.nproc > 1 else 'is'}",
                fix=f"give {self.nproc} or less",
            )

    def device_list(self) -> list[str]:
        return [name.strip() for name in self.devices.split(",")] if self.devices is not None else []


def unknown_key(key: str, known: list[str], path: Path, inside: str = "") -> LaunchError:
    """The error for a key that does not exist, with the nearest that does."""
    name = key.lower().replace("-", "_")
    if not inside and name in _KNOWN_ELSEWHERE:
        name, known = _KNOWN_ELSEWHERE[name], [_KNOWN_ELSEWHERE[name]]
    fix = did_you_mean(name, known, otherwise=f"the keys are {', '.join(known)}", cutoff=0.5)
    return LaunchError(f"there is no key '{key}'{f' in {inside}' if inside else ''}", where=str(path), fix=fix)
