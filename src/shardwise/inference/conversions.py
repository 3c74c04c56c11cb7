"""What transformers renames and puts together when it loads a model, done to the index instead of to tensors.

A model's folder keeps the names and the shapes that its authors gave it, and transformers turns them into its own:
names change, and the experts of a layer become one tensor. Here only the places change: a parameter that is put
together of others is read from where its parts are, straight to where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from shardwise.checkpoint.stored_tensor import Segment, Stored
from shardwise.errors import CheckpointError


def converted(model: nn.Module, stored: Mapping[str, Stored], where: Path) -> dict[str, Stored]:
    """The tensors of a folder under the names and in the shapes of a model of transformers; others as they are.

    Raises:
        CheckpointError: a conversion that cannot be read in place.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # not installed, or from before it converted anything
        return dict(stored)
    if not isinstance(model, PreTrainedModel):
        return dict(stored)
    mapping = get_model_conversion_mapping(model)
    if not mapping:
        return dict(stored)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    names = dict.fromkeys([*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())])
    known: dict[str, Any] = dict.fromkeys(names, True)
    out: dict[str, Stored] = {}
    parts: dict[str, dict[str, list[Stored]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if pattern is None or target not in known:
            out[target if target in known else name] = stored[name]
        else:
            parts.setdefault(target, {}).setdefault(pattern, []).append(stored[name])
    for target, by_source in parts.items():
        converter = by_pattern[next(iter(by_source))]
        out[target] = _put_together(target, converter, by_source, where)
    return out


def _put_together(target: str, converter: Any, by_source: Mapping[str, Sequence[Stored]], where: Path) -> Stored:
    """One parameter of the parts that a converter has for it."""
    values: dict[str, list[Stored]] = {p: list(by_source[p]) for p in converter.source_patterns if p in by_source}
    for operation in converter.operations:
        kind, dim = type(operation).__name__, getattr(operation, "dim", 0)
        if kind == "MergeModulelist" and dim == 0:
            values = {p: [stacked(found)] for p, found in values.items()}
        elif kind == "Concatenate":
            values = {"": [concatenated([t for found in values.values() for t in found], dim)]}
        else:
            raise CheckpointError(
                f"'{target}' is made by transformers' {kind}, which cannot be done in place",
                where=str(where),
                fix="load it with transformers once, and save it with save_pretrained(..., save_original_format=False)",
            )
    (found,) = values.values()
    return found[0]


def stacked(tensors: Sequence[Stored]) -> Stored:
    """``torch.stack`` along the first dimension."""
    return concatenated([replace(t, shape=(1, *t.shape)) for t in tensors], 0)


def concatenated(tensors: Sequence[Stored], dim: int) -> Stored:
    """``torch.cat``: the same bytes of the same files at other places.

    Raises:
        CheckpointError: dtypes differ, or a format that is read whole.
    """
    first = tensors[0]
    dim %= len(first.shape)
    if any(t.dtype != first.dtype or t.values is not None for t in tensors):
        raise CheckpointError("tensors that are to be one have several dtypes, or a format that is read whole")
    inner = [prod(t.shape[dim:]) for t in tensors]  # elements in a row
    row, offset, segments = sum(inner), 0, list[Segment]()
    for tensor, length in zip(tensors, inner, strict=True):
        for segment in tensor.segments:
            segments += _moved(segment, length, row, offset)
        offset += length
    shape = (*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :])
    return Stored(first.dtype, shape, tuple(segments))


def _moved(segment: Segment, length: int, row: int, offset: int) -> list[Segment]:
    """A segment of a tensor whose rows of ``length`` elements come to be in rows of ``row``, ``offset`` into them."""
    if segment.layout is not None:
        raise CheckpointError("a tensor that is to be put together was saved transposed")
    out = []
    for i in range(segment.count):
        start, skip, left = segment.start + i * segment.step, segment.skip + i * segment.length, segment.length
        while left:
            begin = start % length
            if begin == 0 and left >= length:  # whole rows
                count = left // length
                step = row if count > 1 else 0
                new = replace(segment, start=start // length * row + offset, length=length, count=count, step=step)
                taken = count * length
            else:
                taken = min(left, length - begin)
                new = replace(segment, start=start // length * row + offset + begin, length=taken, count=1, step=0)
            out.append(replace(new, skip=skip))
            start, skip, left = start + taken, skip + taken, left - taken
    return out
