"""Parameters of tests that CI leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One set of parameters that runs with ``pytest -m slow`` only."""
    return pytest.param(*values, marks=pytest.mark.slow)
