"""What a row of the tables of keys says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What becomes of a key."""

    SERVED = "served"
    ALWAYS = "always so"
    """It is done in any case, or it is the script's affair: nothing to read, no word needed."""
    TUNES = "no effect"
    """It changes how fast DeepSpeed does something, or what it prints about it."""
    REFUSED = "refused"
    """It changes what is computed or written, and that is not done here. An error, unless the key is off."""


@dataclass(frozen=True)
class Key:
    """A key of a DeepSpeed configuration.

    Args:
        kind: what becomes of it.
        says: what that means here; of a refused key, why.
        fix: of a refused key, the nearest thing that there is.
        accelerate: what becomes of it in an Accelerator's plugin, if that is something else.
        needed: it may not stay ``"auto"`` where nobody fills that in.
    """

    kind: Kind
    says: str
    fix: str = ""
    accelerate: Key | None = None
    needed: bool = False


Table = dict[str, Key]


def served(says: str, accelerate: Key | None = None, needed: bool = False) -> Key:
    """A row for a key that is read."""
    return Key(Kind.SERVED, says, accelerate=accelerate, needed=needed)


def always(says: str) -> Key:
    """A row for a key that needs no word."""
    return Key(Kind.ALWAYS, says)


def tunes(says: str) -> Key:
    """A row for a key of DeepSpeed's own machinery."""
    return Key(Kind.TUNES, says)


def refused(says: str, fix: str) -> Key:
    """A row for a key that asks for what is not done here."""
    return Key(Kind.REFUSED, says, fix)
