"""``shardwise deepspeed``: DeepSpeed's launcher arguments, on the launcher there is."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from shardwise.cli import launch
from shardwise.cli.console import say
from shardwise.cli.hostfile import Hosts, chosen, is_here, read_hostfile
from shardwise.errors import LaunchError

_HERE = "localhost"
_USUAL_FILE = Path("/job/hostfile")
_PORT = 29500
_EVERY_HOST = "run the command of each host on it; ssh, or your cluster's own means, does that"
_ELSEWHERE = {
    "--launcher": _EVERY_HOST,
    "--launcher-args": _EVERY_HOST,
    "--ssh-port": _EVERY_HOST,
    "--venv-script": _EVERY_HOST,
    "--force-multi": "--hostfile, and --node_rank for the host that this is",
    "--no-python": "the Python script itself; ranks are Python processes",
    "--autotuning": "'shardwise plan', which finds a strategy without running",
    "--elastic-training": "'shardwise launch --min-nproc N', which goes on with fewer ranks",
    "--enable-each-rank-log": "'shardwise launch --record DIR', which writes down what every rank does",
    "--save-pid": "the launcher's own process; its ranks end with it",
    "--bind-cores-to-rank": "nothing: cores are divided among the ranks",
    "--bind-core-list": "the variable OMP_NUM_THREADS",
}


class Command(TyperCommand):
    """The command's parser, which says what the rest of DeepSpeed's options are here."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return launch.parsed(super().parse_args, ctx, args, "deepspeed", _ELSEWHERE)


