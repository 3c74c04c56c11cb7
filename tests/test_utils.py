"""What scripts import from ``accelerate.utils``: nests, collectives, seeds, plugins, files, finding a batch size."""

from __future__ import annotations

import collections
import functools
import json
import os
import subprocess
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffload, MixedPrecision, MixedPrecisionPolicy, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy, transformer_auto_wrap_policy

import processes
import shardwise
from models import PRESETS, assert_close, batch, loss_of, make, rank
from ranks import close_all, run
from shardwise import ShardwiseError, Strategy, operations, utils
from shardwise.engine.select import select_units
from shardwise.errors import (
    ArgumentError,
    CommError,
    ConfigError,
    LeftOut,
    MissingPackage,
    OutOfMemory,
    StrategyError,
    TensorError,
)
from shardwise.utils.modeling import checkpoint_activations
from shardwise.utils.plugins import strategy_of_plugin


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def nest(value):
    odd = collections.defaultdict(list, kept=torch.full((1,), value))
    return {"a": torch.full((2, 3), value), "b": [Pair(torch.full((2,), value), torch.full((2, 1), value)), odd]}


# --- collectives -------------------------------------------------------------------------------
def all_collectives(size):
    me = rank()
    got = {}
    tree = nest(float(me))
    ids = [id(tree["a"]), id(tree["b"][0].left)]
    out = utils.broadcast(tree, from_process=size - 1)
    got["broadcast"] = [out["a"].mean().item(), out["b"][0].right.mean().item(), out["b"][1]["kept"].item()]
    got["classes"] = [type(out["b"][0]).__name__, type(out["b"][1]).__name__]
    got["in place"] = ids == [id(out["a"]), id(out["b"][0].left)] and tree["a"].mean().item() == size - 1
    strided = torch.full((4, 3), float(me)).t()
    utils.broadcast(strided, 0)
    got["strided"] = strided.sum().item()
    got["dtypes"] = [
        utils.broadcast(torch.tensor(me, dtype=d), size - 1).item() for d in (torch.bool, torch.bfloat16, torch.int8)
    ]
    objects = [f"from {me}", {"rank": me}, None] if me == 0 else [None, None, None]
    got["objects"] = [utils.broadcast_object_list(objects), objects]
    got["last"] = utils.broadcast_object_list([me, "x" * me], from_process=size - 1)
    got["gather_object"] = utils.gather_object([me, (me, "b")])
    got["by rank"] = operations.gather_object([me])
    got["mean"] = utils.reduce(torch.tensor([float(me), 1.0])).tolist()
    got["sum"] = utils.reduce({"x": torch.tensor([me])}, reduction="sum")["x"].tolist()
    got["max"] = utils.reduce(torch.tensor([me, -me]), reduction="max").tolist()
    got["none"] = utils.reduce(torch.tensor([me]), reduction="none").tolist()
    ragged = {"x": torch.arange(me + 1), "y": [torch.ones(2, me)], "z": torch.tensor(me)}
    padded = utils.pad_across_processes(ragged, dim=0, pad_index=-1)
    got["padded"] = utils.gather(padded["x"]).tolist()
    got["untouched"] = [padded["y"][0].shape == (2, me), padded["z"].item()]
    got["first"] = utils.pad_across_processes(torch.arange(me + 1), pad_index=9, pad_first=True).tolist()
    got["dim"] = tuple(utils.pad_across_processes(torch.ones(2, me + 1), dim=-1).shape)
    return got


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size):
    last = size - 1
    for me, got in enumerate(run(size, all_collectives, size)):
        assert got["broadcast"] == [last, last, last]
        assert got["classes"] == ["Pair", "defaultdict"]
        assert got["in place"]
        assert got["strided"] == 0
        assert got["dtypes"] == [bool(last), last, last]
        assert got["objects"] == [["from 0", {"rank": 0}, None]] * 2
        assert got["last"] == [last, "x" * last]
        assert got["gather_object"] == [x for r in range(size) for x in (r, (r, "b"))]
        assert got["by rank"] == [[r] for r in range(size)]
        assert got["mean"] == [sum(range(size)) / size, 1.0]
        assert got["sum"] == [sum(range(size))]
        assert got["max"] == [last, 0]
        assert got["none"] == [me]
        assert got["padded"] == [x for r in range(size) for x in [*range(r + 1), *[-1] * (last - r)]]
        assert got["untouched"] == [True, me]
        assert got["first"] == [9] * (last - me) + list(range(me + 1))
        assert got["dim"] == (2, size)


KINDS = [
    (torch.tensor([True, False]), torch.tensor([True, True])),
    *((torch.tensor([200, 100], dtype=d), torch.tensor([120, 1], dtype=d)) for d in (torch.uint8, torch.int16)),
    (torch.tensor([100, -128], dtype=torch.int8), torch.tensor([100, -128], dtype=torch.int8)),
    (torch.tensor([2**31 - 1], dtype=torch.int32), torch.tensor([2**31 - 1], dtype=torch.int32)),
    *((torch.tensor([4e4, 1.0], dtype=d), torch.tensor([5e4, 2e-3], dtype=d)) for d in (torch.float16, torch.bfloat16)),
    (torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)),
    (torch.tensor([1 + 2j]), torch.tensor([3 - 1j])),
]


