"""The keys at the top of a DeepSpeed configuration."""

from shardwise.deepspeed_config.keys import Table, always, refused, served, tunes

_TRACKER = refused("an Accelerator has trackers", "name the tracker in log_with of the Accelerator")
_GONE = "DeepSpeed has taken it out itself"

TOP: Table = {
    # --- batches ---
    "train_batch_size": served("samples of a step, over all ranks; checked against the other two"),
    "train_micro_batch_size_per_gpu": served("samples of a rank's micro-batch"),
    "gradient_accumulation_steps": served("micro-batches of a step"),
    "managed_gradient_accumulation": served("false: the script says which micro-batch is the last one of a step"),
    "dataloader_drop_last": served(
        "the loader of initialize(training_data=...) drops a last batch that is not full",
        accelerate=tunes("the script's DataLoader says it"),
    ),
    # --- what trains ---
    "optimizer": served(
        "built by initialize, on torch.optim where torch has it",
        accelerate=refused(
            "a script of Accelerate builds it", "build the optimizer in the script and pass it to prepare"
        ),
    ),
    "scheduler": served(
        "built by initialize, and stepped with the optimizer",
        accelerate=refused(
            "a script of Accelerate builds it", "build the scheduler in the script and pass it to prepare"
        ),
    ),
    "gradient_clipping": served(
        "the largest norm of all gradients together. Without it nothing is clipped; DeepSpeed 0.19 clips to 1.0 then"
    ),
    "zero_allow_untested_optimizer": always("any optimizer may be given"),
    "zero_force_ds_cpu_optimizer": always("any optimizer may have its state elsewhere"),
    # --- precision ---
    "fp16": served("compute in fp16, with scaled losses"),
    "bf16": served("compute in bf16"),
    "bfloat16": served("the old name of bf16"),
    "data_types": served("gradients accumulate in fp32"),
    "communication_data_type": served("fp32, fp16 or bf16: the dtype of gradients on the wire"),
    "seq_parallel_communication_data_type": tunes("there is no sequence parallelism to send for"),
    "torch_autocast": refused("the half precision sections do it", "use bf16 or fp16"),
    # --- states ---
    "zero_optimization": served("the strategy: which states are split, and where each one lives"),
    "activation_checkpointing": served("how deepspeed.checkpointing.checkpoint keeps its inputs"),
    "aio": tunes("requests to a disk are as long and as many as Strategy(offload_depth=...) says"),
    # --- gradients over ranks ---
    "gradient_allreduce_op": served(
        "mean or sum over ranks",
        accelerate=refused("gradients are means over ranks", "leave it out"),
    ),
    "prescale_gradients": served(
        "gradients are always divided before they are summed, which is what it asks for",
        accelerate=tunes("gradients are always divided before they are summed"),
    ),
    "gradient_predivide_factor": served(
        "read; the mean is the same for every factor", accelerate=tunes("the mean is the same for every factor")
    ),
    "disable_allgather": tunes("shards travel in collectives of the strategy's choice"),
    # --- words and figures ---
    "steps_per_print": served(
        "every so many steps the engine prints how many it took, rates and momenta",
        accelerate=always("the script prints")
    ),
    "wall_clock_breakdown": served(
        "the engine prints the times of forward, backward and step",
        accelerate=tunes("shardwise report shows the times of a recorded run"),
    ),
    "memory_breakdown": tunes("shardwise.stats and shardwise report show memory"),
    "dump_state": tunes("shardwise.stats and shardwise report show a run"),
    "flops_profiler": served(
        "one step is measured and printed",
        accelerate=refused(
            "an Accelerator profiles by itself", "use accelerator.profile() with ProfileKwargs(with_flops=True)"
        ),
    ),
    "comms_logger": tunes("shardwise.stats counts messages and bytes"),
    "timers": tunes("shardwise report shows the times of a recorded run"),
    "log_level": tunes("the level of the logger is set with the logging module"),
    "tensorboard": served("values of a step, to TensorBoard", accelerate=_TRACKER),
    "wandb": served("values of a step, to Weights & Biases", accelerate=_TRACKER),
    "comet": served("values of a step, to Comet", accelerate=_TRACKER),
    "csv_monitor": served("values of a step, to one CSV file for each name", accelerate=_TRACKER),
    "vocabulary_size": tunes("DeepSpeed warns if it is no multiple of 8"),
    "disable_python_gc": tunes("the garbage collector is left alone"),
    # --- files ---
    "checkpoint": served("are the tags of all ranks compared; files are written in parallel always"),
    "datastates_ckpt": refused("checkpoints are written in the background by async_save", "leave it out"),
    "datastates": refused("checkpoints are written in the background by async_save", "leave it out"),
    "compile": served(
        "enabled, backend and kwargs of older files: initialize calls engine.compile with them",
        accelerate=tunes("the script calls compile by itself")
    ),
    # --- other ways to split a model ---
    "tensor_parallel": refused("models are not cut into layers' slices", "zero_optimization.stage 3 splits the states"),
    "autotp_size": refused("models are not cut into layers' slices", "zero_optimization.stage 3 splits the states"),
    "sequence_parallel_size": refused("sequences are not split over ranks", "activation_checkpointing saves memory"),
    "expert_parallel": refused("experts are not placed on ranks", "zero_optimization.stage 3 splits experts, too"),
    "use_data_before_expert_parallelism": tunes("experts are not placed on ranks"),
    "pipeline": refused("stages of layers do not run in turns", "zero_optimization.stage 3 splits the states"),
    "hybrid_engine": refused("one engine trains, and generate() runs on it", "leave it out"),
    # --- other ways to train ---
    "data_efficiency": refused("samples and tokens are what the script's loader gives", "choose samples in the script"),
    "autotuning": refused("nothing is tried out", "shardwise plan finds a strategy without running"),
    "msamp": refused("fp8 is not served", "use bf16"),
    "weight_quantization": refused("weights are trained whole", "shardwise.load(..., quantization='int8') runs int8"),
    **{
        name: refused(f"{what}; {_GONE}", fix)
        for name, what, fix in (
            ("amp", "Apex is gone", "use fp16 or bf16"),
            ("sparse_gradients", "gradients are dense", "use dense gradients"),
            ("elasticity", "batches do not follow the number of ranks", "shardwise launch --min-nproc"),
            ("curriculum_learning", "samples are what the script's loader gives", "choose samples in the script"),
            ("compression_training", "models are not compressed while they train", "leave it out"),
            ("sparse_attention", "attention is the model's own", "leave it out"),
            ("eigenvalue", "no eigenvalues are computed", "leave it out"),
            ("quantize_training", "weights are trained whole", "leave it out"),
            ("progressive_layer_drop", "layers are the model's own", "drop layers in the model's forward"),
            ("graph_harvesting", "steps are not captured as graphs", "leave it out"),
            ("nebula", "there is no such service", "save with engine.save_checkpoint"),
        )
    },
}  # fmt: skip
"""By name. Sections have a table of their own."""
