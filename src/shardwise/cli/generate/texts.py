"""Between texts and tokens, and tokens as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from shardwise.cli.generate.prompts import Prompt
from shardwise.errors import CheckpointError, DataError, first_line


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot read its tokenizer: {first_line(error)}",
            where=str(folder),
            fix="save it anew (tokenizer.save_pretrained), or give tokens: --ids",
        ) from error


def encode(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """The tokens of prompts.

    Args:
        tokenizer: ``None`` if all of them are tokens.

    Raises:
        DataError: a text has no tokens.
    """
    out = []
    for prompt in prompts:
        ids = prompt.ids if prompt.ids is not None else tokenizer(prompt.text)["input_ids"]
        if not ids:
            raise DataError("the prompt has no tokens", where=prompt.where, fix="give one that is not empty")
        out.append(list(ids))
    return out


def check_lengths(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], new: int, length: int | None) -> int:
    """How long the longest text becomes.

    Args:
        ids: the tokens of each prompt.
        new: tokens that are added.
        length: what was asked for.

    Raises:
        DataError: a text becomes longer than that.
    """
    for prompt, its in zip(prompts, ids, strict=True):
        if length is not None and len(its) + new > length:
            raise DataError(f"{len(its)} tokens and {new} new ones are more than --length {length}", where=prompt.where,
                            fix=f"--length {len(its) + new}, or a shorter prompt")  # fmt: skip
    return length if length is not None else max(map(len, ids)) + new


def check_model(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], new: int, config: Any) -> None:
    """Can a model with this configuration take these tokens?

    Raises:
        DataError: it has no such token, or not as many positions.
    """
    config = getattr(config, "text_config", None) or config
    vocabulary = getattr(config, "vocab_size", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    positions = None if rotary else getattr(config, "max_position_embeddings", None)
    for prompt, its in zip(prompts, ids, strict=True):
        if isinstance(vocabulary, int) and max(its) >= vocabulary:
            raise DataError(f"token {max(its)} is none of the model's {vocabulary}", where=prompt.where,
                            fix="give tokens of this model's own tokenizer")  # fmt: skip
        if isinstance(positions, int) and len(its) + new > positions:
            raise DataError(f"{len(its)} tokens and {new} new ones are more than the model's {positions} positions",
                            where=prompt.where, fix="a shorter prompt, or fewer --max-new-tokens")  # fmt: skip


def padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts of several lengths as arguments of ``generate``: padded on the left, and not looked at there."""
    width = max(map(len, ids))
    rows = [[pad] * (width - len(its)) + list(its) for its in ids]
    seen = [[0] * (width - len(its)) + [1] * len(its) for its in ids]
    return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(seen, device=device)}


def until_end(ids: Iterable[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the first one that ends a text, which is the last of them."""
    out = []
    for token in ids:
        out.append(token)
        if token in ends:
            break
    return out


class Stream(BaseStreamer):
    """Hears of each token as it comes.

    Args:
        came: called for each, of all texts of a batch together.
        shown: prints them, if somebody does.
    """

    def __init__(self, came: Callable[[], None], shown: BaseStreamer | None = None) -> None:
        self._came, self._shown, self._prompt = came, shown, True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
        else:
            self._came()
        if self._shown is not None:
            self._shown.put(value)

    def end(self) -> None:
        if self._shown is not None:
            self._shown.end()


class Words(TextStreamer):
    """Prints a text word by word. A terminal gets no control characters."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if sys.stdout.isatty():
            text = "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
        super().on_finalized_text(text, stream_end)


class Numbers(BaseStreamer):
    """Prints tokens as numbers."""

    def __init__(self) -> None:
        self._count = -1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self._count += 1
        if self._count:
            print(" " * (self._count > 1) + str(int(value.view(-1)[0])), end="", flush=True)

    def end(self) -> None:
        print(flush=True)
