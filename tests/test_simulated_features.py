"""What scripts use beside training, once each on the simulated device, where two operations that race fail the test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from models import PRESETS, Block, adamw, assert_same, batch, loss_of, make, rank, train_alone, whole, world
from ranks import run
from shardwise import checkpoint, operations
from shardwise.engine import elementwise
from shardwise.errors import UpdateFailed
from shardwise.utils import find_executable_batch_size, synchronize_rng_states
from slowly import in_turn, slow_unless
from test_failed_updates import Breaks

pytestmark = [pytest.mark.usefixtures("simulated_device"), pytest.mark.timeout(600)]
SIM = "sim:0"
ALL_CPU = {"offload_params": "cpu", "offload_grads": "cpu", "offload_optimizer": "cpu"}


def on(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    return run(size, function, *args, device="sim")


def build(strategy: Any, device: str = SIM, **kw: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make(**kw).to(device)
    shardwise.fully_shard(model, strategy=strategy)
    return model, adamw(model.parameters())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, device: str = SIM) -> list[float]:
    losses = []
    for step in numbers:
        loss = loss_of(model, batch(step, rank()).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


# --- which device ---------------------------------------------------------------------------------
def beside_the_current_device(keys: dict[str, Any]) -> None:
    assert torch.accelerator.current_device_index() == 0
    assert steps(*build(shardwise.Strategy("ddp", **keys), "sim:1"), range(4), "sim:1") == steps(
        *build("ddp"), range(4)
    )


HOMES = [{"offload_params": "cpu"}, {"offload_optimizer": "cpu"}, ALL_CPU, {"activation_offload": "cpu"}]


@pytest.mark.parametrize("keys", HOMES, ids=[",".join(k) for k in HOMES])
def test_a_model_beside_the_current_device(keys):
    on(1, beside_the_current_device, keys)


def init_makes_it_current() -> None:
    with pytest.raises(shardwise.errors.DeviceError):
        shardwise.init("sim:7")
    shardwise.init("sim:1")
    assert torch.accelerator.current_device_index() == 1
    shardwise.init(SIM)


def test_init_makes_its_device_the_current_one():
    on(1, init_makes_it_current)


# --- streams of the script ------------------------------------------------------------------------
def in_a_stream_of_its_own(strategy: str) -> None:
    expected = steps(*build(strategy), range(3))
    stream = torch.Stream(device=SIM)
    stream.wait_stream(torch.accelerator.current_stream(SIM))
    with stream:
        assert steps(*build(strategy), range(3)) == expected
    torch.accelerator.current_stream(SIM).wait_stream(stream)


@pytest.mark.parametrize("strategy", ["ddp,offload_optimizer=cpu,offload_params=cpu,offload_grads=cpu", "zero3"])
def test_a_script_may_train_in_a_stream_of_its_own(strategy):
    on(2, in_a_stream_of_its_own, strategy)


# --- host memory that a copy still reads ------------------------------------------------------------
def zeroed_in_place(strategy: str) -> None:
    """Gradients on the host are on their way to an update on the device when the script zeroes them."""

    def curve(strategy: str) -> list[float]:
        model, optimizer = build(strategy)
        losses = []
        for step in range(5):
            loss = loss_of(model, batch(step, rank()).to(SIM))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    assert curve(f"{strategy},offload_grads=cpu") == curve(strategy)


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (2, "zero2"), (2, "zero3")])
def test_gradients_are_zeroed_in_place_once_they_have_left(size, strategy):
    on(size, zeroed_in_place, strategy)


# --- restless models ------------------------------------------------------------------------------
class Restless(nn.Module):
    """Uses the blocks that it is told to, and may break off."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(8, 32), nn.Linear(32, 8)
        self.blocks = nn.ModuleList(Block(32) for _ in range(6))

    def forward(self, x: torch.Tensor, use: list[int], stop: int | None = None) -> torch.Tensor:
        x = self.inp(x)
        for k in use:
            if k == stop:
                raise KeyError("stop")
            x = self.blocks[k](x)
        return self.out(x)


