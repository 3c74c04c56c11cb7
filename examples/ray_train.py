"""A loop in Ray Train: sharded over its workers, and gone on with when a worker has died.

python examples/ray_train.py --workers 2 --kill-in 3

In epoch 3 a worker kills itself, once. Ray starts a new group of workers, which goes on from the checkpoint that was
reported last; the numbers are those of a run in which nobody died.
"""

import argparse
import os
import signal
import tempfile
from pathlib import Path

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, DistributedSampler

import shardwise
import shardwise.ray
from toy import Classifier, loss_of, spirals


def loop(config: dict) -> None:
    """What every worker does."""
    world = shardwise.init("cpu")  # in the process group that Ray has set up
    torch.manual_seed(0)
    model = shardwise.fully_shard(Classifier(), strategy=config["strategy"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = shardwise.ray.load(models=[model], optimizers=[optimizer])

    samples = spirals(480)
    mine = DistributedSampler(samples, world.size, world.rank)
    loader = DataLoader(samples, batch_size=32 // world.size, sampler=mine)
    for epoch in range(0 if found is None else found.state["epoch"] + 1, config["epochs"]):
        mine.set_epoch(epoch)
        for batch in loader:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        killed = Path(config["folder"]) / "killed"
        if epoch == config["kill_in"] and world.rank == world.size - 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        figures = {"loss": loss.item(), "epoch": epoch, "began_at": 0 if found is None else found.state["epoch"] + 1}
        shardwise.ray.report(figures, models=[model], optimizers=[optimizer], state={"epoch": epoch})


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--strategy", default="zero3")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--kill-in", type=int, default=-1, help="an epoch")
    parser.add_argument("--folder", default=None, help="Ray's storage")
    options = parser.parse_args(argv)

    folder = os.path.abspath(options.folder or tempfile.mkdtemp())
    if not ray.is_initialized():
        here = {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(":")])
        }
        ray.init(num_cpus=options.workers + 1, include_dashboard=False, runtime_env={"env_vars": here})
    trainer = TorchTrainer(
        loop,
        train_loop_config={
            "strategy": options.strategy, "epochs": options.epochs, "kill_in": options.kill_in, "folder": folder,
        },
        scaling_config=ScalingConfig(num_workers=options.workers),
        run_config=RunConfig(name="spirals", storage_path=folder, failure_config=FailureConfig(max_failures=1)),
    )  # fmt: skip
    result = trainer.fit()
    print(f"epoch {result.metrics['epoch']}, loss {result.metrics['loss']:.6f}, {result.checkpoint.path}")
    return {**result.metrics, "path": result.checkpoint.path}


if __name__ == "__main__":
    main()
