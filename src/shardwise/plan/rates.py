"""How long an operation or a transfer takes alone: from data sheets, derated, or from what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shardwise.events import READ, TO_DEVICE, TO_HOST, UPDATE, WRITE
from shardwise.plan.calibration import Calibration
from shardwise.plan.curves import Curve, Line, Points
from shardwise.plan.machine import ASSUMED, MEASURED, Machine
from shardwise.plan.trace import Operation

DERATED = {"matmul": 0.70, "fp32": 0.90, "attention": 0.50, "memory": 0.85, "link": 0.80, "host link": 0.85}
"""What is left of a data sheet's figure in practice: matrix products on tensor cores and without them, fused attention,
device memory, links between devices and nodes, and to the host. Only where nothing was measured."""

# Seconds of a collective that has nothing to send, and per step around the ring: NCCL's own model of its low-latency
# protocol (baseLat and hwLat in its tuning.cc), by what is between two ranks.
_RING, _STEP = 6.6e-6, {"NVLink": 0.6e-6, "Infinity Fabric": 1.0e-6, "PCIe": 1.0e-6, "network": 2.7e-6}
_TCP = 50e-6  # of a message between hosts over TCP
_KERNEL, _CALL = 2e-6, 6e-6  # of a kernel that does nothing; of the host, per operator in a training step
_COPY = 10e-6  # until a copy or a request has begun
CONTROL = "control"  # the exchange that travels over gloo between hosts, whatever the devices
HOST_WAYS = (CONTROL, TO_HOST, READ, WRITE)
"""What the host itself waits for; for the rest the device's stream does."""
_FEW = 8  # tensors that an operation has that is on no list
_LOW = ("bfloat16", "float16")


def short(dtype: str) -> str:
    """``float32`` of ``torch.float32``."""
    return dtype.removeprefix("torch.")


def key(op: Operation) -> str:
    """What operations have in common that take equally long."""
    shapes = ",".join("x".join(map(str, shape)) for shape in op.shapes)
    return f"{op.name}|{op.device}|{shapes}|{','.join(map(short, op.dtypes))}|{op.rest}|{op.cold}"


def weight(op: Operation) -> int:
    """As how many operations the host's work for it counts: one on a list is prepared tensor by tensor."""
    return 1 if len(op.shapes) <= _FEW else len(op.shapes)


def made(op: Operation) -> int:
    """Bytes that it writes to memory of its own."""
    return 0 if op.name.endswith("_") else op.written


def _updates(of: Mapping[str, float]) -> dict[str, float]:
    """By phase; updates beside what follows, or in the backward, cost what they do in a step."""
    return {**of, UPDATE: of["step"]} if "step" in of else dict(of)


@dataclass(frozen=True)
class Processor:
    """What computes: a device, or a host beside it.

    Args:
        products: seconds of matrix products by dtype and floating-point operations; has ``float32``.
        memory: seconds by bytes read and written.
    """

    products: Mapping[str, Curve]
    memory: Curve

    def seconds(self, op: Operation) -> float:
        """Of one operation, whichever of computing and moving bytes takes longer."""
        moved = op.read + op.written
        memory = self.memory.at(moved) if moved else 0.0
        if not op.flops:
            return memory
        dtype = next((short(d) for d in op.dtypes if "float" in d), "float32")
        if "attention" in op.name and f"attention {dtype}" in self.products:
            dtype = f"attention {dtype}"
        curve = self.products.get(dtype) or self.products["float32"]
        return max(memory, curve.at(op.flops))


@dataclass(frozen=True)
class Beside:
    """Speeds of two that are under way at once, as a part of their speeds alone.

    Args:
        main: of the operations.
        transfer: of the transfer.
    """

    main: float = 1.0
    transfer: float = 1.0


ALONE = Beside()


