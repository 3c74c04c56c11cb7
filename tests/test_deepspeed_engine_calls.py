"""What scripts do with an engine besides the plain loop."""

from __future__ import annotations

import argparse
import json
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import shardwise
import shardwise.deepspeed as deepspeed
from models import assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise.deepspeed.engine import DeepSpeedEngine
from shardwise.errors import ConfigError, GradientError, LeftOut, OptimizerError, ShardwiseError, UnitError
from test_deepspeed_engine import adamw, alone, engine_for, settings, trained


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


# --- windows -------------------------------------------------------------------------------------
def by_hand(stage):
    """Boundaries that the script sets, step() only at the end."""
    engine, *_ = engine_for(settings(stage, 3, 0.5))
    for step in range(4):
        engine.set_gradient_accumulation_boundary(False)
        for index in range(3):
            if index == 2:
                engine.set_gradient_accumulation_boundary(True)
            engine.backward(loss_of(engine, batch(3 * step + index, rank())))
        engine.step()
    return engine.global_steps, whole(engine.module)


def unmanaged(stage, plain):
    engine, *_ = engine_for(settings(stage, 3, 0.5, managed_gradient_accumulation=False))
    with pytest.raises(OptimizerError, match="managed"):
        engine.set_gradient_accumulation_boundary(True)
    for step in range(4):
        for index in range(3):
            loss = loss_of(engine, batch(3 * step + index, rank()))
            loss.backward() if plain else engine.backward(loss)
            assert not engine.is_gradient_accumulation_boundary()
        engine.step()
        assert engine.was_step_applied()
    assert plain or engine.global_samples == 4 * 3 * 2 * world()
    return engine.global_steps, whole(engine.module)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_windows_that_the_script_ends(stage):
    _, right = alone(2, 3, 0.5)
    for found in (run(2, by_hand, stage), run(2, unmanaged, stage, False), run(2, unmanaged, stage, True)):
        assert found[0][0] == 4
        assert_close(found[0][1], right)


def uneven_windows():
    """Three of four micro-batches: divided by four all the same."""
    engine, *_ = deepspeed.initialize(model=make(), optimizer=sgd, config=settings(2, 4))
    engine.set_gradient_accumulation_boundary(False)
    for index in range(2):
        engine.backward(loss_of(engine, batch(index, rank())))
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss_of(engine, batch(2, rank())))
    engine.step()
    return whole(engine.module)


def test_a_window_that_ends_early_is_divided_by_what_was_said():
    model = make()
    optimizer = sgd(model.parameters())
    for index in range(3):
        for r in range(2):
            (loss_of(model, batch(index, r)) / 2 / 4).backward()
    optimizer.step()
    assert_close(run(2, uneven_windows)[0], whole(model))


def several_losses(stage, plain):
    engine, *_ = engine_for(settings(stage, 2, 0.5))
    for index in range(8):
        for part in (0, 1):
            loss = loss_of(engine, batch(2 * index + part, rank())) / 2
            loss.backward() if plain and part else engine.backward(loss)
        engine.step()
    return whole(engine.module)


def zeroing(stage, plain):
    """A loop that clears gradients by habit before each backward, with the optimizer that it was given."""
    engine, optimizer, *_ = engine_for(settings(stage, 3, 0.5))
    for index in range(12):
        loss = loss_of(engine, batch(index, rank()))
        optimizer.zero_grad()
        loss.backward() if plain else engine.backward(loss)
        engine.step()
    return whole(engine.module)


def test_zero_grad_of_the_optimizer_leaves_what_is_being_accumulated():
    _, right = alone(2, 3, 0.5)
    for stage in (0, 3):
        for plain in (False, True):
            assert_close(run(2, zeroing, stage, plain)[0], right)


def together(stage, plain):
    """One loss of two engines."""
    engines = [deepspeed.initialize(model=make(s), optimizer=adamw, config=settings(stage, 2, 0.5))[0] for s in (0, 1)]
    for index in range(8):
        loss = sum(loss_of(engine, batch(index, rank())) for engine in engines)
        loss.backward() if plain else engines[index % 2].backward(loss)
        for engine in engines:
            engine.step()
    return [whole(engine.module) for engine in engines]


