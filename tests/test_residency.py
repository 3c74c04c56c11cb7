"""The states of a unit's values, without a unit: every transition, and the counts of those who need them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.engine.residency import Pin, Residence, Residency
from shardwise.errors import InternalError

R = Residency
# Written out again, so that a change of the table is a change of two files.
ALLOWED = {
    (R.RELEASED, R.STAGING), (R.RELEASED, R.GATHERING), (R.RELEASED, R.UPDATING), (R.RELEASED, R.FAILED),
    (R.STAGING, R.GATHERING), (R.STAGING, R.RELEASED), (R.STAGING, R.FAILED),
    (R.GATHERING, R.GATHERED), (R.GATHERING, R.FAILED),
    (R.GATHERED, R.RELEASED), (R.GATHERED, R.GATHERING), (R.GATHERED, R.UPDATING), (R.GATHERED, R.FAILED),
    (R.UPDATING, R.RELEASED), (R.UPDATING, R.GATHERED), (R.UPDATING, R.FAILED),
    (R.FAILED, R.RELEASED), (R.FAILED, R.GATHERED),
}  # fmt: skip


def path_to(state: Residency, released: bool) -> list[Residency] | None:
    """The shortest way there from a new unit; ``None`` if there is none."""
    paths: list[list[Residency]] = [[R.GATHERED]]
    for path in paths:
        if path[-1] is state:
            return path[1:]
        for a, b in sorted(ALLOWED, key=lambda pair: (pair[0].value, pair[1].value)):
            if a is path[-1] and b not in path and (released or b is not R.RELEASED):
                paths.append([*path, b])
    return None


def residence_in(state: Residency, released: bool = True) -> Residence:
    residence = Residence("'blocks.3'", released=released)
    for one in path_to(state, released) or ():
        residence.to(one)
    assert residence.state is state
    return residence


CASES = [(a, b, released) for released in (True, False) for a in R if path_to(a, released) is not None for b in R]


@pytest.mark.parametrize(
    ("before", "after", "released"),
    CASES,
    ids=[f"{a.name}-{b.name}-{'released' if r else 'kept'}" for a, b, r in CASES],
)
def test_every_transition_works_or_raises(before, after, released):
    residence = residence_in(before, released)
    if (before, after) in ALLOWED and (released or after is not R.RELEASED):
        residence.to(after)
        assert residence.state is after
        assert residence.history.endswith(f"{before.value} > {after.value}")
        return
    with pytest.raises(InternalError, match=f"from {before.value} to {after.value}") as caught:
        residence.to(after)
    assert residence.state is before, "nothing has changed"
    assert "'blocks.3'" in caught.value.where and residence.history in caught.value.where
    assert "report" in caught.value.fix


@pytest.mark.parametrize("released", [True, False])
def test_from_every_state_values_come_back(released):
    states = [s for s in R if path_to(s, released) is not None]
    assert len(states) == (6 if released else 4)
    back = {R.GATHERED}
    for _ in R:
        back |= {a for a, b in ALLOWED if b in back}
    assert back >= set(states)


def test_the_history_is_short_and_in_order():
    residence = Residence("'a'", released=True)
    assert residence.history == "gathered"
    for _ in range(20):
        for state in (R.RELEASED, R.STAGING, R.GATHERING, R.GATHERED):
            residence.to(state)
    assert residence.history == " > ".join(["released", "staging", "gathering", "gathered"] * 3)


@pytest.mark.parametrize("state", R)
def test_what_others_ask(state):
    residence = residence_in(state)
    assert residence.here == (state is R.GATHERED)
    assert residence.coming == (state in (R.GATHERED, R.GATHERING))
    assert residence.staging == (state is R.STAGING)


# --- pins --------------------------------------------------------------------------------------------
def test_pins_nest():
    residence = Residence("'a'", released=True)
    residence.pin(Pin.READING)
    residence.pin(Pin.READING)
    residence.pin(Pin.WRITING)
    residence.unpin(Pin.READING)
    assert residence.pinned() == 2
    assert [residence.pinned(p) for p in (Pin.READING, Pin.WRITING, Pin.USER)] == [1, 1, 0]
    residence.unpin(Pin.READING)
    residence.unpin(Pin.WRITING)
    assert not residence.pinned()


@pytest.mark.parametrize("reason", Pin)
def test_letting_go_of_what_nobody_held_raises(reason):
    residence = Residence("'blocks.3'", released=True)
    for other in set(Pin) - {reason}:
        residence.pin(other)
    with pytest.raises(
        InternalError, match=f"held for {reason.value}".replace("(", r"\(").replace(")", r"\)")
    ) as caught:
        residence.unpin(reason)
    assert "'blocks.3'" in caught.value.where
    assert residence.pinned(reason) == 0 and residence.pinned() == len(Pin) - 1


@given(st.lists(st.tuples(st.sampled_from(["pin", "unpin", "drop"]), st.sampled_from(list(Pin))), max_size=30))
def test_pins_are_counts_per_reason(calls):
    residence, counts = Residence("'a'", released=True), Counter()
    for what, reason in calls:
        if what == "pin":
            counts[reason] += 1
        elif what == "drop":
            counts[reason] = 0
        elif counts[reason] == 0:
            with pytest.raises(InternalError):
                residence.unpin(reason)
            continue
        else:
            counts[reason] -= 1
        getattr(residence, what)(reason)
        assert [residence.pinned(p) for p in Pin] == [counts[p] for p in Pin]
        assert residence.pinned() == counts.total()


def test_units_have_reasons_of_their_own():
    one, other = Residence("'a'", released=True), Residence("'b'", released=True)
    one.pin(Pin.USER)
    assert not other.pinned()
