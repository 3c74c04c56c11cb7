"""The layout's arithmetic, by property."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.layout import ALIGN, Layout

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=12)


@given(shapes, st.integers(1, 9), st.sampled_from(["element", "tensor"]))
def test_every_element_is_in_exactly_one_place(shapes, parts, granularity):
    layout = Layout.plan([(f"p{i}", s) for i, s in enumerate(shapes)], parts, granularity)
    assert layout.used == sum(prod(s) for s in shapes)
    assert layout.numel >= layout.used and layout.numel % parts == 0 and layout.shard_numel % ALIGN == 0
    taken = sorted((s.offset, s.stop) for s in layout.slots if s.numel)
    assert all(a[1] <= b[0] for a, b in pairwise(taken)), "no overlap"
    assert all(lo >= 0 and hi <= layout.numel for lo, hi in taken)
    for i, slot in enumerate(layout.slots):
        pieces = [p for p in layout.pieces if p.slot == i]
        assert sum(p.numel for p in pieces) == slot.numel
        at = 0
        for p in pieces:
            assert p.start == at and p.offset == slot.offset + p.start
            assert p.shard == p.offset // layout.shard_numel == (p.offset + p.numel - 1) // layout.shard_numel
            at = p.stop
        if granularity == "tensor":
            assert len(pieces) <= 1
    gaps = sum(hi - lo for lo, hi in layout.gaps)
    assert gaps + layout.used == layout.numel


@given(shapes, st.integers(1, 9))
def test_element_layout_wastes_little(shapes, parts):
    layout = Layout.plan([(f"p{i}", s) for i, s in enumerate(shapes)], parts)
    assert layout.numel <= layout.used + ALIGN * (len(shapes) + parts)
    assert all(s.offset % ALIGN == 0 for s in layout.slots)


@given(shapes, st.integers(1, 9))
def test_tensor_layout_is_balanced(shapes, parts):
    """Longest processing time first: at most 4/3 of the best, plus alignment."""
    layout = Layout.plan([(f"p{i}", s) for i, s in enumerate(shapes)], parts, "tensor")
    padded = [-(-prod(s) // ALIGN) * ALIGN for s in shapes]
    best = max(max(padded), sum(padded) / parts, ALIGN)
    assert layout.shard_numel <= best * 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="parts"):
        Layout.plan([], 0)
    with pytest.raises(ValueError, match="granularity"):
        Layout.plan([("a", (1,))], 1, "row")
