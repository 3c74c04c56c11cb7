"""A script's ``except ValueError`` that was written for Accelerate catches here, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, IterableDataset

import shardwise
from shardwise import data_loader, errors, state, tracking, utils
from shardwise.accelerator import Accelerator
from shardwise.errors import ShardwiseError, first_line

pytestmark = pytest.mark.filterwarnings("ignore")
OURS = SimpleNamespace(
    Accelerator=Accelerator,
    AcceleratorState=state.AcceleratorState,
    dispatch_model=shardwise.dispatch_model,
    find=shardwise.find_executable_batch_size,
    launcher=shardwise.notebook_launcher,
    plugin=shardwise.GradientAccumulationPlugin,
    profile=shardwise.ProfileKwargs,
    scaler=shardwise.GradScalerKwargs,
    BatchSamplerShard=data_loader.BatchSamplerShard,
    IterableDatasetShard=data_loader.IterableDatasetShard,
    tracking=tracking,
    utils=utils,
)


def theirs() -> Any:
    accelerate = pytest.importorskip("accelerate")
    from accelerate import data_loader, tracking, utils
    from accelerate.state import AcceleratorState

    return SimpleNamespace(
        Accelerator=accelerate.Accelerator,
        AcceleratorState=AcceleratorState,
        dispatch_model=accelerate.dispatch_model,
        find=accelerate.utils.find_executable_batch_size,
        launcher=accelerate.notebook_launcher,
        plugin=utils.GradientAccumulationPlugin,
        profile=utils.ProfileKwargs,
        scaler=utils.GradScalerKwargs,
        BatchSamplerShard=data_loader.BatchSamplerShard,
        IterableDatasetShard=data_loader.IterableDatasetShard,
        tracking=tracking,
        utils=utils,
    )


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


def runs_out(batch_size: int) -> None:
    raise RuntimeError("CUDA out of memory.")


def unfinished(lib: Any) -> None:
    class Tracker(lib.tracking.GeneralTracker):
        name = "mine"

    Tracker()


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


CASES: dict[str, Any] = {
    "precision": lambda lib, path: lib.Accelerator(cpu=True, mixed_precision="int3"),
    "plugin's class": lambda lib, path: lib.Accelerator(cpu=True, fsdp_plugin=3),
    "said twice": lambda lib, path: lib.Accelerator(
        cpu=True, gradient_accumulation_steps=2, gradient_accumulation_plugin=lib.plugin(num_steps=3)
    ),
    "two handlers": lambda lib, path: lib.Accelerator(cpu=True, kwargs_handlers=[lib.scaler(), lib.scaler()]),
    "no folder": lambda lib, path: lib.Accelerator(cpu=True).load_state(str(path / "nowhere")),
    "no name": lambda lib, path: lib.Accelerator(cpu=True).load_state(),
    "no state": lambda lib, path: lib.Accelerator(cpu=True).register_for_checkpointing(torch.ones(1)),
    "placements": lambda lib, path: lib.Accelerator(cpu=True).prepare(nn.Linear(1, 1), device_placement=[True, False]),
    "split": lambda lib, path: lib.BatchSamplerShard(BatchSampler(range(9), 3, False), 2, 0, split_batches=True),
    "split stream": lambda lib, path: lib.IterableDatasetShard(
        Endless(), batch_size=3, num_processes=2, split_batches=True
    ),
    "truth": lambda lib, path: lib.utils.str_to_bool("perhaps"),
    "empty batch": lambda lib, path: lib.utils.find_batch_size([]),
    "no batch": lambda lib, path: lib.utils.find_batch_size({"a": 3}),
    "no tensors": lambda lib, path: lib.utils.concatenate([3, 4]),
    "other leaves": lambda lib, path: lib.utils.recursively_apply(lambda t: t, [3], error_on_other_type=True),
    "comparison": lambda lib, path: lib.utils.compare_versions("torch", "~", "2.0"),
    "bar": lambda lib, path: lib.utils.tqdm(True, range(3)),
    "no such tensor": lambda lib, path: lib.utils.set_module_tensor_to_device(nn.Linear(1, 1), "other", "cpu"),
    "shape": lambda lib, path: lib.utils.set_module_tensor_to_device(
        nn.Linear(1, 1), "weight", "cpu", value=torch.ones(3, 3)
    ),
    "meta": lambda lib, path: lib.utils.set_module_tensor_to_device(nn.Linear(1, 1, device="meta"), "weight", "cpu"),
    "map": lambda lib, path: lib.utils.check_device_map(two_linears(), {"0": "cpu"}),
    "no weights": lambda lib, path: lib.utils.load_checkpoint_in_model(nn.Linear(1, 1), str(path / "nowhere")),
    "no offload folder": lambda lib, path: lib.dispatch_model(two_linears(), {"0": "cpu", "1": "disk"}),
    "nothing offloaded": lambda lib, path: lib.utils.OffloadedWeightsLoader(),
    "memory": lambda lib, path: lib.find(runs_out, starting_batch_size=2)(),
    "size passed": lambda lib, path: lib.find(lambda batch_size, other: None, starting_batch_size=2)(2, 3),
    "unfinished tracker": lambda lib, path: unfinished(lib),
    "activity": lambda lib, path: lib.profile(activities=["gpu?"]).build(),
    "host": lambda lib, path: lib.launcher(print, (), num_processes=2, num_nodes=2, node_rank=2),
}


def raised(case: Any, lib: Any, path: Any) -> BaseException:
    path.mkdir()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        case(lib, path)
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_what_accelerate_raises_is_one_of_the_bases(name, tmp_path):
    case = CASES[name]
    found = raised(case, OURS, tmp_path / "ours")
    assert isinstance(found, ShardwiseError)
    expected = raised(case, theirs(), tmp_path / "theirs")
    assert isinstance(found, type(expected)), f"{type(found).__mro__} is no {type(expected)}: {expected}"


def kinds(base: type) -> list[type]:
    return [kind for direct in base.__subclasses__() for kind in (direct, *kinds(direct))]


def test_every_error_is_one_of_pythons_own():
    """But for the base itself: ``except ShardwiseError`` and ``except Exception`` are no choice."""
    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShardwiseError)]
    for kind in {*own, *kinds(ShardwiseError)} - {ShardwiseError}:
        python = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert [base for base in python if base not in (Exception, BaseException, object)], kind


@pytest.mark.parametrize(
    ("error", "says"),
    [(ValueError(), "ValueError"), (OSError("\n  a disk\nis full"), "a disk"), (KeyError("k"), "'k'")],
)
def test_what_an_error_says_in_a_sentence_of_ours(error, says):
    assert first_line(error) == says
