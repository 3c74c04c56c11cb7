"""DeepSpeed's learning-rate schedules: its numbers, step by step."""

from __future__ import annotations

import argparse
import itertools
import logging
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.deepspeed.runtime import lr_schedules as ours
from shardwise.errors import ConfigError

# What DeepSpeed 0.19.8 gives for one group of AdamW(lr=0.05): rates, and the first beta, before and after each step.
TABLE: list[tuple[str, dict[str, Any], list[float], list[float] | None]] = [
    (
        "WarmupLR",
        {"warmup_max_lr": 0.1, "warmup_num_steps": 5},
        [0.0, 0.0, 0.043067656, 0.068260619, 0.086135312, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        None,
    ),
    (
        "WarmupLR",
        {"warmup_min_lr": 0.01, "warmup_num_steps": 4, "warmup_type": "linear"},
        [0.01, 0.01, 0.02, 0.03, 0.04, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05],
        None,
    ),
    (
        "WarmupDecayLR",
        {"total_num_steps": 9, "warmup_max_lr": 0.1, "warmup_num_steps": 3},
        [0.0, 0.0, 0.063092975, 0.1, 0.1, 0.083333333, 0.066666667, 0.05, 0.033333333, 0.016666667, 0.0, 0.0],
        None,
    ),
    (
        "WarmupCosineLR",
        {"total_num_steps": 9, "warmup_min_ratio": 0.1, "warmup_num_steps": 3, "warmup_type": "linear"},
        [0.0, 0.005, 0.02, 0.035, 0.04665097, 0.03750125, 0.0250025, 0.01250375, 0.00335403, 5e-06, 5e-06, 5e-06],
        None,
    ),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2.0},
        [
            0.01,
            0.016666667,
            0.023333333,
            0.03,
            0.036666667,
            0.043333333,
            0.05,
            0.056666667,
            0.063333333,
            0.07,
            0.076666667,
            0.083333333,
        ],
        None,
    ),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 3, "lr_range_test_staircase": True},
        [0.01, 0.01, 0.01, 0.02, 0.02, 0.02, 0.03, 0.03, 0.03, 0.04, 0.04, 0.04],
        None,
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.01,
            "cycle_max_lr": 0.1,
            "cycle_first_step_size": 4,
            "cycle_second_step_size": 3,
            "decay_lr_rate": 0.5,
            "decay_step_size": 2,
            "decay_mom_rate": 0.1,
        },
        [0.01, 0.0325, 0.055, 0.0775, 0.1, 0.07, 0.04, 0.01, 0.008, 0.006666667, 0.005714286, 0.005],
        [0.8, 0.875, 0.85, 0.825, 0.8, 0.833333333, 0.866666667, 0.9, 0.945, 0.99, 1.035, 1.08],
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.01,
            "cycle_max_lr": 0.1,
            "cycle_first_step_size": 5,
            "cycle_first_stair_count": 2,
            "cycle_second_stair_count": 3,
        },
        [0.01, 0.01, 0.01, 0.055, 0.055, 0.1, 0.07, 0.04, 0.04, 0.01, 0.01, 0.01],
        [0.8, 0.9, 0.9, 0.85, 0.85, 0.8, 0.833333333, 0.866666667, 0.866666667, 0.9, 0.9, 0.9],
    ),
]


def optimizer(kind: str = "adam") -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.02}]
    return torch.optim.AdamW(groups) if kind == "adam" else torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize(("name", "settings", "rates", "momenta"), TABLE)
def test_the_table(name, settings, rates, momenta):
    one = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = ours.build_scheduler(name, one, settings)
    for rate, momentum in zip(rates, momenta or [0.9] * len(rates), strict=True):
        (group,) = one.param_groups
        assert group["lr"] == pytest.approx(rate, abs=1e-9)
        assert group["betas"][0] == pytest.approx(momentum, abs=1e-9)
        assert schedule.get_last_lr() == [group["lr"]]
        schedule.step()


