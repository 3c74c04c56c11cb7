"""Any to any: what was saved under one strategy and world size, any other loads, and the training goes on exactly.

Every run trains on the same global batch, each rank on its part of it. So all runs of one world size save the same
bits, all that load the same bits at one world size go on with the same bits, and everything is close to one plain
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise import checkpoint
from slowly import slow
from test_offload import at, separate_memory

ROWS = 12  # of a global batch: it can be divided by every world size
SAVED, STEPS = 2, 4
WORLDS = (1, 2, 3, 4)
ALL = (*PRESETS, "hsdp")
HSDP = {1: 1, 2: 1, 3: 3, 4: 2}  # ranks of a shard group, by world size
HOMES = (
    "",
    "offload_optimizer=cpu",
    "offload_optimizer=nvme",
    "offload_params=cpu",
    "offload_params=nvme",
    "offload_params=cpu,offload_grads=cpu,offload_optimizer=nvme",
    "offload_optimizer=nvme,offload_ratio=0.4",
    "optimizer_in_backward=true",
    "offload_params=nvme,offload_optimizer=nvme,optimizer_in_backward=true",
)


# --- what is trained ---------------------------------------------------------------------------------
class Shampoo(torch.optim.Optimizer):
    """Needs whole matrices, and keeps state of other shapes than theirs (Gupta et al. 2018, without the root)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, left=torch.eye(len(p)), right=torch.eye(p.shape[1]), mean=torch.zeros_like(p))
                state["step"] += 1
                state["left"].addmm_(p.grad, p.grad.T)
                state["right"].addmm_(p.grad.T, p.grad)
                state["mean"].lerp_(p.grad, 0.5)
                scaled = torch.linalg.solve(state["left"], torch.linalg.solve(state["right"], state["mean"].T).T)
                p.add_(scaled, alpha=-group["lr"])


