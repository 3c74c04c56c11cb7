"""ClearML."""

from __future__ import annotations

import os
from typing import Any

from shardwise.errors import TrackerError
from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import flat, is_number, left_out, pictures, plain, settings, whole_step


class ClearMLTracker(ClientTracker):
    """ClearML. A task that the script opened itself is used, and left open at the end.

    Numbers, and dicts of numbers, become scalars: ``eval_``, ``test_`` and ``train_`` in front of a name say in which
    series (``train`` otherwise). Without a ``step`` they are single values of the task.

    Args:
        run_name: the project and the task, unless ``CLEARML_PROJECT``, ``CLEARML_TASK`` or ``kwargs`` name them.
        kwargs: for ``Task.init``.
    """

    name = "clearml"
    task = ClientTracker.tracker
    _ours = False

    def __init__(self, run_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)

    @on_main_process
    def start(self) -> None:
        task_class = client(self.name).Task
        self._run = task_class.current_task()
        self._ours = self._run is None
        if self._ours:
            names = {
                "project_name": os.environ.get("CLEARML_PROJECT", self.run_name),
                "task_name": os.environ.get("CLEARML_TASK", self.run_name),
            }
            self._run = task_class.init(**{**names, **self.init_kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> Any:
        """Keep the configuration as that of the task."""
        return self.tracker.connect_configuration(settings(values, self.name))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers.

        Args:
            kwargs: for ``report_scalar``, or for ``report_single_value`` without a ``step``.
        """
        report, step = self.tracker.get_logger(), whole_step(step, self.name)
        for key, value in flat(plain(values, self.name)).items():
            if not is_number(value):
                left_out(self.name, key, value, "numbers and dicts of numbers")
            elif step is None:
                report.report_single_value(name=key, value=value, **kwargs)
            else:
                title, series = _title_and_series(key)
                report.report_scalar(title=title, series=series, value=value, iteration=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: names and images: an array (height × width × channels), a PIL image, or a list of these.
            kwargs: for ``report_image``.
        """
        report, step = self.tracker.get_logger(), whole_step(step, self.name)
        for key, images in values.items():
            title, series = _title_and_series(key)
            many = list(pictures(images)) if isinstance(images, (list, tuple)) else [images]
            for i, image in enumerate(many):
                one = series if len(many) == 1 else f"{series}/{i}"
                report.report_image(title=title, series=one, iteration=step, image=image, **kwargs)

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
        """Log a table.

        Args:
            table_name: its name, with a series in front as for numbers.
            columns, data: names of columns, and rows; without ``columns`` the first row has the names. Or
            dataframe: a pandas one.
            kwargs: for ``report_table``.

        Raises:
            TrackerError: neither ``data`` nor ``dataframe``.
        """
        if dataframe is None and data is None:
            raise TrackerError(
                "log_table got neither data nor a dataframe", where="tracker 'clearml'", fix="give one of them"
            )
        table = dataframe if dataframe is not None else ([columns] if columns else []) + list(data or [])
        title, series = _title_and_series(table_name)
        self.tracker.get_logger().report_table(
            title=title, series=series, table_plot=table, iteration=whole_step(step, self.name), **kwargs
        )

    @on_main_process
    def finish(self) -> None:
        """Close the task, if ``start`` opened it."""
        if self._run is not None and self._ours:
            self._run.close()
        self._run = None


def _title_and_series(name: str) -> tuple[str, str]:
    series, _, title = name.partition("_")
    return (title, series) if title and series in ("eval", "test", "train") else (name, "train")
