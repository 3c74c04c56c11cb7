"""Predictions that are generated: texts of different lengths on the ranks, under strategies that split parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranks import everywhere, run
from slowly import slow

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


class Echo:
    """Rows of which some end at once, so that a rank's texts are shorter than another's."""

    def __init__(self, count):
        g = torch.Generator().manual_seed(4)
        self.rows = [
            {"input_ids": torch.randint(3, 32, (6,), generator=g), "labels": torch.randint(3, 32, (5,), generator=g)}
            for _ in range(count)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def generated(folder, strategy, own=True, precision=None):
    import transformers
    from accelerate.state import AcceleratorState
    from transformers import T5Config, T5ForConditionalGeneration

    from shardwise.transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    lengths = []

    def metrics(found):
        lengths.append((found.predictions != 0).sum(-1).tolist())
        return {"rows": len(found.predictions), "sum": int(np.where(found.predictions > 0, found.predictions, 0).sum())}

    settings = {
        "use_cpu": True, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "learning_rate": 0.05,
        "max_steps": 6, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "predict_with_generate": True,
        "generation_max_length": 9,
    }  # fmt: skip
    kinds = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if own else (
        transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments
    )  # fmt: skip
    if own:
        settings["strategy"] = strategy
    made = kinds[0](
        model, kinds[1](str(folder), **settings), train_dataset=Echo(4), eval_dataset=Echo(5), compute_metrics=metrics
    )
    made.remove_callback(transformers.PrinterCallback)
    before = made.evaluate()
    if own:
        made.train()
    told = made.predict(Echo(5), max_length=9)
    return (before["eval_rows"], before["eval_sum"], round(before["eval_loss"], 4)), told.predictions.shape[0], lengths


@pytest.mark.parametrize("strategy", [slow("ddp"), "zero3"])
def test_generated_predictions(tmp_path, strategy):
    ((wanted, rows, _),) = everywhere(1, generated, str(tmp_path), strategy, False)
    for before, count, lengths in run(2, generated, str(tmp_path), strategy):
        assert before == wanted and count == rows == 5, "each sample once, though five do not go into two"
        assert len(set(lengths[0])) > 1 or len(set(lengths[1])) > 1, "texts of different lengths"
