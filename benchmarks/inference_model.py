"""What the parts of ``inference.py`` share: the model and its files, what it is asked, a cold cache, a bare read."""

from __future__ import annotations

import copy
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

import shardwise
from shardwise.engine.hooks import engine_of
from shardwise.inference.budget import memory_beside
from shardwise.inference.plan import Weights, least
from shardwise.tiers.aligned import aligned_empty, padded
from shardwise.tiers.stored_files import StoredFiles

DROP = Path("/proc/sys/vm/drop_caches")
PIECE, BUFFERS = 64 << 20, 3  # of the bare read
ROOMY = 1 << 42  # bytes: any model fits
DIRECT = "direct I/O, past the page cache"


@dataclass(frozen=True)
class Shape:
    """A model of Llama's kind, fp32."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 1024

    def make(self) -> Any:
        import transformers

        heads = max(1, self.hidden // 128)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=256, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()


SMALL = Shape(256, 688, 8)  # its decoding has little to compute, so that hooks show
WARM = Shape(64, 172, 2)  # for what libraries allocate once


def write(shape: Shape, folder: Path) -> int:
    """Save a model with random weights; returns their bytes."""
    torch.manual_seed(0)
    model = shape.make()
    model.save_pretrained(folder, max_shard_size="1GB")
    os.sync()  # what is not written out yet cannot leave the page cache
    return sum(p.nbytes for p in model.parameters())


def in_memory(folder: Path) -> Any:
    """The model as transformers loads it."""
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def quiet() -> None:
    """No words and bars of transformers between ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# --- what a model is asked -----------------------------------------------------------------------
class Setting(NamedTuple):
    """One forward: ``tokens`` new ones of each of ``batch`` sequences, which have ``cached`` already."""

    name: str
    batch: int
    tokens: int
    cached: int


PREFILL, DECODE, MANY = (
    Setting("prefill", 1, 16, 0),
    Setting("decode", 1, 1, 16),
    Setting("decode, batch 32", 32, 1, 16),
)
SETTINGS = (PREFILL, DECODE, MANY)
LENGTH = 17  # tokens of the longest sequence


class Ask:
    """The same question to several models: ours has to answer bit for bit as the one in memory does.

    Others may have their weights at addresses that are aligned otherwise, and so add in another order.

    Args:
        model: in memory: says what is right.
        seed: of the prompt.
    """

    @torch.no_grad()
    def __init__(self, model: Any, setting: Setting, seed: int = 0) -> None:
        size = (setting.batch, setting.cached + setting.tokens)
        ids = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(seed))
        self.setting, self.ids, self.cache = setting, ids[:, setting.cached :], None
        if setting.cached:
            self.cache = model(ids[:, : setting.cached], use_cache=True).past_key_values
        self.expected: torch.Tensor | None = None
        self(model)

    @torch.no_grad()
    def __call__(self, model: Any, *, exact: bool = True) -> float:
        """Seconds of one forward.

        Args:
            exact: the answer has to be right to the last bit.

        Raises:
            AssertionError: another answer than that of the model in memory.
        """
        cache = copy.deepcopy(self.cache)  # a forward appends to it
        start = perf_counter()
        logits = model(self.ids, past_key_values=cache, use_cache=True).logits
        seconds = perf_counter() - start
        if self.expected is None:
            self.expected = logits
        elif not (torch.equal(logits, self.expected) if exact else torch.allclose(logits, self.expected, 1e-3, 1e-5)):
            off = (logits - self.expected).abs().max()
            raise AssertionError(f"{self.setting.name}: logits are not those of the model in memory (off by {off:.1e})")
        return seconds


# --- a loaded model ------------------------------------------------------------------------------
def reader(model: Any) -> StoredFiles:
    """What reads a loaded model's files."""
    engine = engine_of(model)
    return next(b for u in engine.units for b in u.buckets).reading.files  # type: ignore[union-attr, attr-defined]


def settle(model: Any) -> None:
    """Wait until what is read ahead has come: it would be in the way of others."""
    queue = reader(model)._queue
    while queue.active:
        time.sleep(0.001)


def least_memory(folder: Path, batch: int, length: int = LENGTH) -> int:
    """The smallest ``max_memory`` with which the model loads. Reads no weights."""
    model = shardwise.load(folder, {"": "disk"})
    plan = model.shardwise_plan
    moving = least([Weights(name, nbytes) for name, nbytes in plan.nbytes.items()])
    return int(1.01 * moving) + memory_beside(model, batch=batch, length=length)  # whole blocks of the disk


def steady(model: Any, ask: Ask) -> tuple[float, float]:
    """One forward of several in a row: what is read ahead of it is what it reads ahead for the next.

    Returns:
        Seconds, and those of them in which the disk was waited for.
    """
    ask(model)
    stats = reader(model).stats
    before = stats.wait_s
    seconds = ask(model)
    waited = stats.wait_s - before
    settle(model)
    return seconds, waited


def bytes_read(model: Any, ask: Ask) -> int:
    """What one forward of several in a row reads, this rank's part of it."""
    ask(model)
    settle(model)  # what is there ahead of this forward is as much as it leaves for the next
    begun = reader(model).stats.bytes_read
    ask(model)
    settle(model)
    return reader(model).stats.bytes_read - begun


# --- the disk ------------------------------------------------------------------------------------
class PageCache:
    """Has the system forget files, so that whoever reads them through the page cache reads them from the disk.

    Args:
        whole: empty all of it, where this process may.
    """

    def __init__(self, whole: bool = True) -> None:
        self.how = "posix_fadvise(DONTNEED) on the files"
        if whole:
            try:
                DROP.write_text("1\n")
                self.how = str(DROP)
            except OSError:  # not root, or a container
                pass

    def forget(self, folder: Path) -> None:
        if self.how == str(DROP):
            DROP.write_text("1\n")
            return
        for file in (f for f in folder.rglob("*") if f.is_file()):
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


class BareRead:
    """Files from beginning to end, by the threads that our loader has, into buffers that nobody looks at."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.reader = list(files), StoredFiles()
        self.nbytes = sum(f.stat().st_size for f in self.files)
        largest = max(padded(f.stat().st_size) for f in self.files)
        self.buffers = [aligned_empty(min(PIECE, largest)) for _ in range(BUFFERS)]
        for buffer in self.buffers:
            buffer.fill_(1)  # pages that are there

    def __call__(self) -> float:
        """Seconds."""
        coming: deque[Any] = deque()
        pieces = [(f, at) for f in self.files for at in range(0, f.stat().st_size, PIECE)]
        start = perf_counter()
        for i, (file, at) in enumerate(pieces):
            if len(coming) == BUFFERS:
                coming.popleft().wait()
            length = min(PIECE, padded(file.stat().st_size - at))
            coming.append(self.reader.read(file, at, self.buffers[i % BUFFERS][:length]))
        while coming:
            coming.popleft().wait()
        return perf_counter() - start

    def kept(self) -> float:
        """Seconds of a read into new memory, as large as the files: as whoever keeps what it reads."""
        start = perf_counter()
        buffers = [aligned_empty(padded(f.stat().st_size)) for f in self.files]
        for transfer in [self.reader.read(f, 0, b) for f, b in zip(self.files, buffers, strict=True)]:
            transfer.wait()
        return perf_counter() - start
