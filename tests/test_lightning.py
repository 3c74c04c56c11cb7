"""Lightning's Trainer and Fabric on Shardwise: the numbers of one plain process, whatever the strategy.

Lightning takes seconds of a core to import, so it is imported by the ranks of the pools alone.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import lightning_oracle as oracle
import shardwise
from models import PRESETS, assert_close, assert_same
from ranks import run
from slowly import slow

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")


def of_models(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function of ``lightning_models``, which the test process does not import."""
    import lightning_models

    return getattr(lightning_models, name)(*args, **kwargs)


def fits(strategy: Any, size: int, folder: str, settings: dict[str, Any]) -> Any:
    return of_models("fit", strategy, size, folder, **settings)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulated and clipped": (
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        {"window": 2, "norm": 0.3},
    ),
    "clipped by value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"value": 0.01},
    ),
}


@pytest.mark.parametrize("case", [slow("plain"), "accumulated and clipped", slow("clipped by value")])
def test_numbers_are_those_of_one_process(case, tmp_path):
    settings, plain = CASES[case]
    expected, first = oracle.train(**plain), None
    for strategy in PRESETS:
        mine, other = run(2, fits, strategy, 2, str(tmp_path), settings)
        assert_same(mine[1], other[1])
        assert mine[2] == other[2], "a figure logged with sync_dist is the same on every rank"
        assert_close(mine[1], expected)
        first = first or mine
        assert_same(mine[1], first[1])
        assert mine[0] == first[0]


def test_one_rank(tmp_path):
    ((losses, weights, _),) = run(1, fits, "zero3", 1, str(tmp_path), CASES["accumulated and clipped"][0])
    assert_close(weights, oracle.train(**CASES["accumulated and clipped"][1]))
    assert len(losses) == 12


def windows(strategy: str, folder: str, together: bool) -> list[int]:
    models = __import__("lightning_models")
    model = models.Lit()
    shardwise.reset_stats()
    given = models.ShardwiseStrategy(strategy, sync_each_batch=together)
    run_ = models.trainer(given, 2, folder, max_epochs=1, accumulate_grad_batches=3)
    run_.fit(model, models.loader(2))
    return [after - before for before, after in zip([0, *model.reduces], model.reduces, strict=False)]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_nothing_is_reduced_before_a_window_ends(strategy, tmp_path):
    each, _ = run(2, windows, strategy, str(tmp_path), False)
    assert [count > 0 for count in each] == [False, False, True] * 2
    each, _ = run(2, windows, strategy, str(tmp_path), True)
    assert all(each)


def precisions(strategy: str, folder: str, which: str) -> Any:
    models = __import__("lightning_models")
    settings: dict[str, Any] = {"precision": which}
    if which == "16-mixed":  # on a CPU the Trainer takes bf16 in its place, unless it is given the plugin
        from lightning.pytorch.plugins.precision import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=4)
        settings = {"plugins": MixedPrecision("16-mixed", "cpu", scaler), "gradient_clip_val": 0.3}
    return models.fit(strategy, 2, folder, **settings)


@pytest.mark.parametrize("which", ["bf16-mixed", slow("bf16-true"), slow("16-mixed")])
def test_precisions(which, tmp_path):
    expected, first = oracle.train(dtype=torch.bfloat16), None
    for strategy in PRESETS:
        (losses, weights, _), _ = run(2, precisions, strategy, str(tmp_path), which)
        first = first or weights
        assert_same(weights, first)
        assert losses[-1] < losses[0]
    if which == "bf16-mixed":
        assert_close(first, expected, tol=3e-2)
    if which != "16-mixed":  # there the first steps overflow and are skipped
        assert_close(first, oracle.train(), tol=6e-2)


def gans(strategy: str, folder: str) -> Any:
    models = __import__("lightning_models")
    return models.fit(strategy, 2, folder, module=models.LitGAN)


def test_two_optimizers_by_hand(tmp_path):
    expected, first = oracle.train_gan(), None
    for strategy in PRESETS:
        (_, weights, figure), _ = run(2, gans, strategy, str(tmp_path))
        assert_close(weights, expected)
        first = first or (weights, figure)
        assert_same(weights, first[0])
        assert figure == first[1]