@dataclass(frozen=True)
class Rates:
    """How long things take on one rank while all ranks do the same.

    Args:
        machine: that they hold for.
        device, host: what computes.
        call: the host's seconds per operator that it calls: by phase, and by ``""`` for the others.
        fresh: seconds per byte that an operation writes to new memory, beyond its own, by phase.
        excess: seconds per second of an operation alone, by phase.
        turn, begin: the host's seconds per turn to another unit, and per transfer that it begins, by phase.
        links: seconds by bytes: ``node`` between ranks of a node, ``network`` of a whole node, ``control``, and the
            words of :mod:`shardwise.events` for copies and disks.
        steps: seconds per rank in a group beyond the first, by ``node`` and ``network``.
        beside: what a transfer and operations take from each other, by resource.
        exact: seconds of operations that were measured as they are, by :func:`key`.
        sources: where each is from.
    """

    machine: Machine
    device: Processor
    host: Processor
    call: Mapping[str, float]
    turn: Mapping[str, float]
    links: Mapping[str, Curve]
    steps: Mapping[str, float]
    beside: Mapping[str, Beside] = field(default_factory=dict)
    exact: Mapping[str, float] = field(default_factory=dict)
    begin: Mapping[str, float] = field(default_factory=dict)
    fresh: Mapping[str, float] = field(default_factory=dict)
    excess: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs_late(self) -> bool:
        """Does the host go on while the device computes?"""
        return not self.machine.is_cpu

    @classmethod
    def of_sheet(cls, machine: Machine, *, tf32: bool = False) -> Rates:
        """From the figures of a machine, times :data:`DERATED`.

        Args:
            tf32: fp32 matrix products may use it; torch's default is that they do not.
        """
        kernel = 0.0 if machine.is_cpu else _KERNEL
        fp32 = machine.flops.get("tf32", machine.peak("fp32")) if tf32 else machine.peak("fp32")
        full = DERATED["matmul" if tf32 and "tf32" in machine.flops else "fp32"]
        products: dict[str, Curve] = {"float32": Line(kernel, fp32 * full)}
        products["float64"] = Line(kernel, machine.peak("fp32") / 2 * full)
        for dtype in _LOW:
            products[dtype] = Line(kernel, machine.peak(dtype) * DERATED["matmul"])
            products[f"attention {dtype}"] = Line(kernel, machine.peak(dtype) * DERATED["attention"])
        memory = Line(kernel, machine.bandwidth * DERATED["memory"])
        device = Processor(products, memory)
        share = machine.host_bandwidth * DERATED["memory"] / machine.per_node
        host = device if machine.is_cpu else Processor({"float32": Line(0.0, share)}, Line(0.0, share))
        step = _STEP.get(machine.wire, _TCP)
        base = _TCP if machine.is_cpu else _RING
        copy = Line(_COPY, machine.host_link * DERATED["host link"])
        links: dict[str, Curve] = {
            "node": Line(base, machine.link * DERATED["link"]),
            "network": Line(base, machine.network * DERATED["link"]),
            CONTROL: Line(_TCP, machine.network),
            TO_HOST: copy,
            TO_DEVICE: copy,
        }
        if machine.nvme is not None:
            links[READ] = links[WRITE] = Line(_COPY, machine.nvme / machine.per_node)
        steps = {"node": step, "network": _TCP if machine.is_cpu else _STEP["network"]}
        told = {
            name: f"{machine.sources.get(attribute, ASSUMED)}, x {part}"
            for name, attribute, part in (
                ("compute", "flops", DERATED["matmul"]), ("memory", "bandwidth", DERATED["memory"]),
                ("node", "link", DERATED["link"]), ("network", "network", DERATED["link"]),
                ("host link", "host_link", DERATED["host link"]), ("host", "host_bandwidth", DERATED["memory"]),
                ("disk", "nvme", 1),
            )
        }  # fmt: skip
        told["call"] = f"{ASSUMED}: {_CALL * 1e6:g} us per operator"
        return cls(machine, device, host, {"": _CALL}, {}, links, steps, sources=told)

    @classmethod
    def measured(cls, machine: Machine, found: Calibration) -> Rates:
        """From what was measured of a machine; from its figures where it was not."""
        rates = cls.of_sheet(machine)
        products = {**rates.device.products, **{k: Points.of(v) for k, v in found.products.items()}}
        device = Processor(products, Points.of(found.memory))
        pairs = {"node": found.node, CONTROL: found.control, **found.links}
        links = {**rates.links, **{name: Points.of(measured) for name, measured in pairs.items() if measured}}
        told = dict.fromkeys(("compute", "memory"), MEASURED) | ({"call": MEASURED} if found.call else {})
        told |= {"node": MEASURED} if found.node else {}
        told |= {"host link": MEASURED} if TO_HOST in found.links else {}
        told |= {"disk": MEASURED} if READ in found.links else {}
        rates = replace(rates, device=device, host=device if machine.is_cpu else rates.host, links=links)
        if found.call:
            rates = replace(rates, call={"": 0.0, **_updates(found.call)}, turn=found.turn, begin=found.begin)
        if found.node:
            steps = {**rates.steps, "node": found.step}
            rates = replace(rates, steps=steps, beside={"node": Beside(*found.beside)})
        told = {**rates.sources, **told}
        rates = replace(rates, fresh=_updates(found.fresh), excess=_updates(found.excess))
        return replace(rates, exact=found.exact, sources=told)

    # --- operations ------------------------------------------------------------------------------------
    def operation(self, op: Operation) -> float:
        """Seconds in which what computes is busy with it, without the host's for calling it."""
        found = self.exact.get(key(op)) if self.exact else None
        if found is not None:
            return found
        return (self.host if op.device == "host" else self.device).seconds(op)

    def calling(self, phase: str, op: Operation) -> float:
        """What one operation costs in a step beyond its time alone: the host's part above all."""
        found = self.call.get(phase)
        seconds = (self.call[""] if found is None else found) * weight(op)
        if phase in self.fresh:
            seconds += self.fresh[phase] * made(op)
        return seconds + self.excess[phase] * self.operation(op) if phase in self.excess else seconds

    def turning(self, phase: str) -> float:
        """The host's seconds for a turn to another unit."""
        return self.turn.get(phase, 0.0)

    def beginning(self, phase: str) -> float:
        """The host's seconds for beginning a transfer."""
        return self.begin.get(phase, 0.0)

    # --- transfers -------------------------------------------------------------------------------------
    def resource(self, way: str, ranks: tuple[int, ...]) -> str:
        """What is busy with a transfer: ``node``, ``network``, ``control``, ``disk``, or the way itself.

        A link to a device takes as much in each direction at once; a disk has one rate for reads and writes together.
        """
        if way in (READ, WRITE):
            return "disk"
        if way in (CONTROL, TO_HOST, TO_DEVICE, UPDATE):
            return way
        return "network" if len({rank // self.machine.per_node for rank in ranks}) > 1 else "node"

    def transfer(self, way: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        """Seconds of a transfer alone, while groups of other ranks do the same.

        Args:
            way, nbytes, ranks: as a :class:`shardwise.events.Listener` hears them.

        Raises:
            KeyError: it needs a disk, and the machine has none.
        """
        where = self.resource(way, ranks)
        if where not in ("node", "network", CONTROL):
            return self.links[way].at(nbytes)
        members = Counter(rank // self.machine.per_node for rank in ranks)
        inside = max(members.values(), default=1)
        if where == CONTROL:
            return self.links[CONTROL].at(nbytes) + self.steps["network" if len(members) > 1 else "node"] * (
                max(0, len(ranks) - 2)
            )
        seconds = self.steps["node"] * (inside - 1)
        if where == "node":
            return seconds + self.links["node"].at(nbytes)
        # Each rank of a ring sends nbytes on, and as many rings leave a node as it has groups.
        rings = self.machine.per_node / inside
        seconds += self.steps["network"] * (len(members) - 1)
        across = self.links["network"].at(nbytes * rings)
        return seconds + (max(across, self.links["node"].at(nbytes)) if inside > 1 else across)

    def slowed(self, resource: str) -> Beside:
        """What operations and a transfer on a resource take from each other."""
        return self.beside.get(resource, ALONE)
