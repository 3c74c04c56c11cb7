"""The three batch sizes, of which one follows from the others."""

from __future__ import annotations

from shardwise.deepspeed_config.facts import DsFacts
from shardwise.deepspeed_config.tables import all_keys
from shardwise.errors import ConfigError

_NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def resolved_batch(facts: DsFacts, world: int, where: str = "DeepSpeed configuration") -> tuple[int, int, int]:
    """(samples of a step over all ranks, samples of a micro-batch, micro-batches of a step), for a run that begins now.

    Args:
        facts: what a configuration said of them.
        world: ranks, each with batches of its own.
        where: the configuration, for errors.

    Raises:
        ConfigError: neither batch size is said, or they do not agree; or a switch is left at ``"auto"``: nobody fills
            it in any more.
    """
    known = all_keys()
    for path in facts.unfilled:
        if known[path].needed:
            raise ConfigError(
                f"{path} is 'auto', and nobody has filled it in",
                where=where,
                fix="give a value ('auto' is filled by Hugging Face's Trainer only)",
            )
    train, micro, steps = facts.train_batch, facts.micro_batch, facts.accumulation
    ranks = f"{world} rank{'s' * (world > 1)}"
    if micro is None:
        if train is None:
            raise ConfigError(
                "neither train_batch_size nor train_micro_batch_size_per_gpu says how long a batch is",
                where=where,
                fix="give train_micro_batch_size_per_gpu a number ('auto' is filled by Hugging Face's Trainer only)",
            )
        steps = steps or 1
        micro, over = divmod(train, world * steps)
        if over or not micro:
            raise ConfigError(
                f"train_batch_size={train} is not {steps} micro-batches of equal length on each of {ranks}",
                where=where,
                fix=f"a multiple of {world * steps}",
            )
    elif steps is None and train is not None:
        steps, over = divmod(train, world * micro)
        if over or not steps:
            raise ConfigError(
                f"train_batch_size={train} is not a number of micro-batches of {micro} on each of {ranks}",
                where=where,
                fix=f"a multiple of {world * micro}",
            )
    steps = steps or 1
    if train is not None and train != micro * steps * world:
        raise ConfigError(
            f"train_batch_size={train}, but {micro} samples times {steps} micro-batches times {ranks} "
            f"are {micro * steps * world}",
            where=where,
            fix="leave one of the three out: it follows from the others",
        )
    return micro * steps * world, micro, steps


def check_batch(sizes: tuple[int | None, int | None, int | None], where: str) -> None:
    """What can be said of the three before the number of ranks is known.

    Raises:
        ConfigError: one is less than 1, or the whole is no multiple of the other two.
    """
    for name, value in zip(_NAMES, sizes, strict=True):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} is not a number of 1 or more", where=where)
    whole, micro, steps = sizes
    if whole is not None and whole % ((micro or 1) * (steps or 1)):
        raise ConfigError(
            f"train_batch_size={whole} is no multiple of the micro-batch {micro or 1} times {steps or 1} steps",
            where=where,
            fix="set train_batch_size to 'auto'",
        )
