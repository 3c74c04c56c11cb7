"""``shardwise launch``: run a training script on N ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from shardwise import environment
from shardwise.cli import settings_file as files
from shardwise.cli.alias import alias_environment
from shardwise.cli.console import say
from shardwise.cli.host import cores
from shardwise.cli.restart_policy import RestartPolicy
from shardwise.cli.settings import Settings
from shardwise.deepspeed_config import load_ds_config, read_ds_config
from shardwise.errors import LaunchError
from shardwise.strategy import Strategy

# Everything after the script belongs to the script, also what begins with a dash.
CONTEXT = {"allow_interspersed_args": False}
# What other launchers call it, with dashes.
_ELSEWHERE = {
    "--num-processes": "--nproc, the ranks on each host (Accelerate counts those of all hosts)",
    "--nproc-per-node": "--nproc",
    "--num-machines": "--nnodes",
    "--machine-rank": "--node-rank",
    "--main-process-ip": "--rdzv-endpoint host:port",
    "--main-process-port": "--rdzv-endpoint host:port, with several hosts; one host finds a free port",
    "--master-addr": "--rdzv-endpoint host:port",
    "--master-port": "--rdzv-endpoint host:port, with several hosts; one host finds a free port",
    "--standalone": "nothing: one host needs no endpoint",
    "--rdzv-backend": "nothing: hosts meet at --rdzv-endpoint",
    "--config-file": "--config",
    "--gpu-ids": "--devices",
    "--num-gpus": "--nproc",
    "--multi-gpu": "nothing: every device is used; --nproc says how many",
    "--use-fsdp": "--strategy zero3",
    "--use-deepspeed": "--deepspeed-config FILE, or --strategy zero2",
    "--deepspeed-config-file": "--deepspeed-config",
    "--deepspeed-hostfile": "'shardwise deepspeed --hostfile FILE'",
    "--hostfile": "'shardwise deepspeed --hostfile FILE'",
    "--zero-stage": "--strategy zero1, zero2 or zero3",
    "--fsdp-sharding-strategy": "--strategy",
    "--num-cpu-threads-per-process": "the variable OMP_NUM_THREADS; cores are divided among the ranks without it",
}
_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])  # of whichever parser typer brings along


class Command(TyperCommand):
    """The command's parser, which knows the options of other launchers well enough to say what they are here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return parsed(super().parse_args, ctx, args, "launch", _ELSEWHERE)


def parsed(
    parse: Callable[[Any, list[str]], list[str]], ctx: Any, args: list[str], name: str, elsewhere: dict[str, str]
) -> list[str]:
    """What a command's parser makes of ``args``.

    Raises:
        LaunchError: an option of another launcher; says what it is here.
    """
    try:
        return parse(ctx, args)
    except _UsageError as error:
        option = str(getattr(error, "option_name", ""))
        here = elsewhere.get(option.replace("_", "-"))
        if here is None:
            raise
        raise LaunchError(f"{name} has no option {option}", fix=f"use {here}") from None


