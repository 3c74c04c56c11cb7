"""Adapters of peft's, saved and loaded while the model's values are in parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from shardwise.engine.gathered import gathered
from shardwise.engine.hooks import engine_of


@contextmanager
def whole_modules_to_save(model: nn.Module) -> Iterator[None]:
    """Have the modules that peft trains and saves whole (``modules_to_save``): it asks for their own state dicts.

    A collective. Costs these modules in memory on every rank; nothing for another model than peft's.
    """
    peft = sys.modules.get("peft.utils.other")
    kinds = () if peft is None else (peft.AuxiliaryTrainingWrapper,)
    found = [part for part in model.modules() if isinstance(part, kinds)]
    engine = engine_of(model)
    if not found or engine is None or not engine.strategy.split_params:
        yield
        return
    with gathered([p for part in found for p in part.parameters()]):
        yield