def test_one_loss_of_two_engines():
    for stage in (1, 3):
        for plain in (False, True):
            for seed, found in enumerate(run(2, together, stage, plain)[0]):
                assert_close(found, alone(2, 2, 0.5, seed=seed)[1])


def test_several_losses_of_a_micro_batch_add_up():
    _, right = alone(2, 4, 0.5)
    for stage in (0, 1, 3):
        for plain in (False, True):
            assert_close(run(2, several_losses, stage, plain)[0], right)


def shown(stage, plain):
    """What ``p.grad`` shows at a window's end, and after another backward through the same graph."""
    engine, *_ = engine_for(settings(stage, 4))
    found = []
    for index in range(4):
        loss = loss_of(engine, batch(index, rank()))
        loss.backward(retain_graph=True) if plain else engine.backward(loss, retain_graph=True)
        if index == 3:
            for more in (False, True):
                if more:
                    loss.backward()
                with shardwise.gathered(engine.module, grads=True):
                    found.append({n: p.grad.clone() for n, p in engine.module.named_parameters() if p.numel()})
        engine.step()
    return found, whole(engine.module)


def test_gradients_are_means_where_a_window_ends():
    model = make()
    for index in (0, 1, 2, 3, 3):
        for r in range(2):
            (loss_of(model, batch(index, r)) / 2 / 4).backward()
        if index == 3 and "first" not in locals():
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.numel()}
    second = {n: p.grad.clone() for n, p in model.named_parameters() if p.numel()}
    adamw(model.parameters()).step()
    for stage in (0, 3):
        for plain in (False, True):
            (once, twice), weights = run(2, shown, stage, plain)[0]
            assert_close(once, first)
            assert_close(twice, second)
            assert_close(weights, whole(model))


def no_sync(stage):
    engine, *_ = engine_for(settings(stage, 1, 0.5))
    for step in range(4):
        with engine.no_sync():
            engine.backward(loss_of(engine, batch(2 * step, rank())) / 2)
            with pytest.raises(GradientError, match="no_sync"):
                engine.step()
            with pytest.raises(GradientError, match="no_sync"), engine.no_sync():
                pass
        engine.backward(loss_of(engine, batch(2 * step + 1, rank())) / 2)
        engine.step()
    return whole(engine.module)


def leaves_some_out(stage):
    model = make()
    model.spare = torch.nn.Linear(3, 3)
    config = settings(stage)
    config["zero_optimization"]["ignore_unused_parameters"] = False
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    before = whole(model)
    engine.backward(loss_of(engine, batch(0, rank())))
    with pytest.raises(GradientError, match=r"spare\.weight.*ignore_unused_parameters(.|\n)*every window"):
        engine.step()
    assert_same(whole(model), before)
    engine.backward(loss_of(engine, batch(0, rank())) + model.spare(torch.ones(3)).sum())
    engine.step()
    assert engine.global_steps == 1


@pytest.mark.parametrize("stage", [0, 2])
def test_every_parameter_may_have_to_get_a_gradient(stage):
    run(2, leaves_some_out, stage)


@pytest.mark.parametrize("stage", [0, 3])
def test_no_sync(stage):
    assert_close(run(2, no_sync, stage)[0], alone(2, 2, 0.5)[1])


def undivided():
    engine, *_ = deepspeed.initialize(model=make(), optimizer=sgd, config=settings(1, 2))
    for index in range(2):
        loss = loss_of(engine, batch(index, rank()))
        assert torch.equal(engine.backward(loss, scale_wrt_gas=False), loss)
        engine.step()
    return whole(engine.module)


def summed(stage):
    config = settings(stage, 1, gradient_allreduce_op="sum")
    engine, *_ = deepspeed.initialize(model=make(), optimizer=sgd, config=config)
    engine.backward(loss_of(engine, batch(0, rank())))
    engine.step()
    return whole(engine.module)


