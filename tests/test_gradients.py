"""A bucket's gradients without a backward: the table of their states, and their values against plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from shardwise.comm import init
from shardwise.engine.bucket import Bucket
from shardwise.engine.grad_states import GradState, GradStates
from shardwise.errors import GradientError, InternalError
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.home import Home

G = GradState
# Written out again, so that a change of the table is a change of two files.
ALLOWED = {
    (G.NONE, G.NONE), (G.NONE, G.LOCAL), (G.NONE, G.REDUCED),
    (G.LOCAL, G.LOCAL), (G.LOCAL, G.REDUCED), (G.LOCAL, G.NONE),
    (G.REDUCED, G.REDUCED), (G.REDUCED, G.ADDING), (G.REDUCED, G.SPENT), (G.REDUCED, G.NONE),
    (G.ADDING, G.ADDING), (G.ADDING, G.REDUCED), (G.ADDING, G.NONE),
    (G.SPENT, G.SPENT), (G.SPENT, G.NONE),
    (G.LOST, G.REDUCED), (G.LOST, G.NONE),
}  # fmt: skip
PAIRS = [(a, b) for a in G for b in G]


def states_in(state: GradState) -> GradStates:
    states = GradStates(3, "'blocks.3'")
    if state in (G.LOCAL, G.LOST):
        states.arrive(1)
    elif state is not G.NONE:
        states.reduced()
    if state is G.ADDING:
        states.arrive(1)
    elif state is G.SPENT:
        states.spend()
    elif state is G.LOST:
        states.lose([False, True, False])
    assert states[1] is state
    return states


# --- the table --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=[f"{a.name}-{b.name}" for a, b in PAIRS])
def test_every_transition_works_or_raises(before, after):
    states = states_in(before)
    others = states[0], states[2]
    if (before, after) in ALLOWED:
        states.to(1, after)
        assert states[1] is after
    else:
        with pytest.raises(InternalError, match=f"from {before.name} to {after.name}") as caught:
            states.to(1, after)
        assert states[1] is before and "'blocks.3'" in caught.value.where
    assert (states[0], states[2]) == others


@pytest.mark.parametrize("state", G)
def test_what_others_ask(state):
    states = states_in(state)
    assert states.waits(1) == (state in (G.LOCAL, G.ADDING)) == states.any_waits
    assert states.is_reduced(1) == (state in (G.REDUCED, G.ADDING))


class StatesMachine(RuleBasedStateMachine):
    """Three gradients, each as what waits and what is reduced: two numbers that may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.states = GradStates(3)
        self.waiting: list[int | None] = [None] * 3
        self.whole: list[int | None] = [None] * 3
        self.gone: dict[int, GradState] = {}

    @rule(i=st.integers(0, 2))
    def arrive(self, i):
        if i in self.gone:
            with pytest.raises(InternalError):
                self.states.arrive(i)
            return
        assert self.states.arrive(i) == (self.waiting[i] is None)
        self.waiting[i] = (self.waiting[i] or 0) + 1

    @precondition(lambda self: not self.gone)
    @rule()
    def reduce(self):
        self.states.taken()
        self.states.reduced()
        self.whole = [(a or 0) + (b or 0) for a, b in zip(self.whole, self.waiting, strict=True)]
        self.waiting = [None] * 3

    @rule(waited=st.lists(st.booleans(), min_size=3, max_size=3))
    def a_backward_fails(self, waited):
        for i in range(3):
            if waited[i] and self.waiting[i] is not None:
                self.gone[i], self.whole[i] = G.LOST, None
        lost = [i in self.gone and self.gone[i] is G.LOST for i in range(3)]
        self.states.lose([w and self.states.waits(i) for i, w in enumerate(waited)])
        self.waiting = [None] * 3
        assert [self.states[i] is G.LOST for i in range(3)] == lost

    @rule()
    def spend(self):
        if all(w is not None or self.gone.get(i) is G.SPENT for i, w in enumerate(self.whole)) and not any(
            w is not None for w in self.waiting
        ):
            self.states.spend()
            self.gone, self.whole = dict.fromkeys(range(3), G.SPENT), [None] * 3

    @rule(i=st.integers(0, 2))
    def zero(self, i):
        self.states.to(i, G.NONE)
        self.waiting[i] = self.whole[i] = None
        self.gone.pop(i, None)

    @invariant()
    def agree(self):
        kinds = {(False, False): G.NONE, (True, False): G.LOCAL, (False, True): G.REDUCED, (True, True): G.ADDING}
        for i in range(3):
            there = self.waiting[i] is not None, self.whole[i] is not None
            assert self.states[i] is self.gone.get(i, kinds[there])
        assert self.states.any_waits == any(w is not None for w in self.waiting)
        assert self.states.any_reduced == any(w is not None for w in self.whole)


