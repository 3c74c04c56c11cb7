"""The table of ``scenarios.py``: real models and scripts, against one plain process on the rows of all ranks."""

from __future__ import annotations

import pytest

from models import PRESETS
from ranks import run
from scenarios import MODELS, SCENARIOS, SCRIPTS, compare_by_name

RUNS = [(s.name, strategy, size) for s in (*MODELS, *SCRIPTS) for strategy, size in s.runs]


def test_names_are_unique():
    assert len(SCENARIOS) == len(MODELS) + len(SCRIPTS)


@pytest.mark.parametrize(("name", "strategy", "size"), RUNS, ids=["-".join(map(str, r)) for r in RUNS])
def test_scenario(name, strategy, size):
    run(size, compare_by_name, name, strategy)


def told_late(strategy: str) -> None:
    """As on a device, whose thread in autograd may let go of a backward later than ``backward()`` has raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardwise.engine.backward._lost", lambda *_: None)
        compare_by_name("a failed backward", strategy)


@pytest.mark.parametrize("strategy", PRESETS)
def test_a_failed_backward_that_autograd_lets_go_of_late(strategy):
    run(2, told_late, strategy)
