"""Steps of operations and transfers, played through: by hand where the answer is plain, and laws for all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import InternalError
from shardwise.plan.curves import Line, Points
from shardwise.plan.machine import Machine
from shardwise.plan.rates import Beside, Rates, key
from shardwise.plan.timing import Timing, extended, predict
from shardwise.plan.trace import OP, PHASE, START, WAIT, Entry, Operation, Trace

GB = 10**9


def matmul(flops: float, moved: int = 0, dtype: str = "float32", device: str = "device") -> Entry:
    return Entry(
        OP, "forward", "a", Operation("aten::mm", ((8, 8), (8, 8)), (dtype,) * 2, "", device, int(flops), moved, 0)
    )


def start(way: str, nbytes: int, name: str = "a", ranks: tuple[int, ...] = (0, 1)) -> Entry:
    return Entry(START, "forward", name, None, way, name, nbytes, ranks)


def wait(way: str, name: str = "a", ranks: tuple[int, ...] = (0, 1)) -> Entry:
    return Entry(WAIT, "forward", name, None, way, name, 0, ranks)


def plain(**changes: object) -> Rates:
    """A second is 1 GFLOP of fp32, 1 GB of memory, and 1 GB of everything else; nothing has an overhead."""
    rates = Rates.of_sheet(Machine.parse("2xcpu", nvme="1GB/s"))
    second = Line(0.0, 1e9)
    unit = replace(rates.device, products={"float32": second}, memory=second)
    links = dict.fromkeys(("node", "network", "control", "to_host", "to_device", "read", "write"), second)
    steps = {"node": 0.0, "network": 0.0}
    return replace(rates, device=unit, host=unit, call={"": 0.0}, links=links, steps=steps, **changes)


def of(*entries: Entry, rates: Rates | None = None, **facts: object) -> Timing:
    return predict(Trace(list(entries), 2, dict(facts)), rates or plain())


# --- by hand ------------------------------------------------------------------------------------------
def test_operations_are_as_slow_as_their_slower_half() -> None:
    assert of(matmul(2e9, GB)).seconds == pytest.approx(2)
    assert of(matmul(2e9, 3 * GB)).seconds == pytest.approx(3)
    assert of(matmul(2e9, GB), matmul(1e9)).bound == "compute"


def test_a_transfer_hides_behind_operations() -> None:
    hidden = of(start("gather", 2 * GB), matmul(3e9), wait("gather"))
    assert hidden.seconds == pytest.approx(3) and hidden.waits["network"] == 0
    shown = of(start("gather", 2 * GB), matmul(0.5e9), wait("gather"))
    assert shown.seconds == pytest.approx(2) and shown.waits["network"] == pytest.approx(1.5)
    assert shown.bound == "network" and shown.busy["network"] == pytest.approx(2)
    assert of(start("gather", 2 * GB), wait("gather"), matmul(3e9)).seconds == pytest.approx(5)


def test_one_link_carries_one_after_the_other_and_others_beside() -> None:
    two = (start("gather", GB, "a"), start("gather", GB, "b"), wait("gather", "a"), wait("gather", "b"))
    assert of(*two).seconds == pytest.approx(2)
    other = (start("gather", GB), start("read", GB), wait("gather"), wait("read"))
    assert of(*other).seconds == pytest.approx(1)
    assert of(*other).busy == {"disk": pytest.approx(1), "host": 0, "host link": 0, "network": pytest.approx(1)}


def test_what_a_step_leaves_under_way_the_next_one_waits_for() -> None:
    """As values after an update: gathered while the next forward begins."""
    timing = of(matmul(1e9), wait("gather"), matmul(1e9), start("gather", 3 * GB))
    assert timing.seconds == pytest.approx(4) and timing.waits["network"] == pytest.approx(2)


def test_who_waits_for_nothing_is_told() -> None:
    with pytest.raises(InternalError, match="gather of 'a'"):
        of(matmul(1e9), wait("gather"))


def test_operations_and_transfers_on_the_same_cores() -> None:
    """Both at half their speed while both are under way: 1 s of each takes 2 s."""
    rates = plain(beside={"node": Beside(0.5, 0.5)})
    timing = of(start("gather", GB), matmul(3e9), wait("gather"), rates=rates)
    assert timing.seconds == pytest.approx(4) and timing.compute == pytest.approx(4)


def test_copies_have_a_new_name_in_each_step() -> None:
    """What a step waits for of the one before has a name that no transfer of this one has."""
    timing = of(matmul(1e9), wait("write", "w 1"), matmul(1e9), start("write", 3 * GB, "w 2"))
    assert timing.seconds == pytest.approx(4) and timing.waits["disk"] == pytest.approx(2)


def test_updates_beside_what_follows() -> None:
    """On a device that runs late: 2 s of the host's, and 1 s of the device's before it needs them."""
    rates = replace(Rates.of_sheet(Machine.parse("2xH100")), call={"": 0.0})
    rates = replace(rates, device=plain().device, host=plain().host)
    update = Entry(PHASE, "update", "a")
    entries = [start("update", 0), update, matmul(2e9, device="host"), Entry(PHASE, "step", "o"), matmul(1e9)]
    timing = of(*entries, wait("update"), rates=rates)
    assert timing.seconds == pytest.approx(2) and timing.waits["host"] == pytest.approx(1)
    cores = of(*entries, wait("update"))
    assert cores.seconds == pytest.approx(3) and cores.waits["host"] == 0, "on a CPU it takes the same cores"


def test_measured_operations_are_taken_as_they_are() -> None:
    entry = matmul(1e9)
    assert entry.op is not None
    assert of(entry, rates=replace(plain(), exact={key(entry.op): 0.25})).seconds == pytest.approx(0.25)


def test_phases_add_up() -> None:
    turn = Entry(PHASE, "update", "a")
    timing = of(Entry(PHASE, "forward", "a"), matmul(1e9), turn, matmul(2e9))
    assert timing.phases == {"forward": pytest.approx(1), "update": pytest.approx(2)}


def test_facts() -> None:
    timing = of(matmul(2e9), tokens=100, model_flops=1e10)
    assert timing.tokens_per_s == pytest.approx(50)
    assert timing.mfu == pytest.approx(5e9 / Machine.parse("2xcpu").peak("fp32"))


# --- devices that run late ----------------------------------------------------------------------------
def test_a_device_that_waits_for_its_host_is_bound_by_launches() -> None:
    rates = Rates.of_sheet(Machine.parse("2xH100"))
    small = of(*[matmul(1e3, 1000)] * 100, rates=rates)
    assert small.bound == "launch" and small.seconds >= 100 * rates.call[""] * 0.99
    large = of(*[matmul(1e12, 1000)] * 100, rates=rates)
    assert large.bound == "compute" and large.launch < 0.01 * large.seconds


def test_low_precision_is_faster_and_tf32_has_to_be_asked_for() -> None:
    machine = Machine.parse("H100")
    rates, tf32 = Rates.of_sheet(machine), Rates.of_sheet(machine, tf32=True)
    fp32 = of(matmul(1e13), rates=rates).seconds
    assert fp32 == pytest.approx(1e13 / (67e12 * 0.9), rel=1e-3)
    assert of(matmul(1e13, dtype="bfloat16"), rates=rates).seconds < fp32 / 5
    assert of(matmul(1e13), rates=tf32).seconds < fp32 / 4
    assert rates.sources["compute"].startswith("datasheet: NVIDIA H100")


def test_rings_inside_a_node_and_across() -> None:
    rates = Rates.of_sheet(Machine.parse("8xH100", nodes=2, nvme="8GB/s"))
    everyone, node = tuple(range(16)), tuple(range(8))
    assert rates.transfer("gather", GB, node) == pytest.approx(GB / (450e9 * 0.8), rel=0.05)
    assert rates.transfer("gather", GB, everyone) == pytest.approx(GB / (400e9 * 0.8), rel=0.05)
    # Eight pairs across, one per device: each has an eighth of the network.
    assert rates.transfer("reduce", GB, (0, 8)) == pytest.approx(8 * GB / (400e9 * 0.8), rel=0.05)
    assert rates.transfer("read", GB, ()) == pytest.approx(1, rel=0.01), "eight ranks share the disks"


# --- laws ---------------------------------------------------------------------------------------------
WAYS = ["gather", "reduce", "control", "to_host", "to_device", "read", "write"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("op"), st.integers(0, 5 * GB), st.integers(0, GB), st.sampled_from(["device", "host"])),
        st.tuples(st.just("start"), st.sampled_from(WAYS), st.integers(0, 3 * GB)),
        st.tuples(st.just("wait"), st.sampled_from(WAYS)),
    ),
    max_size=25,
)
MACHINES = st.sampled_from(["2xcpu", "2xH100", "4xT4"])
SLOWED = st.builds(Beside, st.floats(0.2, 1), st.floats(0.2, 1))


def built(steps: list[tuple], factor: int = 1, every: str = "") -> Trace:
    """A trace in which every wait has its transfer, the bytes of one way times ``factor``."""
    entries, open_ = [], dict.fromkeys(WAYS, 0)
    for step in steps:
        if step[0] == "op":
            entries.append(matmul(step[1], step[2], device=step[3]))
        elif step[0] == "start":
            entries.append(start(step[1], step[2] * (factor if step[1] == every else 1)))
            open_[step[1]] += 1
        elif open_[step[1]]:
            entries.append(wait(step[1]))
            open_[step[1]] -= 1
    return Trace(entries, 2)


def rates_of(name: str, slowed: Beside) -> Rates:
    rates = Rates.of_sheet(Machine.parse(name, nvme="1GB/s"))
    return replace(rates, beside={"node": slowed}) if name == "2xcpu" else rates


@settings(max_examples=150, deadline=None)
@given(STEPS, MACHINES, SLOWED)
def test_parts_are_never_negative_and_add_up(steps: list[tuple], name: str, slowed: Beside) -> None:
    trace, rates = built(steps), rates_of(name, slowed)
    timing = predict(trace, rates)
    parts = [timing.compute, timing.launch, *timing.waits.values(), *timing.busy.values()]
    assert min(parts) >= 0
    total = timing.compute + timing.launch + sum(timing.waits.values())
    assert timing.seconds == pytest.approx(total) == pytest.approx(sum(timing.phases.values()), abs=1e-9)
    assert predict(trace, rates) == timing, "the same again"
    alone = sum(rates.operation(e.op) for e in trace.entries if e.op is not None and e.op.device == "device")
    assert timing.seconds >= alone * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(STEPS, MACHINES, st.sampled_from(WAYS), st.integers(2, 5))
def test_more_bytes_are_never_faster(steps: list[tuple], name: str, way: str, factor: int) -> None:
    rates = rates_of(name, Beside())
    less, more = predict(built(steps), rates), predict(built(steps, factor, way), rates)
    # A longer transfer may end where the host has come further: then it hides a call that it did not.
    assert more.seconds >= less.seconds * (1 - 1e-3) - 1e-9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-9, 10)), min_size=1, max_size=8), st.floats(1, 1e10))
def test_curves_rise(points: list[tuple[float, float]], at: float) -> None:
    curve = Points.of(points)
    assert 0 < curve.at(at) <= curve.at(1.5 * at) * (1 + 1e-9)


# --- repeated parts -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["2xcpu", "8xH100"])
def test_equal_units_are_a_line(name: str) -> None:
    rates = Rates.of_sheet(Machine.parse(name))

    def units(n: int) -> Trace:
        entries = [start("gather", 10**8, "0"), wait("gather", "0")]
        for i in range(1, n + 1):
            entries += [
                start("gather", 10**8, str(i)),
                matmul(1e11, 10**7),
                wait("gather", str(i)),
                matmul(1e10, 10**8),
            ]
        return Trace(entries, 2, {"tokens": 1000})

    two, three, many = (predict(units(n), rates) for n in (2, 3, 40))
    drawn = extended(two, [(three, 38)], units(40), rates)
    assert drawn.seconds == pytest.approx(many.seconds) and drawn.bound == many.bound
    assert drawn.waits == pytest.approx(many.waits) and drawn.phases == pytest.approx(many.phases)
    assert drawn.tokens_per_s == pytest.approx(many.tokens_per_s)
