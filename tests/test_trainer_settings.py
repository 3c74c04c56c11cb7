"""Arguments of training: each gives the numbers that transformers' own Trainer gives in one process."""

from __future__ import annotations

import pytest
import torch

from models import PRESETS
from ranks import run

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
    "steps": {"max_steps": 4},
}  # fmt: skip


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


@pytest.mark.parametrize("name", SETTINGS)
def test_as_in_one_process(tmp_path, name):
    changes = SETTINGS[name]
    plain = {key: value for key, value in changes.items() if not key.startswith("fsdp")}
    ((losses, norms, values),) = run(1, settled, str(tmp_path), plain, False, 4, 24)
    own = changes if "fsdp" in changes else changes | {"strategy": PRESETS[len(name) % 4]}
    for found, found_norms, end in run(2, settled, str(tmp_path), own, True, 2, 24):
        assert found == pytest.approx(losses, rel=2e-5)
        assert found_norms == pytest.approx(norms, rel=2e-3)
        for key, value in values.items():
            torch.testing.assert_close(end[key], value, rtol=1e-3, atol=5e-5)
