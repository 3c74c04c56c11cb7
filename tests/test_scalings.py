"""Gradients that cross a link in few bits, after they were multiplied: what arrives is what they would have been."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.engine.scalings import Scaling, Scalings, factors_of, lowered, scale_

NUMBERS = st.floats(2.0**-20, 2.0**20, width=32)
SCALINGS = st.lists(st.tuples(NUMBERS, st.booleans(), st.booleans()), min_size=1, max_size=3)


def crossed(grads, scalings, dtype):
    """There and back: what the host has in the end."""
    low = lowered(grads, scalings, dtype)
    assert low.dtype is dtype or not scalings
    full = low.to(grads.dtype)
    scale_(full, scalings, factors_of(scalings, grads))
    return full


def scaled(grads, scalings):
    grads = grads.clone()
    for by, divide in scalings:
        grads.div_(by) if divide else grads.mul_(by)
    return grads


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([torch.float16, torch.bfloat16]), SCALINGS, st.integers(0, 1 << 20))
def test_nothing_is_lost_to_what_they_were_multiplied_by(dtype, drawn, seed):
    reduced = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(dtype).float()
    scalings = [Scaling(torch.tensor(by) if tensor else by, divide) for by, divide, tensor in drawn]
    want = scaled(reduced, scalings)
    if want.abs().max() < 1e30 and want[want != 0].abs().min() > 1e-30:
        assert torch.equal(crossed(want, scalings, dtype), want)


def test_small_gradients_survive_fp16():
    reduced = torch.full((4,), 2.0**-10)  # of a loss that was scaled by 2**16
    unscaled = reduced * 2.0**-16
    assert not unscaled.half().any()
    assert torch.equal(crossed(unscaled, [Scaling(torch.tensor(2.0**-16))], torch.float16), unscaled)


@pytest.mark.parametrize("by", [0.0, math.inf, math.nan, 1e-39])
def test_what_cannot_be_undone_crosses_as_it_is(by):
    grads = torch.tensor([1.0, -2.0, 0.5])
    for divide in (False, True):
        want = scaled(grads, [Scaling(by, divide)])
        found = crossed(want, [Scaling(torch.tensor(by), divide)], torch.bfloat16)
        torch.testing.assert_close(found, want, rtol=0.01, atol=1e-37, equal_nan=True)


def test_what_all_of_them_were_multiplied_by():
    done, by = Scalings(3), torch.tensor(2.0)
    for index in range(3):
        done.add(index, by)
        done.add(index, 0.5, divide=True)
    assert [s.by for s in done.common(range(3))] == [by, 0.5]
    done.add(1, 3.0)
    assert done.common(range(3)) == () and len(done.common([0, 2])) == 2
    done.forget(1)
    assert done.common(range(3)) == () and done.common([1]) == ()
    done.forget()
    assert done.common(range(3)) == done.common([]) == ()
