"""When memory runs out, the error stays what it is, and says what was held and which strategies hold less."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import processes
import shardwise
from ranks import run
from shardwise.utils import find_executable_batch_size, should_reduce_batch_size

WIDTH = 256
HOSTED = "zero3,offload_optimizer=cpu"


def allocate():
    torch.empty(1 << 50, dtype=torch.uint8)


class Greedy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        allocate()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.when = ""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        if self.when == "forward":
            allocate()
        return Greedy.apply(x) if self.when == "backward" else x


def text_of(error):
    return "\n".join([str(error), *getattr(error, "__notes__", [])])  # Python 3.10 has no notes


def trained(strategy):
    accelerator = shardwise.Accelerator(strategy=strategy)
    model, optimizer = accelerator.prepare(model := Model(), torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.randn(2, WIDTH)).sum())
    optimizer.step()
    optimizer.zero_grad()
    return accelerator, model, optimizer


def fails(strategy, when):
    accelerator, model, _ = trained(strategy)
    model.when = when
    with pytest.raises(RuntimeError) as caught:
        accelerator.backward(model(torch.randn(2, WIDTH)).sum())
    error = caught.value
    assert type(error) is RuntimeError and should_reduce_batch_size(error)
    return text_of(error)


def told(text, strategy):
    """What is said of a model, in two lines; models of tests before may still hold memory, too."""
    lines = text.splitlines()
    found = [i for i, line in enumerate(lines) if f" Model under '{strategy}'" in line]
    return lines[found[0]], lines[found[0] + 1]


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_live_bytes_by_state_stand_beside_the_formulas(when):
    text = fails("ddp", when)
    line, less = told(text, "ddp")
    assert "parameters 1.1 MB (formula: 1.1 MB)" in line and "optimizer 2.1 MB (formula: 2.1 MB)" in line
    assert "offload_optimizer=cpu" in less and text.count("what this rank held") == 1


def test_an_optimizer_step_says_it_too():
    model = shardwise.fully_shard(Model(), strategy="zero2")

    class Hungry(torch.optim.SGD):
        full = False

        def step(self, closure=None):
            return allocate() if self.full else super().step(closure)

    optimizer = Hungry(model.parameters(), lr=0.1)
    model(torch.randn(2, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.full = True
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        optimizer.step()
    assert "under 'zero2'" in text_of(caught.value)


SCRIPT = """
import torch, shardwise
model = shardwise.fully_shard(torch.nn.Linear(8, 8), strategy="ddp")
torch.optim.AdamW(model.parameters())
model(torch.randn(2, 8)).sum().backward()
torch.empty(1 << 50, dtype=torch.uint8)
"""


def test_an_error_that_nobody_catches_says_it_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code, _, err = processes.script(script).finish()
    assert code == 1 and "Linear under 'ddp'" in err and "can't allocate memory" in err


def test_other_errors_are_left_alone():
    model = shardwise.fully_shard(Model(), strategy="ddp")
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, WIDTH + 1))
    assert "shardwise" not in text_of(caught.value)


def test_a_smaller_batch_is_still_found():
    sizes = []

    @find_executable_batch_size(starting_batch_size=8, reduce_batch_size_fn=lambda: sizes[-1] // 2)
    def train(batch):
        sizes.append(batch)
        _, model, _ = trained("ddp")
        model.when = "forward" if batch > 2 else ""
        model(torch.randn(batch, WIDTH))
        return batch

    assert train() == 2 and sizes == [8, 4, 2]


def of_two(strategy):
    return fails(strategy, "forward")


def test_strategies_that_hold_less_are_named_nearest_first():
    _, less = told(run(2, of_two, "zero1")[0], "zero1")
    assert less.index("zero2") < less.index("zero3") and "ddp" not in less
    _, last = told(run(2, of_two, HOSTED)[1], HOSTED)
    assert "zero" not in last and "offload_optimizer" not in last
