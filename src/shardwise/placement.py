"""Where every buffer of a bucket is: pure arithmetic over the strategy's row, the ranks and the homes.

A *bucket* is one unit's parameters of one dtype. :func:`place` answers, once and for all, what the engine, the
formulas of :mod:`shardwise.observe` and a planner ask about it: which buffers there are, how many elements this rank
holds of each, in which dtype, where, and when they live. Nobody derives it a second time.

=================  ========================================  ==============================================
                   whole                                     split over the shard axis, or with another home
=================  ========================================  ==============================================
values             always there                              from a gather to a release
master values      a view of the values (or their own, if    the held shards
                   dtype or home differ)
gradients          as long as the values, reduced in place   the held shards; what arrives is a temporary
optimizer state    for all pieces                            for the pieces of the held shards
=================  ========================================  ==============================================

No torch here: dtypes are their names (``"float32"``), sizes are elements and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from shardwise.strategy import Strategy


class Where(Enum):
    """The memory that a buffer is in."""

    DEVICE = "device"
    HOST = "cpu"  # memory of the host, of a device that has its own
    DISK = "nvme"


class Lifetime(Enum):
    """When a buffer exists."""

    ALWAYS = "always"
    GATHERED = "gathered"  # from a unit's gather to its release
    BACKWARD = "backward"  # from the first gradient that arrives to the end of the reduce


class Extent(Enum):
    """How much of the flat buffer a rank has."""

    WHOLE = "whole"
    HELD = "held"  # the shards of this rank's column of the mesh


WIDTHS = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "complex64": 8, "complex128": 16, "int64": 8, "int32": 4,
    "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "complex32": 4,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
"""Bytes of one element, by name of the dtype."""
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Full names of the dtypes that a strategy can name."""


@dataclass(frozen=True)
class Ranks:
    """How the ranks divide a flat buffer.

    Attributes:
        parts: shards of it: the world size.
        shard: ranks that split one copy of the states (the shard axis, S).
    """

    parts: int
    shard: int

    @property
    def copies(self) -> int:
        """How often the states are repeated: the replicate axis (R)."""
        return self.parts // self.shard


@dataclass(frozen=True)
class BufferPlan:
    """One buffer: how much of it this rank holds, in which dtype, where, and when."""

    extent: Extent
    dtype: str
    where: Where
    lifetime: Lifetime = Lifetime.ALWAYS

    @property
    def width(self) -> int:
        return WIDTHS[self.dtype]

    @property
    def on_host(self) -> bool:
        """Is it outside of the device's own memory?"""
        return self.where is not Where.DEVICE


@dataclass(frozen=True)
class Placement:
    """All buffers of one bucket on one rank.

    Attributes:
        ranks: who divides them.
        trainable: can its parameters get gradients?
        values: the flat buffer that the parameters are views of.
        shard: what a gather reads, where that is not the master values.
        master: the held master values, which the optimizer updates.
        state: optimizer state, per tensor of it; ``None`` for frozen parameters.
        grads: reduced gradients; ``None`` for frozen parameters.
        arriving: the gradients of one backward, until they are reduced, in the dtype that crosses the wire.
        settled: nothing of it ever moves: values are whole and the master values, and this rank is alone, so that
            gradients are nobody else's. Nothing is left to do for it in a forward, a backward or a step.
        aliased: master values are a view of the values: a write to either is a write to both.
        separate: the device has memory of its own, so that homes on the host are another memory.
        step_on_host: the update runs on the host: master values and state are not in the device's memory.
        steps_apart: updates go unit by unit through a home, instead of all at once in the device's memory.
    """

    ranks: Ranks
    trainable: bool
    values: BufferPlan
    shard: BufferPlan | None
    master: BufferPlan
    state: BufferPlan | None
    grads: BufferPlan | None
    arriving: BufferPlan | None
    settled: bool
    aliased: bool
    separate: bool
    step_on_host: bool
    steps_apart: bool

    # --- questions about it --------------------------------------------------------------------
    @cached_property
    def released(self) -> bool:
        """Do values come with a gather and go with a release?"""
        return self.values.lifetime is Lifetime.GATHERED

    @cached_property
    def source(self) -> BufferPlan:
        """What a gather reads."""
        return self.master if self.shard is None else self.shard

    @cached_property
    def params_offloaded(self) -> bool:
        """Is what a gather reads at another home than the device?"""
        return self.released and self.source.where is not Where.DEVICE

    @cached_property
    def params_on_disk(self) -> bool:
        """Is what a gather reads on a disk?"""
        return self.params_offloaded and self.source.where is Where.DISK

    @cached_property
    def split_state(self) -> bool:
        """Does each rank update a part of the bucket only, so that whole values are gathered after a step?"""
        return self.ranks.shard > 1

    @cached_property
    def follows_home(self) -> bool:
        """Have master values a home of their own, from which what gathers read (or the values) has to follow?"""
        return self.steps_apart and not self.aliased and not (self.released and self.shard is None)

    @cached_property
    def state_on_disk(self) -> bool:
        return self.state is not None and self.state.where is Where.DISK

    @cached_property
    def grads_on_host(self) -> bool:
        return self.grads is not None and self.grads.on_host

    @cached_property
    def grads_cross(self) -> bool:
        """Are reduced gradients on the other side of the link from the update?"""
        return self.step_on_host != self.grads_on_host

    @cached_property
    def shows_handles(self) -> bool:
        """Is ``p.grad`` a ShardedGrad? Where pieces are elsewhere, or an update may still need what it shows."""
        return self.split_state or self.grads_on_host or self.steps_apart

    @cached_property
    def grads_split(self) -> bool:
        return self.grads is not None and self.grads.extent is Extent.HELD

    @cached_property
    def wire_dtype(self) -> str:
        """The dtype in which gradients cross the wire."""
        return self.master.dtype if self.arriving is None else self.arriving.dtype

    # --- sizes --------------------------------------------------------------------------------------
    def numel(self, plan: BufferPlan, shard_numel: int) -> int:
        """Elements of a buffer on this rank, padding included, where one shard has ``shard_numel``."""
        return shard_numel * (self.ranks.parts if plan.extent is Extent.WHOLE else self.ranks.copies)

    def nbytes(self, plan: BufferPlan | None, shard_numel: int) -> int:
        """Bytes of a buffer on this rank while it exists; 0 for a buffer that there is not."""
        return 0 if plan is None else self.numel(plan, shard_numel) * plan.width


