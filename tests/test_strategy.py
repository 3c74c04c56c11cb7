"""The strategy table: parse, validate, explain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ShardwiseError, StrategyError
from shardwise.strategy import PRESETS, Strategy


@given(
    st.sampled_from(list(PRESETS)),
    st.sampled_from(["device", "cpu", "nvme"]),
    st.sampled_from([None, "bf16", "fp16"]),
    st.sampled_from(["element", "tensor"]),
    st.booleans(),
    st.sampled_from([None, True, False]),
)
def test_string_form_round_trips(preset, home, dtype, layout, buffers, autocast):
    s = Strategy(preset, offload_optimizer=home, param_dtype=dtype, layout=layout, broadcast_buffers=buffers)
    s = s.replace(autocast=autocast if dtype else None)
    assert Strategy.parse(str(s)) == s


def test_forms_agree():
    assert Strategy.parse("zero2, offload_optimizer=cpu") == Strategy("zero2", offload_optimizer="cpu")
    assert Strategy.parse(None) == Strategy() == Strategy("zero3")
    assert Strategy.parse("hsdp,shard_size=2,timeout=5").timeout == 5.0


MISTAKES = """
zero4 | zero3,what=1 | zero3,layout=row | zero3,shard_size=2 | layout=tensor | zero3,layout=tensor,layout=tensor
zero3,timeout=soon | zero3,timeout=0 | hsdp,shard_size=0 | zero1,offload_grads=nvme | zero3,broadcast_buffers=perhaps
zero3,autocast=true | zero3,param_dtype=fp32,autocast=true | zero3,param_dtype=bf16,autocast=often
"""


@pytest.mark.parametrize("text", ["", *MISTAKES.replace("\n", "|").strip("|").split("|")])
def test_mistakes_name_themselves(text):
    with pytest.raises(StrategyError) as error:
        Strategy.parse(text)
    assert isinstance(error.value, ShardwiseError) and isinstance(error.value, ValueError)
    assert len(str(error.value)) > 20


@pytest.mark.parametrize("preset", PRESETS)
def test_explain_is_the_table_row(preset):
    text = Strategy(preset).explain()
    for state, split in zip(("parameters", "gradients", "optimizer state"), PRESETS[preset][:3], strict=True):
        line = next(row for row in text.splitlines() if row.strip().startswith(state))
        assert ("split over" in line) == split
        assert ("whole on every rank" in line) != split
    assert PRESETS[preset].known_as in text


def test_what_a_mixed_precision_makes_of_a_strategy():
    own = Strategy("zero3", param_dtype="bf16")
    assert own.in_precision("bf16") == own == own.in_precision(None), "a precision of its own is meant as it says"
    assert own.in_precision("no") == Strategy("zero3") == own.replace(autocast=True).in_precision("no")
    assert Strategy("zero3").in_precision("fp16") == Strategy.parse("zero3,param_dtype=fp16,autocast=true")
    assert "are cast to bf16" in own.explain()
    assert "torch.autocast" in own.replace(autocast=True).explain()
