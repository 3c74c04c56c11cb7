"""The files of a folder that DeepSpeed wrote: which there are, what their indexes say, and whether any is missing.

DeepSpeed's files hold objects of its own classes. They are read without DeepSpeed and without making those objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwise.checkpoint.manifest import MANIFEST
from shardwise.checkpoint.stored_tensor import Stored
from shardwise.checkpoint.torch_format import StandIn, read_nest
from shardwise.errors import CheckpointError

_SCALERS = ("LossScaler", "DynamicLossScaler", "LossScaleConfig")
CLASSES = frozenset(
    {("deepspeed.runtime.fp16.loss_scaler", name) for name in _SCALERS}
    | {("deepspeed.runtime.zero.config", name) for name in ("ZeroStageEnum", "DeepSpeedZeroConfig")}
    | {("deepspeed.runtime.zero.offload_config", "OffloadDeviceEnum")}
    | {("deepspeed.utils.tensor_fragment", "fragment_address")}
    | {("argparse", "Namespace"), ("types", "SimpleNamespace")}
    | {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}
)
"""What the files contain of DeepSpeed's own, and scripts put into ``client_state``. Stand-ins take their places."""
_FILE = re.compile(r"(bf16_|fp16_)?(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp>\d+)_(?P<what>model|optim)_states\.pt")
_VERSION = re.compile(r"(\d+)\.(\d+)")
NEWEST = (0, 19)
"""The newest version whose folders were compared with what DeepSpeed itself holds."""
FIX = "nothing was loaded; load what DeepSpeed's own tools (zero_to_fp32.py, ds_to_universal) make of it"
_COPY = "nothing was loaded; use a complete copy of the folder"


def step_folder(path: Path) -> Path | None:
    """Where the files are: the folder itself, or the one inside that ``latest`` names; ``None``: it is not DeepSpeed's.

    Raises:
        CheckpointError: ``latest`` names a folder that is not there, beside others that are.
    """
    if path.name.startswith("latest") and not path.is_dir():
        path = path.parent  # the file itself, or what stands for the newest one in a folder
    if not path.is_dir():
        return None
    names = {p.name for p in path.iterdir()}
    if any(_FILE.fullmatch(name) for name in names):
        return path
    said = [step for name in _LATEST if name in names and (step := _named(path / name)) is not None]
    for step in said:
        if _holds(step):
            return step
    if names & set(_LATEST) and not any((step / MANIFEST).is_file() for step in said):
        inside = sorted(p.name for p in path.iterdir() if p.is_dir() and _holds(p))
        if inside:
            raise CheckpointError(
                "the file that names the latest step is damaged, or names one that is not there",
                where=str(path / ("latest" if "latest" in names else "latest_universal")),
                fix=f"nothing was loaded; give one of the folders beside it: {', '.join(inside[-5:])}",
            )
    return None


_LATEST = ("latest", "latest_universal")


