"""Ranks that run out of data at different times: nobody waits in vain, and nobody's numbers suffer."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import processes
import shardwise
from models import PRESETS, assert_close, assert_same, make, rank, whole
from models import batch as tokens
from ranks import run
from shardwise.accelerator import Accelerator
from shardwise.errors import UnitError
from shardwise.utils.dataclasses import DataLoaderConfiguration
from slowly import in_turn


class Own(DistributedSampler):
    """Every rank's own batches, as many as it was given: batch k of rank r is sample 100 * r + k."""

    def __init__(self, counts):
        self.counts = counts

    def __iter__(self):
        return iter(range(100 * rank(), 100 * rank() + self.counts[rank()]))

    def __len__(self):
        return self.counts[rank()]


def loader_of(counts, rows=2):
    data = torch.stack([tokens(k % 100, k // 100, rows) for k in range(100 * len(counts))])
    return DataLoader(TensorDataset(data), batch_size=1, sampler=Own(counts))


def loss_of(model, ids):
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def rounds(counts):
    """Per round, the ranks that have a batch."""
    return [[r for r, n in enumerate(counts) if k < n] for k in range(max(counts))]


def training(preset, counts, every=1, precision=None, clip=0.5, weights=False, epochs=1, rate=1e-2, own=True):
    accelerator = Accelerator(strategy=preset, mixed_precision=precision, gradient_accumulation_steps=every, cpu=True)
    model = make()
    opt = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, eps=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k))
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader_of(counts), schedule)
    seen, norms, means = 0, [], []
    with accelerator.join_uneven_inputs([model, opt]):
        for _ in range(epochs):
            for (ids,) in loader:
                with accelerator.accumulate(model) if every > 1 else nullcontext():
                    loss = loss_of(model, ids[0])
                    accelerator.backward(loss, weight=float(1 + seen % 3 + rank()) if weights else None)
                    if clip and accelerator.sync_gradients:
                        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
                    opt.step()
                    schedule.step()
                    opt.zero_grad()
                means.append(float(accelerator.reduce(loss.detach(), "mean")))
                seen += 1
    assert seen == epochs * counts[rank()]
    assert all(p.grad is None for p in model.parameters())
    state = [{k: v for k, v in s.items() if isinstance(v, torch.Tensor) and v.dim() == 0} for s in opt.state.values()]
    steps = {float(s["step"]) for s in state if "step" in s}
    return whole(model), norms, means, steps, opt.param_groups[0]["lr"], schedule.state_dict()["last_epoch"]


def training_alone(counts, every=1, clip=0.5, weights=False, epochs=1, rate=1e-2):
    model = make()
    opt = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, eps=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k))
    norms, means = [], []
    for epoch in range(epochs):
        waiting = []
        for k, live in enumerate(rounds(counts)):
            losses = [loss_of(model, tokens(k, r)) for r in live]
            means.append(float(torch.stack(losses).mean().detach()))
            seen = [epoch * counts[r] + k for r in live]
            waiting += [(loss, 1 + s % 3 + r if weights else 1) for loss, s, r in zip(losses, seen, live, strict=True)]
            if (k + 1) % every == 0 or k + 1 == max(counts):
                (sum(w * loss for loss, w in waiting) / sum(w for _, w in waiting)).backward()
                if clip:
                    norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
                opt.step()
                schedule.step()
                opt.zero_grad()
                waiting = []
    return whole(model), norms, means, len(norms), opt.param_groups[0]["lr"]


def check(results, oracle, counts, every=1, tol=1e-5):
    weights, norms, means, steps, rate = oracle
    longest = max(range(len(counts)), key=counts.__getitem__)
    for r, (mine, my_norms, _my_means, my_steps, my_rate, count) in enumerate(results):
        assert_same(mine, results[0][0])
        assert_close(mine, weights, tol)
        if tol < 1e-3 and r == longest:
            assert my_norms == pytest.approx(norms, rel=1e-3)
        assert my_steps <= {float(steps)} and (my_steps or r != longest)
        assert my_rate == pytest.approx(rate) and count == steps
    assert results[longest][2] == pytest.approx(means, rel=max(tol, 1e-4))


