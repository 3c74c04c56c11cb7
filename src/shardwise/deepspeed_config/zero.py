"""Stage and homes of the model states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.deepspeed_config.values import AUTO, flag, number, said, section
from shardwise.errors import ConfigError

_LEAVES = ("classes", "names", "name_suffixes")


def states(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of :class:`~shardwise.deepspeed_config.DsFacts` about ``zero_optimization``.

    Raises:
        ConfigError: a stage, home or folder that does not exist, or two that contradict each other.
    """
    given = config.get("zero_optimization")
    # In its oldest form it is true or false: true was stage 1.
    zero = {"stage": int(given)} if isinstance(given, bool) else section(config, "zero_optimization", where)
    stage = number(zero.get("stage"), "zero_optimization.stage", int, where)
    if stage is not None and stage not in range(4):
        raise ConfigError(f"zero_optimization.stage={stage} does not exist", where=where, fix="0, 1, 2 or 3")
    homes, paths, ratio = _homes(zero, where)
    folders = sorted({paths[kind] for kind, home in homes.items() if home == "nvme" and kind in paths})
    if len(folders) > 1:
        raise ConfigError(f"two values of nvme_path: {' and '.join(folders)}", where=where, fix="give one folder")
    size = number(zero.get("mics_shard_size"), "zero_optimization.mics_shard_size", int, where)
    size = None if size in (None, -1) else size
    if size is not None and stage != 3:
        raise ConfigError("zero_optimization.mics_shard_size belongs to stage 3", where=where, fix="set stage to 3")
    return {
        "stage": stage,
        "shard_size": size,
        "offload_optimizer": homes["optimizer"],
        "offload_params": homes["param"],
        "nvme_path": folders[0] if folders else None,
        "offload_ratio": ratio,
        "pin_memory": _pins(zero, where),
        "leaf_modules": _leaves(zero, where),
        "needs_all_gradients": not flag(
            zero.get("ignore_unused_parameters"), "zero_optimization.ignore_unused_parameters", where, default=True
        ),
    }


def _homes(zero: Mapping[str, Any], where: str) -> tuple[dict[str, str], dict[str, str], float]:
    homes: dict[str, str] = {}
    paths: dict[str, str] = {}
    ratio = None
    for kind in ("optimizer", "param"):
        name = f"offload_{kind}"
        part = section(zero, name, where, "zero_optimization.")
        home = part.get("device")
        if said(zero.get("cpu_offload" if kind == "optimizer" else "cpu_offload_param")):
            home = home or "cpu"
        home = getattr(home, "value", home)
        home = "device" if home in (None, AUTO, "none") else home
        if home not in ("device", "cpu", "nvme"):
            raise ConfigError(
                f"zero_optimization.{name}.device={home!r} is not known", where=where, fix="none, cpu or nvme"
            )
        homes[kind] = home
        if said(part.get("nvme_path")) and part["nvme_path"] != "none":
            paths[kind] = str(part["nvme_path"])
        if kind == "optimizer":
            ratio = number(part.get("ratio"), f"zero_optimization.{name}.ratio", float, where, least=0)
    return homes, paths, 1.0 if ratio is None else ratio


def _pins(zero: Mapping[str, Any], where: str) -> bool:
    said_of = {"cpu_offload_use_pin_memory": zero.get("cpu_offload_use_pin_memory")}
    for name in ("offload_optimizer", "offload_param"):
        said_of[f"{name}.pin_memory"] = section(zero, name, where, "zero_optimization.").get("pin_memory")
    return all(flag(value, f"zero_optimization.{name}", where, default=True) for name, value in said_of.items())


def _leaves(zero: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    part = section(zero, "leaf_module", where, "zero_optimization.")
    found = {}
    for name in _LEAVES:
        value = part.get(name)
        if not said(value):
            continue
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
            raise ConfigError(f"zero_optimization.leaf_module.{name}={value!r} is not a list of names", where=where)
        if names:
            found[name] = list(names)
    return found
