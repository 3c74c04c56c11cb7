"""What ``front_ends.py`` starts on every rank: a training script with transformers' Trainer, and a loop by hand.

The script knows neither library: which one ``import accelerate`` means is the starter's affair.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from gpt import Shape

SHAPE = Shape()
LEARNING_RATE, CLIP = 3e-4, 1.0


class Turns(TrainerCallback):
    """Takes turns with other programs: a step begins when it is told to, and what it took is told when the next one
    would begin. So all that happens between two steps counts."""

    def __init__(self, address: str) -> None:
        self.line = Client(address, "AF_UNIX")
        self.begun: tuple[float, float] | None = None

    def pause(self) -> None:
        """Say what the last step took; wait until it is our turn."""
        if self.begun is not None:
            self.line.send((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))
        self.line.recv()
        self.begun = time.perf_counter(), time.process_time()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.pause()

    def end(self, loss: float, kind: str) -> None:
        """The last step is over."""
        assert self.begun is not None
        self.line.send((time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]))
        self.line.send((loss, kind))
        self.line.recv()  # nobody leaves while others still train


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Rows of random tokens, each a function of its index. ``uneven``: how many of them are labels is, too."""

    def __init__(self, rows: int, length: int, vocab: int = SHAPE.vocab, uneven: bool = False) -> None:
        self.rows, self.length, self.vocab, self.uneven = rows, length, vocab, uneven

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, self.vocab, (self.length,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        if self.uneven:
            labels[: 7 * (index * index % 8)] = -100
        return {"input_ids": ids, "labels": labels}


def make_model(shape: Shape = SHAPE) -> GPT2LMHeadModel:
    """A GPT-2 of the shape of the other benchmarks' models: an untied head, no dropout."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocab,
            n_positions=shape.context, tie_word_embeddings=False, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def arguments(options: dict[str, Any], folder: str) -> TrainingArguments:
    same: dict[str, Any] = {
        "report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "learning_rate": LEARNING_RATE, "max_grad_norm": CLIP, "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(output_dir=folder, **(same | options))


def through_trainer(turns: Turns, steps: int, options: dict[str, Any], length: int, folder: str) -> None:
    """An ordinary script."""
    args = arguments({"max_steps": steps, "per_device_train_batch_size": 1} | options, folder)
    trainer = Trainer(model=make_model(), args=args, train_dataset=Tokens(8 * steps, length), callbacks=[turns])
    found = trainer.train()
    wrapped, engine = trainer.model_wrapped, type(trainer.accelerator).__module__.split(".")[0]
    turns.end(found.training_loss, f"{type(wrapped).__name__}, {engine}")


def by_hand(turns: Turns, steps: int, options: dict[str, Any], length: int, folder: str) -> None:
    """What the same training is without a front end."""
    import shardwise

    shardwise.init(device="cpu")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = shardwise.fully_shard(make_model(), strategy=options["strategy"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    loader = torch.utils.data.DataLoader(
        Tokens(8 * steps, length), sampler=list(range(rank, steps * world, world)), batch_size=1
    )
    total = torch.zeros(())
    for batch in loader:
        turns.pause()
        loss = model(**batch, num_items_in_batch=length).loss  # as the Trainer divides it
        loss.backward()
        shardwise.clip_grad_norm_(model, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    turns.end(float(total) / steps, "by hand, shardwise")


def let_fsdp_run_on_a_cpu() -> None:
    """Accelerate turns FSDP into DDP there, without a word. This lets it take part at all."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def losses(steps: int, options: dict[str, Any], length: int, folder: str) -> None:
    """A few steps, whose losses and norms are written down."""
    more = {"max_steps": steps, "logging_strategy": "steps", "logging_steps": 1} | options
    trainer = Trainer(
        model=make_model(Shape(layers=2, width=64, heads=4, vocab=256)), args=arguments(more, folder),
        train_dataset=Tokens(64, length, vocab=256, uneven=True),
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [row for row in trainer.state.log_history if "grad_norm" in row]
        told = {"loss": [row["loss"] for row in logs], "norm": [row["grad_norm"] for row in logs]}
        (Path(folder) / "losses.json").write_text(json.dumps(told))


WAYS: dict[str, Callable[..., None]] = {"trainer": through_trainer, "hand": by_hand}


def main() -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1"))))
    told = json.loads(sys.argv[1])
    if told.pop("fsdp_on_cpu", False):
        let_fsdp_run_on_a_cpu()
    if told.pop("losses", False):
        losses(**told)
        return
    turns = Turns(told["address"])
    WAYS[told["way"]](turns, told["steps"], told["options"], told["length"], told["folder"])


if __name__ == "__main__":
    main()
