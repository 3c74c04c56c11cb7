"""What a Trainer saves, what it loads, and how it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import PRESETS
from ranks import run

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
SAVING = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}


def whole(folder, strategy, accumulation, changes=None):
    """A run of 2 epochs of 20 rows in windows of 8, whose every second step is saved."""
    import trainer_models as tm

    settings = SAVING | {"strategy": strategy, "gradient_accumulation_steps": accumulation} | (changes or {})
    made = tm.trainer(folder, tm.data(20), **settings)
    made.train()
    return tm.history(made), tm.values(made.model), sorted(p.name for p in Path(folder).glob("checkpoint-*"))


def resumed(folder, strategy, accumulation, checkpoint, changes=None):
    """A run that goes on from a folder, with a model whose values are other ones."""
    import trainer_models as tm

    settings = {"strategy": strategy, "gradient_accumulation_steps": accumulation} | SAVING | (changes or {})
    made = tm.trainer(folder, tm.data(20), module=tm.model(seed=7), **settings)
    made.train(resume_from_checkpoint=f"{folder}/{checkpoint}")
    return tm.history(made), tm.values(made.model)


def same(found, wanted, exact):
    for name, value in wanted.items():
        if exact:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", PRESETS)
def test_going_on_in_the_middle_of_an_epoch(tmp_path, strategy):
    (losses, values, folders), _ = run(2, whole, str(tmp_path), strategy, 4)
    assert folders == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and len(losses) == 6
    for found, end in run(2, resumed, str(tmp_path), strategy, 4, "checkpoint-4"):
        assert found == losses, "the log holds the steps before, and those after are the same to the bit"
        same(end, values, exact=True)


@pytest.mark.parametrize(
    ("before", "after", "ranks"), [("zero3", "ddp", 1), ("zero1", "zero3", 1), ("ddp", "zero2", 4)]
)
def test_going_on_under_another_strategy_on_other_ranks(tmp_path, before, after, ranks):
    (losses, values, _), _ = run(2, whole, str(tmp_path), before, 4)
    for found, end in run(ranks, resumed, str(tmp_path), after, 8 // ranks, "checkpoint-2"):
        assert found == pytest.approx(losses, rel=1e-5)
        same(end, values, exact=False)
