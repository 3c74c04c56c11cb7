"""The part of an engine that saves and loads: our own format under DeepSpeed's calls, ``tag`` and ``latest``."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from shardwise import checkpoint
from shardwise.checkpoint.coordination import CollectiveBlock
from shardwise.comm import World
from shardwise.deepspeed.engine_stepping import Stepping
from shardwise.errors import CheckpointError, LeftOut
from shardwise.naming import clean_name

LATEST = "latest"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Saving(Stepping):
    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save model, optimizer, scheduler, loss scale, counters and the script's own state. Every rank calls it.

        The folder ``save_dir/tag`` appears complete or not at all, and any strategy on any number of ranks loads it.

        Args:
            save_dir: made if it is not there.
            tag: its name; ``global_step<n>`` by default. The same on all ranks: how strictly is what
                ``checkpoint.tag_validation`` says.
            client_state: of the script: tensors, numbers, strings and nests of these; rank 0's is written.
            save_latest: name this one in the file ``latest``, when it is complete.
            exclude_frozen_parameters: leave them out: whoever loads it keeps its own, as a fine-tuning run does that
                begins with the same ones.

        Raises:
            CheckpointError: on every rank; what was there before still is.
        """
        with CollectiveBlock("save_checkpoint") as ranks:
            if save_dir is None or not os.fspath(save_dir):
                raise CheckpointError("save_dir is empty", where="save_checkpoint", fix="name a folder")
            if not isinstance(client_state, (Mapping, NoneType)):
                raise CheckpointError(
                    f"client_state is a {type(client_state).__name__}", where="save_checkpoint", fix="give a dict"
                )
            ranks.mine = _named(f"global_step{self.global_steps}" if tag is None else str(tag)).encode()
        name = self._agreed_tag([text.decode() for text in ranks.gathered])
        folder = Path(save_dir)
        checkpoint.save(
            folder / name,
            models=[self.module],
            frozen=not exclude_frozen_parameters,
            optimizers=[] if self.optimizer is None else [self.optimizer.optimizer],
            state={
                "client_state": dict(client_state or {}),
                "scheduler": _state_of(self.lr_scheduler),
                "loss_scaler": _state_of(None if self.optimizer is None else self.optimizer.loss_scaler),
                "global_steps": self.global_steps,
                "global_samples": self.global_samples,
                "skipped_steps": self.skipped_steps,
                "micro_steps": self.micro_steps,
            },
            info={"step": self.global_steps, "tag": name},
        )
        if save_latest:
            self._write_latest(folder, name)
        return True

    def _agreed_tag(self, tags: list[str]) -> str:
        """Rank 0's, where ranks differ and that is allowed."""
        if len(set(tags)) > 1 and self.facts.tag_validation == "fail":
            raise CheckpointError(
                f"ranks name it differently: {', '.join(dict.fromkeys(tags))}",
                where="save_checkpoint",
                fix="give the same tag on all ranks: another number of ranks could not find its own",
            )
        if len(set(tags)) > 1 and self.facts.tag_validation == "warn" and self.global_rank == 0:
            warnings.warn(
                f"ranks name a checkpoint differently: {', '.join(dict.fromkeys(tags))}; it is rank 0's", stacklevel=3
            )
        return tags[0]

    def _write_latest(self, folder: Path, name: str) -> None:
        """The last thing a save does, at once or not at all."""
        with CollectiveBlock(f"writing {folder / LATEST}"):
            if World.current().rank == 0:
                beside = folder / f".{LATEST}.{os.getpid()}"
                beside.write_text(name, encoding="utf-8")
                os.replace(beside, folder / LATEST)

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from what any run saved, whatever its stage, number of ranks and precision. Every rank calls it.

        Folders that DeepSpeed wrote are read as they are.

        Args:
            load_dir: where :meth:`save_checkpoint` saved.
            tag: which one; by default the one that the file ``latest`` names.
            load_module_strict: raise if names or shapes differ. Otherwise what fits is loaded.
            load_optimizer_states: also the optimizer's state.
            load_lr_scheduler_states: also the scheduler's.
            load_module_only: nothing but the model, no counters either.
            custom_load_fn: not served.

        Returns:
            The folder, and the script's own state; ``(None, None)``, with a warning, where there is no ``latest``.

        Raises:
            CheckpointError: on every rank. See :func:`shardwise.checkpoint.load`: what can be known before is, and then
                nothing has changed.
        """
        folder = Path(load_dir)
        wishes = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
        }
        with CollectiveBlock(f"reading {folder / LATEST}") as ranks:
            if custom_load_fn is not None:
                raise LeftOut(
                    "custom_load_fn gets a whole state dict in memory, which is not made here",
                    where="load_checkpoint",
                    fix="rename with shardwise.checkpoint.export and load_model, or load into engine.module yourself",
                )
            asked = {"tag": None if tag is None else _named(str(tag))} | {k: bool(v) for k, v in wishes.items()}
            ranks.mine = json.dumps([asked, self._latest(folder) if tag is None else str(tag)]).encode()
        name = _agreed([json.loads(text) for text in ranks.gathered])
        if name is None:
            if self.global_rank == 0:
                warnings.warn(f"{folder / LATEST} is not there: nothing is loaded", stacklevel=2)
            return None, None
        whole = not load_module_only
        wanted = whole and load_optimizer_states and self.optimizer is not None
        optimizers = [self.optimizer.optimizer] if wanted and self.optimizer is not None else None
        loaded = checkpoint.load(folder / name, models=[self.module], optimizers=optimizers, strict=load_module_strict)
        state = dict(loaded.state)
        if whole:
            self._take(state, load_optimizer_states, load_lr_scheduler_states)
        self._forget_window()
        return str(folder / name), dict(state.get("client_state") or {})

    def _latest(self, folder: Path) -> str | None:
        """What the file names, read by rank 0. An empty file is an error."""
        file = folder / LATEST
        if World.current().rank != 0 or not file.is_file():
            return None
        name = file.read_text(encoding="utf-8").strip()
        if not name:
            raise CheckpointError("the file is empty", where=str(file), fix="give tag=, or write the tag into it")
        return name

    def _take(self, state: Mapping[str, Any], optimizer: bool, scheduler: bool) -> None:
        if scheduler and self.lr_scheduler is not None and state.get("scheduler") is not None:
            self.lr_scheduler.load_state_dict(state["scheduler"])
        scaler = None if self.optimizer is None else self.optimizer.loss_scaler
        if optimizer and scaler is not None and state.get("loss_scaler") is not None:
            scaler.load_state_dict(state["loss_scaler"])
        self.global_steps = int(state.get("global_steps", 0))
        self.global_samples = int(state.get("global_samples", self.global_steps * self._train_batch))
        self.skipped_steps = int(state.get("skipped_steps", 0))
        # A window that was begun is begun anew: its gradients were not saved.
        self.micro_steps = self.global_steps * self._steps.length

    def _forget_window(self) -> None:
        if self.optimizer is not None:
            self._steps.drop_gradients()
            self._steps.restart()
            self._begin_micro_batch()

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model's weights in the dtype it computes in, for others to load. Every rank calls it.

        Args:
            save_dir: made if it is not there.
            save_filename: of ``torch.save``, or of safetensors if it ends so.
            exclude_frozen_parameters: leave them out.

        Returns:
            ``True``, under every stage.

        Cost: rank 0 has the whole model in host memory.
        """
        target = Path(save_dir) / save_filename
        values = checkpoint.full_state_dict(self.module, rank0_only=True)
        with CollectiveBlock(f"writing {target}", slow=True):
            if World.current().rank == 0:
                values = self._in_compute_dtype(values)
                if exclude_frozen_parameters:
                    frozen = {clean_name(n) for n, p in self.module.named_parameters() if not p.requires_grad}
                    values = {name: value for name, value in values.items() if clean_name(name) not in frozen}
                Path(save_dir).mkdir(parents=True, exist_ok=True)
                beside = target.with_name(f".{target.name}.{os.getpid()}")
                _write(values, beside, target.suffix == ".safetensors")
                os.replace(beside, target)
        return True

    save_fp16_model = save_16bit_model

    def _in_compute_dtype(self, values: dict[str, Any]) -> dict[str, Any]:
        dtype = _DTYPES.get(self.strategy.param_dtype or "")
        if dtype is None:
            return values
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in values.items()
        }

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The whole model's state dict, on every rank. Every rank calls it."""
        values: dict[str, Any] = self.module.state_dict()
        if exclude_frozen_parameters:
            frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
            values = {name: value for name, value in values.items() if name not in frozen}
        return values


def _named(tag: str) -> str:
    """A tag, which is a name inside of a folder."""
    if not tag or ".." in Path(tag).parts or Path(tag).is_absolute() or tag == ".":
        raise CheckpointError(f"tag={tag!r} names no folder inside of another one", fix="give a name")
    return tag


def _agreed(asked: list[Any]) -> str | None:
    """The tag to load: rank 0's, which all have if they said one. Raise if they ask for different things."""
    first, name = asked[0]
    for rank, (its, _) in enumerate(asked):
        for key, value in its.items():
            if value != first[key]:
                raise CheckpointError(
                    f"ranks ask for different things: {key}={first[key]!r} on rank 0, {value!r} on rank {rank}",
                    where="load_checkpoint",
                    fix="call it alike on all ranks",
                )
    return None if name is None else str(name)


def _state_of(item: Any) -> Any:
    return None if item is None or not hasattr(item, "state_dict") else item.state_dict()


def _write(values: dict[str, Any], path: Path, safe: bool) -> None:
    if safe:
        from safetensors.torch import save_file

        save_file({k: v.contiguous().clone() for k, v in values.items()}, str(path), metadata={"format": "pt"})
    else:
        torch.save(values, path)