def test_sums_instead_of_means():
    """Also under stage 3, where DeepSpeed refuses them."""
    for script, batches, share in ((undivided, 2, 2), (partial(summed, 2), 1, 1), (partial(summed, 3), 1, 1)):
        model = make()
        for index in range(batches):
            for r in range(2):
                (loss_of(model, batch(index, r)) / share).backward()
        sgd(model.parameters()).step()
        assert_close(run(2, script)[0], whole(model))


def sizes():
    engine, *_ = engine_for(settings(2, 2))
    assert engine.get_batch_info() == (4 * world(), 2, 2)
    engine.set_train_batch_size(8 * world())
    assert (engine.gradient_accumulation_steps(), engine.train_batch_size()) == (4, 8 * world())
    with pytest.raises(ConfigError, match="multiple"):
        engine.set_train_batch_size(8 * world() + 1)
    for index in range(4):
        engine.backward(loss_of(engine, batch(index, rank())))
        if index < 3:
            with pytest.raises(ConfigError, match="window"):
                engine.set_train_batch_size(4 * world())
        engine.step()
        assert engine.was_step_applied() == (index == 3)
    engine.set_train_micro_batch_size(3)
    assert engine.get_batch_info() == (12 * world(), 3, 4)
    return whole(engine.module)


def test_sizes_of_batches_may_change_between_steps():
    assert_close(run(2, sizes)[0], alone(2, 4, 0.0, 1)[1])


# --- several engines -----------------------------------------------------------------------------
class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, z):
        return self.net(z)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return torch.sigmoid(self.net(x)).squeeze(-1)


def samples(step, which, r):
    g = torch.Generator().manual_seed(100 * step + 10 * which + r)
    return torch.randn(4, 5 if which == 0 else 3, generator=g)


def gan(stage, **more):
    """The loop of DeepSpeedExamples' gan: two engines, losses of which go through both models."""
    torch.manual_seed(0)
    config = settings(stage, micro=4) | more
    net_d, *_ = deepspeed.initialize(model=Discriminator(), optimizer=sgd, config=config)
    net_g, *_ = deepspeed.initialize(model=Generator(), optimizer=sgd, config=dict(config))
    losses = []
    for step in range(4):
        net_d.zero_grad()
        real_loss = nn.functional.binary_cross_entropy(net_d(samples(step, 0, rank())).float(), torch.ones(4))
        net_d.backward(real_loss)
        fake = net_g(samples(step, 1, rank()))
        fake_loss = nn.functional.binary_cross_entropy(net_d(fake.detach()).float(), torch.zeros(4))
        net_d.backward(fake_loss)
        net_d.step()
        net_g.zero_grad()
        loss = nn.functional.binary_cross_entropy(net_d(fake).float(), torch.ones(4))
        net_g.backward(loss)
        net_g.step()
        losses.append(loss.item())
    return losses, whole(net_d.module), whole(net_g.module)


def gan_alone(size):
    torch.manual_seed(0)
    d, g = Discriminator(), Generator()
    opt_d, opt_g = sgd(d.parameters()), sgd(g.parameters())
    for step in range(4):
        opt_d.zero_grad()
        fakes = [g(samples(step, 1, r)) for r in range(size)]
        for r in range(size):
            loss = nn.functional.binary_cross_entropy(d(samples(step, 0, r)), torch.ones(4))
            loss = loss + nn.functional.binary_cross_entropy(d(fakes[r].detach()), torch.zeros(4))
            (loss / size).backward()
        opt_d.step()
        opt_g.zero_grad()
        for r in range(size):
            (nn.functional.binary_cross_entropy(d(fakes[r]), torch.ones(4)) / size).backward()
        opt_g.step()
    return whole(d), whole(g)


def test_two_engines_of_a_gan():
    right_d, right_g = gan_alone(2)
    first = None
    for stage in range(4):
        losses, d, g = run(2, gan, stage)[0]
        assert_close(d, right_d)
        assert_close(g, right_g)
        first = first or losses
        assert losses == first


