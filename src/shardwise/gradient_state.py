"""Where an Accelerator is in its accumulation window, as scripts and other libraries ask for it."""

from __future__ import annotations

from typing import Any, cast

from shardwise.stepping import Steps


class GradientState:
    """Where an Accelerator is in its accumulation window.

    ``GradientState()`` shows the Accelerator that was made last; before the first one, windows of one micro-batch,
    shared by all who ask.

    Args:
        gradient_accumulation_plugin: its settings take the place of the present ones.
        steps: an Accelerator's own, in place of the last one's.
    """

    def __init__(self, gradient_accumulation_plugin: Any = None, *, steps: Steps | None = None) -> None:
        self._of = Steps.newest() if steps is None else steps
        if gradient_accumulation_plugin is not None:
            plugin = gradient_accumulation_plugin
            self._of.length = plugin.num_steps or 1
            self._of.sync_with_dataloader = plugin.sync_with_dataloader
            self._of.sync_each_batch = plugin.sync_each_batch

    @property
    def initialized(self) -> bool:
        return True

    @property
    def sync_gradients(self) -> bool:
        """This micro-batch is the last before an optimizer step. Setting it says so for a loop that counts itself."""
        return self._of.sync_gradients

    @sync_gradients.setter
    def sync_gradients(self, value: bool) -> None:
        self._of.sync_gradients = value

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        """What transformers' ``Trainer`` calls, which counts micro-batches by itself."""
        self.sync_gradients = sync_gradients

    @property
    def num_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self._of.length

    @property
    def adjust_scheduler(self) -> bool:
        """Schedulers follow the optimizer's steps, whatever the window's length."""
        return True

    @property
    def sync_with_dataloader(self) -> bool:
        """The end of a dataloader is a boundary."""
        return self._of.sync_with_dataloader

    @property
    def plugin_kwargs(self) -> dict[str, Any]:
        """The settings, as a :class:`~shardwise.utils.GradientAccumulationPlugin` names them."""
        return {
            "num_steps": self.num_steps,
            "adjust_scheduler": self.adjust_scheduler,
            "sync_with_dataloader": self.sync_with_dataloader,
            "sync_each_batch": self._of.sync_each_batch,
        }

    @property
    def is_xla_gradients_synced(self) -> bool:
        """Always: there is no XLA here."""
        return True

    # --- dataloaders -----------------------------------------------------------------------
    @property
    def active_dataloader(self) -> Any:
        """The prepared dataloader being read, the innermost one; ``None`` outside."""
        return self._of.loader

    @property
    def in_dataloader(self) -> bool:
        return self.active_dataloader is not None

    @property
    def dataloader_references(self) -> list[Any]:
        return [None, *self._of.loaders]

    def _add_dataloader(self, dataloader: Any) -> None:
        """``dataloader`` is being read from now on: for loaders of a script's own, see ``DataLoaderStateMixin``."""
        self._of.loader_begins(cast(Any, dataloader))

    def _remove_dataloader(self, dataloader: Any) -> None:
        self._of.loader_ends(cast(Any, dataloader))

    @property
    def end_of_dataloader(self) -> bool:
        """The batch in hand is the last."""
        loader = self.active_dataloader
        return loader is not None and bool(loader.end_of_dataloader)

    @property
    def remainder(self) -> int:
        """How many samples of the last global batch are real, where some are repeated; -1 if none is, or unknown."""
        loader = self.active_dataloader
        if loader is None or not loader.end_of_dataloader:
            return -1
        if not callable(getattr(loader, "tail", None)):  # one of a script's own
            return int(loader.remainder)
        tail = loader.tail()
        return tail.real if tail is not None and tail.real != tail.total else -1

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\nAt end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\nGradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        Steps.forget_newest()
