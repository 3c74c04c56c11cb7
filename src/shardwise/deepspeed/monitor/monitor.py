"""``MonitorMaster``: events to every monitor that is on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from shardwise.tracking.base import ClientTracker, runs_here
from shardwise.tracking.kinds import is_available, missing

_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "csv_monitor": "csv"}
_JOB = "DeepSpeedJobName"


class MonitorMaster:
    """Writes values to TensorBoard, Weights & Biases, Comet and CSV files, on rank 0.

    Args:
        monitor_config: sections of monitors that are on, by their names (``DsFacts.monitors``), or an object with
            sections of which each has ``enabled``. Folders are ``output_path`` and in it ``job_name``.

    Attributes:
        enabled: is any of them on?

    Raises:
        MissingPackage: one whose client is not installed, on every rank.
        TrackerError: a folder that cannot be written.
    """

    def __init__(self, monitor_config: Any) -> None:
        self.monitor_config = monitor_config
        sections = _sections(monitor_config)
        self.enabled = bool(sections)
        for name in sections:
            if not is_available(_TRACKERS[name]):
                raise missing(_TRACKERS[name])
        self._every = int(sections.get("comet", {}).get("samples_log_interval", 100))
        self._sent: dict[str, int] = {}
        self._trackers = {name: _MAKERS[name](section) for name, section in sections.items()}
        for tracker in self._trackers.values():
            tracker.start()
        title = sections.get("comet", {}).get("experiment_name")
        if title is not None and runs_here(self._trackers["comet"]):
            self._trackers["comet"].tracker.set_name(title)

    def write_events(self, event_list: Iterable[tuple[str, Any, int]]) -> None:
        """Write values.

        Args:
            event_list: of each a name, a number, and how many samples were seen.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for name, value, step in event_list:
            by_step.setdefault(step, {})[name] = value
        for step, values in by_step.items():
            for kind, tracker in self._trackers.items():
                wanted = self._due(values, step) if kind == "comet" else values
                if wanted:
                    tracker.log(wanted, step=step)

    def close(self) -> None:
        """Write what is left, and end the clients' runs."""
        for tracker in self._trackers.values():
            tracker.finish()
        self._trackers = {}

    def _due(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        """What Comet gets: a name again after so many samples."""
        due = {n: v for n, v in values.items() if n not in self._sent or step - self._sent[n] >= self._every}
        self._sent.update(dict.fromkeys(due, step))
        return due


def _sections(config: Any) -> dict[str, dict[str, Any]]:
    if isinstance(config, Mapping):
        found = {name: dict(config[name]) for name in _TRACKERS if name in config}
    else:
        parts = {name: getattr(config, name, None) for name in _TRACKERS}
        found = {name: dict(vars(part)) for name, part in parts.items() if part is not None}
        found = {name: part for name, part in found.items() if part.get("enabled")}
    return {
        n: {k: v for k, v in part.items() if v is not None} for n, part in found.items() if part.get("enabled", True)
    }


def _tensorboard(section: dict[str, Any]) -> ClientTracker:
    from shardwise.tracking.tensorboard import TensorBoardTracker

    return TensorBoardTracker(section.get("job_name", _JOB), _folder(section))


def _csv(section: dict[str, Any]) -> ClientTracker:
    from shardwise.tracking.csv import CSVTracker

    return CSVTracker(section.get("job_name", _JOB), _folder(section))


def _wandb(section: dict[str, Any]) -> ClientTracker:
    from shardwise.tracking.wandb import WandBTracker

    names = {"group": "group", "team": "entity"}
    return WandBTracker(section.get("project", "deepspeed"), **{names[k]: v for k, v in section.items() if k in names})


def _comet(section: dict[str, Any]) -> ClientTracker:
    from shardwise.tracking.comet import CometMLTracker

    own = ("api_key", "workspace", "experiment_key", "mode", "online")
    return CometMLTracker(section.get("project"), **{k: v for k, v in section.items() if k in own})  # type: ignore[arg-type]


def _folder(section: dict[str, Any]) -> str:
    return section.get("output_path") or os.curdir


_MAKERS: dict[str, Callable[[dict[str, Any]], ClientTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "comet": _comet,
    "csv_monitor": _csv,
}
