"""The machine that a plan is for: its devices, what connects them, and what lies behind them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from shardwise import datasheets, host
from shardwise import device as devices
from shardwise.datasheets import SHEETS, Datasheet
from shardwise.errors import PlanError, did_you_mean
from shardwise.sizes import format_bytes, parse_bytes

MEASURED, DATASHEET, ASSUMED, TOLD = "measured", "datasheet", "assumed", "told"
"""Where a figure is from: from this machine, from its maker, from nobody in particular, from whoever asks."""
_MIB = 2**20
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_CORE = 5e10  # FLOP/s of a core that nobody measured: 16 fp32 multiply-adds per cycle at 1.5 GHz
_CHANNEL = 2e10  # bytes per second of host memory that nobody measured


class Band(NamedTuple):
    """Bytes that cannot be known exactly: between two figures, and why."""

    low: int
    high: int
    source: str


@dataclass(frozen=True)
class Machine:
    """Devices of one kind in equal nodes. Rates are bytes per second and direction; ``None``: there is none.

    Attributes:
        device: name of the device: a key of :data:`shardwise.datasheets.SHEETS`, what its driver calls it, or ``cpu``.
        kind: torch's device type.
        per_node, nodes: devices in a node, one rank each; and nodes.
        memory: bytes of one device, all that its driver gives out.
        flops: per second, of matrix products by dtype: ``fp32``, ``tf32``, ``bf16``, ``fp16``.
        bandwidth: of a device's memory.
        link: between devices of a node.
        wire: what that is: ``NVLink``, ``PCIe``, ...
        network: of a node to all others.
        host_link: between a device and its host.
        host_memory: bytes of a node; ``None``: nobody said.
        host_bandwidth: of a node's memory.
        nvme, nvme_bytes: of a node's disks, all together.
        sources: where the figures are from, by attribute: one of the words of this module, and the name of the sheet.
    """

    device: str
    kind: str
    per_node: int
    nodes: int
    memory: int
    flops: dict[str, float]
    bandwidth: float
    link: float
    wire: str
    network: float
    host_link: float
    host_memory: int | None
    host_bandwidth: float
    nvme: float | None = None
    nvme_bytes: int | None = None
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """All devices: as many ranks."""
        return self.per_node * self.nodes

    @property
    def is_cpu(self) -> bool:
        """Is it the host that computes? Then device memory and host memory are the same bytes."""
        return self.kind == "cpu"

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in a dtype, by its own or by torch's name; of ``fp32`` for what it cannot do."""
        name = dtype.removeprefix("torch.")
        return self.flops.get(_DTYPES.get(name, name), self.flops["fp32"])

    def with_devices(self, count: int) -> Machine:
        """The same kind of machine with another number of devices in all: full nodes, or one that is not full."""
        nodes = -(-count // self.per_node)
        if count < 1 or (nodes > 1 and count % self.per_node):
            raise PlanError(f"{count} devices are not full nodes of {self.per_node}", fix="ask for full nodes")
        return replace(self, nodes=nodes, per_node=min(count, self.per_node))

    def outside(self, communicators: int = 1) -> Band:
        """Bytes of a device that are neither torch's tensors nor torch's reserve: context, kernels, NCCL's buffers.

        Args:
            communicators: groups of ranks that talk over this device.
        """
        if self.is_cpu:
            return Band(0, 0, "a CPU has none")
        low, high = 350 * _MIB, 700 * _MIB
        why = "context and kernels: 350 to 700 MiB, as drivers show for a process that only started torch"
        if self.world > 1 and communicators:
            # A ring alone; a ring and trees. Per channel and peer 4 MiB (NCCL_BUFFSIZE) and half of it for LL, LL128.
            low, high = low + communicators * 16 * 6 * _MIB, high + communicators * 32 * 4 * 6 * _MIB
            why += "; NCCL: 6 MiB per channel and peer (NCCL_BUFFSIZE and its two low-latency protocols), 16 to 32 "
            why += f"channels, 1 to 4 peers, {communicators} communicators"
        return Band(low, high, f"{ASSUMED}: {why}")

    def __str__(self) -> str:
        said = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{said}{self.per_node} x {self.device} ({format_bytes(self.memory)})"

    # --- ways to get one ---------------------------------------------------------------------------------
    @classmethod
    def parse(
        cls, text: str, *, nodes: int = 1, host_memory: int | str | None = None, nvme: str | None = None,
        network: str | None = None,
    ) -> Machine:  # fmt: skip
        """From words.

        Args:
            text: devices of a node: ``8xH100-80GB``, ``A100-40GB`` (one), ``4xcpu``. Case does not matter.
            nodes: how many of them.
            host_memory: of a node: bytes, or ``1TB``.
            nvme: rate and size of a node's disks: ``3.5GB/s,4TB``, in either order; the size may be left out.
            network: rate of a node to the others, per direction: ``50GB/s``. By default of a usual node.

        Raises:
            PlanError: no such device, or a figure that is none.
        """
        match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*×]\s*)?([A-Za-z][\w .-]*?)\s*", text)
        if match is None:
            raise PlanError(f"'{text}' is not a number of devices", fix="write it like 8xH100-80GB")
        count = _positive("devices", match[1] or 1)
        nodes = _positive("nodes", nodes)
        machine = _cpu(count, nodes) if match[2].lower() == "cpu" else _of_sheet(_sheet(match[2]), count, nodes)
        changed: dict[str, object] = {}
        if host_memory is not None:
            changed["host_memory"] = _bytes("host memory", host_memory, "1TB")
        if nvme is not None:
            changed["nvme"], changed["nvme_bytes"] = _disk(nvme)
        if network is not None:
            changed["network"] = _rate("network", network)
        sources = machine.sources | dict.fromkeys(changed, TOLD)
        return replace(machine, sources=sources, **changed)  # type: ignore[arg-type]

    @classmethod
    def here(cls, ranks: int | None = None, *, device: str | None = None) -> Machine:
        """The machine at hand: one node.

        Args:
            ranks: by default one per accelerator, or one on a CPU.
            device: ``cpu`` to leave an accelerator unused.

        Raises:
            PlanError: more ranks than accelerators.
        """
        kind = devices.accelerator() if device != "cpu" else None
        ranks = None if ranks is None else _positive("ranks", ranks)
        told = host.memory()
        if kind is None:
            machine = _cpu(ranks or 1, 1)
            if told is None:
                return machine
            sources = machine.sources | {"memory": MEASURED, "host_memory": MEASURED}
            each = told.total // machine.per_node
            return replace(machine, memory=each, host_memory=told.total, sources=sources)
        if (ranks or 1) > devices.count():
            raise PlanError(f"this machine has {devices.count()} accelerators, not {ranks}", fix="ask for fewer ranks")
        first = devices.named(f"{kind}:0")
        name, memory = devices.name(first), devices.memory(first)
        sheet = datasheets.of_device(name)
        machine = _of_sheet(sheet or SHEETS["T4"], ranks or devices.count(), 1)
        sources = machine.sources if sheet else dict.fromkeys(machine.sources, f"{ASSUMED}: no sheet of {name}")
        machine = replace(machine, kind=kind, device=machine.device if sheet else name)
        if memory is not None:
            machine, sources = replace(machine, memory=memory[1]), sources | {"memory": MEASURED}
        if told is not None:
            machine, sources = replace(machine, host_memory=told.total), sources | {"host_memory": MEASURED}
        return replace(machine, sources=sources)


