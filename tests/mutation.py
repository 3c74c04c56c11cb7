"""Take the waits out of the source, one at a time, and see whether a test notices.

    python tests/mutation.py [part of a wait's name ...]

Tests on the simulated device come first, then those of ranks whose messages arrive late (``ranks.LATE``). Each wait
costs a copy of the source and 10 s to 3 min of a core. ``test_mutation.py`` does the same under pytest (slow).
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ranks import LATE

ROOT = Path(__file__).resolve().parent.parent
WAITS = ("wait", "wait_event", "wait_stream", "synchronize", "record_stream", "order")
"""Methods whose call orders one thing after another. What they return is used by nobody, or the call is left alone."""
FILES = ("tiers/*.py", "engine/*.py", "comm/group.py", "comm/reduction.py")
_SIMULATED = ("tests/test_simulated_training.py", "tests/test_simulated_features.py")
_QUICK = (
    "(one_rank and ddp and none and (optimizer-cpu or optimizer-half-nvme or grads-cpu or all-cpu- or all-nvme or "
    "params-nvme or activations)) or (several_ranks and 2- and (zero3 or zero2) and (device or all-cpu)) or "
    "(several_ranks and 4-hsdp-device) or restless or experts or (checkpoint and asynchronous)"
)
_HOST = (
    "tiers", "channel", "load", "join", "scenarios", "clipping", "state_dicts", "written_values", "offload",
    "offload_params",
)  # fmt: skip
STAGES: tuple[tuple[Sequence[str], str, bool], ...] = (
    (_SIMULATED, _QUICK, False),
    (
        (*_SIMULATED, "tests/test_simulated_scenarios.py"),
        f"not ({_QUICK}) and not several_ranks and not one_rank",
        False,
    ),
    ([f"tests/test_{name}.py" for name in _HOST], "", True),
)
"""Files of tests, which of them, and whether messages arrive late. The next ones run if nothing was noticed so far."""
UNNOTICED: dict[str, str] = {
    "tiers/saved_tensors.py SavedOnHost.drain: copy.wait()": "it bounds how much is under way: the copy is ordered "
    "after what made the tensor, and the device's memory is kept until it has ended, also without it",
    "engine/flat.py FlatParameters.unstage: TransferGroup(arriving).wait()": "a read that is under way keeps the "
    "memory that it fills, so that without it the memory is given back later, and nothing else is different",
}
"""Waits that no test misses, by name, and why that is so."""


@dataclass(frozen=True)
class Wait:
    """One statement that waits.

    Args:
        path: below ``src/shardwise``.
        function: where it is, with its class.
        text: the statement.
        first, last: its lines, from 1.
    """

    path: str
    function: str
    text: str
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.path} {self.function}: {self.text}"

    def taken_out(self, source: str) -> str:
        """The source without it. What it waits for is done all the same, if it is made in the same statement."""
        lines = source.splitlines(keepends=True)
        indent = lines[self.first - 1][: len(lines[self.first - 1]) - len(lines[self.first - 1].lstrip())]
        statement = ast.parse(self.text).body[0]
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        called = statement.value.func
        left = called.value if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Call) else None
        instead = "pass" if left is None else ast.unparse(left)
        return "".join([*lines[: self.first - 1], f"{indent}{instead}\n", *lines[self.last :]])


def waits() -> list[Wait]:
    base = ROOT / "src" / "shardwise"
    return [w for pattern in FILES for path in sorted(base.glob(pattern)) for w in _waits_in(path, base)]


def _waits_in(path: Path, base: Path) -> Iterator[Wait]:
    def visit(node: ast.AST, names: tuple[str, ...]) -> Iterator[Wait]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                yield from visit(child, (*names, child.name))
                continue
            called = child.value.func if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in WAITS:
                assert isinstance(child, ast.Expr)
                where = str(path.relative_to(base))
                yield Wait(where, ".".join(names), ast.unparse(child), child.lineno, child.end_lineno or child.lineno)
            else:
                yield from visit(child, names)

    yield from visit(ast.parse(path.read_text()), ())


def noticed(wait: Wait) -> str:
    """What noticed that it was missing: the first line of a failure; empty if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        changed = source / "shardwise" / wait.path
        changed.write_text(wait.taken_out(changed.read_text()))
        return next(filter(None, (_failure(source, *stage) for stage in STAGES)), "")


def _failure(source: Path, tests: Sequence[str], choice: str, late: bool) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), str(ROOT / "tests")])}
    if late:
        environment[LATE] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "170", "-p", "no:cacheprovider", "-o",
         f"pythonpath={source} tests", "-m", "not slow", "-k", choice, *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return ""
    lines = [line.removeprefix("E").strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    telling = [line for line in lines if "RACE" in line or ("Error" in line and "--- rank" not in line)]
    return (telling or lines or [f"pytest ended with {done.returncode}\n{done.stdout[-1000:]}"])[0]


def main(parts: list[str]) -> None:
    for wait in waits():
        if not parts or any(part in wait.name for part in parts):
            found = noticed(wait)
            print(f"{'noticed' if found else 'MISSED '} {wait.name}  |  {found[:160]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
