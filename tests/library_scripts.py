"""Training scripts as people write them for trl, peft, sentence-transformers and diffusers: not a word of Shardwise.

``python library_scripts.py FOLDER SCRIPT ...`` runs them in one plain process, with whatever ``accelerate`` is there.
``python library_scripts.py FOLDER --as accelerate --strategies ddp,zero3 SCRIPT ...`` lets that name mean Shardwise.
It forks two ranks for each strategy after the imports, which take most of the time. Each run leaves in FOLDER what it
logged, and the weights that it saved.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import ClassVar

WORDS = ["the", "cat", "sat", "on", "mat", "a", "good", "bad", "dog", "ran", "yes", "no", "what", "is"]
KEPT = ("loss", "grad_norm", "eval_loss", "rewards/margins", "accuracy", "reward", "kl", "eval_spearman_cosine")
LIBRARIES = {"sft": "trl", "dpo": "trl", "reward": "trl", "grpo": "trl", "lora": "peft", "unet": "diffusers"}
LIBRARIES["sentences"] = "sentence_transformers"


def text(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 3 + j * (1 + i % 3)) % len(WORDS)] for j in range(length))


def prepare(folder: Path) -> None:
    """Models of random weights, and a tokenizer, as ``from_pretrained`` reads them."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(64 - len(words))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    llama = transformers.LlamaConfig(**small, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    bert = transformers.BertConfig(
        **small, num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    made = {"causal": transformers.LlamaForCausalLM(llama), "bert": transformers.BertModel(bert)}
    llama.num_labels = 1
    made["score"] = transformers.LlamaForSequenceClassification(llama)
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def settings(out: Path, per: int, **changes: object) -> dict[str, object]:
    """What the arguments of all trainers have in common: eight samples a step, in two micro-batches."""
    return {
        "output_dir": str(out), "per_device_train_batch_size": per, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "seed": 1, "disable_tqdm": True,
        "gradient_checkpointing": False, "lr_scheduler_type": "constant", **changes,
    }  # fmt: skip


def finish(trainer: object, out: Path) -> None:
    trainer.save_model(str(out / "final"))
    if trainer.is_world_process_zero():
        logged = [{k: v for k, v in step.items() if k in KEPT} for step in trainer.state.log_history]
        (out / "logged.json").write_text(json.dumps(logged))


def sft(models: Path, out: Path, per: int) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": text(i, 3 + i % 6)} for i in range(32)])
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(models / "causal"),
        args=SFTConfig(max_length=32, eval_strategy="steps", eval_steps=3, **settings(out, per)),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(models / "causal"),
    )
    trainer.train()
    finish(trainer, out)


def dpo(models: Path, out: Path, per: int) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": text(i, 3), "chosen": text(i + 1, 4 + i % 3), "rejected": text(i, 3 + i % 4)} for i in range(16)]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(models / "causal"),
        args=DPOConfig(max_length=32, **settings(out, per)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=AutoTokenizer.from_pretrained(models / "causal"),
    )
    trainer.train()
    trainer.evaluate()
    finish(trainer, out)


def reward(models: Path, out: Path, per: int) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = [{"chosen": text(i + 1, 4 + i % 3), "rejected": text(i + 2, 3 + i % 4)} for i in range(16)]
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(models / "score"),
        args=RewardConfig(max_length=32, **settings(out, per)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(models / "score"),
    )
    trainer.train()
    finish(trainer, out)


def shorter(completions: list[str], **columns: object) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def grpo(models: Path, out: Path, per: int) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(models / "causal"),
        reward_funcs=shorter,
        args=GRPOConfig(
            num_generations=2,
            max_completion_length=12,
            beta=0.1,
            generation_kwargs={"eos_token_id": list(range(2, 24))},  # so that texts end after different lengths
            **settings(out, per),
        ),
        train_dataset=Dataset.from_list([{"prompt": text(i, 3)} for i in range(16)]),
        processing_class=AutoTokenizer.from_pretrained(models / "causal"),
    )
    trainer.train()
    finish(trainer, out)


