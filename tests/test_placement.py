"""The plan of a bucket's buffers, by property: over presets, homes, dtypes, ranks, devices and ratios."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardwise
from shardwise.comm.mesh import Mesh
from shardwise.placement import DTYPE_NAMES, WIDTHS, BufferPlan, Extent, Lifetime, Placement, Where, place, ranks_of
from shardwise.strategy import HOMES, PRESETS, Strategy
from test_layers import running

FLOATS = ["float32", "bfloat16", "float64"]
WORLDS = st.integers(1, 8)
shorts = st.sampled_from([None, "fp32", "bf16", "fp16"])
homes = st.sampled_from(HOMES)


@st.composite
def strategies(draw: st.DrawFn, **fixed: object) -> Strategy:
    keys: dict[str, object] = {
        "preset": draw(st.sampled_from(list(PRESETS))), "offload_params": draw(homes),
        "offload_grads": draw(st.sampled_from(HOMES[:2])), "offload_optimizer": draw(homes),
        "param_dtype": draw(shorts), "reduce_dtype": draw(shorts),
        "offload_ratio": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }  # fmt: skip
    return Strategy(**{**keys, **fixed})


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> tuple[Strategy, Placement]:
    """A strategy, and where a bucket of trainable floating-point parameters is under it."""
    strategy, world = draw(strategies(**fixed)), draw(WORLDS)
    divisors = [s for s in range(1, world + 1) if world % s == 0]
    shard = draw(st.sampled_from(divisors)) if strategy.preset == "hsdp" else None
    return strategy, place(
        strategy, ranks_of(strategy, world, shard), draw(st.sampled_from(FLOATS)), separate=draw(st.booleans()),
        takes_state=draw(st.booleans()), compute_dtype=draw(st.sampled_from([None, "float32", "float16"])),
    )  # fmt: skip


def buffers(plan: Placement) -> dict[str, BufferPlan]:
    named = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return {name: b for name, b in named.items() if isinstance(b, BufferPlan)}


# --- how ranks divide it ------------------------------------------------------------------------------
def mesh_of(rank: int, world: int, shard: int) -> Mesh:
    group = lambda rank, size: SimpleNamespace(rank=rank, size=size)  # noqa: E731
    row, column = divmod(rank, shard)
    everyone = group(rank, world)
    return Mesh(None, everyone, group(column, shard), group(row, world // shard), everyone)


@given(cases(), st.integers(1, 100))
def test_ranks_hold_the_whole_together_as_often_as_there_are_copies(case, shard_numel):
    _, plan = case
    ranks = plan.ranks
    held = [mesh_of(r, ranks.parts, ranks.shard).held for r in range(ranks.parts)]
    assert sorted(s for shards in held for s in shards) == sorted(list(range(ranks.parts)) * ranks.copies)
    for name, b in buffers(plan).items():
        whole = shard_numel * ranks.parts
        assert plan.nbytes(b, shard_numel) == plan.numel(b, shard_numel) * WIDTHS[b.dtype]
        if b.extent is Extent.HELD:
            assert {plan.numel(b, shard_numel)} == {len(shards) * shard_numel for shards in held}, name
            assert sum(plan.numel(b, shard_numel) for _ in held) == ranks.copies * whole, name
        else:
            assert plan.numel(b, shard_numel) == whole, name
    assert plan.nbytes(None, shard_numel) == 0


@given(strategies(offload_params="device", offload_grads="device", offload_optimizer="device"), st.booleans())
def test_on_one_rank_without_offloading_all_presets_are_one(strategy, separate):
    rows = [strategy.replace(preset=preset) for preset in PRESETS]
    alone = [place(row, ranks_of(row, 1), "float32", separate=separate) for row in rows]
    assert all(plan == alone[0] for plan in alone)
    assert not alone[0].released and not alone[0].split_state and not alone[0].steps_apart


# --- the table in words -------------------------------------------------------------------------------
def told(strategy: Strategy) -> dict[str, tuple[bool, str]]:
    """What ``explain()`` says of each state: is it split, and its home."""
    rows = re.findall(r"^  (parameters|gradients|optimizer state): (split|whole)[^\n]*?(?:, home on (\w+))?$",
                      strategy.explain(), re.M)  # fmt: skip
    assert len(rows) == 3
    return {state: (how == "split", home or "device") for state, how, home in rows}


@given(cases(offload_ratio=1.0))
def test_it_is_what_the_table_in_words_says(case):
    strategy, plan = case
    said = told(strategy)
    several = plan.ranks.shard > 1
    states = {"parameters": plan.source if plan.released else plan.values, "gradients": plan.grads,
              "optimizer state": plan.state}  # fmt: skip
    for state, b in states.items():
        split, home = said[state]
        away = Where(home) if plan.separate or home == "nvme" else Where.DEVICE
        if state == "optimizer state" and home == "cpu" and plan.separate:
            assert b.where in (Where.HOST, Where.DEVICE)  # whole units go, or stay: the ratio decides
            assert plan.step_on_host == (b.where is Where.HOST)
        else:
            assert b.where is away, state
        if split and several:
            assert b.extent is Extent.HELD, state
        elif state == "gradients":
            assert (b.extent is Extent.HELD) == (away is Where.HOST)  # what is elsewhere is the held shards
    assert plan.released == ((said["parameters"][0] and several) or states["parameters"].where is not Where.DEVICE)


@given(st.sampled_from(list(PRESETS)), st.integers(1, 9), st.integers(1, 4), st.integers(1, 50))
def test_its_bytes_are_those_that_the_table_promises_for_adam(preset, columns, rows, shard_numel):
    if preset != "hsdp":
        rows = 1
    strategy = Strategy(preset)
    plan = place(strategy, ranks_of(strategy, columns * rows, columns if preset == "hsdp" else None), "float32")
    stated = re.search(r"memory per rank with Adam in fp32: (.*) bytes", strategy.explain())
    assert stated is not None
    psi, promised = columns * rows * shard_numel, 0.0
    for term in stated[1].split(" + "):
        factor, over = re.fullmatch(r"(\d+)Ψ(?:/([NS]))?", term).groups()
        promised += int(factor) * psi / {None: 1, "N": columns * rows, "S": columns}[over]
    kept = plan.source if plan.released else plan.values
    assert plan.nbytes(kept, shard_numel) + plan.nbytes(plan.grads, shard_numel) + 2 * plan.nbytes(
        plan.state, shard_numel
    ) == pytest.approx(promised)


# --- values and master values -----------------------------------------------------------------------------
@given(cases())
def test_aliased_values_have_no_second_tensor(case):
    _, plan = case
    if plan.aliased:
        assert plan.shard is None and not plan.released and not plan.follows_home
        assert (plan.master.dtype, plan.master.where) == (plan.values.dtype, plan.values.where)
    else:  # there is a reason for the second one
        assert plan.released or plan.master.dtype != plan.values.dtype or plan.master.where is not Where.DEVICE


@given(cases())
def test_what_is_read_from_a_home_straight_into_the_values_has_their_dtype(case):
    _, plan = case
    assert plan.values.where is Where.DEVICE
    if plan.params_offloaded:
        assert plan.source.dtype == plan.values.dtype
    if plan.shard is not None:
        assert plan.released and plan.follows_home and plan.source is plan.shard


@given(cases())
def test_updates_are_where_master_values_and_state_are(case):
    _, plan = case
    assert plan.state is not None and plan.grads is not None
    assert plan.master.dtype == plan.state.dtype == plan.grads.dtype
    if plan.step_on_host:
        assert plan.separate and plan.state.on_host and plan.master.on_host
    if plan.state_on_disk and plan.follows_home:
        assert plan.master.where is Where.DISK
    assert plan.grads_cross == (plan.step_on_host != plan.grads.on_host)
    if not plan.steps_apart:
        assert {b.where for b in buffers(plan).values()} == {Where.DEVICE}
        assert not plan.follows_home and not plan.params_offloaded and not plan.grads_cross


@given(cases())
def test_only_what_comes_and_goes_has_an_end(case):
    _, plan = case
    for name, b in buffers(plan).items():
        expected = {"arriving": Lifetime.BACKWARD, "values": Lifetime.GATHERED if plan.released else Lifetime.ALWAYS}
        assert b.lifetime is expected.get(name, Lifetime.ALWAYS), name
    assert plan.arriving is not None and plan.wire_dtype == plan.arriving.dtype


@given(cases())
def test_where_the_host_is_the_device_nothing_is_elsewhere_but_on_a_disk(case):
    _, plan = case
    if not plan.separate:
        assert Where.HOST not in {b.where for b in buffers(plan).values()}
        assert not plan.step_on_host and not plan.grads_on_host and not plan.grads_cross


@given(strategies(offload_ratio=0.0), WORLDS, st.sampled_from(FLOATS), st.booleans())
def test_a_ratio_of_nothing_is_as_without_a_home(strategy, world, dtype, separate):
    at_home = strategy.replace(offload_optimizer="device")
    ranks = ranks_of(strategy, world)
    assert place(strategy, ranks, dtype, separate=separate) == place(at_home, ranks, dtype, separate=separate)


# --- what is not trained, or not cast ---------------------------------------------------------------------
@given(strategies(), WORLDS, st.sampled_from(FLOATS), st.booleans())
def test_frozen_parameters_have_no_gradients_and_no_state(strategy, world, dtype, separate):
    plan = place(strategy, ranks_of(strategy, world), dtype, trainable=False, separate=separate)
    assert plan.grads is None and plan.state is None and plan.arriving is None
    assert not plan.state_on_disk and not plan.grads_on_host and not plan.grads_split and not plan.step_on_host
    assert plan.wire_dtype == dtype


@given(strategies(), WORLDS, st.sampled_from(["int64", "uint8", "bool"]), st.booleans())
def test_what_is_not_floating_point_keeps_its_dtype(strategy, world, dtype, separate):
    plan = place(strategy, ranks_of(strategy, world), dtype, floating=False, separate=separate)
    assert {b.dtype for b in buffers(plan).values()} == {dtype}
    assert plan.grads is None and plan.state is None


@given(strategies(), WORLDS, st.sampled_from(FLOATS), st.booleans())
def test_dtypes_are_those_of_the_strategy(strategy, world, dtype, separate):
    plan = place(strategy, ranks_of(strategy, world), dtype, separate=separate)
    assert plan.values.dtype == (DTYPE_NAMES[strategy.param_dtype] if strategy.param_dtype else dtype)
    assert plan.wire_dtype == (DTYPE_NAMES[strategy.reduce_dtype] if strategy.reduce_dtype else dtype)
    assert plan.master.dtype == dtype


@given(strategies(), st.sampled_from(FLOATS), st.sampled_from(FLOATS))
def test_a_compute_dtype_goes_before_the_strategys(strategy, dtype, compute):
    plan = place(strategy, ranks_of(strategy, 4), dtype, compute_dtype=compute)
    assert plan.values.dtype == compute and plan.master.dtype == dtype


def test_the_widths_are_torchs():
    kinds = {str(d).removeprefix("torch."): d.itemsize for d in vars(torch).values() if isinstance(d, torch.dtype)}
    assert WIDTHS.items() <= kinds.items()
    sure = {"float64", "float32", "bfloat16", "float16", "complex64", "complex128", "int64", "int32", "uint8", "bool"}
    assert sure <= WIDTHS.keys()


def test_a_plan_cannot_be_changed():
    plan = place(Strategy("zero3"), ranks_of(Strategy("zero3"), 4), "float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.aliased = True
    assert plan == place(Strategy("zero3"), ranks_of(Strategy("zero3"), 4), "float32") and len({plan, plan}) == 1


# --- no torch ------------------------------------------------------------------------------------------
ROOT = Path(shardwise.__file__).parent


def loaded_by(path: Path) -> tuple[set[Path], set[str]]:
    """The files of the package, and the names of other modules, that importing a file runs."""
    files, others, todo = set(), set(), [path, ROOT / "__init__.py"]
    while todo:
        file = todo.pop()
        if file in files:
            continue
        files.add(file)
        for node in at_import(ast.parse(file.read_text())):
            names = [a.name for a in node.names]
            full = names if isinstance(node, ast.Import) else [node.module, *(f"{node.module}.{n}" for n in names)]
            for name in full:
                inner = ROOT.joinpath(*name.split(".")[1:])
                found = [p for p in (inner.with_suffix(".py"), inner / "__init__.py") if p.is_file()]
                if name.split(".")[0] != "shardwise":
                    others.add(name.split(".")[0])
                else:
                    packages = [p / "__init__.py" for p in inner.parents if ROOT in p.parents]
                    todo += [*found, *(p for p in packages if p.is_file())]
    return files, others


def at_import(tree: ast.AST):
    """The imports of a file that take place when it is imported: not in functions, not for type checkers."""
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)) or not any(running(tree)):
        return
    if isinstance(tree, (ast.Import, ast.ImportFrom)):
        yield tree
    for child in ast.iter_child_nodes(tree):
        yield from at_import(child)


@pytest.mark.parametrize("name", ["placement", "layout", "engine/residency"])
def test_it_is_arithmetic_without_torch(name):
    files, others = loaded_by(ROOT / f"{name}.py")
    assert ROOT / "errors.py" in files or name == "layout", "imports between files are no longer found"
    assert "torch" not in others and "numpy" not in others


def test_an_import_of_torch_would_be_found():
    assert "torch" in loaded_by(ROOT / "engine" / "gradients.py")[1]
