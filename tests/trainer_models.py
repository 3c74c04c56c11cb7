"""A small language model, data of uneven token counts, and the loop that a Trainer must equal, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from shardwise.transformers import Trainer, TrainingArguments

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
VOCAB = 32


def model(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB,
        max_position_embeddings=32, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def data(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of equal length, of which between one and eleven tokens count."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (12,), generator=g)
        labels = ids.clone()
        labels[: (5 * i) % 11] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "use_cpu": True, "per_device_train_batch_size": 1, "num_train_epochs": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "weight_decay": 0.1,
        "train_sampling_strategy": "sequential", "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(settings | changes))


def trainer(folder: Any, rows: Any, *, module: Any = None, make: Callable[..., Any] = Trainer, **changes: Any) -> Any:
    """A quiet Trainer of the small model; keywords that are no arguments of training go to its constructor."""
    own = {
        "eval_dataset",
        "callbacks",
        "compute_metrics",
        "data_collator",
        "model_init",
        "optimizers",
        "compute_loss_func",
    }
    given = {name: changes.pop(name) for name in own & changes.keys()}
    module = None if "model_init" in given else (model() if module is None else module)
    made = make(module, arguments(folder, **changes), train_dataset=rows, **given)
    made.remove_callback(transformers.PrinterCallback)
    return made


def history(made: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in made.state.log_history if key in entry]


def values(module: Any) -> dict[str, torch.Tensor]:
    """The whole state dict. A collective."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def windows(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def summed(module: Any, rows: list[Any]) -> tuple[torch.Tensor, int]:
    """The losses of all tokens that count, added up, and how many there are."""
    ids = torch.stack([row["input_ids"] for row in rows])
    labels = torch.stack([row["labels"] for row in rows])[:, 1:]
    logits = module(input_ids=ids).logits[:, :-1].float()
    loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


def alone(
    rows: list[Any], window: int, epochs: int = 2, lr: float = 5e-3, clip: float = 1.0, ranks: int = 0
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, plain PyTorch: each window one batch.

    Args:
        ranks: how many shares of a window have a mean of their own; 0: it is the mean over all tokens.

    Returns:
        The losses, and the values in the end.
    """
    module = model()
    decay = [p for n, p in module.named_parameters() if "norm" not in n]
    rest = [p for n, p in module.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = -(-len(rows) // window) * epochs
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    losses = []
    for _ in range(epochs):
        for batch in windows(rows, window):
            parts = [batch[r::ranks] for r in range(ranks)] if ranks else [batch]
            means = [total / count for total, count in (summed(module, part) for part in parts)]
            loss = torch.stack(means).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, values(module)
