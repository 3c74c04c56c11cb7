"""``shardwise.stats()``: counted bytes and live bytes, and the formulas to hold them against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardwise.comm import CommCount, World, joined
from shardwise.engine.bucket import Bucket
from shardwise.engine.build import engines, require_engine
from shardwise.engine.engine import Engine
from shardwise.placement import Placement, place, ranks_of
from shardwise.strategy import Strategy
from shardwise.tiers import STATES
from shardwise.tiers.disk import DiskStats
from shardwise.tiers.home import Home
from shardwise.tiers.link import Link


@dataclass(frozen=True)
class Stats:
    """What this rank has sent and holds.

    Attributes:
        comm: per kind (``gather``, ``reduce``, ``broadcast``, ``norm``, ``control``, ...): calls, bytes
            sent, and seconds blocked waiting. Of the whole process.
        live, peak: bytes by state (``parameters``, ``gradients``, ``optimizer``, ``gather_buffers``,
            ``offload_buffers``, ``host_activations``).
        peak_total: bytes of all states at their joint peak.
        shared_memory: bytes of memory through which ranks of one host send, at most so far; it is kept. Of the whole
            process, and beside ``live`` and ``peak``.
        to_host, to_device: bytes that offloading copied between the device and the host.
        disk: bytes read and written for states whose home is ``nvme``, seconds with I/O under way (``busy_s``), seconds
            that training waited for it (``wait_s``), and the share that was hidden (``hidden``).
    """

    comm: dict[str, CommCount]
    live: dict[str, int]
    peak: dict[str, int]
    peak_total: int
    disk: DiskStats
    to_host: int
    to_device: int
    shared_memory: int = 0

    @property
    def bytes_sent(self) -> int:
        return sum(c.bytes_sent for c in self.comm.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "comm": {k: vars(c) for k, c in self.comm.items()},
            "live": self.live,
            "peak": self.peak,
            "peak_total": self.peak_total,
            "shared_memory": self.shared_memory,
            "to_host": self.to_host,
            "to_device": self.to_device,
            "disk": {**vars(self.disk), "hidden": self.disk.hidden},
        }


def stats(module: nn.Module | None = None) -> Stats:
    """Counters of one sharded module, or of all that live in this process."""
    chosen = _chosen(module)
    world = World.current()
    comm = {k: CommCount(c.calls, c.bytes_sent, c.wait_s) for k, c in world.stats.kinds.items()}
    return Stats(
        comm,
        {s: sum(e.ledger.live[s] for e in chosen) for s in STATES},
        {s: sum(e.ledger.peak[s] for e in chosen) for s in STATES},
        sum(e.ledger.peak_total for e in chosen),
        _disk(chosen),
        sum(link.to_host_bytes for link in _links(chosen)),
        sum(link.to_device_bytes for link in _links(chosen)),
        0 if world.memory is None else world.memory.used,
    )


def _chosen(module: nn.Module | None) -> list[Engine]:
    chosen = [require_engine(module)] if module is not None else list(engines)
    for engine in chosen:
        engine.backward.count_gradients()
    return chosen


def _homes(engines: list[Engine]) -> list[Home]:
    return list({id(u.home): u.home for e in engines for u in e.units if u.home is not None}.values())


def _links(engines: list[Engine]) -> list[Link]:
    return [link for home in _homes(engines) for link in (home.link, home.step_link)] + [
        e.host_activations.link for e in engines if e.host_activations is not None
    ]


def _disk(engines: list[Engine]) -> DiskStats:
    total = DiskStats()
    for home in _homes(engines):
        for name, value in vars(home.stats).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def reset_stats(module: nn.Module | None = None) -> None:
    """Start counting anew: peaks become what is live now, bytes and calls zero."""
    chosen = _chosen(module)
    for engine in chosen:
        engine.ledger.reset_peak()
    for home in _homes(chosen):
        home.reset_stats()
    for link in _links(chosen):
        link.to_host_bytes = link.to_device_bytes = 0
    World.current().stats.reset()


@dataclass(frozen=True)
class Expected:
    """What the formulas say for one rank and one step (bytes).

    Attributes:
        peak: most bytes of all states together, beside activations and the optimizer's temporaries, in a step of one
            micro-batch whose gradients are set to ``None`` before the next.
    """

    sent_per_step: int
    parameters: int
    gradients: int
    optimizer: int
    gather_buffers: int
    offload_buffers: int = 0
    peak: int = 0

    @property
    def states(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def expected(module: nn.Module, strategy: str | Strategy | None = None, optimizer_tensors: int = 2) -> Expected:
    """The formulas of the ZeRO table, from the layout that the engine itself uses.

    Args:
        module: a sharded module.
        strategy: another row of the table to compute instead of the module's own.
        optimizer_tensors: state tensors per parameter: 2 for Adam, 1 for SGD with momentum, 0 for SGD.

    Per unit of P padded elements, N ranks and S ranks per shard group: a reduce sends (N-1)/N · P (plus (R-1)/N · P
    along the replicate axis) and a gather (S-1)/S · P. Split parameters are gathered for forward and for backward,
    but for the root's own and the last two units, which stay; whole ones with split optimizer state once per step.
    ``gather_buffers`` bounds what comes and goes: the values of the root's own and two other units, their arriving
    gradients where gradients are split, and what one reduce receives, or adds to what is there. What is short travels
    together, in messages of up to ``comm.joined.JOINED_BYTES``, and is packed for that. What lies in memory that ranks
    share (``stats().shared_memory``: up to two units, and what their different lengths waste) needs less here: nothing
    to receive into, and no place for values before they are waited for. ``offload_buffers`` lacks
    padding: 64 bytes per state tensor and 4 KiB per buffer at most. ``peak``: see :func:`_peak`.
    """
    engine = require_engine(module)
    row = Strategy.parse(strategy) if strategy is not None else engine.strategy
    return _formula(engine, row, optimizer_tensors)


def formula(engine: Engine, row: Strategy) -> Expected:
    """What :func:`expected` says, with as many state tensors per parameter as this model's optimizers have made."""
    made = engine.ledger.live["optimizer"]
    tensors = min(range(4), key=lambda n: abs(_formula(engine, engine.strategy, n).optimizer - made))
    return _formula(engine, row, tensors)


