"""Callbacks: the ranks go the same way, whoever asks for it."""

from __future__ import annotations

import pytest

from ranks import run
from slowly import slow

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


def stopped(folder, strategy, event, what, accumulation=2):
    """Rank 1 alone asks for something after its third step, or in the middle of it."""
    import transformers

    import trainer_models as tm
    from models import rank

    asked = {"times": 0, "evaluated": 0, "saved": 0}

    def ask(self, args, state, control, **kwargs):
        asked["times"] += 1
        if rank() == 1 and asked["times"] == 3:
            setattr(control, what, True)
        return control

    def count(self, args, state, control, **kwargs):
        asked["evaluated"] += 1

    def count_saved(self, args, state, control, **kwargs):
        asked["saved"] += 1

    parts = {"on_evaluate": count, "on_save": count_saved, event: ask}
    callback = type("Asks", (transformers.TrainerCallback,), parts)()
    made = tm.trainer(
        folder, tm.data(16), eval_dataset=tm.data(4), strategy=strategy, gradient_accumulation_steps=accumulation,
        callbacks=[callback], num_train_epochs=2,
    )  # fmt: skip
    made.train()
    return made.state.global_step, asked["evaluated"], asked["saved"], tm.history(made)


@pytest.mark.parametrize(
    ("strategy", "event", "what", "steps", "evaluated", "saved"),
    [
        ("ddp", "on_step_end", "should_training_stop", 3, 0, 0),
        ("zero3", "on_substep_end", "should_training_stop", 2, 0, 0),
        slow("zero3", "on_step_end", "should_epoch_stop", 7, 0, 0),
        slow("zero1", "on_step_end", "should_evaluate", 8, 1, 0),
        ("zero2", "on_step_end", "should_save", 8, 0, 1),
        slow("ddp", "on_log", "should_training_stop", 3, 0, 0),
    ],
)
def test_one_rank_asks(tmp_path, strategy, event, what, steps, evaluated, saved):
    first, second = run(2, stopped, str(tmp_path), strategy, event, what)
    assert first == second and first[:3] == (steps, evaluated, saved)


def patient(folder, strategy):
    import transformers

    import trainer_models as tm

    made = tm.trainer(
        folder, tm.data(16), eval_dataset=tm.data(4), strategy=strategy, learning_rate=1e-9, num_train_epochs=8,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
        callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1.0)],
    )  # fmt: skip
    made.train()
    return made.state.global_step


def test_early_stopping(tmp_path):
    first, second = run(2, patient, str(tmp_path), "zero3")
    assert first == second == 3
