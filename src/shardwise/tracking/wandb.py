"""Weights & Biases, and the two clients that were made in its shape: Trackio and SwanLab."""

from __future__ import annotations

from typing import Any

from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import pictures, plain, settings, whole_step


class _Run(ClientTracker):
    """``init(project=...)`` opens a run, which has ``config.update``, ``log`` and ``finish``.

    Values that are no numbers go to the client as they are: its own images, tables and histograms, for example.
    """

    run = ClientTracker.tracker

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)

    @on_main_process
    def start(self) -> None:
        self._run = client(self.name).init(**{"project": self.run_name, **self.init_kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as that of the run. Values that are no numbers, texts, lists or dicts become texts."""
        self.tracker.config.update(settings(values, self.name))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            kwargs: for the client's ``log``.
        """
        self.tracker.log(plain(values, self.name), step=whole_step(step, self.name), **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: names and lists of arrays (height × width × channels) or PIL images.
            kwargs: for the client's ``log``.
        """
        image = client(self.name).Image
        self.log({key: [image(one) for one in pictures(images)] for key, images in values.items()}, step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """End the run; waits until the client has sent or written what is left."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class WandBTracker(_Run):
    """Weights & Biases.

    Args:
        run_name: the project.
        kwargs: for ``wandb.init``.
    """

    name = "wandb"

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as that of the run, over what is there."""
        self.tracker.config.update(settings(values, self.name), allow_val_change=True)

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a ``wandb.Table``.

        Args:
            table_name: its name.
            columns, data: names of columns, and rows; or
            dataframe: a pandas one.
            kwargs: for ``log``.
        """
        table = client(self.name).Table(columns=columns, data=data, dataframe=dataframe)
        self.log({table_name: table}, step, **kwargs)


class TrackioTracker(_Run):
    """Trackio, which keeps its data in a local database unless it is told of a space.

    Args:
        run_name: the project.
        kwargs: for ``trackio.init``.
    """

    name = "trackio"

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images; several of one name as ``NAME/0``, ``NAME/1`` and so on.

        Args:
            values: names and lists of arrays (height × width × channels) or PIL images.
            kwargs: for the client's ``log``.
        """
        image, made = client(self.name).Image, {}
        for key, images in values.items():
            many = pictures(images)
            made.update({key if len(many) == 1 else f"{key}/{i}": image(one) for i, one in enumerate(many)})
        self.log(made, step, **kwargs)


class SwanLabTracker(_Run):
    """SwanLab. Strings become its texts.

    Args:
        run_name: the project.
        kwargs: for ``swanlab.init``.
    """

    name = "swanlab"

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            kwargs: for the client's ``log``.
        """
        text = client(self.name).Text
        super().log(
            {k: text(v) if isinstance(v, str) else v for k, v in plain(values, self.name).items()}, step, **kwargs
        )
