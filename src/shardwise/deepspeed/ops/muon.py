"""Muon for matrices, and Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Muon, Optimizer

from shardwise.deepspeed.ops.held import after, can_fuse, listed
from shardwise.errors import ConfigError, OptimizerError

_MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "nesterov": True, "ns_steps": 5}
_ADAM = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
_ELSEWHERE = ("embed", "lm_head")


class MuonWithAuxAdam(Optimizer):
    """Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") on ``torch.optim.Muon``.

    A matrix moves along its momentum made orthogonal, by ``lr * sqrt(max(1, rows / columns))``. Kernels of
    convolutions are matrices with a row for each output channel. All of a parameter's gradient is needed: the engine
    adds up micro-batches and clips *before* the step, so before the momentum sees the gradient and before it is made
    orthogonal. (Clipped afterwards, the length of the update would depend on other parameters' gradients.) It needs
    whole parameters: shard with ``layout=tensor``.

    Weight decay shrinks parameters by ``lr * weight_decay``. What has less than two dimensions (biases, norms) is not
    decayed, unless its group says a ``weight_decay`` of its own.

    Args:
        param_groups: groups with ``use_muon``: ``True`` for ``torch.optim.Muon``, ``False`` for ``torch.optim.Adam``.
            Either takes the optimizer's own settings: ``lr``, ``weight_decay``, and ``momentum`` or ``betas`` and
            ``eps``. See :func:`muon_groups`.
        adam_w_mode: of Adam: weight decay shrinks parameters; ``False``: it is added to gradients.

    Raises:
        OptimizerError: a group without ``use_muon``, or vectors in one with it.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], adam_w_mode: bool = True) -> None:
        self.adam_w_mode = adam_w_mode
        super().__init__(listed(param_groups), {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not isinstance(param_group.get("use_muon"), bool):
            raise OptimizerError("a group does not say use_muon", where="MuonWithAuxAdam", fix="True or False")
        usual = _MUON if param_group["use_muon"] else _ADAM
        for key, value in usual.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        if param_group["use_muon"] and any(p.ndim < 2 for p in param_group["params"]):
            raise OptimizerError("Muon is for matrices", where="MuonWithAuxAdam", fix="use_muon=False for vectors")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = after(closure)
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None and p.numel()]
            if held and group["use_muon"]:
                self._muon(group, held)
        others = [group for group in self.param_groups if not group["use_muon"]]
        if any(p.grad is not None for group in others for p in group["params"]):
            self._adam(others)
        return loss

    def _muon(self, group: dict[str, Any], held: list[Tensor]) -> None:
        """Torch's optimizer steps on views with two dimensions, of parameters, gradients and momenta."""
        matrices = []
        momenta = {}
        for p in held:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            matrix = p.detach().flatten(1)
            matrix.grad = p.grad.flatten(1) if p.grad is not None else None
            momenta[matrix] = {"momentum_buffer": state["momentum_buffer"].flatten(1)}
            matrices.append(matrix)
        settings = {key: group[key] for key in _MUON}
        inner = Muon([{"params": matrices, **settings}])
        inner.state.update(momenta)
        inner.step()
        for p, matrix in zip(held, matrices, strict=True):
            if matrix.data_ptr() != p.data_ptr():  # no view, as in channels_last
                p.copy_(matrix.view(p.shape))

    def _adam(self, groups: list[dict[str, Any]]) -> None:
        """Torch's optimizer steps on the groups themselves, with the state of this one."""
        params = [p for group in groups for p in group["params"]]
        inner = Adam(params, decoupled_weight_decay=self.adam_w_mode, fused=True if can_fuse(params) else None)
        usual = inner.param_groups[0]
        inner.param_groups = [{**usual, **group} for group in groups]
        inner.state = self.state
        inner.step()


def muon_groups(
    params: Iterable[Any], settings: Mapping[str, Any], model: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Groups for :class:`MuonWithAuxAdam`.

    Matrices go to Muon, but embeddings and heads to Adam: modules of torch's ``Embedding`` kinds, and parameters with
    ``embed`` or ``lm_head`` in their names. A parameter that has ``use_muon`` goes where that says.

    Args:
        params: parameters, or groups of them with settings of their own.
        settings: for all groups: ``lr``, or ``muon_lr`` and ``adam_lr``; ``momentum``, ``betas``, ``eps``,
            ``weight_decay``.
        model: whose parameters they are. Without it their names are not known.

    Raises:
        ConfigError: a setting that does not exist.
    """
    known = {*_MUON, *_ADAM, "muon_lr", "adam_lr"}
    odd = sorted(set(settings) - known)
    if odd:
        raise ConfigError(f"optimizer.params.{odd[0]} is no setting of Muon", fix=f"one of {', '.join(sorted(known))}")
    elsewhere = _embeddings(model) if model is not None else set()
    items = listed(params)
    given = [item if isinstance(item, dict) else {"params": [item]} for item in items]
    if not any(isinstance(item, dict) for item in items):
        given = [{"params": items}]
    groups = []
    for group in given:
        tensors = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        for usual, own_lr, wanted in (
            (_MUON, "muon_lr", "matrix"),
            (_ADAM, "adam_lr", "matrix"),
            (_ADAM, "adam_lr", "vector"),
        ):
            half = [p for p in tensors if _goes(p, elsewhere) == (usual is _MUON, wanted)]
            if not half:
                continue
            said = {key: value for key, value in settings.items() if key in usual}
            if own_lr in settings:
                said["lr"] = settings[own_lr]
            if wanted == "vector":
                said["weight_decay"] = 0.0
            own = {key: value for key, value in group.items() if key in usual or key == "name"}
            groups.append({"params": half, "use_muon": usual is _MUON, **said, **own})
    return groups


def _goes(p: Tensor, elsewhere: set[int]) -> tuple[bool, str]:
    """(to Muon, is it decayed as a matrix)."""
    shape = "matrix" if p.ndim >= 2 else "vector"
    return bool(getattr(p, "use_muon", p.ndim >= 2 and id(p) not in elsewhere)), shape


def _embeddings(model: nn.Module) -> set[int]:
    """Parameters of embeddings and heads, tied ones too."""
    found = {id(p) for name, p in model.named_parameters() if any(word in name.lower() for word in _ELSEWHERE)}
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found |= {id(p) for p in module.parameters(recurse=False)}
    return found