def reduces_every_dtype(kind, reduction, scale):
    out = utils.reduce(KINDS[kind][rank()], reduction=reduction, scale=scale)
    return out.dtype, out


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_reduce_gives_what_torch_gives_for_the_stack(size, reduction):
    for kind, tensors in enumerate(KINDS):
        stack = torch.stack(tensors[:size])
        floats = stack.is_floating_point() or stack.is_complex()
        if reduction == "max":
            if stack.is_complex():
                continue
            expected = stack.amax(0)
        elif reduction == "sum":
            expected = stack.sum(0)
        else:
            expected = (stack if floats else stack.double()).mean(0).to(stack.dtype if floats else torch.float32)
        for dtype, out in run(size, reduces_every_dtype, kind, reduction, 1.0):
            assert dtype == expected.dtype
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
    # A scale that brings the result back into the range is applied before it is rounded.
    both = run(size, reduces_every_dtype, 5, "sum", 0.5)
    assert all(out[0] == sum(float(t[0]) for t in KINDS[5][:size]) / 2 for _, out in both)


def keys_in_another_order():
    me = rank()
    pairs = [("loss", torch.tensor([1.0 + me])), ("acc", {"top1": torch.tensor(10 + me), "top5": torch.tensor(90)})]
    tree = dict(pairs if me == 0 else pairs[::-1])
    summed, gathered = utils.reduce(tree, reduction="sum"), utils.gather(tree)
    ragged = utils.pad_across_processes(
        {k: v[: 1 + me] for k, v in ({"a": torch.ones(3), "b": torch.zeros(3)}.items())}
    )
    utils.broadcast(tree, 1)
    return [
        (summed["loss"].tolist(), summed["acc"]["top1"].item(), list(summed) == list(tree)),
        (gathered["loss"].tolist(), gathered["acc"]["top1"].tolist(), gathered["acc"]["top5"].tolist()),
        (tree["loss"].tolist(), tree["acc"]["top1"].item()),
        {k: len(v) for k, v in ragged.items()},
    ]


def test_dicts_are_matched_by_key():
    expected = [([3.0], 21, True), ([1.0, 2.0], [10, 11], [90, 90]), ([2.0], 11), {"a": 2, "b": 2}]
    assert run(2, keys_in_another_order) == [expected] * 2


def misfits():
    me, told = rank(), []
    for call in (
        lambda: utils.reduce({"loss": torch.ones(1), ("acc" if me else "f1"): torch.ones(1)}),
        lambda: utils.reduce({"loss": torch.ones(1), "acc": torch.ones(1 + me)}),
        lambda: utils.gather(
            {"loss": torch.ones(1), "acc": torch.ones(1, dtype=torch.float16 if me else torch.float32)}
        ),
        lambda: utils.gather({"loss": torch.ones(1), "acc": "text" if me else torch.ones(1)}),
        lambda: utils.broadcast([torch.ones(1)] * (1 + me)),
        lambda: utils.pad_across_processes({"acc": torch.ones([1] * (1 + me))}),
        lambda: utils.gather(torch.ones(1)) if me else utils.reduce(torch.ones(1)),
        lambda: utils.reduce(torch.ones(1), reduction="max" if me else "sum"),
    ):
        with pytest.raises(CommError) as error:
            call()
        told.append(str(error.value).split("\n")[0].split(": ", 1)[1])
    return told, utils.gather(torch.tensor([me])).tolist()


def test_misfits_raise_on_every_rank_and_are_named():
    told, after = zip(*run(2, misfits), strict=True)
    assert told[0] == told[1] and after == ([0, 1], [0, 1])
    for text, parts in zip(
        told[0],
        [
            ["['acc'] is (1,) float32 on rank 1 and missing on rank 0", "['f1'] is (1,) float32 on rank 0 and missing"],
            ["['acc'] is (2,) float32 on rank 1 and (1,) float32 on rank 0"],
            ["['acc'] is (1,) float16 on rank 1 and (1,) float32 on rank 0"],
            ["['acc'] is a str on rank 1"],
            ["[1] is (1,) float32 on rank 1 and missing on rank 0"],
            ["['acc'] is 2 dims on rank 1 and 1 dims on rank 0"],
            ["rank 1 calls gather while rank 0 calls reduce to the mean"],
            ["rank 1 calls reduce to the max while rank 0 calls reduce to the sum"],
        ],
        strict=True,
    ):
        assert all(part in text for part in parts), text


def wrong_collectives():
    me = rank()
    told = []
    for call in (
        lambda: utils.broadcast(torch.ones(2 + me)),
        lambda: utils.reduce([torch.ones(2)] * (1 + me)),
        lambda: utils.gather({"x": torch.ones(2, dtype=torch.float32 if me else torch.float64)}),
        lambda: utils.pad_across_processes(torch.ones([2] * (1 + me))),
        lambda: utils.broadcast_object_list([None] * (1 + me)),
    ):
        try:
            call()
        except CommError as error:
            told.append(str(error))
    for call in (
        lambda: utils.gather({"x": "text"}),
        lambda: utils.broadcast([1.5]),
        lambda: utils.reduce((torch.ones(1), None)),
        lambda: utils.pad_across_processes(3),
        lambda: utils.gather_object({"not": "a list"}),
        lambda: utils.broadcast_object_list("text"),
    ):
        try:
            call()
        except TensorError as error:
            told.append(str(error))
    for call in (lambda: utils.broadcast(torch.ones(1), 7), lambda: utils.reduce(torch.ones(1), "median")):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    return told, utils.gather(torch.tensor([me])).tolist()


