"""Promise 1: every strategy trains the same model, bit for bit."""

from __future__ import annotations

import pytest

from models import assert_close, assert_same, train, train_alone
from ranks import run
from slowly import in_turn

STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]


def every_strategy(strategies, kw):
    return [train(s, **kw) for s in strategies]


@in_turn(world=[2, 3, 4], kw=[{}, {"tied": True}, {"clip": None}])
def test_bitwise_equal_and_right(world, kw):
    strategies = STRATEGIES + (["hsdp,shard_size=2"] if world == 4 else [])
    ranks = run(world, every_strategy, strategies, kw)
    oracle = train_alone(world, **kw)
    for results in ranks:
        losses, norms, weights = results[0]
        assert_close(weights, oracle[2], 2e-5)
        assert norms == pytest.approx(oracle[1], rel=1e-4)
        for strategy, (other_losses, other_norms, other) in zip(strategies[1:], results[1:], strict=True):
            assert other_losses == losses, strategy
            assert other_norms == norms, strategy
            assert_same(other, weights)
    mean = [sum(r[0][0][k] for r in ranks) / world for k in range(4)]
    assert mean == pytest.approx(oracle[0], rel=1e-4)
