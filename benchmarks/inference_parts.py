"""The parts of ``inference.py`` that one process measures: streaming, loading, and models that are in memory."""

from __future__ import annotations

import gc
import importlib.util
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import ranks
import shardwise
from inference_model import (
    DECODE,
    DIRECT,
    LENGTH,
    MANY,
    PREFILL,
    ROOMY,
    SETTINGS,
    SMALL,
    WARM,
    Ask,
    BareRead,
    PageCache,
    Shape,
    bytes_read,
    in_memory,
    least_memory,
    quiet,
    steady,
    weights,
    write,
)
from memory import ResidentMeter, disk_bytes
from report import paired, quartiles
from shardwise.tiers.disk import CHUNK, DEPTH

BATCH = MANY.batch
ACCELERATE = importlib.util.find_spec("accelerate") is not None


def turns(keys: list[str], turn: int) -> list[str]:
    """The order within a round: another one begins each time."""
    start = turn % len(keys)
    return keys[start:] + keys[:start]


class FromDisk:
    """Bytes that this process has had read from the disk, by what it did meanwhile. Our turns have two forwards."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def of(self, key: str, call: Callable[[], Any]) -> Any:
        before = disk_bytes()
        result = call()
        after = disk_bytes()
        if before is not None and after is not None:
            self.seen.setdefault(key, []).append(after[0] - before[0])
        return result

    def told(self) -> dict[str, float]:
        return {key: statistics.median(values) for key, values in self.seen.items()}


# --- streaming -----------------------------------------------------------------------------------
def allowance(folder: Path, nbytes: int, times: float) -> dict[str, Any]:
    """The memory that a run may use: the weights' bytes over ``times``, or the least that is enough."""
    asked, least = int(nbytes / times), least_memory(folder, BATCH)
    allowed = max(asked, least)
    out: dict[str, Any] = {"asked": asked, "least": least, "used": allowed, "weights_over_used": nbytes / allowed}
    if asked < least:
        out["note"] = (
            f"the largest units on their way take {least / 1e6:.0f} MB, more than the {asked / 1e6:.0f} MB asked for: "
            f"the weights are {nbytes / allowed:.2f} times what is allowed"
        )
        print(f"note: {out['note']}", flush=True)
    return out


def peak(rank: int, folder: Path, device_map: str, limit: int) -> dict[str, int]:
    """The most memory that loading a model and running it takes, in a process that has run a small one."""
    quiet()
    small = shardwise.load(folder / "warm", device_map, max_memory={"cpu": ROOMY})
    with torch.no_grad():
        small(torch.arange(16)[None])
    meter = ResidentMeter()
    meter.reset()
    model = shardwise.load(folder / "large", device_map, max_memory={"cpu": limit}, batch=1, length=LENGTH)
    with torch.no_grad():
        for _ in range(3):
            model(torch.arange(16)[None])
    return {"peak": meter.peak, "planned": model.shardwise_plan.device}


def stream(folder: Path, nbytes: int, args: Any, cache: PageCache) -> dict[str, Any]:
    """Forwards of a model whose weights come from the disk each time."""
    path, copies = folder / "large", folder / "offloaded"
    allowed = allowance(path, nbytes, args.times)
    plain = in_memory(path)
    asks = {s.name: Ask(plain, s) for s in SETTINGS}
    ours = shardwise.load(path, "auto", max_memory={"cpu": allowed["used"]}, batch=BATCH, length=LENGTH)
    bare = BareRead(weights(path))
    theirs: Any = None
    if ACCELERATE:
        from accelerate import disk_offload

        theirs = disk_offload(in_memory(path), copies)
        os.sync()
    plan = ours.shardwise_plan
    streamed = bytes_read(ours, asks[PREFILL.name])
    out: dict[str, Any] = {
        "weights": nbytes, "memory": allowed, "streamed_bytes": streamed, "on_their_way": plan.streaming,
        "units": {at: sum(a == at for a in plan.homes.values()) for at in sorted(set(plan.homes.values()))},
        "peak_memory": ranks.run(1, peak, folder, "auto", allowed["used"])[0],
        "settings": {},
    }  # fmt: skip
    for setting in SETTINGS:
        ask, disk = asks[setting.name], FromDisk()
        waited: list[float] = []
        seconds: dict[str, list[float]] = {}

        def own(ask: Ask = ask, waited: list[float] = waited) -> float:
            spent, waits = steady(ours, ask)
            waited.append(waits / spent)
            return spent

        calls: dict[str, Callable[[], float]] = {"bare": bare, "shardwise": own}
        calls["memory"] = lambda ask=ask: ask(plain)  # type: ignore[misc]
        if theirs is not None:
            calls["disk_offload"] = lambda ask=ask: ask(theirs, exact=False)  # type: ignore[misc]
        for turn in range(args.rounds + 1):
            for key in turns(list(calls), turn):
                if key == "disk_offload":
                    cache.forget(copies)
                seconds.setdefault(key, []).append(disk.of(key, calls[key]))
        seconds = {key: values[1:] for key, values in seconds.items()}  # the first round made what is made once
        out["settings"][setting.name] = _streamed(setting, seconds, waited[1:], streamed, bare.nbytes)
        out["settings"][setting.name]["read_from_disk"] = disk.told()
    return out


