"""When the backward of a unit is over, and in which order units are reduced: on one rank, without processes.

The rule: a call of a unit is over when the first gradient of a call outside of it arrives. Which gradients arrive in
between does not matter, so that ranks whose routed experts are idle do what the others do.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwise
from shardwise.engine.backward import Backward
from shardwise.engine.hooks import engine_of
from shardwise.engine.passes import UnitOrder

D = 4
Events = list[tuple[str, str]]


class Record:
    """What the backwards of one model do, in order: units begin, are over, are reduced."""

    def __init__(self, model: nn.Module) -> None:
        self.engine = engine_of(model)
        assert self.engine is not None
        self.events: Events = []
        for method, what in (("_is_done", "over"), ("launch", "reduce"), ("enter", "begin")):
            self._wrap(self.engine.backward, method, what)

    def _wrap(self, backward: Backward, method: str, what: str) -> None:
        original = getattr(backward, method)

        def wrapped(*args: Any) -> None:
            unit = next(a for a in args if hasattr(a, "buckets"))
            if what == "begin":  # what is over because of it comes first
                original(*args)
            if self.events[-1:] != [(what, unit.name)]:  # every output of a call begins it
                self.events.append((what, unit.name))
            if what == "over":
                original(*args)
                assert not unit.released or not unit.here, "its values are not needed any more"
            elif what == "reduce":
                original(*args)

        setattr(backward, method, wrapped)

    def of(self, what: str) -> list[str]:
        return [name for kind, name in self.events if kind == what]


def sharded(model: nn.Module, tmp_path: Any = None, units: Any = None) -> Record:
    """``tmp_path``: parameters are offloaded there, so that values come and go on one rank, too.

    Without it gradients cross in another dtype, so that there is something to reduce.
    """
    strategy = "ddp,reduce_dtype=bf16" if tmp_path is None else f"zero3,offload_params=nvme,nvme_path={tmp_path}"
    shardwise.fully_shard(model, strategy=strategy, units=units)
    return Record(model)


def backward(record: Record, model: nn.Module, loss: Any = None) -> Events:
    record.events.clear()
    x = torch.randn(3, D)
    (loss(model, x) if loss is not None else model(x).square().mean()).backward()
    for p in model.parameters():
        p.grad = None
    return list(record.events)


def named(*names: str) -> Any:
    return lambda name, module: name in names


# --- models -------------------------------------------------------------------------------------------------
class Chain(nn.Module):
    def __init__(self, n: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(n))
        self.head = nn.Linear(D, D)

    def through(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(layer(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.through(layer, x)
        return self.head(x)


class Checkpointed(Chain):
    def through(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().through, layer, x, use_reentrant=False)


class Reentrant(Chain):
    def through(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().through, layer, x.requires_grad_() if x.is_leaf else x, use_reentrant=True)


class Twice(Chain):
    """The first layer is used once more at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](super().forward(x))


class Siblings(Chain):
    """Three branches, which are added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(sum(self.through(layer, x) for layer in self.layers))


class Nested(nn.Module):
    """Units in units: ``outer.i`` has a layer of its own before and after ``outer.i.inner``."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList(Outer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for outer in self.outer:
            x = outer(x)
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.tanh(self.inner(torch.tanh(self.before(x)))))


