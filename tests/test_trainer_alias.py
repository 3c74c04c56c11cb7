"""A script with transformers' own Trainer, not changed, where ``import accelerate`` means Shardwise."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from ranks import everywhere, run

# Not imported here: the ranks import this file before they say what accelerate is.
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "accelerate")), reason="transformers is not installed"
)


def unchanged(folder):
    """What the script logs under each strategy of the launcher, and by a DeepSpeed file of its own."""
    import shardwise

    shardwise.install_as("accelerate", "deepspeed")
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    transformers.utils.logging.set_verbosity_error()
    ids = torch.randint(3, 32, (20, 12), generator=torch.Generator().manual_seed(1))
    rows = []
    for n, row in enumerate(ids):
        labels = row.clone()
        labels[: (5 * n) % 11] = -100
        rows.append({"input_ids": row, "labels": labels})

    def script(**changes):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        args = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=5e-3,
            logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=2, weight_decay=0.1,
            train_sampling_strategy="sequential", num_train_epochs=2, **changes,
        )  # fmt: skip
        made = Trainer(LlamaForCausalLM(config), args, train_dataset=rows, eval_dataset=rows[:3])
        made.remove_callback(transformers.PrinterCallback)
        made.train()
        losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        made.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
        again = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
        return made.accelerator.strategy.preset, losses, again, type(made) is Trainer, isinstance(made, Trainer)

    found = []
    for preset in ("zero1", "zero3"):
        os.environ["SHARDWISE_STRATEGY"] = preset
        found.append(script())
    del os.environ["SHARDWISE_STRATEGY"]
    file = {
        "zero_optimization": {"stage": 3},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    }
    found.append(script(deepspeed=file))
    found.append(script(fsdp=True))
    return found


def wanted():
    import trainer_models as tm

    return tm.alone(tm.data(20), 8)[0]


def test_a_script_that_was_not_changed(tmp_path):
    (losses,) = everywhere(1, wanted)
    first, second = run(2, unchanged, str(tmp_path), fresh=True)
    assert first == second
    assert [preset for preset, *_ in first] == ["zero1", "zero3", "zero3", "zero3"]
    for _, found, again, _, is_one in first:
        assert is_one and again == found, "the second training goes on from the middle of the first one"
    for _, found, *_ in [*first[:2], first[3]]:
        assert found == pytest.approx(losses, rel=2e-5)
    assert first[2][1][0] == pytest.approx(losses[0], rel=2e-5)
