"""The simulated device itself: what is wrong in a script is noticed, whatever the timing, and what is right is not.

Shardwise is not in here; see the other ``test_simulated_*.py``.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import processes
from models import rank
from ranks import run

pytestmark = [pytest.mark.usefixtures("simulated_device"), pytest.mark.timeout(600)]  # the first one builds it
SIM = "sim:0"


def on_one(function: Callable[..., Any], *args: Any) -> Any:
    return run(1, function, *args, device="sim")[0]


def take_races() -> list[str]:
    found = torch.sim.races()
    torch.sim.forget_races()
    return found


# --- planted faults: weights come from pinned memory by a stream of their own, and gradients go there ---------------
class Fault(Enum):
    NONE = auto()
    WEIGHTS_NOT_WAITED_FOR = auto()
    WEIGHTS_OVERWRITTEN_IN_USE = auto()
    GRADIENTS_NOT_WAITED_FOR = auto()
    GRADIENTS_NOT_RECORDED = auto()
    HOST_READS_TOO_EARLY = auto()
    HOST_WRITES_TOO_EARLY = auto()


_DEVICE, _SIDE = r"stream 0 of sim:0\)", r"stream \d+ of sim:0\)"
NAMED = {
    Fault.WEIGHTS_NOT_WAITED_FOR: rf"'copy to the device' \(writes, {_SIDE} and 'aten::addmm' \(reads, {_DEVICE}",
    Fault.WEIGHTS_OVERWRITTEN_IN_USE: rf"'aten::.*' \(reads, {_DEVICE} and 'copy to the device' \(writes, {_SIDE}",
    Fault.GRADIENTS_NOT_WAITED_FOR: rf"'aten::.*' \(writes, {_DEVICE} and 'copy to the host' \(reads, {_SIDE}",
    Fault.GRADIENTS_NOT_RECORDED: rf"'copy to the host' \(reads, {_SIDE} and 'allocation' \(writes, {_DEVICE}",
    Fault.HOST_READS_TOO_EARLY: rf"'copy to the host' \(writes, {_SIDE} and the host \(reads pinned memory\)",
    Fault.HOST_WRITES_TOO_EARLY: rf"'copy to the device' \(reads, {_SIDE} and the host \(writes pinned memory\)",
}


def two_layers(fault: Fault | None, patience_ms: int = 40) -> tuple[list[float], list[str]]:
    """Losses, and the races that were named. ``None``: on the CPU, with nothing beside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    data = [torch.randn(8, 16) for _ in range(4)]
    if fault is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for rows in data:
            loss = model(rows).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, []
    torch.sim.configure(check="count", patience_ms=patience_ms)
    host = [nn.Parameter(p.detach().pin_memory()) for p in model.parameters()]
    optimizer = torch.optim.AdamW(host, lr=1e-2)
    model.to(SIM)
    side, main = torch.Stream(device=SIM), torch.accelerator.current_stream(SIM)
    losses = []
    for rows in data:
        side.wait_stream(main)
        with side, torch.no_grad():
            for there, here in zip(model.parameters(), host, strict=True):
                there.copy_(here, non_blocking=True)
        if fault is not Fault.WEIGHTS_NOT_WAITED_FOR:
            main.wait_stream(side)
        loss = model(rows.to(SIM)).square().mean()
        loss.backward()
        losses.append(loss.detach())
        if fault is Fault.WEIGHTS_OVERWRITTEN_IN_USE:
            with side, torch.no_grad():
                model[2].weight.copy_(host[2], non_blocking=True)
        if fault is not Fault.GRADIENTS_NOT_WAITED_FOR:
            side.wait_stream(main)
        with side:
            for there, here in zip(model.parameters(), host, strict=True):
                here.grad = torch.empty_like(here, pin_memory=True)
                here.grad.copy_(there.grad, non_blocking=True)
                if fault is not Fault.GRADIENTS_NOT_RECORDED:
                    there.grad.record_stream(side)
        model.zero_grad()
        [torch.zeros_like(p) for p in model.parameters()]  # memory that is free serves again
        if fault is not Fault.HOST_READS_TOO_EARLY:
            side.synchronize()
        optimizer.step()
        if fault is Fault.HOST_WRITES_TOO_EARLY:
            with side, torch.no_grad():
                model[0].weight.copy_(host[0], non_blocking=True)
            with torch.no_grad():
                host[0].add_(0)
    losses = [loss.item() for loss in losses]
    torch.sim.configure(check="count")
    return losses, take_races()


@pytest.mark.parametrize("patience_ms", [0, 40])
def test_what_is_right_is_as_on_the_cpu(patience_ms):
    losses, races = on_one(two_layers, Fault.NONE, patience_ms)
    assert losses == on_one(two_layers, None)[0] and not races


@pytest.mark.parametrize("patience_ms", [0, 40])
@pytest.mark.parametrize("fault", NAMED)
def test_a_planted_fault_is_named(fault, patience_ms):
    _, races = on_one(two_layers, fault, patience_ms)
    assert any(re.search(NAMED[fault], race) for race in races), races


