"""A script's own sampler with some attributes of ours. It stays the script's: there is one state, not two."""

from __future__ import annotations

from typing import Any

_ORIGINAL = "_shardwise_original"


def overlay(sampler: Any, own: dict[str, Any]) -> Any:
    """An object of the sampler's class that has ``own``, and everything else from the sampler itself.

    What the script changes in its sampler is seen by who reads the overlay, and the other way round.
    """
    base: Any = type(sampler)
    kind: Any = type(base)(base.__name__, (_Overlay, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    made = object.__new__(kind)
    object.__getattribute__(made, "__dict__").update(own, **{_ORIGINAL: sampler})
    return made


class _Overlay:
    """Looks attributes up in its own dict, then in the original's, then in the class."""

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if name == "__dict__" or name not in own:
            theirs = vars(own[_ORIGINAL])
            return theirs[name] if name in theirs else super().__getattribute__(name)
        return own[name]

    def __setattr__(self, name: str, value: Any) -> None:
        own = object.__getattribute__(self, "__dict__")
        if name in own:
            own[name] = value
        else:
            setattr(own[_ORIGINAL], name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = dict(object.__getattribute__(self, "__dict__"))
        return overlay, (own.pop(_ORIGINAL), own)
