"""Weights that anybody saved, straight into the shards of a model.

Which stored tensor is which of the model's: sections, prefixes of wrappers and of base models, tied names.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.checkpoint.coordination import CollectiveBlock, Progress, all_gather_bytes, broadcast_text
from shardwise.checkpoint.directory import locate_verified
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.incomplete_load import incomplete_on_error, recovery
from shardwise.checkpoint.manifest import BLOCK, MANIFEST
from shardwise.checkpoint.model_state import ModelState, model_states
from shardwise.checkpoint.saving import settle_saves
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import KINDS, Section, Source, Stored
from shardwise.comm import World
from shardwise.engine.state_dict import held, publish, units_of
from shardwise.errors import CheckpointError


@dataclass
class Match:
    """A model's names and the stored tensors that belong to them.

    Args:
        found: by the model's names, tied ones included; not all of them have a place in the model's own list.
        missing: of the model, without a stored tensor.
        unexpected: stored, without a place in the model.
        prefix: what the stored names have before the model's; after a minus, what the model's have before them.
    """

    found: dict[str, Stored] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    prefix: str = ""


def match_names(names: Sequence[str], tensors: Mapping[str, Stored]) -> Match:
    """Find the stored tensor of each name: as it is, or with one prefix more or less on all of them.

    A name that only fits as it is, is taken as it is: a model's head beside its base model.
    """
    wanted = set(names)
    prefixes = {"": len(wanted & tensors.keys())}
    prefixes |= dict(_before(tensors, wanted))
    prefixes |= {f"-{less}": count for less, count in _before(names, tensors.keys())}
    best = max(prefixes.values())
    prefix = next(p for p, count in prefixes.items() if count == best)  # none at all wins if it is as good
    out = Match(prefix=prefix)
    used: set[str] = set()
    for name in names:
        for key in dict.fromkeys((_renamed(name, prefix), name)):
            if key in tensors:
                out.found[name] = tensors[key]
                used.add(key)
                break
        else:
            out.missing.append(name)
    taken = {id(stored) for stored in out.found.values()}
    out.unexpected = [k for k, stored in tensors.items() if k not in used and id(stored) not in taken]
    return out


def _renamed(name: str, prefix: str) -> str:
    return name.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + name


def _before(longer: Iterable[str], names: Iterable[str]) -> list[tuple[str, int]]:
    """What stands before names of ``names`` in ``longer``, the most frequent first."""
    known = set(names)
    counts: Counter[str] = Counter()
    for name in longer:
        for dot in (i + 1 for i, c in enumerate(name) if c == "."):
            if name[dot:] in known:
                counts[name[:dot]] += 1
    return counts.most_common(3)


def find_section(names: Sequence[str], source: Source, part: str | None) -> tuple[Section, Match]:
    """The section that fits a model best, and how.

    Raises:
        CheckpointError: several fit equally well and none is where weights are as a rule; there is no ``part``.
    """
    if part is not None or len(source.sections) == 1:
        section = source.section(part)
        return section, match_names(names, source.sections[section])
    best: dict[Section, Match] = {}
    most = 0
    for section, tensors in sorted(source.sections.items(), key=lambda item: -len(item[1])):
        if len(tensors) < most:  # nor can any of the rest, such as the state of single parameters
            break
        match = match_names(names, tensors)
        if len(match.found) > most:
            best, most = {}, len(match.found)
        if len(match.found) == most:
            best[section] = match
    if len(best) == 1:
        return next(iter(best.items()))
    section = Source(source.path, source.kind, {s: source.sections[s] for s in best}).section()
    return section, best[section]


@dataclass
class Fit:
    """How a model and a section fit together.

    Args:
        tensors: by the first name of each parameter and buffer, what is loaded into it.
        twice: of tied ones, those that are stored as several tensors, by their first name.
        missing, unexpected: names.
        mismatched: names of those with another shape or another kind of numbers.
        lines: all differences in words.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    twice: dict[str, list[Stored]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def leave_out(self, name: str, why: str) -> None:
        """A parameter keeps its values."""
        del self.tensors[name]
        self.mismatched.append(name)
        self.lines.append(why)


def fit(state: ModelState, source: Source, part: str | None) -> Fit:
    """Compare a model's names, shapes and dtypes with a source's."""
    mine = {**state.parameters, **state.buffers}
    names = [*mine, *state.aliases, *state.extra]
    _, match = find_section(names, source, part)
    if not match.found:
        shown = ", ".join(list(next(iter(source.sections.values())))[:3])
        raise CheckpointError(
            f"none of the model's {len(names)} names is in it; it has {shown}, ...",
            where=str(source.path),
            fix="load it into the model it was saved from, or rename with torch first",
        )
    out = Fit()
    tied: dict[str, list[str]] = {}
    for alias, name in state.aliases.items():
        tied.setdefault(name, []).append(alias)
    for name, tensor in mine.items():
        all_names = [name, *tied.get(name, ())]
        stored = list({id(match.found[n]): match.found[n] for n in all_names if n in match.found}.values())
        if not stored:
            out.missing.append(name)
            continue
        if stored[0].shape != tuple(tensor.shape):
            out.mismatched.append(name)
            out.lines.append(f"'{name}' has shape {stored[0].shape} there, not {tuple(tensor.shape)}")
        elif _numbers(stored[0].dtype) != _numbers(tensor.dtype):
            out.mismatched.append(name)
            out.lines.append(f"'{name}' is {str(stored[0].dtype)[6:]} there, not {str(tensor.dtype)[6:]}")
        else:
            out.tensors[name] = stored[0]
            if len(stored) > 1:
                out.twice[name] = stored
    out.missing += state.extra.keys()
    out.missing = _without(out.missing, state.module, "_keys_to_ignore_on_load_missing")
    out.unexpected = _without(match.unexpected, state.module, "_keys_to_ignore_on_load_unexpected")
    out.lines = [
        *(f"'{name}' is not in it" for name in out.missing),
        *out.lines,
        *(f"'{name}' is in it only" for name in out.unexpected),
    ]
    return out


def _numbers(dtype: object) -> tuple[bool, bool]:
    return (dtype.is_floating_point, dtype.is_complex)  # type: ignore[attr-defined]


def _without(names: Sequence[str], module: nn.Module, attribute: str) -> list[str]:
    """Leave out what a model of transformers says may differ."""
    patterns = getattr(module, attribute, None) or ()
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


# --- loading -------------------------------------------------------------------------------------
_SHOWN = 10  # differences that an error lists


@dataclass(frozen=True)
class LoadedModel:
    """What :func:`load_model` did.

    Args:
        path, kind: what was read; ``kind`` is ``shardwise``, ``dcp``, ``safetensors``, ``torch`` or ``deepspeed``.
        missing_keys: of the model, not in the files; they keep their values.
        unexpected_keys: in the files, not in the model.
        mismatched_keys: with another shape or another kind of numbers; they keep their values.
        bytes_read: tensor bytes that this rank read.
    """

    path: Path
    kind: str
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    bytes_read: int = 0


@torch.no_grad()
def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    part: str | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Load a model's weights in place, from whatever holds them. Collective.

    Reads a Hugging Face folder or a ``.safetensors`` file, ``.pt``, ``.pth`` and ``.bin`` files of ``torch.save``,
    folders of ``torch.distributed.checkpoint`` (FSDP1, FSDP2), DeepSpeed's ZeRO folders (fp32 weights where there are
    any), and Shardwise's own checkpoints. Nothing in them is run or unpickled. Wrappers' names, one prefix more or
    less (``model.``, ``module.``, a base model's), and tied names are understood; values take the model's dtypes.

    Args:
        model: sharded or not; wrappers are looked through. Optimizer state is not touched.
        path: a folder or file that all ranks see.
        strict: raise if names or shapes differ. Otherwise load what fits; the result lists the rest.
        part: which dict holds the weights, where there are several: ``model``, ``ema``, keys joined with dots.
        progress: show a bar on rank 0, if it has a terminal and this takes longer than a second.

    Raises:
        CheckpointError: on every rank, before anything has changed: nothing there, damaged, not tensors, or it does
            not fit. Also if a file cannot be read halfway; the model then refuses to run until it is loaded whole.

    Cost: each rank reads the bytes of what it holds. Host memory beyond the model's: one block of 8 MiB, and one
    unit's shards where values live on a disk. Files of torch before 1.6, and tensors that were saved transposed, are
    read whole. Checksums of Shardwise's own checkpoints are read first.
    """
    settle_saves()
    with recovery([model]) as recovered:
        loaded = _load_model(model, path, strict, part, progress)
        recovered.complete = not loaded.missing_keys and not loaded.mismatched_keys
    return loaded


def _load_model(
    model: nn.Module, path: str | os.PathLike[str], strict: bool, part: str | None, progress: bool
) -> LoadedModel:
    given = Path(os.path.realpath(path))
    doing = f"loading the model from {given}"
    with CollectiveBlock(doing):
        (state,) = model_states([model])
        _check(state)
        own = not given.exists() or (given / MANIFEST).is_file()
    if broadcast_text(str(own)) == "True":
        given, _ = locate_verified(given, progress)
    with CollectiveBlock(doing, slow=True):
        source = open_source(given)
        found = fit(state, source, part)
        index = zlib.crc32(repr([(name, t.dtype, t.shape) for name, t in found.tensors.items()]).encode())
        odd = [name for name, stored in found.twice.items() if not _equal(stored)]
    told = [json.loads(data) for data in all_gather_bytes(json.dumps([index, odd]).encode())]
    with CollectiveBlock(doing):
        if told[0][0] != index:
            raise CheckpointError(
                "rank 0 sees other files under this path than this rank",
                where=str(given),
                fix="put them on a file system that all hosts share, or copy the same files to every host",
            )
        for name in sorted({name for _, names in told for name in names}):
            found.leave_out(name, f"the names of '{name}' are tied in the model, and there they are different tensors")
        if found.lines and strict:
            raise CheckpointError(misfit(found.lines, source), where=str(given), fix=_advice(found))
    total = sum((hi - lo) * stored.dtype.itemsize for stored, lo, hi in _wanted(state, found))
    with Progress("loading", total, progress) as bar, StorageReader(seen=bar.add) as reader:
        with CollectiveBlock(doing, slow=True):
            for stored, lo, hi in _wanted(state, found):
                reader.prepare(stored, lo, hi)
        for unit in units_of(state.module):
            unit.finish_transfers()
        with incomplete_on_error([state.module], given):
            with CollectiveBlock(doing, slow=True):
                _load(state, found, reader)
            publish(state.module)
    return LoadedModel(given, source.kind, found.missing, found.unexpected, found.mismatched, reader.nbytes)


def misfit(lines: Sequence[str], source: Source) -> str:
    """Why files and a model do not go together, in words."""
    shown = "\n    ".join(lines[:_SHOWN])
    more = f"\n    and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"{KINDS[source.kind]} that does not fit the model:\n    {shown}{more}"


def _advice(found: Fit) -> str:
    return f"strict=False loads the {len(found.tensors)} tensors that fit and lists the rest"


def _check(state: ModelState) -> None:
    for name, p in state.parameters.items():
        if isinstance(p, DTensor):
            raise CheckpointError(
                "is a DTensor", where=f"parameter '{name}'", fix="load it with torch.distributed.checkpoint"
            )


def _equal(stored: Sequence[Stored]) -> bool:
    """Whether tensors have the same values. Each rank compares its part."""
    first, world = stored[0], World.current()
    if any(t.shape != first.shape for t in stored):
        return False
    start, stop = first.numel * world.rank // world.size, first.numel * (world.rank + 1) // world.size
    each = BLOCK // 16
    with StorageReader() as reader:
        for lo in range(start, stop, each):
            blocks = [reader.values(t, lo, min(stop, lo + each)) for t in stored]
            if any(not torch.equal(blocks[0], block) for block in blocks[1:]):
                return False
    return True


def _wanted(state: ModelState, found: Fit) -> Iterator[tuple[Stored, int, int]]:
    """What this rank reads of which tensor."""
    for name, stored in found.tensors.items():
        p = state.parameters.get(name)
        mine = None if p is None else held(p)
        if mine is None:
            yield stored, 0, stored.numel
        else:
            yield from ((stored, lo, hi) for lo, hi, _ in mine.pieces)


def _load(state: ModelState, found: Fit, reader: StorageReader) -> None:
    names = {id(p): name for name, p in state.parameters.items()}
    for unit in units_of(state.module):
        for bucket in unit.buckets:
            mine = {i: found.tensors.get(names.get(id(p), "")) for i, p in enumerate(bucket.params)}
            if not any(mine.values()):
                continue
            with bucket.master_here(write=True):
                for i, stored in mine.items():
                    for (lo, hi), piece in zip(bucket.ranges(i), bucket.piece_params[i], strict=True):
                        if stored is not None:
                            reader.read_tensor(stored, lo, hi, piece)
    for name, tensor in {**state.parameters, **state.buffers}.items():
        stored = found.tensors.get(name)
        if stored is None or (isinstance(tensor, nn.Parameter) and held(tensor) is not None):
            continue
        if tensor.is_contiguous():
            reader.read_tensor(stored, 0, stored.numel, tensor.detach())
        else:
            tensor.copy_(reader.values(stored).view(stored.shape))