def settings() -> list[tuple[str, dict[str, Any]]]:
    def product(name: str, **choices: tuple[Any, ...]) -> list[tuple[str, dict[str, Any]]]:
        return [(name, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]

    up = {"warmup_num_steps": (1, 2, 7), "warmup_type": ("log", "linear"), "last_batch_iteration": (-1, 4)}
    limits = {"warmup_min_lr": (0.0, [0.001, 0.002]), "warmup_max_lr": (0.01, [0.1, 0.2])}
    stairs = {"cycle_first_stair_count": (0, 2), "cycle_second_stair_count": (None, 4)}
    return [
        *product("WarmupLR", **up, **limits),
        *product("WarmupLR", **up),
        *product("WarmupDecayLR", total_num_steps=(3, 20), **up, **limits),
        *product("WarmupCosineLR", total_num_steps=(3, 20), warmup_min_ratio=(0.0, 0.3), cos_min_ratio=(0, 0.5), **up),
        *product("LRRangeTest", lr_range_test_min_lr=(0.001, [0.01, 0.02]), lr_range_test_step_size=(1, 5),
                 lr_range_test_step_rate=(0.5, 2.0), lr_range_test_staircase=(True, False),
                 last_batch_iteration=(-1, 4)),
        *product("OneCycle", cycle_min_lr=(0.01,), cycle_max_lr=([0.1, 0.3],), decay_lr_rate=(0, 0.1),
                 cycle_first_step_size=(5, 7), cycle_second_step_size=(None, 0, 3), **stairs, decay_step_size=(0, 3),
                 cycle_momentum=(True, False), cycle_max_mom=([0.9, 0.95],), decay_mom_rate=(0, 0.2)),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_same_bits_as_deepspeed(kind, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import lr_schedules as theirs
    from deepspeed.utils import logger

    monkeypatch.setattr(logger, "level", logging.ERROR)
    for name, values in settings():
        seen: list[list[Any]] = []
        for module in (theirs, ours):
            one = optimizer(kind)
            schedule = getattr(module, name)(one, **values)
            rows: list[Any] = []
            for step in range(25):
                schedule.step(*([9] if step == 18 else []))
                rows += [
                    [(g["lr"], g.get("betas")) for g in one.param_groups],
                    schedule.get_lr(),
                    schedule.state_dict(),
                ]
                rows.append(list(schedule.get_last_lr()))
            seen.append(rows)
        assert seen[0] == seen[1], (name, values)


def test_a_schedule_goes_on_from_its_state():
    for name, values, *_ in TABLE:
        one, two = optimizer(), optimizer()
        first, second = (ours.build_scheduler(name, o, values) for o in (one, two))
        for _ in range(6):
            first.step()
        second.load_state_dict(first.state_dict())
        assert second.get_last_lr() == first.get_last_lr()
        first.step(), second.step()
        assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in two.param_groups]


def test_rates_that_are_tensors_and_wrapped_optimizers():
    plain, tensors = optimizer("sgd"), optimizer("sgd")
    for group in tensors.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    held = tensors.param_groups[0]["lr"]
    wrapper = type("Wrapper", (), {"optimizer": tensors})()
    pair = ours.WarmupCosineLR(plain, 10, warmup_num_steps=3), ours.WarmupCosineLR(wrapper, 10, warmup_num_steps=3)
    for _ in range(5):
        for schedule in pair:
            schedule.step()
    assert tensors.param_groups[0]["lr"] is held and float(held) == pytest.approx(plain.param_groups[0]["lr"])


def test_what_a_configuration_names():
    one = optimizer()
    schedule = ours.build_scheduler("WarmupLR", one, {"warmup_min_lr": "auto", "warmup_max_lr": "auto"})
    assert (schedule.min_lrs, schedule.max_lrs) == ([0.0, 0.0], [0.1, 0.02])
    one = optimizer()
    schedule = ours.build_scheduler("WarmupDecayLR", one, {"total_num_steps": 5, "warmup_max_lr": "auto"})
    assert schedule.max_lrs == [0.1, 0.02]
    torchs = ours.build_scheduler("StepLR", optimizer(), {"step_size": 3})
    assert isinstance(torchs, torch.optim.lr_scheduler.StepLR)


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("WarmupLr", {}, "did you mean 'WarmupLR'"),
        ("WarmupLR", {"warmup_steps": 3}, "did you mean 'warmup_num_steps'"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, "nobody has filled it in"),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps=0"),
        ("WarmupLR", {"warmup_type": "linera"}, "did you mean 'linear'"),
        ("WarmupLR", {"warmup_max_lr": [0.1]}, "1 values for 2 groups"),
        ("WarmupDecayLR", {}, "no total_num_steps"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 0}, "0 steps up"),
        ("LRRangeTest", {"lr_range_test_step_size": 1.5}, "step_size=1.5"),
    ],
)
def test_what_is_refused(name, kwargs, text):
    with pytest.raises(ConfigError, match=text):
        ours.build_scheduler(name, optimizer(), kwargs)
    with pytest.raises(ConfigError, match="torch optimizer"):
        ours.WarmupLR(object())


def test_names_and_arguments_that_scripts_use(monkeypatch):
    args = ours.add_tuning_arguments(argparse.ArgumentParser()).parse_args(
        ["--warmup_min_lr", "0.5", "--cycle_momentum"]
    )
    assert (args.lr_schedule, args.warmup_min_lr, args.cycle_momentum) == (None, 0.5, True)
    assert ours.WARMUP_LR == "WarmupLR" and ours.WARMUP_MIN_LR == "warmup_min_lr"
    with pytest.raises(AttributeError):
        _ = ours.WARMUP_MIN
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import lr_schedules as theirs

    for name, value in vars(theirs).items():
        if name.isupper() and isinstance(value, (str, list)):
            found = getattr(ours, name)
            assert sorted(found) == sorted(value), name
    plain = ours.add_tuning_arguments(argparse.ArgumentParser()).parse_args([])
    assert vars(plain) == vars(theirs.add_tuning_arguments(argparse.ArgumentParser()).parse_args([]))
