"""Training adapters instead of a model: LoRA, as peft does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from shardwise.errors import MissingPackage, PlanError, did_you_mean
from shardwise.plan.building import conversions


@dataclass(frozen=True)
class Lora:
    """Adapters beside the linear layers of a model, which is frozen.

    Attributes:
        r: their rank.
        alpha: their weight times their rank.
        targets: the last parts of the names of layers that get one; peft's choice for the kind of model if empty.
    """

    r: int
    alpha: int = 16
    targets: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read ``r=16``, ``16``, or ``r=16,alpha=32,targets=q_proj+v_proj``.

        Raises:
            PlanError: an unknown word, or a rank below 1.
        """
        found: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.strip().partition("=")
            if not equals:
                key, value = "r", key
            if key not in ("r", "alpha", "targets"):
                raise PlanError(f"--lora has no '{key}'", fix=did_you_mean(key, ["r", "alpha", "targets"], "r=16"))
            found[key] = value.strip()
        try:
            r, alpha = int(found.get("r", "")), int(found.get("alpha", "16"))
        except ValueError:
            raise PlanError(f"--lora '{text}' has no whole number as its rank", fix="--lora r=16") from None
        if r < 1 or alpha < 1:
            raise PlanError(f"--lora '{text}': rank and alpha must be 1 or more", fix="--lora r=16")
        return cls(r, alpha, tuple(t for t in found.get("targets", "").split("+") if t))


def adapt(model: nn.Module, lora: Lora, where: str) -> nn.Module:
    """A model with adapters, on the device of its parameters.

    Raises:
        MissingPackage: peft is not installed.
        PlanError: peft knows no layers for this kind of model, or none of that name are there.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackage("--lora needs peft", fix="pip install peft") from error
    settings = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.targets) or None)
    device = next(model.parameters()).device
    try:
        with torch.device(device), conversions():
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        line = " ".join(str(error).split())[:300]
        raise PlanError(
            f"peft cannot adapt this model: {line}", where=where, fix="--lora r=16,targets=NAME+NAME"
        ) from error
