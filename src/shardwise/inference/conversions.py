"""What transformers renames and puts together when it loads a model, done to the index instead of to tensors.

A model's folder keeps the names and the shapes that its authors gave it, and transformers turns them into its own:
names change, and the experts of a layer become one tensor. Its own operations run here on tensors without memory, and
only places change: a parameter that is put together of others is read from where its parts are, straight to where it
is used. What is transposed or permuted is read in blocks, and put in order by the thread that converts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shardwise.checkpoint.stored_tensor import Stored
from shardwise.errors import CheckpointError
from shardwise.inference.rearranging import Rearranging


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
        there = target.replace("*.", "0.") in known  # one of a list that is to be made
        if not there and name in known:
            target, pattern = name, None
        if pattern is None or not there:
            out[target if target in known else name] = stored[name]
        else:
            parts.setdefault(target, {}).setdefault(pattern, []).append(stored[name])
    for target, by_source in parts.items():
        converter = by_pattern[next(iter(by_source))]
        out |= _rearranged(target, converter, by_source, model, where)
    return out


def _rearranged(
    target: str, converter: Any, by_source: Mapping[str, Sequence[Stored]], model: Any, where: Path
) -> dict[str, Stored]:
    """The parameters that a converter makes of the parts that it has for one of them, by name."""
    kind, block = "", Rearranging()
    try:
        found: dict[str, Any] = {
            p: [block.tensor(t) for t in by_source[p]] for p in converter.source_patterns if p in by_source
        }
        with block:
            for operation in converter.operations:
                kind = type(operation).__name__
                found = operation.convert(
                    found,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=target,
                    model=model,
                    config=model.config,
                    missing_keys=None,
                )
        out = {pattern: block.stored(t[0] if isinstance(t, list) else t) for pattern, t in found.items()}
    except Exception as error:  # somebody else's code, on tensors that it was not written for
        raise CheckpointError(
            f"'{target}' is made by transformers' {kind}, which cannot be done in place: {error}",
            where=str(where),
            fix="load it with transformers once, and save it with save_pretrained(..., save_original_format=False)",
        ) from error
    # Names are those of the converter's patterns; what is around the pattern in one name is around it in all.
    name = target.replace("*.", "0.")
    pattern = next((p for p in out if p in name), None)
    if pattern is None:
        (only,) = out.values()
        return {name: only}
    before, _, behind = name.partition(pattern)
    return {before + p + behind: stored for p, stored in out.items()}
