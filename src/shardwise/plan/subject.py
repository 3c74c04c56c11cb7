"""What a plan is about: a model as the command line names it, its inputs, its loss, and shorter forms of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from shardwise.errors import InternalError, PlanError, did_you_mean
from shardwise.plan.building import is_fake, told
from shardwise.plan.huggingface import Recipe, read
from shardwise.plan.lora import Lora, adapt
from shardwise.plan.planned_device import move
from shardwise.plan.shapes import SHIPPED
from shardwise.plan.shorten import Kind, shorten
from shardwise.plan.written import Written, find, loss_of, rows_of

FORMS = "a folder with a config.json, module:function, or one of: "


class Maker(Protocol):
    """Where a model comes from."""

    def model(self) -> nn.Module:
        """A new one, without memory: on the meta device, or fake."""

    def inputs(self, device: torch.device | str) -> Any:
        """Of one micro-batch, without values."""

    def loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """Of one forward."""

    def sized(self, batch: int, seq: int | None) -> Maker:
        """The same model with micro-batches of ``batch`` rows."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row, if there is a limit."""


@dataclass
class Subject:
    """A model to plan for, with one micro-batch of a rank.

    Attributes:
        name: as it was asked for.
        source: where it comes from, in words.
        batch: rows of a micro-batch.
        seq: tokens of a row; ``None`` if rows are no text.
        parameters, trainable: elements of its parameters; what is tied counts once.
        kinds: of its repeated blocks, in the order of the model; empty if nothing repeats.
        routed: whether tokens are routed to experts.
        notes: what a reader of the plan has to know, a sentence each.
    """

    name: str
    source: str
    batch: int
    seq: int | None
    maker: Maker
    lora: Lora | None = None
    routed: bool = False
    notes: list[str] = field(default_factory=list)
    parameters: int = 0
    trainable: int = 0
    kinds: tuple[Kind, ...] = ()

    @property
    def tokens(self) -> int:
        """Of one micro-batch; rows, if they are no text."""
        return self.batch * (self.seq or 1)

    def build(
        self,
        keep: int | Mapping[str, int] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """A new instance for training, without memory. Call it inside a ``FakeTensorMode``.

        Args:
            keep: of each kind of repeated block, or by :attr:`Kind.name`, as for
                :func:`~shardwise.plan.shorten.shorten`; the whole model if ``None``.
            device: where its parameters are to be: ``cpu``, or what
                :func:`~shardwise.plan.planned_device.use_planned_device` returns.
            dtype: of its floating-point parameters; theirs (fp32 for configurations) if ``None``.

        Raises:
            PlanError: it cannot be built without values.
        """
        if not is_fake():
            raise InternalError("a model to plan for was built outside of FakeTensorMode")
        with told(self.name, "be built"):
            model = self.maker.model()
            if self.lora is not None:
                # peft moves its layers to where the model is, unless that is nowhere: parameters without values stay.
                model = adapt(move(model, "meta"), self.lora, self.name)
        if keep is not None:
            shorten(model, keep)
        return move(model, device, dtype)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest row that the model itself can read, if it has such a limit."""
        return self.maker.longest

    def sized(self, batch: int) -> Subject:
        """The same model with micro-batches of another number of rows."""
        return replace(self, batch=batch, maker=self.maker.sized(batch, self.seq))

    def inputs(self, device: torch.device | str = "cpu") -> Any:
        """One micro-batch: what :meth:`loss` takes. Without values inside a ``FakeTensorMode``."""
        with told(self.name, "get its inputs"):
            return self.maker.inputs(device)

    def loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """The loss of one forward, as a training loop would take it.

        Raises:
            PlanError: the forward needs values, or fails.
        """
        with told(self.name, "run"):
            return self.maker.loss(model, inputs)


def resolve(
    text: str,
    *,
    batch: int | None = None,
    seq: int | None = None,
    lora: str | None = None,
) -> Subject:
    """What MODEL on the command line means.

    Args:
        text: a folder with a ``config.json`` of Hugging Face, or such a file; a name of
            :data:`~shardwise.plan.shapes.SHIPPED`; or ``module:function`` (also ``file.py:function``). The function
            takes nothing, or any of ``batch=`` and ``seq=``, and returns ``(model, inputs)`` or
            ``(model, inputs, loss)``. ``inputs`` are one micro-batch: a dict or tuple for the forward, or one tensor.
            ``loss(model, inputs)`` returns what the training loop calls ``backward()`` on; without it that is the
            output's ``loss``, or the mean of all its floating-point numbers. The function runs without memory for large
            tensors.
        batch: rows of a micro-batch; 1, or as the function returns them.
        seq: tokens of a row; what the model reads, up to 2,048, or as the function returns them.
        lora: adapters instead of full training, as ``r=16`` or ``r=16,alpha=32,targets=q_proj+v_proj``.

    Raises:
        PlanError: there is no such model, or it cannot be built.
        MissingPackage: it needs a package that is not installed.
    """
    for name, value in (("batch", batch), ("seq", seq)):
        if value is not None and value < 1:
            raise PlanError(f"{name} must be 1 or more, not {value}")
    adapters = None if lora is None else Lora.parse(lora)
    path, there = _path(text)
    if text in SHIPPED and not (there and path.is_file()):
        repository, values = SHIPPED[text]
        subject = _of_config(text, f"the config.json of {repository}", values, batch, seq)
    elif there:
        subject = _of_config(text, "its config.json", read(path), batch, seq)
    elif ":" in text and not text.startswith(":") and not text.endswith(":"):
        subject = _of_function(text, batch, seq)
    else:
        names = ", ".join(SHIPPED)
        raise PlanError(f"there is no model '{text[:200]}'", fix=did_you_mean(text, SHIPPED, FORMS + names))
    subject.lora = adapters
    _measure(subject)
    return subject


def _path(text: str) -> tuple[Path, bool]:
    """Of a file or folder of that name, and whether it is there."""
    try:
        path = Path(text).expanduser()
        return path, path.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name; nobody's home; what no name may have in it
        return Path(), False


def _measure(subject: Subject) -> None:
    """Fill in what is known of a model once it has been built."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = subject.build()
        parameters = list(model.parameters())
        subject.parameters = sum(p.numel() for p in parameters)
        subject.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        subject.kinds = shorten(model, sys.maxsize)


class _Configured:
    """A model of transformers."""

    def __init__(self, recipe: Recipe, batch: int, seq: int | None) -> None:
        self.recipe, self.batch, self.seq = recipe, batch, seq

    def model(self) -> nn.Module:
        return self.recipe.model()

    def inputs(self, device: torch.device | str) -> Any:
        return self.recipe.inputs(self.batch, self.seq, device)

    def loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        return loss_of(model(**inputs))

    def sized(self, batch: int, seq: int | None) -> Maker:
        return _Configured(self.recipe, batch, seq)

    @property
    def longest(self) -> int | None:
        return self.recipe.limit()


def _of_config(name: str, source: str, values: dict[str, Any], batch: int | None, seq: int | None) -> Subject:
    recipe = Recipe(values, name)
    usual = recipe.length()
    if usual is None and seq is not None and not recipe.reads_text:
        raise PlanError("the rows of this model are pictures: they have no length", where=name, fix="leave --seq out")
    limit = recipe.limit()
    if seq is not None and limit is not None and seq > limit:
        raise PlanError(
            f"a row has at most {limit} tokens: {recipe.cls.__name__} has no more positions, and {seq} were asked for",
            where=name,
        )
    rows, length = batch or 1, seq or usual
    made = _Configured(recipe, rows, length)
    notes = list(recipe.notes)
    return Subject(name, f"{source}, {recipe.cls.__name__}", rows, length, made, routed=recipe.routed, notes=notes)


def _of_function(text: str, batch: int | None, seq: int | None) -> Subject:
    function = find(text)
    try:
        takes = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        takes = set()
    asked = {"batch": batch, "seq": seq}
    wanted = {name: value for name, value in asked.items() if value is not None and name in takes}
    made = Written(text, function, wanted)
    if seq is not None and "seq" not in takes:
        raise PlanError("the function does not take seq=, so its rows have one length", where=text)
    with FakeTensorMode(allow_non_fake_inputs=True), told(text, "be built"):
        _, example, made.own_loss = made.call()
    rows = rows_of(example)
    if rows is None:
        raise PlanError("the inputs that the function returns hold no tensor with rows", where=text)
    if batch is not None and "batch" not in takes:
        made.rows = batch
    rows = batch or rows
    first = next(t for t in tree_flatten(example)[0] if isinstance(t, torch.Tensor) and t.ndim)
    text_rows = first.ndim == 2 and not first.is_floating_point()
    length = seq or (int(first.shape[1]) if text_rows else None)
    return Subject(text, "a function", rows, length, made)
