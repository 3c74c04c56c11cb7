"""Laying gradients that lie apart end to end, in the order in which a reduce of several buckets sends them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.layout import Layout


class Packing:
    """The order of gradients in a message: shard by shard, and bucket by bucket within each.

    Args:
        layouts: of the buckets, all cut into as many shards.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        # Of each tensor in the message: which gradient, and which of its elements; all of them: ``None``.
        self._order: list[tuple[int, slice | None]] = []
        self._gaps: list[int] = []  # elements that nobody looks at; of gap k, gradient -1 - k
        first = [sum([len(layout.slots) for layout in layouts[:k]]) for k in range(len(layouts))]
        for shard in range(layouts[0].parts):
            for layout, before in zip(layouts, first, strict=True):
                self._add(layout, shard, before)
        self._nothing: list[torch.Tensor] = []  # the gaps; made with the first gradient

    def _add(self, layout: Layout, shard: int, before: int) -> None:
        at, end = shard * layout.shard_numel, (shard + 1) * layout.shard_numel
        for piece in layout.pieces:
            if piece.shard == shard:
                self._add_gap(piece.offset - at)
                whole = piece.numel == layout.slots[piece.slot].numel
                self._order.append((before + piece.slot, None if whole else slice(piece.start, piece.stop)))
                at = piece.offset + piece.numel
        self._add_gap(end - at)

    def _add_gap(self, numel: int) -> None:
        if numel:
            self._gaps.append(numel)
            self._order.append((-len(self._gaps), None))

    def ordered(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the message consists of, 1-D each.

        Args:
            grads: of all parameters, bucket by bucket, all of one dtype.
        """
        if not self._nothing:
            most = grads[0].new_zeros(max(self._gaps, default=0))
            self._nothing = [most[:numel] for numel in self._gaps[::-1]]
        flat = [grad.reshape(-1) for grad in grads]
        flat += self._nothing
        return [flat[i] if part is None else flat[i][part] for i, part in self._order]
