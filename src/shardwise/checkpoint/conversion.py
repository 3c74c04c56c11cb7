"""Checkpoints checked, written as files that others read, and compared: without a model, in one process, in blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shardwise.checkpoint import directory as directories
from shardwise.checkpoint.coordination import Progress
from shardwise.checkpoint.directory import every_grain
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.manifest import BLOCK, MANIFEST, FileEntry, check_size
from shardwise.checkpoint.model_loading import match_names
from shardwise.checkpoint.model_saving import BinWriter, SafeWriter, Writer, shard_limit, shards_of, writable
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import KINDS, SAFETENSORS_DTYPES, Source, Stored
from shardwise.checkpoint.torch_archive import Joined, write_archive
from shardwise.errors import CheckpointError


def check(path: str | os.PathLike[str], progress: bool = True) -> tuple[Source, list[str]]:
    """Look at everything that can be checked without a model. Any rank may call it alone.

    Args:
        path: what :func:`~shardwise.checkpoint.formats.open_source` takes.
        progress: show a bar, on a terminal.

    Returns:
        What is there, and what is wrong with it, one line per file. Of Shardwise's own checkpoints every byte is read
        against its checksum. Other formats have none: there the indexes are read, and every tensor's place is checked
        to be in its file.

    Raises:
        CheckpointError: its index cannot be read at all.
    """
    own = _own(Path(os.path.realpath(path)))
    problems: list[str] = []
    if own is not None:
        manifest = directories.read_manifest(own)
        with Progress("checking", sum(entry.size for entry in manifest.files.values()), progress) as bar:
            for name, entry in manifest.files.items():
                problem = _problem(own, name, entry, bar)
                if problem:
                    problems.append(f"{name}: {problem}")
        if problems:
            return Source(own, "shardwise", {}, {"manifest": manifest}), problems
    source = open_source(path)
    with StorageReader() as reader:
        for stored in source.everything().values():
            reader.prepare(stored, 0, stored.numel)
    return source, problems


def _own(path: Path) -> Path | None:
    """Where the files of one of our checkpoints are; ``None`` if it is none."""
    if path.is_dir() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        return None
    return None if path.is_file() else directories.resolve(path)


def _problem(path: Path, name: str, entry: FileEntry, bar: Progress) -> str:
    one = {path / name: entry}
    try:
        check_size(path / name, entry)
        StorageReader(one, bar.add).read(also=every_grain(one))
    except CheckpointError as error:
        return error.what
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return ""


# --- export ----------------------------------------------------------------------------------------
@torch.no_grad()
def export(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    part: str | None = None,
    max_shard_size: int | str = "10GB",
    dtype: torch.dtype | None = None,
    safe_serialization: bool = True,
    without: Collection[str] = (),
    progress: bool = True,
) -> Path:
    """Write the weights in a checkpoint as transformers reads them: ``model.safetensors``, or several and an index.

    Needs no model and no ranks: call it in one process. Tied tensors are written once. Older files of this kind in
    the directory are replaced when the new ones are complete.

    Args:
        path: anything that :func:`load_model` reads.
        directory: made if it is not there. Put the model's ``config.json`` there for ``from_pretrained``.
        part: which dict holds the weights, where there are several: ``model_1`` for the second model.
        max_shard_size: bytes per file at most (one tensor is never cut), or a text: ``500MB``, ``10GiB``.
        dtype: of floating-point tensors; by default what the checkpoint has.
        safe_serialization: if false, ``pytorch_model.bin`` files of ``torch.save`` instead.
        without: names to leave out.
        progress: show bars, on a terminal.

    Returns:
        The directory.

    Raises:
        CheckpointError: damaged, no telling which part, a dtype that safetensors lacks, or it cannot be written.

    Cost: reads a checkpoint of Shardwise twice, to check and to write. Host memory: five blocks of 8 MiB.
    """
    limit = shard_limit(max_shard_size)
    if dtype is not None and not (dtype.is_floating_point and dtype in SAFETENSORS_DTYPES):
        raise CheckpointError(f"dtype={dtype} is no floating-point dtype of safetensors", fix="give torch.bfloat16 ...")
    source, problems = check(path, progress)
    if problems:
        raise CheckpointError(problems[0], where=str(source.path), fix="export another checkpoint")
    root = Path(os.path.realpath(directory))
    if root == source.path or any(file.parent == root for file in source.files):
        raise CheckpointError("would be written among the files it reads", where=str(root), fix="choose another folder")
    tensors = {name: t for name, t in source.sections[source.section(part)].items() if name not in without}
    first: dict[int, str] = {}
    aliases = {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}
    kept = {name: t for name, t in tensors.items() if name not in aliases}
    wanted = {name: _dtype_of(name, t, dtype) for name, t in kept.items()}
    shards = shards_of({name: (wanted[name], t.shape) for name, t in kept.items()}, limit)
    total = sum(t.nbytes for t in kept.values())
    kind = SafeWriter if safe_serialization else ArchiveWriter
    with writable(root), kind(root, shards, aliases) as writer, Progress("writing", total, progress) as bar:
        if isinstance(writer, ArchiveWriter):
            whole = {name: Joined(wanted[name], t.shape, ((t, 0, t.numel),)) for name, t in kept.items()}
            writer.add_all(whole, bar.add)
            return root
        with StorageReader(seen=bar.add) as reader:
            for name, stored in kept.items():
                for lo, hi in _blocks(stored.numel, max(stored.dtype.itemsize, wanted[name].itemsize)):
                    values = torch.empty(hi - lo, dtype=wanted[name])
                    reader.read_tensor(stored, lo, hi, values)
                    writer.add(name, values, lo)
    return root


class ArchiveWriter(Writer):
    """Writes a file of ``torch.save`` after the other, in blocks."""

    stem, ending = BinWriter.stem, BinWriter.ending

    def prepare(self) -> None:
        """Nothing."""

    def add_all(self, tensors: Mapping[str, Joined], seen: Callable[[int], None]) -> None:
        """Write all of them."""
        with StorageReader() as reader:
            for i, shard in enumerate(self.shards):
                nest = {name: tensors[name] for name in shard.tensors}
                nest |= {alias: tensors[name] for alias, name in self.aliases(shard).items()}
                write_archive(self.temporary(self.names[i]), nest, reader, seen)

    def weight_map(self) -> dict[str, str]:
        tied = {alias: self.names[self.shard_of[name]] for alias, name in self.all_aliases.items()}
        return dict(sorted({**super().weight_map(), **tied}.items()))


def _dtype_of(name: str, stored: Stored, wanted: torch.dtype | None) -> torch.dtype:
    dtype = wanted if wanted is not None and stored.dtype.is_floating_point else stored.dtype
    if dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"has dtype {dtype}, which safetensors lacks", where=f"'{name}'", fix="say dtype=...")
    return dtype


def _blocks(numel: int, item: int) -> Iterator[tuple[int, int]]:
    each = BLOCK // item
    for lo in range(0, numel, each):
        yield lo, min(numel, lo + each)


# --- differences --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on both sides.

    Args:
        what: ``only in A``, ``only in B``, ``shape``, ``dtype`` or ``values``.
        a, b: shape and dtype on each side, ``None`` where it is not.
        largest: of the absolute differences; ``None`` if shapes differ; nan if one side alone has a nan somewhere.
    """

    name: str
    what: str
    a: Stored | None
    b: Stored | None
    largest: float | None = None


