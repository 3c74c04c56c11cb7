"""The states of the random generators of a process, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """The states of Python's ``random``, NumPy's global generator, torch's CPU one and the current CUDA device's."""
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            **{k: v for k, v in numpy_state.items() if k != "state"},
            "state": {k: torch.from_numpy(v.astype(np.int64)) if k == "key" else v for k, v in inner.items()},
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators into the states that :func:`rng_state` gave.

    The state of a CUDA generator has no use on a machine without CUDA, and is left out there; without one in
    ``state`` the CUDA generator stays as it is.
    """
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    inner = {k: v.numpy().astype(np.uint32) if k == "key" else v for k, v in state["numpy"]["state"].items()}
    np.random.set_state({**state["numpy"], "state": inner})
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