@in_turn(preset=PRESETS, counts=[(4, 1), (0, 3), (1, 3, 0)])
def test_one_step_per_batch(preset, counts):
    check(run(len(counts), training, preset, counts), training_alone(counts), counts)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("every", [2, 4])
def test_accumulation_gives_the_mean_over_all_micro_batches(preset, every):
    counts = (3, 5)
    check(run(2, training, preset, counts, every), training_alone(counts, every), counts, every)


@pytest.mark.parametrize("preset", ["ddp", "zero3"])
def test_weights_and_several_epochs(preset):
    counts, options = (1, 4, 3), {"weights": True, "epochs": 2}
    results = run(3, training, preset, counts, 2, None, 0.5, True, 2)
    check(results, training_alone(counts, 2, **options), counts, 2)


def test_groups_of_ranks():
    counts = (2, 0, 3, 1)
    check(run(4, training, "hsdp,shard_size=2", counts, 2), training_alone(counts, 2), counts, 2)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(preset, precision):
    counts, every = (3, 0), 2
    check(run(2, training, preset, counts, every, precision), training_alone(counts, every), counts, every, 0.02)


# --- other loops ---------------------------------------------------------------------------------
class Norm(nn.Module):
    """Batch statistics: a forward too many would show in the buffers."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.norm(self.inp(x)))


def rows_of(k, r, n=4):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(100 * r + k))


def plain(preset, counts):
    """Lists instead of dataloaders, torch's own clipping, gradients scaled by hand, sums instead of means."""
    accelerator = Accelerator(strategy=preset, cpu=True)
    torch.manual_seed(0)
    model = Norm()
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    held = []
    with accelerator.join_uneven_inputs([model]):
        for k in range(counts[rank()]):
            model(rows_of(k, rank())).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for p in model.parameters():
                p.grad.mul_(0.5)
            opt.step()
            opt.zero_grad(set_to_none=k % 2 == 0)
            held.append(len(accelerator.gather(torch.ones(1))))
    return whole(model), held


def plain_alone(counts):
    torch.manual_seed(0)
    model = Norm()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = {r: [b.clone() for b in model.buffers()] for r in range(len(counts))}
    for k, live in enumerate(rounds(counts)):
        lead = own[live[0]]
        for r in live:  # every rank with data begins with the buffers of the first of them
            for b, value in zip(model.buffers(), lead, strict=True):
                b.data.copy_(value)
            (model(rows_of(k, r)).square().mean() / len(counts)).backward()
            own[r] = [b.clone() for b in model.buffers()]
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for p in model.parameters():
            p.grad.mul_(0.5)
        opt.step()
        opt.zero_grad()
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_loops_torchs_clipping_and_buffers(preset):
    counts = (1, 3)
    results = run(2, plain, preset, counts)
    assert [held for _, held in results] == [[2], [2, 1, 1]]
    for state, _ in results:
        assert_same(state, results[0][0])
        assert_close(state, plain_alone(counts))


def gan(preset, counts):
    accelerator = Accelerator(strategy=preset, cpu=True)
    torch.manual_seed(0)
    g, d = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    g, d, go, do = accelerator.prepare(
        g, d, torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)
    )
    with accelerator.join_uneven_inputs([g, d]):
        for k in range(counts[rank()]):
            x = rows_of(k, rank())
            accelerator.backward(F.softplus(-d(x)).mean() + F.softplus(d(g(x).detach())).mean())
            do.step()
            do.zero_grad()
            accelerator.backward(F.softplus(-d(g(x))).mean())
            go.step()
            go.zero_grad()
            do.zero_grad()
            with torch.no_grad():
                d(g(x))
    return whole(g), whole(d)


