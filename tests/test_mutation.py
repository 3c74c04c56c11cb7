"""Nightly: no wait of the source can be taken out without a test on the simulated device that notices."""

from __future__ import annotations

import pytest

from mutation import UNNOTICED, noticed, waits

WAITS = waits()


def test_few_waits_are_known_to_go_unnoticed():
    assert len(UNNOTICED) <= 2
    assert UNNOTICED.keys() <= {wait.name for wait in WAITS}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("simulated_device")
@pytest.mark.parametrize("wait", [w for w in WAITS if w.name not in UNNOTICED], ids=lambda wait: wait.name)
def test_a_missing_wait_is_noticed(wait):
    assert noticed(wait), wait.name
