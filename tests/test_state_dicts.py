"""``state_dict()`` and ``load_state_dict()`` where wrappers and hooks name things their own way.

The keys and the values are those of plain PyTorch, and what is loaded reaches the master values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import shardwise
from models import assert_same, rank
from ranks import run
from slowly import in_turn

D = 6
STRATEGIES = ["ddp", "zero1", "zero3", "zero1,param_dtype=bf16", "zero3,param_dtype=bf16", "zero3,offload_params=nvme"]


def checkpointed() -> nn.Module:
    return nn.Sequential(*(checkpoint_wrapper(nn.Linear(D, D)) for _ in range(3)))


def compiled() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), torch.compile(nn.Linear(D, D), backend="eager"), nn.Linear(D, D))


def parametrised() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(D, D)), parametrizations.orthogonal(nn.Linear(D, D)), nn.Linear(D, D)
    )


def renamed() -> nn.Module:
    """A hook of the script's own that renames keys, and one that takes them back."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))

    def out(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        for key in [k for k in state if k.startswith(f"{prefix}weight")]:
            state[key.replace("weight", "kernel")] = state.pop(key)

    def back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [k for k in state if k.startswith(f"{prefix}kernel")]:
            state[key.replace("kernel", "weight")] = state.pop(key)

    for layer in model:
        layer.register_state_dict_post_hook(out)
        layer.register_load_state_dict_pre_hook(back)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    model[2].weight = model[0].weight
    return model


KINDS = [checkpointed, compiled, parametrised, renamed, tied]


def built(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def saved_and_loaded(kind: Callable[[], nn.Module], strategy: str) -> None:
    if "bf16" in strategy and kind is parametrised:
        strategy += ",autocast=true"  # a parametrisation computes its weight from a buffer in fp32
    plain = built(kind)
    model = shardwise.fully_shard(built(kind), strategy=strategy, units=lambda name, m: name in ("0", "1", "2"))
    want = plain.state_dict()
    got = model.state_dict()
    assert list(got) == list(want)
    assert_same(got, want)
    assert all(v.device.type == "cpu" and type(v) is torch.Tensor for v in got.values())
    if kind is tied:
        assert got["0.weight"].data_ptr() == got["2.weight"].data_ptr()
    # Into a plain module, and back from another one; the loaded values are those that are trained and saved.
    built(kind, 1).load_state_dict(got)
    other = built(kind, 2).state_dict()
    assert not torch.equal(next(iter(other.values())), next(iter(got.values())))
    missing = model.load_state_dict(other)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert_same(model.state_dict(), other)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(2, D, generator=torch.Generator().manual_seed(rank()))
    model(x).sum().backward()
    opt.step()
    assert_same(model.state_dict(), other)
    with torch.no_grad():
        reference = built(kind)
        reference.load_state_dict(other)
        tolerance = 0.1 if "bf16" in strategy else 1e-6
        torch.testing.assert_close(model(x).float(), reference(x), rtol=tolerance, atol=tolerance)


@in_turn(strategy=STRATEGIES, kind=KINDS)
def test_wrapped_and_renamed_models(kind, strategy, tmp_path):
    run(2, saved_and_loaded, kind, strategy + (f",nvme_path={tmp_path}" if "nvme" in strategy else ""))


@pytest.mark.parametrize("kind", KINDS)
def test_on_one_rank(kind, tmp_path):
    for strategy in ("ddp", "zero2,param_dtype=bf16", f"zero3,offload_params=nvme,nvme_path={tmp_path}"):
        saved_and_loaded(kind, strategy)


def replaced(strategy: str) -> None:
    model = shardwise.fully_shard(built(tied), strategy=strategy)
    model[1].weight.data = torch.full((D, D), 3.0)
    assert torch.equal(model.state_dict()["1.weight"], torch.full((D, D), 3.0))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_a_replaced_tensor_is_saved_as_it_is_now(strategy):
    run(2, replaced, strategy)


def buffers(strategy: str) -> list[float]:
    """Rank 0's buffers are everyone's once a model is sharded, and stay apart where the strategy says so."""
    torch.manual_seed(rank())
    norm = nn.BatchNorm1d(D)
    norm.running_mean.copy_(torch.randn(D))
    model = shardwise.fully_shard(nn.Sequential(nn.Linear(D, D), norm), strategy=strategy)
    return model.eval()[1].running_mean.tolist()


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3", "hsdp,shard_size=1"])
def test_buffers_are_sent_when_a_model_is_sharded(strategy):
    first, second = run(2, buffers, strategy)
    assert first == second
    first, second = run(2, buffers, f"{strategy},broadcast_buffers=false")
    assert first != second


def two_forwards(strategy: str) -> None:
    """Two forwards and one backward through a batch norm, whose buffers are sent before each forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D))
    plain = built(lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D)))
    shardwise.fully_shard(model, strategy=strategy)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    for m in (model, plain):
        (m(x + rank()) - m(-x)).square().mean().backward()
    with shardwise.gathered(model, grads=True):
        assert torch.isfinite(model[0].weight.grad).all()
    if strategy == "ddp":
        grads = [torch.zeros_like(plain[0].weight.grad) for _ in range(2)]
        torch.distributed.all_gather(grads, plain[0].weight.grad)
        torch.testing.assert_close(model[0].weight.grad, sum(grads) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_buffers_saved_for_backward_survive_the_next_forward(strategy):
    run(2, two_forwards, strategy)
