"""How a model is loaded, what is planned before, and what the schedule of streamed weights takes."""

from __future__ import annotations

import gc
import os
import pty
import shutil
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardwise
from models import rank
from ranks import run
from shardwise.checkpoint import coordination
from shardwise.engine.hooks import engine_of
from shardwise.errors import OffloadError
from shardwise.inference.plan import Room, Usage, Weights, forecasts_of, least, place_weights, streaming_room
from shardwise.inference.rates import Rates
from terminals import written


class Stack(nn.Module):
    """Blocks of the widths that are asked for, between two tables.

    Args:
        cut: a file that is cut off when somebody looks for the model's ``config``, while it is being loaded.
    """

    def __init__(self, inner: list[int], width: int = 64, cut: Path | None = None) -> None:
        super().__init__()
        self.cut = cut
        self.table = nn.Embedding(96, width)
        self.blocks = nn.ModuleList(Block(width, k) for k in inner)
        self.head = nn.Linear(width, 96, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @property
    def config(self) -> None:
        if self.cut is not None:
            os.truncate(self.cut, self.cut.stat().st_size * 2 // 3)


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def stack(inner: list[int], seed: int = 0, **kw) -> Stack:
    torch.manual_seed(seed)
    return Stack(inner, **kw).eval()


def empty(inner: list[int], **kw) -> Stack:
    with torch.device("meta"):
        return Stack(inner, **kw)


def saved(model: nn.Module, file: Path) -> Path:
    safetensors.torch.save_model(model, file)
    return file


IDS = torch.arange(24).view(2, 12)


# --- loading ------------------------------------------------------------------------------------------
def test_a_load_that_fails_half_way_leaves_the_module_as_it_was(tmp_path):
    inner = [200] * 6
    model = stack(inner)
    file = saved(model, tmp_path / "weights.safetensors")
    shutil.copy(file, tmp_path / "whole")
    other = empty(inner, cut=file)
    gc.collect()
    params, threads = list(other.parameters()), threading.active_count()
    with pytest.raises(OffloadError, match=r"weights\.safetensors.*\n.*cut off"):
        shardwise.load(other, "auto", checkpoint=file, no_split_module_classes=["Block"])
    assert threading.active_count() <= threads
    assert all(a is b for a, b in zip(other.parameters(), params, strict=True))
    shutil.copy(tmp_path / "whole", file)
    other.cut = None
    with torch.no_grad():
        assert torch.equal(shardwise.load(other, checkpoint=file)(IDS), model(IDS))


def one_is_cut(folder: Path) -> tuple[str, torch.Tensor]:
    file = folder / f"{rank()}.safetensors"
    other = empty([200] * 6, cut=file if rank() == 1 else None)
    gc.collect()  # models of tests before this one
    threads = threading.active_count()
    with pytest.raises(shardwise.ShardwiseError) as caught:
        shardwise.load(other, "split", checkpoint=file, no_split_module_classes=["Block"])
    assert rank() == 0 or threading.active_count() <= threads
    loaded = shardwise.load(empty([200] * 6), "split", checkpoint=folder / "whole.safetensors")
    with torch.no_grad():
        return str(caught.value), loaded(IDS + rank())


def test_what_one_rank_cannot_read_is_raised_on_all_and_they_go_on(tmp_path):
    model = stack([200] * 6)
    for name in ("0", "1", "whole"):
        saved(model, tmp_path / f"{name}.safetensors")
    (first, out), (second, other) = run(2, one_is_cut, tmp_path)
    assert "rank 1" in first and "cut off" in first and "cut off" in second
    with torch.no_grad():
        assert torch.equal(out, model(IDS)) and torch.equal(other, model(IDS + 1))


def test_a_bar_on_a_terminal_only(tmp_path, monkeypatch, capfd):
    file = saved(stack([200] * 6), tmp_path / "weights.safetensors")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        patched.setenv("TERM", "xterm")
        patched.setattr(coordination, "_MOMENT_S", 0.0)
        shardwise.load(empty([200] * 6), checkpoint=file)
        terminal.flush()
        shown = written(ours)
    os.close(ours)
    assert "loading" in shown and "/" in shown
    shardwise.load(empty([200] * 6), checkpoint=file)
    assert capfd.readouterr().err == ""


# --- looking ahead ------------------------------------------------------------------------------------
UNEVEN = [900, 100, 100, 1200, 100, 100, 100, 700, 100]


def limited(model: Stack, inner: list[int], file: Path, part: float, **kw) -> Stack:
    """The model with so much of its weights' bytes to run in."""
    allowed = int(sum(p.nbytes for p in model.parameters()) * part)
    return shardwise.load(
        empty(inner), checkpoint=file, no_split_module_classes=["Block"], max_memory={"cpu": allowed}, **kw
    )


@pytest.mark.parametrize("ahead", [None, 0, 1])
def test_uneven_units_stay_within_the_plan_and_are_read_once(tmp_path, ahead):
    model = stack(UNEVEN)
    file = saved(model, tmp_path / "weights.safetensors")
    loaded = limited(model, UNEVEN, file, 0.9, ahead=ahead)
    plan, files = loaded.shardwise_plan, next(b for u in engine_of(loaded).units for b in u.buckets).reading.files
    assert plan.total("nvme") > 0
    allowed = int(sum(p.nbytes for p in model.parameters()) * 0.9)
    assert plan.device <= allowed and (ahead is not None or plan.device >= allowed - 4096)
    with torch.no_grad():
        for turn in range(4):
            engine_of(loaded).ledger.reset_peak()
            assert torch.equal(loaded(IDS), model(IDS))
            assert engine_of(loaded).ledger.peak_total <= plan.device, turn  # from the first on
            if turn == 1:
                begun = files.stats.bytes_read
    going = [u.gather_bytes for u in engine_of(loaded).units if u.offloaded]
    assert abs(files.stats.bytes_read - begun - 2 * sum(going)) <= plan.streaming


def test_as_much_is_brought_as_there_is_room_for(tmp_path):
    inner = [100] * 20
    model = stack(inner)
    file = saved(model, tmp_path / "weights.safetensors")
    loaded = limited(model, inner, file, 0.5, ahead=5)
    engine = engine_of(loaded)
    coming: list[int] = []
    loaded.blocks[4].register_forward_hook(
        lambda *_: coming.append(sum(u.residence.staging or u.residence.coming for u in engine.units if u.offloaded))
    )
    with torch.no_grad():
        for _ in range(3):
            loaded(IDS)
    assert coming == [6] * 3  # the next one and five more, in the first forward as in the others


class Turns(Stack):
    """Its blocks run in another order each time, and some not at all."""

    def forward(self, ids: torch.Tensor, turn: int = 0) -> torch.Tensor:
        x = self.table(ids)
        order = list(range(len(self.blocks)))
        for i in order if turn == 0 else order[::-1] if turn == 1 else order[turn:] + order[: turn - 2]:
            x = self.blocks[i](x)
        return self.head(x)


def test_what_was_brought_in_vain_makes_room(tmp_path):
    torch.manual_seed(0)
    model = Turns(UNEVEN).eval()
    file = saved(model, tmp_path / "weights.safetensors")
    with torch.device("meta"):
        other = Turns(UNEVEN)
    loaded = shardwise.load(
        other, checkpoint=file, no_split_module_classes=["Block"],
        max_memory={"cpu": int(sum(p.nbytes for p in model.parameters()) * 0.9)},
    )  # fmt: skip
    with torch.no_grad():
        for turn in (1, 0, 4, 3, 1, 5, 0):
            engine_of(loaded).ledger.reset_peak()
            assert torch.equal(loaded(IDS, turn), model(IDS, turn))
            assert engine_of(loaded).ledger.peak_total <= loaded.shardwise_plan.device, turn


def at_turns(folder: Path) -> list[torch.Tensor]:
    with torch.device("meta"):
        other = Turns(UNEVEN)
    loaded = shardwise.load(
        other, "split", checkpoint=folder / "w.safetensors", no_split_module_classes=["Block"],
        max_memory={"cpu": (3400 + 400 * rank()) << 10},
    )  # fmt: skip
    assert loaded.shardwise_plan.total("nvme") > 0
    with torch.no_grad():
        return [loaded(IDS + rank(), turn) for turn in (1, 0, 4, 3, 1)] + [str(loaded.shardwise_plan.homes)]


def test_ranks_with_unequal_room_make_one_plan(tmp_path):
    torch.manual_seed(0)
    model = Turns(UNEVEN).eval()
    saved(model, tmp_path / "w.safetensors")
    (*first, homes), (*second, others) = run(2, at_turns, tmp_path)
    assert homes == others
    with torch.no_grad():
        for turn, *outs in zip((1, 0, 4, 3, 1), first, second, strict=True):
            assert all(torch.equal(out, model(IDS + r, turn)) for r, out in enumerate(outs))


# --- what stays ---------------------------------------------------------------------------------------
RATES = Rates(disk=1e9, link=0.0, short=1e-9, long=1e-11, batch=1)
units_of = st.lists(
    st.tuples(st.integers(0, 1 << 24), st.floats(0, 4e6), st.booleans()), min_size=1, max_size=10
)  # fmt: skip


def weights(found: list[tuple[int, float, bool]]) -> list[Weights]:
    """Units one behind the other, some inside of the one before."""
    out: list[Weights] = []
    for k, (nbytes, each, inside) in enumerate(found):
        name = f"{out[-1].name}.{k}" if out and inside else f"m{k}"
        out.append(Weights(name, nbytes, nbytes + 100, each))
    return out


@settings(max_examples=150, deadline=None)
@given(units_of, st.floats(0.1, 1.2), st.integers(0, 1 << 22), st.sampled_from([1, 2, 3]), st.sampled_from([None, 1]))
def test_plans_fit_and_are_no_slower_than_evenly_spread(found, part, beside, parts, ahead):
    units = weights(found)
    room = Room(int(sum(u.going for u in units) * part / parts) + beside, 0, beside)
    usage = Usage(1, 32, RATES)
    try:
        plan = place_weights(units, room, parts=parts, ahead=ahead, usage=usage)
    except OffloadError:
        assert room.device - beside < streaming_room(units, parts, -1 if ahead is None else ahead)
        return
    assert plan.device <= room.device
    going = [u for u in units if plan.homes[u.name] != "device" or parts > 1]
    assert not going or plan.streaming >= least(going)
    if plan.forecasts:
        for told in plan.forecasts.values():
            slowest = max(told.disk, told.compute)
            assert slowest * (1 - 1e-9) <= told.seconds <= (told.disk + told.compute) * (1 + 1e-9) + 1e-12
        even = place_weights(units, room, parts=parts, ahead=ahead)
        told = forecasts_of(units, even.homes, even.streaming, parts, usage)
        assert cost(plan.forecasts) <= cost(told) * (1 + 1e-9)


def cost(forecasts) -> float:
    prompt, word = forecasts.values()
    return prompt.seconds + 100 * word.seconds


def test_a_layer_that_streams_under_the_computing_of_others_streams():
    """Experts that few tokens see are read under the blocks around them; a table that nobody multiplies with stays."""
    units = [Weights("table", 40 << 20, each=0.0)]
    for k in range(6):
        units += [Weights(f"attention{k}", 10 << 20, each=60e6), Weights(f"experts{k}", 30 << 20, each=1e6)]
    usage = Usage(1, 32, RATES)
    room = Room(130 << 20, 0)
    plan = place_weights(units, room, usage=usage)
    even = place_weights(units, room)
    told = forecasts_of(units, even.homes, even.streaming, 1, usage)
    assert cost(plan.forecasts) < cost(told)
    word = plan.forecasts["one more token"]
    assert word.bound == "compute" and word.seconds == pytest.approx(word.compute, rel=0.05)


def test_the_plan_is_a_table_that_says_where_the_time_goes(tmp_path, capsys):
    inner = [2000] * 24
    model = stack(inner, width=256)
    file = saved(model, tmp_path / "weights.safetensors")
    loaded = shardwise.load(
        empty(inner, width=256), checkpoint=file, no_split_module_classes=["Block"], verbose=True, length=64,
        max_memory={"cpu": sum(p.nbytes for p in model.parameters()) // 2},
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert str(loaded.shardwise_plan) in shown
    for words in ("read per forward", "disk", "a prompt of 64 tokens", "one more token", "bound by", "measured: disk"):
        assert words in shown
    forecasts = loaded.shardwise_plan.forecasts
    assert forecasts["one more token"].disk == pytest.approx(
        loaded.shardwise_plan.total("nvme") / loaded.shardwise_plan.rates.disk
    )
    shardwise.load(empty(inner, width=256), checkpoint=file, verbose=True)
    assert "measured" not in capsys.readouterr().out  # nothing has to be found out where all of it fits


def lends(folder: Path) -> tuple[int, int, int]:
    inner = [2000] * 8
    loaded = shardwise.load(
        empty(inner), "split", checkpoint=folder / "w.safetensors", no_split_module_classes=["Block"],
        max_memory={"cpu": 7 << 20}, ahead=2,
    )  # fmt: skip
    engine, plan = engine_of(loaded), loaded.shardwise_plan
    files = next(b for u in engine.units for b in u.buckets).reading.files
    with torch.no_grad(), shardwise.together(loaded):
        loaded(IDS)
        engine.ledger.reset_peak()
        for _ in range(4 * rank()):
            loaded(IDS)
    assert plan.total("nvme") > plan.total("device")
    return engine.ledger.peak["gather_buffers"], plan.streaming, files.stats.reads


def test_a_rank_that_lends_its_shards_reads_ahead_as_the_others(tmp_path):
    model = stack([2000] * 8)
    saved(model, tmp_path / "w.safetensors")
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    (lent, room, reads), (asked, _, others) = run(2, lends, tmp_path)
    assert 3 * block <= lent <= room and 3 * block <= asked <= room
    assert abs(reads - others) <= 4  # what is read ahead is used, but for what is behind the end
