"""Arguments of training: each gives the numbers that transformers' own Trainer gives in one process."""

from __future__ import annotations

import json

import pytest
import torch

from models import PRESETS
from ranks import everywhere, run
from slowly import slow

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

SETTINGS = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "recomputed": {"gradient_checkpointing": True},
    "recomputed, reentrant": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "not clipped": {"max_grad_norm": 0.0},
    "clipped hard": {"max_grad_norm": 0.01},
    "whole tensors": {"optim": "adafactor"},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "warmup, cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1},
    "last left out": {"dataloader_drop_last": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "tokens counted": {"include_num_input_tokens_seen": "all"},
    "averages": {"average_tokens_across_devices": True, "logging_steps": 3},
    "fsdp": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    "deepspeed": {
        "deepspeed": {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
        }
    },
    "steps": {"max_steps": 4},
}  # fmt: skip


OFTEN = ("label smoothing", "recomputed", "whole tensors", "workers", "last left out", "fsdp", "deepspeed")


def settled(folder, changes, own, accumulation, count=22):
    import transformers

    import trainer_models as tm

    kinds = {} if own else {"make": transformers.Trainer}
    made = tm.trainer(
        folder, tm.data(count), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        **kinds, **changes,
    )  # fmt: skip
    made.train()
    return tm.history(made), tm.history(made, "grad_norm"), tm.values(made.model)


@pytest.mark.parametrize("name", [name if name in OFTEN else slow(name) for name in SETTINGS])
def test_as_in_one_process(tmp_path, name):
    changes = SETTINGS[name]
    plain = {key: value for key, value in changes.items() if not key.startswith(("fsdp", "deepspeed"))}
    ((losses, norms, values),) = everywhere(1, settled, str(tmp_path), plain, False, 4, 24)
    own = changes if plain != changes else changes | {"strategy": PRESETS[len(name) % 4]}
    for found, found_norms, end in run(2, settled, str(tmp_path), own, True, 2, 24):
        assert found == pytest.approx(losses, rel=2e-5)
        assert found_norms == pytest.approx(norms, rel=2e-3)
        for key, value in values.items():
            torch.testing.assert_close(end[key], value, rtol=1e-3, atol=5e-5)


def by_a_file(folder, file, changes):
    import trainer_models as tm

    made = tm.trainer(folder, tm.data(16), gradient_accumulation_steps=2, deepspeed=file, **changes)
    made.train()
    inner = made.optimizer.optimizer
    return str(made.accelerator.strategy.preset), type(inner).__name__, inner.defaults["betas"], tm.history(
        made, "learning_rate"
    )  # fmt: skip


def test_optimizer_and_schedule_of_a_deepspeed_file(tmp_path):
    file = tmp_path / "ds.json"
    config = {
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
                "total_num_steps": "auto", "warmup_type": "linear",
            },
        },
    }  # fmt: skip
    file.write_text(json.dumps(config))
    for preset, kind, betas, rates in run(
        2, by_a_file, str(tmp_path), str(file), {"adam_beta2": 0.9, "warmup_steps": 4, "num_train_epochs": 2}
    ):
        assert (preset, kind, betas) == ("zero3", "FusedAdam", (0.9, 0.9))
        assert len(rates) == 8 and max(rates) == pytest.approx(5e-3) and rates[-1] < rates[4]


THREE = {"gradient_accumulation_kwargs": {"num_steps": 3}}


def refused(folder, changes, make=None):
    import trainer_models as tm
    from shardwise.errors import ShardwiseError

    try:
        made = tm.trainer(folder, tm.data(4), module=None if make is None else make(), **changes)
        made.get_train_dataloader()
    except ShardwiseError as error:
        return str(error)
    return "it was taken"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deepspeed": {"gradient_clipping": 0.5, "train_batch_size": 7}}, "is 0.5, and max_grad_norm 1.0"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}, "strategy": "zero2"}, "say the same thing twice"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}, "fsdp": True}, "fsdp= and deepspeed="),
        ({"fsdp": True, "strategy": "zero2"}, "say the same thing twice"),
        ({"strategy": "zero4"}, "zero4"),
        ({"strategy": "zero3", "bf16_full_eval": True}, "bf16=True computes in it"),
        ({"fsdp": True, "fsdp_config": {"xla": True}}, "TPUs"),
        ({"accelerator_config": {"even_batches": False}}, "the ranks have"),
        ({"accelerator_config": THREE, "gradient_accumulation_steps": 2}, "3 in accelerator_config"),
    ],
)  # fmt: skip
def test_refused_before_training(tmp_path, changes, said):
    rows = 2 if "accelerator_config" in changes else 1
    for message in run(rows, refused, str(tmp_path), {"per_device_train_batch_size": 4 if rows == 2 else 1} | changes):
        assert said in message and "fix:" in message, message
