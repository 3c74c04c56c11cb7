"""Tensors without values, which a plan runs on: torch's ``FakeTensorMode``."""

from __future__ import annotations

import torch


def without_values() -> bool:
    """Are new tensors without values and memory now, and is only this thread's work seen?"""
    return type(torch.empty(0)) is not torch.Tensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Is it a tensor of no subclass, but for those without values?"""
    kind = type(tensor)
    return kind is torch.Tensor or kind.__name__ == "FakeTensor"
