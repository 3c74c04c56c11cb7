"""A killed rank, a restart with as many ranks or with fewer: losses and the order of the data go on exactly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import processes
from ranks import run
from shardwise import checkpoint, notebook_launcher
from test_checkpoint_kills import Saver, straight
from test_saving import everywhere


def job(folder: Path, strategy: str, kills: int = 1) -> None:
    """What every rank does: goes on from the latest checkpoint, and saves every second step. Rank 1 is killed."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    one = Saver(folder, strategy, seed=attempt)
    if one.accelerator.has_checkpoint():
        one.accelerator.load_state("latest")
    with open(folder / f"seen-{attempt}-{rank}", "w") as out:
        for loss, samples in one.steps():
            step = one.counter.value
            print(json.dumps([step, loss, samples]), file=out, flush=True)
            if step % 2 == 0:
                one.accelerator.async_save_state()
            if rank == 1 and attempt < kills and step == (3, 4)[attempt]:
                checkpoint.wait_for_saves()
                os.kill(os.getpid(), signal.SIGKILL)
            if one.accelerator.gradient_state.end_of_dataloader:
                break
    one.accelerator.end_training()


def from_a_script(folder: Path, ranks: int, kills: int, *options: object) -> processes.Process:
    script = folder / "job.py"
    script.write_text(
        f"import sys, pathlib, test_elastic\ntest_elastic.job(pathlib.Path(sys.argv[1]), 'zero3', {kills})\n"
    )
    paths = os.pathsep.join(str(Path(__file__).parent.parent / name) for name in ("src", "tests"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHARDWISE_")}
    environment |= {"PYTHONPATH": paths, "XDG_CONFIG_HOME": str(folder)}
    options = ("--cpu", "-n", ranks, "--max-restarts", kills, *options)
    return processes.module("shardwise", "launch", *options, script, folder, environment=environment)


def forks(folder: Path) -> None:
    notebook_launcher(job, (folder, "zero3"), num_processes=2, max_restarts=1, cpu=True)


def in_forks(folder: Path) -> processes.Process:
    return processes.fork(forks, folder)[0]


def launched(folder: Path) -> processes.Process:
    return from_a_script(folder, 2, 1)


def seen(folder: Path, attempt: int, rank: int) -> dict[int, tuple[float, list[int]]]:
    lines = (folder / f"seen-{attempt}-{rank}").read_text().splitlines()
    return {step: (loss, samples) for step, loss, samples in map(json.loads, lines)}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("start", [in_forks, pytest.param(launched, marks=pytest.mark.slow)])
def test_a_killed_rank_and_a_restart(start, tmp_path: Path) -> None:
    code, _, err = start(tmp_path).finish(170)
    assert code == 0 and "starting all ranks anew (1 restart left)" in err, err
    expected = run(2, straight, tmp_path / "straight", 6)
    for rank in range(2):
        before, after = seen(tmp_path, 0, rank), seen(tmp_path, 1, rank)
        assert (min(before), min(after), max(after)) == (1, 3, 6), "the restart goes on after the checkpoint of step 2"
        for step, what in [*before.items(), *after.items()]:
            assert what == tuple(expected[rank][step - 1]), f"step {step} of rank {rank}"


def goes_on(folder: Path, number: int, steps: int) -> list[tuple[float, list[int]]]:
    """What a start by hand from a checkpoint sees and computes."""
    one = Saver(folder, "zero3", seed=7)
    one.accelerator.load_state(str(folder / "checkpoints" / f"checkpoint_{number}"))
    return [what for what, _ in zip(one.steps(), range(steps), strict=False)]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_rank_and_fewer_ranks(ranks: int, tmp_path: Path) -> None:
    """Of two ranks one is left after a kill, of three after two."""
    kills = ranks - 1
    code, _, err = from_a_script(tmp_path, ranks, kills, "--min-nproc", 1).finish(170)
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith("shardwise: starting")]
    assert lines == [
        f"shardwise: starting anew with {left} rank{'s' * (left > 1)} instead of {left + 1} "
        f"({left} restart{'s' * (left > 1)} left)"
        for left in range(kills, 0, -1)
    ]
    order: list[int] = []
    for attempt in range(kills + 1):
        size = ranks - attempt
        by_rank = [seen(tmp_path, attempt, rank) for rank in range(size)]
        assert not (tmp_path / f"seen-{attempt}-{size}").exists()
        first = min(by_rank[0])
        if attempt > 0:
            by_hand = everywhere(size, goes_on, tmp_path, first // 2 - 1, len(by_rank[0]))
            for rank, what in enumerate(by_rank):
                assert list(what.values()) == [tuple(step) for step in by_hand[rank]], f"attempt {attempt}, rank {rank}"
        kept = min(seen(tmp_path, attempt + 1, 0)) if attempt < kills else max(by_rank[0]) + 1
        order += [i for step in range(first, kept) for what in by_rank for i in what[step][1]]
    [alone] = everywhere(1, straight, tmp_path / "alone", 11)
    assert order == [i for _, samples in alone for i in samples], "every sample once, in the order of the epoch"
