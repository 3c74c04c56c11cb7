"""What this machine has: versions, CPU, memory, accelerators, and the backends of this build of torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

from shardwise import host
from shardwise.cli import settings_file as files
from shardwise.cli.host import cores, cuda_devices
from shardwise.errors import ShardwiseError

_NEEDED = ("torch", "numpy", "safetensors", "typer", "rich", "pyyaml")
_OPTIONAL = (
    "accelerate", "transformers", "datasets", "deepspeed", "torchdata", "tensorboard", "wandb", "mlflow",
    "comet-ml", "clearml", "aim", "swanlab", "trackio",
)  # fmt: skip
# Variables that change how ranks find each other and talk; values such as keys are never shown.
_TELLING = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
_TELLING_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "SHARDWISE_")


def versions() -> dict[str, str]:
    """Name and version of what is installed, and of the system."""
    from shardwise import __version__, device

    out = {"shardwise": __version__, "python": platform.python_version()}
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    out |= device.versions()
    out["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return out


def devices() -> dict[str, Any]:
    """CPU cores and bytes of memory, and per accelerator its name, memory, capability and the peers it reaches."""
    from shardwise import device

    kind = device.accelerator()
    found = [device.facts(device.named(f"{kind}:{index}")) for index in range(device.count())]
    out = {"cores": cores(), **_memory(), "accelerator": kind, "accelerators": found}
    return out | {"driver_devices": 0 if found else _driver_devices()}


def _driver_devices() -> int:
    """Devices that the driver shows and torch cannot use."""
    return cuda_devices(any_torch=True)


def _memory() -> dict[str, int]:
    found = host.memory()
    return {} if found is None else {"bytes": found.total, "free_bytes": found.free}


def backends() -> dict[str, bool]:
    """Which backends of torch.distributed this build has."""
    import torch.distributed as dist

    if not dist.is_available():
        return {"gloo": False, "nccl": False, "mpi": False, "ucc": False}
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
    }


def surroundings() -> dict[str, Any]:
    """The settings file that ``launch`` would use, and the variables that change how ranks talk."""
    path = files.default_path()
    config: dict[str, Any] = {"path": str(path), "state": "there is none"}
    if path.is_file():
        try:
            config = {"path": str(path), "state": "used by launch", "settings": files.read(path).settings.said()}
        except ShardwiseError as error:
            config["state"] = f"broken: {error.what}"
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _TELLING or name.startswith(_TELLING_PREFIXES)
    }
    return {"config": config, "environment": variables}
