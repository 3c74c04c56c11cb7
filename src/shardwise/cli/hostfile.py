"""Files of hosts, and which of their devices are meant, in the words of DeepSpeed's launcher."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from shardwise.errors import LaunchError, did_you_mean

Hosts = dict[str, list[int]]
"""Devices of each host, in order."""


def read_hostfile(path: Path) -> Hosts:
    """The hosts of a file with lines like ``worker-0 slots=4``. Lines that begin with ``#`` are comments.

    Raises:
        LaunchError: the file cannot be read, or a line says something else, or a host is there twice, or none is.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"the file of hosts cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix="a line for each host, as in: worker-0 slots=4",
        ) from None
    hosts: Hosts = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"\s*(\S+)\s+slots=(\d+)\s*(#.*)?", line)
        if found is None or found[2] == "0":
            raise LaunchError(
                f"line {number} is not a host and its slots: {line.strip()!r}",
                where=str(path),
                fix="as in: worker-0 slots=4",
            )
        if found[1] in hosts:
            raise LaunchError(f"the host {found[1]} is there twice", where=str(path), fix="one line for each host")
        hosts[found[1]] = list(range(int(found[2])))
    if not hosts:
        raise LaunchError("there is no host in it", where=str(path), fix="as in: worker-0 slots=4")
    return hosts


def chosen(hosts: Hosts, include: str, exclude: str) -> Hosts:
    """The hosts and devices that remain.

    Args:
        hosts: all there are.
        include, exclude: ``HOST[:DEVICE,...]``, several joined by ``@``. Without devices all of the host's are meant.

    Raises:
        LaunchError: both are said, or what is meant is not there, or nothing remains.
    """
    if include and exclude:
        raise LaunchError("--include and --exclude contradict each other", fix="give one of them")
    if not include and not exclude:
        return hosts
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    named: Hosts = {}
    for part in text.split("@"):
        name, _, devices = part.partition(":")
        if name not in hosts:
            raise LaunchError(
                f"{flag} {text}: there is no host '{name}'",
                fix=did_you_mean(name, hosts, otherwise=f"one of {', '.join(hosts)}"),
            )
        numbers = devices.split(",") if devices else [str(n) for n in hosts[name]]
        for number in numbers:
            if not number.isdigit() or int(number) not in hosts[name]:
                raise LaunchError(
                    f"{flag} {text}: {name} has no device '{number}'",
                    fix=f"it has {', '.join(map(str, hosts[name]))}",
                )
        named[name] = named.get(name, []) + [int(number) for number in numbers]
    left: Hosts = {}
    for name, devices_of in hosts.items():
        asked = named.get(name, [])
        kept = sorted(set(asked)) if include else [n for n in devices_of if n not in asked]
        if kept:
            left[name] = kept
    if not left:
        raise LaunchError(f"{flag} {text} leaves no device", fix="leave some out of it")
    return left


def is_here(host: str) -> bool:
    """Is it this machine, by its name?"""
    return host in ("localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn())