class Experts(nn.Module):
    """A block of which some layers may be idle, and which may leave a loss behind."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(experts))
        self.used: frozenset[int] = frozenset()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.gate(x)
        out = x + 0.1 * h
        for i in self.used:
            out = out + self.experts[i](x)
        return out, h.square().mean()


class Routed(nn.Module):
    def __init__(self, blocks: int = 4, experts: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts(experts) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.auxiliary = []
        for block in self.blocks:
            x, loss = block(x)
            self.auxiliary.append(loss)
        return x


# --- the order -------------------------------------------------------------------------------------------------
LAYERS = named("layers.0", "layers.1", "layers.2")
OUTERS = named("outer.0", "outer.1", "outer.0.inner", "outer.1.inner")
REVERSED = ["layers.2", "layers.1", "layers.0"]


def check(events: Events, begin: list[str], over: list[str], reduce: list[str]) -> None:
    assert [name for what, name in events if what == "begin"] == begin
    assert [name for what, name in events if what == "over"] == over  # what is left is over at the end
    assert [name for what, name in events if what == "reduce"] == reduce  # each once


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("build", [Chain, Siblings, Checkpointed, Reentrant])
def test_each_unit_is_over_when_the_one_before_it_begins(build, released, tmp_path):
    model = build()
    record = sharded(model, tmp_path if released else None, LAYERS)
    for _ in range(3):  # the first backward guesses the order of reduces, later ones know it
        events = backward(record, model)
        check(events, ["", *REVERSED], REVERSED[:2], [*REVERSED, ""])
        for after, before in pairwise(REVERSED):
            at = events.index(("over", after))
            assert events[at : at + 3] == [("over", after), ("reduce", after), ("begin", before)]


@pytest.mark.parametrize("released", [False, True])
def test_a_unit_is_over_with_the_first_of_its_calls(released, tmp_path):
    """The backward meets the last call first: its gradients are not all of them."""
    model = Twice()
    record = sharded(model, tmp_path if released else None, LAYERS)
    for _ in range(3):
        check(backward(record, model), ["layers.0", "", *REVERSED], REVERSED[:2], [*REVERSED, ""])


@pytest.mark.parametrize("released", [False, True])
def test_what_is_around_a_unit_is_not_over_before_it(released, tmp_path):
    """The root returns the output of ``outer.1``: both begin with one gradient, and neither is over."""
    model = Nested()
    record = sharded(model, tmp_path if released else None, OUTERS)
    begin = ["outer.1", "", "outer.1.inner", "outer.0", "outer.0.inner"]
    over = ["outer.1", "outer.1.inner"]
    guess = ["outer.1.inner", "outer.1", "outer.0.inner", "outer.0"]  # the reverse of registration
    check(backward(record, model), begin, over, guess)
    for _ in range(2):
        check(backward(record, model), begin, over, [*over, "outer.0", "outer.0.inner"])


def test_a_second_output_of_what_is_around_ends_what_is_inside():
    """An output from before a unit: when its gradient arrives, the unit is over."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = torch.tanh(self.first(x))
            before = kept * 3
            return self.second(kept * 2), before

    model = nn.Sequential(nn.Linear(D, D), Keeps())
    record = sharded(model, None, named("1", "1.second", "0"))
    for _ in range(2):
        events = backward(record, model, lambda m, x: sum(out.square().mean() for out in m(x)))
        begin = [("begin", name) for name in ("1.second", "1", "")]
        assert events[:5] == [*begin, ("over", "1.second"), ("reduce", "1.second")]
        assert sorted(name for what, name in events if what == "reduce") == ["0", "1", "1.second"]


def from_all(model: Routed, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean() + sum(model.auxiliary)


def from_the_last(model: Routed, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean() + model.auxiliary[-1]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("loss", [None, from_all, from_the_last])
def test_idle_layers_change_nothing(loss, released, tmp_path):
    model = Routed()
    record = sharded(model, tmp_path if released else None, Experts)
    expected = backward(record, model, loss)
    assert [name for what, name in expected if what == "reduce"] == [f"blocks.{i}" for i in (3, 2, 1, 0)]
    used = st.lists(st.frozensets(st.integers(0, 1)), min_size=4, max_size=4)

    @given(used, st.booleans())
    @settings(max_examples=25, deadline=None)
    def whatever_is_idle(used, zeroed):
        for block, some in zip(model.blocks, used, strict=True):
            block.used = some
        record.events.clear()
        x = torch.randn(3, D)
        (model(x).square().mean() if loss is None else loss(model, x)).backward()
        assert record.events == expected
        for block, some in zip(model.blocks, used, strict=True):
            assert all(block.experts[i].weight.grad is not None for i in some)
        if zeroed:
            for p in model.parameters():
                p.grad = None

    whatever_is_idle()


def test_a_unit_without_any_gradient_is_over_in_its_turn():
    """All that a block made is unused but what passed through: the others do not wait for it."""
    model = Routed()
    record = sharded(model, None, Experts)
    expected = backward(record, model)
    model.blocks[2].gate.requires_grad_(False)
    without = backward(record, model)
    assert [e for e in without if e[0] != "begin"] == [e for e in expected if e[0] != "begin"]


# --- the guess ---------------------------------------------------------------------------------------------------
def units(*names: str) -> list[Any]:
    return [SimpleNamespace(name=name) for name in names]


def test_the_last_pass_tells_what_comes_next():
    a, b, c, d = units("a", "b", "c", "d")
    order = UnitOrder()
    order.begin()
    assert [order.after(u, 2) for u in (a, b, c, d)] == [[], [], [], []]
    order.begin()
    assert [order.after(u, 2) for u in (a, b, c, d)] == [[b, c], [c, d], [d], []]
    order.begin()
    assert [order.after(u, 1) for u in (a, c, d)] == [[b], [d], []], "b was left out: it goes on from where c was"
    assert order.after(SimpleNamespace(name="new"), 1) == []
    order.begin()
    assert order.after(a, 3)[:2] == [c, d]


def test_a_unit_that_comes_twice_is_followed_by_what_followed_it_there():
    a, b, c = units("a", "b", "c")
    order = UnitOrder()
    order.begin()
    for unit in (a, b, a, c):
        order.after(unit, 1)
    order.begin()
    assert [order.after(u, 1) for u in (a, b, a, c)] == [[b], [a], [c], []]


def test_before_any_pass_a_guess_counts_and_a_pass_of_nothing_teaches_nothing():
    a, b = units("a", "b")
    order = UnitOrder()
    order.begin([a, b])
    assert order.after(a, 1) == [b]
    order.begin([b, a])
    assert order.last == [a], "what has been seen goes before a guess"
    order.begin([b, a])
    assert order.last == [a]