def launch(
    script: Annotated[str, typer.Argument(help="The script to run, or a module name with -m.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments, passed on untouched.")] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", "-n", help="Ranks on this host. Default: one per accelerator, else 1.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="The devices to use. Default: all that are visible.")
    ] = None,
    nnodes: Annotated[int | None, typer.Option(help="Hosts. Run this command once on each.", show_default="1")] = None,
    node_rank: Annotated[
        int | None, typer.Option(help="This host's number, 0 for the one at --rdzv-endpoint. Default: agreed upon.")
    ] = None,
    rdzv_endpoint: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the hosts meet.")] = None,
    rdzv_id: Annotated[str | None, typer.Option(help="Tells runs that meet at one endpoint apart.")] = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="How often to start all ranks anew after a failure.", show_default="0")
    ] = None,
    min_nproc: Annotated[
        int | None,
        typer.Option(
            help="After losing a rank, start anew without it, with at least this many.", show_default="--nproc"
        ),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Use this strategy in place of the script's: ddp, zero1, zero2, zero3, hsdp, ...")
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(metavar="no|fp16|bf16", help="In place of the script's.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Micro-batches per step, in place of the Accelerator's.")
    ] = None,
    cpu: Annotated[
        bool | None,
        typer.Option("--cpu/--no-cpu", help="Run on the CPU over gloo; other devices are hidden.", show_default="no"),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write down there what every rank does, for 'shardwise report DIR'."),
    ] = None,
    deepspeed_config: Annotated[
        Path | None,
        typer.Option(
            "--deepspeed-config",
            "--deepspeed_config",
            metavar="FILE",
            help="A DeepSpeed JSON: the strategy of Accelerators, and of scripts for DeepSpeed that name none.",
        ),
    ] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="accelerate|deepspeed",
            help="Let 'import accelerate' in the script mean Shardwise, or deepspeed, or both: accelerate,deepspeed.",
        ),
    ] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module name, as in python -m.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings to start from: a file of 'shardwise config', or of Accelerate."),
    ] = None,
    no_config: Annotated[
        bool, typer.Option("--no-config", help="Leave the default settings file out, if there is one.")
    ] = False,
) -> None:
    """Run a script on several ranks of this host, or of several hosts.

    Asked for N ranks, N run, on the CPU too. Flags win over the settings file, which wins over the script. The exit
    code is 0 if all ranks succeeded, 1 if one failed, 2 for a wrong request and 130 after Ctrl-C.
    """
    flags = Settings(
        nproc, devices, nnodes, node_rank, rdzv_endpoint, rdzv_id, max_restarts, min_nproc,
        strategy, mixed_precision, gradient_accumulation_steps, cpu,
    )  # fmt: skip
    described = _deepspeed_environment(deepspeed_config, flags)
    wanted = flags.over(_from_file(config, no_config, flags))
    if described:
        wanted = replace(wanted, strategy=None)
    wanted.check()
    target = _target(script, module)
    command = [*target, *(args or [])]
    stood_in_for = alias_environment(as_, target)
    extra = {**ranks_environment(wanted), **_record_environment(record), **described, **stood_in_for}
    number = choose_nproc(wanted.nproc, wanted.cpu, devices=wanted.device_list())
    wanted = replace(wanted, nproc=number)
    wanted.check()  # once more: what was asked for must suit a number that was not, too
    # The agent's modules take a second to import, and a wrong request should not wait for them.
    from shardwise.cli.ranks import Ranks, run_ranks

    code = run_ranks(
        Ranks(
            command,
            number,
            nnodes=wanted.nnodes or 1,
            node_rank=wanted.node_rank,
            endpoint=wanted.rdzv_endpoint or "",
            run_id=wanted.rdzv_id or "",
            max_restarts=wanted.max_restarts or 0,
            **_restart_policy(wanted, extra),
            environment={**extra, **thread_environment(number)},
        )
    )
    raise typer.Exit(code)


def choose_nproc(
    nproc: int | None, cpu: bool | None, default: int | None = None, devices: list[str] | None = None
) -> int:
    """How many ranks to start, said on stderr where the user did not say it.

    Args:
        nproc: as asked for.
        cpu: the CPU was asked for; ``False`` if it was refused, ``None`` if it is what there is without devices.
        default: when nothing was asked for; ``None`` for one per accelerator, or 1.
        devices: the devices that were named; empty for all.

    Raises:
        LaunchError: fewer than one, or more than there are devices to use, or devices that do not exist.
    """
    from shardwise import device

    kind, present = device.accelerator(), 0 if cpu else device.count()
    if devices:
        missing = [name for name in devices if name.isdigit() and int(name) >= present]
        if missing:
            have = f"there are {present} {kind} devices" if present else "there is no accelerator here"
            raise LaunchError(f"--devices names {', '.join(missing)}, but {have}", fix="shardwise doctor lists them")
        present = len(devices)
    if cpu is False and not present:
        raise LaunchError("--no-cpu, but there is no accelerator here", fix="--cpu, or 'shardwise doctor' to see why")
    if nproc is None:
        number = default or present or 1
        number = min(number, present) if present else number
        where = f"of {present} {kind} device{'s' * (present > 1)}" if present else "on the CPU"
        say(f"shardwise: {number} rank{'s' * (number > 1)} {where} (--nproc chooses how many)")
        return number
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc} is not a number of ranks", fix="give 1 or more")
    if present and nproc > present:
        raise LaunchError(
            f"--nproc {nproc} asks for more ranks than there are {kind} devices ({present})",
            fix=f"--nproc {present}, or --cpu to run {nproc} ranks on the CPU",
        )
    if not present and not cpu:
        say(f"shardwise: {nproc} rank{'s' * (nproc > 1)} on the CPU, as there is no accelerator (--cpu says so)")
    return nproc


def ranks_environment(wanted: Settings) -> dict[str, str]:
    """The variables that tell the ranks what was asked for; see :mod:`shardwise.environment`.

    Raises:
        ShardwiseError: the strategy or precision does not exist, or this version cannot serve it.
    """
    from shardwise import device

    wanted.check()
    out = {}
    if wanted.strategy is not None:
        out[environment.STRATEGY] = str(Strategy.parse(wanted.strategy))
    if wanted.mixed_precision is not None:
        out[environment.MIXED_PRECISION] = wanted.mixed_precision
    if wanted.gradient_accumulation_steps is not None:
        out[environment.ACCUMULATION] = str(wanted.gradient_accumulation_steps)
    if wanted.cpu:
        out[environment.CPU] = "1"
        out |= device.hidden()
    elif wanted.devices is not None:
        shown_by = device.visible_variable()
        if shown_by is None:
            raise LaunchError(
                f"--devices cannot be served for {device.accelerator()}: no variable says which ones a process sees",
                fix="leave it out, and use the first ones by --nproc",
            )
        out[shown_by] = ",".join(visible(wanted.device_list(), os.environ.get(shown_by)))
    return out