def deepspeed(
    script: Annotated[str, typer.Argument(help="The script to run, or a module name with --module.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments, passed on untouched.")] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(
            "--num_gpus", "--num-gpus", "--num_accelerators", help="Ranks on each host. Default: all devices."
        ),
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option("--num_nodes", "--num-nodes", help="The first so many hosts of the file.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option("--hostfile", "-H", metavar="FILE", help="Lines of hosts: 'worker-0 slots=4'.")
    ] = None,
    include: Annotated[
        str, typer.Option("--include", "-i", metavar="HOST[:0,1]@...", help="Only these hosts and devices.")
    ] = "",
    exclude: Annotated[str, typer.Option("--exclude", "-e", metavar="HOST[:0,1]@...", help="All but these.")] = "",
    master_addr: Annotated[
        str, typer.Option("--master_addr", "--master-addr", help="Where several hosts meet. Default: the first one.")
    ] = "",
    master_port: Annotated[
        int | None, typer.Option("--master_port", "--master-port", help="Its port.", show_default=str(_PORT))
    ] = None,
    node_rank: Annotated[
        int, typer.Option("--node_rank", "--node-rank", help="Start the ranks of this host, of several.")
    ] = -1,
    module: Annotated[bool, typer.Option("--module", help="SCRIPT is a module name, as in python -m.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the CPU over gloo.")] = False,
    no_local_rank: Annotated[bool, typer.Option("--no_local_rank", hidden=True)] = False,
    no_ssh: Annotated[bool, typer.Option("--no_ssh", hidden=True)] = False,
    no_ssh_check: Annotated[bool, typer.Option("--no_ssh_check", hidden=True)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", hidden=True)] = False,
) -> None:
    """Run a script with the arguments of DeepSpeed's launcher.

    One host is started as 'shardwise launch' does. Of several, this prints the command of each; with --node_rank it
    starts the ranks of this one. LOCAL_RANK says a rank's device; --local_rank is not passed to the script.
    """
    hosts = _hosts(hostfile, num_gpus, num_nodes, include, exclude, cpu)
    start = _Start(script, args or [], module, cpu)
    if len(hosts) == 1:
        ((name, devices),) = hosts.items()
        if not is_here(name) and node_rank < 0:
            raise LaunchError(f"the one host is {name}, which is not this one", fix=f"there: {start.command(devices)}")
        start.run(devices, {})
        return
    first = master_addr or next(iter(hosts))
    endpoint = f"{first}:{master_port or _PORT}"
    counts = {len(devices) for devices in hosts.values()}
    if len(counts) > 1:
        raise LaunchError(
            f"hosts with {' and '.join(map(str, sorted(counts)))} devices",
            fix="--num_gpus, or --include, with as many on each: a run has as many ranks on every host",
        )
    meet = {"nnodes": len(hosts), "rdzv_endpoint": endpoint}
    if node_rank >= len(hosts):
        raise LaunchError(f"--node_rank {node_rank}, and there are {len(hosts)} hosts", fix="count from 0")
    if node_rank >= 0:
        start.run(list(hosts.values())[node_rank], {**meet, "node_rank": node_rank})
        return
    lines = [
        f"  on {name}: {start.command(devices, {**meet, 'node_rank': rank})}"
        for rank, (name, devices) in enumerate(hosts.items())
    ]
    say("\n".join((f"shardwise: {len(hosts)} hosts. Run on each of them:", *lines)))
    raise typer.Exit(2)


@dataclass
class _Start:
    """What is started on a host."""

    script: str
    args: list[str]
    module: bool
    cpu: bool

    def run(self, devices: list[int], where: dict[str, Any]) -> None:
        """Start the ranks here; ends as ``shardwise launch`` does."""
        launch.launch(self.script, self.args, module=self.module, no_config=True, **self._flags(devices), **where)

    def command(self, devices: list[int], where: dict[str, Any] | None = None) -> str:
        """The same as a line of a shell."""
        words = ["shardwise", "launch"]
        for name, value in {**self._flags(devices), **(where or {})}.items():
            flag = f"--{name.replace('_', '-')}"
            if value is not None and value is not False:
                words += [flag] if value is True else [flag, str(value)]
        words += ["--module"] * self.module
        return shlex.join([*words, self.script, *self.args])

    def _flags(self, devices: list[int]) -> dict[str, Any]:
        # Devices from 0 on are what --nproc means; on the CPU there are none to name.
        named = None if self.cpu or devices == list(range(len(devices))) else ",".join(map(str, devices))
        return {"nproc": len(devices), "devices": named, "cpu": True if self.cpu else None}


def _hosts(
    hostfile: Path | None, num_gpus: int | None, num_nodes: int | None, include: str, exclude: str, cpu: bool
) -> Hosts:
    """The hosts and devices that were asked for."""
    if (num_gpus is not None or num_nodes is not None) and (include or exclude):
        raise LaunchError("--num_gpus or --num_nodes, with --include or --exclude", fix="one way to choose")
    for name, value in (("num_gpus", num_gpus), ("num_nodes", num_nodes)):
        if value is not None and value < 1:
            raise LaunchError(f"--{name} {value} chooses nothing", fix="1 or more")
    if hostfile is None and _USUAL_FILE.is_file():
        say(f"shardwise: hosts from {_USUAL_FILE}")
        hostfile = _USUAL_FILE
    if hostfile is not None:
        hosts = chosen(read_hostfile(hostfile), include, exclude)
    else:
        hosts = chosen(_this_host(num_gpus, include or exclude, cpu), include, exclude)
    if num_nodes is not None and num_nodes > len(hosts):
        raise LaunchError(f"--num_nodes {num_nodes}, and there are {len(hosts)}", fix="--hostfile names all hosts")
    hosts = dict(list(hosts.items())[:num_nodes])
    if num_gpus is not None and any(num_gpus > len(devices) for devices in hosts.values()):
        raise LaunchError(f"--num_gpus {num_gpus}, and a host has fewer slots", fix="more slots in the hostfile")
    return {name: devices[:num_gpus] for name, devices in hosts.items()}


def _this_host(num_gpus: int | None, filtered: str, cpu: bool) -> Hosts:
    """This machine's devices; where it has none, as many ranks as were asked for."""
    from shardwise import device

    present = 0 if cpu else device.count()
    if filtered and not present:  # ranks on the CPU, of which any may be named
        named = [int(n) for part in filtered.split("@") for n in part.partition(":")[2].split(",") if n.isdigit()]
        present = max(named, default=0) + 1
    return {_HERE: list(range(max(num_gpus or 0, present) or 1))}
