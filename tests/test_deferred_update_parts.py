"""Updates that are put off, without a model: plain tensors stand for an optimizer's shards."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.engine.deferred_update import DeferredStep, snapshot
from shardwise.engine.failure import Failure
from shardwise.errors import UpdateFailed


class Home:
    """What an update asks of a home: how many buffers there are. The thread goes with it."""

    def __init__(self, buffers: int) -> None:
        self.buffers = buffers


class Shard:
    """One parameter's piece, whose bytes are "here" between ``begin`` and ``leave`` only.

    Args:
        log: what happens to all of them, in order.
    """

    remote_grads = False

    def __init__(self, name: str, home: Home, log: list[str], gate: threading.Event) -> None:
        self.name, self.home, self.log, self.gate = name, home, log, gate
        self.bucket = SimpleNamespace(device=torch.device("cpu"))
        self.piece = torch.ones(3)
        self.breaks: Exception | None = None
        self.failure: Failure | None = None
        self.read = False

    def take_grads(self) -> None:
        self.log.append(f"grads of {self.name}")

    def begin(self) -> None:
        if not self.read:
            self.log.append(f"read {self.name}")
        self.read = True

    def enter(self, state: Any) -> None:
        assert self.gate.wait(20.0) and self.read
        if self.breaks is not None:
            raise self.breaks
        self.log.append(f"update {self.name}")

    def leave(self, state: Any) -> None:
        self.log.append(f"write {self.name}")
        self.read = False

    def abandon(self, state: Any) -> None:
        self.log.append(f"abandon {self.name}")

    def cancel(self) -> None:
        if self.read:
            self.log.append(f"drop {self.name}")
        self.read = False

    def fail(self, error: BaseException) -> Failure:
        self.failure = Failure.of_update("SGD", self.name, error)
        return self.failure


class Case:
    """Three shards of one optimizer, each of whose gradients is its number."""

    def __init__(self, buffers: int = 3, homes: int = 1, kind: Any = torch.optim.SGD, **kw: Any) -> None:
        self.log: list[str] = []
        self.gate = threading.Event()
        self.homes = [Home(buffers) for _ in range(homes)]
        self.shards = [Shard("abc"[k], self.homes[k % homes], self.log, self.gate) for k in range(3)]
        self.optimizer = kind([s.piece for s in self.shards], **kw)

    def step(self) -> DeferredStep:
        for k, shard in enumerate(self.shards):
            shard.piece.grad = torch.full((3,), float(k + 1))
        step = DeferredStep(self.optimizer)
        for shard in self.shards:
            step.add(shard, [[shard.piece]], [])
        return step

    def values(self) -> list[float]:
        return [shard.piece[0].item() for shard in self.shards]


def zeroed(case: Case) -> None:
    for shard in case.shards:
        shard.piece.grad = None


def test_updates_take_place_in_order_and_the_next_is_read_ahead():
    case = Case(lr=1.0)
    step = case.step()
    zeroed(case)  # the script clears gradients after its step
    step.start()
    assert case.values() == [1.0] * 3, "step() has returned, and nothing has happened yet"
    case.gate.set()
    for one in step.updates.values():
        one.wait()
    assert case.values() == [0.0, -1.0, -2.0], "with the gradients of then"
    assert all(shard.piece.grad is None for shard in case.shards)
    assert case.log == [
        "grads of a", "grads of b", "grads of c",
        "read a", "read b", "update a", "write a", "read c", "update b", "write b", "update c", "write c",
    ]  # fmt: skip


@pytest.mark.parametrize(("buffers", "homes"), [(1, 1), (3, 3)])
def test_nothing_is_read_ahead_where_there_is_no_room_or_another_home(buffers, homes):
    case = Case(buffers, homes, lr=1.0)
    step = case.step()
    case.gate.set()
    step.start()
    for one in step.updates.values():
        one.wait()
        one.wait()  # as often as anybody asks
    for name in "abc":
        mine = [line for line in case.log if line.endswith(name)]
        assert mine == [f"grads of {name}", f"read {name}", f"update {name}", f"write {name}"]
    assert case.values() == [0.0, -1.0, -2.0]


def test_what_a_forward_waits_for_need_not_be_the_last():
    case = Case(lr=1.0)
    step = case.step()
    step.start()
    first, second, third = step.updates.values()
    case.gate.set()
    second.wait()
    assert case.values()[:2] == [0.0, -1.0]
    third.wait()
    first.wait()


def test_settings_are_those_of_the_step():
    case = Case(lr=1.0)
    step = case.step()
    for group in case.optimizer.param_groups:
        group["lr"] = 100.0
    case.gate.set()
    step.start()
    for one in step.updates.values():
        one.wait()
    assert case.values() == [0.0, -1.0, -2.0]


def test_a_snapshot_shares_state_and_copies_settings():
    lr = torch.tensor(0.5)
    case = Case(kind=torch.optim.AdamW, lr=lr, betas=(0.5, 0.9))
    frozen = snapshot(case.optimizer)
    lr.fill_(9.0)
    case.optimizer.param_groups[0]["betas"] = (0.0, 0.0)
    assert type(frozen) is type(case.optimizer) and frozen.state is case.optimizer.state
    assert frozen.param_groups[0]["lr"].item() == 0.5 and frozen.param_groups[0]["betas"] == (0.5, 0.9)
    assert frozen.param_groups[0]["params"] == [] and len(case.optimizer.param_groups[0]["params"]) == 3


def test_after_a_failure_none_of_the_rest_takes_place_and_all_say_why():
    case = Case(lr=1.0)
    case.shards[1].breaks = OSError("the disk is gone")
    step = case.step()
    case.gate.set()
    step.start()
    updates = list(step.updates.values())
    for one in (updates[2], updates[1], updates[0]):
        with pytest.raises(UpdateFailed, match="the disk is gone"):
            one.wait()
    assert case.values() == [0.0, 1.0, 1.0] and case.shards[1].failure is not None
    assert "update c" not in case.log and not any(shard.read for shard in case.shards)
    assert all(shard.piece.grad is None for shard in case.shards)


def test_the_next_step_is_its_own():
    """A failure belongs to one step: what else lives at the home goes on."""
    case = Case(lr=1.0)
    case.shards[0].breaks = OSError("for a moment")
    case.gate.set()
    failed = case.step()
    failed.start()
    for one in failed.updates.values():
        with pytest.raises(UpdateFailed):
            one.wait()
    case.shards[0].breaks = None
    step = case.step()
    step.start()
    for one in step.updates.values():
        one.wait()
    assert case.values() == [0.0, -1.0, -2.0]
