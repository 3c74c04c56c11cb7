"""What a Trainer saves, what it loads, and how it goes on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from models import rank
from ranks import everywhere, run
from shardwise import checkpoint
from slowly import slow

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
SAVING = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}


def whole(folder, strategy, accumulation, changes=None):
    """A run of 2 epochs of 20 rows in windows of 8, whose every second step is saved."""
    import trainer_models as tm

    settings = SAVING | {"strategy": strategy, "gradient_accumulation_steps": accumulation} | (changes or {})
    made = tm.trainer(folder, tm.data(20), **settings)
    made.train()
    return tm.history(made), tm.values(made.model), sorted(p.name for p in Path(folder).glob("checkpoint-*"))


def resumed(folder, strategy, accumulation, checkpoint, changes=None):
    """A run that goes on from a folder, with a model whose values are other ones."""
    import trainer_models as tm

    settings = {"strategy": strategy, "gradient_accumulation_steps": accumulation} | SAVING | (changes or {})
    made = tm.trainer(folder, tm.data(20), module=tm.model(seed=7), **settings)
    made.train(resume_from_checkpoint=f"{folder}/{checkpoint}")
    return tm.history(made), tm.values(made.model)


def same(found, wanted, exact):
    for name, value in wanted.items():
        if exact:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", [slow("ddp"), "zero1", slow("zero2"), "zero3"])
def test_going_on_in_the_middle_of_an_epoch(tmp_path, strategy):
    (losses, values, folders), _ = run(2, whole, str(tmp_path), strategy, 4)
    assert folders == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and len(losses) == 6
    for found, end in run(2, resumed, str(tmp_path), strategy, 4, "checkpoint-4"):
        assert found == losses, "the log holds the steps before, and those after are the same to the bit"
        same(end, values, exact=True)


@pytest.mark.parametrize(
    ("before", "after", "ranks"), [("zero3", "ddp", 1), slow("zero1", "zero3", 1), slow("ddp", "zero2", 4)]
)
def test_going_on_under_another_strategy_on_other_ranks(tmp_path, before, after, ranks):
    (losses, values, _), _ = run(2, whole, str(tmp_path), before, 4)
    for found, end in everywhere(ranks, resumed, str(tmp_path), after, 8 // ranks, "checkpoint-2"):
        assert found == pytest.approx(losses, rel=1e-5)
        same(end, values, exact=False)


def left_by_a_plain_trainer(folder):
    """The same run by transformers' own Trainer, one process on its own."""
    import transformers

    import trainer_models as tm

    settings = SAVING | {"gradient_accumulation_steps": 8}
    made = tm.trainer(folder, tm.data(20), make=plain_trainer, **settings)
    assert type(made) is transformers.Trainer
    made.train()
    return tm.history(made), tm.values(made.model)


def plain_trainer(model, arguments, **kwargs):
    import transformers

    ours = {f.name for f in dataclasses.fields(type(arguments))} - {
        f.name for f in dataclasses.fields(transformers.TrainingArguments)
    }
    settings = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments) if f.init}
    settings = {name: value for name, value in settings.items() if name not in ours}
    return transformers.Trainer(model, transformers.TrainingArguments(**settings), **kwargs)


@pytest.mark.parametrize("strategy", [slow("ddp"), slow("zero1"), slow("zero2"), "zero3"])
def test_going_on_where_a_plain_trainer_ended(tmp_path, strategy):
    (losses, values) = run(1, left_by_a_plain_trainer, str(tmp_path), fresh=True)[0]
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").is_file()
    for found, end in run(2, resumed, str(tmp_path), strategy, 4, "checkpoint-4"):
        assert found == pytest.approx(losses, rel=1e-5)
        same(end, values, exact=False)