def test_two_engines_in_fp16():
    _, d, g = run(2, gan_in_fp16)[0]
    right_d, right_g = gan_alone(2)
    assert_close(d, right_d, 5e-3)
    assert_close(g, right_g, 5e-3)


def gan_in_fp16():
    return gan(2, fp16={"enabled": True, "initial_scale_power": 8})


# --- loops of DeepSpeedExamples --------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 10)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 21

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        return torch.randn(3, 6, 6, generator=g), index % 10


def cifar(argv):
    """The loop of DeepSpeedExamples' cifar: arguments, training_data, a loader, the accuracy."""
    parser = deepspeed_arguments()
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=Pictures(), optimizer=adamw
    )
    criterion = nn.CrossEntropyLoss()
    losses = []
    for _ in range(2):
        for data in loader:
            inputs, labels = data[0].to(engine.device), data[1].to(engine.device)
            loss = criterion(engine(inputs), labels)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        right = (engine(Pictures()[3][0][None]).argmax(1) == 3).sum().item()
    return losses, len(loader), right, engine.global_steps


def deepspeed_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--deepspeed_config", type=str)
    return parser


def test_a_loop_like_cifars(tmp_path):
    for stage in (0, 3):
        path = tmp_path / f"{stage}.json"
        path.write_text(json.dumps(settings(stage, micro=4)))
        one, other = run(2, cifar, ["--deepspeed_config", str(path), "--local_rank", "0"])
        assert one[1] == 3  # 21 samples are 11 of each rank, in batches of 4
        assert one[3] == len(one[0]) == 6
        assert one[0] != other[0]
        assert one[2:] == other[2:]


# --- names ---------------------------------------------------------------------------------------
def names():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine, returned, loader, scheduler = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(2, 1, 1.0)
        )
    assert isinstance(engine, DeepSpeedEngine)
    assert isinstance(engine, nn.Module)
    assert engine.module is model
    assert (loader, scheduler) == (None, None)
    assert returned is engine.optimizer
    assert returned.optimizer is optimizer
    assert isinstance(returned, torch.optim.Optimizer)
    assert engine.embed is model.embed  # an attribute of the model
    assert not hasattr(engine, "no_such_name")
    assert not hasattr(engine, "train_batch")
    with pytest.raises(LeftOut, match="pipelin"):
        engine.train_batch()
    assert not isinstance(model, deepspeed.PipelineModule)
    with pytest.raises(LeftOut):
        deepspeed.PipelineModule([model], 2)
    with pytest.raises(LeftOut):
        deepspeed.init_inference  # noqa: B018
    with pytest.raises(ImportError, match=r"shardwise\.load"):
        from shardwise.deepspeed import init_inference  # noqa: F401
    with pytest.raises(AttributeError):
        deepspeed.no_such_name  # noqa: B018
    assert (engine.get_lr(), engine.get_mom(), engine.get_type()) == ([0.1], [0.9], [0.0])
    engine.set_lr(0.2)
    assert (optimizer.param_groups[0]["lr"], engine.optimizer_name()) == (0.2, "SGD")
    assert (engine.zero_optimization_stage(), engine.zero_optimization()) == (2, True)
    assert (engine.fp16_enabled(), engine.bfloat16_enabled(), engine.loss_scale()) == (False, False, 1.0)
    assert (engine.global_rank, engine.world_size, engine.device.type) == (rank(), world(), "cpu")
    assert engine.eval() is engine
    assert not model.training
    assert engine.train() is engine
    assert model.training
    assert engine.get_global_grad_norm() is None
    with pytest.raises(UnitError, match="engine already"):
        deepspeed.initialize(model=model, optimizer=optimizer, config=settings(2))
    engine.destroy()
    again, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(2))
    again.backward(loss_of(again, batch(0, rank())))
    again.step()
    return again.was_step_applied()


def test_names():
    assert run(2, names) == [True, True]


def test_an_engine_of_one_process():
    norms, weights = alone(1, 2, 0.5)
    _, found, got = run(1, trained_then_left, settings(2, 2, 0.5))[0]
    assert found[1::2] == pytest.approx(norms, rel=1e-6)
    assert_same(got, weights)


