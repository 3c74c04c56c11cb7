"""One table of scenarios: each is run sharded on this rank's rows, and plain on the rows of all ranks. Nothing differs.

A scenario is a model, an optimizer and what a script does in one step. :func:`compare` runs both sides of it. Whatever
a step shows with :meth:`Side.see` is compared at once (outputs, norms, which gradients there are), the weights at the
end. ``runs`` says under which strategies and for how many ranks ``test_scenarios.py`` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import scenario_models as zoo
import shardwise
from models import PRESETS, adamw, assert_close, batch, loss_of, make, rank, whole, world

Run = tuple[str, int]
"""A strategy, and how many ranks."""


class Side:
    """One of the two runs of a scenario.

    Args:
        strategy: of the sharded one; ``None``: the plain one.
        ranks: whose rows it sees.
        before: optimizers are built before the models are sharded.
        device: where it trains.

    Attributes:
        models, optimizers: the first one of each is ``model`` and ``optimizer``.
        schedules: stepped after each step of the optimizers.
    """

    def __init__(
        self, scenario: Scenario, strategy: str | None, ranks: Sequence[int], before: bool, device: str
    ) -> None:
        self.scenario, self.strategy, self.ranks, self.device = scenario, strategy, list(ranks), device
        torch.manual_seed(5)
        built = scenario.build()
        self.models: list[nn.Module] = [m.to(device) for m in (built if isinstance(built, tuple) else [built])]
        if before:
            self._optimizers()
        if strategy is not None:
            for k, model in enumerate(self.models):
                scenario.shard(model, strategy, k)
        if not before:
            self._optimizers()
        self.seen: list[Any] = []

    def _optimizers(self) -> None:
        found = [self.scenario.optimizer(model) for model in self.models]
        self.optimizers = [o for some in found for o in (some if isinstance(some, list) else [some])]
        schedule = self.scenario.schedule
        self.schedules = [lr_scheduler.LambdaLR(o, schedule) for o in self.optimizers] if schedule else []

    @property
    def sharded(self) -> bool:
        return self.strategy is not None

    @property
    def model(self) -> Any:
        return self.models[0]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    def rows(self, step: int) -> torch.Tensor:
        """The rows of its ranks."""
        return torch.cat([self.rows_of(step, r) for r in self.ranks])

    def rows_of(self, step: int, r: int) -> torch.Tensor:
        """The rows of one rank."""
        return self.scenario.data(step, r).to(self.device)

    def loss(self, step: int) -> torch.Tensor:
        return self.scenario.loss(self.model, self.rows(step), step)

    def see(self, *what: Any) -> None:
        """What the other side has to see, too."""
        self.seen += [w.detach().clone() if isinstance(w, torch.Tensor) else w for w in what]

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.see({n for m in self.models for n, p in m.named_parameters() if p.grad is not None})

    def update(self, *, set_to_none: bool = True, clip: float | None = None) -> None:
        """Clip, step, and clear gradients. ``param_groups`` show the model's own parameters, before and after."""
        if clip is not None:
            kind = shardwise.clip_grad_norm_ if self.sharded else nn.utils.clip_grad_norm_
            self.see(kind(self.model.parameters(), clip))
        for optimizer in self.optimizers:
            before = [id(p) for g in optimizer.param_groups for p in g["params"]]
            optimizer.step()
            assert before == [id(p) for g in optimizer.param_groups for p in g["params"]]
        for one in (*self.schedules, *self.optimizers):
            one.step() if one in self.schedules else one.zero_grad(set_to_none=set_to_none)

    def see_grads(self) -> None:
        """Whole gradients."""
        with self.gathered(self.model, grads=True):
            self.see(*(p.grad for p in self.model.parameters()))

    def gathered(self, model: nn.Module, **kw: bool) -> AbstractContextManager[None]:
        return shardwise.gathered(model, **kw) if self.sharded else nullcontext()

    def no_sync(self) -> AbstractContextManager[None]:
        return shardwise.no_sync(self.model) if self.sharded else nullcontext()


# --- what a scenario is made of -------------------------------------------------------------------------
def rows_of_floats(step: int, r: int) -> torch.Tensor:
    return torch.randn(3, zoo.D, generator=torch.Generator().manual_seed(77 * step + r))


def square(model: nn.Module, rows: torch.Tensor, step: int) -> torch.Tensor:
    return model(rows).square().mean()


def fully_shard(model: nn.Module, strategy: str, index: int) -> None:
    shardwise.fully_shard(model, strategy=strategy)


