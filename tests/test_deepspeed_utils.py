"""``shardwise.deepspeed.utils`` and what else scripts call around an engine: states of a parameter, logs, profiles."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise import device as devices
from shardwise.deepspeed import checkpointing, utils
from shardwise.deepspeed.accelerator import get_accelerator
from shardwise.deepspeed.profiling.flops_profiler import FlopsProfiler, get_model_profile
from shardwise.deepspeed.runtime.utils import memory_usage, see_memory_usage
from shardwise.deepspeed.utils import groups
from shardwise.errors import ArgumentError, ConfigError, GradientError, LeftOut, OptimizerError
from slowly import in_turn

STRATEGIES = [
    *PRESETS, "zero3,param_dtype=bf16", "zero1,param_dtype=bf16", "zero2,offload_optimizer=nvme",
    "zero3,offload_params=nvme,offload_optimizer=nvme,param_dtype=bf16", "zero3,layout=tensor",
]  # fmt: skip
STATES = ("exp_avg", "exp_avg_sq")


def alone(steps: int, size: int, change=None):
    """One plain process: model and optimizer after some steps, and a backward."""
    model = make()
    optimizer = adamw(model.parameters())
    for step in range(steps + 1):
        loss_of(model, torch.cat([batch(step, r) for r in range(size)])).backward()
        if step < steps:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def started(strategy, steps: int = 2):
    model = shardwise.fully_shard(make(), strategy=strategy)
    optimizer = adamw(model.parameters())
    for step in range(steps + 1):
        loss_of(model, batch(step, rank())).backward()
        if step < steps:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def near(strategy: str) -> dict[str, float]:
    return {"rtol": 0.1, "atol": 0.05} if "bf16" in strategy else {"rtol": 1e-4, "atol": 1e-5}


def reads(strategy):
    model, _ = started(strategy)
    plain, plain_optimizer = alone(2, world())
    saved = whole(model)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        value = utils.safe_get_full_fp32_param(p)
        assert value.dtype == torch.float32
        assert torch.equal(value, saved[name])
        torch.testing.assert_close(value, q.detach(), **near(strategy))
        grad = utils.safe_get_full_grad(p)
        assert (grad is None) == (q.grad is None)
        if grad is None:
            continue
        torch.testing.assert_close(grad, q.grad, **near(strategy))
        for key in STATES:
            found = utils.safe_get_full_optimizer_state(p, key)
            assert found.shape == p.shape
            torch.testing.assert_close(found, plain_optimizer.state[q][key], **near(strategy))
        if p.numel():
            assert float(utils.safe_get_full_optimizer_state(p, "step")) == 2
        assert utils.safe_get_full_optimizer_state(p, "no such state") is None
        parts = [utils.safe_get_local_fp32_param(p), utils.safe_get_local_grad(p)]
        parts += [utils.safe_get_local_optimizer_state(p, key) for key in STATES]
        assert len({part.numel() for part in parts}) == 1
    return {n: utils.safe_get_local_fp32_param(p) for n, p in model.named_parameters()}, saved


@in_turn(strategy=STRATEGIES, size=[1, 2])
def test_what_is_read_is_what_one_process_has(size, strategy):
    results = run(size, reads, strategy)
    for name, value in results[0][1].items():
        parts = [local[name] for local, _ in results]
        if parts[0].numel() == value.numel():  # whole on every rank
            parts = parts[:1]
        assert torch.equal(torch.cat(parts), value.flatten())


def writes(strategy):
    """Everything is replaced by what another run has; then both go on alike."""
    model, optimizer = started(strategy)
    other, other_optimizer = started(strategy, steps=3)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        grad, wanted = utils.safe_get_full_grad(q), utils.safe_get_full_fp32_param(q)
        local = len(name) % 2 == 0
        if local:
            utils.safe_set_local_fp32_param(p, utils.safe_get_local_fp32_param(q))
        else:
            utils.safe_set_full_fp32_param(p, wanted)
        assert torch.equal(utils.safe_get_full_fp32_param(p), wanted)
        if grad is None:
            continue
        if local:
            utils.safe_set_local_grad(p, utils.safe_get_local_grad(q))
        else:
            utils.safe_set_full_grad(p, grad)
        assert torch.equal(utils.safe_get_full_grad(p), grad)
        for key in (*STATES, "step"):
            if not p.numel():
                continue
            state = utils.safe_get_full_optimizer_state(q, key)
            part = utils.safe_get_local_optimizer_state(q, key)
            if local and key != "step":
                if part is not None:
                    utils.safe_set_local_optimizer_state(p, part, key)
            else:
                utils.safe_set_full_optimizer_state(p, state, key)
            assert torch.equal(utils.safe_get_full_optimizer_state(p, key), state)
    with shardwise.gathered(model), shardwise.gathered(other):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), "what is computed with follows"
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.step()
        o.zero_grad()
        loss_of(m, batch(9, rank())).backward()
        o.step()
    assert_same(whole(model), whole(other))


@in_turn(strategy=STRATEGIES, size=[1, 2])
def test_what_is_written_is_what_the_next_step_takes(size, strategy):
    run(size, writes, strategy)


def doubles(strategy):
    model, _ = started(strategy)
    before = [utils.safe_get_full_grad(p) for p in model.parameters()]
    utils.safe_update_full_grad_vectorized(list(model.parameters()), lambda grad, p: grad * 2 + p.numel())
    for p, old in zip(model.parameters(), before, strict=True):
        if old is not None:
            assert torch.equal(utils.safe_get_full_grad(p), old * 2 + p.numel())


@pytest.mark.parametrize("strategy", PRESETS)
def test_gradients_are_updated_together(strategy):
    run(2, doubles, strategy)


def refused(strategy):
    model = shardwise.fully_shard(make(), strategy=strategy)
    optimizer = adamw(model.parameters())
    p = model.head.weight
    assert utils.safe_get_full_grad(p) is None
    assert utils.safe_get_full_optimizer_state(p, "exp_avg") is None
    if utils.safe_get_local_fp32_param(p).numel():  # something of it is here
        with pytest.raises(OptimizerError, match="exp_avg"):
            utils.safe_set_full_optimizer_state(p, torch.zeros(p.shape), "exp_avg")
    for value in (torch.zeros(3), 3.0):
        with pytest.raises(ArgumentError, match=r"head\.weight"):
            utils.safe_set_full_fp32_param(p, value)
    with pytest.raises(ArgumentError, match="this rank holds"):
        utils.safe_set_local_fp32_param(p, torch.zeros(100_000))
    utils.safe_set_full_grad(p, torch.ones(p.shape))  # where there is none
    assert torch.equal(utils.safe_get_full_grad(p), torch.ones(p.shape))
    optimizer.zero_grad()
    with pytest.raises(GradientError, match="backward"):
        utils.safe_set_local_grad(p, utils.safe_get_local_fp32_param(p))
    if world() > 1:
        with shardwise.no_sync(model):
            loss_of(model, batch(0, rank())).backward()
        mine = make()
        loss_of(mine, batch(0, rank())).backward()  # not reduced yet: what this rank has
        torch.testing.assert_close(utils.safe_get_full_grad(p), mine.head.weight.grad)
    model.norm.bias.requires_grad_(False)
    assert utils.safe_get_full_fp32_param(model.norm.bias) is utils.safe_get_local_fp32_param(model.norm.bias) is None
    plain = nn.Linear(2, 2)
    assert utils.safe_get_full_fp32_param(plain.weight) is None
    with pytest.raises(ArgumentError, match="no sharded model"):
        utils.safe_set_full_fp32_param(plain.weight, torch.zeros(2, 2))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_what_cannot_be_says_so(strategy):
    run(2, refused, strategy)


def partly_frozen(strategy):
    model = make()
    model.norm.requires_grad_(False)
    shardwise.fully_shard(model, strategy=strategy)
    optimizer = adamw(model.parameters())
    loss_of(model, batch(0, rank())).backward()
    optimizer.step()
    for p in model.parameters():
        found = utils.safe_get_local_optimizer_state(p, "exp_avg")
        held = utils.safe_get_local_fp32_param(p)
        assert (found is None) == (not p.requires_grad)
        assert found is None or found.shape == held.shape


def test_state_of_what_trains_only():
    run(2, partly_frozen, "zero3")


# --- logs, marks, memory, devices -----------------------------------------------------------------
class Kept(logging.Handler):
    """Keeps what the logger says while the block is open."""

    def __enter__(self):
        self.said = []
        utils.logger.addHandler(self)
        self.level_before = utils.logger.level
        utils.logger.setLevel(logging.INFO)
        return self.said

    def emit(self, record):
        self.said.append(record.getMessage())

    def __exit__(self, *error):
        utils.logger.removeHandler(self)
        utils.logger.setLevel(self.level_before)


def test_messages_are_written_by_the_ranks_that_are_named():
    with Kept() as said:
        utils.log_dist("for all", ranks=[-1])
        utils.log_dist("for the first", ranks=[0])
        utils.log_dist("for another", ranks=[1])
        utils.log_dist_once("once", ranks=[0])
        utils.log_dist_once("once", ranks=[0])
    assert said == ["[Rank 0] for all", "[Rank 0] for the first", "[Rank 0] once"]
    before = utils.logger.level
    utils.set_log_level_from_string("error")
    assert utils.logger.level == logging.ERROR
    utils.logger.setLevel(before)
    with pytest.raises(ConfigError, match="loud"):
        utils.set_log_level_from_string("loud")


def test_a_marked_function_is_in_the_profile():
    @utils.instrument_w_nvtx
    def work(x, *, y):
        """Adds."""
        return x + y

    assert (work.__name__, work.__doc__) == ("work", "Adds.")
    with torch.profiler.profile() as profile:
        assert work(torch.ones(1), y=1).item() == 2
    assert any("work" in event.key for event in profile.key_averages())


def test_memory_is_logged_where_it_is_asked_for():
    with Kept() as said:
        see_memory_usage("quiet")
        see_memory_usage("after the first step", force=True)
    assert len(said) == 1 and said[0].startswith("after the first step | device ")
    assert 0 < memory_usage()["host"] <= memory_usage()["host_peak"] * 1.01


def test_the_accelerator_is_what_shardwise_computes_on():
    accelerator = get_accelerator()
    assert accelerator is get_accelerator()
    kind = devices.accelerator() or "cpu"
    assert accelerator.device_name() == kind
    assert accelerator.device_count() == max(devices.count(), 1)
    assert torch.device(accelerator.current_device_name()).type == kind
    assert torch.ones(1, device=accelerator.current_device()).device.type == kind
    assert accelerator.on_accelerator(torch.ones(1, device=kind))
    assert accelerator.is_bf16_supported() == devices.computes_in_bf16()
    accelerator.synchronize()
    accelerator.empty_cache()
    state = accelerator.get_rng_state()
    first = torch.rand(3, device=kind)
    accelerator.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=kind), first)
    assert accelerator.communication_backend_name() in ("gloo", "nccl")


def test_groups_are_all_ranks():
    assert (groups.get_data_parallel_world_size(), groups.get_data_parallel_rank()) == (1, 0)
    assert groups.get_model_parallel_world_size() == groups._get_sequence_parallel_world_size() == 1
    groups.initialize(ep_size=1)
    with pytest.raises(LeftOut, match="ep_size=2"):
        groups.initialize(ep_size=2)


def test_a_loader_begins_again():
    loader = utils.RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert len(loader) == 2


def test_on_device_makes_modules_there():
    with utils.OnDevice(dtype=torch.bfloat16, device="meta"):
        model = nn.BatchNorm1d(4)
        made = torch.zeros(3)
    assert {t.device.type for t in (*model.parameters(), *model.buffers(), made)} == {"meta"}
    assert model.weight.dtype == made.dtype == torch.bfloat16
    assert model.num_batches_tracked.dtype == torch.int64
    with utils.OnDevice(dtype=torch.bfloat16, enabled=False):
        assert nn.Linear(1, 1).weight.dtype == torch.zeros(1).dtype == torch.float32
    with pytest.raises(ValueError, match="inside"), utils.OnDevice(torch.float16, "cpu"):
        raise ValueError("inside")
    assert torch.get_default_dtype() == torch.float32


def test_a_model_on_the_meta_device_is_given_values_when_it_is_sharded():
    with utils.OnDevice(dtype=None, device="meta"):
        model = make()
    model.nothing = None
    for block in model.blocks:
        block.gain = nn.Parameter(torch.ones(()))
    torch.manual_seed(0)
    assert torch.isfinite(loss_of(shardwise.fully_shard(model), batch(0, 0)))


# --- activations ---------------------------------------------------------------------------------------
class Tower(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3))
        self.run, self.calls = run, 0

    def forward(self, x):
        for layer in self.layers:
            x = self.run(self._call, layer, x)
        return x

    def _call(self, layer, x):
        self.calls += 1
        return layer(x)


def plainly(function, *args):
    return function(*args)


def checkpoints(strategy, on_host):
    checkpointing.configure(checkpoint_in_cpu=on_host)
    assert checkpointing.is_configured()
    found = {}
    for name, how in (("plain", plainly), ("again", checkpointing.checkpoint)):
        torch.manual_seed(0)
        model = shardwise.fully_shard(Tower(how), strategy=strategy)
        torch.manual_seed(rank())
        x = torch.randn(4, 64, requires_grad=True)
        model(x).square().sum().backward()
        assert model.calls == (6 if name == "again" else 3)
        with shardwise.gathered(model, grads=True):
            found[name] = {n: p.grad.clone() for n, p in model.named_parameters()} | {"x": x.grad}
    checkpointing.reset()
    assert_same(found["plain"], found["again"])


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_checkpointed_part_is_computed_again_with_the_same_bits(strategy, on_host):
    run(2, checkpoints, strategy, on_host)


def keeps_on_host():
    checkpointing.configure(checkpoint_in_cpu=True)
    device = shardwise.init("sim:0").device
    torch.manual_seed(0)
    model = Tower(checkpointing.checkpoint).to(device)
    x = torch.randn(64, 64, device=device, requires_grad=True)
    loss = model(x).square().sum()
    (host,) = checkpointing._hosts.values()
    kept = host.ledger.live["host_activations"]
    loss.backward()
    checkpointing.reset()
    return kept


def test_what_a_part_is_called_with_is_kept_on_the_host():
    """The first part's argument is an input of the script's, and is still there; the others' are not."""
    assert run(1, keeps_on_host, device="sim")[0] >= 2 * 64 * 64 * 4


