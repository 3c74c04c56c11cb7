"""A device that there is not, for models without values: what an accelerator would hold, on a machine that has none.

torch has a place for device types that are written in Python. Ours has no kernels: under ``FakeTensorMode`` none is
called. What it gives is a second memory, so that the engine does with it what it does with any accelerator's, and an
autograd that knows the type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration

from shardwise.errors import PlanError

NAME = "planned"


def use_planned_device() -> torch.device:
    """The device; its type is registered with torch at the first call, for the life of the process.

    Raises:
        PlanError: this torch has no such place, or somebody else has taken it.
    """
    taken = torch._C._get_privateuse1_backend_name()
    if taken == NAME:
        return torch.device(NAME, 0)
    if taken != "privateuseone":
        raise PlanError(
            f"the place for a planned device is taken by '{taken}'",
            fix=f"plan in a process that does not load '{taken}'",
        )
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        raise PlanError(f"torch {torch.__version__} has no device types written in Python", fix="torch>=2.11")
    setup(NAME, backend_module=_Module())
    return torch.device(NAME, 0)


class _Module:
    """What torch asks the module of a device type."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """There is one."""

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It draws no numbers."""

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(16, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """It draws no numbers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def move(module: nn.Module, device: torch.device) -> None:
    """Put new parameters and buffers on ``device`` in the place of all that a module without values has.

    ``Module.to`` cannot: tensors without values cannot change places while anybody refers to them. Tied ones stay tied.
    """
    moved: dict[int, Any] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    new: torch.Tensor = torch.empty_like(tensor, device=device, requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = tensor, new  # the old one too: its number must not be another's
                held[name] = moved[id(tensor)][1]