def test_collectives_with_wrong_input_end_in_errors_on_every_rank():
    for told, after in run(2, wrong_collectives):
        assert len(told) == 13
        assert all("rank 1" in text or "lists of 1, 2" in text for text in told[:5])
        for text, kind in zip(told[5:11], ["str", "float", "NoneType", "int", "dict", "str"], strict=True):
            assert f"a {kind}" in text
        assert after == [0, 1]  # and the ranks still understand each other


# --- nests -------------------------------------------------------------------------------------
def test_walking_keeps_classes_and_names_what_does_not_fit():
    tree = nest(2.0)
    doubled = utils.recursively_apply(lambda t, by: t * by, tree, 3)
    assert doubled["a"].mean() == 6 and isinstance(doubled["b"][0], Pair)
    assert doubled["b"][1]["new"] == [] and tree["a"].mean() == 2  # still a defaultdict; the original is untouched
    assert utils.recursively_apply(lambda n: n + 1, [1, "a"], test_type=lambda x: isinstance(x, int)) == [2, "a"]
    with pytest.raises(TypeError, match="str") as error:
        utils.recursively_apply(lambda t: t, [torch.ones(1), "a"], error_on_other_type=True)
    assert isinstance(error.value, TensorError)
    structure = utils.get_data_structure(tree)
    assert utils.is_tensor_information(structure["a"]) and structure["b"][0].right.shape == (2, 1)
    made = utils.initialize_tensors(structure)
    assert made["a"].shape == (2, 3) and made["a"].dtype == torch.float32 and isinstance(made["b"][0], Pair)
    assert utils.initialize_tensors(utils.TensorInformation(torch.Size([]), torch.int64)).shape == ()


def test_batch_size_device_and_slices():
    assert utils.find_batch_size({"x": [torch.ones(3, 2)]}) == 3
    for bad, kind in (([], ValueError), ({}, ValueError), (torch.tensor(1), ValueError), (["a"], TypeError)):
        with pytest.raises(kind) as error:
            utils.find_batch_size(bad)
        assert isinstance(error.value, ShardwiseError)
        assert utils.ignorant_find_batch_size(bad) is None
    assert utils.find_device([None, {"x": torch.ones(1, device="meta")}]) == torch.device("meta")
    assert utils.find_device(["a"]) is None
    halves = [utils.slice_tensors(nest(1.0), slice(i, i + 1)) for i in (0, 1)]
    joined = utils.concatenate(halves)
    assert joined["a"].shape == (2, 3) and isinstance(joined["b"][0], Pair)
    with pytest.raises(TensorError):
        utils.concatenate([{"x": 1}, {"x": 2}])
    assert utils.concatenate([{"x": 1}]) == {"x": 1}
    assert utils.listify({"x": torch.ones(2, dtype=torch.bfloat16), "y": 1}) == {"x": [1.0, 1.0], "y": 1}
    assert utils.honor_type(Pair(1, 2), iter([3, 4])) == Pair(3, 4)
    moved = utils.send_to_device({"x": torch.ones(1), "keep": torch.ones(1)}, "meta", skip_keys="keep")
    assert moved["x"].device.type == "meta" and moved["keep"].device.type == "cpu"


@pytest.mark.parametrize(("rows", "parts", "expected"), [(3, 4, 4), (5, 2, 6), (6, 4, 8), (8, 4, 8), (1, 3, 3)])
def test_pad_input_tensors_repeats_the_last_row(rows, parts, expected):
    x = torch.arange(rows)
    assert utils.pad_input_tensors({"x": x}, rows, parts)["x"].tolist() == [
        *range(rows),
        *[rows - 1] * (expected - rows),
    ]
    wide = utils.pad_input_tensors(x.expand(2, rows), rows, parts, dim=1)
    assert wide.shape == (2, expected)
    with pytest.raises(ConfigError):
        utils.pad_input_tensors(torch.ones(rows + 1), rows, parts)


def test_fp32_conversion():
    out = utils.convert_to_fp32(
        {"x": torch.ones(1, dtype=torch.float16), "n": torch.ones(1, dtype=torch.int32), "s": 1}
    )
    assert out["x"].dtype == torch.float32 and out["n"].dtype == torch.int32 and out["s"] == 1

    @utils.convert_outputs_to_fp32
    def forward(x):
        return x.bfloat16()

    assert forward(torch.ones(1)).dtype == torch.float32
    assert forward.__wrapped__.model_forward(torch.ones(1)).dtype == torch.bfloat16


# --- seeds -------------------------------------------------------------------------------------
def draws():
    return [torch.rand(1).item(), float(np.random.rand())]


def seeds():
    me = rank()
    utils.set_seed(3)
    same = draws()
    utils.set_seed(3, device_specific=True)
    own = draws()
    torch.manual_seed(me)
    generator = torch.Generator().manual_seed(me)
    utils.synchronize_rng_states(["torch", utils.RNGType.GENERATOR], generator)
    return same, own, torch.rand(1).item(), torch.rand(1, generator=generator).item()


