"""Machines in words, the figures behind them, and what is said about words that mean none."""

from __future__ import annotations

import pytest
import torch

from shardwise import datasheets, device
from shardwise.errors import PlanError
from shardwise.plan.machine import Machine


def test_words_become_a_machine() -> None:
    machine = Machine.parse("8xH100-80GB", nodes=2, host_memory="1TB", nvme="3.5GB/s,4TB")
    assert (machine.device, machine.per_node, machine.nodes, machine.world) == ("H100-80GB", 8, 2, 16)
    assert machine.host_memory == 10**12 and machine.nvme == 3.5e9 and machine.nvme_bytes == 4 * 10**12
    assert machine.peak("torch.bfloat16") == machine.peak("bf16") == 989e12
    assert machine.peak("float32") == 67e12, "without tensor cores, as torch computes by default"
    assert machine.sources["flops"] == "datasheet: NVIDIA H100 data sheet (SXM)"
    assert machine.sources["nvme"] == "told"
    assert 78 * 2**30 < machine.memory < 80e9 * 1.1


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("h100", "H100-80GB", 1),
        ("4 x a100-40gb", "A100-40GB", 4),
        ("2xRTX 4090", "RTX-4090", 2),
        ("NVIDIA L4", "L4", 1),
        ("8xMI300X", "MI300X", 8),
        ("2xcpu", "cpu", 2),
    ],
)
def test_spellings(text: str, name: str, count: int) -> None:
    machine = Machine.parse(text)
    assert (machine.device, machine.per_node) == (name, count)


@pytest.mark.parametrize("name", datasheets.SHEETS)
def test_every_sheet_is_a_machine_and_makes_sense(name: str) -> None:
    machine, sheet = Machine.parse(f"8x{name}"), datasheets.SHEETS[name]
    assert machine.device == name and sheet.kind in device.KINDS
    assert 0.9 * sheet.memory < machine.memory < 1.08 * sheet.memory
    assert machine.peak("fp16") >= machine.peak("fp32") and machine.bandwidth > machine.host_link
    assert set(machine.sources) >= {"memory", "flops", "bandwidth", "link", "network", "host_link", "host_bandwidth"}
    assert all(source.startswith(("datasheet: ", "assumed: ")) for source in machine.sources.values())
    band = machine.outside(2)
    assert 2**28 < band.low < band.high < 4 * 2**30 and "NCCL" in band.source
    assert datasheets.of_device(f"NVIDIA {sheet.part}") is sheet


def test_names_of_drivers() -> None:
    for told, name in (
        ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA GB200", "GB200"), ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI300X", "MI300X"),
    ):  # fmt: skip
        found = datasheets.of_device(told)
        assert found is not None and found.name == name, told
    assert datasheets.of_device("NVIDIA L40") is None, "which is no L4"
    assert device.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        ("8xH10-80GB", {}, "did you mean 'H100-80GB'"),
        ("8xTPU", {}, "known are GB200"),
        ("0xT4", {}, "devices = 0"),
        ("8x", {}, "not a number of devices"),
        ("", {}, "not a number of devices"),
        ("8xT4", {"nodes": -1}, "nodes = -1"),
        ("8xT4", {"host_memory": "much"}, "host memory = 'much'"),
        ("8xT4", {"host_memory": -5}, "host memory = '-5'"),
        ("8xT4", {"nvme": "4TB"}, "how fast"),
        ("8xT4", {"nvme": "0GB/s"}, "no rate"),
        ("8xT4", {"nvme": "1GB/s,big"}, "no size"),
        ("8xT4", {"network": "fast"}, "no rate"),
    ],
)
def test_bad_input(text: str, settings: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Machine.parse(text, **settings)


def test_the_machine_at_hand() -> None:
    one, two = Machine.here(device="cpu"), Machine.here(2, device="cpu")
    assert one.is_cpu and two.per_node == 2 and two.memory == one.memory // 2 and one.host_memory == two.host_memory
    assert one.sources["memory"] == "measured" and one.outside().high == 0
    with pytest.raises(PlanError, match="ranks = 0"):
        Machine.here(0)
