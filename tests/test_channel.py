"""Messages from one rank to others, over a wire that two objects share in this process."""

from __future__ import annotations

import pickle
import threading
from collections import defaultdict
from collections.abc import Sequence
from queue import Queue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.comm.stats import Op
from shardwise.engine.channel import Channel

PATIENCE = 20.0
ROW = 256  # bytes of a message; its length takes eight of them


class Sent:
    """A send: over when the receiver has taken it. Nobody may write to its tensor before."""

    def __init__(self, tensor: torch.Tensor, tag: int) -> None:
        self.tensor, self.tag, self.taken = tensor, tag, threading.Event()
        self.bytes = tensor.clone()

    def wait(self) -> None:
        assert self.taken.wait(PATIENCE), "nobody has received it"


class Receive:
    def __init__(self, queue: Queue[Sent], into: torch.Tensor, tag: int) -> None:
        self.queue, self.into, self.tag = queue, into, tag

    def wait(self) -> None:
        sent = self.queue.get(timeout=PATIENCE)
        assert sent.tag == self.tag and sent.tensor.numel() == self.into.numel(), "both know how much comes"
        assert torch.equal(sent.tensor, sent.bytes), "it was written to while it was on its way"
        self.into.copy_(sent.tensor)
        sent.taken.set()


class Wire:
    """What the groups of all ranks share."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], Queue[Sent]] = defaultdict(Queue)
        self.count = 0

    def end(self, rank: int) -> Channel:
        return Channel(End(self, rank))  # type: ignore[arg-type]


class End:
    """One rank's group: what a channel uses of it."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], recvs: Sequence[tuple[torch.Tensor, int]], op: Op
    ) -> list[Any]:
        works: list[Any] = [Receive(self.wire.queues[r, self.rank], t, op.tag) for t, r in recvs]
        for tensor, rank in sends:
            work = Sent(tensor, op.tag)
            self.wire.queues[self.rank, rank].put(work)
            self.wire.count += 1
            works.append(work)
        return works

    def wait(self, works: Sequence[Any], op: Op) -> None:
        for work in works:
            work.wait()


def of_length(nbytes: int) -> bytes:
    """What is ``nbytes`` long when it is pickled."""
    item = b"x" * (nbytes - len(pickle.dumps(b"x" * 256)) + 256)
    while len(pickle.dumps(item)) < nbytes:
        item += b"x"
    while len(pickle.dumps(item)) > nbytes:
        item = item[:-1]
    assert len(pickle.dumps(item)) == nbytes
    return item


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=40) | st.binary(max_size=400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(plain, max_size=12))
@settings(max_examples=50, deadline=None)
def test_what_is_told_is_heard_in_order(items):
    wire = Wire()
    one, other = wire.end(0), wire.end(1)
    for item in items:
        one.tell(item, [1])
    assert [other.hear(0) for _ in items] == items
    one.flush()


@pytest.mark.parametrize(("nbytes", "messages"), [(ROW - 8, 1), (ROW - 7, 2), (100_000, 2)])
def test_a_long_item_sends_the_rest_after_its_row(nbytes, messages):
    wire = Wire()
    one, other = wire.end(0), wire.end(1)
    item = of_length(nbytes)
    one.tell(item, [1])
    one.tell("and", [1])
    assert wire.count == messages + 1
    assert other.hear(0) == item and other.hear(0) == "and"


def test_some_are_told_and_others_are_not():
    wire = Wire()
    ends = [wire.end(r) for r in range(4)]
    ends[0].tell("to both", [1, 3])
    ends[0].tell("to one", [3])
    ends[0].tell("to nobody", [])
    ends[2].tell("from another", [3])
    assert ends[3].hear(2) == "from another"
    assert [ends[3].hear(0) for _ in range(2)] == ["to both", "to one"]
    assert ends[1].hear(0) == "to both"
    assert all(queue.empty() for queue in wire.queues.values())
    for end in ends:
        end.flush()


def test_tensors_go_between_items():
    wire = Wire()
    one, other = wire.end(0), wire.end(1)
    one.tell({"shape": (3,)}, [1])
    one.send(torch.tensor([1.0, 2.0, 3.0]), [1])
    one.tell("end", [1])
    into = torch.empty(*other.hear(0)["shape"])
    other.receive(into, 0)
    assert into.tolist() == [1.0, 2.0, 3.0] and other.hear(0) == "end"


def test_an_item_may_change_after_it_was_told():
    wire = Wire()
    one, other = wire.end(0), wire.end(1)
    item = [1]
    one.tell(item, [1])
    item.append(2)
    assert other.hear(0) == [1]


def test_the_sender_does_not_wait_but_does_not_run_away_either():
    wire = Wire()
    one, other = wire.end(0), wire.end(1)
    told: list[int] = []

    def tell() -> None:
        for k in range(40):
            one.tell(k, [1])
            told.append(k)
        one.flush()
        told.append(-1)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    heard = [other.hear(0)]  # the first was told without waiting for this
    thread.join(0.2)
    assert 32 <= len(told) <= 34 and thread.is_alive(), "it waits for the receiver when 32 have not been read"
    heard += [other.hear(0) for _ in range(39)]
    thread.join(PATIENCE)
    assert heard == list(range(40)) and told[-1] == -1 and not thread.is_alive()


def test_flush_waits_until_all_have_been_received():
    wire = Wire()
    one, other = wire.end(0), wire.end(1)
    for k in range(3):
        one.tell(k, [1])
    thread = threading.Thread(target=one.flush, daemon=True)
    thread.start()
    assert [other.hear(0) for _ in range(2)] == [0, 1]
    thread.join(0.05)
    assert thread.is_alive()
    assert other.hear(0) == 2
    thread.join(PATIENCE)
    assert not thread.is_alive()