def test_seeds_and_generators():
    first, second = run(2, seeds)
    assert first[0] == second[0] == first[1] != second[1]
    utils.set_seed(4)
    assert second[1] == draws()
    assert first[2:] == second[2:] == (torch.manual_seed(0) and (torch.rand(1).item(),) * 2)
    for call in (
        lambda: utils.set_seed(-1),
        lambda: utils.synchronize_rng_state("generator"),
        lambda: utils.synchronize_rng_state("xla"),
    ):
        with pytest.raises(ConfigError):
            call()


# --- finding a batch size ------------------------------------------------------------------------
def out_of_memory(kind):
    if kind == "python":
        raise MemoryError
    if kind == "onednn":
        raise RuntimeError("could not create a primitive")
    if kind == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    torch.empty(1 << 60)  # the real thing on the CPU


@pytest.mark.parametrize("kind", ["python", "cuda", "onednn", "cpu"])
def test_batch_size_alone(kind):
    sizes = []

    @utils.find_executable_batch_size(starting_batch_size=10)
    def train(batch_size, add):
        sizes.append(batch_size)
        if batch_size > 7:
            out_of_memory(kind)
        return batch_size + add

    assert train(1) == 8 and sizes == [10, 9, 8, 7]
    assert train(add=0) == 7 and sizes[4:] == [7]
    with pytest.raises(ArgumentError, match=r"train\(add=1\)"):
        train(128, 1)


def test_batch_size_ends_and_lets_other_errors_through():
    @utils.find_executable_batch_size(starting_batch_size=4)
    def never(batch_size):
        raise MemoryError

    with pytest.raises(OutOfMemory, match="never") as error:
        never()
    assert isinstance(error.value, RuntimeError)

    @utils.find_executable_batch_size
    def wrong(batch_size):
        raise RuntimeError(f"mistake at {batch_size}")

    with pytest.raises(RuntimeError, match="mistake at 128"):
        wrong()
    sizes = iter([8, 2])
    seen = []

    def own(batch_size):
        seen.append(batch_size)
        if batch_size > 2:
            raise MemoryError

    utils.find_executable_batch_size(own, 16, reduce_batch_size_fn=lambda: next(sizes))()
    assert seen == [16, 8, 2]


