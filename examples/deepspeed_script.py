"""A fine-tuning script as people write them for DeepSpeed, with its import changed.

shardwise deepspeed --num_gpus 2 examples/deepspeed_script.py --save /tmp/tuned
shardwise deepspeed --num_gpus 2 examples/deepspeed_script.py --save /tmp/tuned --deepspeed_config ds_config.json

A causal language model of transformers is built in parts (``zero.Init``), trained under ZeRO-3 with accumulation,
clipping, a schedule and activation checkpointing, saved after each epoch, and written for ``from_pretrained`` at the
end. A second run with the same ``--save`` goes on where the first one stopped, on any number of ranks and under any
stage.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import shardwise.deepspeed as deepspeed  # was: import deepspeed

CONFIG = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 5}},
    "steps_per_print": 1000,
}


def groups(model: torch.nn.Module) -> list[dict]:
    """Matrices decay, vectors do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = {name for name, _ in named if not name.endswith(("bias", "norm.weight"))}
    return [
        {"params": [p for name, p in named if name in decays]},
        {"params": [p for name, p in named if name not in decays], "weight_decay": 0.0},
    ]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3, help="in all runs together")
    parser.add_argument("--save", default="", help="a folder for checkpoints and the trained model")
    parser.add_argument("--local_rank", type=int, default=-1)  # some launchers pass it
    parser = deepspeed.add_config_arguments(parser)
    options = parser.parse_args(argv)

    deepspeed.init_distributed()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    with deepspeed.zero.Init(config_dict_or_path=options.deepspeed_config or CONFIG):
        model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    engine, *_ = deepspeed.initialize(
        args=options,
        model=model,
        model_parameters=groups(model),
        config=None if options.deepspeed_config else CONFIG,
    )
    done = 0
    if options.save:
        _, state = engine.load_checkpoint(options.save)  # (None, None) if there is none
        done = state["epochs"] if state else 0

    rows = (torch.arange(64)[:, None] + torch.arange(16)) % 32  # counting, from anywhere
    sampler = DistributedSampler(rows, deepspeed.comm.get_world_size(), deepspeed.comm.get_rank())
    loader = DataLoader(rows, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    losses: list[float] = []  # of each step, over all ranks
    mean = torch.zeros((), device=engine.device)
    for epoch in range(done, options.epochs):
        sampler.set_epoch(epoch)
        for ids in loader:
            ids = ids.to(engine.device)
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            mean += loss.detach() / engine.gradient_accumulation_steps()
            if engine.is_gradient_accumulation_boundary():
                deepspeed.comm.all_reduce(mean)
                losses.append(mean.item() / deepspeed.comm.get_world_size())
                mean.zero_()
            engine.step()
        if options.save:
            engine.save_checkpoint(options.save, client_state={"epochs": epoch + 1})
    if options.save:
        engine.save_16bit_model(options.save, "model.safetensors")
        if deepspeed.comm.get_rank() == 0:
            config.save_pretrained(Path(options.save))
    if deepspeed.comm.get_rank() == 0 and losses:
        print(f"loss {losses[-1]:.3f} after {engine.global_steps} steps")
    engine.destroy()
    return losses


if __name__ == "__main__":
    main()
