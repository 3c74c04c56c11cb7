"""The Accelerator that a Trainer has: what a loop that counts its own windows needs to be different."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import BatchRebalanceSampler

from shardwise.accelerator import Accelerator
from shardwise.data_loader import PreparedLoader, prepare_data_loader
from shardwise.engine.hooks import engine_of
from shardwise.engine.move import move
from shardwise.strategy import Strategy


class TrainerAccelerator(Accelerator):
    """An :class:`~shardwise.Accelerator` for a loop that accumulates by itself and repeats its losses.

    Attributes:
        repeats: how often the loop repeats a batch's mean loss to give it its weight, whatever the batch's size.
        rows: samples that this rank has of the batch in hand; ``None`` if that is not known.
    """

    _is_led = False  # a Trainer saves on every rank
    repeats: int | None = None
    rows: int | None = None

    @property
    def _as_accelerate(self) -> bool:
        """A Trainer steps its schedule, and finds its place in the data, by itself."""
        return False

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
        *,
        strategy: str | Strategy | None = None,
    ) -> nn.Module:
        """A model that is evaluated may be trained later: its values stay as they are. Where parameters are whole it
        is only moved; the Trainer chooses the precision."""
        chosen = self.strategy if strategy is None else Strategy.parse(strategy)
        if not evaluation_mode or engine_of(model) is not None or chosen.is_auto or chosen.split_params:
            return super().prepare_model(model, device_placement, strategy=strategy)
        if self.device_placement if device_placement is None else device_placement:
            move(model, self.device)
        return model

    def prepare_data_loader(
        self, data_loader: DataLoader[Any], device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> PreparedLoader:
        """transformers' ``BatchRebalanceSampler`` has a rank's own batches already: they are read as they are."""
        if not isinstance(getattr(data_loader, "batch_sampler", None), BatchRebalanceSampler):
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        config = self.dataloader_config
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            watcher=self._steps,
        )
        self._loaders.add(prepared)
        return prepared

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """As :meth:`~shardwise.Accelerator.accumulate` does: gradients that are split are reduced each time, which
        keeps them split. The sum is the same."""
        engine = engine_of(model)
        return nullcontext() if engine is not None and engine.strategy.split_grads else super().no_sync(model)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """Every sample once. A mean that was repeated for a full batch counts as often as the batch has samples."""
        if self.rows is not None and self._repeated(input_data):
            input_data = input_data[: self.rows]
        return super().gather_for_metrics(input_data, use_gather_object)

    def _repeated(self, data: Any) -> bool:
        if not isinstance(data, torch.Tensor) or data.ndim != 1 or len(data) != self.repeats:
            return False
        return data.is_floating_point() and bool((data == data[0]).all())
