"""A model that a script has made already, as the subject of a plan: its shape, without its values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.errors import PlanError
from shardwise.plan.shorten import shorten
from shardwise.plan.subject import Subject
from shardwise.plan.written import inputs_like, loss_of, rows_of


class Given:
    """Makes copies of a script's model without values.

    Args:
        module: is not changed.
        example: inputs of one forward; see :func:`subject_of`.
    """

    longest = None

    def __init__(self, module: nn.Module, example: Any, rows: int | None = None) -> None:
        self.module, self.example, self.rows = module, example, rows

    def model(self) -> nn.Module:
        tensors: dict[int, Any] = {}
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            made: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            tensors[id(tensor)] = made
        return copy.deepcopy(self.module, tensors).train()

    def inputs(self, device: torch.device | str) -> Any:
        return inputs_like(self.example, self.rows, device)

    def loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        if isinstance(inputs, Mapping):
            return loss_of(model(**inputs))
        if not isinstance(inputs, (tuple, list)):
            return loss_of(model(inputs))
        return loss_of(model(*inputs[: _takes(model, len(inputs))]))

    def sized(self, batch: int, seq: int | None) -> Given:
        return Given(self.module, self.example, batch)


def _takes(model: nn.Module, given: int) -> int:
    """How many of ``given`` things a forward takes: what a loader gives may hold labels, too."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return given
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return given
    return min(given, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)) or given


def subject_of(module: nn.Module, example: Any) -> Subject:
    """A subject of a model and its inputs.

    Args:
        module: not sharded.
        example: one micro-batch: a mapping of keyword arguments, a sequence of positional ones (what the forward does
            not take is left out: labels), or one tensor.

    Raises:
        PlanError: there is no tensor with rows in it.
    """
    rows = rows_of(example)
    if rows is None:
        raise PlanError("the example inputs hold no tensor with rows", fix="give what one forward is called with")
    first = next(t for t in tree_flatten(example)[0] if isinstance(t, torch.Tensor) and t.ndim)
    seq = int(first.shape[1]) if first.ndim == 2 and not first.is_floating_point() else None
    name = type(module).__name__
    subject = Subject(name, "the script's", rows, seq, Given(module, example))
    parameters = list(module.parameters())
    subject.parameters = sum(p.numel() for p in parameters)
    subject.trainable = sum(p.numel() for p in parameters if p.requires_grad)
    with FakeTensorMode(allow_non_fake_inputs=True):
        subject.kinds = shorten(subject.maker.model(), 1 << 30)
    return subject


def batch_of(loader: Any) -> Any:
    """What the first batch of a loader looks like, without iterating it; ``None`` where that cannot be known.

    Random numbers that the dataset draws are put back.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate: Any = getattr(loader, "collate_fn", None)
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int) or collate is None:
        return None
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    state = torch.get_rng_state()
    try:
        count = min(size, len(dataset))
        batch = collate([dataset[k] for k in range(count)])
    except Exception:  # noqa: BLE001 - whatever a script's dataset raises, it will raise again where it is iterated
        return None
    finally:
        torch.set_rng_state(state)
    if count == size:
        return batch
    return tree_map(lambda t: _grown(t, count, size) if isinstance(t, torch.Tensor) else t, batch)


def _grown(tensor: torch.Tensor, rows: int, wanted: int) -> torch.Tensor:
    if not tensor.ndim or tensor.shape[0] != rows:
        return tensor
    return tensor.new_zeros((wanted, *tensor.shape[1:]))
