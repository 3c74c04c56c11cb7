"""One script with transformers' Trainer, by Accelerate and its backends, and by Shardwise: time of a step.

    python benchmarks/front_ends.py --rounds 12

``front_ends_script.py`` is the script. Each contender is a program of its own, with ranks of its own; all are started
and take turns, one step each, in an order that rotates: a step's time is that of its slowest rank, from one step's
beginning to the next one's, and ratios are taken round by round. ``by hand`` is the same training in a loop, for what
the front end itself costs.

*Losses*: ranks x micro-batches of uneven numbers of labels, by Trainer through Shardwise, beside one process of plain
transformers on the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpt import Shape
from report import RESULTS, head, paired, quartiles, save, told

WARM_UP = 3
SCRIPT = Path(__file__).with_name("front_ends_script.py")
START_S = 180.0
LENGTH = 64  # tokens of a micro-batch
BLOCK = 12 * Shape().width ** 2 + 13 * Shape().width


def _deepspeed(stage: int) -> dict[str, Any]:
    """Buckets as large as a block, where DeepSpeed would take more than the model."""
    zero = {
        "stage": stage, "reduce_bucket_size": BLOCK, "allgather_bucket_size": BLOCK,
        "stage3_prefetch_bucket_size": BLOCK, "stage3_max_live_parameters": 2 * BLOCK,
        "stage3_max_reuse_distance": BLOCK,
    }  # fmt: skip
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_optimization": zero, "zero_allow_untested_optimizer": True,
        }
    }  # fmt: skip


def _fsdp(reshard: bool) -> dict[str, Any]:
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "reshard_after_forward": reshard}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config, "use_cpu": True}


@dataclass
class Contender:
    """A program.

    Attributes:
        key: short name; ``stage``: the preset of ours that splits the same states; ``label``: in tables.
        options: of ``TrainingArguments``.
        strategy: of ours; ``None``: the original, with torch's launcher.
        way: through the Trainer, or a loop by hand.
    """

    key: str
    stage: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)
    strategy: str | None = None
    way: str = "trainer"
    fsdp_on_cpu: bool = False

    def command(self, nproc: int, told: dict[str, Any], port: int) -> list[str]:
        arguments = [str(SCRIPT), json.dumps(told)]
        if self.strategy is None or self.way == "hand":
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(nproc), "--master-port", str(port)]
            return [sys.executable, *torchrun, *arguments]
        launch = ["-m", "shardwise", "launch", "--nproc", str(nproc), "--as", "accelerate", "--strategy", self.strategy]
        return [sys.executable, *launch, *arguments]


CPU = {"use_cpu": True}
CONTENDERS = [
    Contender("accelerate-ddp", "ddp", "Accelerate, DDP", CPU),
    Contender("sw-ddp", "ddp", "Shardwise, ddp", CPU, strategy="ddp"),
    Contender("hand-ddp", "ddp", "by hand, ddp", {"strategy": "ddp"}, strategy="ddp", way="hand"),
    Contender("accelerate-fsdp-2", "zero2", "Accelerate, FSDP, no reshard", _fsdp(False), fsdp_on_cpu=True),
    Contender("accelerate-ds-2", "zero2", "Accelerate, DeepSpeed 2", _deepspeed(2)),
    Contender("sw-zero2", "zero2", "Shardwise, zero2", CPU, strategy="zero2"),
    Contender("hand-zero2", "zero2", "by hand, zero2", {"strategy": "zero2"}, strategy="zero2", way="hand"),
    Contender("accelerate-fsdp-3", "zero3", "Accelerate, FSDP", _fsdp(True), fsdp_on_cpu=True),
    Contender("accelerate-ds-3", "zero3", "Accelerate, DeepSpeed 3", _deepspeed(3)),
    Contender("sw-zero3", "zero3", "Shardwise, zero3", CPU, strategy="zero3"),
    Contender("hand-zero3", "zero3", "by hand, zero3", {"strategy": "zero3"}, strategy="zero3", way="hand"),
]
STAGES = ("ddp", "zero2", "zero3")


def _accept(listener: socket.socket, process: subprocess.Popen[bytes], log: Path) -> Connection:
    """The next rank that is ready to take turns.

    Raises:
        RuntimeError: its program has ended, or takes longer than ``START_S``.
    """
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            found, _ = listener.accept()
        except TimeoutError:
            continue
        found.setblocking(True)
        return Connection(found.detach())
    raise RuntimeError(f"{log.stem} did not begin:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def race(field_: list[Contender], nproc: int, rounds: int) -> dict[str, Any]:
    """Start all, and give turns.

    Raises:
        RuntimeError: one of them ended, or did not begin in time.
    """
    steps = WARM_UP + rounds
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{folder}/turns")
        listener.listen(64)
        listener.settimeout(1.0)
        lines: dict[str, list[Connection]] = {}
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "0"}
        for at, one in enumerate(field_):
            told = {
                "address": f"{folder}/turns", "way": one.way, "steps": steps, "options": one.options,
                "length": LENGTH, "folder": f"{folder}/{one.key}", "fsdp_on_cpu": one.fsdp_on_cpu,
            }  # fmt: skip
            log = Path(f"{folder}/{one.key}.log")
            with log.open("w") as out:
                process = subprocess.Popen(
                    one.command(nproc, told, 29600 + at), stdout=out, stderr=subprocess.STDOUT, env=environment
                )
            stack.callback(process.kill)
            lines[one.key] = [_accept(listener, process, log) for _ in range(nproc)]  # not all at once: it takes memory
        times: dict[str, list[float]] = {one.key: [] for one in field_}
        cpu: dict[str, list[float]] = {one.key: [] for one in field_}
        for step in range(steps):
            start = step % len(field_)
            for one in field_[start:] + field_[:start]:
                for line in lines[one.key]:
                    line.send(None)
                found = [line.recv() for line in lines[one.key]]
                if step >= WARM_UP:
                    times[one.key].append(max(wall for wall, _ in found))
                    cpu[one.key].append(sum(used for _, used in found))
        ends = {one.key: [line.recv() for line in lines[one.key]] for one in field_}
        for line in (line for some in lines.values() for line in some):
            line.send(None)
    return {
        "times": times, "cpu": cpu,
        "loss": {key: statistics.fmean(loss for loss, _ in found) for key, found in ends.items()},
        "what": {key: found[0][1] for key, found in ends.items()},
    }  # fmt: skip


def compare(field_: list[Contender], found: dict[str, Any]) -> dict[str, Any]:
    """Steps, and ratios by stage."""
    times, cpu = found["times"], found["cpu"]
    out: dict[str, Any] = {"step_s": {k: quartiles(v) for k, v in times.items()}, "what": found["what"], "stages": {}}
    for stage in STAGES:
        keys = [one.key for one in field_ if one.stage == stage]
        ours, hand = f"sw-{stage}", f"hand-{stage}"
        if ours not in keys:
            continue
        peers = {k: paired(times[ours], times[k]) for k in keys if k.startswith("accelerate")}
        row: dict[str, Any] = {"to_peers": peers, "loss": {k: found["loss"][k] for k in keys}}
        if hand in keys:
            row |= {"to_hand": paired(times[ours], times[hand]), "to_hand_cpu": paired(cpu[ours], cpu[hand])}
        out["stages"][stage] = row
    return out


# --- losses -----------------------------------------------------------------------------------------------
SPLITS = ((1, 8), (2, 4), (4, 2))
LOSS_STEPS = 6


def losses(strategy: str | None, nproc: int, micro_batches: int, rows: int) -> dict[str, Any]:
    """Losses and norms of a few steps of ``nproc * micro_batches * rows`` rows, and a sum over all parameters."""
    with tempfile.TemporaryDirectory() as folder:
        told = {"losses": True, "folder": folder, "steps": LOSS_STEPS, "length": LENGTH, "options": {
            "use_cpu": True, "per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches,
        }}  # fmt: skip
        one = Contender("losses", "", "", strategy=strategy)
        command = one.command(nproc, told, 29599)
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads((Path(folder) / "losses.json").read_text())


def loss_table() -> list[dict[str, Any]]:
    """Every split of eight rows, beside plain transformers in one process."""
    plain = losses(None, 1, 1, 8)
    rows = [{"what": "plain transformers, 1 process", **plain}]
    for strategy in ("ddp", "zero3"):
        for nproc, micro_batches in SPLITS:
            found = losses(strategy, nproc, micro_batches, 1)
            apart = max(abs(a - b) / abs(b) for a, b in zip(found["loss"], plain["loss"], strict=True))
            norms = max(abs(a - b) / abs(b) for a, b in zip(found["norm"], plain["norm"], strict=True))
            rows.append(
                {"what": f"{strategy}, {nproc} x {micro_batches}", **found, "loss_off": apart, "norm_off": norms}
            )
            print(f"{rows[-1]['what']}: losses differ by {apart:.1e}, norms by {norms:.1e}", flush=True)
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """Ours as a share of each peer's time, by stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from plot import INK, OURS, finish

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "shardwise", "text.color": INK})
    labels = {one.key: one.label for one in CONTENDERS}
    rows = [
        (f"{stage} : {labels[key]}", ratio)
        for stage, row in result["stages"].items()
        for key, ratio in {**row["to_peers"], **({f"hand-{stage}": row["to_hand"]} if "to_hand" in row else {})}.items()
    ]
    figure, axis = plt.subplots(figsize=(7.6, 0.7 + 0.36 * len(rows)))
    middle = [ratio["median"] for _, ratio in rows]
    errors = [[r["median"] - r["q1"] for _, r in rows], [r["q3"] - r["median"] for _, r in rows]]
    axis.barh([name for name, _ in rows], middle, xerr=errors, color=OURS, height=0.62, ecolor=INK, capsize=2)
    axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    for at, (_, ratio) in enumerate(rows):
        axis.annotate(f"{ratio['median']:.2f}", (ratio["q3"], at), (5, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, 1.15 * max(r["q3"] for _, r in rows))
    axis.invert_yaxis()
    axis.set_title("Trainer on Shardwise : the other, time of a step", loc="left", fontsize=9.5, fontweight="bold")
    finish(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds, after the warm-up")
    parser.add_argument("--stage", choices=STAGES, action="append", help="only these")
    parser.add_argument("--no-losses", action="store_true", help="only times")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = head(["transformers", "accelerate", "deepspeed"]) | {"ranks": args.nproc, "rounds": args.rounds}
    result |= {
        "parameters": Shape().parameters,
        "about": f"GPT-2 of 25 M, micro-batch 1 x {LENGTH} tokens",
        "stages": {},
    }
    for stage in args.stage or STAGES:
        field_ = [one for one in CONTENDERS if one.stage == stage]
        found = compare(field_, race(field_, args.nproc, args.rounds))
        result["stages"] |= found["stages"]
        result.setdefault("step_s", {}).update(found["step_s"])
        result.setdefault("what", {}).update(found["what"])
        row = found["stages"][stage]
        for key, ratio in row["to_peers"].items():
            print(f"{stage}: {told(ratio)} of {key} ({found['what'][key]}, loss {row['loss'][key]:.4f})", flush=True)
        print(f"{stage}: {told(row['to_hand'])} of a loop by hand, CPU {told(row['to_hand_cpu'])}", flush=True)
    if not args.no_losses:
        result["losses"] = loss_table()
    save(result, args.out / "front-ends.json")
    draw(result, args.out / "front-ends.svg")


if __name__ == "__main__":
    main()
