"""What every benchmark's result says about itself: date, versions, the machine's class, and how steady a figure is."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shardwise import device

RESULTS = Path(__file__).resolve().parent / "results"
BUSY = 0.5  # load per core before the start that makes absolute times doubtful
BUSY_NOTE = "the machine was busy: ratios are paired by round, but absolute times are not to be relied on"


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; one value stands for all three."""
    values = list(values)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": q1, "q3": q3}


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratio, taken round by round."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def head(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Date, versions and the machine's class, without its name.

    Args:
        packages: whose versions are told where they are installed.
    """
    load = [round(x, 2) for x in os.getloadavg()]
    out: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "load_before": load,
        "notes": [BUSY_NOTE] if load[0] > BUSY * (os.cpu_count() or 1) else [],
    }
    for name in packages:
        if importlib.util.find_spec(name) is not None:
            out[name] = version(name)
    return out


def machine() -> dict[str, Any]:
    """Cores, memory and accelerators."""
    out: dict[str, Any] = {
        "architecture": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    kind = device.accelerator()
    if kind is not None:
        found = [torch.device(kind, index) for index in range(device.count())]
        out["gpus"] = [device.name(one) for one in found]
        told = device.memory(found[0])
        out |= {"gpu_memory_gib": round(told[1] / 2**30, 1)} if told is not None else {}
        out |= device.versions()
    return out


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


def told(row: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    """``median (q1-q3)``."""
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*(row[k] * scale for k in ("median", "q1", "q3")), d=digits)