def _record_environment(record: Path | None) -> dict[str, str]:
    """Raises LaunchError if the folder cannot be there."""
    if record is None:
        return {}
    try:
        record.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"--record {record}: {error.strerror or error}", fix="name a folder, which is made if it is not there"
        ) from error
    return {environment.RECORD: str(record.resolve())}


def _deepspeed_environment(path: Path | None, flags: Settings) -> dict[str, str]:
    """Raises ShardwiseError if the configuration cannot be served, or contradicts another flag."""
    if path is None:
        return {}
    if flags.strategy is not None:
        raise LaunchError("--strategy and --deepspeed-config contradict each other", fix="give one of them")
    read_ds_config(*load_ds_config(path))
    return {environment.DEEPSPEED_CONFIG: str(path.resolve())}


def _restart_policy(wanted: Settings, variables: dict[str, str]) -> dict[str, Any]:
    """The part of :class:`~shardwise.cli.ranks.Ranks` about starts with fewer ranks.

    Args:
        wanted: settings with the number of ranks.
        variables: what the ranks get on top of this process's environment.
    """
    from shardwise import device

    if wanted.min_nproc is None:
        return {}
    count = 0 if wanted.cpu else device.count()
    shown_by = device.visible_variable()
    all_of_them = ",".join(map(str, range(count if shown_by is not None else 0)))
    said = {**os.environ, **variables}.get(shown_by or "", all_of_them)
    multiple = Strategy.parse(wanted.strategy).shard_size if wanted.strategy is not None else None
    return {
        "restart_policy": RestartPolicy(wanted.min_nproc, multiple or 1, shown_by, tried=count > 0),
        "devices": [name for part in said.split(",") if (name := part.strip())],
    }


def visible(names: list[str], already: str | None) -> list[str]:
    """Devices as the ranks must be told of them: numbers count what this process sees, which may be a part."""
    seen = [name.strip() for name in already.split(",")] if already else []
    return [seen[int(name)] if seen and name.isdigit() and int(name) < len(seen) else name for name in names]


def thread_environment(nproc: int) -> dict[str, str]:
    """The cores divided among the ranks, unless the user has divided them: N ranks with all cores each is slow."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // nproc))}


def _from_file(config: Path | None, no_config: bool, flags: Settings) -> Settings:
    """The settings of the file that was named, or of the default one; said on stderr."""
    if config is not None and no_config:
        raise LaunchError("--config and --no-config contradict each other", fix="give one of them")
    path = config if config is not None else files.default_path()
    if no_config or (config is None and not path.is_file()):
        return Settings()
    found = files.read(path)
    settings = found.settings
    # What a flag contradicts is gone: --cpu on top of a file that names devices means the CPU.
    if flags.cpu:
        settings = replace(settings, devices=None)
    if flags.devices is not None and settings.cpu:
        settings = replace(settings, cpu=None)
    if flags.nnodes == 1:
        settings = replace(settings, node_rank=None, rdzv_endpoint=None)
    if flags.max_restarts == 0 or (flags.nproc is not None and flags.nproc < (settings.min_nproc or 0)):
        settings = replace(settings, min_nproc=None)
    how = "" if config is not None else " (--no-config leaves it out)"
    kind = ", Accelerate's format" if found.kind == "accelerate" else ""
    say(f"shardwise: settings from {path}{kind}{how}")
    for note in found.notes:
        say(f"shardwise: note: {note}")
    if found.dropped:
        count = len(found.dropped)
        say(
            f"shardwise: {count} of its keys change{'s' * (count == 1)} nothing here; "
            f"'shardwise config --from {path}' says why"
        )
    return settings


def _target(script: str, module: bool) -> list[str]:
    if module:
        # A module of the current directory counts, as with python -m.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            found = importlib.util.find_spec(script)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise LaunchError(f"there is no module '{script}'", fix="check its name, and that it is installed here")
        return ["-m", script]
    path = Path(script)
    if path.is_dir() and (path / "__main__.py").is_file():
        return [script]
    if not path.is_file():
        fix = f"look in {path.parent.resolve()}" if path.parent.is_dir() else f"{path.parent} does not exist either"
        if not path.suffix and _is_module(script.split(".")[0]):
            fix = f"for a module: shardwise launch -m {script}"
        elif shutil.which(script):
            fix = "give the Python script itself; ranks are Python processes"
        raise LaunchError(f"there is no script '{script}'", fix=fix)
    return [script]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
