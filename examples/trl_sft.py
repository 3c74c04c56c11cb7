"""Supervised fine-tuning with trl: its own trainer and arguments, with mixins of Shardwise before them.

pip install trl
shardwise launch --nproc 2 --strategy zero3 examples/trl_sft.py --save /tmp/model

A script that you do not want to change runs too: shardwise launch --as accelerate --strategy zero3 script.py
"""

import argparse
import itertools
import tempfile
from dataclasses import dataclass

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from shardwise.transformers import ShardwiseArguments, ShardwiseMixin
from shardwise.utils import set_seed

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass
class Config(ShardwiseArguments, SFTConfig):
    """SFTConfig with ``strategy``; the launcher's wins over it."""


class Trainer(ShardwiseMixin, SFTTrainer):
    """SFTTrainer, trained by Shardwise."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, made here: nothing is downloaded."""
    words = ["<pad>", "<eos>", "<unk>", *NUMBERS, "after", "comes", "."]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", default="", help="a folder for the model")
    options = parser.parse_args(argv)

    set_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    texts = [f"after {one} comes {other} ." for one, other in itertools.pairwise(NUMBERS)]
    trainer = Trainer(
        LlamaForCausalLM(config),
        args=Config(
            output_dir=options.save or tempfile.gettempdir(),
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in texts * 16]),
        processing_class=words,
    )
    trainer.train()
    if options.save:
        trainer.save_model()  # whole, as from_pretrained reads it
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    trainer.accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
