"""Run a function on several ranks from a notebook or a test: ``notebook_launcher`` and ``debug_launcher``.

Ranks are forked, so that functions that exist only in a notebook's cells can run. ``shardwise launch`` starts scripts,
also on several hosts with restarts, and is the better way wherever there is a script.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardwise import device, environment
from shardwise.errors import LaunchError
from shardwise.launchers.processes import Job, run
from shardwise.strategy import Strategy

_PORT = 29500  # of several hosts that were told none; one host takes a free one


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int | None = None,
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
    *,
    strategy: str | Strategy | None = None,
    cpu: bool = False,
) -> None:
    """Run ``function(*args)`` on several ranks, and return when all have ended.

    Create the ``Accelerator`` inside the function, and use no device before. Asked for N processes, N run, on
    the CPU too; one process runs right here. In a process that a launcher started already, the function is called.

    Args:
        function, args: what every rank runs. It may be defined in a notebook's cell.
        num_processes: ranks on this host. Default: one per accelerator, else 1.
        mixed_precision: ``fp16`` or ``bf16`` win over the Accelerator's own; ``no`` leaves it the word.
        use_port, master_addr: where the ranks meet. One host takes a free port if none is given, several 29500.
        node_rank, num_nodes: this host of several. The same call runs on each of them.
        rdzv_backend, rdzv_endpoint, rdzv_conf, rdzv_id: ``static`` only, for several hosts; an endpoint
            ``host:port`` stands for the port and address above; the one key of rdzv_conf is ``timeout`` (seconds).
            The id is not needed: an endpoint has one run at a time.
        max_restarts: how often all ranks are started anew after a failure; on one host.
        monitor_interval: seconds between two looks at the ranks.
        log_line_prefix_template: put before every line a rank prints; ``${rank}`` and ``${local_rank}`` are filled in.
        strategy: the strategy of every rank, in place of the script's.
        cpu: stay on the CPU where there are other devices.

    Raises:
        LaunchError: it cannot start; see the text.
        RankFailed: a rank failed. The text has its traceback; all others have ended.

    Cost: forked ranks compute with one CPU thread each, since OpenMP's threads do not survive a fork.
    """
    variables = _variables(function, args, mixed_precision, strategy, cpu)
    if _already_launched(num_processes, num_nodes):
        return _here(function, args, variables)
    devices = 0 if cpu else device.count()
    number = _number(num_processes, devices, num_nodes, node_rank)
    if number == 1 and num_nodes == 1:
        return _here(function, args, variables)
    if num_nodes > 1 and (rdzv_backend != "static" or max_restarts):
        what = f"rdzv_backend={rdzv_backend}" if rdzv_backend != "static" else f"max_restarts={max_restarts}"
        raise LaunchError(
            f"{what} on several hosts needs an elastic launcher", fix="put the function into a script: shardwise launch"
        )
    unknown = set(rdzv_conf or {}) - {"timeout", "rank"}
    if unknown:
        raise LaunchError(f"rdzv_conf has no key {', '.join(sorted(unknown))}", fix="the one key is timeout")
    if max_restarts < 0:
        raise LaunchError(f"max_restarts={max_restarts} is not a number of restarts", fix="give 0 or more")
    host, port = _meeting(master_addr, use_port, rdzv_endpoint, num_nodes)
    job = Job(
        function, tuple(args), number, num_nodes, node_rank, host, port, variables,
        max_restarts, monitor_interval, log_line_prefix_template, float((rdzv_conf or {}).get("timeout", 900)),
    )  # fmt: skip
    where = f"{number} of {devices} {device.accelerator()} devices" if devices else f"{number} ranks on the CPU"
    print(f"shardwise: running on {where}", file=sys.stderr, flush=True)
    run(job)
    return None


def debug_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int = 2,
    *,
    strategy: str | Strategy | None = None,
) -> None:
    """Run ``function(*args)`` on a few ranks on the CPU, in processes of their own, to test it.

    Args:
        function, args: what every rank runs.
        num_processes: ranks.
        strategy: the strategy of every rank, in place of the script's.

    Raises:
        LaunchError: it cannot start; see the text.
        RankFailed: a rank failed. The text has its traceback.
    """
    variables = _variables(function, args, "no", strategy, cpu=True)
    if _already_launched(num_processes, 1):
        return _here(function, args, variables)
    number = _number(num_processes, 0, 1, 0)
    return run(Job(function, tuple(args), number, 1, 0, "127.0.0.1", 0, variables))


# --- what was asked for -----------------------------------------------------------------------
def _variables(
    function: Callable[..., Any], args: Sequence[Any], precision: str, strategy: str | Strategy | None, cpu: bool
) -> dict[str, str]:
    """The ranks' environment; see :mod:`shardwise.environment`."""
    if not callable(function):
        raise LaunchError(f"a {type(function).__name__} cannot be called", fix="give the function itself")
    if isinstance(args, str) or not isinstance(args, Sequence):
        raise LaunchError(f"args is a {type(args).__name__}", fix="give a tuple: args=(first, second)")
    out = {}
    name = str(precision).lower()
    if name not in environment.PRECISIONS:
        raise LaunchError(
            f"mixed_precision='{precision}' is not known", fix=f"one of {', '.join(environment.PRECISIONS)}"
        )
    if name != "no":
        out[environment.MIXED_PRECISION] = name
    if strategy is not None:
        out[environment.STRATEGY] = str(Strategy.parse(strategy))
    if cpu:
        out[environment.CPU] = "1"
        out |= device.hidden()
    return out


def _already_launched(number: int | None, hosts: int) -> bool:
    """Whether a launcher has started this process as one of several ranks.

    Raises:
        LaunchError: it has started another number of ranks than is asked for now.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and number is not None and number * hosts != size:
        raise LaunchError(
            f"num_processes={number} is asked for in a process that is one of {size} ranks already",
            fix=f"start the script without a launcher, or leave num_processes out to use the {size} ranks",
        )
    return size > 1


def _number(number: int | None, devices: int, hosts: int, host: int) -> int:
    if number is None:
        number = devices or 1
    if number < 1 or hosts < 1:
        raise LaunchError(f"num_processes={number}, num_nodes={hosts} are not numbers of ranks", fix="give 1 or more")
    if not 0 <= host < hosts:
        raise LaunchError(f"node_rank={host} is not a host of {hosts}", fix=f"give 0 to {hosts - 1}")
    if devices and number > devices:
        raise LaunchError(
            f"num_processes={number} asks for more ranks than there are devices ({devices})",
            fix=f"num_processes={devices}, or cpu=True for {number} ranks on the CPU",
        )
    return number


def _meeting(address: str, port: str | int | None, endpoint: str, hosts: int) -> tuple[str, int]:
    if endpoint:
        address, _, port = endpoint.rpartition(":")
    if port is None:
        port = _PORT if hosts > 1 else 0
    if not str(port).isdigit() or int(port) >= 1 << 16 or not address:
        raise LaunchError(f"ranks cannot meet at {address}:{port}", fix="give an address, and a port of 1 to 65535")
    return address, int(port)


# --- one process ------------------------------------------------------------------------------
def _here(function: Callable[..., Any], args: Sequence[Any], variables: dict[str, str]) -> None:
    """Call the function in this process. Errors are its own."""
    if device.in_use() is not None:
        variables = {name: value for name, value in variables.items() if name not in device.hidden()}
    with environment.patch_environment(**variables):
        function(*args)
