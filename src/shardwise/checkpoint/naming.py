"""Which stored tensor is which of a model's: sections, prefixes of wrappers and of base models, tied names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from shardwise.checkpoint.models import ModelState
from shardwise.checkpoint.stored import Section, Source, Stored
from shardwise.errors import CheckpointError

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What compiled and wrapped modules put into the names of their parameters."""


@dataclass
class Match:
    """A model's names and the stored tensors that belong to them.

    Args:
        found: by the model's names, tied ones included; not all of them have a place in the model's own list.
        missing: of the model, without a stored tensor.
        unexpected: stored, without a place in the model.
        prefix: what the stored names have before the model's; after a minus, what the model's have before them.
    """

    found: dict[str, Stored] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    prefix: str = ""


def match_names(names: Sequence[str], tensors: Mapping[str, Stored]) -> Match:
    """Find the stored tensor of each name: as it is, or with one prefix more or less on all of them.

    A name that only fits as it is, is taken as it is: a model's head beside its base model.
    """
    cleaned = {_WRAPPERS.sub("", name): stored for name, stored in tensors.items()}
    original = {_WRAPPERS.sub("", name): name for name in tensors}
    wanted = set(names)
    prefixes = {"": len(wanted & cleaned.keys())}
    prefixes |= dict(_before(cleaned, wanted))
    prefixes |= {f"-{less}": count for less, count in _before(names, cleaned.keys())}
    best = max(prefixes.values())
    prefix = next(p for p, count in prefixes.items() if count == best)  # none at all wins if it is as good
    out = Match(prefix=prefix)
    used: set[str] = set()
    for name in names:
        for key in dict.fromkeys((_renamed(name, prefix), name)):
            if key in cleaned:
                out.found[name] = cleaned[key]
                used.add(key)
                break
        else:
            out.missing.append(name)
    taken = {id(stored) for stored in out.found.values()}
    out.unexpected = [original[k] for k, stored in cleaned.items() if k not in used and id(stored) not in taken]
    return out


def _renamed(name: str, prefix: str) -> str:
    return name.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + name


def _before(longer: Iterable[str], names: Iterable[str]) -> list[tuple[str, int]]:
    """What stands before names of ``names`` in ``longer``, the most frequent first."""
    known = set(names)
    counts: Counter[str] = Counter()
    for name in longer:
        for dot in (i + 1 for i, c in enumerate(name) if c == "."):
            if name[dot:] in known:
                counts[name[:dot]] += 1
    return counts.most_common(3)


def find_section(names: Sequence[str], source: Source, part: str | None) -> tuple[Section, Match]:
    """The section that fits a model best, and how.

    Raises:
        CheckpointError: several fit equally well and none is where weights are as a rule; there is no ``part``.
    """
    if part is not None or len(source.sections) == 1:
        section = source.section(part)
        return section, match_names(names, source.sections[section])
    best: dict[Section, Match] = {}
    most = 0
    for section, tensors in sorted(source.sections.items(), key=lambda item: -len(item[1])):
        if len(tensors) < most:  # nor can any of the rest, such as the state of single parameters
            break
        match = match_names(names, tensors)
        if len(match.found) > most:
            best, most = {}, len(match.found)
        if len(match.found) == most:
            best[section] = match
    if len(best) == 1:
        return next(iter(best.items()))
    section = Source(source.path, source.kind, {s: source.sections[s] for s in best}).section()
    return section, best[section]


@dataclass
class Fit:
    """How a model and a section fit together.

    Args:
        tensors: by the first name of each parameter and buffer, what is loaded into it.
        twice: of tied ones, those that are stored as several tensors, by their first name.
        missing, unexpected: names.
        mismatched: names of those with another shape or another kind of numbers.
        lines: all differences in words.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    twice: dict[str, list[Stored]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def leave_out(self, name: str, why: str) -> None:
        """A parameter keeps its values."""
        del self.tensors[name]
        self.mismatched.append(name)
        self.lines.append(why)


def fit(state: ModelState, source: Source, part: str | None) -> Fit:
    """Compare a model's names, shapes and dtypes with a source's."""
    mine = {**state.parameters, **state.buffers}
    names = [*mine, *state.aliases, *state.extra]
    _, match = find_section(names, source, part)
    if not match.found:
        shown = ", ".join(list(next(iter(source.sections.values())))[:3])
        raise CheckpointError(
            f"none of the model's {len(names)} names is in it; it has {shown}, ...",
            where=str(source.path),
            fix="load it into the model it was saved from, or rename with torch first",
        )
    out = Fit()
    tied: dict[str, list[str]] = {}
    for alias, name in state.aliases.items():
        tied.setdefault(name, []).append(alias)
    for name, tensor in mine.items():
        all_names = [name, *tied.get(name, ())]
        stored = list({id(match.found[n]): match.found[n] for n in all_names if n in match.found}.values())
        if not stored:
            out.missing.append(name)
            continue
        if stored[0].shape != tuple(tensor.shape):
            out.mismatched.append(name)
            out.lines.append(f"'{name}' has shape {stored[0].shape} there, not {tuple(tensor.shape)}")
        elif _numbers(stored[0].dtype) != _numbers(tensor.dtype):
            out.mismatched.append(name)
            out.lines.append(f"'{name}' is {str(stored[0].dtype)[6:]} there, not {str(tensor.dtype)[6:]}")
        else:
            out.tensors[name] = stored[0]
            if len(stored) > 1:
                out.twice[name] = stored
    out.missing += state.extra.keys()
    out.missing = _without(out.missing, state.module, "_keys_to_ignore_on_load_missing")
    out.unexpected = _without(match.unexpected, state.module, "_keys_to_ignore_on_load_unexpected")
    out.lines = [
        *(f"'{name}' is not in it" for name in out.missing),
        *out.lines,
        *(f"'{name}' is in it only" for name in out.unexpected),
    ]
    return out


def _numbers(dtype: object) -> tuple[bool, bool]:
    return (dtype.is_floating_point, dtype.is_complex)  # type: ignore[attr-defined]


def _without(names: Sequence[str], module: nn.Module, attribute: str) -> list[str]:
    """Leave out what a model of transformers says may differ."""
    patterns = getattr(module, attribute, None) or ()
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
