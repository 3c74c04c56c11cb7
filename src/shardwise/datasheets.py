"""What makers say of their accelerators, and of the machines they are usually built into. Facts only.

Rates of matrix products are dense: without the factor of two that data sheets print for structured sparsity. Links are
per direction: half of what data sheets print for both together. Two dies that torch shows as two devices are two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TERA, _GIGA = 1e12, 1e9
_GIB = 2**30


@dataclass(frozen=True)
class Datasheet:
    """One accelerator.

    Attributes:
        name: as the planner calls it.
        part: of the name that its driver gives such a device.
        kind: torch's device type; ROCm's devices are ``cuda`` there.
        memory: bytes on the sheet.
        usable: bytes that the driver leaves, as torch's out-of-memory errors state the total.
        flops: floating-point operations per second of matrix products by dtype; ``fp32`` without tensor cores where
            there is ``tf32``. What is not there the device cannot do at speed.
        bandwidth: bytes per second of its memory.
        link: bytes per second and direction to the other devices of a node.
        wire: what the link is: ``NVLink``, ``PCIe``, ``Infinity Fabric``.
        host_link: bytes per second and direction to its host.
        network: bytes per second and direction of a usual node to other nodes, all adapters together.
        host_bandwidth: bytes per second of the host memory of a usual node.
        source: name of the sheet that the figures are from.
        node: the machine that ``network`` and ``host_bandwidth`` are of.
    """

    name: str
    part: str
    kind: str
    memory: float
    usable: float
    flops: dict[str, float]
    bandwidth: float
    link: float
    wire: str
    host_link: float
    network: float
    host_bandwidth: float
    source: str
    node: str


_GEN3, _GEN4, _GEN5 = 15.75 * _GIGA, 31.5 * _GIGA, 63.0 * _GIGA  # PCIe with 16 lanes, 128b/130b
_NODES = {  # bytes per second of the network, of host memory
    "DGX H100 data sheet": (8 * 50 * _GIGA, 2 * 307.2 * _GIGA),  # 8 x 400 Gb/s; 2 x 8 channels of DDR5-4800
    "DGX B200 data sheet": (8 * 50 * _GIGA, 2 * 358.4 * _GIGA),  # 8 x 400 Gb/s; 2 x 8 channels of DDR5-5600
    "DGX A100 data sheet": (8 * 25 * _GIGA, 2 * 204.8 * _GIGA),  # 8 x 200 Gb/s; 2 x 8 channels of DDR4-3200
    "DGX-1 data sheet": (4 * 12.5 * _GIGA, 2 * 76.8 * _GIGA),  # 4 x 100 Gb/s; 2 x 4 channels of DDR4-2400
    "assumed: one adapter of 100 Gb/s, one socket": (12.5 * _GIGA, 204.8 * _GIGA),
    "assumed: 8 adapters of 400 Gb/s, two sockets": (8 * 50 * _GIGA, 2 * 307.2 * _GIGA),
}
_ONE, _EIGHT = list(_NODES)[-2:]


def _sheet(
    name: str, part: str, memory: float, usable: float, tera: dict[str, float], bandwidth: float, link: float,
    wire: str, host_link: float, node: str, source: str, kind: str = "cuda",
) -> Datasheet:  # fmt: skip
    """From GB, GiB, TFLOP/s and GB/s."""
    flops = {dtype: value * _TERA for dtype, value in tera.items()}
    network, host = _NODES[node]
    return Datasheet(name, part, kind, memory * _GIGA, usable * _GIB, flops, bandwidth * _GIGA, link * _GIGA, wire,
                     host_link, network, host, source, node)  # fmt: skip


def _halves(fp32: float, tf32: float | None, half: float, bf16: bool = True) -> dict[str, float]:
    out = {"fp32": fp32, "fp16": half}
    return out | ({"tf32": tf32} if tf32 is not None else {}) | ({"bf16": half} if bf16 else {})


_PCIE = _GEN4 / _GIGA
SHEETS = {
    sheet.name: sheet
    for sheet in (
        # Of several that could be meant by a device's name the first one is taken: longer names come first.
        _sheet("GB200", "GB200", 186, 184.0, _halves(80, 1250, 2500), 8000, 900, "NVLink", _GEN5,
               "DGX B200 data sheet", "NVIDIA GB200 NVL72 data sheet"),
        _sheet("B200", "B200", 180, 178.3, _halves(75, 1125, 2250), 7700, 900, "NVLink", _GEN5,
               "DGX B200 data sheet", "NVIDIA HGX B200 data sheet"),
        _sheet("H200", "H200", 141, 139.7, _halves(67, 494.5, 989), 4800, 450, "NVLink", _GEN5,
               "DGX H100 data sheet", "NVIDIA H200 data sheet (SXM)"),
        _sheet("H100-PCIe", "H100 PCIe", 80, 79.1, _halves(51, 378, 756), 2000, 63, "PCIe", _GEN5,
               _ONE, "NVIDIA H100 data sheet (PCIe)"),
        _sheet("H100-NVL", "H100 NVL", 94, 93.0, _halves(60, 417.5, 835), 3900, 63, "PCIe", _GEN5,
               _ONE, "NVIDIA H100 data sheet (NVL)"),
        _sheet("H100-80GB", "H100", 80, 79.1, _halves(67, 494.5, 989), 3350, 450, "NVLink", _GEN5,
               "DGX H100 data sheet", "NVIDIA H100 data sheet (SXM)"),
        _sheet("A100-40GB", "A100-SXM4-40GB", 40, 39.4, _halves(19.5, 156, 312), 1555, 300, "NVLink", _GEN4,
               "DGX A100 data sheet", "NVIDIA A100 data sheet (SXM 40 GB)"),
        _sheet("A100-80GB", "A100", 80, 79.1, _halves(19.5, 156, 312), 2039, 300, "NVLink", _GEN4,
               "DGX A100 data sheet", "NVIDIA A100 data sheet (SXM 80 GB)"),
        _sheet("L40S", "L40S", 48, 44.4, _halves(91.6, 183, 362), 864, _PCIE, "PCIe", _GEN4,
               _ONE, "NVIDIA L40S data sheet"),
        _sheet("L4", "L4", 24, 22.0, _halves(30.3, 60, 121), 300, _PCIE, "PCIe", _GEN4, _ONE, "NVIDIA L4 data sheet"),
        _sheet("A10", "A10", 24, 22.0, _halves(31.2, 62.5, 125), 600, _PCIE, "PCIe", _GEN4,
               _ONE, "NVIDIA A10 data sheet"),
        _sheet("T4", "T4", 16, 14.6, _halves(8.1, None, 65, bf16=False), 300, 15.75, "PCIe", _GEN3,
               _ONE, "NVIDIA T4 data sheet"),
        _sheet("V100-32GB", "V100-SXM2-32GB", 32, 31.7, _halves(15.7, None, 125, bf16=False), 900, 150, "NVLink",
               _GEN3, "DGX-1 data sheet", "NVIDIA V100 data sheet (SXM2)"),
        _sheet("V100-16GB", "V100", 16, 15.8, _halves(15.7, None, 125, bf16=False), 900, 150, "NVLink",
               _GEN3, "DGX-1 data sheet", "NVIDIA V100 data sheet (SXM2)"),
        _sheet("RTX-4090", "RTX 4090", 24, 23.5, _halves(82.6, 82.6, 165.2), 1008, _PCIE, "PCIe", _GEN4,
               _ONE, "NVIDIA Ada architecture white paper"),
        _sheet("RTX-3090", "RTX 3090", 24, 23.7, _halves(35.6, 35.6, 71), 936, _PCIE, "PCIe", _GEN4,
               _ONE, "NVIDIA GA102 white paper"),
        _sheet("MI300X", "MI300X", 192, 191.5, _halves(163.4, 653.7, 1307.4), 5300, 448, "Infinity Fabric", _GEN5,
               _EIGHT, "AMD Instinct MI300X data sheet"),
        _sheet("MI250X", "MI250X", 64, 63.9, _halves(47.9, None, 191.5), 1600, 200, "Infinity Fabric", _GEN4,
               _EIGHT, "AMD Instinct MI250X data sheet, one of its two dies"),
    )
}  # fmt: skip
"""By name. ``fp32`` of AMD's is that of its matrix cores, which computes in full precision."""


def of_device(name: str) -> Datasheet | None:
    """The sheet of a device by the name that its driver gives; ``None``: not known."""
    return next((sheet for sheet in SHEETS.values() if re.search(rf"\b{re.escape(sheet.part)}\b", name)), None)
