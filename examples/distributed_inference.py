"""Inference on many ranks: split the prompts, generate, bring the answers together in order.

shardwise launch --nproc 2 examples/distributed_inference.py
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shardwise import PartialState
from shardwise.utils import gather_object, set_seed


def main(argv: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=5)
    options = parser.parse_args(argv)

    state = PartialState()
    set_seed(0)  # random weights, the same on every rank; a real model would be loaded here
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).to(state.device).eval()

    prompts = [list(range(1, 4 + i)) for i in range(options.prompts)]  # token ids, of different lengths
    answers = []
    with state.split_between_processes(prompts) as mine:
        for prompt in mine:
            ids = torch.tensor([prompt], device=state.device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
            )
            answers.append(f"{prompt} -> {out[0, len(prompt) :].tolist()}")
    answers = gather_object(answers)  # in the order of the prompts
    for answer in answers:
        state.print(answer)
    return answers


if __name__ == "__main__":
    main()
