"""``shardwise checkpoint``: look into checkpoints, check them, write them as safetensors, compare them.

Works in one process, without the model, block by block, on whatever ``shardwise.checkpoint.load_model`` reads.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwise.cli.console import say
from shardwise.errors import CheckpointError
from shardwise.sizes import format_bytes

if TYPE_CHECKING:
    from shardwise.checkpoint.manifest import Manifest
    from shardwise.checkpoint.stored_tensor import Source, Stored

_ANY = "A checkpoint of Shardwise, FSDP or DeepSpeed, a Hugging Face folder, or a .safetensors, .pt, .pth or .bin file."
_As_json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_Part = Annotated[
    str | None, typer.Option(metavar="NAME", help="The dict of weights, if there are several: model_1, ema, ...")
]

app = typer.Typer(
    help="Look into checkpoints, check them, write them as safetensors, compare them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=f"{_ANY} Or a folder with several checkpoints.")],
    summary: Annotated[bool, typer.Option("--summary", "-s", help="Leave the table of tensors out.")] = False,
    as_json: _As_json = False,
) -> None:
    """Say what is inside: who wrote it, strategy and world size, step, sizes, and every parameter.

    Reads indexes only, whatever the size.
    """
    inside = _series(directory)
    if inside:
        _list(inside, as_json)
        return
    from shardwise.checkpoint.formats import open_source

    source = open_source(directory)
    facts, sections, others = _facts(source), _sections(source), _others(source)
    if as_json:
        tensors = [
            {"name": ".".join((*s, name)), "shape": list(t.shape), "dtype": str(t.dtype)[6:], "bytes": t.nbytes,
             "tied_to": tied, "optimizer_state": state}
            for s, rows in sections.items() for name, t, tied, state in rows
        ]  # fmt: skip
        print(json.dumps({**facts, "tensors": tensors, "other_tensors": others}, indent=2))
        return
    console = _console()
    console.print(_grid(facts))
    for section, rows in sections.items():
        console.print()
        unique = {id(t): t for _, t, _, _ in rows}.values()
        title = f"{'.'.join(section) or 'tensors'}: {len(rows)} names, {sum(t.numel for t in unique):,} elements"
        if summary:
            console.print(f"{title}, {format_bytes(sum(t.nbytes for t in unique))}", markup=False)
            continue
        columns = ["name", "shape", "dtype", ">size"] + ["optimizer state"] * any(state for *_, state in rows)
        table = _table(f"{title}, {format_bytes(sum(t.nbytes for t in unique))}", *columns)
        for name, t, tied, state in rows:
            size = f"tied to {tied}" if tied else format_bytes(t.nbytes)
            cells = [name, _shape(t), str(t.dtype)[6:], size, ", ".join(state)]
            table.add_row(*_escaped(cells[: len(columns)]))
        console.print(table)
    for name, (count, nbytes) in others.items():
        console.print(f"\n{name}: {count} tensors, {format_bytes(nbytes)}", markup=False)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=f"{_ANY} Or a folder with several checkpoints.")],
) -> None:
    """Read every file of a checkpoint against its checksum.

    Formats without checksums: their indexes are read, and every tensor is looked for in its file. The exit code is 0 if
    all is well, and 1 if something is damaged or missing.
    """
    from shardwise.checkpoint.conversion import check

    bad = 0
    for path in _series(directory) or [directory]:
        try:
            source, problems = check(path)
        except CheckpointError as error:
            if path == directory:
                raise
            problems = [f"{error.where}: {error.what}"]
        for problem in problems:
            print(f"{path}: {problem}")
        bad += bool(problems)
        if not problems:
            how = "every byte is as it was written" if source.kind == "shardwise" else "complete; it has no checksums"
            print(f"{path}: {len(source.files)} files, {format_bytes(sum(source.files.values()))}: {how}")
    raise typer.Exit(1 if bad else 0)


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=_ANY)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write to.")],
    part: _Part = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Bytes per file at most: 500MB, 5GB.")] = "10GB",
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|bf16|fp16", help="Of the weights. Default: as they are.")
    ] = None,
    how: Annotated[
        str, typer.Option("--format", metavar="safetensors|bin|deepspeed", help="What to write; see above.")
    ] = "safetensors",
    stage: Annotated[int, typer.Option(help="deepspeed: the ZeRO stage that goes on, 1 to 3.")] = 2,
    ranks: Annotated[int, typer.Option(help="deepspeed: how many ranks go on.")] = 1,
    tag: Annotated[str | None, typer.Option(help="deepspeed: the folder's name; global_step<n> by default.")] = None,
) -> None:
    """Write the weights as safetensors files that transformers' from_pretrained reads.

    Put the model's config.json into the folder too. With --format bin, they are files of torch.save. With --format
    deepspeed, OUT is a folder that DeepSpeed's engine.load_checkpoint goes on from, with optimizer state, scheduler and
    counters, under the stage and on the number of ranks that are asked for.
    """
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if dtype is not None and dtype not in dtypes:
        raise CheckpointError(f"--dtype {dtype} is not known", fix=f"one of {', '.join(dtypes)}")
    if how not in ("safetensors", "bin", "deepspeed"):
        raise CheckpointError(f"--format {how} is not known", fix="safetensors, bin or deepspeed")
    import torch

    wanted = None if dtype is None else getattr(torch, dtypes[dtype])
    if how == "deepspeed":
        from shardwise.checkpoint.deepspeed_export import export_deepspeed

        root = export_deepspeed(directory, out, stage=stage, ranks=ranks, dtype=wanted or torch.float32, tag=tag)
        files = list(root.iterdir())
        say(f"shardwise: wrote {len(files)} files ({format_bytes(sum(p.stat().st_size for p in files))}) to {root}")
        return
    from shardwise.checkpoint.conversion import export as write

    safe = how == "safetensors"
    root = write(directory, out, part=part, max_shard_size=max_shard_size, dtype=wanted, safe_serialization=safe)
    written = sorted(p for p in root.glob("model*.safetensors*" if safe else "pytorch_model*.bin*"))
    size = format_bytes(sum(p.stat().st_size for p in written))
    say(f"shardwise: wrote {', '.join(p.name for p in written[:3])}{', ...' * (len(written) > 3)} ({size}) to {root}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help=_ANY)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one, in any of the formats.")],
    part: _Part = None,
    as_json: _As_json = False,
) -> None:
    """Compare two checkpoints: names, shapes, dtypes, and the largest absolute difference of each tensor.

    Of two formats, the weights are compared. The exit code is 0 if all is equal, and 1 if not.
    """
    from shardwise.checkpoint.conversion import compare

    found = compare(a, b, part=part)
    if as_json:
        rows = [
            {"name": d.name, "difference": d.what, "a": _side(d.a), "b": _side(d.b), "largest": d.largest}
            for d in found.differences
        ]
        print(json.dumps({"same": found.same, "differences": rows}, indent=2))
    else:
        console = _console()
        if found.differences:
            table = _table(f"A: {a}\nB: {b}", "name", "difference", "A", "B", ">largest")
            for d in found.differences:
                largest = "" if d.largest is None else f"{d.largest:.3g}"
                table.add_row(*_escaped([d.name, d.what, _side(d.a) or "", _side(d.b) or "", largest]))
            console.print(table)
        console.print(f"tensors: {found.same} equal, {len(found.differences)} different", markup=False)
    raise typer.Exit(1 if found.differences else 0)


# --- what is said ---------------------------------------------------------------------------------------
def _series(directory: Path) -> list[Path]:
    """The checkpoints inside a folder that is none itself, by name."""
    from shardwise.checkpoint.manifest import MANIFEST

    if not directory.is_dir() or (directory / MANIFEST).is_file():
        return []
    from shardwise.checkpoint.deepspeed_format import step_folder

    inside = [p for p in directory.iterdir() if p.is_dir()]
    found = [p for p in inside if (p / MANIFEST).is_file()]
    if not found and step_folder(directory) != directory:
        steps = [p for p in inside if step_folder(p) == p]
        found = steps if len(steps) > 1 else []
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _list(inside: Iterable[Path], as_json: bool) -> None:
    from shardwise.checkpoint.deepspeed_contents import contents_of
    from shardwise.checkpoint.deepspeed_format import step_folder
    from shardwise.checkpoint.directory import read_manifest

    rows: list[dict[str, Any]] = []
    for path in inside:
        try:
            manifest = contents_of(path, []).manifest if step_folder(path) else read_manifest(path)
        except CheckpointError as error:
            rows.append({"path": str(path), "problem": error.what})
        else:
            rows.append({"path": str(path), **_of_manifest(manifest)})
    if as_json:
        print(json.dumps({"checkpoints": rows}, indent=2))
        return
    keys = ["step", "epoch", "models", "world size", "saved"]
    keys = [key for key in keys if any(key in row for row in rows)]
    table = _table("checkpoints", "name", *keys, ">size")
    for row in rows:
        if "problem" in row:
            table.add_row(*_escaped([Path(row["path"]).name, row["problem"]]))
        else:
            cells = [Path(row["path"]).name, *(str(row.get(key, "")) for key in keys), format_bytes(row["bytes"])]
            table.add_row(*_escaped(cells))
    _console().print(table)


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.saved_at))
    pairs = zip(manifest.models, manifest.strategies, strict=False)
    models = ", ".join(f"{name} ({'not sharded' if how == 'none' else how})" for name, how in pairs)
    facts: dict[str, Any] = {"saved": saved, "torch": manifest.torch, "world size": manifest.world_size}
    facts |= {"models": models, "optimizers": ", ".join(manifest.optimizers)}
    facts |= {key: value for key, value in manifest.info.items() if isinstance(value, (int, float, str))}
    facts = {key: value for key, value in facts.items() if value not in ("", [])}
    return {**facts, "bytes": sum(entry.size for entry in manifest.files.values())}


def _facts(source: Source) -> dict[str, Any]:
    from shardwise.checkpoint.stored_tensor import KINDS

    facts: dict[str, Any] = {"path": str(source.path), "written as": KINDS[source.kind]}
    manifest: Manifest | None = source.facts.get("manifest")
    rest = _of_manifest(manifest) if manifest is not None else source.facts
    facts |= {key: value for key, value in rest.items() if key != "bytes" and value not in ("", [])}
    if source.kind in ("shardwise", "deepspeed"):
        from shardwise.checkpoint.source_state import state_of

        found = state_of(source)
        assert found is not None
        facts |= _of_state(found[0])
    return {**facts, "files": len(source.files), "bytes": sum(source.files.values())}


def _of_state(common: dict[str, Any]) -> dict[str, Any]:
    """What is there beside tensors."""
    out: dict[str, Any] = {}
    groups = [group for saved in common["optimizers"] for group in saved["groups"]]
    if groups:
        rates = dict.fromkeys(f"{float(g['values']['lr']):g}" for g in groups if "lr" in g["values"])
        out["optimizer groups"] = f"{len(groups)}" + (f", lr {', '.join(rates)}" if rates else "")
    small = {key: value for key, value in common["state"].items() if value is not None and value != {}}
    scaler = small.get("loss_scaler")
    if isinstance(scaler, dict) and "cur_scale" in scaler:
        out["loss scale"] = f"{float(scaler['cur_scale']):g}"
    client = small.get("client_state")
    if isinstance(client, dict):
        out["client_state"] = [str(key) for key in client]
    return out | ({"also": [str(key) for key in small]} if small else {})


Row = tuple[str, "Stored", str, list[str]]
"""A tensor's name, the tensor, the name it is tied to, and the keys of its optimizer state."""