PLANS = [[0, 1, 2, 3, 4, 5], [0, 2, 4], [5, 3, 1], [0, 1, 2, 3, 4, 5], [1], [0, 1, 2, 5], [0, 1, 2, 3, 4, 5]]


def restless(strategy: shardwise.Strategy | None) -> list[float]:
    torch.manual_seed(0)
    model = Restless().to(SIM)
    if strategy is not None:
        shardwise.fully_shard(model, strategy=strategy, units=Block)
    optimizer = adamw(model.parameters())
    seen = []
    for step, use in enumerate(PLANS):
        rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(SIM)
        if step in (2, 4):
            with suppress(KeyError):
                model(rows, PLANS[0], stop=3)
        loss = model(rows, use).square().mean()
        with torch.no_grad():
            seen.append(model(rows, use[::-1]).sum())
        loss.backward()
        if step == 3:
            del loss
            dropped = model(rows, [0, 1, 2]).sum()  # a graph that nobody runs
            del dropped
        else:
            seen.append(loss.detach())
        with torch.no_grad():
            seen.append(model(rows, [4, 0]).sum())  # between backward and step
        optimizer.step()
        optimizer.zero_grad()
    return [float(x) for x in seen]


def restless_everywhere(preset: str, keys: dict[str, Any], nvme: str) -> None:
    if "nvme" in keys.values():
        keys = keys | {"nvme_path": nvme}
    found = restless(shardwise.Strategy(preset, **keys))
    expected = restless(None)  # all ranks see the same rows
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


RESTLESS = [{}, ALL_CPU, ALL_CPU | {"activation_offload": "cpu"}, {"offload_params": "nvme"}]


@pytest.mark.parametrize(
    ("size", "preset", "keys"),
    [
        slow_unless(preset == "zero3" or (size + k) % 3 == 1, size, preset, keys)
        for size, preset in [(1, "ddp"), (2, "zero1"), (2, "zero3")]
        for k, keys in enumerate(RESTLESS)
    ],
)
def test_a_restless_model(size, preset, keys, tmp_path):
    on(size, restless_everywhere, preset, keys, str(tmp_path))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        chosen = [self.one, self.two][:which] if which else [self.two]
        return x + self.out(torch.tanh(sum(e(x) for e in chosen)))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: torch.Tensor, which: list[int]) -> torch.Tensor:
        for block, one in zip(self.blocks, which, strict=True):
            x = block(x, one)
        return x


