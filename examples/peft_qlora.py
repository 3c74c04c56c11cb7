"""QLoRA with PEFT and transformers' Trainer: the frozen model is in int8 and split, the adapters train.

pip install peft transformers
shardwise launch --nproc 2 --strategy zero3 examples/peft_qlora.py --save /tmp/adapter
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import shardwise
from shardwise.transformers import Trainer, TrainingArguments
from shardwise.utils import set_seed


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", default="", help="a folder for the adapter")
    options = parser.parse_args(argv)

    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    shardwise.quantize(model)  # a byte per weight, but for the head
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "gate_proj"]))

    rows = (torch.arange(640)[:, None] + torch.arange(12)) % 32
    arguments = TrainingArguments(
        options.save or tempfile.gettempdir(),
        strategy="zero3",  # the launcher's wins
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    if options.save:
        trainer.save_model()  # the adapter alone, as PeftModel.from_pretrained reads it
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    trainer.accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
