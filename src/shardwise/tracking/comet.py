"""Comet."""

from __future__ import annotations

from typing import Any

from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import flat, is_number, left_out, plain, settings, whole_step


class CometMLTracker(ClientTracker):
    """Comet. The API key comes from its own configuration file or environment.

    Numbers, and dicts of numbers, become metrics, strings *other* values of the experiment.

    Args:
        run_name: the project.
        kwargs: for ``comet_ml.start``.
    """

    name = "comet_ml"
    writer = ClientTracker.tracker

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)

    @on_main_process
    def start(self) -> None:
        self._run = client(self.name).start(**{"project_name": self.run_name, **self.init_kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as parameters of the experiment."""
        self.tracker.log_parameters(settings(values, self.name))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            kwargs: for ``log_metric``, ``log_metrics`` (dicts) or ``log_other`` (texts).
        """
        step = whole_step(step, self.name)
        if step is not None:
            self.tracker.set_step(step)
        for key, value in plain(values, self.name).items():
            if is_number(value):
                value = int(value) if isinstance(value, bool) else value  # a bool would become a text
                self.tracker.log_metric(key, value, step=step, **kwargs)
            elif isinstance(value, str):
                self.tracker.log_other(key, value, **kwargs)
            elif isinstance(value, dict) and all(is_number(v) for v in flat(value).values()):
                self.tracker.log_metrics(flat({key: value}), step=step, **kwargs)
            else:
                left_out(self.name, key, value, "numbers, texts and dicts of numbers")

    @on_main_process
    def finish(self) -> None:
        """End the experiment; waits until the client has sent or written what is left."""
        if self._run is not None:
            self._run.end()
            self._run = None
