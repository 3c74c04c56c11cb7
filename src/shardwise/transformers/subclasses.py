"""What subclasses of Trainer that others wrote do with a model whose values are in parts.

Adapters of peft's and whole pipelines of modules are saved part by part, by one rank. An evaluator runs a model as
often as it likes, and texts that are generated have different lengths on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import transformers
from torch import nn

from shardwise import operations
from shardwise.engine.gathered import gathered
from shardwise.engine.hooks import engine_of
from shardwise.engine.unit import unit_of
from shardwise.inference.uneven import together


def is_split(model: nn.Module | None) -> bool:
    """Has no rank all of its values?"""
    engine = None if model is None else engine_of(model)
    return engine is not None and engine.strategy.split_params and operations.joined().size > 1


def overrides(trainer: Any, name: str) -> bool:
    """Does a subclass have its own way to do this? Then it is asked, not ours."""
    kind = next(k for k in type(trainer).__mro__ if name in vars(k) and not k.__module__.startswith("shardwise."))
    return kind is not transformers.Trainer and issubclass(kind, transformers.Trainer)


@contextmanager
def saved_in_parts(trainer: Any) -> Iterator[None]:
    """Have whole what is saved by asking parts of the model: peft's ``modules_to_save``, or all of it. A collective.

    Costs these values in memory on every rank; nothing where a whole state dict is what is saved.
    """
    model = trainer.model
    if not is_split(model):
        yield
        return
    values = list(model.parameters()) if overrides(trainer, "_save") else _modules_to_save(model)
    with gathered(values):
        yield


@contextmanager
def loaded_in_parts(model: nn.Module) -> Iterator[None]:
    """The same for what peft loads. A collective."""
    with gathered(_modules_to_save(model) if is_split(model) else []):
        yield


def _modules_to_save(model: nn.Module) -> list[nn.Parameter]:
    peft: Any = sys.modules.get("peft.utils.other")
    kinds = () if peft is None else (peft.AuxiliaryTrainingWrapper,)
    return [p for part in model.modules() if isinstance(part, kinds) for p in part.parameters()]


@contextmanager
def evaluated_by(evaluator: Any, model: nn.Module) -> Iterator[None]:
    """Have the whole model where an evaluator of sentence-transformers' runs it: ranks take texts in turns, and one may
    have none. A collective. Costs all values on every rank meanwhile."""
    with gathered(list(model.parameters()) if evaluator is not None and is_split(model) else []):
        yield


def generates_together(model: nn.Module | None) -> None:
    """From now on ``model.generate`` lends the parts of a rank whose texts are complete to the others."""
    if model is not None and callable(getattr(type(model), "generate", None)) and "generate" not in vars(model):
        vars(model)["generate"] = partial(_generate, model)


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_split(model):
        return type(model).generate(model, *args, **kwargs)
    # What no block has, embeddings say, is here meanwhile: an encoder that is called by itself does not bring it.
    outside = [p for p in model.parameters() if (unit := unit_of(p)) is not None and not unit.name]
    with gathered(outside), together(model):
        return type(model).generate(model, *args, **kwargs)
