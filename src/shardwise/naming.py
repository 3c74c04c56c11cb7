"""Names of parameters as plain PyTorch would have them, whatever wraps the modules they are in."""

from __future__ import annotations

from collections.abc import Collection

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""The attributes under which torch.compile, torch's ``checkpoint_wrapper`` and its FSDP keep the module they wrap."""


def clean_name(name: str) -> str:
    """A dotted name without the components that wrappers put into it.

    Also of names that have others before them, with a dot or, as optimizers' do, with a colon.
    """
    halves = (".".join(c for c in half.split(".") if c not in WRAPPERS) for half in name.split(":"))
    return ":".join(halves)


def clean_names(names: Collection[str]) -> dict[str, str]:
    """By name, its clean one; the name itself where that belongs to another one already."""
    out: dict[str, str] = {}
    taken = {name for name in names if clean_name(name) == name}
    for name in names:
        clean = clean_name(name)
        out[name] = clean if clean == name or clean not in taken else name
        taken.add(out[name])
    return out
