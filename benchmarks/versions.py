"""Two versions of Shardwise in one run: what a change did to the speed of a step.

    git worktree add /tmp/before v0.1
    python benchmarks/versions.py --before /tmp/before/src --rounds 40

The other version is imported as ``shardwise_before``, from a copy with its own name in it, so that both train in the
same processes and take turns as the contenders of ``peers.py`` do: drifting load hits both alike.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import ranks
from contenders import Contender, Trainer, adamw
from gpt import SETTINGS, Setting, make_model
from report import RESULTS, head, paired, quartiles, save

BEFORE = "shardwise_before"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def _build(package: str, strategy: str) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        library: Any = importlib.import_module(package)
        model = library.fully_shard(make_model(setting.shape), strategy=strategy)
        return Trainer(model, adamw(model.parameters()))

    return build


CONTENDERS = tuple(
    Contender(f"{key}-{strategy}", f"{strategy}, {key}", strategy, _build(package, strategy))
    for strategy in STRATEGIES
    for key, package in (("before", BEFORE), ("after", "shardwise"))
)


def rename(source: Path, folder: Path) -> None:
    """Copy the package of a source folder to ``folder`` under the other version's name, attributes it sets included."""
    copy = folder / BEFORE
    shutil.copytree(source / "shardwise", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file in copy.rglob("*.py"):
        file.write_text(file.read_text().replace("shardwise", BEFORE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="source folder of the other version")
    parser.add_argument("--setting", choices=SETTINGS, default="comm")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds, after the warm-up")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    if not (args.before / "shardwise" / "__init__.py").is_file():
        raise SystemExit(f"{args.before} has no package shardwise: give the src folder of a checkout")
    setting = SETTINGS[args.setting]
    keys = [c.key for c in CONTENDERS]
    told = head([])
    with tempfile.TemporaryDirectory() as folder:
        rename(args.before, Path(folder))
        sys.path.insert(0, folder)  # new processes take it over
        by_rank = ranks.run(args.nproc, peers.race, keys, setting, args.rounds, "versions")
    wall = {k: [max(turn) for turn in zip(*(r["times"][k] for r in by_rank), strict=True)] for k in keys}
    cpu = {k: [statistics.mean(turn) for turn in zip(*(r["cpu"][k] for r in by_rank), strict=True)] for k in keys}
    result: dict[str, Any] = told | {"setting": setting.name, "ranks": args.nproc, "rounds": args.rounds, "steps": {}}
    print("\n".join(f"note: {n}" for n in told["notes"]))
    print("| strategy | ms before | ms after | ratio (quartiles) | CPU ms before | CPU ms after | ratio (quartiles) |")
    print("|---|---:|---:|---|---:|---:|---|")
    for strategy in STRATEGIES:
        row: dict[str, Any] = {}
        cells = [strategy]
        for name, series in (("step", wall), ("cpu", cpu)):
            before, after = series[f"before-{strategy}"], series[f"after-{strategy}"]
            ratio = paired(after, before)
            row[name] = {"before_s": quartiles(before), "after_s": quartiles(after), "ratio": ratio}
            cells += [f"{statistics.median(t) * 1e3:.0f}" for t in (before, after)]
            cells += [f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"]
        result["steps"][strategy] = row
        print("| " + " | ".join(cells) + " |")
    save(result, args.out / f"versions-{setting.name}-{args.nproc}ranks.json")


if __name__ == "__main__":
    main()
