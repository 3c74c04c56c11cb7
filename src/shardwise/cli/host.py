"""What this host has, without importing torch: CPU cores, and CUDA devices as the driver shows them."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has it
        return os.cpu_count() or 1


def cuda_devices(any_torch: bool = False) -> int:
    """CUDA devices of this host as the driver shows them, without the seconds that importing torch takes.

    A default for a question, no more: ``launch`` counts what torch can use.

    Args:
        any_torch: count them also if torch is built without CUDA.
    """
    if not any_torch and not _torch_has_cuda():
        return 0
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        return len([name for name in seen.split(",") if name.strip() not in ("", "-1")])
    try:
        return sum(1 for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name))
    except OSError:
        return 0


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")  # finds it, does not import it
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return True
    return re.search(r"^cuda\b.*=\s*['\"]", text, re.MULTILINE) is not None
