"""kill -9 at any moment of a save: the latest complete checkpoint loads, and the run goes on exactly from there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import processes
from ranks import run
from test_saving import Run

ONWARDS = 3


class Saver(Run):
    def steps(self):
        """Endless steps; yields after each."""
        while True:
            for ids, index in self.loader:
                logits = torch.nn.functional.dropout(self.model(ids[:, :-1]), 0.2)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                self.counter.value += 1
                yield loss.item(), index.tolist()


def straight(folder, steps):
    """What a run that nobody kills sees and computes."""
    return [what for what, _ in zip(Saver(folder, "zero3").steps(), range(steps), strict=False)]


def victim(folder, how):
    """Saves after every step, until it is killed."""
    torch.set_num_threads(1)
    one = Saver(folder, "zero3", total_limit=2)
    for _ in one.steps():
        if how == "async":
            one.accelerator.async_save_state()
        else:
            one.accelerator.save_state()


def goes_on(folders):
    """From which step each killed run goes on, and what it then sees and computes."""
    out = []
    for folder in folders:
        one = Saver(folder, "zero3", seed=7)
        one.accelerator.load_state("latest")
        at = one.counter.value
        out.append((at, [what for what, _ in zip(one.steps(), range(ONWARDS), strict=False)]))
    return out


def start(folder: Path, how: str) -> list[processes.Process]:
    port = processes.free_port()
    return [
        processes.fork(victim, folder, how, number=r, environment=os.environ | processes.rank_environment(r, 2, port))[
            0
        ]
        for r in range(2)
    ]


def killed(folder: Path, how: str, whom: list[int], after: float) -> list[processes.Process]:
    """Kill some ranks a while after the first checkpoint is complete."""
    ranks = start(folder, how)
    ranks[0].until(lambda: (folder / "checkpoints" / "checkpoint_0" / "shardwise.json").exists())
    time.sleep(after)
    for r in whom:
        ranks[r].send_signal(signal.SIGKILL)
    return ranks


def kill_and_go_on(folder: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    plans = [(("sync", "async")[i % 2], ([0, 1], [0], [1])[i // 2 % 3], chance.uniform(0, 0.25)) for i in range(kills)]
    folders = [folder / str(i) for i in range(kills)]
    ended = [killed(at, *plan) for at, plan in zip(folders, plans, strict=True)]
    for ranks in ended:
        for process in ranks:
            assert process.finish(60)[0] != 0  # a rank whose peer is gone does not stay
    parts = [path for at in folders for path in (at / "checkpoints").iterdir() if ".tmp-" in path.name]
    assert parts, "no kill came in the middle of a save"
    went = run(2, goes_on, folders)
    expected = run(2, straight, folder / "straight", max(at for at, _ in went[0]) + ONWARDS)
    assert [at for at, _ in went[0]] == [at for at, _ in went[1]]
    for r in range(2):
        for path, (at, what) in zip(folders, went[r], strict=True):
            assert what == expected[r][at : at + ONWARDS], f"rank {r} of {path} went on from step {at} in another way"
    shutil.rmtree(folder)


def test_ten_kills(tmp_path):
    kill_and_go_on(tmp_path / "runs", 10, seed=int(time.time()))


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(6))
def test_sixty_kills(tmp_path, turn):
    kill_and_go_on(tmp_path / "runs", 10, seed=turn)
