"""What a process waits for before its first step: torch, and little else.

Every rank imports, on every start and every restart. What is for those who compile, save or use the command line is
imported when they do. The modules are counted in fresh processes, as no other shows what an import brings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import processes
import shardwise
from ranks import run

_HEAVY = (
    "torch._dynamo", "torch._inductor", "torch._functorch._aot_autograd", "torch.fx.experimental.symbolic_shapes",
    "torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.nn",
    "torch.distributed._functional_collectives", "torch.utils.tensorboard", "torch.profiler._memory_profiler",
    "sympy", "yaml", "rich", "typer", "click", "safetensors", "transformers", "peft", "accelerate", "tensorboard",
    "torchdata", "pandas", "matplotlib", "wandb", "mlflow", "tqdm", "pydantic",
    "shardwise.cli", "shardwise.checkpoint.formats", "shardwise.checkpoint.saving", "shardwise.checkpoint.loading",
)  # fmt: skip
_SHARE = 0.75  # of the CPU time that torch takes; 0.15 is usual, 0.35 where Python may not write .pyc files

_SCRIPT = """
import json, os, sys, time
heavy, path, presets = json.loads(sys.argv[1])
start = time.process_time()
import torch
torch_s = time.process_time() - start
before, loaded, seconds = [], {}, {}

def note(what):
    found = [name for name in heavy if name in sys.modules and name not in before]
    loaded[what] = found
    before.extend(found)  # each where it came first

def data():
    rows = torch.utils.data.TensorDataset(torch.ones(8, 4))
    return torch.utils.data.DataLoader(rows, batch_size=2)

def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))

note("torch")
start = time.process_time()
import shardwise
shardwise.Accelerator
seconds["Accelerator"] = time.process_time() - start
note("Accelerator")
from shardwise.fsdp import fully_shard
for name in shardwise.__all__:
    if name != "checkpoint":
        getattr(shardwise, name)
seconds["all names"] = time.process_time() - start
note("all names")

accelerator = shardwise.Accelerator(cpu=True, strategy=presets[0])
note("Accelerator()")
for preset in presets:
    sharded = shardwise.fully_shard(model(), strategy=preset)
    sharded(torch.ones(2, 4)).sum().backward()
    shardwise.clip_grad_norm_(sharded, 1.0)
    note(f"forward and backward under {preset}")
drop_in = model()
for layer in drop_in:
    fully_shard(layer)
fully_shard(drop_in)(torch.ones(2, 4)).sum().backward()
note("the drop-in for fully_shard")

net = model()
optimizer = torch.optim.AdamW(net.parameters())
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
note("torch's optimizer")  # which may import what it likes
net, optimizer, schedule, batches = accelerator.prepare(net, optimizer, schedule, data())
note("prepare")
for (x,) in batches:
    with accelerator.accumulate(net):
        loss = net(x).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    accelerator.gather_for_metrics(loss.detach())
    break
note("the first step")
with open(path, "w") as file:
    json.dump([loaded, seconds, torch_s], file)
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, tuple[dict[str, list[str]], dict[str, float], float]]:
    """One process under both presets, and two ranks under each: started together, for the time is torch's."""
    folder = tmp_path_factory.mktemp("starts")
    started = {}
    for world, presets in ((1, ["ddp", "zero3"]), (2, ["zero3", "ddp"])):
        port = processes.free_port()
        for rank in range(world):
            path = folder / f"{rank}of{world}.json"
            environment = os.environ | processes.rank_environment(rank, world, port)
            arguments = json.dumps([_HEAVY, str(path), presets])
            started[path] = processes.program("-c", _SCRIPT, arguments, environment=environment)
    for process in started.values():
        code, out, err = process.finish()
        assert code == 0, f"{out}\n{err}"
    return {path.stem: json.loads(path.read_text()) for path in started}


@pytest.mark.parametrize("which", ["0of1", "0of2", "1of2"])
def test_nothing_heavy_is_imported_before_it_is_used(starts, which):
    loaded, _, _ = starts[which]
    theirs = ("torch", "torch's optimizer")
    assert {what: found for what, found in loaded.items() if what not in theirs and found} == {}
    assert "the first step" in loaded


def test_what_is_imported_costs_little_beside_torch(starts):
    _, seconds, torch_s = min(starts.values(), key=lambda start: start[1]["all names"] / start[2])
    assert seconds["Accelerator"] < _SHARE * torch_s
    assert seconds["all names"] < _SHARE * torch_s


def test_the_names_are_there():
    """What is looked for in fresh processes is not misspelt: it is a module here, or another's package."""
    roots = {"shardwise": Path(__file__).parent.parent / "src", "torch": Path(torch.__file__).parent.parent}
    for name in _HEAVY:
        first, *rest = name.split(".")
        if rest:
            path = roots[first].joinpath(*name.split("."))
            assert path.with_suffix(".py").is_file() or path.is_dir(), name


class Two(nn.Module):
    """A module of a script's own: what torch's own modules run when nothing around them is compiled, is not either."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def graphs_of(strategy: str) -> list[list[str]]:
    """What ``torch.compile`` puts into graphs: the names of what is called, graph by graph."""
    graphs = []

    def record(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    torch._dynamo.reset()  # of what earlier tests compiled in this process
    model = shardwise.fully_shard(Two(), strategy=strategy, units=nn.Linear)
    torch.compile(model, backend=record)(torch.ones(2, 4)).sum().backward()
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_the_compiler_stays_out_of_the_engine_that_does_not_import_it(strategy):
    """Not one operation of the engine's own is in a graph: its hooks run as they are written."""
    for graphs in run(2, graphs_of, strategy):
        assert {name for graph in graphs for name in graph} == {"<built-in function linear>"}
        assert sum(map(len, graphs)) == 2