TestStates = StatesMachine.TestCase
TestStates.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


# --- values ----------------------------------------------------------------------------------------------------
SHAPES = [(2, 3), (), (5,)]
# What arrives is whole numbers, which bf16 holds exactly.
arrivals = st.lists(st.tuples(st.integers(0, 2), st.integers(-3, 3)), max_size=5)


class Values(RuleBasedStateMachine):
    """One bucket on one rank, and what its gradients are in plain arithmetic.

    Attributes:
        reduced, waiting: per parameter, the value of all its elements.
        hand: what the script has put into ``p.grad``, until the next look.
        gone: parameters whose gradient an update has spent, or a failed backward has lost.
    """

    strategy = "ddp,optimizer_in_backward=true"  # otherwise they are left to autograd
    separate = False

    @initialize()
    def make(self):
        world, cpu = init(torch.device("cpu"), timeout=60.0), torch.device("cpu")
        strategy = Strategy.parse(self.strategy)
        self.ledger = Ledger()
        self.params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        home = Home("cpu", self.ledger, separate=True) if self.separate else None
        names = [f"p{i}" for i in range(len(SHAPES))]
        self.bucket = Bucket("'unit'", self.params, names, world.mesh(cpu, 1, 60.0), strategy, self.ledger, home)
        self.grads = self.bucket.grads
        self.reduced: list[int | None] = [None] * 3
        self.waiting: list[int | None] = [None] * 3
        self.hand: dict[int, int] = {}
        self.gone: dict[int, GradState] = {}

    # --- what the script and the backward do ---------------------------------------------------------
    def begin(self) -> list[bool] | None:
        shown = [p.grad is not None for p in self.params]
        if any(shown[i] and i not in self.hand for i in self.gone):
            before = [p.grad for p in self.params]
            with pytest.raises(GradientError, match="the gradient is gone"):
                self.grads.read_flags()
            assert all(p.grad is grad for p, grad in zip(self.params, before, strict=True)), "nothing is hidden"
            return None
        assert self.grads.read_flags() == shown
        for i in range(3):
            if not shown[i]:
                self.reduced[i] = self.waiting[i] = None
            elif i in self.hand and self.reduced[i] is None and self.waiting[i] is not None:
                self.waiting[i] = self.hand[i]
            elif i in self.hand:
                self.reduced[i], self.waiting[i] = self.hand[i], None
        self.hand.clear()
        self.gone.clear()
        return shown

    def arrive(self, values: list[tuple[int, int]]) -> None:
        for i, value in values:
            self.grads.arrive(i, torch.full(SHAPES[i], float(value), dtype=self.bucket.dtype))
            self.waiting[i] = (self.waiting[i] or 0) + value

    def show(self, had: list[bool], values: list[tuple[int, int]]) -> None:
        for i in {i for i, _ in values} | {i for i in range(3) if had[i]}:
            self.grads.show(i, self.params[i])

    def taken(self) -> None:
        self.reduced = [(a or 0) + (b or 0) for a, b in zip(self.reduced, self.waiting, strict=True)]
        self.waiting = [None] * 3

    @rule(values=arrivals, late=arrivals)
    def backward(self, values, late):
        had = self.begin()
        if had is None:
            return
        self.arrive(values)
        self.grads.launch_reduce()
        self.taken()
        self.arrive(late)
        self.grads.advance_reduce()
        self.grads.finish_reduce()
        if late:
            self.grads.launch_reduce()
            self.grads.finish_reduce()
            self.taken()
        self.show(had, values + late)

    @rule(values=arrivals)
    def backward_under_no_sync(self, values):
        had = self.begin()
        if had is not None:
            self.arrive(values)
            self.show(had, values)

    @rule(values=arrivals)
    def local_backward(self, values):
        had = None if self.bucket.grads.split else self.begin()
        if had is not None and values:
            self.arrive(values)
            self.grads.keep()
            self.taken()
            self.show(had, values)
        elif had is not None:
            self.show(had, values)

    @rule(values=arrivals, launched=st.booleans())
    def failed_backward(self, values, launched):
        had = self.begin()
        if had is None:
            return
        waiting, before = list(self.waiting), list(self.reduced)
        self.arrive(values)
        if launched:
            self.grads.launch_reduce()
        self.grads.forget()
        self.grads.drop_reduce()
        self.waiting = [None] * 3
        alone = self.grads._alone  # what arrives is added at once, as without us, and a reduce has nothing to do
        for i in range(3):
            if waiting[i] is not None and alone and launched:
                self.reduced[i] = waiting[i] if before[i] is None else before[i] + waiting[i]
            elif waiting[i] is not None:
                self.gone[i], self.reduced[i] = G.LOST, None
        for i, value in values if alone else ():
            if self.reduced[i] is not None and (waiting[i] is not None or before[i] is not None):
                self.reduced[i] += value
        self.show(had, [])

    @precondition(lambda self: all(s is G.REDUCED for s in self.grads.states.states))
    @rule()
    def update_in_backward(self):
        shown = [i for i, p in enumerate(self.params) if p.grad is not None and i not in self.hand]
        self.grads.spend()
        for i in shown:
            self.grads.show(i, self.params[i])
        self.reduced = [None] * 3
        self.gone = dict.fromkeys(range(3), G.SPENT)
        for i in self.hand:
            self.params[i].grad = None
        self.hand.clear()

    @rule(i=st.integers(0, 2))
    def zero(self, i):
        self.params[i].grad = None
        self.hand.pop(i, None)

    @rule(i=st.integers(0, 2))
    def zero_in_place(self, i):
        if self.params[i].grad is None or i in self.hand:
            return
        self.params[i].grad.zero_()
        if i in self.gone:
            assert self.params[i].grad is None, "there is nothing to zero: it is no error"
        for kept in (self.reduced, self.waiting):
            kept[i] = None if kept[i] is None else 0

    @precondition(lambda self: G.SPENT not in self.gone.values())
    @rule(i=st.integers(0, 2), value=st.integers(-3, 3))
    def set_by_hand(self, i, value):
        self.params[i].grad = torch.full(SHAPES[i], float(value))
        self.hand[i] = value

    # --- what they see -----------------------------------------------------------------------------------
    @invariant()
    def the_optimizer_sees_what_plain_arithmetic_says(self):
        for i, p in enumerate(self.params):
            if p.grad is None or self.gone.get(i) is G.SPENT:
                assert self.grads.for_step(i) is None
            elif self.waiting[i] is not None:
                with pytest.raises(GradientError, match="no_sync"):
                    self.grads.for_step(i)
            elif self.gone.get(i) is G.LOST and i not in self.hand:
                with pytest.raises(GradientError, match="micro-batches of this step again"):
                    self.grads.for_step(i)
            else:
                if i in self.hand:
                    self.reduced[i] = self.hand[i]
                    self.gone.pop(i, None)
                pieces = self.grads.for_step(i)
                assert torch.cat([piece.reshape(-1) for piece in pieces]).tolist() == [self.reduced[i]] * p.numel()

    @invariant()
    def the_script_sees_it_too(self):
        for i, p in enumerate(self.params):
            if p.grad is None or i in self.gone:
                continue
            assert p.grad.shape == p.shape and p.grad.dtype == torch.float32
            if i not in self.hand:
                both = (self.reduced[i] or 0) + (self.waiting[i] or 0)
                assert (p.grad + 0).flatten().tolist() == [both] * p.numel()

    @invariant()
    def buffers_are_given_back(self):
        raw = self.grads.raw
        kept = 0 if raw is None or raw is self.grads.reduced else raw.numel() * raw.element_size()
        assert self.ledger.live["gather_buffers"] == kept
        whole = self.grads.reduced
        assert self.ledger.live["gradients"] == (0 if whole is None else whole.numel() * whole.element_size())


class OnTheWire(Values):
    strategy = "ddp,reduce_dtype=bf16"


class ComputedInBf16(Values):
    strategy = "ddp,param_dtype=bf16"


class OnTheHost(Values):
    strategy = "zero2,offload_grads=cpu"
    separate = True


class OnTheHostInBf16(Values):
    strategy = "zero2,offload_grads=cpu,param_dtype=bf16,reduce_dtype=bf16"
    separate = True


def case_of(machine: type[Values]) -> Any:
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=12, deadline=None)
    return case


TestWhole = case_of(Values)
TestOnTheWire = case_of(OnTheWire)
TestComputedInBf16 = case_of(ComputedInBf16)
TestOnTheHost = case_of(OnTheHost)
TestOnTheHostInBf16 = case_of(OnTheHostInBf16)
