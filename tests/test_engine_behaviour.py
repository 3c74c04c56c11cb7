"""What an engine does beside computing the right thing: gradients that wait, parameters that are elsewhere, misuse."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from scenario_models import Branches, D, Unrepeated
from scenarios import fail
from scenarios import rows_of_floats as data
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.errors import GradientError, OptimizerError, ReleasedParameterError, UnitError


# --- gradients that wait ---------------------------------------------------------------------------------
def zeroed_under_no_sync(strategy: str) -> None:
    """What was gathered under no_sync and then zeroed does not come back with a backward that goes elsewhere."""
    torch.manual_seed(5)
    model = shardwise.fully_shard(Branches(), strategy=strategy)
    for sync in (False, True):
        model.which = 0
        with shardwise.no_sync(model):
            model(data(0, rank())).mean().backward()
        assert model.layers[1].weight.grad is not None
        model.zero_grad()
        model.which = 1
        with nullcontext() if sync else shardwise.no_sync(model):
            model(data(1, rank())).mean().backward()
        assert model.layers[1].weight.grad is None and model.layers[2].weight.grad is not None
        model.zero_grad()


@pytest.mark.parametrize("strategy", PRESETS)
def test_zeroed_gradients_stay_zeroed(strategy):
    run(2, zeroed_under_no_sync, strategy)


def stepping_too_early(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = adamw(model.parameters())
    with shardwise.no_sync(model):
        loss_of(model, batch(0, rank())).backward()
    with pytest.raises(GradientError, match="no_sync"):
        opt.step()
    with pytest.raises(GradientError, match="no_sync"):
        shardwise.clip_grad_norm_(model, 1.0)
    before = whole(model)
    opt.zero_grad()
    loss_of(model, batch(1, rank())).backward()
    opt.step()
    oracle = make()
    ref = adamw(oracle.parameters())
    loss_of(oracle, torch.cat([batch(1, r) for r in range(world())])).backward()
    ref.step()
    assert_close(whole(model), whole(oracle), 1e-4)
    assert any(not torch.equal(before[k], v) for k, v in whole(oracle).items())


@pytest.mark.parametrize("strategy", PRESETS)
def test_step_on_unreduced_gradients_is_an_error(strategy):
    run(2, stepping_too_early, strategy)


def lost_window(strategy: str, zero: bool) -> None:
    """A backward fails that was to add to what no_sync() gathered: it is gone, and nobody trains on the rest."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    with shardwise.no_sync(model):
        loss_of(model, batch(0, rank())).backward()
    middle = model.blocks[1].register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
    with pytest.raises(MemoryError):
        loss_of(model, batch(1, rank())).backward()
    middle.remove()
    for use in (
        opt.step,
        lambda: shardwise.clip_grad_norm_(model, 1.0),
        lambda: loss_of(model, batch(2, rank())).backward(),
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    ):
        with pytest.raises(GradientError, match=r"is gone: .*no_sync\(\)(.|\n)*zero_grad\(\)"):
            use()
    assert model.head.weight.grad is not None, "it is no silent zero"
    opt.zero_grad(set_to_none=zero)
    for m, o, rows in ((model, opt, batch(3, rank())), (oracle, ref, torch.cat([batch(3, r) for r in range(world())]))):
        loss_of(m, rows).backward()
        o.step()
    assert_close(whole(model), whole(oracle), 1e-4)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("strategy", PRESETS)
def test_gradients_that_a_failed_backward_took_along_are_missed(strategy, zero):
    run(2, lost_window, strategy, zero)