def search(strategy, where, start):
    """Rank 1 runs out of memory with more than 5 rows; ``where`` says at which moment."""
    sizes = []

    @utils.find_executable_batch_size(starting_batch_size=start)
    def train(batch_size):
        sizes.append(batch_size)
        model = shardwise.fully_shard(make(), strategy=strategy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if where == "forward":
            model.get_submodule("blocks.1").register_forward_pre_hook(lambda *_: full(batch_size))
        loss = loss_of(model, batch(0, rank(), batch_size))
        if where == "backward":
            loss.register_hook(lambda _: full(batch_size))
        loss.backward()
        optimizer.step()
        if where in ("end", "everywhere"):
            full(batch_size)
        return utils.gather(loss.detach()).tolist(), operations.total(1)

    def full(batch_size):
        if batch_size > 5 and (rank() == 1 or where == "everywhere"):
            raise MemoryError

    found = train()
    assert dist.get_backend() == "gloo"  # others look at the name, and do what this backend needs
    return sizes, found, operations.gather_object(rank())


@pytest.fixture(scope="module")
def fresh_ranks():
    """Process groups are torn down and made anew, which other tests' ranks should not go through."""
    close_all()


@pytest.mark.usefixtures("fresh_ranks")
@pytest.mark.parametrize(
    ("strategy", "where", "start"),
    [("ddp", "forward", 7), ("zero3", "forward", 6), ("zero3", "backward", 6), ("ddp", "end", 6),
     ("zero1", "everywhere", 6)],
)  # fmt: skip
def test_batch_size_on_ranks_when_one_runs_out(strategy, where, start):
    results = run(2, search, strategy, where, start)
    for sizes, (losses, total), ranks in results:
        assert sizes == [*range(start, 4, -1)] and total == 2 and ranks == [0, 1]
        assert losses == results[0][1][0]


def one_fails():
    @utils.find_executable_batch_size(starting_batch_size=8)
    def train(batch_size):
        if rank() == 1:
            raise ValueError("a mistake")
        return batch_size

    try:
        train()
    except ValueError as error:
        operations.joined().faults.publish_failure(error)  # what the interpreter does when a script ends with it
        return str(error)
    except CommError as error:
        return str(error)


def test_batch_size_ends_on_all_ranks_when_one_fails_otherwise():
    first, second = run(2, one_fails)
    assert second == "a mistake"
    assert "rank 1 failed" in first and "a mistake" in first
    close_all()  # the ranks remember the failure


# --- settings ------------------------------------------------------------------------------------
def test_kwargs_give_what_differs_from_the_default():
    assert utils.AutocastKwargs(cache_enabled=True).to_kwargs() == {"cache_enabled": True}
    assert utils.GradScalerKwargs(init_scale=4.0, growth_interval=2000).to_kwargs() == {"init_scale": 4.0}
    assert torch.amp.GradScaler("cpu", **utils.GradScalerKwargs(init_scale=4.0).to_kwargs()).get_scale() == 4.0
    assert utils.InitProcessGroupKwargs().to_kwargs() == {}
    assert utils.InitProcessGroupKwargs("gloo").timeout == timedelta(seconds=1800)
    assert utils.DistributedDataParallelKwargs(static_graph=True, comm_hook="fp16").to_kwargs() == {
        "static_graph": True
    }
    assert utils.TorchDynamoPlugin(backend="inductor", use_regional_compilation=True).to_kwargs() == {
        "backend": "inductor"
    }
    assert "bf16" in utils.PrecisionType and "int4" not in utils.PrecisionType
    assert utils.RNGType.list()[:2] == ["torch", "cuda"] and str(utils.LoggerType.WANDB) == "wandb"
    assert utils.DistributedType.FSDP == "FSDP" and json.dumps(utils.DistributedType.NO) == '"NO"'


def test_settings_say_what_they_mean_for_the_strategy():
    ddp = Strategy("ddp")
    assert utils.DistributedDataParallelKwargs(find_unused_parameters=True).apply(ddp) == ddp
    bf16 = utils.DistributedDataParallelKwargs(comm_hook=utils.DDPCommunicationHookType.BF16, broadcast_buffers=False)
    assert str(bf16.apply(ddp)) == "ddp,reduce_dtype=bf16,broadcast_buffers=false"
    with pytest.warns(UserWarning, match="bucket_cap_mb=100 has no effect"):
        utils.DistributedDataParallelKwargs(bucket_cap_mb=100).apply(ddp)
    for hook, strategy in (("power_sgd", ddp), ("fp16", Strategy("ddp", reduce_dtype="bf16"))):
        with pytest.raises(StrategyError):
            utils.DistributedDataParallelKwargs(comm_hook=hook).apply(strategy)
    with pytest.raises(ConfigError, match="zip"):
        utils.DistributedDataParallelKwargs(comm_hook="zip").apply(ddp)
    assert utils.InitProcessGroupKwargs(timeout=timedelta(minutes=2)).apply(ddp).timeout == 120
    assert utils.InitProcessGroupKwargs().apply(Strategy("ddp", timeout=5.0)).timeout == 5
    for bad in (utils.InitProcessGroupKwargs("mpi"), utils.InitProcessGroupKwargs(init_method="file:///x")):
        with pytest.raises(ConfigError):
            bad.apply(ddp)
    for make_bad in (lambda: utils.GradientAccumulationPlugin(num_steps=0), lambda: utils.TorchDynamoPlugin("gcc")):
        with pytest.raises(ConfigError):
            make_bad()


def test_profile_and_project(tmp_path):
    with utils.ProfileKwargs(activities=["cpu"], record_shapes=True).build() as prof:
        _ = torch.ones(2) + 1
    assert any(event.key == "aten::add" for event in prof.key_averages(group_by_input_shape=True))
    with pytest.warns(UserWarning, match="warmup"):
        assert (
            utils.ProfileKwargs(schedule_option={"wait": 0, "warmup": 0, "active": 1}).build().schedule(0) is not None
        )
    with pytest.raises(ConfigError, match="'abacus'"):
        utils.ProfileKwargs(activities=["abacus"]).build()
    project = utils.ProjectConfiguration("a")
    assert project.logging_dir == "a"
    project = utils.ProjectConfiguration(logging_dir="logs")
    project.set_directories("b")
    assert (project.project_dir, project.logging_dir) == ("b", "logs")


# --- FSDP's plugin -------------------------------------------------------------------------------
FSDP = utils.FullyShardedDataParallelPlugin


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "zero3"),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, "zero2"),
        ({"sharding_strategy": ShardingStrategy.HYBRID_SHARD}, "hsdp"),
        ({"sharding_strategy": 3}, "ddp"),
        ({"reshard_after_forward": "full_shard"}, "zero3"),
        ({"fsdp_version": 2, "reshard_after_forward": False}, "zero2"),
        ({"fsdp_version": 2, "reshard_after_forward": "true"}, "zero3"),
        ({"mixed_precision_policy": "bf16"}, "zero3,param_dtype=bf16,reduce_dtype=bf16"),
        ({"mixed_precision_policy": MixedPrecision(param_dtype=torch.float16)}, "zero3,param_dtype=fp16"),
        (
            {"mixed_precision_policy": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}},
            "zero3,param_dtype=bf16,reduce_dtype=fp32",
        ),
        (
            {"fsdp_version": 2, "mixed_precision_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
            "zero3,param_dtype=bf16",
        ),
        ({"cpu_offload": True}, "zero3,offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu"),
        ({"activation_checkpointing": True}, "zero3,activation_checkpointing=true"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_offload": True},
            "zero3,activation_checkpointing=true,activation_offload=cpu",
        ),
        ({"cpu_offload": CPUOffload(offload_params=False), "use_orig_params": False}, "zero3"),
        ({"sync_module_states": True, "forward_prefetch": True, "state_dict_type": "SHARDED_STATE_DICT"}, "zero3"),
    ],
)
def test_fsdp_plugin_says_the_strategy(settings, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(FSDP(**settings).to_strategy()) == expected


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"sharding_strategy": "HALF"}, "HALF"),
        ({"sharding_strategy": "HYBRID_SHARD_ZERO2"}, "use HYBRID_SHARD"),
        ({"sharding_strategy": "NO_SHARD", "reshard_after_forward": True}, "contradict"),
        ({"mixed_precision_policy": "fp8"}, "fp8"),
        ({"mixed_precision_policy": {"param_dtype": torch.int8}}, "int8"),
        ({"ignored_modules": "head"}, "ignored_modules"),
        ({"cpu_offload": "yes"}, "cpu_offload"),
        ({"auto_wrap_policy": "WRAP"}, "WRAP"),
        ({"fsdp_version": 3}, "fsdp_version"),
        ({"activation_checkpointing_offload": True}, "has nothing to offload"),
    ],
)
def test_fsdp_plugin_refuses_what_it_cannot_serve(settings, text):
    with pytest.raises(ShardwiseError, match=text):
        FSDP(**settings)


