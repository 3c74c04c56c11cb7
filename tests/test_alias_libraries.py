"""Scripts for trl, peft, sentence-transformers and diffusers, unchanged, where ``accelerate`` means Shardwise.

They are held against the same scripts in one plain process with the real Accelerate, on the same batches.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import pytest

import processes
from library_scripts import LIBRARIES
from slowly import slow

pytest.importorskip("accelerate")
HERE = Path(__file__).parent
DRAWS = ("grpo",)
WALKED = ("transformers", "trl", "peft", "diffusers", "sentence_transformers", "lerobot", "lightning")


def ran(script: Path, *arguments: object) -> None:
    """A Python process of its own: it decides what ``accelerate`` is before anybody has imported that."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    code, _, said = processes.script(script, *arguments, environment=environment).finish(170)
    assert code == 0, said[-6000:]


def compared(folder: Path, strategies: str, scripts: list[str]) -> None:
    """Run them plain and under every strategy; what they logged and saved agrees."""
    from safetensors.torch import load_file

    for name in scripts:
        pytest.importorskip(LIBRARIES[name])
        if LIBRARIES[name] != "diffusers":
            pytest.importorskip("datasets")
    program = HERE / "library_scripts.py"
    ran(program, folder, *scripts)
    ran(program, folder, "--as", "accelerate", "--strategies", strategies, *scripts)
    for strategy in strategies.split(","):
        for name in scripts:
            # What is drawn at random depends on the number of ranks, and not on the strategy.
            plain, ours = (
                folder / (strategies.split(",")[0] if name in DRAWS else "plain") / name,
                folder / strategy / name,
            )
            expected, logged = (json.loads((run / "logged.json").read_text()) for run in (plain, ours))
            assert len(expected) > 2 and [list(step) for step in logged] == [list(step) for step in expected]
            for step, other in zip(logged, expected, strict=True):
                assert step == pytest.approx(other, rel=2e-3, abs=1e-4), f"{name} under {strategy}"
                assert all(math.isfinite(value) for value in step.values())
            (file,) = (plain / "final").glob("*.safetensors")
            theirs, saved = load_file(file), load_file(ours / "final" / file.name)
            assert saved.keys() == theirs.keys()
            for key, value in theirs.items():
                assert (saved[key] - value).abs().max() < 5e-3, f"{key} of {name} under {strategy}"
            before, after = (sorted(p.name for p in (run / "final").iterdir()) for run in (plain, ours))
            assert after == before


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("strategies", "scripts"),
    [
        ("zero3", ["lora"]),
        *(
            slow("ddp,zero1,zero2,zero3", s)
            for s in (["sft", "dpo", "reward", "grpo"], ["lora", "sentences"], ["unet"])
        ),
    ],
)
def test_scripts_train_as_with_accelerate(tmp_path: Path, strategies: str, scripts: list[str]) -> None:
    compared(tmp_path, strategies, scripts)


def imported(package: str) -> dict[tuple[str, str], str]:
    """What a package's own files import from Accelerate: (module, name or ``""``) and one place where."""
    found: dict[tuple[str, str], str] = {}
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in Path(root).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if "accelerate" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                where = f"{path}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.ImportFrom) and not node.level and node.module is not None:
                    if node.module.split(".")[0] == "accelerate":
                        found |= {(node.module, a.name): where for a in node.names}
                elif isinstance(node, ast.Import):
                    found |= {(a.name, ""): where for a in node.names if a.name.split(".")[0] == "accelerate"}
                elif isinstance(node, ast.Attribute) and of_the_module(node):
                    *path_of, name = ast.unparse(node).split(".")
                    found[".".join(path_of), name] = where
    return found


def of_the_module(node: ast.expr) -> bool:
    """Is it ``accelerate.hooks.ModelHook``, as it stands after ``import accelerate``?"""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "accelerate"


RESOLVE = """
import importlib, json, sys
import shardwise
shardwise.install_as("accelerate", "deepspeed")
missing = []
for module, name, where in json.load(open(sys.argv[1])):
    try:
        found = importlib.import_module(module)
        if name:
            exec(f"from {module} import {name}", {})
    except ImportError as error:
        try:  # an attribute of an attribute
            first, *rest = module.split(".")
            found = importlib.import_module(first)
            for part in [*rest, name]:
                found = getattr(found, part)
        except AttributeError:
            missing.append(f"{module} {name} ({where}): {error}")
assert "accelerate" in sys.modules and sys.modules["accelerate"].__file__.startswith(shardwise.__path__[0])
sys.exit("\\n".join(missing) or 0)
"""


def test_every_name_that_installed_libraries_import_is_there(tmp_path: Path) -> None:
    names: dict[tuple[str, str], str] = {}
    counted = defaultdict(int)
    for package in WALKED:
        for key, where in imported(package).items():
            names.setdefault(key, where)
            counted[package] += 1
    assert counted["transformers"] > 30 and counted["peft"] > 10, counted
    (tmp_path / "names.json").write_text(json.dumps([[*key, where] for key, where in names.items()]))
    (tmp_path / "resolve.py").write_text(RESOLVE)
    ran(tmp_path / "resolve.py", tmp_path / "names.json")
