"""A model in less memory than its weights take; on several ranks they share it, each with prompts of its own.

shardwise launch --nproc 2 examples/larger_than_memory.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shardwise
from shardwise import PartialState
from shardwise.utils import broadcast_object_list, gather_object


def write_model(folder: Path) -> int:
    """Random weights where a real model's folder would be. Returns their bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def main(argv: list[str] | None = None) -> tuple[list[list[int]], bool]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=5)
    options = parser.parse_args(argv)

    state = PartialState()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_object_list([own])[0])  # rank 0's: all ranks read one folder, on a disk that all see
        size = write_model(folder) if state.is_main_process else 0
        (size,) = broadcast_object_list([size])
        memory = {"cpu": size // 2} if state.device.type == "cpu" else {0: size // 2, "cpu": size // 8}
        device_map = "split" if state.num_processes > 1 else "auto"
        model = shardwise.load(folder, device_map, max_memory=memory, length=32)
        state.print(model.shardwise_plan)

        prompts = [list(range(1, 4 + i)) for i in range(options.prompts)]  # token ids, of different lengths
        answers = []
        with shardwise.together(model), state.split_between_processes(prompts) as mine:
            for prompt in mine:  # one rank may have more of them than another, and longer ones
                ids = torch.tensor([prompt], device=state.device)
                out = model.generate(ids, max_new_tokens=2 + len(prompt), do_sample=False, pad_token_id=0)
                answers.append(out[0, len(prompt) :].tolist())
        answers = gather_object(answers)
        state.wait_for_everyone()  # before the folder goes
    for prompt, answer in zip(prompts, answers, strict=True):
        state.print(f"{prompt} -> {answer}")
    return answers, model.shardwise_plan.total("nvme") > 0


if __name__ == "__main__":
    main()