def trained_then_left(config):
    try:
        return trained(config)
    finally:
        deepspeed.comm.destroy_process_group()


# --- mistakes --------------------------------------------------------------------------------------
def mistakes():
    found = []

    def wrong(*args, **kw):
        with pytest.raises(ShardwiseError) as error:
            deepspeed.initialize(*args, **kw)
        found.append(str(error.value))

    model = make()
    wrong(model=None, config=settings(0))
    wrong(model=model)
    wrong(argparse.Namespace(deepspeed_config="a.json"), model, config=settings(0))
    wrong(model=model, config={"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2})
    wrong(model=model, config=settings(0) | {"zero_optimisation": {}})
    wrong(model=model, optimizer=lambda p: "no", config=settings(0))
    others = torch.optim.lr_scheduler.LambdaLR(sgd(model.parameters()), float)
    wrong(model=model, optimizer=sgd, lr_scheduler=others, config=settings(0))
    wrong(model=model, optimizer=torch.optim.SGD(make().parameters(), lr=0.1), config=settings(0))
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=settings(3))
    assert optimizer is None
    for call in (lambda: engine.backward(torch.ones(())), engine.step):
        with pytest.raises(OptimizerError, match="optimizer"):
            call()
    with torch.no_grad():
        engine(batch(0, rank())[:, :-1])
    trains, *_ = engine_for(settings(2))
    for loss in (torch.ones(2, requires_grad=True), torch.ones(()), 1.0):
        with pytest.raises(GradientError, match="loss"):
            trains.backward(loss)
    return found


def test_mistakes_are_named():
    for found in run(2, mistakes):
        words = [
            "module",
            "no configuration",
            "2 configurations",
            "train_batch_size=3",
            "zero_optimization",
            "optimizer= made",
            "lr_scheduler=",
            "holds no parameter",
        ]
        for word, text in zip(words, found, strict=True):
            assert word in text, text


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make()
        self.now = False

    def forward(self, ids):
        out = self.model(ids)
        if self.now:
            raise RuntimeError("in the middle")
        return out


def survives(stage):
    engine, *_ = deepspeed.initialize(model=Fails(), optimizer=adamw, config=settings(stage, 2, 0.5))
    for index in range(8):
        if index == 3:
            engine.module.now = True
            with pytest.raises(RuntimeError, match="in the middle"):
                loss_of(engine, batch(9, rank()))
            engine.module.now = False
        engine.backward(loss_of(engine, batch(index, rank())))
        engine.step()
    return {name.removeprefix("model."): value for name, value in whole(engine.module).items()}


def test_an_error_in_a_forward_leaves_the_window_as_it_is():
    for stage in (0, 3):
        assert_close(run(2, survives, stage)[0], alone(2, 2, 0.5)[1])


# --- what it says ----------------------------------------------------------------------------------
def telling(folder):
    config = settings(2, 2, 1.0, steps_per_print=2, wall_clock_breakdown=True, fp16={"enabled": True})
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine, *_ = engine_for(config)
    said = []
    engine._say = said.append
    engine.reports._say = said.append
    for index in range(8):
        engine.backward(loss_of(engine, batch(index, rank())))
        engine.step()
    engine.destroy()
    return said


def test_an_engine_says_what_the_configuration_asks_for(tmp_path):
    said, silent = run(2, telling, str(tmp_path))
    assert silent == []
    assert [line for line in said if line.startswith("step=2, skipped=0, lr=[0.01]")]
    assert sum("time of its parts: forward" in line for line in said) == 2
    lines = {path.name: path.read_text().split() for path in tmp_path.rglob("*.csv")}
    assert [line.split(",")[0] for line in lines["Train_Samples_lr.csv"][1:]] == ["8", "16", "24", "32"]
    assert lines["Train_Samples_loss_scale.csv"][1:] == [f"{n},65536.0" for n in (8, 16, 24, 32)]
    losses = [float(line.split(",")[1]) for line in lines["Train_Samples_train_loss.csv"][1:]]
    assert len(losses) == 4
    assert all(2 < loss < 5 for loss in losses)
