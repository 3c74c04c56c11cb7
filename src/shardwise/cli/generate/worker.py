"""One rank of ``generate``: ``python -m shardwise.cli.generate.worker JOB`` under the launcher, or :func:`work`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import shardwise
from shardwise.cli.console import say
from shardwise.cli.generate import texts, told
from shardwise.cli.generate.answers import Writer
from shardwise.cli.generate.job import Job
from shardwise.cli.generate.measure import Meter
from shardwise.comm import World
from shardwise.errors import ShardwiseError
from shardwise.inference.load import load
from shardwise.inference.uneven import together

REFUSED = 2
_LOOK_S = 0.2  # between two looks whether the launcher lives
_SAY_S = 10.0  # between two lines about how far it is


def work(job: Job) -> bool:
    """Answer this rank's share of the prompts. Collective.

    Returns:
        Whether there was anything to begin with; if not, the command has been told why not.

    Raises:
        ShardwiseError: it failed while it ran.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, tokenizer, ids, load_s = _prepare(job)
    except ShardwiseError as error:
        told.refuse(Path(job.scratch), error)
        return False
    world, plan = World.current(), model.shardwise_plan
    if world.rank == 0:
        say(str(plan))
    meter = Meter(model, plan)
    # Ranks that each have the whole model have nothing to wait for, least of all in a collective that times out.
    with together(model) if plan.parts > 1 else nullcontext():
        if job.out is None:
            _show(model, tokenizer, ids[0], job, meter)
        else:
            _answer(model, tokenizer, ids, job, meter)
        facts = meter.facts(load_s)  # here: what follows is the time of the others
    told.tell(Path(job.scratch), world.rank, facts)
    return True


def _prepare(job: Job) -> tuple[Any, Any, list[list[int]], float]:
    """Everything that can be wrong before the first token."""
    texts_there = any(p.ids is None for p in job.prompts)
    tokenizer = texts.tokenizer_of(Path(job.folder)) if texts_there else None
    ids = texts.encode(job.prompts, tokenizer)
    length = texts.check_lengths(job.prompts, ids, job.max_new_tokens, job.length)
    begun = time.perf_counter()
    model = load(
        job.folder, job.device_map, max_memory=job.max_memory, dtype=job.dtype, batch=job.batch, length=length,
        quantization=job.quantization,
    )  # fmt: skip
    load_s = time.perf_counter() - begun
    if not hasattr(model, "generate"):
        raise ShardwiseError(f"{type(model).__name__} writes no texts", where=job.folder, fix="give a causal LM")
    texts.check_model(job.prompts, ids, job.max_new_tokens, model.config)
    beams = {"num_beams": model.generation_config.num_beams, **job.sampling}["num_beams"]
    if (beams or 1) > 1:
        raise ShardwiseError(f"its generation_config.json asks for {beams} beams, of which none is the text until the "
                             "end", where=job.folder, fix="--greedy, or --temperature 1")  # fmt: skip
    return model, tokenizer, ids, load_s


def _generate(model: Any, ids: list[list[int]], job: Job, seed: int, stream: texts.Stream) -> list[list[int]]:
    """The new tokens of each text."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pad = next((i for i in (config.pad_token_id, *ends) if i is not None), 0)
    inputs = texts.padded(ids, pad, model.device)
    torch.manual_seed(seed)
    out = model.generate(
        **inputs, **job.sampling, max_new_tokens=job.max_new_tokens, pad_token_id=pad, streamer=stream
    )  # fmt: skip
    return [texts.until_end(row, ends) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]


def _show(model: Any, tokenizer: Any, ids: list[int], job: Job, meter: Meter) -> None:
    """All ranks compute the one text; the first shows it."""
    shown = None
    if World.current().rank == 0:
        shown = texts.Words(tokenizer) if tokenizer is not None else texts.Numbers()
    (new,) = _generate(model, [ids], job, job.seed, texts.Stream(meter.token, shown))
    meter.tokens += len(new)


def _answer(model: Any, tokenizer: Any, ids: list[list[int]], job: Job, meter: Meter) -> None:
    """Every N-th batch is this rank's."""
    world, begun, done = World.current(), time.monotonic(), 0
    batches = [range(k, min(k + job.batch, len(ids))) for k in range(0, len(ids), job.batch)]
    mine = batches[world.rank :: world.size]
    writer = Writer(Path(f"{job.out}-{world.rank}"))
    try:
        for batch in mine:
            seed = job.seed + job.prompts[batch[0]].number
            found = _generate(model, [ids[k] for k in batch], job, seed, texts.Stream(meter.token))
            writer.write(_as_answer(job.prompts[k], new, tokenizer) for k, new in zip(batch, found, strict=True))
            meter.tokens += sum(map(len, found))
            done += 1
            if world.rank == 0 and time.monotonic() - begun > _SAY_S:
                begun = time.monotonic()
                say(f"shardwise: rank 0 has done {done:,} of its {len(mine):,} batches")
    finally:
        writer.close()


def _as_answer(prompt: Any, new: list[int], tokenizer: Any) -> dict[str, Any]:
    if prompt.ids is not None:
        return {"id": prompt.id, "ids": new}
    return {"id": prompt.id, "text": tokenizer.decode(new, skip_special_tokens=True)}


@contextmanager
def _ends_with(launcher: int) -> Iterator[None]:
    """End this process when the one that waits for it has ended, however that did."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_S):
            if os.getppid() != launcher:
                os._exit(1)

    threading.Thread(target=look, name="shardwise-launcher", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def main(job: Job) -> int:
    """Run a rank that is a process of its own. Returns its exit code."""
    with _ends_with(job.launcher):
        shardwise.init()
        begun = work(job)
        if begun and dist.is_initialized():
            dist.destroy_process_group()
    return 0 if begun else REFUSED


if __name__ == "__main__":
    sys.exit(main(Job.read(Path(sys.argv[1]))))
