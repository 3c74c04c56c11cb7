"""Checkpoints: one directory that any strategy and any number of ranks can load.

::

    from shardwise import checkpoint

    path = checkpoint.save(
        "checkpoints/checkpoint_0",
        models=[model],                      # sharded or plain, any number; wrappers are looked through
        optimizers=[optimizer],              # torch optimizers, not the Accelerator's wrappers of them
        state={"schedulers": [s.state_dict()], "step": 12},     # one for all ranks: rank 0's is written
        rank_state={"rng": checkpoint.rng_state()},             # each rank's own
        info={"step": 12},                   # small JSON for people and tools, in the manifest
    )
    loaded = checkpoint.load(path, models=[model], optimizers=[optimizer])
    loaded.state["step"]                     # what was given as ``state``
    if loaded.rank_state is not None:        # None on a rank that the saving run did not have
        checkpoint.set_rng_state(loaded.rank_state["rng"])

Every function that says *collective* is called by all ranks, with the same arguments. If one rank fails, all
raise. All errors are :class:`~shardwise.errors.CheckpointError` and name the file or parameter.

=======================================  =====================================================================
``save(directory, ...)``                 collective; returns the final path. The directory appears complete or
                                         not at all, and replaces an older one only when it is complete
``async_save(directory, ...)``           collective; returns when what may change at once is copied, and writes while
                                         the training goes on. :class:`AsyncSave`: ``wait()``, ``done``,
                                         ``wait_for_copy()``
``wait_for_saves()``                     wait for a save in the background, and raise what it ended with. No collective
``settle_saves()``                       the same as a collective; saves and loads begin with it
``load(directory, ...)``                 collective; checks what it can before it changes anything, then loads in
                                         place; ``verify=True`` checks every byte first. Returns :class:`Loaded`.
                                         ``strict=False`` loads what fits
``read_manifest(directory)``             the :class:`Manifest`: step, strategies, world size, files. Any one rank
``verify(directory)``                    collective; reads all files against their checksums
``find(directory)``                      collective; the path, or what ``directory/latest`` stands for
``latest(directory)``                    the newest complete checkpoint inside, or ``None``. Any one rank
``next_path(directory)``                 ``directory/checkpoint_<n>`` with the next free n. Any one rank
``prune(directory, total_limit)``        collective; deletes the oldest, never the newest complete one
``rng_state()``, ``set_rng_state()``     Python, NumPy, torch CPU, current device
``save_model(model, directory, ...)``    collective; safetensors files as transformers reads them
``load_model(model, path, ...)``         collective; weights from what others wrote, straight into the shards
``export(path, directory, ...)``         any checkpoint's weights as safetensors files, without a model. One process
``compare(a, b, ...)``                   what differs between two checkpoints, tensor by tensor. One process
``full_state_dict(model, ...)``          collective; whole tensors on the CPU, on every rank or rank 0 only
``full_optimizer_state(optimizer)``      collective; likewise, as plain torch optimizers write it
``load_full_optimizer_state(o, state)``  the way back, and from plain torch: each rank takes its part
=======================================  =====================================================================

What goes into ``state`` and ``rank_state``: tensors, numbers, strings, bytes, NumPy arrays and numbers, and dicts,
lists, tuples and sets of these. Tensors come back on the CPU. Anything else is refused when saving, with the
place in the nest. Nothing in a checkpoint is ever unpickled without a closed list of harmless classes.

``load`` also takes a folder that DeepSpeed wrote, under any stage and on any number of ranks, with optimizer state, and
without a conversion: ``loaded.state`` then has ``scheduler``, ``loss_scaler``, ``client_state``, ``global_steps``,
``skipped_steps`` and ``global_samples``.

Wherever a checkpoint is read, ``checkpoints/latest`` stands for the newest complete one in ``checkpoints``.

Ranks without a file of their own (the saving run had fewer) get ``rank_state=None``; keep their fresh random
generators, or derive them from the seed. Whatever must survive a change of the world size, such as the
position in the data, counts global samples and belongs into ``state``.

On disk::

    checkpoint_0/
      shardwise.json      manifest, written last: format, step, strategies, files with sizes and checksums
      .metadata           torch.distributed.checkpoint's index
      __0_0.distcp ...    tensors, one file per rank: model.<name>, optimizer.state.<name>.<key>
      state.pt            state, param_groups
      rank_0.pt ...       rank_state

``torch.distributed.checkpoint.load`` reads the tensors under their true names and shapes. The first model's
names begin with ``model.``, the second's with ``model_1.``, and so on, without what wrappers such as ``torch.compile``
and torch's ``checkpoint_wrapper`` put into them; optimizers likewise, where a parameter of the
second model is called ``model_1:<name>``. Tied parameters are stored once and listed under all of their names.
Parameters are the master values (fp32 in a bf16 run). Gradients are not saved: save between steps.

``save(files_from=f)`` calls ``f(path)`` on every rank with the directory that is being written, so that hooks can
put files of their own in; they become part of the checkpoint.
"""

# The first list is for type checkers and editors, the second for Python; a test compares them.
from typing import TYPE_CHECKING

from shardwise.lazy import importing

if TYPE_CHECKING:  # torch.distributed.checkpoint takes most of a second to import: only those who save wait for it
    from shardwise.checkpoint.conversion import compare, export
    from shardwise.checkpoint.deepspeed_export import export_deepspeed
    from shardwise.checkpoint.directory import find, latest, next_path, prune, read_manifest, verify
    from shardwise.checkpoint.loading import Loaded, load
    from shardwise.checkpoint.manifest import Manifest
    from shardwise.checkpoint.model_loading import LoadedModel, load_model
    from shardwise.checkpoint.model_saving import full_state_dict, save_model
    from shardwise.checkpoint.saving import AsyncSave, async_save, save, settle_saves, wait_for_saves
    from shardwise.checkpoint.small_state import rng_state, set_rng_state
    from shardwise.checkpoint.whole_optimizer import full_optimizer_state, load_full_optimizer_state

_HOME = {
    "AsyncSave": "saving",
    "Loaded": "loading",
    "LoadedModel": "model_loading",
    "Manifest": "manifest",
    "async_save": "saving",
    "compare": "conversion",
    "export": "conversion",
    "export_deepspeed": "deepspeed_export",
    "find": "directory",
    "full_optimizer_state": "whole_optimizer",
    "full_state_dict": "model_saving",
    "latest": "directory",
    "load": "loading",
    "load_full_optimizer_state": "whole_optimizer",
    "load_model": "model_loading",
    "next_path": "directory",
    "prune": "directory",
    "read_manifest": "directory",
    "rng_state": "small_state",
    "save": "saving",
    "save_model": "model_saving",
    "set_rng_state": "small_state",
    "settle_saves": "saving",
    "verify": "directory",
    "wait_for_saves": "saving",
}
__all__ = [
    "AsyncSave",
    "Loaded",
    "LoadedModel",
    "Manifest",
    "async_save",
    "compare",
    "export",
    "export_deepspeed",
    "find",
    "full_optimizer_state",
    "full_state_dict",
    "latest",
    "load",
    "load_full_optimizer_state",
    "load_model",
    "next_path",
    "prune",
    "read_manifest",
    "rng_state",
    "save",
    "save_model",
    "set_rng_state",
    "settle_saves",
    "verify",
    "wait_for_saves",
]
__getattr__ = importing(__name__, _HOME)
