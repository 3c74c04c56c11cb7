"""What a Trainer cannot train, found before it begins."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from shardwise.compat.wrappers import model_has_dtensor
from shardwise.engine.hooks import engine_of
from shardwise.errors import ConfigError, DataError, MissingPackage, UnitError

_OLDEST, _BEFORE = (5, 0), (6, 0)


def check_version() -> None:
    """Raise where transformers is a version that this was not written for."""
    found = importlib.metadata.version("transformers")
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not _OLDEST <= numbers < _BEFORE:
        raise MissingPackage(
            f"transformers {found} has another Trainer than the one this was written for",
            where="shardwise.transformers",
            fix="pip install 'transformers>=5.0,<6'",
        )


def check_model(model: Any) -> None:
    """Raise for a model that somebody else has split, copied or wrapped.

    Raises:
        UnitError: it names who, and what to do.
    """
    if not isinstance(model, nn.Module) or engine_of(model) is not None:
        return  # made later, by model_init; or ours
    found = ""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        found, fix = f"it is inside torch's {type(model).__name__}", "give what is inside: model.module"
    elif any(_is_fsdp(module) for module in model.modules()):
        found, fix = "torch's FSDP has wrapped it", "give it as it was before: strategy='zero3' splits it"
    elif getattr(model, "is_distributed_loading_by_transformers", False) or model_has_dtensor(model):
        found = "it is split already, into DTensors"
        fix = "load it without distributed_config, tp_plan and fully_shard: strategy='zero3' splits it"
    elif any(_is_partitioned(p) for p in model.parameters()):
        found, fix = "DeepSpeed has partitioned it", "build it without deepspeed.zero.Init: strategy='zero3' splits it"
    if found:
        raise UnitError(found, where=type(model).__name__, fix=fix)


def _is_fsdp(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith("torch.")


def _is_partitioned(p: nn.Parameter) -> bool:
    """By the library whose marks ours has, too: there each has a tensor of its own, and a class for its state."""
    return type(vars(p).get("ds_status")).__module__.startswith("deepspeed.")


def check_arguments(args: Any) -> None:
    """Raise for arguments that are not served.

    Raises:
        ConfigError: it names them, and what to do.
    """
    fsdp = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if args.fsdp and fsdp.get("xla"):
        raise ConfigError(
            "fsdp_config={'xla': True}: TPUs are not served", where=type(args).__name__, fix="strategy='zero3'"
        )
    if args.fsdp and args.deepspeed:
        raise ConfigError("fsdp= and deepspeed= together", where=type(args).__name__, fix="give one, or strategy=")


def full_eval(args: Any) -> str | None:
    """The precision that ``fp16_full_eval`` or ``bf16_full_eval`` asks for."""
    return "fp16" if args.fp16_full_eval else "bf16" if args.bf16_full_eval else None


def check_full_eval(args: Any, precision: str) -> None:
    """Raise where a model that a strategy holds would be converted for its evaluation.

    In the precision that it computes in there is nothing to convert.

    Args:
        precision: ``no``, ``fp16`` or ``bf16``: of the Accelerator.
    """
    asked = full_eval(args)
    if asked not in (None, precision):
        raise ConfigError(
            f"{asked}_full_eval converts the model, whose values the strategy holds",
            where=type(args).__name__,
            fix=f"{asked}=True computes in it, in training and evaluation; alone it is for models that are only "
            "evaluated, under ddp, zero1 or zero2",
        )


def check_lengths(what: str, lengths: Sequence[float]) -> None:
    """Raise where ranks have differently many batches: a Trainer's loop waits for all of them in each step.

    Args:
        what: the dataset.
        lengths: of each rank's loader.
    """
    if len(set(lengths)) > 1:
        raise DataError(
            f"the ranks have {', '.join(str(int(n)) for n in lengths)} batches, and in a Trainer all take equally many",
            where=what,
            fix="leave even_batches out of accelerator_config, or set dataloader_drop_last=True",
        )