def lora(models: Path, out: Path, per: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(models / "causal")
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(models / "causal"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    rows = [tokenizer(text(i, 4 + i % 5)) for i in range(32)]
    # The first checkpoint is loaded at the end: the one with the highest loss is called best.
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    often |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = Trainer(
        model,
        TrainingArguments(**settings(out, per, load_best_model_at_end=True, **often)),
        train_dataset=rows,
        eval_dataset=rows[:8],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    finish(trainer, out)


def sentences(models: Path, out: Path, per: int) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    parts = [Transformer(str(models / "bert")), Pooling(32, "mean")]
    model = SentenceTransformer(modules=parts, device="cpu")
    rows = [{"one": text(i, 4 + i % 3), "other": text(i + 5, 3 + i % 4), "score": (i % 5) / 5} for i in range(32)]
    few = {key: [row[key] for row in rows[:8]] for key in rows[0]}
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=Arguments(**settings(out, per, load_best_model_at_end=True, **often)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        loss=losses.CosineSimilarityLoss(model),
        evaluator=EmbeddingSimilarityEvaluator(few["one"], few["other"], few["score"]),
    )
    trainer.train()
    finish(trainer, out)


def unet(models: Path, out: Path, per: int) -> None:
    """A loop in the shape of diffusers' own scripts."""
    import torch
    from accelerate import Accelerator
    from accelerate.logging import get_logger
    from accelerate.tracking import GeneralTracker
    from accelerate.utils import ProjectConfiguration, set_seed
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "kept", False, None, True
        losses: ClassVar[list[dict[str, float]]] = []

        def store_init_configuration(self, values: dict[str, object]) -> None:
            (out / "configuration.json").write_text(json.dumps(values))

        def log(self, values: dict[str, float], step: int | None = None, **more: object) -> None:
            self.losses.append(values)

    project = ProjectConfiguration(str(out), str(out / "logs"))
    accelerator = Accelerator(gradient_accumulation_steps=2, log_with=Kept(), project_config=project)
    get_logger(__name__, log_level="INFO").info(accelerator.state, main_process_only=False)
    set_seed(0)
    model = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    noise_scheduler = DDPMScheduler(num_train_timesteps=100)
    images = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    data = torch.utils.data.TensorDataset(images, noise, torch.arange(32) * 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(data, batch_size=per)
    schedule = get_scheduler("constant", optimizer)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if accelerator.is_main_process:
        accelerator.init_trackers("unet", {"per": per})
    for clean, added, timesteps in loader:
        with accelerator.accumulate(model):
            predicted = model(noise_scheduler.add_noise(clean, added, timesteps), timesteps).sample
            loss = torch.nn.functional.mse_loss(predicted, added)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        accelerator.log({"loss": accelerator.gather(loss.detach().repeat(per)).mean().item()})
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        (out / "final").mkdir()
        accelerator.save(state, str(out / "final" / "model.safetensors"), safe_serialization=True)
        (out / "logged.json").write_text(json.dumps(Kept.losses))
    accelerator.end_training()


def on_rank(rank: int, port: int, strategy: str, scripts: list[str], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), SHARDWISE_STRATEGY=strategy)
    for name in scripts:
        globals()[name](folder / "models", folder / strategy / name, 2)


def forked(strategy: str, scripts: list[str], folder: Path) -> None:
    """Two ranks, forked here, to their end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                on_rank(rank, port, strategy, scripts, folder)
                code = 0
            except BaseException as error:  # noqa: BLE001 - a fork must not go on as its parent
                sys.excepthook(type(error), error, error.__traceback__)
            sys.stderr.flush()
            os._exit(code)
        started.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
    if any(codes):
        sys.exit(f"under {strategy} ranks ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--as", dest="names", default="")
    parser.add_argument("--strategies", default="")
    parser.add_argument("scripts", nargs="+")
    options = parser.parse_args()
    if options.names:
        import shardwise

        shardwise.install_as(*options.names.split(","))
    for name in options.scripts:
        for part in ("transformers.trainer", LIBRARIES[name]):
            importlib.import_module(part)
    for strategy in [s for s in options.strategies.split(",") if s] or ["plain"]:
        for name in options.scripts:
            (options.folder / strategy / name).mkdir(parents=True)
        if strategy == "plain":
            prepare(options.folder / "models")
            for name in options.scripts:
                globals()[name](options.folder / "models", options.folder / strategy / name, 4)
        else:
            forked(strategy, options.scripts, options.folder)


if __name__ == "__main__":
    main()
