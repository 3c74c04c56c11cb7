"""DVCLive."""

from __future__ import annotations

from typing import Any

from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import flat, left_out, plain, settings, whole_step


class DVCLiveTracker(ClientTracker):
    """DVCLive. Numbers and strings become metrics; dicts as names joined by ``/``.

    Args:
        run_name: not used: DVCLive has folders, named by ``dir`` among ``kwargs``.
        live: a ``dvclive.Live`` that the script made.
        kwargs: for ``dvclive.Live``, if there is no ``live``.
    """

    name = "dvclive"
    live = ClientTracker.tracker

    def __init__(self, run_name: str | None = None, live: Any = None, **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self._given = live

    @on_main_process
    def start(self) -> None:
        self._run = self._given if self._given is not None else client(self.name).Live(**self.init_kwargs)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as parameters."""
        self.tracker.log_params(settings(values, self.name))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log metrics, and end the step: a next call without ``step`` is one further.

        Args:
            kwargs: for ``Live.log_metric``.
        """
        step, metric = whole_step(step, self.name), client(self.name, "dvclive.plots").Metric
        if step is not None:
            self.tracker.step = step
        for key, value in flat(plain(values, self.name)).items():
            if metric.could_log(value):
                self.tracker.log_metric(key, value, **kwargs)
            else:
                left_out(self.name, key, value, "numbers and texts")
        self.tracker.next_step()

    @on_main_process
    def finish(self) -> None:
        """End the experiment."""
        if self._run is not None:
            self._run.end()
            self._run = None
