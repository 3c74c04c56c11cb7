"""What is measured of a machine: that everything is, that it is kept, and that plans use it. Never how fast it was.

So a tenth of the times that a measurement takes for its figures is enough, in ranks that are forked. One is started as
it is for users: the one that fails.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
import processes
from shardwise.errors import PlanError
from shardwise.plan import calls, probes, ranks
from shardwise.plan.calibrate import _solved, calibrate, exactly, rates_here
from shardwise.plan.calibration import Calibration, path_of
from shardwise.plan.calls import Slab
from shardwise.plan.machine import MEASURED, Machine
from shardwise.plan.rates import Rates, key
from shardwise.plan.simulate import Step, simulate
from shardwise.plan.timing import predict
from shardwise.plan.trace import RECOMPUTE
from shardwise.strategy import Strategy


def loss(model: nn.Module) -> torch.Tensor:
    return models.loss_of(model, torch.randint(31, (2, 6)))


def optimizers(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(params)]


def step(world: int, strategy: str = "zero3", layers: int = 2) -> Step:
    build = partial(models.make, d=32, odd=False, layers=layers)
    return Step(build, loss, optimizers, Strategy.parse(strategy), torch.device("cpu"), world, world, 1, 1.0)


def few(world: int) -> list[Step]:
    """What takes a moment. All of them are for the figures, of which there are none here."""
    return [step(world, strategy) for strategy in ("ddp", "zero3,activation_checkpointing=true")]


TIMES = 6


class Rank:
    """What a process of the standard library does, as far as it is asked for."""

    def __init__(self, process: processes.Process) -> None:
        self.process = process

    def join(self, timeout: float | None = None) -> None:
        with suppress(AssertionError):  # it has not ended: it is killed then
            self.process.finish(100.0 if timeout is None else timeout)

    def kill(self) -> None:
        self.process.kill()


def started(rank: int, *told: Any) -> tuple[Connection, Rank]:
    process, pipe = processes.fork(measures, rank, *told, number=rank, connected=True)
    return pipe, Rank(process)


def measures(pipe: Connection, *told: Any) -> None:
    probes._TIMES = calls._REPEATS = TIMES
    ranks._rank(pipe, *told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what was measured of this machine, by one and by two ranks."""
    cache = tmp_path_factory.mktemp("cache") / "shardwise"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_started", started)
        found = calibrate(2, threads=1, disk=cache.parent, folder=cache, told=said.append, steps=few)
    assert [f.ranks for f in found] == [1, 2] and said[0] == "the disk" and "2 ranks" in said[-1]
    return cache


def test_everything_is_measured_and_kept(folder: Path) -> None:
    for count in (1, 2):
        found = Calibration.load(count, 1, folder)
        assert found is not None and found.ranks == count
        assert set(found.products) == {"float32", "bfloat16"} and len(found.memory) > 5
        assert bool(found.node) == (count > 1)
        assert set(found.links) == {"read", "write"} and len(found.exact) > 50
        phases = {"", "forward", "backward", "end of backward", "step"}
        assert set(found.call) == phases | {RECOMPUTE} and set(found.turn) == set(found.begin) == phases
        figures = [*found.call.values(), *found.turn.values(), *found.begin.values(), *found.fresh.values()]
        assert min(figures) >= 0 and 0 < min(found.beside) <= max(found.beside) <= 1
        assert min(seconds for pairs in found.products.values() for _, seconds in pairs) > 0


def test_plans_use_what_was_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    machine = Machine.here(2, device="cpu")
    rates = rates_here(machine, threads=1)
    assert rates is not None
    assert rates.sources["compute"] == rates.sources["node"] == rates.sources["disk"] == MEASURED
    trace = simulate(step(2)).trace
    timing = predict(trace, rates)
    assert timing.seconds > 0 and timing.sources == rates.sources
    assert set(timing.phases) == {"", "forward", "backward", "end of backward", "step"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "nowhere"))
    assert rates_here(machine, threads=1) is None
    assert Rates.of_sheet(machine).sources["compute"].startswith("assumed")


def test_operations_are_measured_as_they_are_and_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_started", started)
    before = Calibration.load(1, 1, folder)
    assert before is not None
    wide = step(1, "ddp,activation_checkpointing=true")
    trace = simulate(replace(wide, build=partial(models.make, d=40, odd=False))).trace
    assert any(e.phase == RECOMPUTE for e in trace.entries)
    names = {key(op) for op in trace.calls}
    assert not names <= set(before.exact)
    after = exactly([trace], before, folder=folder)
    assert len(names - set(after.exact)) <= 0.05 * len(names), "some few cannot be called by themselves"
    assert Calibration.load(1, 1, folder) == after
    assert exactly([trace], after, folder=folder).exact.keys() >= after.exact.keys()
    rates = Rates.measured(Machine.here(1, device="cpu"), after)
    op = next(op for op in trace.calls if key(op) in after.exact)
    assert rates.operation(op) == after.exact[key(op)]


def test_calls_are_what_was_seen() -> None:
    """Strides and all: a transposed matrix is read at another rate."""
    trace = simulate(step(1, "ddp")).trace
    slab = Slab(1 << 22)
    backward = [call for op, call in trace.calls.items() if op.name == "aten::mm"]
    assert any(t.stride[0] == 1 and t.shape[0] > 1 for c in backward for t in c.tensors)
    for call in backward:
        for like in call.tensors:
            made = slab.tensor(like, 1)
            assert (tuple(made.shape), tuple(made.stride()), made.dtype) == (like.shape, like.stride, like.dtype)
        assert slab.seconds(call) is not None


def test_a_file_that_is_no_good_is_no_file(folder: Path, tmp_path: Path) -> None:
    found = Calibration.load(1, 1, folder)
    assert found is not None and Calibration.load(1, 1, tmp_path) is None and Calibration.load(3, 1, folder) is None
    path = found.save(tmp_path)
    assert path == path_of(1, 1, tmp_path) and Calibration.load(1, 1, tmp_path) == found
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))
    assert Calibration.load(1, 1, tmp_path) is None
    path.write_text("{")
    assert Calibration.load(1, 1, tmp_path) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be kept"):
        found.save(tmp_path / "file")


def test_costs_are_told_apart() -> None:
    """And none is negative, however noisy what they follow from."""
    costs = torch.tensor([3e-5, 0.0, 2e-4, 4e-4, 1e-10], dtype=torch.float64)
    rows = [[40.0, 0, 2, 0, 1e5], [40, 0, 2, 2, 1e5], [20, 0, 2, 2, 3e4], [20, 0, 2, 0, 9e6], [41, 0, 3, 0, 8e6]]
    left = (torch.tensor(rows, dtype=torch.float64) @ costs).tolist()
    assert _solved(rows, left, left) == pytest.approx(costs.tolist(), rel=1e-6)
    assert min(_solved(rows, [-x for x in left], left)) == 0


def fails(rank: int) -> None:
    raise ValueError(f"of rank {rank}")


def test_a_rank_that_fails_is_told() -> None:
    with pytest.raises(PlanError, match=r"(?s)rank 0.*of rank 0"):
        ranks.run(1, 1, fails)