def test_fsdp_plugin_warns_once_of_what_has_no_effect():
    with pytest.warns(UserWarning, match="cpu_ram_efficient_loading.*buffer_dtype") as seen:
        FSDP(cpu_ram_efficient_loading=True, mixed_precision_policy=MixedPrecision(buffer_dtype=torch.bfloat16))
    assert len(seen) == 1


def found(**settings):
    rule = FSDP(**settings).units
    return [name for name, _ in select_units(make(), rule)]


def test_fsdp_plugin_says_the_units():
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    size = sum(p.numel() for p in make().blocks[0].parameters())
    assert FSDP().units is None and FSDP(auto_wrap_policy="NO_WRAP").units is None
    assert FSDP(auto_wrap_policy="TRANSFORMER_BASED_WRAP").units is None
    assert found(auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap="Block, Other") == blocks
    kind = type(make().blocks[0])
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={kind})
    assert found(auto_wrap_policy=policy) == blocks
    assert found(auto_wrap_policy=ModuleWrapPolicy({kind})) == blocks
    assert found(auto_wrap_policy="SIZE_BASED_WRAP", min_num_params=size) == blocks
    by_size = functools.partial(size_based_auto_wrap_policy, min_num_params=500)
    inner = [f"{b}.{part}" for b in blocks for part in ("up", "down")]
    assert found(auto_wrap_policy=by_size) == inner
    assert found(auto_wrap_policy=lambda name, module: name == "head") == ["head"]
    with pytest.raises(ShardwiseError, match="Nothing"):
        found(auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["Nothing"])


# --- DeepSpeed's plugin ----------------------------------------------------------------------------
def test_deepspeed_plugin_by_arguments():
    plugin = utils.DeepSpeedPlugin(zero_stage=3, gradient_accumulation_steps=4, gradient_clipping=0.5)
    assert str(plugin.to_strategy()) == "zero3"
    assert (plugin.accumulation_steps, plugin.max_norm, plugin.zero_stage) == (4, 0.5, 3)
    assert str(utils.DeepSpeedPlugin().to_strategy()) == "zero2"
    offload = utils.DeepSpeedPlugin(zero_stage=3, offload_optimizer_device="cpu", offload_param_device="nvme")
    assert str(offload.to_strategy()) == "zero3,offload_params=nvme,offload_optimizer=cpu"
    part = utils.DeepSpeedPlugin(
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/n", "ratio": 0.3}}}
    )
    assert str(part.to_strategy()) == "zero3,offload_optimizer=nvme,offload_ratio=0.3,nvme_path=/n"
    with pytest.warns(UserWarning, match="zero3_init_flag"):
        utils.DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True)


def test_deepspeed_plugin_by_configuration(tmp_path):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 8,
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "hysteresis": 2},
        "communication_data_type": "bf16",
        "zero_optimization": {
            "stage": 1,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
            "zero_quantized_weights": False,
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    for source in (config, path, str(path), SimpleNamespace(config=config)):
        with pytest.warns(UserWarning, match="overlap_comm, zero_optimization.reduce_bucket_size") as seen:
            plugin = utils.DeepSpeedPlugin(hf_ds_config=source, gradient_clipping=1.0)
        assert len(seen) == 1 and "breakdown" not in str(seen[0].message)
        assert str(plugin.to_strategy()) == "zero1,param_dtype=bf16,reduce_dtype=bf16"
        assert (plugin.accumulation_steps, plugin.max_norm) == (8, 1.0)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2  # as scripts do
        assert plugin.is_auto("train_batch_size") and plugin.get_value("zero_optimization.stage") == 1
    assert "gradient_clipping" in config and config["gradient_clipping"] == "auto"  # the caller's stays
    fp16 = utils.DeepSpeedPlugin({"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 10}})
    assert str(fp16.to_strategy()) == "ddp,param_dtype=fp16"
    assert fp16.scaler_kwargs == {"init_scale": 256.0, "growth_interval": 10}
    mics = utils.DeepSpeedPlugin({"zero_optimization": {"stage": 3, "mics_shard_size": 2}})
    assert str(mics.to_strategy()) == "hsdp,shard_size=2"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer is not served"),
        ({"zero_optimization": {"stage": 4}}, "stage=4"),
        ({"zero_optimization": {"stagee": 3}}, "did you mean 'stage'"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimization"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": "half"}}}, "ratio"),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/a"},
                    "offload_param": {"device": "nvme", "nvme_path": "/b"},
                }
            },
            "two values of nvme_path",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "loss_scale"),
        ({"tensorboard": {"enabled": True}}, "log_with"),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 2}, "multiple"),
        ({"gradient_clipping": "much"}, "gradient_clipping"),
        ("no/such/file.json", "no/such/file.json"),
        (5, "int"),
    ],
)
def test_deepspeed_plugin_refuses_what_it_cannot_serve(config, text):
    with pytest.raises(ConfigError, match=text):
        utils.DeepSpeedPlugin(hf_ds_config=config)