def momentum(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(side: Side, step: int) -> None:
    side.backward(side.loss(step))
    side.update()


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Args:
        build: the model, or several.
        runs: where it holds.
        step: what a script does in one step.
        loss: of a model on rows, for :func:`train`.
        optimizer: of one model, or several.
        data: the rows of one rank in one step.
        shard: shards the ``k``-th model.
        schedule: factor of the learning rate by step.
        steps: how many.
        tol: relative and absolute.
    """

    name: str
    build: Callable[[], Any]
    runs: Iterable[Run] = ()
    step: Callable[[Side, int], None] = train
    loss: Callable[[Any, torch.Tensor, int], torch.Tensor] = square
    optimizer: Callable[[nn.Module], Any] = momentum
    data: Callable[[int, int], torch.Tensor] = rows_of_floats
    shard: Callable[[nn.Module, str, int], Any] = fully_shard
    schedule: Callable[[int], float] | None = None
    steps: int = 4
    tol: float = 1e-5


def compare(
    scenario: Scenario, strategy: str, before: bool = False, device: str = "cpu"
) -> list[dict[str, torch.Tensor]]:
    """Run both sides of a scenario on every rank of the world.

    Args:
        before: the optimizers are built before the models are sharded.
        device: of both sides.

    Returns:
        The weights of the sharded models.
    """
    sides = [Side(scenario, s, of, before, device) for s, of in ((strategy, [rank()]), (None, range(world())))]
    for step in range(scenario.steps):
        for side in sides:
            side.seen.clear()
            scenario.step(side, step)
        mine, plain = (side.seen for side in sides)
        assert len(mine) == len(plain)
        for a, b in zip(mine, plain, strict=True):
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=scenario.tol, atol=scenario.tol)
            else:
                assert a == b, step
    weights = [whole(model) for model in sides[0].models]
    for found, model in zip(weights, sides[1].models, strict=True):
        assert_close(found, whole(model), scenario.tol)
    return weights


def compare_by_name(name: str, strategy: str, device: str = "cpu") -> None:
    """For ranks: a row of the table has functions in it that cannot be sent there."""
    compare(SCENARIOS[name], strategy, device=device)


def every(presets: Iterable[str], *sizes: int) -> list[Run]:
    return [(preset, size) for preset in presets for size in sizes]


GROUPS: Run = ("hsdp,shard_size=2", 4)


# --- models ------------------------------------------------------------------------------------------------
def of_nested(model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
    out = model(rows)
    return out.first.square().mean() + out.rest["extra"][0].value.square().mean()


def of_even_steps(model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
    model.step = step
    return model(rows).square().mean()


def with_auxiliary(model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
    return model(rows).square().mean() + 0.1 * sum(layer.aux for layer in model.layers)


def with_penalty(model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
    """A penalty on the gradient of the input: a graph of a graph."""
    rows = rows.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(rows).sum(), rows, create_graph=True)
    return model(rows).square().mean() + g.square().mean()


def compiled(wrap: bool) -> nn.Module:
    model = zoo.Mlp()
    for i, layer in enumerate(model.layers):
        if wrap:
            model.layers[i] = torch.compile(layer, backend="aot_eager")
        else:
            layer.compile(backend="aot_eager")
    return model


SMALL = every(PRESETS, 2, 3)
MODELS = [
    Scenario("Mlp", zoo.Mlp, [*SMALL, GROUPS]),
    Scenario("TiedAcrossUnits", zoo.TiedAcrossUnits, [*SMALL, GROUPS]),
    Scenario("Lora", zoo.Lora, SMALL, tol=1e-3),  # its bf16 base rounds otherwise in a larger batch
    Scenario("Lora in groups", zoo.Lora, [GROUPS]),
    Scenario("MixedDtypes", zoo.MixedDtypes, SMALL),
    Scenario("OddSizes", zoo.OddSizes, SMALL),
    Scenario("Twice", zoo.Twice, SMALL),
    Scenario("Nested", zoo.Nested, SMALL, loss=of_nested),
    Scenario("SkipsUnits", zoo.SkipsUnits, [*SMALL, GROUPS], loss=of_even_steps),
    Scenario("DirectUse", zoo.DirectUse, SMALL),
    Scenario("Checkpointed", zoo.Checkpointed, SMALL),
    Scenario("Reentrant", zoo.Reentrant, SMALL),
    Scenario("ReentrantTwice", zoo.ReentrantTwice, SMALL),
    Scenario("InsideCheckpoint", zoo.InsideCheckpoint, SMALL),
    Scenario("Buffered", zoo.Buffered, SMALL),
    Scenario("Moe", zoo.Moe, SMALL, loss=with_auxiliary),
    Scenario("Unrepeated", zoo.Unrepeated, every(["zero2", "zero3"], 2), optimizer=partial(momentum, lr=0.01), steps=2),
    Scenario("second order", zoo.Mlp, every(PRESETS, 2), loss=with_penalty, steps=3),
    Scenario("compiled in place", partial(compiled, False), every(["ddp", "zero3"], 2), steps=3),
    Scenario("compiled and wrapped", partial(compiled, True), every(["ddp", "zero3"], 2), steps=3),
]


# --- what scripts do ------------------------------------------------------------------------------------------
def freeze_and_unfreeze(side: Side, step: int) -> None:
    side.model.layers[1].requires_grad_(step not in (1, 2))
    side.model.layers[0].weight.requires_grad_(step != 3)
    train(side, step)


def branch(side: Side, step: int) -> None:
    """Each rank takes the branch of its own, but for one step."""
    for r in side.ranks:
        side.model.which = r if step != 3 else 0
        (square(side.model, side.rows_of(step, r), step) / len(side.ranks)).backward()
    side.see(side.model.layers[2].weight.grad is None)
    side.update()


def interleave(side: Side, step: int) -> None:
    """Evaluation and generation forwards between a training forward and its backward."""
    everyone = torch.cat([side.rows_of(step, r) for r in range(world())])
    loss = side.loss(step)
    with torch.no_grad():
        side.see(side.model(everyone))
    second = side.loss(step + 50)
    side.model.eval()
    with torch.inference_mode():
        side.see(side.model(everyone).clone())
    side.model.train()
    side.backward(loss + second)
    side.update()


def adversaries(side: Side, step: int) -> None:
    (generator, critic), rows = side.models, side.rows(step)
    of_generator, of_critic = side.optimizers
    (critic(generator(rows).detach()).mean() - critic(rows).mean()).backward()
    of_critic.step()
    of_critic.zero_grad()
    of_generator.zero_grad()
    (-critic(generator(rows)).mean()).backward()
    of_generator.step()
    of_generator.zero_grad()
    of_critic.zero_grad()


def one_of_two(model: nn.Module, strategy: str, index: int) -> None:
    """The second model of a pair is whole where the first is split."""
    fully_shard(model, "ddp" if index and strategy == "zero3" else strategy, index)


def fail(grad: torch.Tensor) -> None:
    raise MemoryError("pretend")


def survive(side: Side, step: int) -> None:
    """All ranks fail in one backward, catch it and go on, as an out-of-memory retry does."""
    if step == 2 and side.sharded:
        middle = side.model.layers[1].register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
        with pytest.raises(MemoryError):
            side.loss(9).backward()
        middle.remove()
    train(side, step)


def survive_between(side: Side, step: int) -> None:
    """A backward of an accumulation window fails, and the script begins the window again."""
    if side.sharded:
        with nullcontext() if step % 2 else side.no_sync():
            side.loss(90).backward()
            middle = side.model.layers[1].register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
            with pytest.raises(MemoryError):
                side.loss(91).backward()
            middle.remove()
        side.optimizer.zero_grad()
    train(side, step)


def accumulate(no_sync: bool, side: Side, step: int) -> None:
    for micro in range(3):
        with side.no_sync() if no_sync and micro < 2 else nullcontext():
            side.loss(10 * step + micro).backward()
    side.see_grads()
    side.update(clip=0.3, set_to_none=step == 0)


def average(side: Side, step: int) -> None:
    """A moving average kept beside the model, both sharded, updated on gathered values."""
    train(side, step)
    model, mean = side.models
    with torch.no_grad(), side.gathered(model), side.gathered(mean, write=True):
        for a, b in zip(mean.parameters(), model.parameters(), strict=True):
            a.lerp_(b, 0.5)


def of_first(make_optimizer: Callable[[Any], Any], model: nn.Module) -> Any:
    return make_optimizer(model.parameters())


def of_bytes(model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
    return loss_of(model, rows)


def units_by(how: str, model: Any, strategy: str, index: int) -> None:
    units = {
        "class": type(model.blocks[0]),
        "name": "Block",
        "predicate": lambda name, m: name.endswith((".up", ".down")),
    }
    if how == "submodules":
        for block in model.blocks:
            shardwise.fully_shard(block, strategy=strategy)
    shardwise.fully_shard(model, strategy=strategy, units=units.get(how))


LM = partial(Scenario, build=make, data=batch, loss=of_bytes, tol=1e-4)
"""A scenario of the byte-level model that most tests train."""
ADAMW = partial(of_first, adamw)
SCRIPTS = [
    Scenario("freezing and unfreezing", zoo.Mlp, every(PRESETS, 2), freeze_and_unfreeze, optimizer=sgd, steps=6),
    Scenario("a branch of each rank's own", zoo.Branches, every(["ddp", "zero1", "zero2"], 2, 3), branch, steps=5),
    Scenario("forwards in between", zoo.Mlp, every(PRESETS, 2), interleave, optimizer=sgd),
    Scenario(
        "two models", lambda: (zoo.Mlp(2), zoo.Mlp(2)), every(PRESETS, 2), adversaries, tol=1e-4, shard=one_of_two,
        optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    ),
    Scenario("a failed backward", zoo.Mlp, every(PRESETS, 2), survive, optimizer=sgd),
    Scenario("a failed window", zoo.Mlp, [*every(PRESETS, 1, 2), GROUPS], survive_between, optimizer=sgd),
    LM("accumulation", step=partial(accumulate, False), runs=[*every(PRESETS, 2), GROUPS], optimizer=ADAMW, steps=2),
    LM("accumulation under no_sync", step=partial(accumulate, True), runs=[*every(PRESETS, 2), GROUPS],
       optimizer=ADAMW, steps=2),
    LM("a moving average", build=lambda: (make(), make()), step=average, runs=every(PRESETS, 2), optimizer=ADAMW,
       steps=2),
    *(LM(f"units by {how}", shard=partial(units_by, how), runs=every(["ddp", "zero3"], 2), optimizer=ADAMW, steps=3)
      for how in ("class", "name", "predicate", "submodules")),
]  # fmt: skip

SCENARIOS = {scenario.name: scenario for scenario in (*MODELS, *SCRIPTS)}
