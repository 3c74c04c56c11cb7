"""``shardwise doctor``: it finds this machine well, and says what is wrong with one that is not."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.doctor import _plan, strategies
from shardwise.cli.doctor.job import FAILURE, HANG, SECOND, Job
from shardwise.cli.doctor.verdict import judge
from test_launch import command, refused, start


def test_a_healthy_machine_gets_a_plain_verdict(tmp_path: Path) -> None:
    code, out, err = command("doctor", "--quick", "--cpu", "--json", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert code == 0, err
    facts = json.loads(out)  # nothing else is on stdout
    assert facts["ok"] and facts["verdict"] == "Everything works on this machine." and not facts["problems"]
    assert facts["versions"]["torch"] and facts["versions"]["shardwise"] and facts["devices"]["cores"] >= 1
    assert facts["backends"]["gloo"] and facts["surroundings"]["environment"]["OMP_NUM_THREADS"] == "1"
    assert facts["surroundings"]["config"]["state"] == "there is none"
    [test] = facts["tests"]
    assert test["ranks"] in (2, 4) and len(test["links"]) == test["ranks"] * (test["ranks"] - 1) // 2
    for link in test["links"]:
        assert 1 < link["latency_us"] < 1e6 and 1e6 < link["bytes_per_s"] < 1e12
    assert [c["strategy"] for c in test["checks"]] == strategies(test["ranks"])
    sent = {c["strategy"]: c["sent"] for c in test["checks"]}
    assert sent["ddp"] == sent["zero1"] == sent["zero2"] < sent["zero3"]
    assert "doctor: training under zero3 in fp32" in err


def test_people_get_tables_and_bf16_and_a_broken_settings_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "shardwise").mkdir()
    (tmp_path / "shardwise" / "config.yaml").write_text("nprok: 2\n")
    code, out, err = command("doctor", "--cpu", "--nproc", 1, cwd=tmp_path)
    assert code == 1, err
    text = " ".join(out.split())
    for part in ("versions", "Every strategy, 1 rank on the CPU", "bf16", "as promised", "problem: the settings file"):
        assert part in text
    assert "did not run" not in text and "Not everything works on this machine: the settings file" in text
    assert "\x1b" not in out + err


def last_rank_of(process: Any) -> int:
    """The process that the command's launcher started last."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                _, parent, *facts = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(parent) == process.pid:
                found.append((int(facts[17]), int(entry.name)))  # when it started
    return max(found)[1]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "rank 1 ended while "),
        pytest.param(signal.SIGSTOP, "hang: rank 1 stopped answering while ", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_ends_or_hangs_is_named_with_its_place(number: int, message: str, tmp_path: Path) -> None:
    process = start("doctor", "--cpu", "-n", 2, "--patience", 15, cwd=tmp_path)
    process.until(lambda: "training under ddp" in process.err)
    os.kill(last_rank_of(process), number)
    begun = time.monotonic()
    code, out, err = process.finish()
    assert code == 1
    assert time.monotonic() - begun < 80
    assert message in out and "Not everything works on this machine" in out, out + err
    assert "did not run" in out and "do: " in out


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    process = start("doctor", "--cpu", "-n", 2, cwd=tmp_path, new_interpreters=True)  # which start at once
    process.until(lambda: "doctor: starting" in process.err)
    process.send_signal(signal.SIGINT)
    code, _, err = process.finish()
    assert code == 130 and "stopped by Ctrl-C" in err and "Traceback" not in err


# --- the judgement, on facts as ranks write them ------------------------------------------------
def job(folder: Path, *names: str) -> Job:
    return Job(str(folder), list(names), ["fp32"], 2, 4, 1, 1.0, False)


def wrote(folder: Path, work: Job, **changes: Any) -> dict[str, Any]:
    """The judgement on two ranks that did well, but for ``changes`` of rank 1's last run."""
    good = {"losses": [1.0, 0.5], "weights": "a", "sent": 8, "expected": 8, "seconds": 0.1}
    for rank in range(2):
        runs: dict[str, Any] = {"alone fp32": {"losses": [1.0, 0.5]}}
        for name in work.strategies:
            last = rank == 1 and name == work.strategies[-1]
            runs[f"{name} fp32"] = {**good, **changes} if last else good
        work.facts_of(rank).write_text(json.dumps({"runs": runs, "links": []}))
    return judge(work, 2, "cpu", 0, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"losses": [1.0, 0.6]}, "losses differ from one process's by 1.0e-01"),
        ({"losses": [1.0, float("nan")]}, "losses differ"),
        ({"weights": "b"}, "ranks ended with different weights"),
        ({"losses": [1.0, 0.5 + 1e-7]}, "not bit for bit"),
        ({"sent": 9}, "rank 1 sent 9 bytes per step, the formula says 8"),
    ],
)
def test_each_broken_promise_is_a_problem(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    result = wrote(tmp_path, job(tmp_path, "ddp", "zero3"), **changes)
    assert result["ok"] is (message is None)
    if message is not None:
        assert any(p["what"].startswith("zero3 in fp32: ") and message in p["what"] for p in result["problems"])
        assert [c["ok"] for c in result["checks"]] == [True, False]


@pytest.mark.parametrize(
    ("phases", "failed", "message"),
    [
        ([f"{HANG}measuring the links between ranks"] * 2, [0, 1], "hang while measuring the links between ranks"),
        ([f"{FAILURE}starting the ranks: CommError: it timed out"] * 2, [1, 0], "hang while starting the ranks"),
        ([f"{SECOND}x: RankFailed: y", f"{FAILURE}x: ValueError: z"], [0, 1], "rank 1 failed while x: ValueError: z"),
        (["starting the ranks", ""], [0, 1], "rank 0 ended while starting the ranks"),
        (["x", "x"], [1, 0], "rank 1 ended while x"),
        (["", ""], [0, 1], "rank 0 never started"),
        ([f"{HANG}x", "x"], [0, 1], "hang: rank 1 stopped answering while x"),
    ],
)
def test_the_cause_is_the_rank_that_was_first(
    phases: list[str], failed: list[int], message: str, tmp_path: Path
) -> None:
    work = job(tmp_path, "ddp")
    for rank, text in enumerate(phases):
        if text:
            work.phase_of(rank).write_text(text)
    result = judge(work, 2, "cpu", 1, failed)
    assert not result["ok"] and result["problems"][0]["what"] == message and result["problems"][0]["fix"]
    assert [c["what"] for c in result["checks"]] == ["did not run"]


def test_what_is_tested_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    cpu, one, eight = (
        {"cores": n, "accelerator": "cuda", "accelerators": [{}] * d} for n, d in ((8, 0), (2, 1), (64, 8))
    )
    assert [(d, n) for d, n, _ in _plan(cpu, None, False, False)] == [("cpu", 4)]
    assert [(d, n) for d, n, _ in _plan(one, None, False, False)] == [("cuda", 1), ("cpu", 2), ("cpu", 4)]
    assert [(d, n) for d, n, _ in _plan(one, None, False, True)] == [("cuda", 1), ("cpu", 2)]
    assert [(d, n) for d, n, _ in _plan(eight, None, False, False)] == [("cuda", 8)]
    assert [(d, n) for d, n, _ in _plan(eight, 2, True, False)] == [("cpu", 2)]
    assert strategies(4)[-1] == "hsdp,shard_size=2" and strategies(2)[-2:] == ["hsdp,shard_size=1", "hsdp,shard_size=2"]
    monkeypatch.chdir(tmp_path)
    assert "--nproc 0" in refused(monkeypatch, capsys, "doctor", "--nproc", "0")
    assert "--patience" in refused(monkeypatch, capsys, "doctor", "--patience", "0")
