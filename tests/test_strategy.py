"""The strategy table: parse, validate, explain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import NotAvailableYet, ShardwiseError, StrategyError
from shardwise.strategy import PRESETS, Strategy


@given(
    st.sampled_from(list(PRESETS)),
    st.sampled_from(["device", "cpu", "nvme"]),
    st.sampled_from([None, "bf16", "fp16"]),
    st.sampled_from(["element", "tensor"]),
    st.booleans(),
)
def test_string_form_round_trips(preset, home, dtype, layout, buffers):
    s = Strategy(preset, offload_optimizer=home, param_dtype=dtype, layout=layout, broadcast_buffers=buffers)
    assert Strategy.parse(str(s)) == s


def test_forms_agree():
    assert Strategy.parse("zero2, offload_optimizer=cpu") == Strategy("zero2", offload_optimizer="cpu")
    assert Strategy.parse(None) == Strategy() == Strategy("zero3")
    assert Strategy.parse("hsdp,shard_size=2,timeout=5").timeout == 5.0


MISTAKES = """
zero4 | zero3,what=1 | zero3,layout=row | zero3,shard_size=2 | layout=tensor | zero3,layout=tensor,layout=tensor
zero3,timeout=soon | zero3,timeout=0 | hsdp,shard_size=0 | zero1,offload_grads=nvme | zero3,broadcast_buffers=perhaps
"""


@pytest.mark.parametrize("text", ["", *MISTAKES.replace("\n", "|").strip("|").split("|")])
def test_mistakes_name_themselves(text):
    with pytest.raises(StrategyError) as error:
        Strategy.parse(text)
    assert isinstance(error.value, ShardwiseError) and isinstance(error.value, ValueError)
    assert len(str(error.value)) > 20


def test_a_strategy_that_is_chosen_for_you_is_not_there_yet():
    with pytest.raises(NotAvailableYet, match="planner"):
        Strategy.parse("auto")


@pytest.mark.parametrize("preset", PRESETS)
def test_explain_is_the_table_row(preset):
    text = Strategy(preset).explain()
    for state, split in zip(("parameters", "gradients", "optimizer state"), PRESETS[preset][:3], strict=True):
        line = next(row for row in text.splitlines() if row.strip().startswith(state))
        assert ("split over" in line) == split
        assert ("whole on every rank" in line) != split
    assert PRESETS[preset].known_as in text
