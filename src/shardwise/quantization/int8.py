"""The arithmetic of int8 weights: one fp32 scale per block of a row.

A block is ``BLOCK`` elements of one row of a matrix, the last one of a row maybe fewer. Its scale is its largest
absolute value over 127, and an element is its value over the scale, rounded: so none is further from what it was than
1/254 of the largest in its block. Blocks know nothing of each other: a matrix may be quantised in any parts.
"""

from __future__ import annotations

import torch

from shardwise.errors import UnitError

BLOCK = 128
"""Elements that share a scale, if nothing else is said: scales are 1/32 of the weights' bytes then."""
_LARGEST = 127
_AT_A_TIME = 1 << 18  # elements of fp32 that a core's cache holds


def blocks_of(columns: int, block: int) -> int:
    """Scales of a row."""
    return -(-columns // block)


def require_block(block: int) -> None:
    """Raise for a number of elements that cannot share a scale.

    Raises:
        UnitError: it is no power of two.
    """
    if block < 1 or block & (block - 1):
        raise UnitError(f"block={block}", fix="a power of two: so the shape of scales tells which one it is")


@torch.no_grad()
def quantized(values: torch.Tensor, block: int, where: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8 and scales, on its device.

    Args:
        values: ``(rows, columns)``, floating-point.
        where: what errors call it.

    Returns:
        ``(rows, columns)`` in int8, ``(rows, blocks)`` in fp32.

    Raises:
        UnitError: a value is infinite or NaN, which no scale can say.

    Cost: the result, and fp32 values of some rows.
    """
    rows, columns = values.shape
    out = torch.empty(rows, columns, dtype=torch.int8, device=values.device)
    scales = torch.empty(rows, blocks_of(columns, block), dtype=torch.float32, device=values.device)
    missing = scales.shape[1] * block - columns
    for lo, hi in row_parts(rows, columns):
        part = torch.nn.functional.pad(values[lo:hi].detach().to(torch.float32, copy=True), (0, missing))
        blocks = part.view(hi - lo, -1, block)
        steps = blocks.abs().amax(-1, keepdim=True).div_(_LARGEST)
        scales[lo:hi] = steps.squeeze(-1)
        blocks.div_(steps.masked_fill_(steps == 0, 1.0)).round_().clamp_(-_LARGEST, _LARGEST)
        out[lo:hi] = part[:, :columns]
    if not bool(torch.isfinite(scales).all()):
        raise UnitError("infinite or NaN: such weights cannot be quantised", where=where, fix="leave it out with skip=")
    return out, scales


@torch.no_grad()
def dequantized(weight: torch.Tensor, scales: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix that int8 and scales stand for: products in fp32, each rounded to ``dtype`` once.

    Args:
        weight: ``(rows, columns)``, int8.
        scales: ``(rows, blocks)``, fp32.

    Cost: the result, and fp32 values of some rows.
    """
    if torch.compiler.is_compiling():  # which makes one kernel of it
        return _times(weight.float(), scales, block).to(dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for lo, hi in row_parts(*weight.shape):
        if dtype == torch.float32:
            _times(out[lo:hi].copy_(weight[lo:hi]), scales[lo:hi], block)
        else:
            out[lo:hi].copy_(_times(weight[lo:hi].float(), scales[lo:hi], block))
    return out


def _times(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply each element by its block's scale, in place."""
    whole = values.shape[1] // block
    cut = whole * block
    if whole:
        values[:, :cut].unflatten(1, (whole, block)).mul_(scales[:, :whole, None])
    if cut < values.shape[1]:
        values[:, cut:].mul_(scales[:, whole:])
    return values


def dequantizing_bytes(numel: int, itemsize: int) -> int:
    """Bytes that :func:`dequantized` takes, for elements of so many bytes."""
    return numel * itemsize + (4 * min(numel, _AT_A_TIME) if itemsize != 4 else 0)


def row_parts(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows that are converted at a time."""
    each = max(1, _AT_A_TIME // max(columns, 1))
    return [(lo, min(lo + each, rows)) for lo in range(0, rows, each)]
