"""The Accelerator: one script, the true mean, the same decisions on every rank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from models import PRESETS, assert_close, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise.accelerator import Accelerator
from shardwise.errors import CommError, GradientError, OptimizerError, StrategyError
from slowly import in_turn


def everywhere(size, function, *args):
    """On every rank of a world of ``size``; a world of one is this process."""
    return [function(*args)] if size == 1 else run(size, function, *args)


class Weight(nn.Module):
    """loss = mean of w * x, so the gradient is the mean of x."""

    def __init__(self, n: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return (x * self.w).sum(-1)


def low_scale(accelerator):
    """A first loss scale that exact integers as gradients do not overflow."""
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": 32.0})


def grad_of(model):
    with shardwise.gathered(model, grads=True):
        return model.w.grad.clone()


# --- prepare -----------------------------------------------------------------------------------
def prepare_kinds(preset):
    accelerator = Accelerator(strategy=preset, cpu=True)
    model = make()
    early = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(early, 1)
    loader = DataLoader(TensorDataset(torch.arange(4.0)), batch_size=1)
    params = list(model.parameters())
    other = object()
    sched, data, thing, opt, prepared = accelerator.prepare(schedule, loader, other, early, model)
    assert prepared is model and thing is other and accelerator.unwrap_model(prepared) is model
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert isinstance(opt, torch.optim.Optimizer) and opt.optimizer is early and opt.param_groups is early.param_groups
    assert sched.scheduler is schedule and sched.optimizers == [opt] and len(data) == -(-4 // world())
    assert accelerator.prepare(model) is model and accelerator.prepare(opt) is opt
    late = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    torch.optim.lr_scheduler.StepLR(late, 1)  # a scheduler on the wrapper
    accelerator.backward(loss_of(model, batch(0, rank())))
    late.step()
    late.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert (accelerator.num_processes, accelerator.process_index) == (world(), rank())
    assert accelerator.is_main_process == (rank() == 0)
    accelerator.wait_for_everyone()
    return True


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2])
def test_prepare(size, preset):
    assert all(everywhere(size, prepare_kinds, preset))


def test_settings_are_not_shared(monkeypatch):
    a = Accelerator(gradient_accumulation_steps=4, strategy="zero2", mixed_precision="bf16", cpu=True)
    b = Accelerator(cpu=True)
    assert (b.gradient_accumulation_steps, b.strategy.preset, b.mixed_precision) == (1, "ddp", "no")
    with a.accumulate():
        assert not a.sync_gradients and b.sync_gradients
    monkeypatch.setenv("SHARDWISE_STRATEGY", "zero3")
    monkeypatch.setenv("SHARDWISE_MIXED_PRECISION", "bf16")
    assert Accelerator(strategy="ddp", cpu=True).strategy == shardwise.Strategy.parse(
        "zero3,param_dtype=bf16,autocast=true"
    )
    assert Accelerator(strategy="zero2,param_dtype=fp16", cpu=True).mixed_precision == "bf16", "the launcher's wins"
    monkeypatch.delenv("SHARDWISE_STRATEGY")
    monkeypatch.delenv("SHARDWISE_MIXED_PRECISION")
    with pytest.raises(StrategyError, match="contradict"):
        Accelerator(strategy="zero3,param_dtype=fp16", mixed_precision="bf16", cpu=True)


def training(preset, precision=None):
    accelerator = Accelerator(strategy=preset, mixed_precision=precision, cpu=True)
    model = make()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses, norms = [], []
    for step in range(6):
        logits = model(batch(step, rank())[:, :-1])
        assert logits.dtype == torch.float32
        loss = F.cross_entropy(logits.flatten(0, 1), batch(step, rank())[:, 1:].flatten())
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        opt.step()
        opt.zero_grad()
        losses.append(float(accelerator.reduce(loss, "mean")))
    return losses, norms, whole(model)


def training_alone(size):
    model = make()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = [], []
    for step in range(6):
        loss = loss_of(model, torch.cat([batch(step, r) for r in range(size)]))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, whole(model)


@in_turn(preset=PRESETS, size=[1, 2])
def test_mixed_precision(size, preset):
    oracle = training_alone(size)
    for losses, norms, weights in everywhere(size, training, preset):
        assert losses == pytest.approx(oracle[0], rel=1e-4)
        assert norms == pytest.approx(oracle[1], rel=1e-4)
        assert_close(weights, oracle[2], 1e-4)
    for precision, tol in (("bf16", 0.05), ("fp16", 0.02)):
        for losses, norms, weights in everywhere(size, training, preset, precision):
            assert all(v.dtype == torch.float32 for v in weights.values())
            assert losses == pytest.approx(oracle[0], rel=tol)
            assert norms == pytest.approx(oracle[1], rel=2 * tol)


# --- schedulers ------------------------------------------------------------------------------
def learning_rates(**settings):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    rates = []
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch(step, rank())))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_learning_rate_does_not_depend_on_the_number_of_ranks(size):
    assert everywhere(size, learning_rates) == [[1, 1 / 2, 1 / 2, 1 / 3]] * size


def as_accelerate_counts():
    return learning_rates(scheduler_per_process=True), learning_rates(scheduler_per_process=True, split_batches=True)


def test_unless_asked():
    for each, split in run(2, as_accelerate_counts):
        assert each == [1, 1 / 3, 1 / 3, 1 / 5] and split == [1, 1 / 2, 1 / 2, 1 / 3]


# --- accumulation ------------------------------------------------------------------------------
def accumulation(preset, n, zero_first, precision=None):
    """Gradients at the boundaries of one epoch over 5 batches per rank, with values that add up exactly."""
    accelerator = Accelerator(strategy=preset, gradient_accumulation_steps=n, cpu=True, mixed_precision=precision)
    low_scale(accelerator)
    model = Weight(3)
    data = torch.tensor([[float(2**k), 1.0, float(k)] for k in range(5 * world())])
    model, opt, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader(TensorDataset(data), batch_size=1)
    )
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1.0))
    grads, syncs, norms = [], [], []
    for (x,) in loader:
        with accelerator.accumulate(model):
            if zero_first:
                opt.zero_grad()
            accelerator.backward(model(x).mean())
            syncs.append(accelerator.sync_gradients)
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 1e9))
            if accelerator.sync_gradients:
                grads.append(grad_of(model) / (accelerator.scaler.get_scale() if norms[-1] is None else 1.0))
            opt.step()
            schedule.step()
            if not zero_first:
                opt.zero_grad()
    assert [norm is None for norm in norms] == [not s for s in syncs]
    return [g.tolist() for g in grads], syncs, whole(model)["w"].tolist(), schedule.last_epoch


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("zero_first", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_gives_the_true_mean_tail_included(size, preset, zero_first, precision):
    data = torch.tensor([[float(2**k), 1.0, float(k)] for k in range(5 * size)])
    means = [data[: 4 * size].mean(0), data[4 * size :].mean(0)]
    for grads, syncs, weight, scheduled in everywhere(size, accumulation, preset, 4, zero_first, precision):
        assert syncs == [False, False, False, True, True]
        assert torch.equal(torch.tensor(grads), torch.stack(means))
        assert torch.equal(torch.tensor(weight), -means[0] - means[1])
        assert scheduled == 2


def test_accumulation_on_three_ranks():
    data = torch.tensor([[float(2**k), 1.0, float(k)] for k in range(15)])
    for grads, _, _, _ in run(3, accumulation, "zero3", 4, False):
        torch.testing.assert_close(torch.tensor(grads), torch.stack([data[:12].mean(0), data[12:].mean(0)]))


def two_losses(preset):
    """Two backwards per micro-batch, and two models of which one is trained by the second loss only."""
    accelerator = Accelerator(strategy=preset, gradient_accumulation_steps=2, cpu=True)
    a, b = accelerator.prepare(Weight(), Weight())
    for k in range(2):
        with accelerator.accumulate(a, b):
            x = torch.tensor([[float(4 * k + rank())]])
            accelerator.backward(a(x).mean())
            accelerator.backward((a(x) + b(2 * x)).mean())
    return grad_of(a).item(), grad_of(b).item()


@pytest.mark.parametrize("preset", PRESETS)
def test_two_losses_add_up(preset):
    mean = (0 + 1 + 4 + 5) / 4
    assert run(2, two_losses, preset) == [(2 * mean, 2 * mean)] * 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Weight() for _ in range(3))

    def forward(self, x, k):
        return self.parts[k](x)


def branches(preset):
    """Each micro-batch trains another part; zero3 wants the same part everywhere, the others do not."""
    accelerator = Accelerator(strategy=preset, gradient_accumulation_steps=2, cpu=True)
    model = accelerator.prepare(Branches())
    for k in range(2):
        with accelerator.accumulate(model):
            x = torch.tensor([[float(4 * k + rank())]])
            accelerator.backward(model(x, k + (rank() if preset != "zero3" else 0)).mean())
    norm = float(accelerator.clip_grad_norm_(model, 1e9))
    with shardwise.gathered(model, grads=True):
        return [None if part.w.grad is None else part.w.grad.item() for part in model.parts], norm


@pytest.mark.parametrize("preset", PRESETS)
def test_what_was_used_before_the_boundary_only(preset):
    expected = [0.25, 2.25, None] if preset == "zero3" else [0.0, (1 + 4) / 4, 5 / 4]
    for grads, norm in run(2, branches, preset):
        assert grads == expected
        assert norm == pytest.approx(math.hypot(*(g for g in grads if g is not None)))


def outside_accumulate(preset):
    accelerator = Accelerator(strategy=preset, cpu=True)
    model = accelerator.prepare(Weight())
    x = torch.tensor([[float(1 + rank())]])
    with accelerator.no_sync(model):
        accelerator.backward(model(x).mean())
    accelerator.backward(model(x).mean())
    summed = grad_of(model).item()
    model.zero_grad()
    accelerator.backward(model(x).mean(), weight=1 + 2 * rank())
    return summed, grad_of(model).item()


@pytest.mark.parametrize("preset", PRESETS)
def test_outside_accumulate_gradients_add_up(preset):
    assert run(2, outside_accumulate, preset) == [(3.0, (1 * 1 + 3 * 2) / 4)] * 2


# --- weights -----------------------------------------------------------------------------------
WEIGHTS = [[3, 1, 4], [0, 5, 0], [2, 0, 6], [0, 0, 0]]  # micro-batch by rank


def weighted(preset, precision, windows):
    accelerator = Accelerator(
        strategy=preset, mixed_precision=precision, gradient_accumulation_steps=len(windows[0]), cpu=True
    )
    low_scale(accelerator)
    model = Weight(2)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    grads = []
    for window in windows:
        for k in window:
            with accelerator.accumulate(model):
                n = WEIGHTS[k][rank()]
                items = torch.full((n, 2), float(k + 1)) + torch.arange(2.0)
                accelerator.backward(model(items).mean(), weight=n)  # the mean of nothing is nan
                if accelerator.clip_grad_norm_(model.parameters(), 1e9) is not None:
                    grads.append(grad_of(model).tolist())
                opt.step()
                opt.zero_grad()
    assert not accelerator.optimizer_step_was_skipped
    return grads


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2])
def test_weighted_losses_give_the_mean_over_items(size, preset, precision):
    windows = [[3, 3], [0, 1], [2, 3], [1, 2]]
    expected = []
    for window in windows:
        items = [k + 1.0 for k in window for n in WEIGHTS[k][:size] for _ in range(n)]
        mean = sum(items) / len(items) if items else 0.0
        expected.append([mean, mean + 1 if items else 0.0])
    for grads in everywhere(size, weighted, preset, precision, windows):
        torch.testing.assert_close(torch.tensor(grads), torch.tensor(expected))


def test_weighted_on_three_ranks():
    for grads in run(3, weighted, "zero3", None, [[0, 1], [2, 3]]):
        torch.testing.assert_close(torch.tensor(grads), torch.tensor([[18 / 13, 31 / 13], [3.0, 4.0]]))


LENGTHS = [[4, 0], [1, 5], [0, 3], [5, 2]]  # tokens with a label, by micro-batch and rank


def tokens(k, r):
    ids = batch(k, r, rows=1)
    labels = ids[:, 1:].clone()
    labels[:, LENGTHS[k][r] :] = -100
    return ids[:, :-1], labels


def token_mean(preset):
    accelerator = Accelerator(strategy=preset, gradient_accumulation_steps=2, cpu=True)
    model = make()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for k in range(4):
        with accelerator.accumulate(model):
            ids, labels = tokens(k, rank())
            loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
            accelerator.backward(loss, weight=(labels != -100).sum())
            opt.step()
            opt.zero_grad()
    return whole(model)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_language_model_gets_the_mean_over_tokens(preset):
    oracle = make()
    opt = torch.optim.AdamW(oracle.parameters(), lr=1e-2)
    for window in ((0, 1), (2, 3)):
        ids, labels = map(torch.cat, zip(*(tokens(k, r) for k in window for r in range(2)), strict=True))
        F.cross_entropy(oracle(ids).flatten(0, 1), labels.flatten()).backward()
        opt.step()
        opt.zero_grad()
    for weights in run(2, token_mean, preset):
        assert_close(weights, whole(oracle), 2e-5)


def test_weighted_and_unweighted_do_not_mix():
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = accelerator.prepare(Weight())
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.ones(1, 1)).mean(), weight=2)
    with accelerator.accumulate(model), pytest.raises(GradientError, match="weighted and unweighted"):
        accelerator.backward(model(torch.ones(1, 1)).mean())
    with pytest.raises(GradientError, match="not a number of items"):
        accelerator.backward(model(torch.ones(1, 1)).mean(), weight=-1)


# --- fp16 --------------------------------------------------------------------------------------
def overflow(preset):
    accelerator = Accelerator(strategy=preset, mixed_precision="fp16", cpu=True)
    model = make()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    schedule = accelerator.prepare(torch.optim.lr_scheduler.StepLR(opt.optimizer, 1, gamma=0.5))
    seen = []
    for step in range(4):
        before = whole(model)
        loss = loss_of(model, batch(step, rank()))
        if step == 1 and rank() == world() - 1:
            loss = loss * float("inf")
        accelerator.backward(loss)
        if step == 2:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad()
        moved = any(not torch.equal(before[k], v) for k, v in whole(model).items())
        assert moved == (not accelerator.optimizer_step_was_skipped)
        seen.append((accelerator.optimizer_step_was_skipped, accelerator.scaler.get_scale(), schedule.last_epoch))
    return seen, whole(model)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2])
def test_an_overflow_on_one_rank_is_skipped_by_all(size, preset):
    ranks = everywhere(size, overflow, preset)
    start = 65536.0
    for seen, weights in ranks:
        assert seen == [(False, start, 1), (True, start / 2, 1), (False, start / 2, 2), (False, start / 2, 3)]
        assert all(torch.isfinite(v).all() for v in weights.values())


def two_optimizers():
    """The scale must not change while a second optimizer still holds gradients of the old one."""
    accelerator = Accelerator(strategy="zero2", mixed_precision="fp16", cpu=True)
    low_scale(accelerator)
    a, b = Weight(), Weight()
    a, b, of_a, of_b = accelerator.prepare(
        a, b, torch.optim.SGD(a.parameters(), lr=1.0), torch.optim.SGD(b.parameters(), lr=1.0)
    )
    x = torch.ones(1, 1)
    accelerator.backward(a(x).mean() * (float("inf") if rank() == 0 else 1.0) + b(x).mean())
    of_a.step()
    of_b.step()
    skipped = of_a.step_was_skipped, of_b.step_was_skipped
    for opt in (of_a, of_b):
        opt.zero_grad()
    accelerator.backward(a(x).mean() + b(x).mean())
    for opt in (of_a, of_b):
        opt.step()
    return skipped, accelerator.scaler.get_scale(), whole(a)["w"].item(), whole(b)["w"].item()


@pytest.mark.parametrize("size", [1, 2])
def test_two_optimizers_share_a_scale(size):
    assert everywhere(size, two_optimizers) == [((True, False), 16.0, -1.0, -2.0)] * size


# --- optimizers --------------------------------------------------------------------------------
class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def inputs(step, r):
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + r))


def muon(preset, late):
    accelerator = Accelerator(strategy=preset, cpu=True)
    torch.manual_seed(1)
    model = Matrices()
    opt = torch.optim.Muon(model.parameters(), lr=0.05)
    model, opt = accelerator.prepare(model, opt) if late else accelerator.prepare(opt, model)[::-1]
    for step in range(4):
        accelerator.backward(model(inputs(step, rank())).square().mean())
        opt.step()
        opt.zero_grad()
    return whole(model)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_muon_gets_whole_tensors(size, preset):
    torch.manual_seed(1)
    oracle = Matrices()
    opt = torch.optim.Muon(oracle.parameters(), lr=0.05)
    for step in range(4):
        oracle(torch.cat([inputs(step, r) for r in range(size)])).square().mean().backward()
        opt.step()
        opt.zero_grad()
    for weights in everywhere(size, muon, preset, size == 2):
        assert_close(weights, whole(oracle), 1e-4)


def misfits():
    accelerator = Accelerator(strategy="zero3", cpu=True)
    for kind in (torch.optim.LBFGS, torch.optim.SparseAdam):
        model = Weight()
        with pytest.raises(OptimizerError, match=kind.__name__):
            accelerator.prepare(kind(model.parameters()), model)
        assert not hasattr(model.w, "_shardwise_unit")
    model = accelerator.prepare(Matrices())
    if world() > 1:
        with pytest.raises(OptimizerError, match="layout=tensor"):
            accelerator.prepare(torch.optim.Muon(model.parameters()))
    else:  # one rank holds whole parameters
        accelerator.prepare(torch.optim.Muon(model.parameters()))


@pytest.mark.parametrize("size", [1, 2])
def test_impossible_optimizers_are_refused_before_anything_changes(size):
    run(size, misfits)


# --- numbers -----------------------------------------------------------------------------------
def sharing():
    accelerator = Accelerator(cpu=True)
    x = torch.tensor([[1.0 + rank(), 2.0]], dtype=torch.bfloat16)
    out = accelerator.gather({"a": [x, torch.tensor(rank())], "b": (torch.tensor([rank() == 1]),)})
    total = accelerator.reduce(torch.tensor([float(rank() + 1)]), "sum", scale=2.0)
    wrong = ""
    if world() > 1:
        try:
            accelerator.gather(torch.zeros(1 + rank()))
        except CommError as error:
            wrong = str(error)
    with pytest.raises(TypeError):
        accelerator.gather([1, 2])
    return out["a"][0].tolist(), out["a"][1].tolist(), out["b"][0].tolist(), float(total), "other shapes" in wrong


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gather_and_reduce(size):
    rows = [[1.0 + r, 2.0] for r in range(size)]
    total = 2.0 * math.comb(size + 1, 2)
    expected = (rows, list(range(size)), [r == 1 for r in range(size)], total, size > 1)
    assert everywhere(size, sharing) == [expected] * size


def syncs_within():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Weight())
    with accelerator.no_sync(model):
        accelerator.backward(model(torch.full((1, 1), 1.0 + rank())).sum())
        with accelerator.trigger_sync_in_backward(model):
            accelerator.backward(model(torch.full((1, 1), 10.0 * (1 + rank()))).sum())
    return model.w.grad.item()


def test_a_backward_within_no_sync_can_be_asked_to_sync():
    assert run(2, syncs_within) == [1.5 + 15.0] * 2


def sends_a_tensor():
    from shardwise.errors import TensorError
    from shardwise.utils import copy_tensor_to_devices

    sent = copy_tensor_to_devices(torch.arange(3.0) + 5 if rank() == 0 else None)
    with pytest.raises(TensorError, match="no tensor"):
        copy_tensor_to_devices(None)
    return sent.tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_copy_tensor_to_devices(size):
    assert everywhere(size, sends_a_tensor) == [[5, 6, 7]] * size


def test_join_says_what_it_cannot_change():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Weight())
    loader = accelerator.prepare(DataLoader(Stream(3), batch_size=1))
    with pytest.warns(UserWarning, match="map-style"), accelerator.join_uneven_inputs([model], even_batches=False):
        assert len(list(loader)) == 3


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(torch.arange(float(self.n)))