def test_the_configuration_chooses_where_activations_are():
    checkpointing.configure(deepspeed_config={"activation_checkpointing": {"cpu_checkpointing": True}})
    assert checkpointing._settings.on_host
    checkpointing.configure(deepspeed_config={})
    assert not checkpointing._settings.on_host


def test_random_states_by_name():
    tracker = checkpointing.get_cuda_rng_tracker()
    checkpointing.model_parallel_cuda_manual_seed(5)
    kind = devices.accelerator() or "cpu"
    outside = torch.rand(2, device=kind)
    with tracker.fork():
        inside = torch.rand(2, device=kind)
    after = torch.rand(2, device=kind)
    checkpointing.model_parallel_cuda_manual_seed(5)
    assert torch.equal(outside, torch.rand(2, device=kind))
    assert torch.equal(after, torch.rand(2, device=kind))
    with tracker.fork():
        assert torch.equal(inside, torch.rand(2, device=kind))
    with pytest.raises(ConfigError, match="is there already"):
        tracker.add("model-parallel-rng", 1)
    with pytest.raises(ConfigError, match="no state 'other'"), tracker.fork("other"):
        pass
    tracker.reset()


# --- profiles ------------------------------------------------------------------------------------------
def profiles(strategy):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 4)))
    model = shardwise.fully_shard(net, strategy=strategy, units=nn.Linear)
    flops, macs, params = get_model_profile(model, input_shape=(3, 8), print_profile=False, as_string=False)
    assert (flops, macs, params) == (2 * 3 * (8 * 16 + 16 * 4), 3 * (8 * 16 + 16 * 4), 8 * 16 + 16 + 16 * 4 + 4)
    assert model.training
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    loss = model(torch.ones(3, 8)).sum()
    profiler.stop_profile()
    loss.backward()
    assert profiler.get_total_flops() == flops
    assert profiler.get_total_duration() > 0
    assert profiler.get_total_flops(as_string=True) == "1.15 K FLOPS"
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    profiler.end_profile()
    assert profiler.get_total_flops() == 0


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_operations_of_a_forward(strategy):
    run(2, profiles, strategy)


def test_a_profile_is_written(tmp_path):
    path = tmp_path / "new" / "profile.txt"
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    words = get_model_profile(model, args=[torch.ones(1, 8)], output_file=str(path))
    assert words == ("384.00 FLOPS", "192.00 MACs", "212.00")
    lines = path.read_text().splitlines()
    assert lines[1].startswith("Sequential: 212.00 params, 192.00 MACs, 100.0%")
    assert lines[2].startswith("  0: 144.00 params, 128.00 MACs, 66.7%")
    with pytest.raises(ArgumentError, match="no inputs"):
        get_model_profile(model)
