"""A tracker that needs nothing: one line of JSON per call."""

from __future__ import annotations

import json
import os
import time
from typing import Any, BinaryIO

from shardwise.tracking.base import on_main_process
from shardwise.tracking.folder import FolderTracker, cannot_write
from shardwise.tracking.values import left_out, plain, strict, whole_step


class JSONLTracker(FolderTracker):
    """Writes ``LOGGING_DIR/RUN_NAME/metrics.jsonl`` and, from the configuration, ``config.json`` beside it.

    Each call of ``log`` is one object on one line: ``{"step": 3, "time": 1764000000.1, "values": {"loss": 0.5}}``.
    ``time`` is in seconds since 1970; ``step`` is ``null`` where none was given. A line is in the file when ``log``
    returns. An existing file is continued: a line that a kill cut short stays alone on its line. Values are numbers,
    texts, ``None``, and lists and dicts of these; tensors and arrays become lists. Numbers that JSON lacks are the
    strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, so that strict readers can read every line.

    Args:
        run_name: the folder's name, below ``logging_dir``.
        logging_dir: created if it is not there.
    """

    name = "jsonl"
    file_name = "metrics.jsonl"
    _torn = False

    @on_main_process
    def start(self) -> None:
        """Open the file for appending.

        Raises:
            TrackerError: the folder or file cannot be written.
        """
        path = self.folder / self.file_name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
            if file.tell():
                with path.open("rb") as old:
                    old.seek(-1, os.SEEK_END)
                    self._torn = old.read(1) != b"\n"
        except OSError as error:
            raise cannot_write(path, error) from error
        self._run = file

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Append one line.

        Raises:
            TrackerError: the file cannot be written, or the tracker does not run.
        """
        file: BinaryIO = self.tracker
        kept = {}
        for key, value in plain(values, self.name).items():
            value = value.tolist() if hasattr(value, "tolist") else value
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                left_out(self.name, key, value, "numbers, texts, and lists and dicts of them")
            else:
                kept[key] = strict(value)
        record = {"step": whole_step(step, self.name), "time": time.time(), "values": kept}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        self._torn = True  # until all of it is written
        try:
            while line:
                line = line[file.write(line) :]
        except OSError as error:
            raise cannot_write(self.folder / self.file_name, error) from error
        self._torn = False

    @on_main_process
    def finish(self) -> None:
        """Close the file."""
        if self._run is not None:
            self._run.close()
            self._run = None
