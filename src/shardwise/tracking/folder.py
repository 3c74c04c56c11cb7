"""What trackers share that write plain files into a folder of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shardwise.errors import TrackerError
from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.values import settings, strict


class FolderTracker(ClientTracker):
    """Writes into ``LOGGING_DIR/RUN_NAME``; the configuration as ``config.json``.

    Args:
        run_name: the folder's name, below ``logging_dir``.
        logging_dir: created if it is not there.
    """

    requires_logging_directory = True
    file_name: str
    """The file of values, or what stands for several."""

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str]) -> None:
        super().__init__(run_name)
        self.folder = Path(logging_dir) / run_name

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write ``config.json``; keys of an earlier run that are not in ``values`` stay.

        Raises:
            TrackerError: the file cannot be written, or the one that is there is no JSON object.
        """
        path = self.folder / "config.json"
        old = {}
        try:
            if path.exists():
                old = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(old, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise TrackerError(
                f"the configuration of an earlier run cannot be read: {error}", where=str(path), fix="move it away"
            ) from error
        text = json.dumps(strict(old | settings(values, self.name)), indent=2, allow_nan=False) + "\n"
        part = path.with_name("config.json.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Not possible in such files.

        Raises:
            TrackerError: always.
        """
        raise self._no("images")

    def log_table(self, table_name: str, *args: Any, **kwargs: Any) -> None:
        """Not possible in such files.

        Raises:
            TrackerError: always.
        """
        raise self._no("tables")

    def _no(self, what: str) -> TrackerError:
        return TrackerError(
            f"{self.file_name} cannot hold {what}",
            where=f"tracker '{self.name}'",
            fix="use a tracker that shows them (tensorboard, wandb), or save a file and log its path",
        )


def cannot_write(path: Path, error: OSError) -> TrackerError:
    """The error for a file that could not be written."""
    return TrackerError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="choose a project_dir that this user can write to, on a disk with room",
    )
