"""One script for DeepSpeed, run by DeepSpeed and by ``shardwise.deepspeed``: time of a step, and memory.

    python benchmarks/deepspeed_door.py --disk FOLDER

The script is :func:`train`: only the module that it gets differs. Both train the same model on the same batches with
the same configuration, in turns in one process group (see ``peers.py``); losses must agree. Memory is each one's alone,
in fresh processes, beyond what the imports took. ``fully_shard`` takes part, for what the door itself costs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist

import ranks
from contenders import LEARNING_RATE, Contender, DeepSpeedTrainer, Trainer, adamw
from gpt import Setting, batch, make_model
from memory import ResidentMeter
from offload_peers import first_line
from peers import WARM_UP, race
from report import RESULTS, head, paired, quartiles, save, told

NOTHING = "none"
CASES = {
    "stage 1": (1, NOTHING, NOTHING),
    "stage 2": (2, NOTHING, NOTHING),
    "stage 3": (3, NOTHING, NOTHING),
    "stage 2, optimizer on cpu": (2, "cpu", NOTHING),
    "stage 3, all on cpu": (3, "cpu", "cpu"),
    "stage 3, optimizer on nvme": (3, "nvme", NOTHING),
}
LIBRARIES = {"ds": "deepspeed", "sw": "shardwise.deepspeed"}
ALONE_S = 420.0


def configuration(setting: Setting, case: str, folder: str) -> dict[str, Any]:
    """What both are given. Buckets as large as a block, where DeepSpeed would take more than the model."""
    stage, optimizer, params = CASES[case]
    block = 12 * setting.shape.width**2 + 13 * setting.shape.width
    zero: dict[str, Any] = {
        "stage": stage, "reduce_bucket_size": block, "allgather_bucket_size": block,
        "stage3_prefetch_bucket_size": block, "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": block,
    }  # fmt: skip
    more: dict[str, Any] = {}
    if optimizer != NOTHING:
        zero["offload_optimizer"] = {"device": optimizer, "pin_memory": False}
    if params != NOTHING:
        zero["offload_param"] = {"device": params, "pin_memory": False}
    if optimizer == "nvme":
        zero["offload_optimizer"] |= {
            "nvme_path": folder, "pipeline_read": True, "pipeline_write": True, "buffer_count": 12
        }  # fmt: skip
        zero["sub_group_size"] = max(1, block // dist.get_world_size())
        more["aio"] = {"block_size": 4 << 20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
    return {
        "train_micro_batch_size_per_gpu": setting.rows, "steps_per_print": 1 << 30, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": 1e-2}},
        "zero_optimization": zero, **more,
    }  # fmt: skip


def train(deepspeed: ModuleType, setting: Setting, case: str) -> Trainer:
    """What a user's script does, with the module that it imported."""
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    folder = [tempfile.mkdtemp(prefix="door-", dir=setting.name) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)  # engines of one process must not share it
    model = make_model(setting.shape)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=configuration(setting, case, str(folder[0]))
    )
    return DeepSpeedTrainer(engine, optimizer)


class _Clipped(Trainer):
    def update(self) -> None:
        import shardwise

        shardwise.clip_grad_norm_(self.model, 1.0)
        super().update()


def plain(setting: Setting, case: str) -> Trainer:
    """The same without the door."""
    import shardwise

    model = shardwise.fully_shard(make_model(setting.shape), strategy=f"zero{CASES[case][0]}")
    optimizer = adamw(model.parameters())
    shardwise.attach(optimizer)
    return _Clipped(model, optimizer)


def _through(key: str, case: str) -> Callable[[Setting], Trainer]:
    return lambda setting: train(importlib.import_module(LIBRARIES[key]), setting, case)


CONTENDERS = [
    *(Contender(f"{key}:{case}", case, case, _through(key, case)) for case in CASES for key in LIBRARIES),
    *(Contender(f"plain:{case}", case, case, partial(plain, case=case)) for case in ("stage 1", "stage 2", "stage 3")),
]


