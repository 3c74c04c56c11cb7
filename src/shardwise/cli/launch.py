"""``shardwise launch``: run a training script on N ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from shardwise import environment
from shardwise.cli.console import say
from shardwise.errors import LaunchError
from shardwise.strategy import Strategy

# Everything after the script belongs to the script, also what begins with a dash.
CONTEXT = {"allow_interspersed_args": False}


def launch(
    script: Annotated[str, typer.Argument(help="The script to run, or a module name with -m.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments, passed on untouched.")] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", "-n", help="Ranks on this host. Default: one per CUDA device, else 1.")
    ] = None,
    nnodes: Annotated[int, typer.Option(help="Hosts. Run this command once on each.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(help="This host's number, 0 for the one at --rdzv-endpoint. Default: agreed upon.")
    ] = None,
    rdzv_endpoint: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the hosts meet.")] = "",
    rdzv_id: Annotated[str, typer.Option(help="Tells runs that meet at one endpoint apart.")] = "",
    max_restarts: Annotated[int, typer.Option(help="How often to start all ranks anew after a failure.")] = 0,
    strategy: Annotated[
        str | None, typer.Option(help="Use this strategy in place of the script's: ddp, zero1, zero2, zero3, hsdp, ...")
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(metavar="no|fp16|bf16", help="In place of the script's.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the CPU over gloo; CUDA devices are hidden.")] = False,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module name, as in python -m.")] = False,
) -> None:
    """Run a script on several ranks of this host, or of several hosts.

    Asked for N ranks, N run, on the CPU too. The exit code is 0 if all ranks succeeded, 1 if one failed,
    2 for a wrong request and 130 after Ctrl-C.
    """
    extra = ranks_environment(strategy, mixed_precision, cpu)
    _check_hosts(nnodes, node_rank, rdzv_endpoint, max_restarts)
    command = [*_target(script, module), *(args or [])]
    number = choose_nproc(nproc, cpu)
    # The agent's modules take a second to import, and a wrong request should not wait for them.
    from shardwise.cli.ranks import Ranks, run_ranks

    code = run_ranks(
        Ranks(
            command,
            number,
            nnodes=nnodes,
            node_rank=node_rank,
            endpoint=rdzv_endpoint,
            run_id=rdzv_id,
            max_restarts=max_restarts,
            environment={**extra, **thread_environment(number)},
        )
    )
    raise typer.Exit(code)


def choose_nproc(nproc: int | None, cpu: bool, default: int | None = None) -> int:
    """How many ranks to start, said on stderr where the user did not say it.

    Args:
        nproc: as asked for.
        cpu: the CPU was asked for.
        default: when nothing was asked for; ``None`` for one per CUDA device, or 1.

    Raises:
        LaunchError: fewer than one, or more than there are CUDA devices to use.
    """
    import torch

    devices = 0 if cpu else torch.cuda.device_count()
    if nproc is None:
        number = default or devices or 1
        number = min(number, devices) if devices else number
        where = f"of {devices} CUDA devices" if devices else "on the CPU"
        say(f"shardwise: {number} rank{'s' * (number > 1)} {where} (--nproc chooses how many)")
        return number
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc} is not a number of ranks", fix="give 1 or more")
    if devices and nproc > devices:
        raise LaunchError(
            f"--nproc {nproc} asks for more ranks than there are CUDA devices ({devices})",
            fix=f"--nproc {devices}, or --cpu to run {nproc} ranks on the CPU",
        )
    return nproc


def ranks_environment(strategy: str | None, mixed_precision: str | None, cpu: bool) -> dict[str, str]:
    """The variables that tell the ranks what was asked for; see :mod:`shardwise.environment`.

    Raises:
        ShardwiseError: the strategy or precision does not exist, or this version cannot serve it.
    """
    out = {}
    if strategy is not None:
        chosen = Strategy.parse(strategy)
        chosen.require_available()
        out[environment.STRATEGY] = str(chosen)
    if mixed_precision is not None:
        if mixed_precision not in environment.PRECISIONS:
            raise LaunchError(
                f"--mixed-precision {mixed_precision} is not known", fix=f"one of {', '.join(environment.PRECISIONS)}"
            )
        out[environment.MIXED_PRECISION] = mixed_precision
    if cpu:
        out[environment.CPU] = "1"
        out["CUDA_VISIBLE_DEVICES"] = ""
    return out


def thread_environment(nproc: int) -> dict[str, str]:
    """The cores divided among the ranks, unless the user has divided them: N ranks with all cores each is slow."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not every system has it
        cores = os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // nproc))}


def _check_hosts(nnodes: int, node_rank: int | None, endpoint: str, max_restarts: int) -> None:
    if nnodes < 1:
        raise LaunchError(f"--nnodes {nnodes} is not a number of hosts", fix="give 1 or more")
    if max_restarts < 0:
        raise LaunchError(f"--max-restarts {max_restarts} is not a number of restarts", fix="give 0 or more")
    if node_rank is not None and not 0 <= node_rank < nnodes:
        raise LaunchError(
            f"--node-rank {node_rank} is not a host of {nnodes}", fix=f"give 0 to {nnodes - 1}, and --nnodes"
        )
    if nnodes > 1 and not endpoint:
        raise LaunchError(
            f"{nnodes} hosts need a place to meet", fix="--rdzv-endpoint host:port, the same on every host"
        )
    if endpoint and not endpoint.rpartition(":")[2].isdigit():
        raise LaunchError(f"--rdzv-endpoint {endpoint} has no port", fix="write host:port, for example node0:29400")


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
        if not path.suffix and importlib.util.find_spec(script.split(".")[0]) is not None:
            fix = f"for a module: shardwise launch -m {script}"
        elif shutil.which(script):
            fix = "give the Python script itself; ranks are Python processes"
        raise LaunchError(f"there is no script '{script}'", fix=fix)
    return [script]
