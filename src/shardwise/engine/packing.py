"""Laying gradients that lie apart end to end, in the order in which a reduce of several buckets sends them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.layout import Layout, row_strides
from shardwise.tiers import Buffer, Ledger


class Packing:
    """The order of gradients in a message: shard by shard, and bucket by bucket within each.

    The message has its memory from :meth:`pack` to :meth:`free`. Views of it are made once.

    Args:
        layouts: of the buckets, all cut into as many shards.
        dtype, device: of the message.
        ledger: counts its bytes.

    Attributes:
        idle: no message is under way.
    """

    def __init__(self, layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device, ledger: Ledger) -> None:
        self._layouts, self._kind, self._ledger = layouts, (dtype, device), ledger
        self._buffer: Buffer | None = None
        self._targets: list[torch.Tensor] = []  # views of the message: one per gradient that lies in one shard,
        self._whole: list[int] = []  # which they are of;
        self._parts: list[tuple[int, slice]] = []  # then one per part of the others,
        self._gaps: list[torch.Tensor] = []  # and elements that nobody looks at
        self.idle = True

    def _make(self) -> Buffer:
        layouts = self._layouts
        buffer = self._buffer = Buffer(
            sum(layout.numel for layout in layouts), *self._kind, "gather_buffers", self._ledger
        )
        flat, at, cut = buffer.tensor, 0, list[torch.Tensor]()
        for shard in range(layouts[0].parts):
            before = 0
            for layout in layouts:
                start, end = shard * layout.shard_numel, (shard + 1) * layout.shard_numel
                shift = at - start  # from places in the bucket to places in the message
                for piece in (p for p in layout.pieces if p.shard == shard):
                    if piece.offset > start:
                        self._gaps.append(flat[shift + start : shift + piece.offset])
                    begin, slot = shift + piece.offset, layout.slots[piece.slot]
                    if piece.numel == slot.numel:
                        self._whole.append(before + piece.slot)
                        # One view, not a view of a view: where tensors have no values, the latter keeps the former.
                        self._targets.append(flat.as_strided(slot.shape, row_strides(slot.shape), begin))
                    else:
                        self._parts.append((before + piece.slot, slice(piece.start, piece.stop)))
                        cut.append(flat[begin : begin + piece.numel])
                    start = piece.offset + piece.numel
                if end > start:
                    self._gaps.append(flat[shift + start : shift + end])
                at += layout.shard_numel
                before += len(layout.slots)
        self._targets += cut
        buffer.owners = len(self._targets) + len(self._gaps)
        return buffer

    @torch.no_grad()
    def pack(self, grads: Sequence[torch.Tensor], share: float) -> torch.Tensor:
        """``(numel,)`` the message.

        Args:
            grads: of all parameters, bucket by bucket.
            share: by which they are multiplied.
        """
        buffer = self._buffer
        if buffer is None:
            buffer = self._make()
        else:
            buffer.fill()
        self.idle = False
        sources = [grads[i] for i in self._whole]
        sources += [grads[i].reshape(-1)[part] for i, part in self._parts]
        torch._foreach_copy_(self._targets, sources)
        if self._gaps:
            torch._foreach_zero_(self._gaps)
        return buffer.tensor.mul_(share)

    def free(self) -> None:
        """The message is not needed any more."""
        assert self._buffer is not None
        self.idle = True
        self._buffer.release()