# --- checkpoints -----------------------------------------------------------------------------------------
def saving(kind: str) -> dict[str, Any]:
    """Settings of a Trainer that saves twice in its 12 steps."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    each = ModelCheckpoint(every_n_train_steps=6, save_top_k=-1, filename="{step}", save_last=kind == "sharded")
    return {"enable_checkpointing": True, "callbacks": [each], "gradient_clip_val": 0.3}


def trained(preset: str, size: int, folder: str, kind: str, path: str | None = None) -> Any:
    models = __import__("lightning_models")
    given = models.ShardwiseStrategy(preset, state_dict_type=kind)
    return models.fit(given, size, folder, path=path, **saving(kind))


@pytest.mark.parametrize("kind", ["sharded", slow("full")])
def test_resumes_on_other_ranks_under_another_strategy(kind, tmp_path):
    (losses, weights, _), _ = run(2, trained, "zero3", 2, str(tmp_path / "whole"), kind)
    path = tmp_path / "whole" / "checkpoints" / "step=6.ckpt"
    assert path.is_dir() == (kind == "sharded")
    (again, same, _), _ = run(2, trained, "zero1", 2, str(tmp_path / "two"), kind, str(path))
    assert again == losses[6:]
    assert_same(same, weights)
    (_, same, _) = run(1, trained, "ddp", 1, str(tmp_path / "one"), kind, str(path))[0]
    assert_close(same, weights)


def files(folder: str) -> dict[str, Any]:
    """Checkpoints of each kind that a plain Trainer, or none, reads."""
    models = __import__("lightning_models")

    import torch.distributed as dist

    torch.manual_seed(0)
    model = models.Lit(lr=0.02)
    sharded = models.trainer("zero3", 2, folder, max_epochs=1)
    sharded.fit(model, models.loader(2))
    sharded.save_checkpoint(f"{folder}/all.ckpt")
    sharded.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
    trained = models.values(model)
    found: dict[str, Any] = {"trained": trained, "figure": sharded.validate(model, models.loader(2), verbose=False)}
    given = models.ShardwiseStrategy("zero3", state_dict_type="full")
    other = models.Lit()
    full = models.trainer(given, 2, folder, max_epochs=1)
    found["full"] = full.validate(other, models.loader(2), ckpt_path=f"{folder}/weights.ckpt", verbose=False)
    full.save_checkpoint(f"{folder}/full.ckpt", weights_only=True)
    if dist.get_rank() == 0:
        models.export_checkpoint(f"{folder}/all.ckpt", f"{folder}/exported.ckpt")
        for name in ("exported", "full"):
            fresh = models.Lit.load_from_checkpoint(f"{folder}/{name}.ckpt")
            found[f"{name} values"] = {k: v.detach().clone() for k, v in fresh.state_dict().items()}
            found[f"{name} lr"] = fresh.hparams["lr"]
    return found


def test_files_for_load_from_checkpoint(tmp_path):
    found, other = run(2, files, str(tmp_path))
    assert found["figure"] == other["figure"] == found["full"]
    assert_same(found["exported values"], found["trained"])
    assert_same(found["full values"], found["trained"])
    assert found["exported lr"] == 0.02 and found["full lr"] == 1e-2
    assert not list((tmp_path / "weights.ckpt").glob("*optimizer*"))


def from_plain(folder: str) -> Any:
    """Lightning's own strategy saves; ours goes on, and the other way round."""
    models = __import__("lightning_models")
    import lightning

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def go(strategy: Any, epochs: int, path: str | None = None) -> Any:
        torch.manual_seed(0)
        model = models.Lit()
        own = lightning.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, enable_checkpointing=False,
            default_root_dir=folder, **quiet,
        )  # fmt: skip
        own.fit(model, models.loader(2), ckpt_path=path)
        return own, models.values(model)

    def full(preset: str) -> Any:
        return models.ShardwiseStrategy(preset, state_dict_type="full")

    first, _ = go("ddp", 1)
    first.save_checkpoint(f"{folder}/ddp.ckpt")
    second, _ = go(full("zero3"), 1)
    second.save_checkpoint(f"{folder}/zero3.ckpt")
    _, whole = go("ddp", 2)
    return whole, go(full("zero2"), 2, f"{folder}/ddp.ckpt")[1], go("ddp", 2, f"{folder}/zero3.ckpt")[1]


def test_files_of_lightnings_own_strategies_both_ways(tmp_path):
    (whole, forth, back), _ = run(2, from_plain, str(tmp_path))
    assert_close(forth, whole)
    assert_close(back, whole)


# --- Fabric ----------------------------------------------------------------------------------------------
def of_fabric(*args: Any) -> Any:
    return of_models("fabric_loop", *args)


def test_fabric(tmp_path):
    expected, first = oracle.train(window=2, norm=0.3, shuffled=False), None
    for strategy in PRESETS:
        (weights, reduces), _ = run(2, of_fabric, strategy, 2, 2, str(tmp_path / strategy), "sharded")
        assert_close(weights, expected)
        first = first or weights
        assert_same(weights, first)
        assert reduces[0] == 0 and reduces[1] == reduces[2] > 0


