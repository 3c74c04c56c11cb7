"""The table of ``scenarios.py`` on the simulated device: the same models and scripts, and no two operations race."""

from __future__ import annotations

import pytest

from ranks import run
from scenarios import MODELS, SCENARIOS, SCRIPTS, compare_by_name

pytestmark = [pytest.mark.usefixtures("simulated_device"), pytest.mark.timeout(600)]

OFFLOADED = "offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu,activation_offload=cpu"
RUNS = sorted({(s.name, strategy, size) for s in (*MODELS, *SCRIPTS) for strategy, size in s.runs if size in (1, 2)})
QUICK = [r for r in RUNS if r[1] == "zero3" and "compiled" not in r[0]]  # compiling takes most of the time


@pytest.mark.parametrize(
    ("name", "strategy", "size"),
    [pytest.param(*r, marks=[pytest.mark.slow] * (r not in QUICK), id="-".join(map(str, r))) for r in RUNS],
)
@pytest.mark.parametrize("home", ["device", "host"])
def test_scenario(name, strategy, size, home):
    run(size, compare_by_name, name, strategy if home == "device" else f"{strategy},{OFFLOADED}", "sim:0", device="sim")


def test_every_scenario_is_tried():
    assert {name for name, _, _ in RUNS} >= {name for name, s in SCENARIOS.items() if any(r[1] < 4 for r in s.runs)}