@dataclass
class _Coming:
    """What comes and goes with one unit, in bytes."""

    values: int = 0  # gathered
    arrived: int = 0  # gradients as autograd made them
    flat: int = 0  # gradients on their way into the reduce
    reduced: int = 0  # gradients, where they are split
    received: int = 0  # by its reduce, beyond what becomes the sum


def _formula(engine: Engine, row: Strategy, tensors: int) -> Expected:
    own, size = row == engine.strategy, engine.world.size
    sent = parameters = gradients = optimizer = largest = 0
    units: list[_Coming] = []
    ahead = split = 0
    for unit in engine.units:
        coming = _Coming()
        units.append(coming)
        for b in unit.buckets:
            plan = b.placement if own else _placed(row, b, size)
            ranks, n = plan.ranks, b.layout.shard_numel
            kept = 1 - row.offload_ratio if plan.state_on_disk else 1.0  # the part that stays in memory
            master, shard, flat = (plan.nbytes(x, n) for x in (plan.master, plan.shard, plan.values))
            # What a rank keeps between steps.
            if not plan.released:
                parameters += flat
            elif not plan.params_on_disk:
                parameters += shard or master
            if plan.follows_home or (not plan.released and not plan.aliased):
                optimizer += round(kept * master) if plan.follows_home else master
            # What comes and goes.
            if plan.released:
                gathers = 1 if unit in engine.forward.stay_gathered else 2
                coming.values += flat
                ahead = max(ahead, row.offload_prefetch if plan.params_offloaded else 0)
            else:
                gathers = 1 if plan.split_state and plan.trainable else 0
            sent += gathers * (ranks.shard - 1) * (flat // ranks.shard)
            if plan.trainable:
                wire, grads = plan.nbytes(plan.arriving, n), plan.nbytes(plan.grads, n)
                sent += (ranks.parts - 1) * (wire // ranks.parts) + (ranks.copies - 1) * n * plan.master.width
                gradients += grads
                optimizer += round(kept * tensors * plan.nbytes(plan.state, n))
                on_disk = plan.params_on_disk and not plan.follows_home
                through = (tensors + plan.follows_home if plan.state_on_disk else 0) + on_disk
                low = shard if plan.params_on_disk and plan.follows_home else 0
                largest = max(largest, through * master + low)
                apart = plan.grads_split or plan.wire_dtype != plan.master.dtype
                coming.arrived += flat if apart else 0
                coming.flat += wire
                coming.reduced += grads if plan.grads_split and not plan.grads_on_host else 0
                there = int(plan.grads_split and not plan.grads_on_host and plan.wire_dtype == plan.master.dtype)
                if not engine.mesh.whole.builtin:
                    coming.received += wire // size * max(0, size - 1 - there)
                elif ranks.shard > 1 and not there:
                    coming.received += wire // ranks.shard
                split |= plan.grads_split and ranks.shard > 1
    buffers = _root_and(2 + ahead, [u.values for u in units])
    together, brought = 0, 0  # what is short waits for the rest of its message, and is packed
    if size > 1:
        together, brought = _joined([u.flat for u in units]), _joined([u.values for u in units])
    buffers += 2 * brought + together + max(*(u.flat for u in units), together) * (size - 1) // size
    buffers += together  # as autograd made it, until it is packed
    if split:
        buffers += _root_and(2, [u.flat for u in units])
    through = row.offload_buffers * largest
    kept_bytes = parameters + gradients + optimizer - sum(u.reduced for u in units) + through
    peak = kept_bytes + _peak(units, 1 + ahead) + 3 * together + 2 * brought
    return Expected(sent, parameters, gradients, optimizer, buffers, through, peak)


def _peak(units: Sequence[_Coming], ahead: int) -> int:
    """The most bytes that come and go at one moment of a backward, of units in the order of the forward.

    A backward computes with the values of a unit and of those gathered ahead, beside the root's own. Its gradients stay
    as autograd made them until it is over, while those of the unit before are reduced. Then they are copied into their
    flat buffer. What was reduced before has become this rank's.
    """
    *below, root = units
    found, reduced = [0], 0
    before: _Coming | None = None
    for k, unit in reversed(list(enumerate(below))):
        values = root.values + sum(u.values for u in below[max(0, k - ahead) : k])
        computing = unit.values + unit.arrived
        if before is not None:
            computing += (before.flat if before.arrived else 0) + before.received
        copying = unit.arrived + unit.flat if unit.arrived else 0
        found.append(values + root.arrived + reduced + max(computing, copying))
        reduced += unit.reduced
        before = unit
    if before is not None:
        found.append(root.values + root.arrived + (before.flat if before.arrived else 0) + before.received + reduced)
    ends = [root.arrived + root.flat if root.arrived else 0]
    ends.append((root.flat if root.arrived else 0) + root.received + root.reduced)
    found.append(root.values + reduced + max(ends))
    return max(found)


def _placed(row: Strategy, bucket: Bucket, size: int) -> Placement:
    """Where a bucket would be under another row of the table."""
    plan = bucket.placement
    floating = bucket.master_dtype.is_floating_point
    return place(
        row, ranks_of(row, size), plan.master.dtype, trainable=plan.trainable, floating=floating,
        separate=plan.separate, compute_dtype=bucket.compute_dtype,
    )  # fmt: skip


def _joined(sizes: list[int]) -> int:
    """The most bytes that one message for several units can have."""
    short = [size for size in sizes if 0 < size <= joined.JOINED_BYTES]
    return min(joined.JOINED_BYTES, sum(short)) if len(short) > 1 else 0


def _root_and(count: int, sizes: list[int]) -> int:
    """What is live when the root's own unit and ``count`` others are."""
    return sizes[-1] + sum(sorted(sizes[:-1])[-count:])
