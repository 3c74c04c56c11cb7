"""The strategy table: which model state is split over the ranks, and where each one lives.

Training holds three *model states* (the words of the ZeRO paper, Rajbhandari et al. 2020):
parameters, gradients and optimizer state. A :class:`Strategy` says for each one whether it is
partitioned over the ranks and what its home is; a *preset* is a row of that table, not a code path.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from shardwise.errors import StrategyError


class Row(NamedTuple):
    """One row of the table: is each model state split over the ranks of the shard group?"""

    params: bool
    grads: bool
    optimizer: bool
    known_as: str


PRESETS: dict[str, Row] = {
    "ddp": Row(False, False, False, "DistributedDataParallel, ZeRO-0"),
    "zero1": Row(False, False, True, "ZeRO-1, ZeroRedundancyOptimizer"),
    "zero2": Row(False, True, True, "ZeRO-2, FSDP SHARD_GRAD_OP"),
    "zero3": Row(True, True, True, "ZeRO-3, FSDP FULL_SHARD, fully_shard"),
    "hsdp": Row(True, True, True, "hybrid FSDP, MiCS, ZeRO++ hpZ"),
}
AUTO = "auto"
"""In the place of a preset: the planner chooses."""
DTYPES = ("fp32", "bf16", "fp16")
HOMES = ("device", "cpu", "nvme")
LAYOUTS = ("element", "tensor")


@dataclass(frozen=True)
class Strategy:
    """How the model states are laid over ranks and tiers.

    ``Strategy("zero3")``, ``Strategy("zero2", offload_optimizer="cpu")`` and
    ``Strategy.parse("zero2,offload_optimizer=cpu")`` are the three ways to write one.

    Args:
        preset: a row of the table: ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``hsdp``. ``auto``: the planner chooses
            one when the model is known, with homes and checkpointing; other keys stay as they are given.
        offload_params, offload_grads, offload_optimizer: the home of each state: ``device``, ``cpu``
            or (not for gradients) ``nvme``.
        shard_size: ranks that share one copy of the states. Only ``hsdp`` may set it; by default
            the ranks of one host.
        layout: ``element`` cuts a unit into equal slices, anywhere; ``tensor`` never cuts a
            parameter, for optimizers that need whole matrices (Muon, Adafactor, ...).
        param_dtype: dtype to compute in (``fp32``, ``bf16``, ``fp16``); the optimizer keeps the
            original dtype as master values. ``None`` computes in each parameter's own dtype.
        autocast: with a ``param_dtype`` of ``bf16`` or ``fp16``, leave the inputs of units as they are and run the
            model under ``torch.autocast``. Otherwise every floating-point input of a unit is cast to ``param_dtype``,
            labels and timesteps too. ``None``: on under an Accelerator, or where the launcher's precision is what
            chose ``param_dtype``; else off.
        reduce_dtype: dtype in which gradients cross the wire. gloo's ranks sum them in the master dtype,
            NCCL in this one. ``None`` sends the dtype of the master values (fp32 as a rule).
        offload_ratio: the part of the optimizer state, in bytes, that goes to its home. With home ``cpu`` the states of
            some units stay on the device, and their updates too; with ``nvme`` the end of each unit's state stays in
            host memory, where the update is. On a CPU device, home ``cpu`` is the device.
        nvme_path: an existing folder on the disk that home ``nvme`` uses; ``None`` takes the first of ``$TMPDIR``,
            ``/var/tmp`` and the current folder that is on a disk. Must have no comma in it.
        pin_memory: with an accelerator, page-lock the host buffers.
        offload_buffers: host buffers before that disk, each as large as the largest unit's optimizer state: with 3,
            one unit is read and one is written while a third is updated.
        offload_depth: requests to the disk in flight, of reads and of writes each.
        offload_checksum: compare what comes from that disk with a CRC-32 of what was written. Costs a pass over the
            bytes in each direction.
        offload_prefetch: units whose parameters are brought from their home ahead of the one that is gathered next;
            each costs that unit's values in memory.
        offload_overlap: updates of offloaded state take place during the next forward, which waits unit by unit. The
            same numbers. Where it would hide nothing (home ``cpu`` on a CPU device) or values are gathered in the step
            (``zero1`` and ``zero2`` on several ranks, unless parameters are offloaded too), they take place at once.
        optimizer_in_backward: update each unit as soon as its gradients are reduced, and free them: the gradients of
            one or two units exist at a time, and offloaded state moves beside the backward. The same numbers; but
            nothing can be done with all gradients before the update (clipping, fp16 loss scaling, means over an
            accumulation window): that raises. The optimizer must be known before the first backward (``attach``,
            ``prepare``).
        activation_checkpointing: compute each unit below the root again in backward instead of keeping what is inside:
            only its inputs are kept, for one more forward of it (a third more arithmetic as a rule).
        activation_offload: where what a forward saves for backward is kept: ``device`` or ``cpu``. Each saved byte then
            crosses to the host and back once per micro-batch, on an accelerator beside the computation. With
            ``activation_checkpointing`` these are the units' inputs. On a CPU device nothing moves.
        broadcast_buffers: send rank 0's buffers before each training forward, as DDP does.
        timeout: seconds a collective may wait before every rank ends with a report.

    Raises:
        StrategyError: an unknown preset, key or value, or a combination without meaning.
    """

    preset: str = "zero3"
    offload_params: str = "device"
    offload_grads: str = "device"
    offload_optimizer: str = "device"
    shard_size: int | None = None
    layout: str = "element"
    param_dtype: str | None = None
    autocast: bool | None = None
    reduce_dtype: str | None = None
    offload_ratio: float = 1.0
    nvme_path: str | None = None
    pin_memory: bool = True
    offload_buffers: int = 3
    offload_depth: int = 4
    offload_checksum: bool = False
    offload_prefetch: int = 1
    offload_overlap: bool = True
    optimizer_in_backward: bool = False
    activation_checkpointing: bool = False
    activation_offload: str = "device"
    broadcast_buffers: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        _choose("preset", self.preset, (*PRESETS, AUTO))
        for key in ("offload_params", "offload_grads", "offload_optimizer"):
            homes = HOMES if key != "offload_grads" else HOMES[:2]
            _choose(key, getattr(self, key), homes)
        _choose("layout", self.layout, LAYOUTS)
        for key in (
            "pin_memory",
            "offload_checksum",
            "offload_overlap",
            "optimizer_in_backward",
            "activation_checkpointing",
            "broadcast_buffers",
        ):
            _choose(key, getattr(self, key), (True, False))
        _choose("activation_offload", self.activation_offload, HOMES[:2])
        for key in ("param_dtype", "reduce_dtype"):
            if getattr(self, key) is not None:
                _choose(key, getattr(self, key), DTYPES)
        _choose("autocast", self.autocast, (True, False, None))
        if self.autocast and self.param_dtype not in ("bf16", "fp16"):
            raise StrategyError(
                f"autocast=true has no meaning with param_dtype={str(self.param_dtype).lower()}",
                fix="say param_dtype=bf16 or fp16 as well, or leave autocast out",
            )
        if self.shard_size is not None and self.preset != "hsdp":
            raise StrategyError(
                f"shard_size={self.shard_size} has no meaning for '{self.preset}'",
                fix="use the preset 'hsdp', or leave shard_size out",
            )
        if self.shard_size is not None and self.shard_size < 1:
            raise StrategyError(f"shard_size={self.shard_size} is not a number of ranks", fix="give 1 or more")
        for key in ("offload_buffers", "offload_depth"):
            if getattr(self, key) < 1:
                raise StrategyError(f"{key}={getattr(self, key)} is not a number of them", fix="give 1 or more")
        if self.offload_prefetch < 0:
            raise StrategyError(f"offload_prefetch={self.offload_prefetch} is no number of units", fix="give 0 or more")
        if not 0 <= self.offload_ratio <= 1:
            raise StrategyError(f"offload_ratio={self.offload_ratio} is not a part of 1", fix="give 0 to 1")
        if self.nvme_path is not None and ("," in self.nvme_path or not self.nvme_path):
            raise StrategyError(
                f"nvme_path={self.nvme_path!r} cannot be written in a strategy", fix="name a folder without commas"
            )
        if not self.timeout > 0:
            raise StrategyError(f"timeout={self.timeout} is not a time in seconds", fix="give more than 0")

    # --- the table -------------------------------------------------------------------------
    @property
    def row(self) -> Row:
        """Its row of the table.

        Raises:
            StrategyError: of ``auto``, which has none before the planner has chosen.
        """
        if self.is_auto:
            raise StrategyError(
                "strategy 'auto' has no row of the table before it knows the model",
                fix="shard with fully_shard or Accelerator.prepare, which ask the planner, or name a preset",
            )
        return PRESETS[self.preset]

    @property
    def is_auto(self) -> bool:
        """Is it the planner's to choose?"""
        return self.preset == AUTO

    @property
    def split_params(self) -> bool:
        return self.row.params

    @property
    def split_grads(self) -> bool:
        return self.row.grads

    @property
    def split_optimizer(self) -> bool:
        return self.row.optimizer

    @classmethod
    def parse(cls, text: str | Strategy | None) -> Strategy:
        """Read ``preset,key=value,...``; a :class:`Strategy` passes through, ``None`` is the default."""
        if text is None:
            return cls()
        if isinstance(text, Strategy):
            return text
        if not isinstance(text, str):
            raise StrategyError(
                f"a strategy is a string or a Strategy, not {type(text).__name__}", fix='for example "zero3"'
            )
        preset, *pairs = [part.strip() for part in text.split(",")]
        if "=" in preset:
            raise StrategyError(f"'{text}' does not begin with a preset", fix=f"one of {', '.join(PRESETS)}")
        kinds = {f.name: f.type for f in fields(cls) if f.name != "preset"}
        values: dict[str, object] = {}
        for pair in pairs:
            key, sep, value = (s.strip() for s in pair.partition("="))
            if not sep or key not in kinds:
                raise StrategyError(f"'{pair}' is not one of the keys {', '.join(kinds)}", where=f"strategy '{text}'")
            if key in values:
                raise StrategyError(f"'{key}' is given twice", where=f"strategy '{text}'")
            values[key] = _read(key, value, str(kinds[key]))
        return cls(preset, **values)  # type: ignore[arg-type]

    def in_precision(self, name: str | None) -> Strategy:
        """The same strategy under a mixed precision: ``fp16``, ``bf16``, ``no``, or ``None``, which says nothing.

        A precision that the strategy names itself is meant as it says.
        """
        if name == "no":
            return self.replace(param_dtype=None, autocast=None)
        if name is None or self.param_dtype == name:
            return self
        return self.replace(param_dtype=name, autocast=True if self.autocast is None else self.autocast)

    def replace(self, **changes: object) -> Strategy:
        """The same strategy with some keys changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The string form, which :meth:`parse` reads back to an equal strategy."""
        parts = [self.preset]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "preset" and value != f.default:
                parts.append(f"{f.name}={str(value).lower() if isinstance(value, bool) else value}")
        return ",".join(parts)

    def explain(self) -> str:
        """The table row in words, with what it costs per step (Ψ = parameter elements, N = ranks)."""
        if self.is_auto:
            return "auto: the planner chooses when the model is known; see 'shardwise plan'"
        row = self.row
        over = "the ranks of a shard group, and repeated across groups" if self.preset == "hsdp" else "all ranks"
        lines = [f"{self.preset} (known elsewhere as: {row.known_as})"]
        for state, split, key in (
            ("parameters", row.params, "offload_params"),
            ("gradients", row.grads, "offload_grads"),
            ("optimizer state", row.optimizer, "offload_optimizer"),
        ):
            home = getattr(self, key)
            where = "" if home == "device" else f", home on {home}"
            lines.append(f"  {state}: " + (f"split over {over}" if split else "whole on every rank") + where)
        share = {"ddp": "16Ψ", "zero1": "8Ψ + 8Ψ/N", "zero2": "4Ψ + 12Ψ/N", "zero3": "16Ψ/N", "hsdp": "16Ψ/S"}
        across = "at most 3Ψ inside a shard group and 1Ψ/S to 2Ψ/S across groups"
        wire = {"zero3": "at most 3Ψ", "hsdp": across}.get(self.preset, "2Ψ")
        lines.append(f"  memory per rank with Adam in fp32: {share[self.preset]} bytes")
        lines.append(f"  sent per step: {wire} elements, times (N-1)/N")
        if self.param_dtype:
            lines.append(f"  computes in {self.param_dtype}, with master values in the original dtype")
        if self.autocast:
            lines.append("  runs under torch.autocast: inputs keep their dtype, operations choose theirs")
        elif self.param_dtype:
            lines.append(f"  floating-point inputs of units are cast to {self.param_dtype}")
        if self.reduce_dtype:
            lines.append(f"  gradients cross the wire in {self.reduce_dtype}")
        if self.activation_checkpointing:
            lines.append("  activations: units below the root are computed again in backward; their inputs are kept")
        if self.activation_offload == "cpu":
            lines.append("  what a forward saves for backward is kept in host memory")
        if self.layout == "tensor":
            lines.append("  parameters are never cut: each belongs whole to one rank (for Muon, Adafactor, ...)")
        return "\n".join(lines)


def _choose(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise StrategyError(f"{key}={value!r} is not known", fix=f"one of {', '.join(str(a) for a in allowed)}")


def _read(key: str, value: str, kind: str) -> object:
    try:
        if value.lower() == "none" and "None" in kind:
            return None
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
    except ValueError:
        raise StrategyError(f"{key}={value} is not a number") from None
    if kind.startswith("bool"):
        if value.lower() not in ("true", "false", "1", "0"):
            raise StrategyError(f"{key}={value} is neither true nor false")
        return value.lower() in ("true", "1")
    return value
