"""The table of ``scenarios.py``: real models and scripts, against one plain process on the rows of all ranks."""

from __future__ import annotations

import pytest

from ranks import run
from scenarios import MODELS, SCENARIOS, SCRIPTS, compare_by_name

RUNS = [(s.name, strategy, size) for s in (*MODELS, *SCRIPTS) for strategy, size in s.runs]


def test_names_are_unique():
    assert len(SCENARIOS) == len(MODELS) + len(SCRIPTS)


@pytest.mark.parametrize(("name", "strategy", "size"), RUNS, ids=["-".join(map(str, r)) for r in RUNS])
def test_scenario(name, strategy, size):
    run(size, compare_by_name, name, strategy)
