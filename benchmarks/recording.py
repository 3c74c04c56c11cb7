"""What a record costs: a step that is recorded beside one that is not.

    python benchmarks/recording.py --nproc 2

All ranks of one process group train one model; steps with the recorder listening and without take turns, in an order
that rotates. Ratios are taken pair by pair: of the time of a step, and of the CPU time of the thread that computes,
which other processes on the machine change less, by its lower quartiles. Two records: as usual, and with a timeline of
every step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch

import ranks
import shardwise
from gpt import SETTINGS, batch, loss_of, make_model
from report import RESULTS, head, paired, save
from shardwise import events

_WARM = 6  # recorded steps before those that count: the first are in full, and one counts operations


def _measure(rank: int, name: str, strategy: str, rounds: int, every: int, folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    setting = SETTINGS[name]
    model = shardwise.fully_shard(make_model(setting.shape), strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    took: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with shardwise.record(model, folder, every=every) as recording:
        (listener,) = events.listeners
        for index in range(_WARM + rounds):
            for on in (index % 2 == 0, index % 2 == 1):
                events.listeners[:] = [listener] if on else []
                wall, cpu = perf_counter(), thread_time()
                loss = loss_of(model, batch(setting, index, rank))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if on:
                    recording.tell(loss=loss)
                took[on].append((perf_counter() - wall, thread_time() - cpu))
        events.listeners[:] = [listener]
    on, off = took[True][_WARM:], took[False][_WARM:]
    return {
        "step": paired([a for a, _ in on], [a for a, _ in off]),
        "cpu": paired([b for _, b in on], [b for _, b in off]),
        "cpu_low": _low([b for _, b in on]) / _low([b for _, b in off]),
        "more_cpu_ms": 1e3 * (_low([b for _, b in on]) - _low([b for _, b in off])),
        "step_ms": 1e3 * statistics.median(a for a, _ in off),
    }


def _low(times: list[float]) -> float:
    """The lower quartile: what others on a busy machine add to some steps is above it."""
    return statistics.quantiles(times, n=4, method="inclusive")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--setting", choices=SETTINGS, default="comm")
    parser.add_argument("--strategy", default="zero3")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = {**head(), "setting": args.setting, "strategy": args.strategy, "ranks": args.nproc}
    for name, every in (("as usual", 10**6), ("every step in full", 1)):
        with tempfile.TemporaryDirectory() as folder:
            found = ranks.run(args.nproc, _measure, args.setting, args.strategy, args.rounds, every, folder)
        worst = max(found, key=lambda one: one["cpu_low"])
        result[name] = worst
        print(
            f"{name}: a step takes {worst['step']['median']:.3f} of its time, and {worst['cpu_low']:.4f} of its "
            f"CPU time, {worst['more_cpu_ms']:.2f} ms more; a step is {worst['step_ms']:.0f} ms"
        )
    save(result, args.out / "recording.json")


if __name__ == "__main__":
    main()