def test_deepspeed_plugin_wants_to_hear_it_once(tmp_path):
    with pytest.raises(ConfigError, match=r"zero_stage=2 and zero_optimization.stage=3 contradict"):
        utils.DeepSpeedPlugin({"zero_optimization": {"stage": 3}}, zero_stage=2)
    filled = utils.DeepSpeedPlugin({"zero_optimization": {"stage": "auto"}}, zero_stage=2)
    assert filled.to_strategy().preset == "zero2" and filled.deepspeed_config["zero_optimization"]["stage"] == 2
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json: is not JSON"):
        utils.DeepSpeedPlugin(tmp_path / "bad.json")


def test_other_libraries_plugins_are_told_by_their_fields():
    fsdp = SimpleNamespace(
        fsdp_version=1, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, reshard_after_forward=None,
        cpu_offload=CPUOffload(offload_params=False), auto_wrap_policy=transformer_auto_wrap_policy,
        transformer_cls_names_to_wrap=["Block"], mixed_precision_policy=None, foreign="x",
    )  # fmt: skip
    strategy, units = strategy_of_plugin(fsdp)
    assert strategy == Strategy("zero2") and len(select_units(make(), units)) == 3
    ds = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}, "steps_per_print": float("inf")})
    assert strategy_of_plugin(ds) == (Strategy("zero3"), None)
    assert strategy_of_plugin(FSDP(sharding_strategy="NO_SHARD")) == (Strategy("ddp"), None)
    with pytest.raises(StrategyError, match="int"):
        strategy_of_plugin(3)


# --- modules and files ---------------------------------------------------------------------------
def saved(folder, strategy):
    model = shardwise.fully_shard(make(tied=True), strategy=strategy)
    state = model.state_dict()
    utils.save(state, os.path.join(folder, "model.safetensors"), safe_serialization=True)
    utils.save({"step": 3, "rng": np.random.get_state()[1], "rank": rank()}, os.path.join(folder, "state.pt"))
    utils.wait_for_everyone()


