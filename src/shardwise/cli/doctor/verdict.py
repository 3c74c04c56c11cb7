"""What the ranks' facts mean: one check per strategy and precision, and a plain verdict."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from shardwise.cli.doctor.job import DONE, FAILURE, HANG, SECOND, Job, read_facts

# Losses against one process, relative. In bf16 autocast rounds elsewhere than bf16 parameters do.
_CLOSE = {"fp32": 1e-4, "bf16": 0.05}
_LATE = re.compile("timed out|timeout", re.IGNORECASE)
_REPORT = "report it, with the output of: shardwise doctor --json"


def judge(job: Job, ranks: int, device: str, code: int, failed: list[int]) -> dict[str, Any]:
    """One test run: what each strategy did.

    Args:
        job: what the ranks were told.
        ranks: how many there were.
        device: its type.
        code: what :func:`shardwise.cli.ranks.run_ranks` returned.
        failed: the ranks that failed, in that order.

    Returns:
        ``ok``, ``problems`` (what and fix), ``checks`` per strategy and precision, ``links``.
    """
    facts = [read_facts(job.facts_of(rank)) for rank in range(ranks)]
    problems: list[dict[str, str]] = []
    if code:
        problems.append(_why(job, ranks, device, failed))
    checks = []
    first: dict[str, Any] = {}  # the first strategy's run on every rank, by precision
    for strategy in job.strategies:
        for precision in job.precisions:
            name = f"{strategy} {precision}"
            runs = [fact.get("runs", {}).get(name) for fact in facts]
            oracle = facts[0].get("runs", {}).get(f"alone {precision}")
            check: dict[str, Any] = {"strategy": strategy, "precision": precision}
            if oracle is None or any(run is None for run in runs):
                checks.append({**check, "ok": False, "what": "did not run"})
                continue
            wrong = _wrong(runs, oracle["losses"], first.setdefault(precision, runs), precision, exact=device == "cpu")
            checks.append(
                {
                    **check,
                    "ok": not wrong,
                    "what": "; ".join(wrong),
                    "sent": runs[0]["sent"],
                    "seconds": max(run["seconds"] for run in runs),
                }
            )
            problems += [{"what": f"{strategy} in {precision}: {text}", "fix": _REPORT} for text in wrong]
    return {
        "device": device,
        "ranks": ranks,
        "ok": not problems,
        "problems": problems,
        "checks": checks,
        "links": sorted((link for fact in facts for link in fact.get("links", [])), key=lambda link: link["ranks"]),
    }


def _wrong(runs: list[Any], oracle: list[float], first: list[Any], precision: str, exact: bool) -> list[str]:
    """What is not as promised in one strategy's run; ``first`` is the run to agree with."""
    out = []
    means = [sum(losses) / len(losses) for losses in zip(*(run["losses"] for run in runs), strict=True)]
    offs = [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(means, oracle, strict=True)]
    if not all(off <= _CLOSE[precision] for off in offs):  # not so either if one is nan
        off = next((off for off in offs if math.isnan(off)), max(offs))
        out.append(f"losses differ from one process's by {off:.1e} (allowed: {_CLOSE[precision]:.0e})")
    if len({run["weights"] for run in runs}) > 1:
        out.append("ranks ended with different weights")
    for run, other in zip(runs, first, strict=True):
        if exact and (run["losses"] != other["losses"] or run["weights"] != other["weights"]):
            out.append("not bit for bit what the first strategy computed")
            break
    for rank, run in enumerate(runs):
        if run["sent"] != run["expected"]:
            out.append(f"rank {rank} sent {run['sent']:,} bytes per step, the formula says {run['expected']:,}")
            break
    return out


def _why(job: Job, ranks: int, device: str, failed: list[int]) -> dict[str, str]:
    """The cause in one sentence, from which rank failed first, and where each one was last."""
    last = {rank: _text(job.phase_of(rank)) for rank in range(ranks)}
    order = [*failed, *(rank for rank in last if rank not in failed)]
    for rank in order:
        if last[rank].startswith(FAILURE) and not _LATE.search(last[rank]):
            what = f"rank {rank} failed while {last[rank].removeprefix(FAILURE)}"
            return {"what": what, "fix": "its traceback is above; " + _REPORT}
    first = order[0]
    if not last[first]:
        return {"what": f"rank {first} never started", "fix": "look at what it printed above"}
    if not last[first].startswith((HANG, FAILURE, SECOND)):
        fix = "look at what ended it: too little memory, or a signal; its last words are above"
        return {"what": f"rank {first} ended while {last[first]}", "fix": fix}
    # The first to fail had waited in vain: for a rank that says nothing, or all for each other.
    silent = [rank for rank in order if not last[rank].startswith((HANG, FAILURE, SECOND)) and last[rank] != DONE]
    if silent:
        where = last[silent[0]] or "starting the ranks"
        return {"what": f"hang: rank {silent[0]} stopped answering while {where}", "fix": _transport(device)}
    phase = last[first].removeprefix(HANG).removeprefix(FAILURE).removeprefix(SECOND).split(":")[0]
    return {"what": f"hang while {phase}", "fix": _transport(device)}


def _transport(device: str) -> str:
    if device != "cpu":
        return "NCCL_DEBUG=INFO shardwise doctor shows what NCCL does; NCCL_P2P_DISABLE=1 leaves peer access out"
    return "gloo needs a network interface between ranks: try GLOO_SOCKET_IFNAME=lo, and look at firewalls"


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
