"""Long messages between ranks of one host lie in memory that they share: the same bits, bytes and waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Barrier, Thread
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwise
from models import PRESETS, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise.comm import World, group, shared_memory
from shardwise.comm.shared_memory import Message, SharedMemory
from shardwise.comm.stats import Op
from shardwise.errors import CommError
from slowly import slow


@contextmanager
def through_it(shortest: int, apart: frozenset[int]) -> Iterator[None]:
    """Messages from so many bytes on; ranks ``apart`` are on a host of their own."""
    memory = World.current().memory
    assert memory is not None and memory.reads == memory.read_by == frozenset(range(world())) - {rank()}
    hosts = [frozenset(range(world())) - apart, apart]
    known = [hosts[r in apart] - {r} for r in range(world())]
    here = known[rank()]
    with (
        mock.patch.multiple(memory, reads=here, read_by=here, _reads=known, _shared={}),
        mock.patch.object(group, "SHORTEST", shortest),
    ):
        yield


def trained(strategy: str, shortest: int, apart: frozenset[int]):
    """Losses, weights, bytes sent, and how many messages lay in shared memory."""
    model = shardwise.fully_shard(make(), strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    shardwise.reset_stats()
    with through_it(shortest, apart), mock.patch.object(SharedMemory, "put", autospec=True, side_effect=_PUT) as put:
        for step in range(3):
            for half in range(2):
                loss = loss_of(model, batch(2 * step + half, rank()))
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=step != 1)
        weights = whole(model)
    sent = {kind: count.bytes_sent for kind, count in shardwise.stats().comm.items()}
    return losses, weights, sent, put.call_count


_PUT = SharedMemory.put


@pytest.mark.parametrize(
    ("strategy", "size", "apart"),
    [
        *((s, 2, ()) for s in PRESETS),
        ("hsdp,shard_size=2", 4, ()),
        ("ddp", 3, (1,)),
        ("zero3", 3, (2,)),
        slow("zero3", 4, (0, 3)),
        slow("hsdp,shard_size=2", 4, (0, 1)),
    ],
)
def test_as_if_all_were_sent(strategy, size, apart):
    sent, lying = (run(size, trained, strategy, shortest, frozenset(apart)) for shortest in (1 << 40, 1))
    for r, (one, other) in enumerate(zip(sent, lying, strict=True)):
        assert one[0] == other[0], "losses, to the last bit"
        assert_same(one[1], other[1])
        assert one[2] == other[2], "as many bytes"
        assert one[3] == 0
        assert (other[3] > 0) == (sum((s in apart) == (r in apart) for s in range(size)) > 1)


def reduced() -> list[int]:
    """Reduces of 4 MiB, one after another: bytes of shared memory after each three."""
    world = shardwise.init("cpu")
    mesh = world.mesh(world.device, world.size, 30.0)
    ledger = shardwise.tiers.ledger.Ledger()
    used = []
    for _ in range(3):
        for k in range(3):
            raw, out = torch.full((1 << 20,), float(rank() + k)), torch.empty(1 << 19)
            first = mesh.reduce(raw, out, Op("reduce", f"unit {k}", 1000 + k), ledger)
            raw.view(2, -1)[1 - rank()] = -1  # what was sent is the sender's again
            first.wait()
            assert out.eq(2 * k + 1).all()
        assert world.memory is not None
        used.append(world.memory.used)
    assert ledger.live["gather_buffers"] == 0
    assert shardwise.stats().shared_memory == used[-1]
    return used


def test_pages_are_used_again():
    for used in run(2, reduced):
        # A rank may be one message ahead of the other.
        assert (1 << 21) < used[0] <= used[2] < 3 * (1 << 21)


# --- one process that stands for several ranks -------------------------------------------------------
def several(size: int, most: int = 1 << 30) -> list[SharedMemory]:
    """The memory of so many ranks, which are threads while they meet."""
    said: dict[tuple[str, int], str] = {}
    met, made = Barrier(size), {}

    def share(r: int, name: str, text: str) -> list[str]:
        said[name, r] = text
        met.wait()
        return [said[name, other] for other in range(size)]

    def make(r: int) -> None:
        made[r] = SharedMemory(r, size, lambda name, text: share(r, name, text))

    threads = [Thread(target=make, args=(r,)) for r in range(size)]
    with mock.patch.object(shared_memory, "_MOST", most):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [made[r] for r in range(size)]


@pytest.fixture(scope="module")
def three() -> list[SharedMemory]:
    return several(3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.sets(st.integers(0, 2), min_size=1), st.integers(0, 4))))
def test_no_block_is_used_before_all_have_read_it(three, steps):
    """Messages of so many bytes to so many ranks, each read after some others were sent; some are read at once."""
    lies: list[tuple[torch.Tensor, list[tuple[int, Message]], int]] = []

    def read(keep: int) -> None:
        while len(lies) > keep:
            sent, messages, k = lies.pop(k if (k := len(lies) // 2) % 2 else 0)
            for reader, message in messages:
                assert torch.equal(message.tensor, sent), f"message {k} of rank {reader}"
                into = torch.empty_like(sent)
                message.move(into)
                assert torch.equal(into, sent)

    for k, (n, readers, keep) in enumerate(steps):
        sent = torch.randint(0, 256, (n,), dtype=torch.uint8)
        own = three[0].put(sent, readers)
        messages = []
        for reader in readers:
            message = Message(three[reader], 0, n, torch.uint8)
            message.note.copy_(own.note)  # which gloo does
            messages.append((reader, message))
        lies.append((sent, messages, k))
        read(keep)
    read(0)
    three[0].put(torch.zeros(1, dtype=torch.uint8), [1])
    assert len(three[0]._blocks) == 1
    three[0]._blocks.clear()


def test_its_memory_is_not_without_end():
    here, there = several(2, most=1 << 16)
    message = here.put(torch.ones(10_000), [1])
    with pytest.raises(CommError, match="have not been read by other ranks of this host") as error:
        here.put(torch.ones(10_000), [1])
    assert "rank 0" in str(error.value) and "fix" in str(error.value)
    there.release(0, message.begin)
    here.put(torch.ones(10_000), [1])


def test_where_there_is_none_everything_is_sent():
    with mock.patch.object(shared_memory.host, "memory", return_value=None):
        assert [m.reads | m.read_by for m in several(2)] == [frozenset(), frozenset()]
    with mock.patch.object(os, "memfd_create", side_effect=OSError):
        assert [m.reads | m.read_by for m in several(2)] == [frozenset(), frozenset()]
    with mock.patch.object(os, "open", side_effect=PermissionError):
        assert [m.reads | m.read_by for m in several(2)] == [frozenset(), frozenset()]


def test_ranks_agree_about_who_shares(three):
    """Also where one rank cannot read another one's memory, which the third can."""
    assert all(memory.is_shared((0, 1, 2)) for memory in three)
    reads = [frozenset({1, 2}), frozenset({2}), frozenset({0, 1})]
    for memory in three:
        with mock.patch.multiple(memory, _reads=reads, _shared={}):
            assert not memory.is_shared((0, 1, 2)) and not memory.is_shared((0, 1))
            assert memory.is_shared((1, 2)) and memory.is_shared((0, 2)) and memory.is_shared((1,))


def test_another_process_of_that_number_is_not_taken_for_the_rank(tmp_path):
    """As where another container has processes of the same numbers."""
    address, file = shared_memory._make()
    assert address is not None and file is not None
    assert shared_memory._open(address, address) is not None
    assert shared_memory._open(address, address._replace(host="another")) is None
    assert shared_memory._open(address, address._replace(word="0" * 64)) is None
    assert shared_memory._open(address, address._replace(pid=1 << 22)) is None
    with open(tmp_path / "file", "w+") as other:
        assert shared_memory._open(address, address._replace(fd=other.fileno())) is None
    os.close(address.fd)


def test_nothing_is_left_of_it():
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = files()
    made = several(3)
    made[0].put(torch.ones(100_000), [1, 2])
    assert files() > before
    del made
    assert files() == before
