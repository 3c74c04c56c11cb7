"""One rank of the doctor: ``python -m shardwise.cli.doctor.worker JOB`` under the launcher.

Measures the links to the other ranks, then trains a small model under every strategy and writes down what came out.
What it means is decided by the command, which reads the ranks' files.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import shardwise
from shardwise import device as devices
from shardwise.cli.doctor.job import DONE, FAILURE, HANG, SECOND, Job, write_whole
from shardwise.errors import RankFailed

HUNG = 70  # the exit code of a rank that did not finish a phase in time
_WAIT = 0.6  # of a phase's time; then a collective gives up, and says which rank it waited for
_WIDTH, _DEPTH, _ROWS = 64, 4, 8


class Net(nn.Module):
    """A few equal blocks between two outer layers, with odd sizes, a scalar and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(13, _WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 3 * _WIDTH), nn.GELU(), nn.Linear(3 * _WIDTH, _WIDTH))
            for _ in range(_DEPTH)
        )
        self.gain = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(_WIDTH), requires_grad=False)
        self.out = nn.Linear(_WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x * self.gain * self.frozen)


class Phases:
    """Where this rank is, written down for the command, and a clock that ends the rank when it stays there."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        self.name = ""
        self._until = float("inf")
        threading.Thread(target=self._watch, name="shardwise-doctor", daemon=True).start()

    def begin(self, name: str) -> None:
        self.name = name
        self._until = time.monotonic() + self.job.phase_s
        write_whole(self.job.phase_of(self.rank), name)
        # The interpreter's own watchdog also ends a rank that is stuck inside a C call with the lock held.
        faulthandler.dump_traceback_later(self.job.phase_s + 5, exit=True)
        if self.rank == 0 and self.job.lines:
            print(f"doctor: {name}", file=sys.stderr, flush=True)

    def end(self) -> None:
        self._until = float("inf")
        faulthandler.cancel_dump_traceback_later()
        write_whole(self.job.phase_of(self.rank), DONE)

    def fail(self, error: BaseException) -> None:
        """Leave the reason behind."""
        text = str(error).strip().splitlines()
        kind = SECOND if isinstance(error, RankFailed) else FAILURE
        write_whole(
            self.job.phase_of(self.rank), f"{kind}{self.name}: {type(error).__name__}: {text[0] if text else ''}"
        )

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            if time.monotonic() > self._until:
                write_whole(self.job.phase_of(self.rank), f"{HANG}{self.name}")
                print(f"rank {self.rank}: still {self.name} after {self.job.phase_s:.0f} s", file=sys.stderr)
                faulthandler.dump_traceback(sys.stderr)
                sys.stderr.flush()
                os._exit(HUNG)


def main(job: Job) -> None:
    phases = Phases(job, int(os.environ.get("RANK", "0")))
    try:
        _examine(job, phases)
    except BaseException as error:
        phases.fail(error)
        raise


def _examine(job: Job, phases: Phases) -> None:
    phases.begin("starting the ranks")
    torch.set_num_threads(1)  # the model is small, and on a busy machine threads wait for each other
    world = shardwise.init(timeout=job.phase_s * _WAIT)
    facts: dict[str, Any] = {"rank": world.rank, "device": str(world.device), "links": [], "runs": {}}
    phases.begin("measuring the links between ranks")
    if world.size > 1:
        facts["links"] = links(world, job)
    phases.begin("training on one process, to compare with")
    for precision in job.precisions:
        facts["runs"][f"alone {precision}"] = {"losses": alone(world, job, precision)}
    for strategy in job.strategies:
        for precision in job.precisions:
            name = f"{strategy} {precision}"
            phases.begin(f"training under {strategy} in {precision}")
            facts["runs"][name] = sharded(world, job, strategy, precision)
            write_whole(job.facts_of(world.rank), json.dumps(facts))
    write_whole(job.facts_of(world.rank), json.dumps(facts))
    phases.end()
    if dist.is_initialized():
        dist.destroy_process_group()


# --- links ------------------------------------------------------------------------------------
def links(world: Any, job: Job) -> list[dict[str, Any]]:
    """Latency and bandwidth of every pair of ranks, one pair at a time. Each pair's lower rank has the figures."""
    out = []
    small = torch.zeros(1, device=world.device)
    large = torch.zeros(job.link_bytes // 4, device=world.device)
    for a in range(world.size):
        for b in range(a + 1, world.size):
            if world.rank in (a, b):
                first, other = world.rank == a, b if world.rank == a else a
                _ping(small, other, first, 3)  # connects
                round_s = _ping(small, other, first, 4 * job.link_rounds)
                _ping(large, other, first, 1)
                large_s = _ping(large, other, first, job.link_rounds)
                if first:
                    rate = job.link_bytes / max(large_s / 2, 1e-9)
                    out.append({"ranks": [a, b], "latency_us": round_s / 2 * 1e6, "bytes_per_s": rate})
            dist.all_reduce(small)  # one pair at a time: they share the machine
    return out


def _ping(tensor: torch.Tensor, other: int, first: bool, rounds: int) -> float:
    """Seconds that a message takes there and back, the median of ``rounds``."""
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for sends in (first, not first):
            if sends:
                dist.send(tensor, other)
            else:
                dist.recv(tensor, other)
        devices.synchronize(tensor.device)
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


# --- training ---------------------------------------------------------------------------------
def batch(step: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (rows, 13) and classes (rows,) that depend on step and rank alone."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(_ROWS, 13, generator=draw)
    return x.to(device), x[:, :7].argmax(1).to(device)


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).float(), y)


def _fresh(device: torch.device) -> Net:
    torch.manual_seed(0)
    return Net().to(device)


def alone(world: Any, job: Job, precision: str) -> list[float]:
    """The oracle: losses of one plain PyTorch process on the batches of all ranks together."""
    model = _fresh(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(job.steps):
        parts = [batch(step, r, world.device) for r in range(world.size)]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = _loss(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(world: Any, job: Job, strategy: str, precision: str) -> dict[str, Any]:
    """What came of a few steps: this rank's losses, the weights' hash, bytes sent in a step and the formula's."""
    begun = time.perf_counter()
    chosen = shardwise.Strategy.parse(strategy).replace(timeout=job.phase_s * _WAIT)
    if precision != "fp32":
        chosen = chosen.replace(param_dtype=precision)
    model = _fresh(world.device)
    shardwise.fully_shard(model, strategy=chosen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(job.steps):
        if step == job.steps - 1:
            shardwise.reset_stats()  # the first steps learn the order of units; the last is like all that follow
        loss = _loss(model, *batch(step, world.rank, world.device))
        loss.backward()
        shardwise.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    counted = shardwise.stats(model).comm
    sent = sum(counted[kind].bytes_sent for kind in ("gather", "reduce") if kind in counted)
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "losses": losses,
        "weights": digest.hexdigest(),
        "sent": sent,
        "expected": shardwise.expected(model).sent_per_step,
        "seconds": time.perf_counter() - begun,
    }


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
