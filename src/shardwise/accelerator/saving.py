"""The part of an Accelerator that saves and loads: whole training states, models for others, single objects."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from shardwise import checkpoint, operations
from shardwise.accelerator import deepspeed_folders
from shardwise.accelerator.base import Base
from shardwise.accelerator.loader_positions import LoaderFacts, check_fit
from shardwise.accelerator.state_hooks import run_load_hooks, run_save_hooks
from shardwise.checkpoint.coordination import CollectiveBlock
from shardwise.checkpoint.directory import newest
from shardwise.comm import World
from shardwise.compat.object_files import save as save_object
from shardwise.data_loader import PreparedLoader
from shardwise.engine.hooks import engine_of
from shardwise.errors import CheckpointError
from shardwise.naming import clean_names


class Saving(Base):
    _said_what_is_ignored = False

    # --- where ---------------------------------------------------------------------------------
    @property
    def project_dir(self) -> str | None:
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | None:
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """The number of the next automatically named checkpoint."""
        return self.project_configuration.iteration

    def _checkpoints(self) -> Path:
        if self.project_dir is None:
            raise CheckpointError(
                "there is no folder for automatically named checkpoints", fix="Accelerator(project_dir=...)"
            )
        return Path(self.project_dir) / "checkpoints"

    def has_checkpoint(self) -> bool:
        """Is there a complete checkpoint that :meth:`load_state` without arguments would load? A collective.

        It waits for a save that is under way.
        """
        checkpoint.settle_saves()
        return newest(self._checkpoints()) is not None

    # --- hooks ---------------------------------------------------------------------------------
    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save these along with the rest, in this order: anything with ``state_dict`` and ``load_state_dict``.

        Raises:
            CheckpointError: something that has not both.
        """
        both = ("state_dict", "load_state_dict")
        lacking = [
            f"object {index}, a {type(item).__name__}"
            for index, item in enumerate(objects)
            if not all(callable(getattr(item, name, None)) for name in both)
        ]
        if lacking:
            raise CheckpointError(
                f"there is no state_dict or no load_state_dict: {'; '.join(lacking)}",
                where="register_for_checkpointing",
                fix="give them both methods, or save them yourself with accelerator.save",
            )
        self._custom_objects.extend(objects)

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call ``hook(models, weights, output_dir)`` on every rank at the beginning of :meth:`save_state`.

        ``weights`` holds a whole state dict per model on rank 0 and an empty one elsewhere. The values of a model
        whose entry the hook removes, on rank 0 only or everywhere, are left out of the checkpoint; what optimizers
        have of it is saved. What the hook writes into ``output_dir`` becomes part of it.
        """
        return _register(self._save_hooks, hook)

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call ``hook(models, input_dir)`` on every rank at the beginning of :meth:`load_state`.

        A model that the hook removes from ``models``, on every rank, is its own to load.
        """
        return _register(self._load_hooks, hook)

    # --- the whole state -----------------------------------------------------------------------
    def save_state(self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True) -> str:
        """Save everything that was prepared and registered, so that a later run goes on exactly from here.

        Models, optimizers, schedulers, the loss scale, the place in each dataloader, the random states of every
        rank, and registered objects. The folder appears complete or not at all; a run under another strategy or on
        another number of ranks can load it. Gradients of an unfinished accumulation window are not saved; a warning
        says so.

        Args:
            output_dir: with ``automatic_checkpoint_naming`` leave it out: the next free ``checkpoint_<n>`` in the
                project's ``checkpoints`` is taken, and older ones beyond ``total_limit`` are deleted. Folders that are
                given here are never deleted.
            safe_serialization: accepted for Accelerate's sake. Nothing in a checkpoint is a pickle either way.

        Returns:
            The folder.

        Raises:
            CheckpointError: it could not be written; every rank raises, and what was there before is still there.
            CommError: only other ranks call it.

        Cost: a collective. Every rank writes what it holds; models with hooks are also gathered on rank 0. Where a
        script calls it on the main process only, the others take part when they ask for their next batch, begin a
        micro-batch, or come to another collective of the Accelerator. A loop that does none of these waits.
        """
        with self._together("save_state", _folder(output_dir)):
            return str(self._save(output_dir, checkpoint.save))

    def async_save_state(self, output_dir: str | os.PathLike[str] | None = None) -> checkpoint.AsyncSave:
        """:meth:`save_state` that returns when it has copied what may change at once, and is written while the
        training goes on. The next optimizer step waits until optimizer state is copied as well.

        The next save or load, and :meth:`end_training`, wait for it first, and raise what went wrong on every rank.
        Until it is complete, the latest checkpoint is the one before.

        Returns:
            A handle: ``wait()`` for the folder or the error, ``done``, ``wait_for_copy()``.

        Cost: the copy of values, and of state that is not in host memory; host memory for all that this rank writes,
        kept for the next time. Hooks, and models that they see, are dealt with at once.
        """
        with self._together("async_save_state", _folder(output_dir)):
            return self._save(output_dir, checkpoint.async_save)

    def _save(self, output_dir: str | os.PathLike[str] | None, save: Callable[..., Any]) -> Any:
        checkpoint.settle_saves()
        if not self._steps.sync_gradients and World.current().rank == 0:
            warnings.warn(
                "saving inside an accumulation window: gradients are not saved, so a run that is resumed here goes on "
                "without the micro-batches since the last step; save where accelerator.sync_gradients is true",
                stacklevel=3,
            )
        named = output_dir is None or self.project_configuration.automatic_checkpoint_naming
        self._say_what_is_ignored(output_dir, named)
        path = self._next_checkpoint() if named else Path(os.fspath(output_dir))  # type: ignore[arg-type]
        excluded, beside = run_save_hooks(self._save_hooks.values(), self._models, path, self._apart)
        loaders = self._dataloaders
        positions = [loader.state_dict() for loader in loaders]
        saved = save(
            path,
            models=self._models,
            excluded=excluded,
            optimizers=[o.optimizer for o in self._optimizers],
            state={
                "schedulers": [s.scheduler.state_dict() for s in self._schedulers],
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "objects": [item.state_dict() for item in self._custom_objects],
                "loaders": positions,
                "step": self.step,
                "optimizer_steps": [o.steps_taken for o in self._optimizers],
            },
            rank_state={"rng": checkpoint.rng_state(), "loaders": positions},
            info={
                "step": max((o.steps_taken for o in self._optimizers), default=self.step),
                "accelerator": self._counts() | {"loaders": self._facts_of(loaders)},
            },
            files_from=None if beside is None else beside.move_into,
            total_limit=self.project_configuration.total_limit if named else None,
        )
        if named:
            self.project_configuration.iteration = int(path.name.rpartition("_")[2]) + 1
        return saved

    def _say_what_is_ignored(self, output_dir: str | os.PathLike[str] | None, named: bool) -> None:
        """Once: a folder beside automatic names, or a limit on folders that the script names itself."""
        limit = self.project_configuration.total_limit
        if output_dir is None or not (named or limit) or self._said_what_is_ignored:
            return
        self._said_what_is_ignored = True
        if World.current().rank == 0:
            warnings.warn(
                f"save_state('{os.fspath(output_dir)}') goes to a checkpoint_<n> of {self._checkpoints()}, because of "
                "automatic_checkpoint_naming=True; leave the folder out, or the automatic names"
                if named
                else f"total_limit={limit} does not count folders that save_state is given, and none of them is "
                "deleted; leave the folder out, with automatic_checkpoint_naming=True, or delete old ones with "
                "shardwise.checkpoint.prune",
                stacklevel=4,
            )

    def _facts_of(self, loaders: Sequence[PreparedLoader]) -> list[dict[str, Any]]:
        found = []
        for loader in loaders:
            reading = any(loader is one for one in self._steps.loaders)
            found.append(asdict(LoaderFacts.of(loader, bool(loader.state_dict()["batches"]), reading)))
        return found

    def _next_checkpoint(self) -> Path:
        """Numbered beyond everything there, also what ``total_limit`` has deleted since: the newest has the largest."""
        folder = self._checkpoints()
        free = int(checkpoint.next_path(folder).name.rpartition("_")[2])
        return folder / f"checkpoint_{operations.from_first(max(free, self.save_iteration))}"

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        *,
        strict: bool = True,
        verify: bool = False,
        resume: str | None = None,
    ) -> bool:
        """Load what :meth:`save_state` saved, under this or another strategy and number of ranks.

        Also a folder that DeepSpeed wrote, by itself or under accelerate: model, optimizer, scheduler, loss scale and
        the number of steps. Positions of dataloaders and registered objects are not in there.

        Where ``import accelerate`` means Shardwise, a loader begins its epoch again, in the same order, unless
        ``use_stateful_dataloader`` is set: scripts for Accelerate pass over the batches before by themselves.

        Prepare and register the same things in the same order first; dataloaders that were prepared last, for an
        evaluation say, may come later. A new accumulation window begins, without the gradients there are. The next
        iteration of a dataloader goes on with the batches that were left; :meth:`skip_first_batches` does it the
        explicit way.

        Args:
            input_dir: a folder; without it, or with ``"latest"``, the newest complete one of the project's
                ``checkpoints``. ``folder/latest`` is the newest complete one in any folder.
            load_kwargs: accepted for Accelerate's sake; ``strict`` is read from it.
            strict: raise if parameters differ in name or shape; otherwise load those that fit.
            verify: compare every byte with its checksum before anything changes; see :func:`checkpoint.load`.
            resume: ``"latest"``: the newest complete one in the project's ``checkpoints``, or in the folder
                ``input_dir``, if there is one. So a script can begin with ``load_state(resume="latest")``, whether it
                is started for the first time or again.

        Returns:
            Whether there was one: always, without ``resume``.

        Raises:
            CheckpointError: a file is missing or damaged, or something was saved that is not here, or the other way
                round. It names the file or the thing; every rank raises, before anything has changed. Only bytes with
                a wrong checksum are found later, without ``verify``: models then refuse to run until a load succeeds.
        """
        if load_kwargs and set(load_kwargs) - {"strict", "weights_only", "map_location"}:
            raise CheckpointError(
                f"load_kwargs holds {', '.join(sorted(load_kwargs))}", fix="only strict= has a meaning here"
            )
        strict = (load_kwargs or {}).get("strict", strict)
        with self._together("load_state"):
            return self._load(input_dir, resume, strict, verify)

    def _load(self, input_dir: str | os.PathLike[str] | None, resume: str | None, strict: bool, verify: bool) -> bool:
        checkpoint.settle_saves()
        path = self._checkpoint_at(input_dir, resume)
        if path is None:
            return False
        if (step := deepspeed_folders.found_at(path)) is not None:
            self._load_deepspeed(step, path, strict)
            return True
        self._check_same_things(path)
        excluded = run_load_hooks(self._load_hooks.values(), self._models, path)
        loaded = checkpoint.load(
            path,
            models=self._models,
            excluded=excluded,
            optimizers=[o.optimizer for o in self._optimizers],
            strict=strict,
            verify=verify,
        )
        self._steps.restart()
        self._steps.drop_gradients()
        state = loaded.state
        for scheduler, values in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.scheduler.load_state_dict(values)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for item, values in zip(self._custom_objects, state["objects"], strict=True):
            item.load_state_dict(values)
        own = loaded.rank_state["loaders"] if loaded.rank_state is not None else state["loaders"]
        for loader, position in zip(self._dataloaders, own, strict=False):
            loader.load_state_dict(self._begin_of_epoch(position))
        self.step = state["step"]
        for optimizer, taken in zip(self._optimizers, state["optimizer_steps"], strict=False):
            optimizer.steps_taken = taken
        if loaded.rank_state is not None:
            checkpoint.set_rng_state(loaded.rank_state["rng"])
        number = path.name.rpartition("_")[2]
        if path.name.startswith("checkpoint_") and number.isdigit():
            self.project_configuration.iteration = int(number) + 1
        return True

    def _begin_of_epoch(self, position: dict[str, Any]) -> dict[str, Any]:
        """Where a script for Accelerate expects a loader: it passes over the batches before by itself."""
        if not self._as_accelerate or self.dataloader_config.use_stateful_dataloader:
            return position
        return {key: value for key, value in position.items() if key != "stateful"} | {"batches": 0}

    def _load_deepspeed(self, step: Path, beside: Path, strict: bool) -> None:
        optimizers = [o.optimizer for o in self._optimizers]
        state = checkpoint.load(step, models=self._models, optimizers=optimizers, strict=strict).state
        self._steps.restart()
        self._steps.drop_gradients()
        with CollectiveBlock(f"load_state('{beside}')"):
            values = deepspeed_folders.scheduler_state(state, beside)
        known = values is not None and len(self._schedulers) == 1
        if known and values is not None:
            self._schedulers[0].scheduler.load_state_dict(values)
        if self.scaler is not None:
            deepspeed_folders.take_loss_scale(self.scaler, state["loss_scaler"])
        self.step = state["global_steps"]
        for optimizer in self._optimizers:
            optimizer.steps_taken = state["global_steps"] - state["skipped_steps"]
        missing = {"state of schedulers": bool(self._schedulers) and not known, "positions of dataloaders":
                   bool(self._dataloaders), "registered objects": bool(self._custom_objects)}  # fmt: skip
        deepspeed_folders.say_what_begins_anew(step, [what for what, is_so in missing.items() if is_so])

    def _checkpoint_at(self, input_dir: str | os.PathLike[str] | None, resume: str | None) -> Path | None:
        given = None if input_dir is None else Path(os.fspath(input_dir))
        if resume is not None:
            if resume != "latest":
                raise CheckpointError(
                    f"resume={resume!r}", fix='resume="latest", or the folder of a checkpoint as input_dir'
                )
            return newest(self._checkpoints() if given is None else given)
        if given is None or (given == Path("latest") and self.project_dir is not None):
            given = self._checkpoints() / "latest"
        return checkpoint.find(given)

    def _counts(self) -> dict[str, int]:
        return {
            "schedulers": len(self._schedulers),
            "registered objects": len(self._custom_objects),
        }

    def _check_same_things(self, path: Path) -> None:
        """Raise on every rank before anything is loaded, if other things were saved than are prepared here."""
        with CollectiveBlock(f"load_state('{path}')"):
            saved = checkpoint.read_manifest(path).info.get("accelerator")
            if saved is None:
                raise CheckpointError(
                    "this checkpoint was not saved by accelerator.save_state",
                    where=str(path),
                    fix="load it with shardwise.checkpoint.load",
                )
            for what, number in self._counts().items():
                if saved.get(what) != number:
                    raise CheckpointError(
                        f"it holds {saved.get(what)} {what}, and {number} are prepared here",
                        where=str(path),
                        fix="prepare and register the same things in the same order before loading",
                    )
            here = [LoaderFacts.of(loader) for loader in self._dataloaders]
            lost = check_fit([LoaderFacts(**one) for one in saved.get("loaders", [])], here, str(path))
        if lost and World.current().rank == 0:
            warnings.warn(
                f"{path} holds the position of dataloader {', '.join(lost)}, which is not prepared here: it begins "
                "anew. Prepare it before load_state if it should go on",
                stacklevel=3,
            )

    # --- models and objects for others -----------------------------------------------------------
    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        """A model's whole state dict, from the master values. A collective.

        Names are those of the model without ``torch.compile`` and other wrappers around it and its parts.

        Returns:
            It on every rank where the strategy keeps parameters whole; under ``zero3`` and ``hsdp`` on rank 0, on
            the CPU, and an empty one elsewhere: there the model may be larger than what one rank can hold.

        Args:
            model: prepared.
            unwrap: accepted for Accelerate's sake; names are the same either way.
        """
        engine = engine_of(model)
        if engine is not None and engine.strategy.split_params:
            with self._together("get_state_dict", self._number_of(model)):
                return checkpoint.full_state_dict(model, rank0_only=True)
        found = model.state_dict()
        names = clean_names(found)
        return {names[name]: value for name, value in found.items()}

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write whole weights as ``model.safetensors``, or several files and an index, as transformers reads them.

        Args:
            model: prepared.
            save_directory: made if it is not there.
            max_shard_size: bytes, or a text such as ``"5GB"``.
            safe_serialization: ``False`` writes torch's ``.bin`` files.

        Cost: a collective. Rank 0 writes; values come unit by unit, so no rank holds the whole model.
        """
        settings = {"max_shard_size": max_shard_size, "safe_serialization": safe_serialization}
        which = self._number_of(model)
        arguments = None if which is None else which | {"save_directory": os.fspath(save_directory)} | settings
        with self._together("save_model", arguments):
            checkpoint.save_model(model, save_directory, **settings)  # type: ignore[arg-type]

    def save(self, obj: Any, f: str | os.PathLike[str], safe_serialization: bool = False) -> None:
        """``torch.save`` on rank 0, or on the first rank of every host with ``save_on_each_node``.

        Args:
            obj: anything ``torch.save`` takes.
            f: the file.
            safe_serialization: write safetensors; ``obj`` is then a dict of tensors.
        """
        each = self.project_configuration.save_on_each_node
        save_object(obj, f, save_on_each_node=each, safe_serialization=safe_serialization)


def _folder(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    return {"output_dir": None if path is None else os.fspath(path)}


def _register(hooks: OrderedDict[int, Callable[..., None]], hook: Callable[..., None]) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
