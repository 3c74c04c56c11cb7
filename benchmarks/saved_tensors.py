"""What the saved-tensor hooks cost that bring values back which were released: microseconds per saved tensor.

    python benchmarks/saved_tensors.py

One process, one small GPT whose values stay, so that nothing is gathered and only the hooks differ. Steps with the
hooks on and off take turns; the figure is the median of the paired differences of CPU time per saved tensor.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

import shardwise
from gpt import SETTINGS, batch, loss_of, make_model
from report import RESULTS, head, save
from shardwise.engine.build import require_engine


def measured(rounds: int) -> dict[str, Any]:
    """Paired times of forward and backward, with and without the hooks."""
    torch.set_num_threads(1)
    setting = SETTINGS["comm"]
    model = shardwise.fully_shard(make_model(setting.shape), strategy="ddp")
    saved = require_engine(model).saved
    ids = batch(setting, 0, 0)
    count = [0]

    def note(tensor: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return tensor.detach()

    def step() -> float:
        start = thread_time()
        loss = loss_of(model, ids)
        loss.backward()
        took = thread_time() - start
        model.zero_grad()
        return took

    with saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    pairs = []
    for k in range(rounds + 3):
        took = {}
        for on in (k % 2 == 0, k % 2 == 1):
            saved._needed = on  # as if values came and went
            took[on] = step()
        pairs.append((took[True], took[False]))
    pairs = pairs[3:]
    more = [on - off for on, off in pairs]
    return {
        "saved tensors per step": count[0],
        "microseconds per saved tensor": statistics.median(more) / count[0] * 1e6,
        "step with hooks over step without": statistics.median(on / off for on, off in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = measured(args.rounds)
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    save({**head(), **found}, args.out / "saved-tensors.json")


if __name__ == "__main__":
    main()
