"""A rank that fails, dies or goes another way ends every rank in time, with one readable report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

import pytest

import processes
from slowly import slow_unless

SCRIPT = """
import os, signal, sys, time
import torch
import shardwise
from models import Block, adamw, batch, loss_of, make

what, strategy, culprit, timeout = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
shardwise.init("cpu")
if what == "diverge":
    shardwise.comm.faults._STUCK_S = 2.0
first = shardwise.fully_shard(make(), strategy=strategy + ",timeout=100", units=Block)
loss_of(first, batch(0, rank)).backward()  # what is slow once is slow here, where nobody loses patience
model = shardwise.fully_shard(make(), strategy=strategy + f",timeout={timeout}", units=Block)
opt = adamw(model.parameters())

class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise ValueError("boom in backward")

def trip(module, args, out):
    if step == 2 and rank == culprit:
        if what == "forward": raise ValueError("boom in forward")
        if what == "backward": return Boom.apply(out)
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang": time.sleep(14)
model.blocks[1].down.register_forward_hook(trip)
forward = type(model).forward
def divergent(ids):
    if step == 2 and what == "diverge":
        x = model.embed(ids)
        x = model.blocks[1](x) if rank == culprit else model.blocks[2](x)
        return model.head(model.norm(x))
    return forward(model, ids)
model.forward = divergent
for step in range(4):
    loss_of(model, batch(step, rank)).backward()
    opt.step()
    opt.zero_grad()
    print("step", step, flush=True)
"""


LONG = 1000  # seconds: what ends sooner has not ended by its timeout
SHORT = 5
PLACES = ("forward-1", "backward-0", "backward-1")
# Each place under one of both strategies, unless all are asked for.
EXCEPTIONS = [
    slow_unless((strategy == "ddp") == (what == "backward-0"), f"{what} {strategy}")
    for strategy in ("ddp", "zero3")
    for what in PLACES
]
KILLS = ["kill-2 zero1", "kill-2 zero3"]
Outcome = tuple[list[int], list[str]]  # exit codes and error outputs, by rank


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list]]:
    """The ranks of every scenario that a test here asks for, all started at once: most of the time they wait."""
    path = tmp_path_factory.mktemp("faults") / "script.py"
    path.write_text(SCRIPT)
    tests = [
        item
        for item in request.session.items
        if getattr(item, "module", None) is request.module and "scenario" in item.fixturenames  # type: ignore[attr-defined]
    ]
    running: dict[str, list[processes.Process]] = {}
    for scenario in (test.callspec.params["scenario"] for test in tests):  # type: ignore[attr-defined]
        what, culprit, strategy = re.split("[- ]", scenario)
        timeout = SHORT if what in ("hang", "diverge") else LONG
        size = 3 if what == "kill" else 2
        words = (what, strategy, culprit, timeout)
        running[scenario] = processes.ranks_of_a_script(path, size, *words, whole_end=True)
        for process in running[scenario]:
            processes.keep(process)
    yield running
    for process in chain.from_iterable(running.values()):
        process.kill()


@pytest.fixture
def outcome(scenario: str, ranks: dict[str, list[processes.Process]]) -> Outcome:
    ended = [process.finish(150) for process in ranks[scenario]]
    return [code for code, _, _ in ended], [err for _, _, err in ended]


@pytest.mark.parametrize("scenario", EXCEPTIONS)
def test_exception_on_one_rank(scenario: str, outcome: Outcome) -> None:
    codes, errors = outcome
    what, culprit = re.match(r"(\w+)-(\d)", scenario).groups()
    culprit = int(culprit)
    assert all(c not in (0, None) for c in codes)
    assert f"boom in {what}" in errors[culprit], "the rank's own traceback"
    report = errors[1 - culprit]
    if culprit == 1:  # rank 0 hosts the store; when it goes, its words may go with it
        assert f"rank 1 failed in {what} of unit 'blocks." in report and f"boom in {what}" in report
        assert re.search(r"rank 0 was waiting for (gather|reduce|control) of", report)
    else:
        assert "shardwise report" in report and "was waiting for" in report
    assert "Traceback" not in report, "only the culprit shows a traceback"


@pytest.mark.parametrize("scenario", [pytest.param(KILLS[0], marks=pytest.mark.slow), KILLS[1]])
def test_killed_rank(scenario: str, outcome: Outcome) -> None:
    codes, errors = outcome
    assert codes[2] == -9 and codes[0] == codes[1] == 1
    reports = [e for e in errors[:2] if "shardwise report" in e]
    assert len(reports) == 1, "one rank speaks for all"
    assert "ended or lost its connection" in reports[0] and "was waiting for" in reports[0]


@pytest.mark.parametrize("scenario", ["diverge-1 zero3"])
def test_ranks_in_different_branches_under_zero3(scenario: str, outcome: Outcome) -> None:
    codes, errors = outcome
    assert codes == [1, 1]
    report = next(e for e in errors if "shardwise report" in e)
    assert "did not complete within its timeout" in report or "lost its connection" in report
    assert "unit 'blocks.1'" in report and "unit 'blocks.2'" in report, "names both sides"
    early = errors[0].split("all ranks have waited for 2 s, for different things:")
    assert len(early) == 2 and "shardwise report" not in early[0], "rank 0 says it once, before anything has ended"
    assert re.match(r"\n  rank 0: gather of unit .*\n  rank 1: gather of unit .*\n  fix: ", early[1])


@pytest.mark.parametrize("scenario", ["hang-1 zero3"])
def test_a_hanging_rank_is_reported_within_the_timeout(scenario: str, outcome: Outcome) -> None:
    codes, errors = outcome
    assert codes[0] == 1
    report = errors[0]
    assert "did not complete within its timeout" in report and "rank 1: not waiting in a collective" in report


MIDWAY = """
import os, signal, sys, threading, time
import torch
import shardwise
from shardwise.checkpoint.coordination import BackgroundGather
from shardwise.comm.stats import Op