def gan_alone(counts):
    torch.manual_seed(0)
    g, d = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    go, do = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1, momentum=0.9)
    for k, live in enumerate(rounds(counts)):
        xs = [rows_of(k, r) for r in live]
        torch.stack([F.softplus(-d(x)).mean() + F.softplus(d(g(x).detach())).mean() for x in xs]).mean().backward()
        do.step()
        do.zero_grad()
        torch.stack([F.softplus(-d(g(x))).mean() for x in xs]).mean().backward()
        go.step()
        go.zero_grad()
        do.zero_grad()
    return whole(g), whole(d)


@pytest.mark.parametrize("preset", PRESETS)
def test_two_models(preset):
    counts = (3, 1)
    results, oracle = run(2, gan, preset, counts), gan_alone(counts)
    for mine in results:
        for a, first, right in zip(mine, results[0], oracle, strict=True):
            assert_same(a, first)
            assert_close(a, right)


def evaluating(preset):
    """Evaluation between steps, its own data uneven too; what the ranks gather is every sample once."""
    accelerator = Accelerator(strategy=preset, cpu=True)
    model = make()
    model, opt, train, test = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader_of((3, 1, 2)), loader_of((0, 2, 1))
    )
    before, found, after = [x.even_batches for x in (train, test)], [], []
    with accelerator.join_uneven_inputs([model], even_batches=False):
        assert not train.even_batches and not test.even_batches
        for (ids,) in train:
            loss_of(model, ids[0]).backward()
            opt.step()
            opt.zero_grad()
            model.eval()
            with torch.no_grad(), accelerator.join_uneven_inputs([model]):
                for (other,) in test:
                    loss_of(model, other[0])
                    found.append(accelerator.gather(other[0, :, 0]).numel())
            model.train()
            after.append(accelerator.gather(torch.tensor([rank()])).tolist())
        end = accelerator.gather(torch.tensor([rank()])).tolist()
        kept = {k: v.clone() for k, v in model.state_dict().items()}
    assert [x.even_batches for x in (train, test)] == before
    return found, after, end, kept


@pytest.mark.parametrize("preset", ["ddp", "zero3"])
def test_evaluation_inside(preset):
    results = run(3, evaluating, preset)
    # In the first round all three train; test data are on ranks 1, 1 and 2. Then rank 1 has no training data left.
    assert [r[1] for r in results] == [[[0, 1, 2], [0, 2], [0]], [[0, 1, 2]], [[0, 1, 2], [0, 2]]]
    assert [r[0] for r in results] == [[], [4, 2], [4, 2]]
    assert all(r[2] == [0, 1, 2] for r in results)
    for r in results:
        assert_same(r[3], results[0][3])


def leaving(preset):
    """break before a batch is used, a batch that is skipped, and training that goes on behind the block."""
    accelerator = Accelerator(strategy=preset, cpu=True)
    model = make()
    model, opt, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader_of((6, 6)))
    used = 0
    with accelerator.join_uneven_inputs([model]):
        for k, (ids,) in enumerate(loader):
            if rank() == 0 and k == 2:
                break
            if rank() == 1 and k == 1:
                continue
            accelerator.backward(loss_of(model, ids[0]))
            opt.step()
            opt.zero_grad()
            used += 1
    first = whole(model)
    for step in range(2):
        accelerator.backward(loss_of(model, tokens(step, rank())))
        opt.step()
        opt.zero_grad()
    return used, first, whole(model)


@pytest.mark.parametrize("preset", ["zero1", "zero3"])
def test_leaving_early_and_skipping(preset):
    results = run(2, leaving, preset)
    assert [used for used, _, _ in results] == [2, 5]
    for k in (1, 2):
        assert_same(results[0][k], results[1][k])


