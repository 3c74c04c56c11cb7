"""A tracker that needs nothing: a file of comma-separated values for each name."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from shardwise.tracking.base import on_main_process
from shardwise.tracking.folder import FolderTracker, cannot_write
from shardwise.tracking.values import flat, is_number, left_out, plain, whole_step


class CSVTracker(FolderTracker):
    """Writes ``LOGGING_DIR/RUN_NAME/NAME.csv`` for each name, as DeepSpeed's CSV monitor does.

    ``/`` and spaces in a name become ``_`` in the file's. The first line is ``step,`` and the last part of the name;
    then each value has a line, which is in the file when ``log`` returns. Existing files are continued. Without a
    ``step``, calls are counted. Values are numbers, and dicts of numbers.

    Args:
        run_name: the folder's name, below ``logging_dir``.
        logging_dir: created if it is not there.
    """

    name = "csv"
    file_name = "a file of comma-separated values"

    @on_main_process
    def start(self) -> None:
        """Make the folder.

        Raises:
            TrackerError: it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        self._run = self.folder

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Append a line to the file of each name.

        Raises:
            TrackerError: a file cannot be written, or the tracker does not run.
        """
        folder: Path = self.tracker
        step = self._count(whole_step(step, self.name))
        for key, value in flat(plain(values, self.name)).items():
            if not is_number(value):
                left_out(self.name, key, value, "numbers and dicts of numbers")
                continue
            path = folder / f"{key.replace('/', '_').replace(' ', '_')}.csv"
            lines = io.StringIO()
            writer = csv.writer(lines, lineterminator="\n")
            try:
                with path.open("ab") as file:
                    if not file.tell():
                        writer.writerow(("step", key.rpartition("/")[2]))
                    writer.writerow((step, value))
                    file.write(lines.getvalue().encode())
            except OSError as error:
                raise cannot_write(path, error) from error

    @on_main_process
    def finish(self) -> None:
        """Nothing is open."""
        self._run = None
