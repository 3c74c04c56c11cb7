"""Runs that begin again, in many forms: searches, batches that do not fit, orders of samples, models of others."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn

from ranks import run
from slowly import slow

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


def searched(folder, strategy, trials):
    """What hyperparameter_search does for each trial: new arguments, a new model, a training."""
    import gc
    import weakref

    import transformers

    import trainer_models as tm

    models = []

    def make():
        made = tm.model()
        models.append(weakref.ref(made))
        return made

    made = tm.trainer(
        folder, tm.data(8), eval_dataset=tm.data(4), model_init=make, strategy=strategy, eval_strategy="epoch"
    )
    made.hp_search_backend = transformers.trainer_utils.HPSearchBackend.WANDB  # whose trials are plain dicts
    made._get_output_dir = lambda trial: folder
    made._report_to_hp_search = lambda *args: None
    found = []
    for rate in trials:
        with patch.object(transformers.integrations, "hp_params", dict):  # which takes dicts where wandb is installed
            made.train(trial={"learning_rate": rate, "gradient_accumulation_steps": 2})
        found.append((made.args.gradient_accumulation_steps, tm.history(made)))
    gc.collect()
    return found, sum(one() is not None for one in models)


def test_several_trainings_in_one_process(tmp_path):
    trials = [1e-3, 5e-3, 1e-3]
    (found, alive), other = run(2, searched, str(tmp_path), "zero3", trials)
    assert (found, alive) == other
    assert found[0] == found[2] != found[1] and found[0][0] == 2
    assert alive <= 2, "models of earlier trials are gone"


def small():
    import trainer_models as tm

    return tm.model()


def found_by_optuna(folder):
    import trainer_models as tm

    made = tm.trainer(
        folder, tm.data(8), eval_dataset=tm.data(4), model_init=small, strategy="zero2", eval_strategy="epoch"
    )
    best = made.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        backend="optuna", n_trials=3,
    )  # fmt: skip
    return None if best is None else (best.run_id, best.objective), made.args.learning_rate


def test_a_search_by_optuna(tmp_path):
    pytest.importorskip("optuna")
    (best, rate), (nothing, other) = run(2, found_by_optuna, str(tmp_path))
    assert best is not None and best[1] > 0 and nothing is None and rate == other


class TooLarge(nn.Module):
    """A model that runs out of memory on batches of more than two rows, of which it has begun to keep something."""

    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x, labels):
        hidden = self.first(x)
        if len(x) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {"loss": ((self.second(hidden).squeeze(-1) - labels) ** 2).mean()}


def halved(folder, strategy):
    import trainer_models as tm

    g = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(4, generator=g), "labels": torch.randn((), generator=g)} for _ in range(16)]
    made = tm.trainer(
        folder, rows, module=TooLarge(), strategy=strategy, auto_find_batch_size=True, per_device_train_batch_size=8,
        num_train_epochs=1,
    )  # fmt: skip
    made.train()
    return made._train_batch_size, made.state.global_step, tm.history(made)


@pytest.mark.parametrize("strategy", [slow("ddp"), "zero3"])
def test_a_batch_that_fits_is_found(tmp_path, strategy):
    found = run(2, halved, str(tmp_path), strategy)
    size, steps, losses = found[0]
    assert size <= 2 and steps == 16 // size // 2 and found[0] == found[1] and all(loss > 0 for loss in losses)


class Collects:
    """Makes batches of rows, and remembers which ones: each has another first token pair."""

    def __init__(self):
        self.read = []

    def __call__(self, rows):
        import transformers

        self.read += [tuple(row["input_ids"].tolist()) for row in rows]
        return transformers.default_data_collator(rows)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def ordered(folder, sampling, stream=False, **changes):
    import trainer_models as tm

    rows = tm.data(16)
    collects = Collects()
    made = tm.trainer(
        folder, Stream(rows) if stream else rows, data_collator=collects, strategy="zero2", num_train_epochs=1,
        train_sampling_strategy=sampling, per_device_train_batch_size=2, **({"max_steps": 4} if stream else {}),
    )  # fmt: skip
    made.train()
    index = {tuple(row["input_ids"].tolist()): n for n, row in enumerate(rows)}
    return [index[row] for row in collects.read], tm.history(made), made.state.global_step


@pytest.mark.parametrize("sampling", ["random", slow("sequential"), slow("group_by_length"), "batch_rebalance"])
def test_every_sample_once_in_an_epoch(tmp_path, sampling):
    (first, losses, steps), (second, others, _) = run(2, ordered, str(tmp_path), sampling)
    assert losses == others and steps == 4
    assert sorted(first + second) == list(range(16))


def test_streams(tmp_path):
    (_, losses, steps), (_, others, _) = run(2, ordered, str(tmp_path), "random", True)
    assert losses == others and steps == 4


def noisy(folder, strategy):
    import trainer_models as tm

    made = tm.trainer(folder, tm.data(8), strategy=strategy, neftune_noise_alpha=5.0)
    made.train()
    return tm.history(made), tm.values(made.model), len(made.model.get_input_embeddings()._forward_hooks)


@pytest.mark.parametrize("strategy", [slow("ddp"), "zero3"])
def test_noise_on_embeddings(tmp_path, strategy):
    first, second = run(2, noisy, str(tmp_path), strategy)
    assert first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def elsewhere(folder, kind):
    import trainer_models as tm
    from shardwise.errors import ShardwiseError

    model = tm.model()
    if kind == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif kind == "DistributedDataParallel":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "shardwise":
        import shardwise

        shardwise.fully_shard(model, strategy="zero3")
    try:
        made = tm.trainer(folder, tm.data(8), module=model, strategy="zero3")
        made.train()
    except ShardwiseError as error:
        return str(error)
    return tm.history(made)


@pytest.mark.parametrize("kind", ["fully_shard", "DistributedDataParallel"])
def test_models_that_others_have_split_are_refused(tmp_path, kind):
    for message in run(2, elsewhere, str(tmp_path), kind):
        assert ("DTensors" if kind == "fully_shard" else kind) in message and "fix:" in message


def test_a_model_that_is_sharded_here_already(tmp_path):
    first, second = run(2, elsewhere, str(tmp_path), "shardwise")
    assert first == second == run(2, elsewhere, str(tmp_path), "plain")[0]


def subclassed(folder):
    """A Trainer of somebody else, whose arguments know no strategy."""
    import transformers

    import trainer_models as tm
    from shardwise.transformers import ShardwiseMixin

    class Theirs(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Mine(ShardwiseMixin, Theirs):
        strategy = "zero3"

    settings = {k: v for k, v in vars(tm.arguments(folder)).items() if k in ("learning_rate", "weight_decay")}
    args = transformers.TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=1, report_to=[], disable_tqdm=True, logging_steps=1,
        save_strategy="no", train_sampling_strategy="sequential", seed=3, num_train_epochs=1, **settings,
    )  # fmt: skip
    made = Mine(tm.model(), args, train_dataset=tm.data(8))
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    return str(made.accelerator.strategy.preset), tm.history(made)


def test_a_subclass_of_somebody_else(tmp_path):
    first, second = run(2, subclassed, str(tmp_path))
    assert first == second and first[0] == "zero3" and len(first[1]) == 4