def raise_at_once() -> str:
    torch.sim.configure(check="raise", trace=True)
    side = torch.Stream(device=SIM)
    value = torch.zeros(4, device=SIM)
    try:
        with side, pytest.raises(RuntimeError) as raised:
            value.add_(1)
    finally:
        torch.sim.configure(check="count")
        take_races()
    return str(raised.value)


def test_both_operations_of_a_race_are_found_in_the_script():
    text = on_one(raise_at_once)
    first, second = re.findall(r"at (test_simulated_device\.py:\d+)", text)
    assert "'aten::add" in text and first != second


def views_of_one_allocation() -> None:
    """Pieces of one flat buffer: what the host does with the one is no matter of the other's copy."""
    flat = torch.zeros(40, pin_memory=True)
    for step in range(3):
        there = torch.ones(20, device=SIM) * step
        flat[:20].copy_(there, non_blocking=True)
        flat[20:].add_(1)
        torch.accelerator.synchronize(SIM)
        assert flat[:20].tolist() == [step] * 20 and flat[20:].tolist() == [step + 1] * 20


def test_pieces_of_one_pinned_buffer_are_independent():
    on_one(views_of_one_allocation)


def touch_device_memory() -> None:
    import simulated_device

    simulated_device.install()
    print(ctypes.c_float.from_address(torch.ones(4, device=SIM).data_ptr()).value)


def test_the_host_cannot_read_device_memory():
    process, _ = processes.fork(touch_device_memory)
    code, out, err = process.finish()
    assert code < 0 and not out and "FATAL: the host touches memory of the device" in err


def memory() -> None:
    torch.sim.empty_cache()
    torch.sim.reset_peak_memory_stats()
    before, kept = torch.sim.memory_allocated(), torch.sim.memory_reserved()
    one = torch.ones(1000, device=SIM)
    place = one.data_ptr()
    assert torch.sim.memory_allocated() == before + 4096 == torch.accelerator.memory_allocated()
    del one
    other = torch.empty(1000, device=SIM)
    assert other.data_ptr() == place and other.isnan().all()  # at once, and poisoned
    del other
    assert torch.sim.memory_allocated() == before
    assert torch.sim.max_memory_allocated() >= before + 4096
    torch.sim.empty_cache()
    assert torch.sim.memory_reserved() <= kept
    torch.sim.set_memory_limit(1 << 20)
    with pytest.raises(torch.OutOfMemoryError, match="sim out of memory"):
        torch.empty(1 << 20, device=SIM)
    torch.sim.set_memory_limit(4 << 30)
    released = torch.ones(4, device=SIM)
    released.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory was released"):
        released + 1


def test_memory_is_counted_and_limited():
    on_one(memory)