# --- what it costs, what it refuses -----------------------------------------------------------------
def costs(inside):
    accelerator = Accelerator(strategy="zero3", cpu=True)
    model = make()
    loader = DataLoader(TensorDataset(torch.stack([tokens(k, 0) for k in range(6)])), batch_size=1)
    model, opt, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    shardwise.reset_stats()
    with accelerator.join_uneven_inputs([model, opt]) if inside else nullcontext():
        for (ids,) in loader:
            accelerator.backward(loss_of(model, ids[0]))
            opt.step()
            opt.zero_grad()
    return {k: (c.calls, c.bytes_sent) for k, c in shardwise.stats().comm.items()}, whole(model)


def test_cost():
    (without, weights), (inside, same) = run(2, costs, False)[0], run(2, costs, True)[0]
    assert inside.pop("join") == (5, 5 * 16), "three batches, the loader's end, the block's end"
    assert without.pop("word") == (3, 3 * 8), "what the main process may ask for, per batch"
    assert inside == without
    assert_same(weights, same)


def alone():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(UnitError, match="was not prepared"), accelerator.join_uneven_inputs([nn.Linear(2, 2)]):
        pass
    with accelerator.join_uneven_inputs([model], even_batches=False):
        model(torch.ones(1, 2)).sum().backward()
    return True


def test_one_process():
    assert alone()


SCRIPT = """
import os, sys
import torch
import shardwise
from models import make
from test_join import loader_of, loss_of, tokens

what, preset = sys.argv[1:]
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
accelerator = shardwise.Accelerator(strategy=preset + ",timeout=1000", cpu=True)
model = make()
opt = torch.optim.SGD(model.parameters(), lr=0.1)
if what == "optimizer":
    model, loader = accelerator.prepare(model, loader_of((1, 3)))
else:
    model, opt, loader = accelerator.prepare(model, opt, loader_of((1, 3)))
with accelerator.join_uneven_inputs([model]):
    for k, (ids,) in enumerate(loader):
        accelerator.backward(loss_of(model, ids[0]))
        if k == 1 and what == "body":
            raise ValueError("boom in the body")
        if k == 1 and what == "collective":
            with shardwise.gathered(model, write=True):
                pass
        opt.step()
        opt.zero_grad()
"""


ERRORS = {
    "body": "ValueError: boom in the body",
    "collective": "needs rank 0, which has no data left",
    "optimizer": "does not know this SGD",
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """Two ranks per kind of error, started at once: most of the time they wait."""
    path = tmp_path_factory.mktemp("join") / "script.py"
    path.write_text(SCRIPT)
    running = {what: processes.ranks_of_a_script(path, 2, what, "zero3", whole_end=True) for what in ERRORS}
    for process in chain.from_iterable(running.values()):
        processes.keep(process)
    yield running
    for process in chain.from_iterable(running.values()):
        process.kill()


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_ends_all_ranks(failing, what):
    ended = [process.finish(150) for process in failing[what]]
    assert [code for code, _, _ in ended] == [1, 1]
    assert ERRORS[what] in ended[1][2] and "rank 1" in ended[0][2]


# --- prepared dataloaders whose end is uneven by themselves ---------------------------------------------
def splitting(kind, samples):
    accelerator = Accelerator(
        strategy="zero2", dataloader_config=DataLoaderConfiguration(dispatch_batches=kind == "dispatched"), cpu=True
    )
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    loader = DataLoader(TensorDataset(torch.arange(float(samples))), batch_size=2)
    model, opt, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    own, all_of_them = 0, []
    with accelerator.join_uneven_inputs([model], even_batches=False):
        for (x,) in loader:
            accelerator.backward(model(torch.stack([x] * 5, 1) / samples).square().mean())
            opt.step()
            opt.zero_grad()
            own += len(x)
            all_of_them += accelerator.gather_for_metrics(x).tolist()
    return own, all_of_them, whole(model)


@pytest.mark.parametrize("kind", ["sharded", "dispatched"])
def test_every_sample_is_used_once(kind):
    results = run(3, splitting, kind, 9)
    assert sum(own for own, _, _ in results) == 9
    assert max((seen for _, seen, _ in results), key=len) == list(range(9))
    for _, _, weights in results:
        assert_same(weights, results[0][2])
