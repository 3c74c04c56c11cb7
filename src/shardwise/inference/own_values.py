"""Parameters that a model computes itself, and that its files leave out on purpose: tables of positions, as a rule."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.engine.stored import StoredTensor
from shardwise.errors import CheckpointError
from shardwise.inference.tensors import owner_of


def own_values(model: nn.Module, name: str, dtype: torch.dtype | None) -> StoredTensor:
    """What a model of transformers sets a parameter to when no file has it; its values are in memory from here on.

    Args:
        name: of the parameter, which ``_keys_to_ignore_on_load_missing`` covers.
        dtype: that it is to have; ``None``: its own.

    Raises:
        CheckpointError: the model does not set it.
    """
    owner, key = owner_of(model, name)
    found = owner._parameters[key]
    assert found is not None
    values: torch.Tensor = found
    if values.is_meta:
        values = _initialised(model, owner)[key]
        if values.is_floating_point() and values.isnan().any():
            raise CheckpointError(
                f"'{name}' is not in the files, and {type(model).__name__} does not say what it is",
                fix="use files that have it",
            )
    flat = values.detach().to(values.dtype if dtype is None else dtype).reshape(-1)

    def copy(start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(flat[start:stop])

    return StoredTensor(flat.dtype, tuple(values.shape), (), copy)


def _initialised(model: nn.Module, owner: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of one module as the model initialises them, on the CPU. The module keeps those that it has."""
    before = dict(owner._parameters)
    real = {
        key: nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype), requires_grad=False)
        for key, p in before.items() if p is not None and p.is_floating_point()
    }  # fmt: skip
    owner._parameters.update(real)
    try:
        initialise = getattr(model, "_init_weights", None)
        if initialise is not None:
            with torch.no_grad():
                initialise(owner)
    finally:
        owner._parameters.update(before)
    return dict(real)