@pytest.mark.parametrize("kind", ["sharded", slow("full")])
def test_fabric_goes_on(kind, tmp_path):
    (weights, _), _ = run(2, of_fabric, "zero3", 2, 1, str(tmp_path), kind)
    assert (tmp_path / "step_6").is_dir() == (kind == "sharded")
    (same, _), _ = run(2, of_fabric, "zero1", 2, 1, str(tmp_path), kind, 6)
    assert_same(same, weights)
    ((same, _),) = run(1, of_fabric, "ddp", 1, 1, str(tmp_path), kind, 6)
    assert_close(same, weights)


# --- other calls -----------------------------------------------------------------------------------------
def calls(folder: str) -> dict[str, Any]:
    models = __import__("lightning_models")
    model = models.LateLit()
    run_ = models.trainer("zero3", 2, folder, max_epochs=1)
    run_.fit(model, models.loader(2))
    strategy, me = run_.strategy, run_.global_rank
    tested = run_.test(model, models.loader(2), verbose=False)
    predicted = run_.predict(model, models.loader(2))
    run_.fit(model, models.loader(2))  # again, with what is sharded already
    strategy.barrier()
    return {
        "tested": tested,
        "rows": [tuple(rows.shape) for rows in predicted],
        "broadcast": strategy.broadcast({"from": me}, src=1),
        "reduced": [strategy.reduce(torch.tensor(1.0 + me), reduce_op=op).item() for op in ("mean", "sum")],
        "gathered": strategy.all_gather(torch.tensor([me])).tolist(),
        "decided": [strategy.reduce_boolean_decision(me == 0, all=every) for every in (True, False)],
        "norm": float(sum(v.norm() for v in models.values(model).values())),
    }


def test_evaluation_and_collectives(tmp_path):
    mine, other = run(2, calls, str(tmp_path))
    assert mine == other
    assert mine["rows"] == [(4, 3)] * 6 and mine["broadcast"] == {"from": 1}
    assert mine["reduced"] == [1.5, 3.0] and mine["gathered"] == [[0], [1]] and mine["decided"] == [False, True]


def mistakes(folder: str) -> list[str]:
    """What each of these says, before anything is trained."""
    models = __import__("lightning_models")
    import lightning
    from lightning.pytorch.plugins import AsyncCheckpointIO
    from lightning.pytorch.plugins.precision import FSDPPrecision

    from shardwise.errors import ShardwiseError
    from shardwise.lightning import packages

    strategy = models.ShardwiseStrategy

    def twice() -> None:
        model = models.Lit()
        for preset in ("zero2", "zero3"):
            models.trainer(preset, 2, folder, max_epochs=1).fit(model, models.loader(2))

    def changed() -> None:
        class Changing(models.Lit):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["state_dict"].pop("scale")

        run_ = models.trainer("zero3", 2, folder, max_epochs=1)
        run_.fit(Changing(), models.loader(2))
        run_.save_checkpoint(f"{folder}/changed.ckpt")

    def lbfgs() -> None:
        class Whole(models.Lit):
            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters())

        models.trainer("zero3", 2, folder).fit(Whole(), models.loader(2))

    def old() -> None:
        class Old:
            __version__, __name__ = "2.1.3", "lightning"

        packages._check(Old)

    tries = {
        "no argument 'find_unused'": lambda: strategy("zero3", find_unused=True),
        "did you mean 'units'": lambda: strategy("zero3", unit="Block"),
        "zero4": lambda: strategy("zero4"),
        "state_dict_type='local'": lambda: strategy("zero3", state_dict_type="local"),
        "FSDPPrecision": lambda: models.trainer("zero3", 2, folder, plugins=[FSDPPrecision("bf16-mixed")]),
        "AsyncCheckpointIO": lambda: models.trainer("zero3", 2, folder, plugins=[AsyncCheckpointIO()]),
        "transformer-engine": lambda: strategy(precision_plugin=type("TE", (), {"precision": "transformer-engine"})()),
        "is sharded already, with 'zero2'": twice,
        "go from the shards to the disk": changed,
        "LBFGS": lbfgs,
        "versions 2.5 to 2.6 are": old,
        "Lightning was told of 4": lambda: models.trainer("zero3", 4, folder).fit(models.Lit(), models.loader(2)),
        "there is no such checkpoint": lambda: models.trainer("zero3", 2, folder).fit(
            models.Lit(), models.loader(2), ckpt_path=f"{folder}/nowhere"
        ),
        "no part in checkpoints": lambda: lightning.Fabric(
            strategy=strategy("zero3"), accelerator="cpu", devices=2,
            plugins=[lightning.fabric.plugins.TorchCheckpointIO()],
        ),
    }  # fmt: skip
    odd = []
    for text, attempt in tries.items():
        try:
            attempt()
        except ShardwiseError as error:
            if text not in str(error):
                odd.append(f"{text}: {error}")
        else:
            odd.append(f"{text}: no error")
    return odd


def test_mistakes_are_told_before_training(tmp_path):
    assert run(2, mistakes, str(tmp_path)) == [[], []]
