"""What a script does to parameters between steps reaches the master values, or raises: writes, new memory, other
objects, other dtypes. Never a step that does nothing, and never a value that is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, step, whole, world
from ranks import run
from shardwise.errors import GradientError, ReleasedParameterError, UnitError

STAYS = ["ddp", "zero1", "zero2"]  # presets under which values stay on each rank
HALF = ",param_dtype=bf16"


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


# --- conversions that ask for what is there already -------------------------------------------------------------
def converted(strategy: str, dtype: torch.dtype, how: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).requires_grad_(False)).to(dtype)
    shardwise.fully_shard(model, strategy=strategy)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)

    def step() -> None:
        model(torch.ones(1, 4, dtype=dtype)).sum().backward()
        opt.step()
        opt.zero_grad()

    step()
    before = whole(model)
    if rank() == 0:  # as a script does that saves on its main process
        assert how(model) is model
    after = whole(model)
    assert_same({name: value.to(before[name].dtype) for name, value in after.items()}, before)
    assert {v.dtype for v in after.values()} == {torch.float32 if rank() == 0 else dtype}
    step()  # as before
    assert all(p.dtype == dtype for p in model.parameters())
    assert not torch.equal(whole(model)["0.weight"], after["0.weight"])


def to_fp32(model: nn.Module) -> nn.Module:
    return model.to("cpu", torch.float32)


@pytest.mark.parametrize("how", [to_fp32, nn.Module.float])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_conversion_to_fp32_is_of_what_is_saved(strategy, dtype, how):
    run(2, converted, strategy, dtype, how)


# --- values that are there for a save only -----------------------------------------------------------------
def shown(strategy: str) -> None:
    model = shardwise.fully_shard(linear(), strategy=strategy)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    opt.zero_grad()
    before = whole(model)
    kept = [p.detach().clone() for p in model.parameters()]
    if rank() == 0:
        for p in model.parameters():
            p.data.copy_(torch.full_like(p, 2.0))
    during = whole(model)
    if rank() == 0:
        assert all(torch.equal(value, torch.full_like(value, 2.0)) for value in during.values())
        for p, value in zip(model.parameters(), kept, strict=True):
            p.data.copy_(value)
    else:
        assert_same(during, before)
    assert_same(whole(model), before)


@pytest.mark.parametrize("strategy", [name + HALF for name in STAYS])
def test_averaged_values_are_put_in_to_be_saved_on_one_rank(strategy):
    """As an average of diffusers' does: ``copy_to``, ``save_pretrained``, ``restore``."""
    run(2, shown, strategy)


# --- new memory, other dtypes, other objects ------------------------------------------------------------------
def assigned(model: nn.Module) -> None:
    model.weight.data = torch.full((3, 4), 2.0)


def from_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 0 + 2.0, model.parameters())


def other_memory(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(2.0)


def transposed(model: nn.Module) -> None:
    model.weight.data = torch.full((4, 3), 2.0).t()


def taken_over(strategy: str, how: Any) -> None:
    model = shardwise.fully_shard(linear(), strategy=strategy)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    if strategy.startswith("zero3"):
        with pytest.raises(ReleasedParameterError):
            how(model)
        with torch.no_grad(), shardwise.gathered(model, write=True):
            how(model)
    else:
        how(model)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert torch.equal(model.state_dict()["weight"], torch.full((3, 4), 1.0))
    with shardwise.gathered(model):
        assert torch.equal(model.weight.float(), torch.full((3, 4), 1.0))


@pytest.mark.parametrize("how", [assigned, from_vector, other_memory, transposed])
@pytest.mark.parametrize("strategy", [*PRESETS, "zero2" + HALF, "zero3" + HALF])
def test_new_memory_is_taken_over(strategy, how):
    if HALF in strategy and how in (assigned, transposed):
        return  # of another dtype, see below
    run(2, taken_over, strategy, how)


def double(model: nn.Module) -> None:
    model.double()


def half(model: nn.Module) -> None:
    model.bfloat16()


def other_shape(model: nn.Module) -> None:
    model.weight.data = torch.zeros(3, 5)


def to_meta(model: nn.Module) -> None:
    model.weight.data = torch.zeros(3, 4, dtype=torch.float64)


def replaced(model: nn.Module) -> None:
    model.weight = nn.Parameter(torch.zeros(3, 4))


def added(model: nn.Module) -> None:
    model.extra = nn.Linear(4, 3)


def swapped(model: nn.Module) -> None:
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.zeros(3, 4)))


REFUSED = {
    double: "converted to torch.float64", half: "converted to torch.bfloat16", other_shape: "given the shape",
    to_meta: "converted", replaced: "'weight' was replaced", added: "'extra.weight' was added",
}  # fmt: skip