def random_numbers() -> None:
    torch.manual_seed(3)
    host = torch.get_rng_state()
    state = torch.sim.get_rng_state()
    first = [torch.randn(3, device=SIM), F.dropout(torch.ones(50, device=SIM)), torch.randperm(9, device=SIM)]
    torch.sim.set_rng_state(state)
    again = [torch.randn(3, device=SIM), F.dropout(torch.ones(50, device=SIM)), torch.randperm(9, device=SIM)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(host, torch.get_rng_state()), "the host's own generator was used"
    one, two = (torch.Generator(device="sim").manual_seed(5) for _ in range(2))
    assert torch.equal(torch.rand(4, device=SIM, generator=one), torch.rand(4, device=SIM, generator=two))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(4, device=SIM, generator=torch.Generator())


def test_random_numbers_are_the_devices_own():
    on_one(random_numbers)


class Vision(nn.Module):
    """Convolution and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.up = nn.Conv2d(2, 8, 3, padding=1, stride=2), nn.ConvTranspose2d(8, 2, 2, stride=2)
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        flat = x.flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(flat)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.up((flat + out).transpose(1, 2).unflatten(2, x.shape[2:]))


def convolution_and_attention(dtype: torch.dtype | None, autocast: bool) -> None:
    torch.manual_seed(1)
    here, there = Vision(), Vision().to(SIM)
    there.load_state_dict(here.state_dict())
    rows = torch.randn(3, 2, 8, 8)
    tolerance = 1e-5 if dtype is None else 5e-2
    if dtype is not None and not autocast:
        here, there, rows = here.to(dtype), there.to(dtype), rows.to(dtype)
    outputs = []
    for model, data in ((here, rows), (there, rows.to(SIM))):
        with torch.autocast(data.device.type, dtype=dtype, enabled=autocast):
            out = model(data)
        out.float().square().mean().backward()
        outputs.append(out.detach())
    assert outputs[0].dtype == outputs[1].dtype == (dtype or torch.float32)
    torch.testing.assert_close(outputs[1].cpu(), outputs[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(None, False), (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True), (torch.float16, True)],
)
def test_convolution_and_attention(dtype, autocast):
    on_one(convolution_and_attention, dtype, autocast)


# --- the communication backend ----------------------------------------------------------------------------------
def collectives() -> None:
    r = rank()
    mine = torch.full((3,), float(r + 1), device=SIM)
    total = mine.clone()
    dist.all_reduce(total)
    assert total.tolist() == [3.0] * 3
    dist.all_reduce(total, op=dist.ReduceOp.AVG)
    assert total.tolist() == [3.0] * 3
    flat = torch.empty(6, device=SIM)
    dist.all_gather_into_tensor(flat, mine)
    assert flat.tolist() == [1.0] * 3 + [2.0] * 3
    part = torch.empty(3, device=SIM)
    dist.reduce_scatter_tensor(part, flat)
    assert part.tolist() == [2.0 * (r + 1)] * 3
    every = [torch.empty(3, device=SIM) for _ in range(2)]
    dist.all_gather(every, mine)
    dist.broadcast(part, src=1)
    assert part.tolist() == [4.0] * 3
    out = torch.empty(2, device=SIM)
    dist.all_to_all_single(out, torch.arange(2.0, device=SIM) + 10 * r)
    assert out.tolist() == [r, 10 + r]
    gathered = [torch.empty(3, device=SIM) for _ in range(2)] if r == 0 else None
    dist.gather(mine, gathered, dst=0)
    dist.scatter(part, [mine, mine * 5] if r == 0 else None, src=0)
    assert part.tolist() == [[1.0, 5.0][r]] * 3
    dist.barrier()
    # Two messages each way to the same rank, none of which a rank alone could finish first.
    got = [torch.empty(3, device=SIM) for _ in range(2)]
    ops = [dist.P2POp(dist.isend, mine * k, 1 - r) for k in (1, 2)] + [dist.P2POp(dist.irecv, g, 1 - r) for g in got]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert [g.tolist() for g in got] == [[2.0 - r] * 3, [4.0 - 2 * r] * 3]
    with dist._coalescing_manager(device=torch.device(SIM)):
        dist.all_reduce(mine)
        dist.all_reduce(part)
    assert (mine + part).tolist() == [9.0] * 3
    objects: list[Any] = [None] * 2
    dist.all_gather_object(objects, {"rank": r})
    assert objects == [{"rank": 0}, {"rank": 1}]


def test_collectives():
    run(2, collectives, device="sim")


def wait_for_a_work(waits: bool) -> list[str]:
    value = torch.ones(4, device=SIM)
    other = torch.zeros(4, device=SIM)
    work = dist.all_reduce(value, async_op=True)
    other.add_(1)  # beside it
    if waits:
        work.wait()
    value.mul_(2)
    del work
    torch.sim.synchronize()
    return take_races()


def test_a_collective_that_is_not_waited_for_is_a_race():
    assert run(2, wait_for_a_work, True, device="sim") == [[], []]
    for races in run(2, wait_for_a_work, False, device="sim"):
        assert any(re.search(r"'simccl #\d+ all_reduce.*and 'aten::mul", race) for race in races), races


class Disagreement(Enum):
    KIND = auto()
    SIZE = auto()
    COMMUNICATOR = auto()


def disagree(about: Disagreement, groups: list[dist.ProcessGroup]) -> None:
    first, second = (torch.zeros(4, device=SIM) for _ in range(2))
    if about is Disagreement.KIND and rank() == 0:
        dist.reduce_scatter_tensor(torch.zeros(2, device=SIM), first)
    elif about is Disagreement.KIND:
        dist.all_gather_into_tensor(first, torch.zeros(2, device=SIM))
    elif about is Disagreement.SIZE:
        dist.all_reduce(first[: 2 + rank()])
    else:
        for tensor, group in ((first, groups[0]), (second, groups[1]))[:: 1 if rank() else -1]:
            dist.all_reduce(tensor, group=group, async_op=True)
    torch.sim.synchronize()


def what_is_said(about: Disagreement) -> str:
    groups = [dist.new_group([0, 1], backend="simccl") for _ in range(2)]
    with pytest.raises(RuntimeError) as raised:
        disagree(about, groups)
    for _ in groups:
        with suppress(RuntimeError):
            torch.sim.synchronize()  # the other one's error
    for group in groups:
        dist.destroy_process_group(group)
    return str(raised.value)


def test_ranks_that_disagree_are_named():
    for r, text in enumerate(run(2, what_is_said, Disagreement.KIND, device="sim")):
        names = [f"rank {r} is at '#", f"rank {1 - r} at '#", "reduce_scatter of [[4]]", "all_gather of [[2]]"]
        assert all(name in text for name in names), text
    for text in run(2, what_is_said, Disagreement.SIZE, device="sim"):
        assert "all_reduce of [[2]] float" in text and "all_reduce of [[3]] float" in text
    for text in run(2, what_is_said, Disagreement.COMMUNICATOR, device="sim"):
        assert "the ranks use their communicators in different orders" in text


def refuse() -> None:
    group = dist.new_group([0, 1], backend="simccl")
    with pytest.raises(RuntimeError, match="device type cpu"):
        dist.all_reduce(torch.zeros(2), group=group)
    with pytest.raises(RuntimeError, match="one is on cpu"):
        dist.all_gather_into_tensor(torch.zeros(4), torch.zeros(2, device=SIM), group=group)
    dist.barrier()  # the other rank may still be connecting
    dist.destroy_process_group(group)


def test_tensors_of_the_host_are_refused():
    run(2, refuse, device="sim")
