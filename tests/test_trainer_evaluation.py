"""Evaluation and prediction: every sample once, in order, whatever the strategy, and nothing is left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranks import everywhere, run
from slowly import slow

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


def accuracy(found, compute_result=True):
    """A metric that depends on the order and the number of the samples."""
    guesses, labels = found.predictions.argmax(-1), found.label_ids
    weights = np.arange(1, len(labels) + 1)[:, None]
    return {"weighted": float(((guesses == labels) * weights).sum()), "rows": len(labels)}


def evaluated(folder, changes, own=True, rows=7, asked=("evaluate", "predict")):
    import transformers
    from accelerate.state import AcceleratorState

    import trainer_models as tm

    kinds = {} if own else {"make": transformers.Trainer}
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers another precision
    made = tm.trainer(
        folder, tm.data(4), eval_dataset=tm.data(rows, seed=5), compute_metrics=accuracy, **kinds, **changes
    )
    found = []
    if "evaluate" in asked:
        found.append({k: v for k, v in made.evaluate().items() if k in ("eval_loss", "eval_weighted", "eval_rows")})
    if "predict" in asked:
        told = made.predict(tm.data(rows, seed=6))
        found += [told.predictions, told.label_ids]
    return found


def agree(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, dict):
            assert one == pytest.approx(other, rel=1e-5)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", slow("zero1"), slow("zero2"), "zero3"])
def test_every_sample_once_in_order(tmp_path, strategy):
    changes = {"per_device_eval_batch_size": 1}
    (wanted,) = everywhere(1, evaluated, str(tmp_path), changes, False)
    for found in run(2, evaluated, str(tmp_path), changes | {"strategy": strategy}):
        agree(found, wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        slow({"eval_accumulation_steps": 2}),
        slow({"include_for_metrics": ["inputs", "loss"]}),
        {"bf16": True},
        {"bf16_full_eval": True},
        slow({"prediction_loss_only": True}),
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=str,
)
def test_a_short_last_batch_counts_for_what_it_has(tmp_path, changes):
    changes = {"per_device_eval_batch_size": 4} | changes
    asked = ("evaluate",) if "prediction_loss_only" in changes else ("evaluate", "predict")
    (wanted,) = everywhere(1, evaluated, str(tmp_path), changes, False, 7, asked)
    (found,) = everywhere(1, evaluated, str(tmp_path), changes | {"strategy": "ddp"}, True, 7, asked)
    agree(found, wanted)


def again_and_again(folder, strategy, precision):
    import trainer_models as tm

    made = tm.trainer(folder, tm.data(8), eval_dataset=tm.data(3), strategy=strategy, **precision)
    before = tm.values(made.model)
    counts, losses = [], []
    for _ in range(3):
        losses.append(made.evaluate()["eval_loss"])
        counts.append(left_behind(made))
    untouched = all(torch.equal(before[name], value) for name, value in tm.values(made.model).items())
    made.train()
    first, trained = left_behind(made), []
    for _ in range(2):
        made.evaluate()
        made.train()
        trained.append(left_behind(made))
    return counts, losses, untouched, first, trained


def left_behind(made):
    modules = list(made.model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    hooks += sum(len(p._backward_hooks or ()) for p in made.model.parameters())
    accelerator = made.accelerator
    return (
        hooks, len(accelerator._models), len(accelerator._optimizers), len(accelerator._dataloaders),
        len(accelerator._schedulers), len(accelerator._steps.loaders),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("ddp", {"bf16": True}), slow("ddp", {}), ("zero3", {}), slow("zero3", {"bf16": True})],
    ids=str,
)
def test_nothing_piles_up(tmp_path, strategy, precision):
    for counts, losses, untouched, first, trained in run(2, again_and_again, str(tmp_path), strategy, precision):
        assert len(set(counts)) == 1 and len(set(losses)) == 1
        assert untouched, "an evaluation in a half precision leaves the values that will be trained as they are"
        assert trained == [first, first]
