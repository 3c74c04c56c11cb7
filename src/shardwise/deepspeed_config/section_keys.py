"""The keys of the other sections."""

from shardwise.deepspeed_config.keys import Table, always, refused, served, tunes

_SCALER = tunes("torch.amp.GradScaler has no such rule")
_MASTER = refused(
    "master values and optimizer state stay in the dtype of the model as it was given", "give a model in bf16 instead"
)
_WRITER = tunes("a checkpoint's files are written in parallel")

FP16: Table = {
    "enabled": served("on or off", needed=True),
    "auto_cast": always("inputs of units are cast, or the model runs under autocast: what the strategy says"),
    "loss_scale": served(
        "a scale that stays; 0 for one that follows the gradients",
        accelerate=refused("losses are scaled dynamically", "set it to 0, or leave it out"),
    ),
    "initial_scale_power": served("the first scale, as a power of 2: 16 unless it is said"),
    "loss_scale_window": served("steps without an overflow after which the scale doubles: 1000"),
    "hysteresis": served("overflows that are borne before the scale is halved: 2", accelerate=_SCALER),
    "consecutive_hysteresis": served("they count only in a row: false", accelerate=_SCALER),
    "min_loss_scale": served("the scale is never less: 1", accelerate=_SCALER),
    "fp16_master_weights_and_grads": _MASTER,
}
BF16: Table = {
    "enabled": served("on or off", needed=True),
    "immediate_grad_update": tunes("gradients are added as they arrive"),
    "check_grad_overflow": served(
        "a step with gradients that are not finite is skipped: true", accelerate=tunes("the script sees to it")
    ),
    "check_overflow": served("the old name of check_grad_overflow", accelerate=tunes("the script sees to it")),
    "bf16_master_weights_and_grads": _MASTER,
    "bf16_optimizer_states": _MASTER,
    "ddp_bf16": _MASTER,
    # DeepSpeed's older files have the section of fp16 copied.
    "auto_cast": always("inputs of units are cast, or the model runs under autocast: what the strategy says"),
    **dict.fromkeys(
        ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        always("bf16 needs no scaled losses"),
    ),
}
DATA_TYPES: Table = {
    "grad_accum_dtype": served("fp32; another one is refused: gradients accumulate in fp32"),
    "param_dtype": refused("the model's parameters keep their dtypes", "convert the model, or use bf16 or fp16"),
    "buffer_dtype": refused("buffers keep their dtypes", "convert the model's buffers"),
    "keep_in_fp32_modules": refused("a unit computes in one dtype", "keep such modules out with units= of fully_shard"),
}
OPTIMIZER: Table = {
    "type": served("Adam, AdamW, Adagrad, Lion, Lamb, SGD or Muon; or any name of torch.optim"),
    "params": served("the optimizer's arguments"),
    "legacy_fusion": tunes("updates are torch's"),
}
SCHEDULER: Table = {
    "type": served("WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest; or any of torch's schedulers"),
    "params": served("the scheduler's arguments"),
}
ACTIVATIONS: Table = {
    "cpu_checkpointing": served("what a forward saves for backward is kept in host memory"),
    "partition_activations": tunes("each rank keeps its own batch's inputs"),
    "contiguous_memory_optimization": tunes("torch's allocator places them"),
    "number_checkpoints": tunes("there are as many as there are calls"),
    "synchronize_checkpoint_boundary": tunes("nothing waits there"),
    "profile": tunes("shardwise report shows the times of a recorded run"),
}
CHECKPOINT: Table = {
    "tag_validation": served(
        "ignore, warn or fail if ranks save under different tags", accelerate=tunes("tags are the engine's")
    ),
    "load_universal": always("folders of every kind are recognised"),
    "use_node_local_storage": refused("a checkpoint is one folder that all ranks see", "save to a shared folder"),
    "parallel_write": _WRITER,
    "writer": _WRITER,
    "checkpoint_serialization": _WRITER,
    "async_io": _WRITER,
}
FLOPS_PROFILER: Table = {
    "enabled": served("on or off", needed=True),
    "profile_step": served("the step that is measured"),
    "module_depth": served("how deep modules are listed; -1 for all"),
    "top_modules": tunes("all modules are listed"),
    "detailed": served("list modules one by one"),
    "output_file": served("a file for the figures, else they are printed"),
    "recompute_fwd_factor": tunes("what is computed again in backward is no forward"),
}
_FOLDER: Table = {
    "enabled": served("on or off", needed=True),
    "output_path": served("the folder"),
    "job_name": served("a folder inside of it"),
}
TENSORBOARD = _FOLDER
CSV = _FOLDER
WANDB: Table = {
    "enabled": served("on or off", needed=True),
    "group": served("the run's group"),
    "team": served("the entity that owns the run"),
    "project": served("the project"),
}
COMET: Table = {
    "enabled": served("on or off", needed=True),
    "samples_log_interval": served("values are sent every so many samples"),
    "project": served("the project"),
    "workspace": served("the workspace"),
    "api_key": served("the key of the service"),
    "experiment_name": served("the experiment's name"),
    "experiment_key": served("the experiment to go on with"),
    "online": served("false: to files of this machine"),
    "mode": served("get, create or get_or_create"),
}
_DEEPCOMPILE = refused("the engine's schedule is not compiled", "engine.compile() compiles the model's blocks")
COMPILE: Table = {
    "deepcompile": _DEEPCOMPILE,
    "autoep_non_moe": tunes("experts are not placed on ranks"),
    "enabled": served("of old files: compile the model"),
    "backend": served("of old files: torch.compile's backend"),
    "kwargs": served("of old files: torch.compile's arguments"),
    **dict.fromkeys(
        (
            "free_activation", "free_activation_threshold", "offload_activation", "offload_activation_pin_memory",
            "offload_opt_states", "double_buffer", "symmetric_memory", "debug_log", "offload_parameters",
            "sync_before_reduce", "sync_after_reduce", "sync_before_allgather", "sync_after_allgather",
            "keep_int_input_tensors", "keep_all_input_tensors", "passes",
        ),
        tunes("a setting of deepcompile"),
    ),
}  # fmt: skip
AIO: Table = dict.fromkeys(
    (
        "block_size", "queue_depth", "intra_op_parallelism", "thread_count", "single_submit", "overlap_events",
        "use_gds",
    ),
    tunes("requests to a disk are as long and as many as Strategy(offload_depth=...) says"),
)  # fmt: skip
COMMS_LOGGER: Table = dict.fromkeys(
    ("enabled", "verbose", "prof_all", "debug", "prof_ops"), tunes("shardwise.stats counts messages and bytes")
)
TIMERS: Table = {"throughput": tunes("shardwise report shows the times of a recorded run")}
