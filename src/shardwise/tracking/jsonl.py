"""A tracker that needs nothing: one line of JSON per call."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from shardwise.errors import TrackerError
from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.values import left_out, plain, settings, strict, whole_step


class JSONLTracker(ClientTracker):
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
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str]) -> None:
        super().__init__(run_name)
        self.folder = Path(logging_dir) / run_name
        self._torn = False

    @on_main_process
    def start(self) -> None:
        """Open the file for appending.

        Raises:
            TrackerError: the folder or file cannot be written.
        """
        path = self.folder / "metrics.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
            if file.tell():
                with path.open("rb") as old:
                    old.seek(-1, os.SEEK_END)
                    self._torn = old.read(1) != b"\n"
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._run = file

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
            raise _cannot_write(path, error) from error

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
            raise _cannot_write(self.folder / "metrics.jsonl", error) from error
        self._torn = False

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Not possible in lines of JSON.

        Raises:
            TrackerError: always.
        """
        raise self._no("images")

    def log_table(self, table_name: str, *args: Any, **kwargs: Any) -> None:
        """Not possible in lines of JSON.

        Raises:
            TrackerError: always.
        """
        raise self._no("tables")

    @on_main_process
    def finish(self) -> None:
        """Close the file."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _no(self, what: str) -> TrackerError:
        return TrackerError(
            f"metrics.jsonl cannot hold {what}",
            where="tracker 'jsonl'",
            fix="use a tracker that shows them (tensorboard, wandb), or save a file and log its path",
        )


def _cannot_write(path: Path, error: OSError) -> TrackerError:
    return TrackerError(
        f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="choose a project_dir that this user can write to, on a disk with room",
    )