def alone(rank: int, key: str, setting: Setting, turns: int) -> int:
    """Peak of what this rank occupies beyond its imports, in bytes."""
    for name in ("torch._dynamo", "deepspeed", "shardwise.fsdp"):
        importlib.import_module(name)
    contender = next(c for c in CONTENDERS if c.key == key)
    data = [batch(setting, step % 2, rank) for step in range(WARM_UP + turns)]
    dist.barrier()
    meter = ResidentMeter()
    meter.reset()
    trainer = contender.build(setting)
    for ids in data[:WARM_UP]:
        trainer.turn(ids)
    meter.reset()
    for ids in data[WARM_UP:]:
        trainer.turn(ids)
    dist.barrier()
    return int(meter.peak)


def measure(case: str, setting: Setting, nproc: int, rounds: int) -> dict[str, Any]:
    """One case: both libraries, and without the door where nothing is away."""
    keys = [c.key for c in CONTENDERS if c.stage == case]
    memory = {key: max(ranks.run(nproc, alone, key, setting, 4, timeout=ALONE_S)) for key in keys}
    by_rank = ranks.run(nproc, race, keys, setting, rounds, "deepspeed_door", (1e-4, 5e-3))
    times = {k: [max(turn) for turn in zip(*(r["times"][k] for r in by_rank), strict=True)] for k in keys}
    cpu = {k: [sum(turn) for turn in zip(*(r["cpu"][k] for r in by_rank), strict=True)] for k in keys}
    ds, sw, without = (f"{kind}:{case}" for kind in ("ds", "sw", "plain"))
    out: dict[str, Any] = {
        "step_s": {k: quartiles(times[k]) for k in keys}, "peak": memory,
        "to_deepspeed": paired(times[sw], times[ds]), "memory_to_deepspeed": memory[sw] / memory[ds],
        "loss_spread": max(r["spread"] for r in by_rank),
    }  # fmt: skip
    if without in keys:
        out |= {"door": paired(times[sw], times[without]), "door_cpu": paired(cpu[sw], cpu[without])}
    return out


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and memory of ours as shares of DeepSpeed's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from plot import INK, OURS, finish

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "shardwise", "text.color": INK})
    cases = list(result["cases"])
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 0.5 + 0.42 * len(cases)), sharey=True)
    shares = {
        "time of a step": [result["cases"][c]["to_deepspeed"]["median"] for c in cases],
        "peak memory": [result["cases"][c]["memory_to_deepspeed"] for c in cases],
    }
    for axis, (name, values) in zip(axes, shares.items(), strict=True):
        axis.barh(cases, values, color=OURS, height=0.6)
        axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        for row, value in enumerate(values):
            axis.text(value + 0.01, row, f"{value:.2f}", va="center", color=INK)
        axis.set_xlim(0, max(1.15, 1.15 * max(values)))
        axis.set_title(f"{name}, of DeepSpeed's", loc="left", fontsize=9, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    finish(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disk", type=Path, required=True, help="a folder on the disk for states")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds, after the warm-up")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = head(["deepspeed"]) | {"ranks": args.nproc, "rounds": args.rounds, "cases": {}}
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        setting = Setting(folder, 1, 64, "micro-batch 1 x 64 tokens")
        result |= {"about": setting.about, "parameters": setting.shape.parameters}
        for case in [case for case in CASES if args.only in case]:
            try:
                found = measure(case, setting, args.nproc, args.rounds)
            except RuntimeError as error:
                result["notes"].append(f"{case} does not run here: {first_line(error)}")
                print(result["notes"][-1], flush=True)
                continue
            result["cases"][case] = found
            door = f", door {told(found['door'])} (CPU {told(found['door_cpu'])})" if "door" in found else ""
            time, memory = told(found["to_deepspeed"]), found["memory_to_deepspeed"]
            print(f"{case}: {time} of DeepSpeed's time, {memory:.2f} of its memory{door}", flush=True)
    save(result, args.out / "deepspeed-door.json")
    draw(result, args.out / "deepspeed-door.svg")


if __name__ == "__main__":
    main()
