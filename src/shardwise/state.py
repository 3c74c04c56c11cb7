"""Who this process is, and what its Accelerator was set to: ``PartialState``, ``AcceleratorState``, ``GradientState``.

The names, and what they mean, are Hugging Face Accelerate's. There the three are shared dictionaries that a second
Accelerator can overwrite; here each is a view: of the process group, of one Accelerator's settings, and of one
Accelerator's steps. Made without arguments, the last two show the Accelerator that was made last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from shardwise import operations
from shardwise.comm import World, init
from shardwise.comm.world import default_device
from shardwise.compat.dataclasses import DistributedType, InitProcessGroupKwargs
from shardwise.environment import local_rank
from shardwise.errors import DataError, StrategyError
from shardwise.gradient_state import GradientState
from shardwise.strategy import Strategy

__all__ = ["AcceleratorState", "GradientState", "PartialState", "ProcessControl", "is_initialized"]


preparations: list[Callable[[], None]] = []
"""Called whenever a script asks who its process is. So those that stand in for another library see who uses it."""


class ProcessControl:
    """What depends on the rank alone: who runs what, who goes first, who takes which part of a list."""

    device: torch.device

    # --- facts -----------------------------------------------------------------------------
    @property
    def num_processes(self) -> int:
        """The world size."""
        return World.current().size

    @property
    def process_index(self) -> int:
        """This rank."""
        return World.current().rank

    @property
    def local_process_index(self) -> int:
        """This rank's number on its host."""
        return local_rank() if self.num_processes > 1 else 0

    @property
    def is_main_process(self) -> bool:
        """This is rank 0."""
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        """This is the first rank of its host."""
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        """This is the last rank."""
        return self.process_index == self.num_processes - 1

    @property
    def use_distributed(self) -> bool:
        """There is more than one rank."""
        return self.num_processes > 1

    @property
    def distributed_type(self) -> DistributedType:
        """``NO``, ``MULTI_CPU`` or ``MULTI_GPU``.

        Never ``FSDP`` or ``DEEPSPEED``, whatever the strategy: scripts ask in order to treat models specially,
        and a prepared model stays an ordinary module.
        """
        if not self.use_distributed:
            return DistributedType.NO
        return DistributedType.MULTI_GPU if self.device.type != "cpu" else DistributedType.MULTI_CPU

    # --- waiting ---------------------------------------------------------------------------
    def wait_for_everyone(self) -> None:
        """Return when every rank is here. A collective."""
        operations.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block, then the others do. A collective; it also ends if rank 0's block raises."""
        with self._first(self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """The first rank of every host runs the block, then the others do. A collective."""
        with self._first(self.is_local_main_process):
            yield

    @contextmanager
    def _first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        try:
            yield
        finally:
            if first:
                self.wait_for_everyone()

    # --- who runs what -----------------------------------------------------------------------
    def on_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """A decorator: call the function on rank 0; on other ranks its calls return ``None``."""
        return self._only(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """A decorator: call the function on the first rank of every host."""
        return self._only(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """A decorator: call the function on the last rank."""
        return self._only(function, lambda: self.is_last_process)

    def on_process(
        self, function: Callable[..., Any] | None = None, process_index: int | None = None
    ) -> Callable[..., Any]:
        """A decorator: call the function on rank ``process_index``.

        Raises:
            DataError: there is no such rank.
        """
        if process_index is None or not 0 <= process_index < self.num_processes:
            raise DataError(
                f"on_process(process_index={process_index}) names no rank",
                fix=f"give 0 to {self.num_processes - 1}",
            )
        return self._only(function, lambda: self.process_index == process_index)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Callable[..., Any]:
        """A decorator: call the function on rank ``local_process_index`` of every host."""
        if local_process_index is None or local_process_index < 0:
            raise DataError("on_local_process needs local_process_index", fix="give a number from 0")
        return self._only(function, lambda: self.local_process_index == local_process_index)

    def _only(self, function: Callable[..., Any] | None, here: Callable[[], bool]) -> Callable[..., Any]:
        if function is None:
            return partial(self._only, here=here)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if here() else None

        return run

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``print``, once per host."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    # --- who takes which part ----------------------------------------------------------------
    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This rank's part of a list, tuple, tensor (along dim 0), ``datasets.Dataset``, or dict of these.

        Parts are runs in order; the first ranks get one more where the length does not divide.

        Args:
            inputs: the same on every rank. A dict's values have one length. Nothing is sent, and ``inputs``
                itself is not changed.
            apply_padding: repeat the last input so that every rank has equally many; drop them after a gather.

        Raises:
            DataError: something that has no order to split; values of different lengths; padding of nothing.
        """
        if self.num_processes == 1:
            yield inputs
            return
        lengths = {len(v) for v in (inputs.values() if isinstance(inputs, dict) else [_sized(inputs)])}
        if len(lengths) != 1:
            raise DataError(f"the dict's values have lengths {sorted(lengths)}", fix="give values of one length")
        length = lengths.pop()
        each, extra = divmod(length, self.num_processes)
        rank = self.process_index
        start = rank * each + min(rank, extra)
        rows = list(range(start, start + each + (rank < extra)))
        if apply_padding and extra:
            rows += [length - 1] * (each + 1 - len(rows))
        yield {k: _take(v, rows) for k, v in inputs.items()} if isinstance(inputs, dict) else _take(inputs, rows)


def _sized(inputs: Any) -> Any:
    if isinstance(inputs, (list, tuple, torch.Tensor)) or hasattr(inputs, "select"):
        return inputs
    raise DataError(
        f"split_between_processes cannot split a {type(inputs).__name__}",
        fix="give a list, a tuple, a tensor, a datasets.Dataset, or a dict of these",
    )


def _take(inputs: Any, rows: list[int]) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs[torch.tensor(rows, dtype=torch.long, device=inputs.device)]
    if isinstance(inputs, (list, tuple)):
        return type(inputs)([inputs[i] for i in rows])
    return _sized(inputs).select(rows)


class _Told:
    """``PartialState._shared_state``: libraries compare it with ``{}`` to see whether a state was made before."""

    def __get__(self, instance: Any, owner: Any = None) -> dict[str, Any]:
        world = World._current
        return {} if world is None else {"device": world.device, "num_processes": world.size}


class PartialState(ProcessControl):
    """The process group, without an Accelerator: for inference scripts and loggers.

    Joins the process group that the launcher prepared, if nobody has yet. Keeps nothing of its own, so it may be
    made as often as wanted.

    Args:
        cpu: stay on the CPU.
        kwargs: for the process group; see :class:`~shardwise.InitProcessGroupKwargs`.

    Attributes:
        device: where this rank computes.

    Raises:
        CommError: the ranks did not find each other.
        ConfigError: a backend or rendezvous that is not the launcher's.
    """

    _shared_state = _Told()

    def __init__(self, cpu: bool = False, **kwargs: Any) -> None:
        for prepare in preparations:
            prepare()
        wanted = torch.device("cpu") if cpu else None
        known = World._current
        if wanted is None and known is not None and known.default_pg is not None:
            wanted = known.device
        self.device = wanted if wanted is not None else default_device()
        init(self.device, timeout=InitProcessGroupKwargs(**kwargs).apply(Strategy("ddp")).timeout)

    @property
    def initialized(self) -> bool:
        return True

    @property
    def backend(self) -> str | None:
        """The process group's backend, as ``torch.distributed`` names it; ``None`` for a single process."""
        return dist.get_backend() if dist.is_initialized() else None

    @property
    def default_device(self) -> torch.device:
        return default_device()

    def destroy_process_group(self, group: Any = None) -> None:
        """Leave the process group (or ``group``). Every rank does."""
        if dist.is_initialized():
            dist.destroy_process_group(group)

    def __repr__(self) -> str:
        return (
            f"Distributed environment: {self.distributed_type}\nNum processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\nLocal process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        """Accelerate's tests call this between each other. Nothing is kept here, so there is nothing to forget."""


class AcceleratorState(PartialState):
    """An Accelerator's settings, beside the facts of :class:`PartialState`.

    ``AcceleratorState()`` shows the Accelerator that was made last.

    Args:
        mixed_precision, cpu, settings: none is needed, and what is said must be what the Accelerator was made with.

    Attributes:
        strategy: its default strategy.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        fsdp_plugin, deepspeed_plugin, parallelism_config: what the script gave, or ``None``.

    Raises:
        StrategyError: there is no Accelerator yet, or it was made with other settings.
    """

    _newest: ClassVar[AcceleratorState | None] = None
    strategy: Strategy
    mixed_precision: str
    fsdp_plugin: Any
    deepspeed_plugin: Any
    parallelism_config: Any

    def __init__(self, mixed_precision: Any = None, cpu: bool = False, **settings: Any) -> None:
        if AcceleratorState._newest is None:
            raise StrategyError("there is no Accelerator yet", fix="create one first: accelerator = Accelerator()")
        self.__dict__ = AcceleratorState._newest.__dict__
        said = {name: value for name, value in settings.items() if value is not None}
        other = [name for name, value in said.items() if getattr(self, name, None) is not value]
        if mixed_precision is not None and str(getattr(mixed_precision, "value", mixed_precision)) != (
            self.mixed_precision
        ):
            other.append("mixed_precision")
        if cpu and self.device.type != "cpu":
            other.append("cpu")
        if other:
            raise StrategyError(
                f"the Accelerator was made with another {', '.join(other)}, and settings are not changed afterwards",
                where="AcceleratorState",
                fix="pass it to Accelerator()",
            )

    @classmethod
    def of(cls, **settings: Any) -> AcceleratorState:
        """That of an Accelerator that is being made: from now on it is the newest."""
        state = cls.__new__(cls)
        state.__dict__.update(settings)
        AcceleratorState._newest = state
        return state

    @classmethod
    def exists(cls) -> bool:
        """An Accelerator was made in this process."""
        return cls._newest is not None

    def __repr__(self) -> str:
        return super().__repr__() + f"Strategy: {self.strategy}\nMixed precision type: {self.mixed_precision}\n"

    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None:
        AcceleratorState._newest = None


def is_initialized() -> bool:
    """An Accelerator was made in this process, and :class:`AcceleratorState` shows it."""
    return AcceleratorState.exists()