def _of_optimizer(section: tuple[str, ...]) -> bool:
    return len(section) > 1 and ("optim" in section[0].lower() or section[-2] == "state")


def _sections(source: Source) -> dict[tuple[str, ...], list[Row]]:
    """The state dicts of models, with the optimizer's state beside each parameter."""
    states: dict[str, list[str]] = {}
    for section, tensors in source.sections.items():
        if _of_optimizer(section):
            states.setdefault(section[-1], []).extend(tensors)
    out: dict[tuple[str, ...], list[Row]] = {}
    for section, tensors in source.sections.items():
        if _of_optimizer(section):
            continue
        first: dict[int, str] = {}
        for name, t in tensors.items():
            known = first.setdefault(id(t), name)
            state = states.get(name if section in ((), ("model",)) else f"{'.'.join(section)}:{name}", [])
            out.setdefault(section, []).append((name, t, "" if known == name else known, state))
    return out


def _others(source: Source) -> dict[str, tuple[int, int]]:
    """Tensors of optimizers, by the first key: how many, and how many bytes."""
    out: dict[str, tuple[int, int]] = {}
    for section, tensors in source.sections.items():
        if _of_optimizer(section):
            count, nbytes = out.get(section[0], (0, 0))
            out[section[0]] = count + len(tensors), nbytes + sum(t.nbytes for t in tensors.values())
    return out


def _side(stored: Stored | None) -> str | None:
    return None if stored is None else f"{_shape(stored)} {str(stored.dtype)[6:]}"


def _shape(stored: Stored) -> str:
    return str(stored.shape)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)  # nobody wants cut names in a pipe


def _escaped(cells: Iterable[str]) -> list[str]:
    from rich.markup import escape

    return [escape(cell) for cell in cells]


def _grid(facts: dict[str, Any]) -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        text = format_bytes(value) if name == "bytes" else text
        grid.add_row(*_escaped(["size" if name == "bytes" else name, text]))
    return grid


def _table(title: str, *columns: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table
