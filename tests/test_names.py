"""The names that scripts written for Accelerate use: all there, with the same arguments, in the same places."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys

import pytest
import torch

import shardwise
from models import make
from shardwise import Accelerator
from shardwise.errors import ShardwiseError, StrategyError


def words(text: str) -> list[str]:
    return text.split()


METHODS = words("""
prepare prepare_model prepare_optimizer prepare_data_loader prepare_scheduler backward accumulate no_sync
clip_grad_norm_ clip_grad_value_ unscale_gradients gather gather_for_metrics reduce pad_across_processes print
wait_for_everyone main_process_first local_main_process_first on_main_process on_local_main_process on_process
on_last_process on_local_process split_between_processes autocast profile join_uneven_inputs free_memory clear
unwrap_model get_state_dict save save_model save_state load_state register_for_checkpointing
register_save_state_pre_hook register_load_state_pre_hook skip_first_batches init_trackers log get_tracker end_training
set_trigger check_trigger verify_device_map""")
ATTRIBUTES = words("""device is_main_process is_local_main_process is_last_process num_processes process_index
local_process_index distributed_type mixed_precision sync_gradients state optimizer_step_was_skipped gradient_state
gradient_accumulation_steps project_dir logging_dir save_iteration split_batches even_batches dispatch_batches
use_distributed use_seedable_sampler use_stateful_dataloader non_blocking scaler trackers project_configuration
device_placement step""")
PLACES = {
    "": "Accelerator PartialState skip_first_batches notebook_launcher debug_launcher find_executable_batch_size "
    "synchronize_rng_states DataLoaderConfiguration ProfileKwargs AutocastKwargs DistributedDataParallelKwargs "
    "DistributedType GradScalerKwargs InitProcessGroupKwargs DeepSpeedPlugin FullyShardedDataParallelPlugin "
    "init_empty_weights init_on_device infer_auto_device_map cpu_offload_with_hook",
    "big_modeling": "init_empty_weights init_on_device infer_auto_device_map cpu_offload_with_hook "
    "attach_layerwise_casting_hooks",
    "hooks": "ModelHook SequentialHook AlignDevicesHook add_hook_to_module remove_hook_from_module CpuOffload "
    "remove_hook_from_submodules attach_align_device_hook attach_align_device_hook_on_blocks UserCpuOffloadHook "
    "attach_execution_device_hook LayerwiseCastingHook",
    "state": "PartialState AcceleratorState GradientState is_initialized",
    "logging": "get_logger MultiProcessAdapter",
    "launchers": "notebook_launcher debug_launcher",
    "local_sgd": "LocalSGD",
    "optimizer": "AcceleratedOptimizer",
    "scheduler": "AcceleratedScheduler",
    "accelerator": "Accelerator",
    "data_loader": "DataLoaderShard DataLoaderDispatcher BatchSamplerShard IterableDatasetShard prepare_data_loader "
    "skip_first_batches SeedableRandomSampler",
    "tracking": "GeneralTracker TensorBoardTracker WandBTracker MLflowTracker CometMLTracker ClearMLTracker AimTracker "
    "SwanLabTracker TrackioTracker JSONLTracker",
    "utils": "set_seed synchronize_rng_states synchronize_rng_state gather gather_object reduce broadcast "
    "broadcast_object_list pad_across_processes pad_input_tensors send_to_device recursively_apply find_batch_size "
    "find_executable_batch_size release_memory extract_model_from_parallel DataLoaderConfiguration "
    "ProjectConfiguration GradientAccumulationPlugin DistributedDataParallelKwargs GradScalerKwargs "
    "InitProcessGroupKwargs AutocastKwargs ProfileKwargs DistributedType LoggerType is_wandb_available tqdm "
    "infer_auto_device_map get_balanced_memory get_max_memory compute_module_sizes set_module_tensor_to_device "
    "offload_state_dict OffloadedWeightsLoader load_state_dict find_tied_parameters",
    "utils.modeling": "compute_module_total_buffer_size clean_device_map get_max_layer_size align_module_device "
    "has_offloaded_params get_non_persistent_buffers check_tied_parameters_on_same_device load_offloaded_weights",
    "utils.offload": "offload_weight load_offloaded_weight save_offload_index PrefixedDataset "
    "extract_submodules_state_dict",
}


@pytest.mark.parametrize("place", PLACES)
def test_names_are_where_scripts_import_them_from(place):
    module = importlib.import_module(f"shardwise.{place}" if place else "shardwise")
    for name in PLACES[place].split():
        assert getattr(module, name) is not None, name


def test_the_accelerator_has_them_all():
    accelerator = Accelerator(cpu=True)
    for name in METHODS:
        assert callable(getattr(accelerator, name)), name
        assert getattr(Accelerator, name).__doc__, f"{name} has no docstring"
    for name in ATTRIBUTES:
        getattr(accelerator, name)


# What Accelerate's class has and ours leaves out: TPU, Megatron, fp8, tensor parallelism, its own bookkeeping.
LEFT_OUT = words("""
    is_composable_parallelism_enabled should_save_model
    tensor_parallel_rank pipeline_parallel_rank context_parallel_rank data_parallel_rank data_parallel_shard_rank
    maybe_context_parallel lomo_backward fp8_backend deepspeed_ulysses_dl_adapter""")


def test_arguments_are_accelerates():
    """Held against the installed Accelerate, which PEFT brings along for the tests."""
    theirs = pytest.importorskip("accelerate").Accelerator
    for name in dir(theirs):
        if name.startswith("_") or name in LEFT_OUT:
            continue
        assert hasattr(Accelerator, name) or name in ATTRIBUTES, f"Accelerator.{name} is missing"
        function = inspect.getattr_static(theirs, name)
        if not inspect.isfunction(function):
            continue
        ours = inspect.signature(getattr(Accelerator, name)).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in ours.values())
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            assert parameter.name in ours or open_ended, f"{name} has no argument {parameter.name}"
    ours, others = (inspect.signature(c.__init__).parameters for c in (Accelerator, theirs))
    assert list(ours)[: len(others)] == list(others), "positional arguments in another order"


def parameters_of(function) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize("place", ["big_modeling", "hooks", "utils.modeling", "utils.offload"])
def test_arguments_for_large_models_are_accelerates(place):
    pytest.importorskip("accelerate")
    ours, theirs = (importlib.import_module(f"{library}.{place}") for library in ("shardwise", "accelerate"))
    both = [name for name in ours.__all__ if hasattr(theirs, name)]
    assert len(both) > 6
    for name in both:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if not isinstance(mine, type) or "__init__" in vars(mine):
            assert parameters_of(mine)[: len(parameters_of(other))] == parameters_of(other), name


@pytest.mark.parametrize("argument", ["megatron_lm_plugin", "torch_tp_plugin"])
def test_what_is_left_out_says_what_to_use(argument):
    with pytest.raises(StrategyError, match=f"{argument} is left out") as caught:
        Accelerator(cpu=True, **{argument: object()})
    assert "fix:" in str(caught.value)


def test_names_that_are_left_out_say_what_to_use():
    for name in ("MegatronLMPlugin", "MSAMPRecipeKwargs", "SageMakerDistributedType", "FP8RecipeKwargs"):
        with pytest.raises(ImportError, match=name) as caught:
            exec(f"from shardwise.utils import {name}", {})
        assert isinstance(caught.value, ShardwiseError) or "use" in str(caught.value)
    with pytest.raises(StrategyError, match="fp8"):
        Accelerator(cpu=True, mixed_precision="fp8")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shardwise.nothing  # noqa: B018


def test_the_paths_of_accelerate_utils_are_one_module_each():
    """Whichever way a script spells it: what it patches is patched, and classes have one identity."""
    from shardwise import compat, utils

    assert utils is compat
    for name in (
        "operations",
        "modeling",
        "dataclasses",
        "other",
        "random",
        "memory",
        "imports",
        "environment",
        "offload",
    ):
        importlib.import_module(f"shardwise.utils.{name}")
        assert sys.modules[f"shardwise.utils.{name}"] is sys.modules[f"shardwise.compat.{name}"] is getattr(utils, name)
    told = pickle.loads(pickle.dumps(utils.ProjectConfiguration("folder")))
    assert type(told) is shardwise.ProjectConfiguration and told.project_dir == "folder"
    assert pickle.loads(b"cshardwise.utils.dataclasses\nProjectConfiguration\n.") is type(told)  # by its old path
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shardwise.utils.nothing")


# --- arguments that say the same thing ------------------------------------------------------------
def test_plugins_become_strategies(monkeypatch):
    from shardwise import DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from shardwise.utils import GradientAccumulationPlugin

    assert Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin()).strategy.preset == "zero3"
    with_two = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=3))
    assert with_two.strategy.preset == "zero2" and with_two.gradient_accumulation_steps == 3
    assert Accelerator(cpu=True).strategy.preset == "ddp"
    with pytest.raises(StrategyError, match="the same thing twice"):
        Accelerator(cpu=True, strategy="zero1", fsdp_plugin=FullyShardedDataParallelPlugin())
    with pytest.raises(StrategyError, match="the same thing twice"):
        Accelerator(cpu=True, gradient_accumulation_steps=2, gradient_accumulation_plugin=GradientAccumulationPlugin(3))
    with pytest.raises(StrategyError, match="not a number of batches"):
        Accelerator(cpu=True, gradient_accumulation_steps=0)
    assert (
        Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(3)).gradient_state.num_steps == 3
    )
    monkeypatch.setenv("SHARDWISE_GRADIENT_ACCUMULATION_STEPS", "5")
    assert Accelerator(cpu=True, gradient_accumulation_steps=2).gradient_accumulation_steps == 5


def test_accelerates_own_launcher_is_heard(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = Accelerator(cpu=True)
    assert accelerator.mixed_precision == "bf16" and accelerator.gradient_accumulation_steps == 4
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(StrategyError, match="shardwise launch --config"):
        Accelerator(cpu=True)


def test_a_deepspeed_plugins_clipping_is_done():
    from shardwise import DeepSpeedPlugin

    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=1, gradient_clipping=0.1))
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(1000 * model(torch.zeros(2, 5, dtype=torch.long)).square().mean())
    optimizer.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-3)


def test_compiling_keeps_the_module():
    accelerator = Accelerator(cpu=True, dynamo_backend="eager")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert accelerator.prepare(model) is model and model._compiled_call_impl is not None
    assert torch.isfinite(model(torch.ones(1, 2))).all()