def routed(strategy: str | None) -> list[float]:
    """Ranks use the same blocks, and other parameters of them. ``None``: one model on the rows of all ranks."""
    torch.manual_seed(0)
    model = Routed().to(SIM)
    if strategy is not None:
        shardwise.fully_shard(model, strategy=shardwise.Strategy.parse(strategy), units=Expert)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        for r in [rank()] if strategy is not None else range(world()):
            which = [2 if k not in (1, 2) or not step or r == 0 else 1 for k in range(4)]
            rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + r)).to(SIM)
            loss = model(rows, which).square().mean()
            (loss if strategy is not None else loss / world()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [float(v.double().sum()) for v in whole(model).values()]


def routed_as_one(strategy: str) -> None:
    torch.testing.assert_close(torch.tensor(routed(strategy)), torch.tensor(routed(None)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu"])
def test_experts_without_a_gradient_on_one_rank(strategy):
    on(2, routed_as_one, strategy)


# --- checkpoints ----------------------------------------------------------------------------------
def saved_and_loaded(folder: str, keys: dict[str, Any], preset: str, asynchronous: bool) -> None:
    strategy = shardwise.Strategy(preset, **(keys | ({"nvme_path": folder} if "nvme" in keys.values() else {})))
    model, optimizer = build(strategy)
    steps(model, optimizer, range(2))
    save = checkpoint.async_save if asynchronous else checkpoint.save
    pending = save(Path(folder) / "saved", models=[model], optimizers=[optimizer])
    expected = steps(model, optimizer, range(2, 4))
    if asynchronous:
        pending.wait()
    other, its = build(strategy, seed=1)
    checkpoint.load(Path(folder) / "saved", models=[other], optimizers=[its])
    assert steps(other, its, range(2, 4)) == expected
    assert_same(whole(other), whole(model))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
@pytest.mark.parametrize(
    ("preset", "keys"),
    [("zero3", {}), ("zero1", {"offload_optimizer": "cpu"}), ("zero3", ALL_CPU),
     ("zero2", {"offload_params": "nvme", "offload_optimizer": "nvme"})],
)  # fmt: skip
def test_a_checkpoint(preset, keys, asynchronous, tmp_path):
    on(2, saved_and_loaded, str(tmp_path), keys, preset, asynchronous)


def loaded_by_halves(strategy: str) -> None:
    model = make().to(SIM)
    shardwise.fully_shard(model, strategy=strategy)
    optimizer = Breaks(model.parameters(), lr=0.1)
    loss_of(model, batch(0, rank()).to(SIM)).backward()
    optimizer.at = 3
    known = {*elementwise.ELEMENTWISE, Breaks.__name__}
    with mock.patch.object(elementwise, "ELEMENTWISE", known), pytest.raises(MemoryError):
        optimizer.step()
    optimizer.zero_grad()
    values = {name: value.to(SIM) for name, value in make(seed=1).state_dict().items()}
    model.load_state_dict(dict(list(values.items())[::2]), strict=False)
    with pytest.raises(UpdateFailed):
        model(batch(0, rank()).to(SIM))
    model.load_state_dict(values)  # while values of the half load may still be on their way
    assert_same(whole(model), values)
    other = make(seed=1).to(SIM)
    assert torch.equal(model(batch(0, rank()).to(SIM)), other(batch(0, rank()).to(SIM)))


@pytest.mark.parametrize("strategy", PRESETS)
def test_half_a_load_after_an_update_that_failed_and_a_whole_one(strategy):
    on(2, loaded_by_halves, strategy)


# --- the Accelerator and what comes with it ---------------------------------------------------------
def accelerated(precision: str, strategy: str, folder: str) -> list[float]:
    """Losses of all ranks."""
    accelerator = shardwise.Accelerator(
        strategy=shardwise.Strategy.parse(strategy), mixed_precision=precision, gradient_accumulation_steps=2
    )
    assert accelerator.device == torch.device("sim", rank())
    model, rows = make(), torch.stack([batch(s, 0)[0] for s in range(16)])
    model, optimizer, loader = accelerator.prepare(
        model, adamw(model.parameters()), DataLoader(TensorDataset(rows), batch_size=2, pin_memory=True)
    )
    losses = []
    for (ids,) in loader:
        assert ids.device == accelerator.device
        with accelerator.accumulate(model):
            loss = loss_of(model, ids)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    found = accelerator.gather(torch.stack(losses))
    accelerator.free_memory()
    return found.tolist()


@in_turn(strategy=["zero2", "zero2,offload_grads=cpu,offload_optimizer=cpu", "zero3"], precision=["no", "bf16", "fp16"])
def test_an_accelerator(precision, strategy, tmp_path):
    found, same = on(2, accelerated, precision, strategy, str(tmp_path))
    expected, _ = on(2, accelerated, "no", "ddp", str(tmp_path))
    assert found == same
    if precision == "no":
        assert found == expected
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-2, atol=2e-2)


def small_gradients(param_dtype: str, keys: dict[str, Any]) -> int:
    """How many values move where gradients are too small for fp16, but for the scale of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(SIM)
    shardwise.fully_shard(model, strategy=shardwise.Strategy("ddp", param_dtype=param_dtype, **keys))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-16, weight_decay=0)
    scaler = torch.amp.GradScaler("sim", init_scale=2.0**16)
    before = whole(model)
    loss = model(torch.randn(8, 64).to(SIM)).float().square().mean() * 1e-4
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    shardwise.clip_grad_norm_(model, 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return sum(int((value != before[name]).sum()) for name, value in whole(model).items())


def small_gradients_survive(param_dtype: str) -> None:
    kept = small_gradients(param_dtype, {})
    for keys in ({"offload_optimizer": "cpu"}, ALL_CPU):
        assert small_gradients(param_dtype, keys) == kept > 8000


@pytest.mark.parametrize("param_dtype", ["fp16", "bf16"])
def test_small_gradients_survive_the_way_to_the_host(param_dtype):
    on(1, small_gradients_survive, param_dtype)


def uneven(strategy: str) -> None:
    accelerator = shardwise.Accelerator(strategy=strategy, even_batches=False)
    rows = torch.stack([batch(s, 0)[0] for s in range(3)])
    model = make()
    model, optimizer, loader = accelerator.prepare(
        model, adamw(model.parameters()), DataLoader(TensorDataset(rows), batch_size=1)
    )
    seen = 0
    with accelerator.join_uneven_inputs([model]):
        for (ids,) in loader:
            accelerator.backward(loss_of(model, ids))
            optimizer.step()
            optimizer.zero_grad()
            seen += 1
    counts = operations.gather_object([seen])
    assert sorted(counts) == [[1], [2]], counts


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_uneven_inputs(strategy):
    on(2, uneven, strategy)


def local_sgd() -> None:
    accelerator = shardwise.Accelerator(strategy="ddp")
    model = make()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    with shardwise.LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for step in range(4):
            accelerator.backward(loss_of(model, batch(step, rank()).to(accelerator.device)))
            optimizer.step()
            optimizer.zero_grad()
            local.step()
    sums = operations.gather(sum(p.double().sum() for p in model.parameters()))
    assert sums[0] == sums[1]


def test_local_sgd():
    on(2, local_sgd)


def drop_in(name: str) -> None:
    model = make().to(SIM)
    if name == "fully_shard":
        shardwise.fsdp.fully_shard(model)
    else:
        model = getattr(shardwise, name)(model)
    optimizer = adamw(model.parameters())
    for step in range(4):
        loss_of(model, batch(step, rank()).to(SIM)).backward()
        optimizer.step()
        optimizer.zero_grad()
    _, _, weights = train_alone(world(), clip=None)
    if name == "fully_shard":
        with shardwise.gathered(model):
            found = [p.detach().cpu().clone() for p in model.parameters()]
        for value, expected in zip(found, weights.values(), strict=False):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fully_shard", "FullyShardedDataParallel", "DistributedDataParallel"])
def test_a_drop_in(name):
    on(2, drop_in, name)


def batch_size() -> list[int]:
    tried = []

    @find_executable_batch_size(starting_batch_size=64)
    def attempt(size: int) -> None:
        tried.append(size)
        model, optimizer = build("ddp")
        loss_of(model, batch(0, 0, rows=size, length=200).to(SIM)).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.sim.empty_cache()
    torch.sim.set_memory_limit(torch.sim.memory_reserved() + (8 << 20))
    try:
        attempt()
    finally:
        torch.sim.set_memory_limit(4 << 30)
    return tried


def test_the_largest_batch_that_fits():
    (tried,) = on(1, batch_size)
    assert len(tried) > 1 and tried == sorted(tried, reverse=True)


class Mixed(nn.Module):
    """A model of the device with a buffer of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def buffer_of_the_host() -> list[float]:
    model = Mixed().to(SIM)
    model.count = torch.full((3,), float(rank() + 1))
    shardwise.fully_shard(model, strategy="ddp")
    model(torch.ones(2, 8, device=SIM)).sum().backward()
    assert model.count.device.type == "cpu"
    return model.count.tolist()


def test_a_buffer_of_the_host_is_sent_like_any_other():
    assert on(2, buffer_of_the_host) == [[1.0] * 3] * 2


def operations_of_the_device() -> None:
    r = rank()
    mine = torch.full((3,), float(r), device=SIM)
    assert operations.gather(mine).tolist() == [0.0] * 3 + [1.0] * 3
    assert operations.reduce(mine).tolist() == [1.0] * 3
    assert operations.broadcast(mine.clone(), 1).tolist() == [1.0] * 3
    assert operations.pad_across_processes(torch.ones(r + 1, device=SIM)).shape == (2,)
    synchronize_rng_states(["torch", "sim"])
    assert operations.gather(torch.rand(1, device=SIM)).unique().numel() == 1
    dist.barrier()


def test_operations():
    on(2, operations_of_the_device)
