"""The part of an Accelerator that logs to experiment trackers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from shardwise import checkpoint
from shardwise.accelerator.base import Base
from shardwise.errors import TrackerError
from shardwise.logging import get_logger
from shardwise.tracking.base import BlankTracker, is_tracker, runs_here
from shardwise.tracking.registry import LOGGER_TYPE_TO_CLASS, check_names

logger = get_logger(__name__)


class Trackers(Base):
    log_with: list[Any]
    _phase = "new"  # then "running", then "ended"

    @property
    def trackers(self) -> list[Any]:
        """Those that run on this rank: all on rank 0, elsewhere those with ``main_process_only = False``."""
        known: list[Any] = self.__dict__.setdefault("_trackers", [])
        return known

    def init_trackers(
        self,
        project_name: str,
        config: dict[str, Any] | None = None,
        init_kwargs: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Start all trackers of ``log_with``.

        Called again, it ends the runs that the last call opened; tracker objects of the script go on.

        Args:
            project_name: the name that each tracker gives to its project, run or folder.
            config: kept by each tracker as the run's configuration.
            init_kwargs: by tracker's name, what its class (and so its client) takes besides.

        Raises:
            TrackerError: ``init_kwargs`` for a tracker that does not exist.
            Exception: whatever a client raises that cannot start.
        """
        given = check_names(init_kwargs, "init_kwargs", self._names)
        new: list[Any] = []
        fresh: list[Any] = []
        for kind in self.log_with:
            if is_tracker(kind):
                if given.get(str(_name(kind))):
                    logger.warning(
                        "init_kwargs for '%s' have no effect: the script made that tracker itself", _name(kind)
                    )
                if runs_here(kind):
                    new.append(kind)
                    if self._phase != "running":
                        fresh.append(kind)
                continue
            tracker_class = LOGGER_TYPE_TO_CLASS[str(kind)]
            if runs_here(tracker_class):
                folder = [self.project_configuration.logging_dir] if tracker_class.requires_logging_directory else []
                fresh.append(tracker_class(project_name, *folder, **given.get(str(kind), {})))
                new.append(fresh[-1])
        if self._phase == "running":
            self._phase = "ended"
            _finish([t for t in self.trackers if not any(t is n for n in new)])
        with ExitStack() as undo:  # one that cannot start leaves no open runs of the others behind
            for tracker in fresh:
                tracker.start()
                undo.callback(tracker.finish)
            undo.pop_all()
        self.trackers[:] = new
        self._phase = "running"
        if config is not None:
            for tracker in self.trackers:
                tracker.store_init_configuration(config)

    def log(
        self,
        values: dict[str, Any],
        step: int | None = None,
        log_kwargs: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Log values to all trackers. On other ranks than 0 this does nothing, except for trackers that run there.

        Args:
            values: names and numbers, tensors of one element, texts, or dicts of numbers. What a tracker has no form
                for it leaves out, with a warning.
            step: the step they belong to.
            log_kwargs: by tracker's name, what its ``log`` takes besides.

        Raises:
            TrackerError: ``log_with`` names trackers and they are not running; ``log_kwargs`` for a tracker that does
                not exist; values that are no dict.
            Exception: whatever a client raises.

        Cost: reading a tensor from a GPU waits for it.
        """
        if self.log_with:
            self._check_running("log")
        given = check_names(log_kwargs, "log_kwargs", self._names)
        if self._recording is not None and isinstance(values, dict):
            self._recording.tell(values)
        for tracker in self.trackers:
            tracker.log(values, step=step, **given.get(str(_name(tracker)), {}))

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """The running tracker of that name.

        Args:
            name: its ``name``; for those of this library also a ``LoggerType``.
            unwrap: give the client's own object.

        Returns:
            The tracker. Where it does not run, on ranks other than 0 or if no trackers were asked for, an object that
            takes every call and does nothing.

        Raises:
            TrackerError: trackers were asked for, but not this one, or they do not run yet.
        """
        name = str(getattr(name, "value", name))
        if not self.log_with:
            return BlankTracker(name)
        self._check_running("get_tracker")
        for tracker in self.trackers:
            if _name(tracker) == name:
                return tracker.tracker if unwrap else tracker
        if name not in self._names:
            raise TrackerError(
                f"no tracker '{name}' was initialised; there are {', '.join(self._names)}",
                where="get_tracker",
                fix=f"add '{name}' to log_with",
            )
        return BlankTracker(name)

    def end_training(self) -> None:
        """Finish all trackers, even if one of them raises, end the record, and wait for a save in the background.

        Raises:
            CheckpointError: that save failed.
            Exception: whatever a client raises.
        """
        self._point("end_training")
        try:
            if self._phase == "running":
                self._phase = "ended"
                _finish(self.trackers)
        finally:
            if self._recording is not None and not self._recording.launched:
                self._recording.close()
            checkpoint.wait_for_saves()

    @property
    def _names(self) -> list[str]:
        """Names of all trackers asked for, the same on every rank."""
        return [str(_name(kind)) for kind in self.log_with]

    def _check_running(self, what: str) -> None:
        if self._phase == "new" and not any(_runs_here(kind) for kind in self.log_with):
            return  # "if accelerator.is_main_process: accelerator.init_trackers(...)", as scripts have it
        if self._phase != "running":
            raise TrackerError(
                f"{what} before init_trackers" if self._phase == "new" else f"{what} after end_training",
                where=f"trackers {', '.join(self._names)}",
                fix="call accelerator.init_trackers(project_name) first",
            )


def _name(kind: Any) -> Any:
    return kind.name if is_tracker(kind) else kind


def _runs_here(kind: Any) -> bool:
    return runs_here(kind if is_tracker(kind) else LOGGER_TYPE_TO_CLASS[str(kind)])


def _finish(trackers: list[Any]) -> None:
    with ExitStack() as stack:
        for tracker in reversed(trackers):
            stack.callback(tracker.finish)