def _named(file: Path) -> Path | None:
    """The folder that a file names, if it is there and beside it."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        tag = stream.read(256).decode("utf-8", "replace").strip()
    step = file.parent / tag if tag and "\0" not in tag and Path(tag).name == tag else None
    return step if step is not None and step.is_dir() else None


def _holds(step: Path) -> bool:
    return any(_FILE.fullmatch(p.name) for p in step.iterdir())


@dataclass
class Folder:
    """A folder's files as indexes.

    Args:
        path: of one step.
        models: each rank's model states; one, but under stage 3.
        optims: each rank's optimizer state; none under stage 0.
        universal: what stands for those in a universal checkpoint.
        stage: 0 to 3.
        files: all that were read.
    """

    path: Path
    models: list[Mapping[str, Any]]
    optims: list[Mapping[str, Any]]
    universal: Mapping[str, Any] | None
    stage: int
    files: list[Path] = field(default_factory=list)

    @property
    def first(self) -> Mapping[str, Any]:
        return self.models[0]

    @property
    def names(self) -> list[str]:
        """The model's state dict."""
        return list(mapping(self.first.get("module"), self.files[0]))

    @property
    def groups(self) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Names and shapes of what the optimizer has, as it lies in its flat groups. Empty under stage 0."""
        return shapes(self.first.get("param_shapes") or [])

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.path), fix=_COPY)


def shapes(groups: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(str(name), tuple(map(int, shape))) for name, shape in group.items()] for group in groups]


def mapping(value: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError("not a file that DeepSpeed writes", where=str(file), fix=FIX)
    return value


def read_folder(path: Path) -> Folder:
    """Read the indexes of all ranks' files.

    Args:
        path: of :func:`step_folder`.

    Raises:
        CheckpointError: a file is missing or damaged; tensor, pipeline or expert parallelism; a newer version.
    """
    found = _files(path)
    models = [mapping(read_nest(file, also=CLASSES), file) for file in found["model"]]
    optims = [
        mapping(mapping(read_nest(file, also=CLASSES), file).get("optimizer_state_dict"), file)
        for file in found["optim"]
    ]
    extra: list[Path] = []
    universal = None
    if (path / "zero").is_dir() and not optims:
        common = path / "zero" / "optimizer_state.pt"
        if not common.is_file():
            raise CheckpointError("a file of a universal checkpoint is missing", where=str(common), fix=_COPY)
        universal, extra = mapping(read_nest(common, also=CLASSES), common), [common]
    first = models[0]
    folder = Folder(path, models, optims, universal, 0, [*found["model"], *found["optim"], *extra])
    _check_version(folder, first.get("ds_version"))
    _check_parallel(folder, first)
    folder.stage = _stage(folder, (optims or [universal or {}])[0])
    _check_ranks(folder)
    return folder


def _files(path: Path) -> dict[str, list[Path]]:
    files: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for file in sorted(path.iterdir()):
        match = _FILE.fullmatch(file.name)
        if match and int(match["mp"]):
            raise CheckpointError("written with tensor parallelism", where=str(path), fix=FIX)
        if match:
            rank = int(match["rank"] or 0)
            if rank in files[match["what"]]:
                raise CheckpointError(f"two files of rank {rank}'s {match['what']} states", where=str(path), fix=FIX)
            files[match["what"]][rank] = file
        elif file.name.startswith(("layer_", "expert_")):
            raise CheckpointError("written with pipeline or expert parallelism", where=str(path), fix=FIX)
    if (path / "offloaded_tensors").is_dir():
        raise CheckpointError(
            "its optimizer state was offloaded to NVMe, and stands in raw files that do not say what is in them",
            where=str(path), fix="nothing was loaded; save it once more with offload_optimizer to cpu",
        )  # fmt: skip
    for what, found in files.items():
        if found and sorted(found) != list(range(len(found))):
            missing = min(set(range(max(found))) - found.keys())
            raise CheckpointError(f"rank {missing}'s file of {what} states is missing", where=str(path), fix=_COPY)
    if not files["model"]:
        raise CheckpointError("there is no file of model states", where=str(path), fix=_COPY)
    return {what: [found[rank] for rank in sorted(found)] for what, found in files.items()}


def _check_version(folder: Folder, version: Any) -> None:
    match = _VERSION.match(version) if isinstance(version, str) else None
    if match and (int(match[1]), int(match[2])) > NEWEST:
        raise CheckpointError(
            f"written by DeepSpeed {version}; folders are read up to version {NEWEST[0]}.{NEWEST[1]}",
            where=str(folder.path), fix=f"pip install --upgrade shardwise; or: {FIX}",
        )  # fmt: skip


def _check_parallel(folder: Folder, first: Mapping[str, Any]) -> None:
    autoep = any("autoep" in str(key).lower() and value for key, value in first.items())
    if autoep or first.get("num_experts"):
        raise CheckpointError("written with expert parallelism", where=str(folder.path), fix=FIX)
    dimensions = first.get("checkpoint_parallel_dimensions")
    degrees = dict(dimensions) if isinstance(dimensions, Mapping) else {}
    if degrees.get("pp_degree", 1) != 1:
        raise CheckpointError("written with pipeline parallelism", where=str(folder.path), fix=FIX)
    if first.get("mp_world_size", 1) != 1 or degrees.get("tp_degree", 1) != 1:
        raise CheckpointError("written with tensor parallelism", where=str(folder.path), fix=FIX)


def _stage(folder: Folder, optim: Mapping[str, Any]) -> int:
    stage = optim.get("zero_stage")
    if isinstance(stage, StandIn) and stage.arguments:
        stage = stage.arguments[0]
    if isinstance(stage, int):
        return stage
    config = folder.first.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    said = zero.get("stage") if isinstance(zero, Mapping) else None
    if not optim:
        return 0
    return said if isinstance(said, int) and said in (1, 2) else 1  # bf16 without ZeRO is cut in the same way


def _check_ranks(folder: Folder) -> None:
    if not folder.optims:
        if folder.universal is None and folder.first.get("param_shapes"):
            raise folder.damaged("all ranks' files of optimizer states are missing")
        return
    counts = folder.optims[0].get("partition_count", len(folder.optims))
    expected = max(counts) if isinstance(counts, list) else int(counts)
    if len(folder.optims) != expected:
        raise CheckpointError(
            f"written by {expected} ranks, and {len(folder.optims)} of their files are there", where=str(folder.path),
            fix="fetch the others too",
        )  # fmt: skip
    if folder.stage == 3 and len(folder.models) != expected:
        raise folder.damaged(f"written by {expected} ranks, and {len(folder.models)} files of model states are there")


def read_universal(folder: Folder, name: str) -> dict[str, Any]:
    """What a universal checkpoint has of a parameter: ``fp32``, and its optimizer state by key."""
    place = folder.path / "zero" / name
    if Path(name).name != name or not place.is_dir():
        raise folder.damaged(f"'{name}' is missing")
    out: dict[str, Any] = {}
    for file in sorted(place.glob("*.pt")):
        found = read_nest(file, also=CLASSES)
        folder.files.append(file)
        if isinstance(found, Mapping):
            found = found.get("param")
        out[file.stem] = found
    if not isinstance(out.get("fp32"), Stored):
        raise folder.damaged(f"'{name}' has no fp32.pt")
    return out
