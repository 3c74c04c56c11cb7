"""One hierarchy of errors. Each says what was wrong, where (rank, unit, file), and what to do.

Each is also an error of Python's own that other libraries raise in the same place, so that a script's ``except
ValueError`` catches here what it caught there. Where they raise several, it is all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShardwiseError(Exception):
    """Base of everything Shardwise raises on purpose.

    Args:
        what: the fact, in one sentence.
        where: rank, unit, parameter or file it concerns; empty if it concerns the whole program.
        fix: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        text = what if not where else f"{where}: {what}"
        super().__init__(text if not fix else f"{text}\n  fix: {fix}")


def first_line(error: BaseException) -> str:
    """What an error says, for a sentence of ours; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """A ``fix`` for a name that does not exist: the nearest that does, if one is near enough, else ``otherwise``."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean '{near[0]}'?" if near else otherwise


class StrategyError(ShardwiseError, ValueError):
    """A strategy, or a combination of its keys, that does not exist."""


class NotServed(StrategyError, NotImplementedError):
    """Something that exists elsewhere, and is not done here, or not under this strategy."""


class WrongPlugin(StrategyError, TypeError):
    """An object of another class where settings of a known one are needed."""


class UnitError(ShardwiseError, ValueError):
    """A module that cannot be sharded the way it was asked for."""


class WriteLost(UnitError, RuntimeError):
    """Values were written to where they are only read, so that nobody keeps what was written."""


class InternalError(ShardwiseError, RuntimeError):
    """Shardwise contradicts itself: a fault of the library, not of the script. The text is what a report needs."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix or "this is a fault of Shardwise: please report it with this text")


class ReleasedParameterError(ShardwiseError, RuntimeError):
    """Somebody read a parameter whose values are not on this rank at the moment."""


class GradientError(ShardwiseError, RuntimeError):
    """An operation on sharded gradients that has no right answer on one rank alone."""


class OptimizerError(ShardwiseError, ValueError):
    """An optimizer that cannot step on shards, or not with this layout."""


class UpdateFailed(ShardwiseError, RuntimeError):
    """An update that failed, so that the model is between two steps. Nothing uses it until a checkpoint is loaded."""


class DeviceError(ShardwiseError, RuntimeError):
    """A device that is not there, or cannot do what was asked of it."""


class DataError(ShardwiseError, ValueError):
    """A dataloader that cannot be split over the ranks the way it was asked for."""


class CommError(ShardwiseError, RuntimeError):
    """A collective that did not complete. The text is the report: who waited for what, where."""


class RankFailed(CommError):
    """Another rank stopped; this one ends because of it. The other rank holds the first cause."""


class CheckpointError(ShardwiseError, ValueError, RuntimeError):
    """A checkpoint that cannot be written, or is missing, damaged, foreign, or does not fit what it is loaded into."""


class LaunchError(ShardwiseError, ValueError, RuntimeError):
    """A launch that cannot start the processes it was asked for."""


class ConfigError(ShardwiseError, ValueError):
    """A setting with a value that has no meaning, or that contradicts another one."""


class BatchSizeError(ConfigError, RuntimeError):
    """A batch size to begin with that is none."""


class ArgumentError(ShardwiseError, TypeError):
    """A call with arguments that the function does not take."""


class TensorError(ArgumentError):
    """Something else where a tensor, or a nest of tensors, is needed."""


class MissingPackage(ShardwiseError, ImportError):
    """An optional package that is needed for what was asked, and is not installed."""


class OutOfMemory(ShardwiseError, RuntimeError):
    """Not even the smallest batch fits into memory."""


class LeftOut(ShardwiseError, NotImplementedError):
    """A name that other libraries have and this one leaves out on purpose."""


class TrackerError(ShardwiseError, ValueError):
    """A tracker that is unknown, incomplete, or used before it runs or after it ended."""


class IncompleteTracker(TrackerError, NotImplementedError):
    """A class of trackers that lacks what every tracker has."""


class RecordError(ShardwiseError, ValueError):
    """A record of a run that cannot be written, or that cannot be read."""


class OffloadError(ShardwiseError, ValueError, OSError):
    """Host memory or a disk that cannot take, or give back, what was put there. ``errno`` is the system's, if any."""


class PlacementError(ShardwiseError, ValueError):
    """A device map that does not fit its model, or a tensor that cannot be put where it was asked for."""


class ForeignWeights(CheckpointError, OSError):
    """A file of weights in a format that this library, or torch, does not read."""


class PlanError(ShardwiseError, ValueError):
    """A question to the planner that has no answer as it was asked."""
