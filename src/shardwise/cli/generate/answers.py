"""Answers of a run that may be killed at any moment and started again: none is lost, none is there twice.

Each rank of each run appends to a new file of its own beside the output, one whole line per answer, on the disk before
the next one begins. Nobody ever appends to a file of an earlier run, so a line that a kill cut short is the last of its
file, and is left out when files are read. The output itself only ever changes by a rename, to what was in it and all
that the ranks' files add, each id once; they are removed after that. So a merge that is killed is done again by the
next run and finds the same; and two runs at once, or ranks that outlive their command, cost time and no answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shardwise.cli.generate.prompts import Prompt, key
from shardwise.errors import CheckpointError, ConfigError

_TRIES = 100  # merges that another run's merge disturbed


class Answers:
    """The output of a run, and the files beside it.

    Args:
        out: the file that all answers are in at the end.
        prompts: what is to be answered.
    """

    def __init__(self, out: Path, prompts: Sequence[Prompt]) -> None:
        self.out, self.prompts = out, prompts
        self._settings = out.with_name(f"{out.name}.settings")

    def begin(self, settings: dict[str, Any]) -> set[str]:
        """Find what earlier runs have answered, and bring it together in the output.

        Args:
            settings: what answers depend on. A run that was not finished goes on with the same ones only.

        Returns:
            The keys of what is answered.

        Raises:
            ConfigError: the output cannot be written to, or what is there belongs to other prompts or settings.
            CheckpointError: a line of it, not the last, is damaged.
        """
        if self.out.is_dir():
            raise ConfigError("is a folder", where=f"--out {self.out}", fix="give the name of a file")
        try:
            done = self.merge()
            self._keep(settings, begun=bool(done))
            return done
        except OSError as error:
            raise ConfigError(
                f"cannot be written: {error.strerror or error}", where=f"--out {self.out}", fix="choose another file"
            ) from error

    def _keep(self, settings: dict[str, Any], *, begun: bool) -> None:
        text = "".join(json.dumps([p.id, p.text, p.ids]) for p in self.prompts)
        mine = {**settings, "prompts": hashlib.sha256(text.encode()).hexdigest()}
        try:
            before = json.loads(self._settings.read_bytes())
        except FileNotFoundError:
            before = mine
        except ValueError:
            before = {}
        other = sorted(name for name in {*mine, *before} if mine.get(name) != before.get(name))
        if begun and other:
            raise ConfigError(
                f"an unfinished run has written to it with other settings ({', '.join(other)})",
                where=f"--out {self.out}",
                fix=f"go on with the same, give another --out, or remove {self.out.name}* to begin anew",
            )
        _replace(self._settings, json.dumps(mine).encode())  # also where it is the same: can anything be written?

    def merge(self) -> set[str]:
        """Bring all answers together in the output. Returns their keys."""
        for _ in range(_TRIES):
            try:
                return self._merge()
            except FileNotFoundError:  # another run has merged meanwhile: its output has what was in that file
                continue
        raise ConfigError("several runs write to it at once", where=f"--out {self.out}", fix="end all but one")

    def _merge(self) -> set[str]:
        parts = sorted(self.out.parent.glob(f"{_plain(self.out.name)}.part-*"))
        before = self.out.read_bytes() if self.out.exists() else b""
        found: dict[str, bytes] = {}
        for path in [*([self.out] if before else []), *parts]:
            for name, line in _lines(path):
                found.setdefault(name, line)
        order = {key(p.id): n for n, p in enumerate(self.prompts)}
        if unknown := [name for name in found if name not in order]:
            raise ConfigError(
                f"it has an answer to {unknown[0]}, which is no id of the prompts",
                where=f"--out {self.out}",
                fix="give another --out",
            )
        text = b"".join(found[name] + b"\n" for name in sorted(found, key=order.__getitem__))
        if text != before:
            _replace(self.out, text)
        for path in parts:
            path.unlink()
        return set(found)

    def end(self) -> int:
        """Bring all answers together at the end of a run. Returns how many are missing."""
        done = self.merge()
        missing = len({key(p.id) for p in self.prompts} - done)
        if not missing:
            for path in self.out.parent.glob(f"{_plain(self.out.name)}*.{'[0-9a-f]' * 12}.new"):
                path.unlink(missing_ok=True)  # what a kill left of a rename
        if not missing or not done:
            self._settings.unlink(missing_ok=True)
        return missing

    def part(self) -> str:
        """A new prefix of files for the ranks of this run."""
        return str(self.out.with_name(f"{self.out.name}.part-{uuid.uuid4().hex[:12]}"))


class Writer:
    """A rank's own file. It appears with the first answer.

    Args:
        path: of a file that does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def write(self, answers: Iterable[dict[str, Any]]) -> None:
        """Append answers, each with its ``id``. They are on the disk when this returns."""
        for answer in answers:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
                _sync_folder(self.path.parent)
            left = memoryview(_line(answer) + b"\n")
            while left:
                left = left[os.write(self._fd, left) :]
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _line(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in an id
        return json.dumps(answer).encode()


def _lines(path: Path) -> list[tuple[str, bytes]]:
    """The whole lines of a file of answers, by their keys. What a kill or a power cut left of the last one is not."""
    *lines, _ = path.read_bytes().split(b"\n")
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append((key(json.loads(line)["id"]), line))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                "is no answer of an earlier run", where=f"{path}, line {number}", fix="give another --out"
            ) from error
    return out


def _replace(path: Path, data: bytes) -> None:
    """Give a file new contents: whoever looks, whenever, finds the old ones or the new ones."""
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.new")
    try:
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(name: str) -> str:
    """A name, for ``glob``."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