def beside_reduced(strategy: str) -> None:
    """A reduced gradient, and more of this rank's own: shown together, zeroed together, and not stepped on."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    loss_of(model, batch(0, rank())).backward()
    with shardwise.no_sync(model):
        loss_of(model, batch(1, rank())).backward()
    loss_of(oracle, torch.cat([batch(0, r) for r in range(world())])).backward()
    loss_of(oracle, batch(1, rank())).backward()
    grad, expected = model.head.weight.grad, oracle.head.weight.grad
    if strategy == "ddp":
        torch.testing.assert_close(grad + 0, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(GradientError, match="no_sync"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.zero_grad(set_to_none=False)
    loss_of(model, batch(2, rank())).backward()
    oracle.zero_grad()
    loss_of(oracle, torch.cat([batch(2, r) for r in range(world())])).backward()
    with shardwise.gathered(model, grads=True):
        for (n, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=n)


@pytest.mark.parametrize("strategy", PRESETS)
def test_what_waits_beside_reduced_gradients_goes_with_them(strategy):
    run(2, beside_reduced, strategy)


def replaced_under_no_sync(strategy: str) -> None:
    """A gradient that the script puts in place of one that waits counts instead of it."""
    model = shardwise.fully_shard(nn.Sequential(nn.Linear(2, 2, bias=False)), strategy=strategy)
    with shardwise.no_sync(model):
        model(torch.ones(1, 2)).sum().backward()
        model[0].weight.grad = torch.full((2, 2), 3.0 + rank())
    model(torch.ones(1, 2)).sum().backward()
    with shardwise.gathered(model, grads=True):
        assert torch.equal(model[0].weight.grad, torch.full((2, 2), 4.5)), model[0].weight.grad


@pytest.mark.parametrize("strategy", PRESETS)
def test_a_waiting_gradient_can_be_replaced(strategy):
    run(2, replaced_under_no_sync, strategy)


def sent_once(strategy: str) -> list[int]:
    """The root returns what its last unit made: both begin their backward with one gradient."""
    model = shardwise.fully_shard(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), strategy=strategy)
    sent = []
    for _ in range(2):
        shardwise.reset_stats()
        model(torch.ones(1, 64)).sum().backward()
        sent.append(shardwise.stats().comm["reduce"].bytes_sent)
    return sent


@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1.0), ("zero3", 0.5)])
def test_a_unit_that_the_root_returns_is_reduced_once(strategy, share):
    nbytes = 4 * (64 * 64 + 64) * 4  # a multiple of what is padded to
    assert run(2, sent_once, strategy) == [[share * nbytes] * 2] * 2


# --- released parameters, split gradients --------------------------------------------------------------------
def refusing(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    loss_of(model, batch(0, rank())).backward()
    with pytest.raises(GradientError, match="split over the ranks"):
        model.head.weight.grad.sum()
    with pytest.raises(GradientError, match="split over the ranks"):
        _ = model.head.weight.grad + 1


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_other_operations_on_split_gradients_raise(strategy):
    run(2, refusing, strategy)


def released() -> None:
    model = make()
    names, objects = dict(model.named_parameters()), {n: id(p) for n, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in names.items()}
    assert shardwise.fully_shard(model, strategy="zero3") is model
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    weight = model.blocks[0].up.weight
    uses = [
        lambda: weight + 1,
        lambda: weight.data,
        lambda: weight.sum(),
        lambda: weight.numpy(),
        lambda: weight.tolist(),
    ]
    for use in [*uses, lambda: torch._foreach_add([weight], 1.0)]:
        with pytest.raises(ReleasedParameterError, match=r"blocks\.0\.up\.weight"):
            use()
    with pytest.raises(ReleasedParameterError, match="copy the whole model"):
        copy.deepcopy(weight)
    assert "blocks.0.up.weight" in repr(weight)
    with shardwise.gathered(model.blocks[0], write=True):
        assert torch.equal(weight, make().blocks[0].up.weight)
        with torch.no_grad():
            weight.fill_(rank() + 1.0)
    assert bool((whole(model)["blocks.0.up.weight"] == 1.0).all()), "rank 0's values, for everyone"


def test_released_parameters_keep_their_identity_and_cannot_be_misread():
    run(2, released)


# --- buffers, state dicts ----------------------------------------------------------------------------------
class Bn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def buffers(strategy: str) -> None:
    torch.manual_seed(rank())  # ranks start differently: rank 0's values count
    model = shardwise.fully_shard(Bn(), strategy=strategy)
    torch.manual_seed(0)
    oracle = Bn()
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(3):
        model(data(step, rank())).square().mean().backward()
        opt.step()
        opt.zero_grad()
        oracle(data(step, 0))
    del ref
    model(data(9, rank()))  # the next training forward brings rank 0's buffers, then each rank adds its own batch
    torch.testing.assert_close(model.net[1].num_batches_tracked, torch.tensor(4))
    if rank() == 0:
        first = copy.deepcopy(model.net[1].running_mean)
        assert first.shape == (D,)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_buffers_follow_rank_zero(strategy):
    run(2, buffers, strategy)


def state_dicts(strategy: str) -> None:
    model = shardwise.fully_shard(make(tied=True), strategy=strategy)
    plain = make(tied=True)
    assert_same(whole(model), whole(plain))
    other = make(seed=3, tied=True)
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same(whole(model), whole(other))
    ids = batch(0, 0)
    torch.testing.assert_close(loss_of(model, ids), loss_of(other, ids))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.state_dict(), "norm.weight": torch.ones(99)})
    with pytest.raises(UnitError, match="assign"):
        model.load_state_dict(other.state_dict(), assign=True)
    assert_same(whole(model), whole(other))


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,param_dtype=bf16", "ddp,param_dtype=bf16"])
def test_state_dict_and_load(strategy):
    if "bf16" in strategy:
        run(2, bf16_state_dict, strategy)
    else:
        run(2, state_dicts, strategy)


def bf16_state_dict(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    assert_same(whole(model), whole(make()))
    other = make(seed=3)
    model.load_state_dict(other.state_dict())
    assert_same(whole(model), whole(other))


# --- units, misuse ------------------------------------------------------------------------------------------
def cut_by_size(strategy: str) -> list[str]:
    model = shardwise.fully_shard(Unrepeated(), strategy=strategy)
    return [unit.name for unit in engine_of(model).units]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_units_by_size_where_nothing_repeats(strategy):
    for names in run(2, cut_by_size, strategy):
        assert names == ["first.0", "first.2", "middle", "last.a", "last.b", ""]


def misuse() -> None:
    model = shardwise.fully_shard(make(), strategy="zero2")
    with pytest.raises(UnitError, match="already"):
        shardwise.fully_shard(model)
    with pytest.raises(UnitError, match="matches no module"):
        shardwise.fully_shard(make(), units="Nope")
    for bad in (torch.optim.LBFGS(model.parameters()), torch.optim.SparseAdam(list(model.parameters()))):
        loss_of(model, batch(0, rank())).backward()
        with pytest.raises(OptimizerError):
            bad.step(lambda: torch.tensor(0.0))


def sparse_gradients() -> None:
    model = shardwise.fully_shard(nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)), strategy="zero2")
    with pytest.raises(UnitError, match=r"'0\.weight' has a sparse gradient"):
        model(torch.tensor([1, 2])).sum().backward()


def test_sparse_gradients_are_refused():
    run(2, sparse_gradients)


def test_misuse_is_named():
    run(2, misuse)


# --- models that are dropped -----------------------------------------------------------------------------
def dropped(strategy: str) -> None:
    """At any moment of a step, with gathers and updates under way: nothing keeps a model that nobody uses."""

    def alive() -> int:
        gc.collect()
        return sum(type(found) is Engine for found in gc.get_objects())

    def up_to(moment: int) -> None:
        model = shardwise.fully_shard(make(), strategy=strategy)
        opt = adamw(model.parameters())
        loss = loss_of(model, batch(0, rank()))
        if moment > 0:
            loss.backward()
        if moment > 1:
            opt.step()

    before = alive()
    for moment in range(3):
        up_to(moment)
        assert alive() == before, moment
    dist.barrier()


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,offload_optimizer=nvme,offload_params=nvme"])
def test_a_model_that_is_dropped_is_gone(strategy):
    run(2, dropped, strategy)