def _streamed(setting: Any, seconds: dict[str, list[float]], waited: list[float], streamed: int, nbytes: int) -> Any:
    moved = {"bare": nbytes, "shardwise": streamed, "disk_offload": nbytes}
    speeds = {k: [n / s for s in seconds[k]] for k, n in moved.items() if k in seconds}
    needed = [streamed / s for s in speeds["bare"]]  # for what we read, at the speed of the bare read
    limit = [max(pair) for pair in zip(needed, seconds["memory"], strict=True)]
    out: dict[str, Any] = {
        "batch": setting.batch, "tokens": setting.tokens, "cached": setting.cached,
        "seconds": {k: quartiles(v) for k, v in seconds.items()},
        "gb_per_s": {k: quartiles([x / 1e9 for x in v]) for k, v in speeds.items()},
        "speed_over_bare": {k: paired(v, speeds["bare"]) for k, v in speeds.items() if k != "bare"},
        "waited_for_disk": quartiles(waited),
        "compute_over_read": paired(seconds["memory"], needed),
        "compute_bound": statistics.median(seconds["memory"]) > statistics.median(needed),
        "over_memory": paired(seconds["shardwise"], seconds["memory"]),
        "over_the_slower_of_both": paired(seconds["shardwise"], limit),
        "best_speed_over_bare": quartiles([a / b for a, b in zip(needed, limit, strict=True)]),
    }  # fmt: skip
    if "disk_offload" in seconds:
        out["disk_offload_over_shardwise"] = paired(seconds["disk_offload"], seconds["shardwise"])
    return out


# --- loading -------------------------------------------------------------------------------------
def load(folder: Path, nbytes: int, args: Any, cache: PageCache) -> dict[str, Any]:
    """Time until a model that fits is in memory, and until its first answer."""
    path = folder / "large"
    ask = Ask(in_memory(path), PREFILL)
    bare, disk = BareRead(weights(path)), FromDisk()

    def accelerate() -> Any:
        import transformers
        from accelerate import init_empty_weights, load_checkpoint_and_dispatch

        config = transformers.AutoConfig.from_pretrained(path)
        with init_empty_weights():
            model = transformers.LlamaForCausalLM(config).eval()
        return load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})

    makers: dict[str, Callable[[], Any]] = {
        "shardwise": lambda: shardwise.load(path, "auto", max_memory={"cpu": ROOMY}),
        "from_pretrained": lambda: in_memory(path),
    }
    if ACCELERATE:
        makers["load_checkpoint_and_dispatch"] = accelerate
    loaded: dict[str, list[float]] = {}
    reads = {"bare": bare, "bare_kept": bare.kept}
    first: dict[str, list[float]] = {}

    def timed(key: str) -> None:
        begin = perf_counter()
        model = makers[key]()
        spent = perf_counter() - begin
        answer = ask(model, exact=key == "shardwise")
        loaded.setdefault(key, []).append(spent)
        first.setdefault(key, []).append(spent + answer)

    for turn in range(args.rounds + 1):
        for key in turns([*reads, *makers], turn):
            gc.collect()
            cache.forget(path)
            if key in reads:
                loaded.setdefault(key, []).append(disk.of(key, reads[key]))
            else:
                disk.of(key, lambda key=key: timed(key))
    loaded = {key: values[1:] for key, values in loaded.items()}
    first = {key: values[1:] for key, values in first.items()}
    return {
        "weights": nbytes,
        "seconds": {k: quartiles(v) for k, v in loaded.items()},
        "seconds_to_first_answer": {k: quartiles(v) for k, v in first.items()},
        "speed_over_bare": {k: paired(loaded["bare"], v) for k, v in loaded.items() if k != "bare"},
        "speed_over_bare_kept": {k: paired(loaded["bare_kept"], loaded[k]) for k in makers},
        "first_answer_speed_over_bare": {k: paired(loaded["bare"], v) for k, v in first.items()},
        "shardwise_over": {k: paired(loaded["shardwise"], v) for k, v in loaded.items() if k != "shardwise"},
        "read_from_disk": disk.told(),
    }


# --- in memory -----------------------------------------------------------------------------------
def resident(folder: Path, nbytes: int, args: Any, cache: PageCache) -> dict[str, Any]:
    """What our hooks cost where nothing moves."""
    out: dict[str, Any] = {}
    for name, steps in (("small", args.steps), ("large", max(1, args.steps // 20))):
        plain = in_memory(folder / name)
        ours = shardwise.load(folder / name, "auto", max_memory={"cpu": ROOMY})
        if set(ours.shardwise_plan.homes.values()) != {"device"}:
            raise AssertionError("a model that fits is not in memory")
        ask = Ask(plain, DECODE)
        models = {"shardwise": ours, "plain": plain, "plain_again": plain}
        seconds: dict[str, list[float]] = {key: [] for key in models}
        for turn in range(args.rounds + 1):
            spent = dict.fromkeys(models, 0.0)
            for step in range(steps):
                for key in turns(list(models), turn + step):
                    spent[key] += ask(models[key])
            for key, value in spent.items():
                seconds[key].append(value / steps)
        seconds = {key: values[1:] for key, values in seconds.items()}
        out[name] = {
            "weights": sum(p.nbytes for p in plain.parameters()),
            "units": len(ours.shardwise_plan.homes), "steps": steps,
            "seconds": {k: quartiles(v) for k, v in seconds.items()},
            "over_plain": paired(seconds["shardwise"], seconds["plain"]),
            "noise": paired(seconds["plain_again"], seconds["plain"]),
        }  # fmt: skip
        del plain, ours, models
        gc.collect()
    return out


PARTS = {"stream": stream, "load": load, "resident": resident}


def prepare(folder: Path, shape: Shape) -> int:
    """Write the models that the parts use; returns the bytes of the large one's weights."""
    write(WARM, folder / "warm")
    write(SMALL, folder / "small")
    return write(shape, folder / "large")


def about_reads(cache: PageCache) -> dict[str, str]:
    return {
        "shardwise and the bare read": DIRECT,
        "others": f"through the page cache, emptied before each turn by {cache.how}",
        "threads": f"{DEPTH} that read, requests of {CHUNK >> 20} MiB",
    }