def one(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [adamw(model.parameters())]


def matrices(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Four optimizers, three of which mix the elements of a tensor. The head is square, as are two of its states."""
    blocks = list(model.blocks.parameters())
    return [
        Shampoo([model.head.weight]),
        torch.optim.Muon([p for p in blocks if p.ndim == 2], lr=0.02),
        torch.optim.Adafactor([model.embed.weight], lr=0.01),
        adamw([*(p for p in blocks if p.ndim < 2), *model.norm.parameters()]),
    ]


def groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Frozen parameters, in a group and outside of any, and several groups."""
    model.embed.requires_grad_(False)
    model.blocks[1].up.requires_grad_(False)
    low = [p for p in model.blocks.parameters() if p.ndim < 2]
    first = [p for p in model.blocks.parameters() if p.ndim == 2]
    return [
        torch.optim.AdamW([{"params": first}, {"params": low, "weight_decay": 0.0, "lr": 0.02}], lr=0.01, amsgrad=True),
        torch.optim.SGD([*model.head.parameters(), *model.norm.parameters()], lr=0.05, momentum=0.9),
    ]


class Kind(NamedTuple):
    """A model, its optimizers, and what its strategies have in common.

    Args:
        tol: of losses and weights against one process that trains on whole batches in fp32.
    """

    model: Callable[..., nn.Module]
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
    extra: str
    tol: float


KINDS = {
    "tied": Kind(partial(make, layers=2, tied=True), one, "", 1e-4),
    "bf16": Kind(partial(make, layers=2, tied=True), one, ",param_dtype=bf16", 0.05),
    "matrices": Kind(partial(make, layers=2, vocab=13), matrices, ",layout=tensor", 1e-4),
    "groups": Kind(partial(make, layers=2), groups, "", 1e-4),
}


Bits = tuple[int, bool, bool]
"""World size; do gradients cross to the host in half precision; is it a model that is not sharded?"""


class Case(NamedTuple):
    """One run. ``preset`` ``none`` is the model as it is, in one process."""

    world: int
    preset: str
    home: str

    @property
    def name(self) -> str:
        return f"{self.world}-{self.preset}-{self.home.replace(',', '-') or 'device'}"

    def bits(self, kind: str) -> Bits:
        """Runs with the same one have the same bits."""
        link = "=cpu" in self.home and ("offload_optimizer" in self.home or "offload_grads" in self.home)
        return self.world, kind == "bf16" and link, self.preset == "none"

    def built(self, kind: Kind, folder: Path, seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = kind.model(seed=seed)
        optimizers = kind.optimizers(model)
        if self.preset == "none":
            return model, optimizers
        size = f",shard_size={HSDP[self.world]}" if self.preset == "hsdp" else ""
        strategy = at(f"{self.preset}{size}{kind.extra}", self.home or "device", str(folder))
        with separate_memory() if "=cpu" in self.home else nullcontext():
            shardwise.fully_shard(model, strategy=strategy)
        for optimizer in optimizers:
            shardwise.attach(optimizer)
        return model, optimizers


def ids_of(model: nn.Module, index: int) -> torch.Tensor:
    return batch(index, 0, rows=ROWS, vocab=model.head.out_features)


def step(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], index: int) -> float:
    """One step on this rank's part of the global batch. The learning rates are others in every step."""
    loss = loss_of(model, ids_of(model, index).chunk(world())[rank()])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
    return loss.item()


class Alone(NamedTuple):
    """The oracle, one plain process on whole batches: per step the losses of each rank's part by world size, and the
    weights after it."""

    losses: list[dict[int, list[float]]]
    weights: list[dict[str, torch.Tensor]]


def alone(kind: Kind) -> Alone:
    model = kind.model(seed=0)
    optimizers = kind.optimizers(model)
    out = Alone([], [])
    for k in range(STEPS):
        with torch.no_grad():
            ids = ids_of(model, k)
            out.losses.append({size: [loss_of(model, part).item() for part in ids.chunk(size)] for size in WORLDS})
        step(model, optimizers, k)
        out.weights.append(whole(model))
    return out


# --- on the ranks ------------------------------------------------------------------------------------
class Went(NamedTuple):
    """How a run went on behind the checkpoint: this rank's losses, and the weights in the end."""

    losses: list[float]
    weights: dict[str, torch.Tensor]

    def is_close_to(self, other: Alone, tol: float) -> None:
        expected = [other.losses[k][world()][rank()] for k in range(SAVED, STEPS)]
        assert self.losses == pytest.approx(expected, rel=tol)
        assert_close(self.weights, other.weights[-1], tol)

    def is_(self, other: Went) -> None:
        assert self.losses == other.losses
        assert_same(self.weights, other.weights)


class Saved(NamedTuple):
    """Checkpoints of one kind.

    Args:
        alone: how the training goes in one process.
        tensors: what is in them.
        went: how the runs that saved them went on, by rank.
    """

    kind: str
    folder: Path
    alone: Alone
    tensors: dict[Bits, dict[str, torch.Tensor]]
    went: dict[Bits, list[Went]]


@contextmanager
def told(*what: Any) -> Iterator[None]:
    """Whatever fails inside says in which run."""
    try:
        yield
    except Exception as error:
        raise AssertionError(" ".join(map(str, what))) from error


def read(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by torch's own reader in one process."""
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    out = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in stored.items()}
    dcp.load(dict(out), storage_reader=reader, no_dist=True)
    return out


def go_on(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Went:
    return Went([step(model, optimizers, k) for k in range(SAVED, STEPS)], whole(model))


def save(
    kind: str, folder: Path, cases: Sequence[Case], expected: Alone
) -> dict[Bits, tuple[Went, dict[str, torch.Tensor]]]:
    """Runs that save and go on, with the same bits and close to one process.

    Returns:
        How they went on, and what the first of them saved: what the others did is compared when it is loaded.
    """
    out: dict[Bits, tuple[Went, dict[str, torch.Tensor]]] = {}
    tol = KINDS[kind].tol
    for case in cases:
        with told("saving under", case):
            model, optimizers = case.built(KINDS[kind], folder, seed=0)
            for k in range(SAVED):
                step(model, optimizers, k)
            checkpoint.save(folder / case.name, models=[model], optimizers=optimizers, state={"step": SAVED})
            went = go_on(model, optimizers)
            went.is_close_to(expected, tol)
            bits = case.bits(kind)
            if bits not in out:
                tensors = read(folder / case.name)
                weights = {name.partition(".")[2]: value for name, value in tensors.items() if name[:6] == "model."}
                assert_close(weights, expected.weights[SAVED - 1], tol)
                out[bits] = went, tensors
            went.is_(out[bits][0])
    return out


Turn = tuple[Case, Sequence[Case]]
"""A run that loads, and those whose checkpoints it loads."""


def load(saved: Saved, turns: Sequence[Turn], again: bool) -> None:
    """Runs that load one checkpoint after another: into a fresh model, then over what came of the last one.

    Each goes on as the run that saved would have, and as all others do that load the same.

    Args:
        again: save what was loaded last, and look into it.
    """
    kind = KINDS[saved.kind]
    reference = {(bits, bits): went[rank()] for bits, went in saved.went.items() if bits[0] == world()}
    copies: list[tuple[Case, Path]] = []
    for case, savers in turns:
        model, optimizers = case.built(kind, saved.folder, seed=7)
        for saver in savers:
            with told("loading what was saved under", saver, "under", case):
                for group in (g for o in optimizers for g in o.param_groups):
                    group["lr"] = 0.3
                loaded = checkpoint.load(saved.folder / saver.name, models=[model], optimizers=optimizers)
                assert loaded.state["step"] == SAVED
                if again and saver is savers[-1]:
                    copies.append((saver, saved.folder / f"{saver.name}-again-{case.name}"))
                    checkpoint.save(copies[-1][1], models=[model], optimizers=optimizers)
                went = go_on(model, optimizers)
                went.is_close_to(saved.alone, kind.tol)
                went.is_(reference.setdefault((saver.bits(saved.kind), case.bits(saved.kind)), went))
    for saver, copy in copies[rank() :: world()]:
        with told("reading", copy):
            assert_same(read(copy), saved.tensors[saver.bits(saved.kind)])


# --- here --------------------------------------------------------------------------------------------
def saved_by(kind: str, folder: Path, cases: Sequence[Case]) -> Saved:
    saved = Saved(kind, folder, alone(KINDS[kind]), {}, {})
    for size in sorted({case.world for case in cases}):
        ranks = run(size, save, kind, folder, [case for case in cases if case.world == size], saved.alone)
        for bits, (_, tensors) in ranks[0].items():
            saved.tensors[bits] = tensors
            saved.went[bits] = [mine[bits][0] for mine in ranks]
    return saved


def load_all(saved: Saved, turns: Sequence[Turn], again: bool = True) -> None:
    if turns:
        run(turns[0][0].world, load, saved, turns, again)


# --- covering designs ------------------------------------------------------------------------------------
class Design:
    """Runs that save, and which of their checkpoints each loads: of its own world size, and of another one in turn;
    under other presets and with other homes."""

    def __init__(self, cases: Sequence[Case], shifts: tuple[int, int, int, int]) -> None:
        self.cases, self._shifts = cases, shifts
        self.by_world = {size: [case for case in cases if case.world == size] for size in WORLDS}

    def savers_for(self, case: Case) -> list[Case]:
        k = self.by_world[case.world].index(case)
        found = []
        for delta in (0, 1 + k % 3):
            others = self.by_world[WORLDS[(case.world - 1 + delta) % 4]]
            found.append(others[(k + self._shifts[delta]) % len(others)])
        return found

    def turns(self, size: int) -> list[Turn]:
        return [(case, self.savers_for(case)) for case in self.by_world[size]]


# Every pair of preset and home, and with the world size chosen by their sum every pair of those with it.
FULL = [Case(WORLDS[(p + h) % 4], preset, home) for h, home in enumerate(HOMES) for p, preset in enumerate(ALL)]
# Every preset at every world size, and homes in turn: each of them at two world sizes at least.
FEWER = [Case(*case, home) for case, home in zip(product(WORLDS, ALL), cycle(HOMES), strict=False)]
EVERY_PAIR, COVER = Design(FULL, (8, 8, 6, 7)), Design(FEWER, (1, 1, 2, 1))
BY_WORLD = COVER.by_world


@pytest.mark.parametrize("design", [COVER, EVERY_PAIR])
def test_the_designs_cover(design):
    cases = design.cases
    for first, second in ((0, 1), *([(0, 2), (1, 2)] if design is EVERY_PAIR else [])):
        values = [sorted({case[i] for case in cases}) for i in (first, second)]
        assert {(case[first], case[second]) for case in cases} == {(a, b) for a in values[0] for b in values[1]}
    assert [{case[i] for case in cases} for i in range(3)] == [set(WORLDS), set(ALL), set(HOMES)]
    assert all(len({case.world for case in cases if case.home == home}) > 1 for home in HOMES)
    loads = [(case, saver) for case in cases for saver in design.savers_for(case)]
    assert {(case.world, saver.world) for case, saver in loads} == {(a, b) for a in WORLDS for b in WORLDS}
    assert all(case.preset != saver.preset and case.home != saver.home for case, saver in loads)
    assert {saver for _, saver in loads} == set(cases)


@pytest.fixture(scope="module")
def cover(tmp_path_factory):
    return saved_by("tied", tmp_path_factory.mktemp("cover"), COVER.cases)


@pytest.mark.parametrize("size", WORLDS)
def test_any_strategy_and_world_size_loads_what_any_other_saved_and_goes_on(cover, size):
    load_all(cover, COVER.turns(size))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_preset_with_every_home(tmp_path):
    saved = saved_by("tied", tmp_path, EVERY_PAIR.cases)
    for size in WORLDS:
        load_all(saved, EVERY_PAIR.turns(size))


def test_tied_parameters_are_stored_once(cover):
    for case in (cases[-1] for cases in BY_WORLD.values()):
        places: dict[str, set[tuple[str, int]]] = {}
        for index, info in dcp.FileSystemReader(cover.folder / case.name).read_metadata().storage_data.items():
            places.setdefault(index.fqn, set()).add((info.relative_path, info.offset))
        assert places["model.head.weight"] == places["model.embed.weight"]
        assert "optimizer.state.embed.weight.exp_avg" in places
        assert not any(name.startswith("optimizer.state.head.") for name in places)


@pytest.mark.parametrize("every", [3, slow(1)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tied"])
def test_other_dtypes_optimizers_and_groups(kind, every, tmp_path):
    cases = FULL[list(KINDS).index(kind) :: 9][::every]  # all presets and world sizes, or a third of them
    saved = saved_by(kind, tmp_path, cases)
    for size in WORLDS:
        load_all(saved, [(case, [cases[k - 1]]) for k, case in enumerate(cases) if case.world == size])


def test_from_and_to_a_model_that_is_not_sharded(cover, tmp_path):
    plain = Case(1, "none", "")
    saved = saved_by("tied", tmp_path, [plain])
    for size in WORLDS:
        load_all(saved, [(case, [plain]) for case in BY_WORLD[size][::7]])
    load_all(cover, [(plain, [BY_WORLD[size][-1] for size in WORLDS])])


# --- all of it --------------------------------------------------------------------------------------------
AWAY = ("", *(f"offload_params={home},offload_optimizer={home}" for home in ("cpu", "nvme")))
WHOLE = [Case(*case) for case in product(WORLDS, ALL, AWAY)]


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return saved_by("tied", tmp_path_factory.mktemp("every"), WHOLE)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_each_loads_what_each_saved(every, case):
    for size in WORLDS:  # one call to the ranks must end in time
        load_all(every, [(case, [saver for saver in WHOLE if saver.world == size])])