def _of_sheet(sheet: Datasheet, count: int, nodes: int) -> Machine:
    told, node = f"{DATASHEET}: {sheet.source}", f"{DATASHEET}: {sheet.node}"
    if sheet.node.startswith(ASSUMED):
        node = sheet.node
    sources = dict.fromkeys(("flops", "bandwidth", "link", "host_link"), told)
    sources |= dict.fromkeys(("network", "host_bandwidth"), node)
    sources["memory"] = f"{told}, less what its driver keeps"
    return Machine(
        sheet.name, sheet.kind, count, nodes, int(sheet.usable), dict(sheet.flops), sheet.bandwidth, sheet.link,
        sheet.wire, sheet.network, sheet.host_link, None, sheet.host_bandwidth, sources=sources,
    )  # fmt: skip


def _cpu(count: int, nodes: int) -> Machine:
    """A host that computes: its cores and its memory are shared by its ranks."""
    cores = (os.cpu_count() or 1) / count
    each = dict.fromkeys(("fp32", "bf16", "fp16"), cores * _CORE)
    figures = ("memory", "flops", "bandwidth", "link", "host_link", "network", "host_bandwidth")
    sources = dict.fromkeys(figures, f"{ASSUMED}: a core of 50 GFLOP/s, 20 GB/s of memory")
    told = host.memory()
    memory = told.total if told is not None else 16 * 2**30
    return Machine(
        "cpu", "cpu", count, nodes, memory // count, each, _CHANNEL / count, _CHANNEL / 4 / count, "memory", 1.25e9,
        _CHANNEL, memory, _CHANNEL, sources=sources,
    )  # fmt: skip


def _sheet(name: str) -> Datasheet:
    plain = {_plain(known): sheet for known, sheet in SHEETS.items()}
    for short, meant in (("h100", "H100-80GB"), ("h100sxm", "H100-80GB"), ("a100", "A100-80GB"), ("v100", "V100-32GB"),
                         ("h200141gb", "H200"), ("4090", "RTX-4090"), ("3090", "RTX-3090")):  # fmt: skip
        plain[short] = SHEETS[meant]
    found = plain.get(_plain(name))
    if found is None:
        known = f"known are {', '.join(SHEETS)} and cpu"
        near = did_you_mean(_plain(name), plain, "")
        fix = f"did you mean '{plain[near.split(chr(39))[1]].name}'? {known}" if near else known
        raise PlanError(f"no figures are known of a device '{name}'", fix=fix)
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia").removeprefix("amd"))


def _positive(what: str, value: int | str) -> int:
    if not str(value).strip().isdigit() or int(value) < 1:
        raise PlanError(f"{what} = {value} is no number of {what}", fix="give a whole number above 0")
    return int(value)


def _bytes(what: str, value: int | str, like: str) -> int:
    nbytes = parse_bytes(value)
    if nbytes is None or nbytes <= 0:
        raise PlanError(f"{what} = '{value}' is no size", fix=f"write it like {like}")
    return nbytes


def _rate(what: str, text: str) -> float:
    match = re.fullmatch(r"\s*(.*?)\s*/\s*s(?:ec)?\s*", text)
    nbytes = parse_bytes(match[1]) if match else None
    if not nbytes:
        raise PlanError(f"{what} = '{text}' is no rate", fix="write it like 3.5GB/s")
    return float(nbytes)


def _disk(text: str) -> tuple[float, int | None]:
    """Rate and size of ``3.5GB/s,4TB``."""
    parts = [part for part in text.split(",") if part.strip()]
    rates = [part for part in parts if "/" in part]
    sizes = [part for part in parts if "/" not in part]
    if len(rates) != 1 or len(sizes) > 1:
        raise PlanError(f"nvme = '{text}' does not say how fast it is", fix="write it like 3.5GB/s,4TB")
    return _rate("nvme", rates[0]), _bytes("nvme", sizes[0], "4TB") if sizes else None
