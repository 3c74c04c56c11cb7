"""transformers' Trainer under any strategy: evaluated, saved in the middle of an epoch, and gone on with from there.

shardwise launch --nproc 2 --strategy zero2 examples/trainer.py --folder /tmp/run
shardwise launch --nproc 1 --strategy zero3 examples/trainer.py --folder /tmp/run --resume
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import PartialState
from shardwise.transformers import Trainer, TrainingArguments


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="for checkpoints and the trained model")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in it")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    numbers = (torch.arange(256)[:, None] + torch.arange(16)) % 32  # counting, from anywhere
    rows = [{"input_ids": row, "labels": row} for row in numbers]
    for n, row in enumerate(rows):  # of which a different number of tokens is learned from
        row["labels"] = row["labels"].masked_fill(torch.arange(16) < n % 9, -100)

    args = TrainingArguments(
        options.folder,
        strategy="zero3",  # where the launcher says nothing
        per_device_train_batch_size=2,
        gradient_accumulation_steps=16 // PartialState().num_processes,  # 32 rows a step, on as many ranks as there are
        num_train_epochs=3,
        learning_rate=2e-2,
        eval_strategy="epoch",
        save_steps=12,
        logging_steps=4,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows, eval_dataset=rows[::5])
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    main()
