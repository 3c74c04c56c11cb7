"""Small units travel together: as many bytes, the same bits, fewer messages, in one order on all ranks."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

import shardwise
from models import PRESETS, assert_same, rank, whole
from ranks import run
from shardwise.comm import joined
from slowly import in_turn, slow, slow_unless
from test_collective_order import recorded

D = 6
SOME = 8000  # bytes, of a few units


class Block(nn.Module):
    """Parameters of several dtypes, and one that is frozen, in one unit."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D + k % 3), nn.Linear(D + k % 3, D, dtype=torch.float64)
        self.b.bias.requires_grad_(k % 2 == 0)
        self.idle = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return x + (h[:, :D] if self.idle else torch.tanh(self.b(h.double())).float())


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(k) for k in range(12)), nn.Linear(D, D))


def trained(strategy: str, limit: int | None, idle: int | None = None):
    """Losses, weights, calls and bytes per kind, and the order of collectives of a few steps."""
    with nullcontext() if limit is None else mock.patch.object(joined, "JOINED_BYTES", limit):
        model = shardwise.fully_shard(make(), strategy=strategy, units=Block)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        with recorded() as issued:
            for step in range(4):
                if idle is not None:
                    model[idle].idle = (rank() + step) % 2 == 0
                shardwise.reset_stats()
                for half in range(2):
                    x = torch.randn(3, D, generator=torch.Generator().manual_seed(10 * step + half + 100 * rank()))
                    with shardwise.no_sync(model) if half == 0 and step == 2 else nullcontext():
                        loss = model(x).square().mean()
                        loss.backward()
                    losses.append(loss.item())
                shardwise.clip_grad_norm_(model, 0.5)
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    losses.append(model(torch.ones(2, D)).sum().item())
        counts = {k: (c.calls, c.bytes_sent) for k, c in shardwise.stats().comm.items()}
        return losses, whole(model), counts, [what.split(" (")[0] for what in issued]


@pytest.mark.parametrize(
    ("strategy", "world"),
    [*(slow_unless(s != "zero1", s, 2) for s in PRESETS), ("hsdp,shard_size=2", 4), slow("zero3", 3)],
)
def test_together_is_as_apart(strategy, world):
    apart, together, some = (run(world, trained, strategy, limit) for limit in (0, None, SOME))
    for one, other, few in zip(apart, together, some, strict=True):
        assert one[0] == other[0] == few[0], "losses, to the last bit"
        assert_same(one[1], other[1])
        assert_same(one[1], few[1])
        for kind in {"reduce", "gather"} & one[2].keys():
            assert one[2][kind][1] == other[2][kind][1] == few[2][kind][1], "as many bytes"
            assert other[2][kind][0] < few[2][kind][0] < one[2][kind][0], "in fewer messages"


@in_turn(strategy=["ddp", "zero1", "zero3"], limit=[SOME, None])
def test_one_order_on_all_ranks_whatever_is_idle(strategy, limit):
    ranks = run(2, trained, strategy, limit, 5)
    assert ranks[0][3] == ranks[1][3]
    assert any(" to " in what for what in ranks[0][3]), "several in one message"
