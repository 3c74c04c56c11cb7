"""``strategy="auto"``: the planner chooses on the machine at hand, and every rank takes its answer."""

from __future__ import annotations

import functools
import os
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from models import batch, loss_of, make, rank
from ranks import run
from shardwise import host
from shardwise.engine.build import require_engine
from shardwise.errors import PlanError, RecordError, StrategyError
from shardwise.host import HostMemory
from shardwise.observe import recording
from shardwise.observe.recorded import read
from shardwise.plan import auto
from shardwise.report.facts import facts_of
from shardwise.strategy import Strategy

SIZES = {"d": 32, "layers": 4, "vocab": 64}


def trained(**given):
    model = shardwise.fully_shard(make(**SIZES), **given)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(2):
        loss = loss_of(model, batch(step, rank(), vocab=64))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return str(require_engine(model).strategy), losses


def chosen(**given):
    return trained(strategy="auto", **given)


def with_example():
    return chosen(example=batch(0, rank(), vocab=64)[:, :-1])


def explicit(strategy):
    return trained(strategy=strategy)[1]


@functools.cache
def found_by(function):
    """What two ranks choose, with their losses. A plan takes seconds."""
    return run(2, function)


@pytest.mark.parametrize("function", [with_example, chosen])
def test_all_ranks_choose_alike_and_train_as_if_it_had_been_named(function):
    found = found_by(function)
    strategies = {strategy for strategy, _ in found}
    assert len(strategies) == 1
    named = run(2, explicit, strategies.pop())
    assert [losses for _, losses in found] == named


def little_memory(total):
    with mock.patch.object(host, "memory", return_value=HostMemory(total, total)):
        return shardwise.fully_shard(make(**SIZES), strategy="auto", example=batch(0, rank(), vocab=64)[:, :-1])


def refused(total):
    with pytest.raises(PlanError, match=r"Nothing fits.*Nearest is"):
        little_memory(total)


def squeezed(total):
    return str(require_engine(little_memory(total)).strategy)


def test_where_nothing_fits_every_rank_hears_what_comes_nearest():
    run(2, refused, 200_000)


def test_with_less_memory_it_shards_more():
    states = 16 * sum(p.numel() for p in make(**SIZES).parameters())
    assert not found_by(with_example)[0][0].startswith("zero3")
    tight = run(2, squeezed, round(2 * 0.97 * states))
    assert tight[0] == tight[1] and tight[0].startswith("zero3")


def prepared():
    torch.manual_seed(0)
    accelerator = shardwise.Accelerator(strategy="auto", cpu=True)
    model = make(**SIZES)
    data = TensorDataset(torch.randint(0, 64, (8, 5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=2))
    seen = 0
    for (ids,) in loader:
        accelerator.backward(model(ids).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        seen += len(ids)
    return str(require_engine(model).strategy), seen


def test_the_accelerator_plans_with_what_its_loader_gives():
    (first, seen), (second, _) = run(2, prepared)
    assert first == second and not Strategy.parse(first).is_auto
    assert seen == 4


def test_other_keys_stay():
    kept = run(1, with_keys)[0]
    assert "param_dtype=bf16" in kept and "timeout=60" in kept


def with_keys():
    model = shardwise.fully_shard(make(**SIZES), strategy="auto,param_dtype=bf16,timeout=60")
    return str(require_engine(model).strategy)


def most_rows():
    with mock.patch.object(host, "memory", return_value=HostMemory(1 << 24, 1 << 24)):
        return shardwise.planned_batch_size(make(**SIZES), batch(0, rank(), vocab=64)[:, :-1], "zero2")


def test_where_a_search_for_a_batch_size_starts():
    first, second = run(2, most_rows)
    assert first == second and 8 < first < 100_000


def test_auto_has_no_row_before_it_is_chosen():
    auto = Strategy.parse("auto,param_dtype=bf16")
    assert str(auto) == "auto,param_dtype=bf16" and "planner" in auto.explain()
    with pytest.raises(StrategyError, match="before it knows the model"):
        _ = auto.split_params


def recorded(folder):
    with mock.patch.dict(os.environ, {"SHARDWISE_RECORD": folder}):
        with_example()
        recording.current().close()


def test_a_recorded_run_keeps_what_it_was_chosen_by(tmp_path):
    run(1, recorded, str(tmp_path))
    predictions = {one.name: one for one in facts_of(read(tmp_path)).predictions}
    assert predictions["optimizer"].predicted == predictions["optimizer"].measured > 0


def recorded_nowhere(path):
    made = mock.patch.object(auto, "_planned", return_value=auto.Chosen("zero2", "because", {"rows": 2}))
    recorded = mock.patch.dict(os.environ, {"SHARDWISE_RECORD": path})
    with made, recorded, pytest.raises(RecordError, match="cannot be written"):
        with_example()


def test_a_plan_that_cannot_be_kept_is_an_error_of_every_rank(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    run(2, recorded_nowhere, str(file))
