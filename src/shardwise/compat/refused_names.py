"""Names of ``accelerate.utils`` that this library leaves out on purpose, and what to use instead."""

from __future__ import annotations

from shardwise.errors import LeftOut


class LeftOutImport(LeftOut, ImportError):
    """``from shardwise.utils import ...`` of a name that is left out."""


class LeftOutAttribute(LeftOut, AttributeError):
    """``shardwise.utils....`` of a name that is left out; ``hasattr`` is ``False``."""


def _names(text: str, instead: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), instead)


_FP8 = "use mixed_precision='bf16'"
_MEGATRON = "use strategy='zero3', or torch.distributed.tensor.parallel on models that Shardwise does not shard"

LEFT_OUT: dict[str, str] = {
    **_names(
        "AbstractTrainStep BertTrainStep GPTTrainStep T5TrainStep MegatronEngine MegatronLMDummyDataLoader "
        "MegatronLMDummyScheduler MegatronLMOptimizerWrapper MegatronLMPlugin MegatronLMSchedulerWrapper "
        "add_model_config_to_megatron_parser avg_losses_across_data_parallel_group "
        "gather_across_data_parallel_groups megatron_lm_initialize megatron_lm_prepare_data_loader "
        "megatron_lm_prepare_model_optimizer_scheduler megatron_lm_prepare_optimizer megatron_lm_prepare_scheduler",
        _MEGATRON,
    ),
    **_names("TorchTensorParallelPlugin TorchTensorParallelConfig get_model_tp_size", _MEGATRON),
    **_names("TorchContextParallelConfig DeepSpeedSequenceParallelConfig", "split sequences in the script"),
    **_names(
        "AORecipeKwargs FP8RecipeKwargs MSAMPRecipeKwargs TERecipeKwargs apply_fp8_autowrap "
        "contextual_fp8_autocast convert_model convert_model_to_fp8_ao filter_first_and_last_linear_layers "
        "has_ao_layers has_transformer_engine_layers check_cuda_fp8_capability get_fsdp2_grad_scaler "
        "is_msamp_available is_torchao_available is_transformer_engine_available "
        "is_transformer_engine_mxfp8_available torchao_required is_habana_gaudi1",
        _FP8,
    ),
    **_names(
        "BnbQuantizationConfig load_and_quantize_model has_4bit_bnb_layers is_4bit_bnb_available "
        "is_8bit_bnb_available is_bitsandbytes_multi_backend_available",
        "quantise with the model's own library, for example transformers' BitsAndBytesConfig",
    ),
    **_names(
        "SageMakerDistributedType prepare_sagemager_args_inputs prepare_tpu install_xla",
        "start scripts with 'shardwise launch', or torchrun",
    ),
    **_names(
        "PrepareForLaunch prepare_deepspeed_cmd_env prepare_multi_gpu_env prepare_simple_launcher_cmd_env "
        "convert_dict_to_env_variables purge_accelerate_environment",
        "use shardwise.notebook_launcher, or 'shardwise launch'",
    ),
    **_names("write_basic_config", "run 'shardwise config --yes'"),
    **_names(
        "DeepSpeedEngineWrapper DeepSpeedOptimizerWrapper "
        "get_active_deepspeed_plugin map_pytorch_optim_to_deepspeed deepspeed_required compile_regions_deepspeed",
        "DeepSpeed itself is not used: give DeepSpeedPlugin or strategy='zero3' to the Accelerator",
    ),
    **_names(
        "GatheredParameters ensure_weights_retied fsdp2_canonicalize_names fsdp2_load_full_state_dict "
        "fsdp2_prepare_model fsdp2_switch_optimizer_parameters fsdp2_apply_ac "
        "disable_fsdp_ram_efficient_loading enable_fsdp_ram_efficient_loading",
        "models are sharded in place and keep their parameters; whole values: shardwise.gathered(module)",
    ),
    **_names(
        "compile_regions compile_regions_fsdp2",
        "call .compile() on each block, or TorchDynamoPlugin(use_regional_compilation=True)",
    ),
    **_names("get_current_device_type is_xccl_available get_cpu_distributed_information", "ask accelerator.device"),
    **_names("prepare_pippy", "shardwise.load or dispatch_model run a model that is larger than a device"),
    **_names("get_grad_scaler", "torch.amp.GradScaler works on sharded models"),
    **_names("get_mixed_precision_context_manager", "use accelerator.autocast()"),
    **_names("set_numa_affinity check_cuda_p2p_ib_support get_gpu_info check_os_kernel", "run 'shardwise doctor'"),
}


def refusal(name: str, importing: bool) -> LeftOut:
    """The error for a name of :data:`LEFT_OUT`.

    Args:
        importing: for ``from ... import``, else for an attribute.
    """
    kind = LeftOutImport if importing else LeftOutAttribute
    return kind(f"{name} is left out of Shardwise", where="shardwise.utils", fix=LEFT_OUT[name])


def refused_when_called(name: str, instead: str) -> type:
    """A stand-in for a class or function that libraries import whether they use it or not.

    Nothing is an instance of it, and calling it raises LeftOut.
    """

    def refuse(cls: type, *args: object, **kwargs: object) -> object:
        raise LeftOut(f"{name} is left out of Shardwise", where="shardwise.utils", fix=instead)

    return type(name, (), {"__new__": refuse, "__module__": __name__, "__doc__": f"Left out: {instead}."})