@dataclass
class Comparison:
    """Two checkpoints beside each other.

    Args:
        same: how many tensors are equal in dtype, shape and values. Nans equal each other.
        differences: the others.
    """

    same: int = 0
    differences: list[Difference] = field(default_factory=list)


@torch.no_grad()
def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, part: str | None = None, progress: bool = True
) -> Comparison:
    """Compare all tensors of two checkpoints. In one process.

    Args:
        a, b: anything that :func:`load_model` reads. Where the formats differ, their weights are compared, and names
            may differ by a prefix.
        part: compare this dict only: ``model``, ``ema``, ...
        progress: show a bar, on a terminal.

    Raises:
        CheckpointError: one of them cannot be read.

    Cost: reads both once. Host memory: two blocks of 8 MiB and what comparing them takes.
    """
    mine, theirs = _pairs(open_source(a), open_source(b), part)
    out = Comparison()
    both = [name for name in mine if name in theirs]
    total = sum(mine[name].nbytes + theirs[name].nbytes for name in both if mine[name].shape == theirs[name].shape)
    with Progress("comparing", total, progress) as bar, StorageReader(seen=bar.add) as reader:
        for name in dict.fromkeys([*mine, *theirs]):
            left, right = mine.get(name), theirs.get(name)
            if left is None or right is None:
                out.differences.append(Difference(name, f"only in {'B' if left is None else 'A'}", left, right))
            elif left.shape != right.shape:
                out.differences.append(Difference(name, "shape", left, right))
            else:
                largest = _largest(reader, left, right)
                if left.dtype == right.dtype and largest == 0:
                    out.same += 1
                else:
                    what = "values" if left.dtype == right.dtype else "dtype"
                    out.differences.append(Difference(name, what, left, right, largest))
    return out


def _pairs(a: Source, b: Source, part: str | None) -> tuple[dict[str, Stored], dict[str, Stored]]:
    distributed = {"shardwise", "dcp", "deepspeed"}
    if part is None and (a.kind == b.kind or {a.kind, b.kind} <= distributed):
        return a.everything(), b.everything()
    mine, theirs = (s.sections[s.section(part if len(s.sections) > 1 else None)] for s in (a, b))
    match = match_names(list(mine), theirs)
    if not match.found:
        raise CheckpointError(
            f"they have no name in common: {KINDS[a.kind]} with {next(iter(mine))}, {KINDS[b.kind]} with "
            f"{next(iter(theirs))}", where=f"{a.path} and {b.path}", fix="compare what holds the same model",
        )  # fmt: skip
    return mine, {**match.found, **{name: theirs[name] for name in match.unexpected}}


def _largest(reader: StorageReader, a: Stored, b: Stored) -> float:
    """The largest absolute difference; above zero exactly if any values differ."""
    largest = 0.0
    for lo, hi in _blocks(a.numel, 8):
        x, y = reader.values(a, lo, hi), reader.values(b, lo, hi)
        if x.dtype == y.dtype and torch.equal(x, y):
            continue
        whole = not (x.dtype.is_floating_point or x.dtype.is_complex) and x.dtype == y.dtype
        wide = torch.complex128 if x.dtype.is_complex or y.dtype.is_complex else torch.float64
        x, y = x.to(wide), y.to(wide)
        most = (x - y).abs().max().item()
        if not math.isfinite(most):
            # Two infinities of one sign have no difference to speak of, nor do two nans.
            most = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs()).max().item()
        if math.isnan(most):
            return most
        largest = max(largest, most, 1.0 if whole else 0.0)  # large whole numbers differ by less than fp64 can say
    return largest
