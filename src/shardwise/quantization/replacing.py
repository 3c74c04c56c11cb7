"""int8 layers in place of a model's others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from shardwise.errors import UnitError, did_you_mean
from shardwise.quantization.int8 import BLOCK, quantized
from shardwise.quantization.linear import QuantizedLinear


def quantize(model: nn.Module, *, block: int = BLOCK, skip: Collection[str] | None = None) -> nn.Module:
    """Put a :class:`QuantizedLinear` in place of every ``nn.Linear`` in a model.

    What is quantised already stays as it is. So do subclasses of ``nn.Linear``, whose code may use the weight itself,
    and weights that are tied to another parameter. On the meta device only the layers are replaced.

    Args:
        model: changed in place, before it is sharded. If it is a linear layer itself, the result is another module.
        block: elements that share a scale.
        skip: names of modules, or parts of them between dots, that stay with all that is in them. Default: the one that
            a model of transformers makes its logits with.

    Returns:
        The model.

    Raises:
        UnitError: there is nothing to quantise, ``skip`` names what there is not, or a weight is infinite or NaN.

    Cost: one layer's int8 weight beside the model at a time.
    """
    names = linears_of(model, skip)
    if not names and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise nothing_to_quantize(model)
    return with_layers(model, {n: quantized_linear(model.get_submodule(n), block, n) for n in names})


def nothing_to_quantize(model: nn.Module) -> UnitError:
    """The error about a model without a layer that could be int8."""
    return UnitError(
        f"{type(model).__name__} has no nn.Linear that could be quantised",
        fix="nn.Linear is, but not its subclasses, not layers that share their weight, and not what skip= names",
    )


def with_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put layers in place of others, wherever the model has them; the model, or what replaces it."""
    replaced = {id(model.get_submodule(name)): new for name, new in layers.items()}
    for owner in list(model.modules()):
        for attribute, held in owner._modules.items():
            if id(held) in replaced:
                owner._modules[attribute] = replaced[id(held)]
    return replaced.get(id(model), model)


def linears_of(model: nn.Module, skip: Collection[str] | None = None) -> list[str]:
    """Names of the layers that :func:`quantize` replaces.

    Raises:
        UnitError: ``skip`` names what there is not.
    """
    left = _output_head(model) if skip is None else [skip] if isinstance(skip, str) else list(skip)
    names = [name for name, _ in model.named_modules()]
    for part in left:
        if not any(_is_in(name, part) for name in names):
            fix = did_you_mean(part, names, "a module's name, or parts of one between dots: see named_modules()")
            raise UnitError(f"skip names '{part}', which {type(model).__name__} does not have", fix=fix)
    holders: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            holders[id(p)] = holders.get(id(p), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and holders[id(module.weight)] == 1
        and not any(_is_in(name, part) for part in left)
    ]


def _is_in(name: str, part: str) -> bool:
    """Is it a module of that name, or within one?"""
    return f".{part}." in f".{name}."


def _output_head(model: nn.Module) -> list[str]:
    head: Any = getattr(model, "get_output_embeddings", None)
    found = head() if callable(head) else None
    return [name for name, module in model.named_modules() if module is found and name]


def quantized_linear(layer: nn.Module, block: int, where: str = "") -> QuantizedLinear:
    """The layer once more, with an int8 weight. It keeps the bias as it is.

    Raises:
        UnitError: a weight is infinite or NaN.
    """
    assert isinstance(layer, nn.Linear)
    new = QuantizedLinear(layer.in_features, layer.out_features, bias=False, device="meta", block=block)
    if not layer.weight.is_meta:
        values, scales = quantized(layer.weight, block, where)
        new.weight, new.scales = (nn.Parameter(t, requires_grad=False) for t in (values, scales))
    new.bias = layer.bias
    return new.train(layer.training)
