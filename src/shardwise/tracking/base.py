"""``GeneralTracker``, which all trackers derive from, and who of the ranks runs one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

from shardwise.errors import IncompleteTracker, TrackerError
from shardwise.operations import rank_and_size

F = TypeVar("F", bound=Callable[..., Any])


def on_main_process(function: F) -> F:
    """A decorator for a tracker's methods: on rank 0 only, unless the tracker has ``main_process_only = False``.

    On other ranks the call returns ``None``. Asks at each call, and joins no process group: a tracker may be made
    before the Accelerator.
    """

    @wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) if runs_here(self) else None

    return run  # type: ignore[return-value]


def runs_here(tracker: Any) -> bool:
    """Whether a tracker (or a class of trackers) does anything on this rank."""
    return not getattr(tracker, "main_process_only", False) or rank_and_size()[0] == 0


def is_tracker(thing: Any) -> bool:
    """Whether ``thing`` is a tracker object, of this library or of Accelerate's classes."""
    methods = ("start", "store_init_configuration", "log", "finish")
    return not isinstance(thing, type) and all(callable(getattr(thing, name, None)) for name in methods)


class GeneralTracker:
    """Base of all trackers, those of scripts as well.

    A subclass has

    - ``name``: a string, for ``get_tracker``, ``init_kwargs`` and ``log_kwargs``;
    - ``requires_logging_directory``: whether it writes files below the project's ``logging_dir``;
    - ``tracker``: a property, the client's own object;
    - ``main_process_only`` (``True``): on ``False`` every rank starts, logs and finishes;
    - the methods below, as far as they mean something to it, with ``@on_main_process``.

    Raises:
        TrackerError: the class lacks one of the first three.
    """

    name: Any
    main_process_only = True

    def __init__(self, _blank: bool = False) -> None:
        if not _blank:
            check_complete(self)

    def start(self) -> None:
        """Open the client's run. Called by ``init_trackers``, so that nothing starts before the process group."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration of the run.

        Args:
            values: names and values.
        """

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            values: names and numbers or texts.
            step: the step they belong to.
            kwargs: for the client.
        """

    def finish(self) -> None:
        """Write what is left, and close the run."""


def check_complete(tracker: Any) -> None:
    """Raise unless a tracker, or a class of trackers, has what every tracker needs.

    Raises:
        IncompleteTracker: naming what is missing.
    """
    has = dir(tracker)  # not hasattr: `tracker` may be a property that works only after `start`
    lacking = [name for name in ("name", "requires_logging_directory", "tracker") if name not in has]
    if lacking:
        kind = tracker if isinstance(tracker, type) else type(tracker)
        raise IncompleteTracker(
            f"the tracker class lacks {', '.join(f'`{name}`' for name in lacking)}",
            where=kind.__name__,
            fix="define them in the class: a string, a bool, and a property that returns the client's own object",
        )


class BlankTracker(GeneralTracker):
    """What ``get_tracker`` gives where a tracker does not run: takes every call, and does nothing.

    Attributes, items and results are this object again, so that code for the client's own object runs too.
    """

    def __init__(self, name: str = "") -> None:
        super().__init__(_blank=True)
        self.__dict__["name"] = name

    def __getattribute__(self, name: str) -> Any:
        # Methods of the base return None; chained calls need this object.
        if name in ("start", "store_init_configuration", "log", "finish"):
            return self
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for some that only some objects have
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Nothing is kept."""

    def __call__(self, *args: Any, **kwargs: Any) -> BlankTracker:
        return self

    def __getitem__(self, key: Any) -> BlankTracker:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing is kept."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> BlankTracker:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was opened."""

    def __repr__(self) -> str:
        return f"BlankTracker({self.__dict__['name']!r})"


class ClientTracker(GeneralTracker):
    """A tracker of this library: a client's run, opened by ``start``.

    Args:
        run_name: the project's name.
        kwargs: for the client.
    """

    requires_logging_directory = False
    _run: Any = None

    def __init__(self, run_name: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs
        self._next = 0

    @property
    def tracker(self) -> Any:
        """The client's own object.

        Raises:
            TrackerError: the tracker does not run: not started, finished, or not this rank's.
        """
        if self._run is None:
            raise TrackerError(
                "the tracker does not run",
                where=f"tracker '{self.name}', rank {rank_and_size()[0]}",
                fix="call init_trackers (or the tracker's start) first, on rank 0 unless main_process_only is False",
            )
        return self._run

    def _count(self, step: int | None) -> int:
        """The step, or the one after the last; for clients that would put everything without a step on step 0."""
        step = self._next if step is None else step
        self._next = step + 1
        return step