def left_by_deepspeed(folder, strategy):
    """A run whose checkpoints have what DeepSpeed would have written there."""
    import transformers

    import trainer_models as tm

    class Writes(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            at = Path(folder) / f"checkpoint-{state.global_step}"
            checkpoint.save(
                at / "both", models=[made.model], optimizers=[made.optimizer.optimizer], progress=False,
                info={"step": state.global_step}, state={"scheduler": made.lr_scheduler.state_dict()},
            )  # fmt: skip
            if rank() == 0:
                checkpoint.export_deepspeed(at / "both", at, stage=2, ranks=3, progress=False)
                for name in ("both", "optimizer"):
                    shutil.rmtree(at / name)
                for name in ("model.safetensors", "scheduler.pt"):
                    (at / name).unlink()

    made = tm.trainer(
        folder, tm.data(20), strategy=strategy, gradient_accumulation_steps=4, callbacks=[Writes()], **SAVING
    )
    made.train()
    return tm.history(made), tm.values(made.model)


@pytest.mark.parametrize("strategy", [slow("ddp"), "zero3"])
def test_going_on_where_deepspeed_ended(tmp_path, strategy):
    (losses, values), _ = run(2, left_by_deepspeed, str(tmp_path), "zero1")
    assert {p.name for p in (tmp_path / "checkpoint-4").iterdir()} >= {"latest", "global_step4"}
    for found, end in run(2, resumed, str(tmp_path), strategy, 4, "checkpoint-4"):
        assert found == pytest.approx(losses, rel=1e-5)
        same(end, values, exact=False)


def refused(folder):
    import trainer_models as tm
    from shardwise.errors import CheckpointError

    said = []
    whole = Path(folder) / "checkpoint-4"
    state = torch.load(whole / "optimizer.pt", weights_only=True) if rank() == 0 else None
    written = {
        "cut": lambda at: at.write_bytes((whole / "optimizer.pt").read_bytes()[:5000]),
        "list": lambda at: torch.save([1], at),
        "sgd": lambda at: torch.save(
            {**state, "param_groups": [{"momentum": 0.9, "params": g["params"]} for g in state["param_groups"]]}, at
        ),
        "turned": lambda at: torch.save(
            {**state, "state": {k: {"exp_avg": v["exp_avg"].flatten()} for k, v in state["state"].items()}}, at
        ),
        "fsdp": lambda at: at.rename(at.with_name("optimizer.bin")),
    }
    for number, write in enumerate(written.values()):
        at = Path(folder) / f"checkpoint-{100 + number}"
        if rank() == 0:
            shutil.copytree(whole, at)
            write(at / "optimizer.pt")
        dist.barrier()
        made = tm.trainer(folder, tm.data(20), strategy="zero2", gradient_accumulation_steps=4, **SAVING)
        try:
            made.train(resume_from_checkpoint=str(at))
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_what_a_plain_trainer_left_and_cannot_be_used(tmp_path):
    run(1, left_by_a_plain_trainer, str(tmp_path), fresh=True)
    for said in run(2, refused, str(tmp_path)):
        for words, message in zip(
            ("cannot be read", "no optimizer's state dict", "of AdamW are betas", "has shape", "'optimizer.bin'"),
            said,
            strict=True,
        ):
            assert words in message, message


def kept(folder, strategy, changes, tied):
    """What folders there are at the end of a run, what the model is then, and what is read from the last of them."""
    import trainer_models as tm

    settings = SAVING | {"strategy": strategy, "gradient_accumulation_steps": 4} | changes
    made = tm.trainer(folder, tm.data(20), module=tm.model(tied), eval_dataset=tm.data(4), **settings)
    made.train()
    folders = sorted(p.name for p in Path(folder).glob("checkpoint-*"))
    made.save_model()
    return folders, tm.values(made.model), made.state.best_model_checkpoint


def read(folder):
    from transformers import LlamaForCausalLM

    import trainer_models as tm

    return tm.values(LlamaForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    ("strategy", "changes", "tied", "folders"),
    [
        ("zero3", {"save_total_limit": 1}, True, ["checkpoint-6"]),
        slow("zero3", {"save_only_model": True, "save_total_limit": 2}, False, ["checkpoint-4", "checkpoint-6"]),
        ("zero1", {"save_strategy": "epoch", "bf16": True}, True, ["checkpoint-3", "checkpoint-6"]),
        slow("zero2", {"save_strategy": "no", "fp16": True}, False, []),
    ],
)
def test_what_is_there_and_what_from_pretrained_reads(tmp_path, strategy, changes, tied, folders):
    first, second = run(2, kept, str(tmp_path), strategy, changes, tied)
    assert first[0] == second[0] == folders
    for folder in [tmp_path, *(tmp_path / name for name in folders[-1:])]:
        same(read(str(folder)), first[1], exact=True)
    if "save_only_model" in changes:
        assert not (tmp_path / "checkpoint-6" / "optimizer").exists()


def best(folder, strategy, changes):
    """A run that gets worse: its rate is far too high after the first evaluation."""
    import trainer_models as tm

    settings = {"strategy": strategy, "learning_rate": 3.0, "warmup_steps": 0, "max_grad_norm": 0.0} | changes
    made = tm.trainer(
        folder, tm.data(16), eval_dataset=tm.data(4), optim="sgd", num_train_epochs=4, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, **settings,
    )  # fmt: skip
    made.train()
    losses = tm.history(made, "eval_loss")
    return losses, made.state.best_model_checkpoint, made.evaluate()["eval_loss"], tm.values(made.model)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("zero3", {}),
        slow("ddp", {"save_only_model": True, "save_total_limit": 1}),
        slow("zero2", {"save_total_limit": 1}),
    ],
)
def test_the_best_model_is_loaded_at_the_end(tmp_path, strategy, changes):
    for losses, folder, loss, values in run(2, best, str(tmp_path), strategy, changes):
        assert min(losses) < losses[-1] and loss == pytest.approx(min(losses), rel=1e-6)
        same(read(folder), values, exact=True)


def another_batch(folder):
    import trainer_models as tm
    from shardwise.errors import ShardwiseError

    made = tm.trainer(folder, tm.data(20), strategy="zero2", gradient_accumulation_steps=3, **SAVING)
    try:
        made.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    except ShardwiseError as error:
        return str(error)
    return "it went on"


def test_another_batch_size_has_no_place_in_the_data(tmp_path):
    run(2, whole, str(tmp_path), "zero2", 4)
    for message in run(2, another_batch, str(tmp_path)):
        assert "8 samples" in message and "6" in message and "ignore_data_skip" in message, message


def with_adapters(folder, strategy, resume):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    import trainer_models as tm

    torch.manual_seed(3)
    module = get_peft_model(tm.model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    made = tm.trainer(folder, tm.data(20), module=module, strategy=strategy, gradient_accumulation_steps=4, **SAVING)
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if resume else None)
    made.save_model()
    mine = {n.replace(".default", ""): v for n, v in tm.values(made.model).items() if "lora" in n}
    written = load_file(f"{folder}/adapter_model.safetensors") if made.args.should_save else None
    return tm.history(made), mine, written


@pytest.mark.parametrize("strategy", [slow("ddp"), "zero3"])
def test_adapters(tmp_path, strategy):
    (losses, values, written), _ = run(2, with_adapters, str(tmp_path), strategy, False)
    same(written, values, exact=True)
    (again, end, _), _ = run(2, with_adapters, str(tmp_path), strategy, True)
    assert again == losses
    same(end, values, exact=True)
