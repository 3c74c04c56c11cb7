"""The engine runs unchanged on fake tensors and a fake process group: what a planner stands on."""

from __future__ import annotations

import json

import pytest

import processes
from slowly import slow

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
import shardwise
from models import LM

strategy, size = sys.argv[1], int(sys.argv[2])
dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
with FakeTensorMode():
    model = LM(d=256, layers=3, vocab=512)
    n = sum(p.numel() for p in model.parameters())
    shardwise.fully_shard(model, strategy=strategy)
    opt = torch.optim.AdamW(model.parameters(), foreach=True)
    for _ in range(2):
        shardwise.reset_stats()
        ids = torch.zeros(2, 17, dtype=torch.long)
        with shardwise.memory_meter(model) as meter:
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            shardwise.clip_grad_norm_(model, 1.0)
            opt.step()
            opt.zero_grad()
    s, e = shardwise.stats(model), shardwise.expected(model)
print(json.dumps({"n": n, "live": s.live, "peak": s.peak, "sent": {k: c.bytes_sent for k, c in s.comm.items()},
                  "expected": vars(e), "meter": meter.peak}))
"""


@pytest.mark.parametrize(
    "strategy",
    [*map(slow, ("ddp", "zero1", "zero2", "zero3")), "zero3,param_dtype=bf16", "hsdp,shard_size=8"],
)
def test_world_of_64(strategy, tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(SCRIPT)
    code, out, err = processes.script(path, strategy, 64).finish()
    assert code == 0, err[-3000:]
    facts = json.loads(out.splitlines()[-1])
    live, expected = facts["live"], facts["expected"]
    assert live["parameters"] == expected["parameters"]
    assert live["gradients"] == expected["gradients"]
    assert live["optimizer"] == pytest.approx(expected["optimizer"], rel=0.06)
    sent = facts["sent"]
    assert sent.get("gather", 0) + sent["reduce"] == pytest.approx(expected["sent_per_step"], rel=0.02)
    assert facts["meter"]["activations"] > 0
    parts = 8 if strategy.startswith("hsdp") else 64
    if strategy.startswith(("zero3", "hsdp")):
        assert live["parameters"] == pytest.approx(facts["n"] * 4 / parts, rel=0.1)
