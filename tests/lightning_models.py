"""LightningModules, and what the ranks of ``test_lightning.py`` do with them. Imported where Lightning is wanted."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from lightning_oracle import GAN, Scaled, data, make, noise
from models import whole
from shardwise.lightning import ShardwiseStrategy, export_checkpoint  # noqa: F401  (tests take it from here)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Lit(lightning.LightningModule):
    """Trains what ``lightning_oracle.train`` trains."""

    def __init__(self, lr: float = 1e-2, kind: str = "adamw") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net, self.scale = make(), nn.Parameter(torch.ones(()))
        self.losses: list[float] = []
        self.reduces: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).float(), y)
        self.losses.append(loss.item())
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        counted = shardwise.stats().comm.get("reduce")
        self.reduces.append(0 if counted is None else counted.calls)

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("val", F.cross_entropy((self.net(x) * self.scale).float(), y), sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test", F.cross_entropy(self(batch[0]).float(), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LateLit(Lit):
    """Has its layers from ``configure_model`` on."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            self.net = make(seed=None)


class LitGAN(lightning.LightningModule):
    """Trains what ``lightning_oracle.train_gan`` trains: two optimizers, each stepped by hand, with clipping."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.gan = None
        both = GAN()
        self.generator, self.critic, self.heat = both.generator, nn.ModuleList([both.critic]), both.heat

    def training_step(self, batch: Any, index: int) -> None:
        (x,) = batch
        z = noise(x)
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_generator)
        fooled = F.softplus(-self.critic[0](self.generator(z)) * self.heat).mean()
        for_generator.zero_grad()
        self.manual_backward(fooled)
        self.clip_gradients(for_generator, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        for_generator.step()
        self.untoggle_optimizer(for_generator)
        self.toggle_optimizer(for_critic)
        told = F.softplus(self.critic[0](self.generator(z).detach())).mean() + F.softplus(-self.critic[0](x)).mean()
        for_critic.zero_grad()
        self.manual_backward(told)
        for_critic.step()
        self.untoggle_optimizer(for_critic)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.critic[0](batch[0]).mean() * self.heat, sync_dist=True)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam([*self.generator.parameters(), self.heat], lr=1e-2),
            torch.optim.Adam(self.critic.parameters(), lr=1e-2),
        )


def trainer(strategy: Any, size: int, folder: str, **settings: Any) -> lightning.Trainer:
    given = ShardwiseStrategy(strategy) if isinstance(strategy, str) else strategy
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 2, "enable_checkpointing": False, **settings}
    return lightning.Trainer(
        strategy=given, accelerator="cpu", devices=size, default_root_dir=folder, **quiet, **settings
    )


def loader(size: int, rows: int = 8, of: Any = None) -> DataLoader[Any]:
    """As many samples per step, however many ranks there are."""
    return DataLoader(TensorDataset(*(of or data())), batch_size=rows // size)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in whole(model).items()}


def fit(
    strategy: Any, size: int, folder: str, module: type[Any] = Lit, path: str | None = None, **settings: Any
) -> Any:
    """Train; returns the losses of this rank, the weights and the last validation's figure."""
    torch.manual_seed(0)
    model, run = module(), trainer(strategy, size, folder, **settings)
    batches = (loader(size), loader(size)) if module is not LitGAN else (loader(size, of=data()[:1]),) * 2
    run.fit(model, *batches, ckpt_path=path)
    return getattr(model, "losses", []), values(model), run.callback_metrics["val"].item()


# --- Fabric ----------------------------------------------------------------------------------------------
def fabric_loop(strategy: Any, size: int, window: int, folder: str, kind: str, start: int = 0, stop: int = 12) -> Any:
    """Steps ``start`` to ``stop`` of what ``lightning_oracle.train`` does in two epochs; clipped."""
    fabric = lightning.Fabric(
        strategy=ShardwiseStrategy(strategy, state_dict_type=kind), accelerator="cpu", devices=size
    )
    fabric.launch()
    model, optimizer = Scaled(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    same = model
    model, optimizer = fabric.setup(model, optimizer)
    assert model.module is same
    batches = fabric.setup_dataloaders(loader(size))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    state = {"schedule": schedule, "optimizer": optimizer, "model": model, "step": 0}
    if start:
        left = fabric.load(f"{folder}/step_{start}", {key: state[key] for key in ("model", "optimizer", "schedule")})
        assert left == {"step": start}
    step, reduces = 0, []
    shardwise.reset_stats()
    for _ in range(2):
        for x, y in batches:
            step += 1
            if start < step <= stop:
                last = step % window == 0
                with fabric.no_backward_sync(model, enabled=not last):
                    fabric.backward(F.cross_entropy(model(x).float(), y) / window)
                counted = shardwise.stats().comm.get("reduce")
                reduces.append(0 if counted is None else counted.calls)
                if last:
                    fabric.clip_gradients(model, optimizer, max_norm=0.3)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                state["step"] = step
                if step == 6:
                    fabric.save(f"{folder}/step_6", state)
    return values(same), reduces
