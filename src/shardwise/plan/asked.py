"""What somebody asks the planner: a model, a machine, and how it is to be trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from shardwise.errors import PlanError, did_you_mean
from shardwise.plan.machine import Machine
from shardwise.plan.optimizers import optimizer as known_optimizer
from shardwise.plan.prediction import Training, run
from shardwise.plan.rates import Rates
from shardwise.plan.subject import resolve
from shardwise.plan.trace import Trace
from shardwise.strategy import Strategy

_NUMBERS = ("nodes", "batch", "global_batch", "seq")
PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "no": None, "fp32": None}


@dataclass(frozen=True)
class Asked:
    """A question's terms; see ``shardwise plan --help``.

    Raises:
        PlanError: a figure makes no sense.
    """

    model: str
    devices: str | None = None
    nodes: int = 1
    network: str | None = None
    host_memory: str | None = None
    nvme: str | None = None
    batch: int | None = None
    global_batch: int | None = None
    seq: int | None = None
    optimizer: str = "adamw"
    precision: str = "bf16"
    clip: float | None = 1.0
    lora: str | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"--{name.replace('_', '-')} {value} is no number of them", fix="give 1 or more")
        if self.clip is not None and not 0 <= self.clip < float("inf"):
            raise PlanError(f"--clip {self.clip} is no norm", fix="give more than 0, or 0 for none")
        if self.precision not in PRECISIONS:
            fix = did_you_mean(self.precision, PRECISIONS, f"one of {', '.join(PRECISIONS)}")
            raise PlanError(f"--precision {self.precision} is not known", fix=fix)
        known_optimizer(self.optimizer)
        if self.devices is None and (self.nodes > 1 or self.network is not None):
            raise PlanError("--nodes needs --devices: this machine is one node", fix="name the devices of a node")

    @property
    def machine(self) -> Machine:
        """The one that was named, or the one at hand."""
        if self.devices is not None:
            return Machine.parse(
                self.devices, nodes=self.nodes, host_memory=self.host_memory, nvme=self.nvme, network=self.network
            )
        here = Machine.here()
        if self.nvme is None and self.host_memory is None:
            return here
        told = Machine.parse("1xcpu", host_memory=self.host_memory, nvme=self.nvme)
        return replace(
            here,
            host_memory=told.host_memory if self.host_memory is not None else here.host_memory,
            nvme=told.nvme,
            nvme_bytes=told.nvme_bytes,
            sources={**here.sources, **{k: v for k, v in told.sources.items() if k in ("nvme", "nvme_bytes")}},
        )

    def rates(self, machine: Machine, training: Training) -> Rates:
        """Measured ones for the machine at hand, if it was calibrated; else those of data sheets.

        On a CPU that was, the operations of this model are measured as they are, with the rows that were asked for: a
        few seconds, once.
        """
        if self.devices is not None:
            return Rates.of_sheet(machine)
        from shardwise.plan.calibrate import rates_here

        return rates_here(machine, traces=partial(self._traces, machine, training)) or Rates.of_sheet(machine)

    def _traces(self, machine: Machine, training: Training) -> list[Trace]:
        """Steps that between them have most of the operations that any strategy has."""
        plain = Strategy("ddp", param_dtype=PRECISIONS[self.precision])
        rows = [plain, plain.replace(activation_checkpointing=True)]
        return [run(training, machine, row).base.trace for row in rows]

    def training(self) -> Training:
        """What is trained, with the rows that were asked for, or one.

        Raises:
            PlanError: there is no such model.
        """
        subject = resolve(self.model, batch=self.batch, seq=self.seq, lora=self.lora)
        return Training(subject, self.optimizer, clip=self.clip)

    def strategy(self, text: str) -> Strategy:
        """A strategy that was named, in the precision that was asked for unless it names its own."""
        found = Strategy.parse(text)
        if "nvme" in (found.offload_params, found.offload_optimizer) and self.machine.nvme is None:
            raise PlanError(f"'{found}' needs disks, and none were told of", fix="--nvme 3.5GB/s,4TB")
        wanted = PRECISIONS[self.precision]
        return found.replace(param_dtype=wanted) if wanted and found.param_dtype is None else found

    def changed(self, key: str, value: str) -> Asked:
        """The same with another option.

        Raises:
            PlanError: there is no such option, or the value is none.
        """
        if key not in self.__dataclass_fields__ or key == "model":
            raise PlanError(f"there is no option '{key}'")
        given: object = value
        try:
            if key in _NUMBERS:
                given = int(value)
            elif key == "clip":
                given = float(value) or None
        except ValueError:
            raise PlanError(f"{key}={value} is no number") from None
        return replace(self, **{key: given})  # type: ignore[arg-type]
