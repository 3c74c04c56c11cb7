"""Under ``launch --max-restarts``: a killed rank, a restart, then fewer ranks; the data order goes on exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import processes
from ranks import run
from test_checkpoint_kills import straight

JOB = """
import json, os, signal, sys
from pathlib import Path
from shardwise import checkpoint
from test_checkpoint_kills import Saver

folder, strategy = Path(sys.argv[1]), sys.argv[2]
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
"""


RANK_0_OF_1 = processes.rank_environment(0, 1, 1)


def seen(folder: Path, attempt: int, rank: int) -> dict[int, tuple[float, list[int]]]:
    lines = (folder / f"seen-{attempt}-{rank}").read_text().splitlines()
    return {step: (loss, samples) for step, loss, samples in map(json.loads, lines)}


@pytest.mark.timeout(400)
def test_a_killed_rank_a_restart_and_fewer_ranks(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    paths = os.pathsep.join(str(Path(__file__).parent.parent / name) for name in ("src", "tests"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SHARDWISE_")}
    environment |= {"PYTHONPATH": paths, "XDG_CONFIG_HOME": str(tmp_path)}
    options = ("--cpu", "-n", 2, "--max-restarts", 1)
    launched = processes.module("shardwise", "launch", *options, job, tmp_path, "zero3", environment=environment)
    code, _, err = launched.finish(170)
    assert code == 1 and "starting all ranks anew (1 restart left)" in err, err
    code, _, err = processes.script(job, tmp_path, "zero2", environment=environment | RANK_0_OF_1).finish()
    assert code == 0, err
    expected = run(2, straight, tmp_path / "straight", 6)
    for rank in range(2):
        before, after = seen(tmp_path, 0, rank), seen(tmp_path, 1, rank)
        assert (min(before), min(after)) == (1, 3), "the restart goes on after the checkpoint of step 2"
        for step, what in [*before.items(), *after.items()]:
            assert what == tuple(expected[rank][step - 1]), f"step {step} of rank {rank}"
    order = [i for step in zip(*expected, strict=True) for _, samples in step for i in samples]
    alone = seen(tmp_path, 2, 0)
    assert min(alone) == 5
    assert [i for _, samples in alone.values() for i in samples] == order[16:22], "what two ranks had left"
    assert sorted(order[:22]) == list(range(22))
