"""A killed rank, a restart of all ranks, then fewer ranks: losses and the order of the data go on exactly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

import processes
from ranks import run
from shardwise import checkpoint, notebook_launcher
from shardwise.errors import RankFailed
from test_checkpoint_kills import Saver, straight


def job(folder: Path, strategy: str) -> None:
    """What every rank does: goes on from the latest checkpoint, and saves every second step. Rank 1 dies twice."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 2))
    one = Saver(folder, strategy, seed=attempt)
    if one.accelerator.has_checkpoint():
        one.accelerator.load_state("latest")
    with open(folder / f"seen-{attempt}-{rank}", "w") as out:
        for loss, samples in one.steps():
            step = one.counter.value
            print(json.dumps([step, loss, samples]), file=out, flush=True)
            if step % 2 == 0:
                one.accelerator.async_save_state()
            if step == (3, 5, 0)[attempt] and rank == 1:
                checkpoint.wait_for_saves()
                os.kill(os.getpid(), signal.SIGKILL)
            if one.accelerator.gradient_state.end_of_dataloader:
                break
    one.accelerator.end_training()


def forks(folder: Path) -> None:
    try:
        notebook_launcher(job, (folder, "zero3"), num_processes=2, max_restarts=1, cpu=True)
    except RankFailed as error:
        raise SystemExit(f"{error}") from None


def in_forks(folder: Path) -> processes.Process:
    return processes.fork(forks, folder)[0]


def from_a_script(folder: Path) -> processes.Process:
    script = folder / "job.py"
    script.write_text("import sys, pathlib, test_elastic\ntest_elastic.job(pathlib.Path(sys.argv[1]), 'zero3')\n")
    paths = os.pathsep.join(str(Path(__file__).parent.parent / name) for name in ("src", "tests"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHARDWISE_")}
    environment |= {"PYTHONPATH": paths, "XDG_CONFIG_HOME": str(folder)}
    options = ("--cpu", "-n", 2, "--max-restarts", 1)
    return processes.module("shardwise", "launch", *options, script, folder, environment=environment)


def seen(folder: Path, attempt: int, rank: int) -> dict[int, tuple[float, list[int]]]:
    lines = (folder / f"seen-{attempt}-{rank}").read_text().splitlines()
    return {step: (loss, samples) for step, loss, samples in map(json.loads, lines)}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("start", [in_forks, pytest.param(from_a_script, marks=pytest.mark.slow)])
def test_a_killed_rank_a_restart_and_fewer_ranks(start, tmp_path: Path) -> None:
    code, _, err = start(tmp_path).finish(170)
    assert code == 1 and "starting all ranks anew (1 restart left)" in err, err
    alone = os.environ | processes.rank_environment(0, 1, 1)
    code, _, err = processes.fork(job, tmp_path, "zero2", environment=alone)[0].finish()
    assert code == 0, err
    expected = run(2, straight, tmp_path / "straight", 6)
    for rank in range(2):
        before, after = seen(tmp_path, 0, rank), seen(tmp_path, 1, rank)
        assert (min(before), min(after)) == (1, 3), "the restart goes on after the checkpoint of step 2"
        for step, what in [*before.items(), *after.items()]:
            assert what == tuple(expected[rank][step - 1]), f"step {step} of rank {rank}"
    order = [i for step in zip(*expected, strict=True) for _, samples in step for i in samples]
    last = seen(tmp_path, 2, 0)
    assert min(last) == 5
    assert [i for _, samples in last.values() for i in samples] == order[16:22], "what two ranks had left"
    assert sorted(order[:22]) == list(range(22))
