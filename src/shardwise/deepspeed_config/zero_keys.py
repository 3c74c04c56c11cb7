"""The keys of ``zero_optimization`` and of its offload blocks."""

from shardwise.deepspeed_config.keys import Table, always, refused, served, tunes

_BUCKETS = "messages are as long as a unit of the model; small ones travel together"
_AHEAD = "the next unit is gathered ahead; Strategy(offload_prefetch=...) for those on a host or a disk"
_KEPT = "values are released after use; small units travel together"
_WHOLE = always("state dicts hold whole tensors")
_QUANTIZED = "values and gradients travel in a dtype of torch"


def _both(name: str, says: str) -> Table:
    return {name: tunes(says), f"stage3_{name}": tunes(says)}


ZERO: Table = {
    "stage": served("0 is ddp; 1, 2 and 3 are zero1, zero2 and zero3", needed=True),
    "offload_optimizer": served("the home of the optimizer's state"),
    "offload_param": served("the home of parameters"),
    "cpu_offload": served("the old way to say offload_optimizer.device cpu"),
    "cpu_offload_param": served("the old way to say offload_param.device cpu"),
    "cpu_offload_use_pin_memory": served("the old way to say pin_memory of both blocks"),
    "mics_shard_size": served("hsdp: groups of so many ranks hold a copy of the states. DeepSpeed has taken it out"),
    "mics_hierarchical_params_gather": tunes("hosts of a group gather at once"),
    "contiguous_gradients": always("gradients of a unit lie end to end"),
    "ignore_unused_parameters": served(
        "parameters without a gradient are left alone; false: a step with one is an error",
        accelerate=always("parameters without a gradient are left alone"),
    ),
    "gather_16bit_weights_on_model_save": _WHOLE,
    "stage3_gather_16bit_weights_on_model_save": _WHOLE,
    "stage3_gather_fp16_weights_on_model_save": _WHOLE,
    "load_from_fp32_weights": always("a checkpoint's fp32 weights are used where it has them"),
    "elastic_checkpoint": always("checkpoints load on any number of ranks"),
    "compute_grad_norm": always("the norm is computed where it is asked for"),
    "legacy_stage1": always("there is one engine"),
    "parameter_alignment": always("parameters start at multiples of 32 elements"),
    "leaf_module": served("modules that are gathered as one", accelerate=tunes("units are what units= says")),
    "allgather_partitions": tunes(_BUCKETS),
    "allgather_bucket_size": tunes(_BUCKETS),
    "reduce_scatter": tunes(_BUCKETS),
    "reduce_bucket_size": tunes(_BUCKETS),
    "use_multi_rank_bucket_allreduce": tunes(_BUCKETS),
    "overlap_comm": tunes("messages always travel beside the computation"),
    "sub_group_size": tunes("updates of offloaded state go unit by unit"),
    "round_robin_gradients": tunes("every rank copies its own shards"),
    **_both("prefetch_bucket_size", _AHEAD),
    **_both("param_persistence_threshold", _KEPT),
    **_both("model_persistence_threshold", _KEPT),
    **_both("max_live_parameters", _KEPT),
    **_both("max_reuse_distance", _KEPT),
    **_both("module_granularity_threshold", "units= of fully_shard chooses what is gathered together"),
    **_both("use_all_reduce_for_fetch_params", _BUCKETS),
    **_both("allgather_sequential", _BUCKETS),
    "memory_efficient_linear": tunes("nothing of a linear layer is kept beyond its inputs"),
    "pipeline_loading_checkpoint": tunes("ranks read their shards at once"),
    "override_module_apply": tunes("model.apply works as it is"),
    "log_trace_cache_warnings": tunes("the order of units is learned anew when it changes"),
    "enable_sanity_checks": tunes("the checks are always on"),
    "save_muon_momentum_buffer_in_memory": tunes("offload_optimizer.ratio keeps a part in memory"),
    "zero_hpz_partition_size": refused(
        "parameters have one copy per shard group", "for copies inside hosts use strategy='hsdp,shard_size=...'"
    ),
    "zero_quantized_weights": refused(_QUANTIZED, "use bf16"),
    "zero_quantized_nontrainable_weights": refused(_QUANTIZED, "use bf16"),
    "zero_quantized_gradients": refused(_QUANTIZED, "use communication_data_type bf16"),
    "zeropp_loco_param": refused(_QUANTIZED, "use communication_data_type bf16"),
    "zenflow": refused("every update uses all gradients of its step", "offload_optimizer, which overlaps updates"),
}
OFFLOAD_PARAM: Table = {
    "device": served("none, cpu or nvme"),
    "nvme_path": served("an existing folder on the disk; one for both blocks"),
    "buffer_count": tunes("Strategy(offload_buffers=...) says how many units are in memory"),
    "buffer_size": tunes("a buffer is as long as a unit"),
    "max_in_cpu": tunes("Strategy(offload_buffers=...) says how many units are in memory"),
    "pin_memory": served("host buffers are page-locked, unless either block says false"),
}
OFFLOAD_OPTIMIZER: Table = {
    **OFFLOAD_PARAM,
    "ratio": served("the part of the state, in bytes, that goes to its home; at every stage"),
    "pipeline_read": tunes("reads, updates and writes overlap always"),
    "pipeline_write": tunes("reads, updates and writes overlap always"),
    "pipeline": tunes("reads, updates and writes overlap always"),
    "fast_init": tunes("state is made when it is first used"),
    "cpuadam_cores_perc": tunes("torch's threads, as OMP_NUM_THREADS says"),
    "super_offload": refused("updates on the host are torch's", "offload_optimizer.ratio keeps a part on the device"),
}
LEAF_MODULE: Table = {
    "classes": served("by class"),
    "names": served("by the module's name"),
    "name_suffixes": served("by the end of the module's name"),
}
