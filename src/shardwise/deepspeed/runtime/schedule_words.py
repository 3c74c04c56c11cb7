"""Names of schedules and of their arguments, as scripts import them from ``deepspeed.runtime.lr_schedules``."""

from __future__ import annotations

import argparse

# Each argument of a schedule with its default on the command line; the type follows from it.
ARGUMENTS: dict[str, bool | int | float | str] = {
    "lr_range_test_min_lr": 0.001,
    "lr_range_test_step_rate": 1.0,
    "lr_range_test_step_size": 1000,
    "lr_range_test_staircase": False,
    "cycle_first_step_size": 1000,
    "cycle_first_stair_count": -1,
    "cycle_second_step_size": -1,
    "cycle_second_stair_count": -1,
    "decay_step_size": 1000,
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "decay_lr_rate": 0.0,
    "cycle_momentum": False,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.9,
    "decay_mom_rate": 0.0,
    "warmup_min_lr": 0.0,
    "warmup_max_lr": 0.001,
    "warmup_num_steps": 1000,
    "warmup_type": "log",
    "warmup_min_ratio": 0.01,
    "cos_min_ratio": 0.01,
}
SCHEDULES = {
    "LR_RANGE_TEST": "LRRangeTest",
    "ONE_CYCLE": "OneCycle",
    "WARMUP_LR": "WarmupLR",
    "WARMUP_DECAY_LR": "WarmupDecayLR",
    "WARMUP_COSINE_LR": "WarmupCosineLR",
}
WORDS = {
    **{name.upper(): name for name in ARGUMENTS},
    **SCHEDULES,
    "LR_SCHEDULE": "lr_schedule",
    "TOTAL_NUM_STEPS": "total_num_steps",
    "WARMUP_LOG_RATE": "log",
    "WARMUP_LINEAR_RATE": "linear",
    "EDGE_VALUE": "edge_value",
    "MID_VALUE": "mid_value",
}
"""Constants, and what they say."""


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--lr_schedule`` and the arguments of schedules to a parser. The script reads them.

    Returns:
        The same parser.
    """
    group = parser.add_argument_group("schedules", "of the learning rate")
    group.add_argument("--lr_schedule", type=str, default=None, help=f"one of {', '.join(SCHEDULES.values())}")
    for name, default in ARGUMENTS.items():
        if isinstance(default, bool):
            group.add_argument(f"--{name}", action="store_true", default=default)
        else:
            group.add_argument(f"--{name}", type=type(default), default=default)
    return parser
