"""LoRA with PEFT: the base model is frozen and sharded, and only the adapters train and are saved.

pip install peft transformers
shardwise launch --nproc 2 --strategy zero3 examples/peft_lora.py --save /tmp/adapter
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import Accelerator
from shardwise.utils import set_seed


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save", default="", help="a folder for the adapter")
    options = parser.parse_args(argv)

    accelerator = Accelerator()
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj", "gate_proj"], lora_alpha=16)
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    rows = (torch.arange(4 * 8 * options.steps)[:, None] + torch.arange(12)) % 32
    loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for _, batch in zip(range(options.steps), loader, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    if options.save:
        state = accelerator.get_state_dict(model)  # a collective; whole on the main process
        if accelerator.is_main_process:
            adapter = get_peft_model_state_dict(model, state_dict=state)
            model.save_pretrained(options.save, state_dict=adapter)
        accelerator.wait_for_everyone()
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
