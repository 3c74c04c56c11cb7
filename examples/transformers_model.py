"""A transformers model under any strategy, with random weights from its config, saved for ``from_pretrained``.

shardwise launch --nproc 2 --strategy zero3 --mixed-precision bf16 examples/transformers_model.py --save /tmp/llama
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from shardwise import Accelerator
from shardwise.utils import set_seed


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", default="", help="a folder for the trained model")
    options = parser.parse_args(argv)

    accelerator = Accelerator()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 5, options.steps)
    rows = (torch.arange(4 * 8 * options.steps)[:, None] + torch.arange(16)) % 32  # counting, from anywhere
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    model.train()
    for _, batch in zip(range(options.steps), loader, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    last = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"loss {last:.3f} after {options.steps} steps")

    if options.save:
        accelerator.save_model(model, options.save)
        if accelerator.is_main_process:
            model.config.save_pretrained(options.save)
        accelerator.wait_for_everyone()
    return last


if __name__ == "__main__":
    main()