def refused(strategy: str, how: Any, match: str, by: str) -> None:
    model = shardwise.fully_shard(linear(), strategy=strategy)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()
    try:
        how(model)
    except (ReleasedParameterError, GradientError):  # at once, where values are released or gradients split
        assert strategy != "ddp"
        return
    with pytest.raises(UnitError, match=match):
        opt.step() if by == "step" else model(torch.ones(1, 4))


@pytest.mark.parametrize("by", ["forward", "step"])
@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_what_would_not_be_trained_is_named(strategy, how, by):
    run(2, refused, strategy, how, REFUSED[how], by)


def swap(strategy: str) -> None:
    """The object stays, its memory and attributes are another's."""
    model = shardwise.fully_shard(linear(), strategy=strategy)
    swapped(model)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert torch.equal(model.state_dict()["weight"], torch.full((3, 4), -1.0))


@pytest.mark.parametrize("strategy", STAYS)
def test_swapped_tensors_are_taken_over(strategy):
    run(2, swap, strategy)


def harmless() -> None:
    """Buffers, modules without parameters and parametrised names may come at any time; frozen ones too."""
    model = shardwise.fully_shard(make(), strategy="zero2")
    model.register_buffer("late", torch.zeros(2))
    model.activation = nn.GELU()
    loss_of(model, batch(0, rank())).backward()
    model.head.weight.requires_grad_(False)
    loss_of(model, batch(0, rank())).backward()


def test_what_has_no_parameters_may_come_later():
    run(2, harmless)


# --- writes to live values -----------------------------------------------------------------------------------
def written(strategy: str) -> None:
    model = shardwise.fully_shard(linear(), strategy=strategy)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    before = model.state_dict()["bias"]
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.weight[0, 0] = 7.0
    assert model.state_dict()["weight"].flatten()[:2].tolist() == [7.0, 5.0]
    with torch.no_grad():
        model.weight.mul_(2)
    model(torch.ones(1, 4)).sum().backward()
    opt.step()
    model(torch.ones(1, 4))
    assert model.weight.flatten()[:2].tolist() == [14.0, 10.0]
    state = model.state_dict()
    assert state["weight"].flatten()[:2].tolist() == [14.0, 10.0]
    assert torch.equal(state["bias"], before)  # to the last bit, although values have fewer


@pytest.mark.parametrize("dtype", ["", HALF])
@pytest.mark.parametrize("strategy", STAYS)
def test_writes_to_live_values_reach_the_master_values(strategy, dtype):
    run(2, written, strategy + dtype)