@pytest.mark.parametrize("strategy", PRESETS)
def test_save_writes_once_whole_tensors_in_memory_of_their_own(tmp_path, strategy):
    from safetensors.torch import load_file

    run(2, saved, str(tmp_path), strategy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "state.pt"]  # nothing half-written
    plain = make(tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("embed.weight" in tensors) != ("head.weight" in tensors)
    expected = plain.state_dict()
    for name, value in tensors.items():
        assert torch.equal(value, expected[name])
    assert len(tensors) == len(expected) - 1  # views of one flat buffer are tensors of their own
    state = utils.load(tmp_path / "state.pt")
    assert state["step"] == 3 and state["rank"] == 0 and state["rng"].dtype == np.uint32
    assert (tmp_path / "state.pt").stat().st_mode & 0o044  # others may read what they could read before


def test_save_and_load_refuse_what_they_should(tmp_path):
    with pytest.raises(TensorError):
        utils.save({"step": 3}, tmp_path / "x", safe_serialization=True)
    assert not list(tmp_path.iterdir())
    torch.save({"call": subprocess.run}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"(?i)weights"):
        utils.load(tmp_path / "bad.pt")
    for value in (np.arange(3.0), np.float64(2.5), np.array([True])):
        torch.save({"x": value}, tmp_path / "np.pt")
        assert np.array_equal(utils.load(tmp_path / "np.pt")["x"], value)


def test_unwrapping():
    plain = make()
    assert utils.extract_model_from_parallel(plain) is plain
    wrapped = shardwise.DistributedDataParallel(make())
    assert utils.extract_model_from_parallel(wrapped) is wrapped.module
    assert utils.extract_model_from_parallel(nn.DataParallel(plain)) is plain
    compiled = torch.compile(plain, backend="eager")
    assert utils.is_compiled_module(compiled) and not utils.is_compiled_module(plain)
    assert utils.extract_model_from_parallel(compiled) is compiled
    assert utils.extract_model_from_parallel(compiled, keep_torch_compile=False) is plain
    again = torch.compile(nn.DataParallel(plain), backend="eager")
    assert utils.extract_model_from_parallel(again) is again and again._orig_mod is plain
    assert not utils.has_compiled_regions(plain)
    plain.blocks[0].compile(backend="eager")
    assert utils.has_compiled_regions(plain)
    outer = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    assert isinstance(utils.extract_model_from_parallel(outer, recursive=True)[0], nn.Linear)
    mine = nn.Module()
    mine.module = plain  # a module of the user's own with that name is not a wrapper
    assert utils.extract_model_from_parallel(mine) is mine


def checkpointed(strategy):
    model = make()
    names = checkpoint_activations(model)
    assert checkpoint_activations(model) == []
    if strategy is not None:
        shardwise.fully_shard(model, strategy=strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        parts = [batch(step, r) for r in range(2)]
        loss_of(model, torch.cat(parts) if strategy is None else parts[rank()]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return names, {k: v.clone() for k, v in model.state_dict().items()}


def test_checkpointed_activations_train_the_same_under_every_strategy():
    names, alone = checkpointed(None)
    assert names[:3] == ["blocks.0", "blocks.1", "blocks.2"] or "blocks.0" in names
    for strategy in PRESETS:
        for _, state in run(2, checkpointed, strategy):
            assert_close(state, alone)


def test_sizes_and_ties():
    model = make(tied=True)
    assert utils.find_tied_parameters(model) == [["embed.weight", "head.weight"]]
    copy = make()
    utils.retie_parameters(copy, [["embed.weight", "head.weight"]])
    assert copy.head.weight is copy.embed.weight
    sizes = utils.compute_module_sizes(model)
    assert sizes[""] == sum(p.numel() * 4 for p in model.parameters()) and sizes["norm"] == 2 * 13 * 4
    assert utils.compute_module_sizes(model, dtype="float16")["norm"] == 2 * 13 * 2
    assert utils.compute_module_sizes(model, special_dtypes={"norm.bias": torch.int8})["norm"] == 13 * 5
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    seen = dict(utils.named_module_tensors(nn.Sequential(module), recurse=True, remove_non_persistent=True))
    assert "0.running_mean" in seen and "0.scratch" not in seen and "0.weight" in seen
    for text, size in (("1MiB", 1 << 20), ("5GB", 5 * 10**9), ("8Kb", 1000), ("1.5KiB", 1536), (7, 7)):
        assert utils.convert_file_size_to_int(text) == size
    for bad in ("5XB", "GB", -1, None):
        with pytest.raises(ConfigError):
            utils.convert_file_size_to_int(bad)
    assert [utils.dtype_byte_size(d) for d in (torch.bfloat16, torch.int64, torch.bool)] == [2, 8, 0.125]
    assert utils.is_peft_model(model) is False


# --- small things --------------------------------------------------------------------------------
def test_environment(monkeypatch):
    with utils.patch_environment(some_flag=1, path="x"):
        assert os.environ["SOME_FLAG"] == "1" and os.environ["PATH"] == "x"
        assert utils.parse_flag_from_env("SOME_FLAG") and utils.get_int_from_env(["NOT_SET", "SOME_FLAG"], 5) == 1
    assert "SOME_FLAG" not in os.environ and os.environ["PATH"] != "x"
    with pytest.raises(KeyError), utils.clear_environment():
        os.environ["PATH"]
    assert os.environ["PATH"] and utils.parse_choice_from_env("NOT_SET") == "no"
    assert utils.str_to_bool("Yes", to_bool=True) is True and utils.str_to_bool("off") == 0
    monkeypatch.setenv("SOME_FLAG", "maybe")
    for call in (lambda: utils.parse_flag_from_env("SOME_FLAG"), lambda: utils.get_int_from_env(["SOME_FLAG"], 1)):
        with pytest.raises(ConfigError, match="maybe"):
            call()


def test_versions_and_what_is_available():
    assert utils.is_torch_version(">=", "2.11") and not utils.compare_versions("numpy", "<", "1.0")
    assert utils.compare_versions("torch", ">", "2.9")  # 2.11 is later than 2.9
    with pytest.raises(MissingPackage, match="pip install no-such-thing"):
        utils.compare_versions("no-such-thing", ">", "1")
    with pytest.raises(ConfigError):
        utils.is_torch_version("=>", "2")
    checks = [getattr(utils, name) for name in utils.__all__ if name.startswith("is_") and name.endswith("_available")]
    assert len(checks) > 40 and all(check() in (True, False) for check in checks)
    assert utils.is_rich_available() and utils.is_cuda_available() == torch.cuda.is_available()
    assert not utils.is_torch_xla_available() and not utils.is_npu_available()


def test_small_things():
    assert utils.merge_dicts({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert [utils.convert_bytes(n) for n in (10, 1536, 3 << 30)] == ["10 bytes", "1.5 KB", "3.0 GB"]
    assert utils.get_pretty_name(nn.Linear) == utils.get_pretty_name(nn.Linear(1, 1)) == "Linear"
    a, b = utils.release_memory(torch.ones(1), torch.ones(1))
    assert a is None and b is None
    assert utils.SAFE_WEIGHTS_INDEX_NAME == "model.safetensors.index.json" and utils.WEIGHTS_NAME == "pytorch_model.bin"
    assert not utils.is_port_in_use(utils.modeling and utils.other.get_free_port())


def test_progress_bar(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    assert list(utils.tqdm(range(3))) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(utils.tqdm(range(3))) == [0, 1, 2] and capsys.readouterr().err == ""
    assert list(utils.tqdm(range(2), main_process_only=False)) == [0, 1] and capsys.readouterr().err
    with pytest.raises(ConfigError):
        utils.tqdm(True, range(3))


def test_what_is_left_out_says_what_to_use():
    with pytest.raises(ImportError, match="MegatronLMPlugin is left out") as error:
        from shardwise.utils import MegatronLMPlugin  # noqa: F401
    assert isinstance(error.value, LeftOut) and "zero3" in str(error.value)
    assert not hasattr(utils, "load_and_quantize_model") and getattr(utils, "MegatronEngine", None) is None
    with pytest.raises(AttributeError, match="BitsAndBytes"):
        _ = utils.load_and_quantize_model
    with pytest.raises(ImportError, match="cannot import name"):
        from shardwise.utils import no_such_name  # noqa: F401
    missing = [name for name in utils.__all__ if not hasattr(utils, name)]
    assert not missing


def test_a_launched_script_is_never_answered_by_one_rank_alone(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text("import torch\nfrom shardwise.utils import gather\nprint(gather(torch.ones(1)))\n")
    env = {**os.environ, "WORLD_SIZE": "2"}
    for key in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(key, None)
    code, out, err = processes.script(script, environment=env).finish()
    assert code == 1 and "WORLD_SIZE=2 is set but RANK" in err and "tensor" not in out
