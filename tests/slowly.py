"""Parameters of tests that CI leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One set of parameters that runs with ``pytest -m slow`` only."""
    return slow_unless(False, *values)


def slow_unless(quick: bool, *values: Any) -> Any:
    """One set of parameters, which runs without asking if it is ``quick``."""
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


def in_turn(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise with all combinations. Without asking run as many as the longest axis has values: each value of each
    axis comes up, and every time the values of a shorter axis are through they go on with an offset."""
    axes = {name: list(values) for name, values in axes.items()}
    sizes = [len(values) for values in axes.values()]
    quick = {tuple((i + axis * (i // n)) % n for axis, n in enumerate(sizes)) for i in range(max(sizes))}
    cases = [
        slow_unless(places in quick, *(values[k] for values, k in zip(axes.values(), places, strict=True)))
        for places in product(*map(range, sizes))
    ]
    return pytest.mark.parametrize(list(axes), cases)