def where(home: str, separate: bool) -> Where:
    """Where a home of the strategy is, seen from the device: ``cpu`` is the device itself where that is one."""
    found = Where(home)
    return Where.DEVICE if found is Where.HOST and not separate else found


def ranks_of(strategy: Strategy, world: int, shard: int | None = None) -> Ranks:
    """How a strategy divides a world of ranks. ``shard``: the size of its shard axis, where a mesh has decided it."""
    if shard is None:
        shard = (strategy.shard_size or world) if strategy.split_optimizer else 1
    return Ranks(world, shard)


def place(
    strategy: Strategy,
    ranks: Ranks,
    dtype: str,
    *,
    trainable: bool = True,
    floating: bool = True,
    separate: bool = False,
    takes_state: bool = True,
    compute_dtype: str | None = None,
) -> Placement:
    """The buffers of one bucket.

    Args:
        strategy: the row, the homes and the dtypes.
        ranks: see :func:`ranks_of`.
        dtype: of the parameters as they were built: that of the master values.
        trainable: some of its parameters can get gradients.
        floating: they are floating-point numbers; others are never cast and never trained.
        separate: the device has memory of its own, that is: it is not a CPU.
        takes_state: with home ``cpu``, does ``offload_ratio`` send this bucket's state there?
        compute_dtype: overrides ``strategy.param_dtype``, for parameters that must keep theirs.
    """
    steps = floating and trainable
    split = ranks.shard > 1
    values_dtype = dtype
    if floating and compute_dtype is not None:
        values_dtype = compute_dtype
    elif floating and strategy.param_dtype:
        values_dtype = DTYPE_NAMES[strategy.param_dtype]
    wire = DTYPE_NAMES[strategy.reduce_dtype] if floating and strategy.reduce_dtype else dtype
    params_at = where(strategy.offload_params, separate)
    state_at = where(strategy.offload_optimizer, separate) if steps and strategy.offload_ratio > 0 else Where.DEVICE
    grads_at = where(strategy.offload_grads, separate) if steps else Where.DEVICE
    offloaded = (params_at, state_at, grads_at) != (Where.DEVICE,) * 3
    on_disk = state_at is Where.DISK
    step_on_host = separate and (on_disk or (state_at is Where.HOST and takes_state))
    read_on_host = separate and params_at is not Where.DEVICE
    # Where what gathers read differs from the master values, in dtype or in place, there are two tensors.
    apart = offloaded and (values_dtype != dtype or step_on_host != read_on_host)
    released = (strategy.split_params and split) or params_at is not Where.DEVICE
    aliased = not released and not apart and values_dtype == dtype
    if apart:
        master_at = Where.DISK if on_disk else Where.HOST if step_on_host else Where.DEVICE
    else:
        master_at = params_at
    own = ranks.parts == 1 and not offloaded and (wire == dtype or not steps)
    split_grads = (strategy.split_grads and split) or grads_at is Where.HOST
    return Placement(
        ranks=ranks,
        trainable=trainable,
        values=BufferPlan(Extent.WHOLE, values_dtype, Where.DEVICE, Lifetime.GATHERED if released else Lifetime.ALWAYS),
        shard=BufferPlan(Extent.HELD, values_dtype, params_at) if apart and released else None,
        master=BufferPlan(Extent.HELD, dtype, master_at),
        state=BufferPlan(Extent.HELD, dtype, Where.DISK if on_disk else Where.HOST if step_on_host else Where.DEVICE)
        if steps
        else None,
        grads=BufferPlan(Extent.HELD if split_grads else Extent.WHOLE, dtype, grads_at) if steps else None,
        arriving=BufferPlan(Extent.WHOLE, wire, Where.DEVICE, Lifetime.BACKWARD) if steps else None,
        settled=aliased and own and not strategy.optimizer_in_backward,
        aliased=aliased,
        separate=separate,
        step_on_host=step_on_host,
        steps_apart=offloaded,
    )