def normed(strategy: str) -> str:
    """An embedding that keeps the norms of its rows, in its forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 8, max_norm=1.0), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.fill_(10.0)
    shardwise.fully_shard(model, strategy=strategy, units=(nn.Embedding, nn.Linear))
    try:
        model(torch.arange(4))
    except UnitError as error:
        return str(error)
    norms = model.state_dict()["0.weight"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4), rtol=1e-2, atol=1e-2)
    return ""


@pytest.mark.parametrize("strategy", [*STAYS, "zero2" + HALF, "zero3", "hsdp,shard_size=2"])
def test_writes_in_a_forward(strategy, tmp_path):
    said = run(2, normed, strategy)
    if strategy in ("zero3", "hsdp,shard_size=2"):
        assert all("'0.weight' was written to" in text and "fix:" in text for text in said)
    else:
        assert not any(said)
    assert not normed(f"ddp,offload_params=nvme,nvme_path={tmp_path}")


# --- gathered() ------------------------------------------------------------------------------------------------
EVERY = [
    *PRESETS,
    *(p + HALF for p in PRESETS),
    "hsdp,shard_size=2",
    "zero3,offload_params=nvme",
    "zero2,offload_optimizer=nvme" + HALF,
]


def trained(strategy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = adamw(model.parameters())
    for index in range(2):
        step(model, opt, index)
    return model, opt


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def nothing_changed(strategy: str) -> None:
    model, opt = trained(strategy)
    before = whole(model)
    with shardwise.gathered(model, write=True):
        pass
    assert_same(before, whole(model))
    with torch.no_grad(), shardwise.gathered(model, write=True):
        model.norm.weight[3] = 0.5
    after = whole(model)
    assert after["norm.weight"][3] == 0.5
    before["norm.weight"][3] = 0.5
    assert_same(before, after)  # and nothing but that, to the last bit
    with pytest.raises(ZeroDivisionError), torch.no_grad(), shardwise.gathered(model, write=True):
        fail(model.norm.weight.zero_(), model.head.weight.add_(1))
    assert_same(before, whole(model))
    step(model, opt, 3)
    with shardwise.gathered(model):
        assert torch.isfinite(model.head.weight).all()


@pytest.mark.parametrize("strategy", EVERY)
def test_a_block_that_writes_changes_what_was_written_and_nothing_else(strategy, tmp_path):
    run(2, nothing_changed, strategy + (f",nvme_path={tmp_path}" if "nvme" in strategy else ""))


def read_only(strategy: str) -> None:
    model, opt = trained(strategy)
    before = whole(model)
    with pytest.raises(UnitError, match="write=True"), torch.no_grad(), shardwise.gathered(model):
        model.head.weight.fill_(5.0)
    assert_same(before, whole(model))
    if "nvme" not in strategy:
        with pytest.raises(shardwise.ShardwiseError), torch.no_grad(), shardwise.gathered(model):
            model.head.weight.data.fill_(5.0)  # past the counter of writes
        assert_same(before, whole(model))
    step(model, opt, 3)


@pytest.mark.parametrize("strategy", ["zero3", "zero3" + HALF, "hsdp,shard_size=2"])
def test_writes_inside_a_block_that_only_reads_raise(strategy):
    run(2, read_only, strategy)


def nested(strategy: str) -> None:
    model, opt = trained(strategy)
    oracle = whole(model)
    with torch.no_grad():
        with shardwise.gathered(model):
            with shardwise.gathered(model):
                pass
            model.head.weight.sum()  # the inner block leaves the outer one its values
            with shardwise.gathered(model.blocks[0]):
                model.head.weight.sum()
            model.blocks[0].up.weight.sum()
        with shardwise.gathered(model, write=True):
            model.norm.weight.fill_(7.0)
            with shardwise.gathered(model):
                assert float(model.norm.weight[0]) == 7.0
            model.norm.bias.fill_(3.0)
        oracle["norm.weight"].fill_(7.0)
        oracle["norm.bias"].fill_(3.0)
        assert_same(oracle, whole(model))
        with shardwise.gathered(model):
            with shardwise.gathered(model, write=True):
                model.norm.weight.fill_(2.0)
            assert float(model.norm.weight[0]) == 2.0
        oracle["norm.weight"].fill_(2.0)
        assert_same(oracle, whole(model))
    # Any order of exit, and a step inside.
    first, second = shardwise.gathered(model), shardwise.gathered(model.blocks)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model.blocks[0].up.weight.sum()
    loss_of(model, batch(5, rank())).backward()
    before = model.blocks[0].up.weight.detach().clone()
    opt.step()
    opt.zero_grad()
    now = model.blocks[0].up.weight.detach().clone()
    second.__exit__(None, None, None)
    assert not torch.equal(before, now)
    assert torch.equal(now, whole(model)["blocks.0.up.weight"].to(now.dtype))
    step(model, opt, 6)
    if "offload_params" in strategy or (strategy.startswith("zero3") and world() > 1):
        with pytest.raises(ReleasedParameterError):
            model.blocks[0].up.weight.sum()


@pytest.mark.parametrize("strategy", EVERY)
def test_nested_blocks(strategy, tmp_path):
    run(2, nested, strategy + (f",nvme_path={tmp_path}" if "nvme" in strategy else ""))


# --- averages ----------------------------------------------------------------------------------------------------
def averaged(strategy: str) -> None:
    import copy

    model, opt = trained(strategy)
    mean = copy.deepcopy(model)
    want = {k: v.double() for k, v in whole(model).items()}
    for index in range(3, 8):
        step(model, opt, index)
        shardwise.ema_update_(mean, model, decay=0.999)
        now = whole(model)
        want = {k: v * 0.999 + now[k].double() * 0.001 for k, v in want.items()}
    got = whole(mean)
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-6, atol=1e-7)
    assert all(v.dtype == torch.float32 for v in got.values())
    ids = batch(9, rank())
    with torch.no_grad():
        assert torch.isfinite(loss_of(mean, ids))
    with pytest.raises(UnitError, match="not sharded alike"):
        shardwise.ema_update_(shardwise.fully_shard(make(d=5), strategy=strategy), model)


@pytest.mark.parametrize(
    "strategy", ["ddp" + HALF, "zero1" + HALF, "zero3" + HALF, "zero3", "zero3,offload_params=nvme"]
)
def test_a_moving_average_in_any_dtype(strategy, tmp_path):
    run(2, averaged, strategy + (f",nvme_path={tmp_path}" if "nvme" in strategy else ""))


def test_on_one_rank(tmp_path):
    assert world() == 1
    for strategy in ("ddp", "zero3", "zero2" + HALF, f"zero3,offload_params=nvme,nvme_path={tmp_path}"):
        nothing_changed(strategy)
        nested(strategy)
        averaged(strategy)