rank, culprit, source, beside = int(os.environ["RANK"]), int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "beside"
begun = __file__ + "-".join(sys.argv[1:])
shardwise.comm.faults._EXIT_S = 2.0
world = shardwise.init("cpu")
values = torch.empty(60_000_000 << beside)
if not beside:
    wait = world.control_group(1000.0).broadcast(values, Op("broadcast", "many", 1), source=source).wait
else:  # as the thread of an asynchronous save does, while nobody waits for anything else
    gather, values = BackgroundGather(), values.view(torch.uint8)
    wait = threading.Thread(target=gather._all_gather, args=[values]).run
if rank == culprit:
    if beside:
        work = gather._group.pg.send([values[values.numel() // 2:]], 1 - rank, 0)
    while not os.path.exists(begun):
        time.sleep(0.001)
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Timer(0.005 * beside, lambda: open(begun, "w").close()).start()
wait()
"""


def test_killed_in_the_middle_of_a_message(tmp_path) -> None:
    """Where gloo's own wait goes on until the timeout, of what was being received and of what was being sent."""
    path = tmp_path / "script.py"
    path.write_text(MIDWAY)
    cases = ((0, 0, ""), (1, 1, ""), (1, 0, ""), (1, 1, "beside"))
    started = [processes.ranks_of_a_script(path, 2, *case, whole_end=True) for case in cases]
    for (culprit, _, beside), ranks in zip(cases, started, strict=True):
        code, _, err = ranks[1 - culprit].finish(60)
        assert code == 1, err
        assert f"rank {culprit} ended or lost its connection without a word (killed?)" in err
        what = "exchange of the checkpoint" if beside else "broadcast of many"
        assert f"rank {1 - culprit} was waiting for {what} over ranks [0, 1]" in err
