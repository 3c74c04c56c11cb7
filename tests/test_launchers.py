"""``notebook_launcher`` and ``debug_launcher``, each from a process of its own, as a notebook is one."""

from __future__ import annotations

import inspect
import os
import signal
import time
from pathlib import Path

import pytest

import processes
from processes import Process
from shardwise import ShardwiseError, debug_launcher, launchers, notebook_launcher
from test_launch import SRC, alive

HEAD = """
import os, signal, sys, time
from pathlib import Path
import torch
import shardwise
from shardwise import debug_launcher, device, notebook_launcher
{body}
"""
TRAINS = """
def main(lr, steps=3):
    accelerator = shardwise.Accelerator()
    torch.manual_seed(accelerator.process_index)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(steps):
        accelerator.backward(model(torch.ones(2, 4) * (accelerator.process_index + 1)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    total = accelerator.gather(torch.ones(1)).sum().item()
    state = accelerator.state
    text = f"{accelerator.num_processes} {accelerator.local_process_index} {total} {state.strategy} "
    text += f"{state.mixed_precision} {accelerator.device} {os.environ.get('RANK')}"
    Path(f"rank-{accelerator.process_index}").write_text(text)
"""


def notebook(folder: Path, body: str, new_interpreter: bool = False, **variables: str) -> Process:
    """A process in which ``body`` runs after the usual imports."""
    cells = folder / "cells.py"
    cells.write_text(HEAD.format(body=body))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SHARDWISE_")}
    environment = {**inherited, "PYTHONPATH": SRC, "CUDA_VISIBLE_DEVICES": "", **variables}
    if new_interpreter:
        return processes.program("cells.py", cwd=folder, environment=environment)
    return processes.script(cells, cwd=folder, environment=environment)


def ran(folder: Path, body: str, new_interpreter: bool = False, **variables: str) -> tuple[int, str, str]:
    return notebook(folder, body, new_interpreter, **variables).finish()


def wrote(folder: Path) -> list[str]:
    return [p.read_text() for p in sorted(folder.glob("rank-*"))]


def test_as_many_as_asked_for_train_on_the_cpu(tmp_path: Path) -> None:
    code, _, err = ran(
        tmp_path,
        TRAINS
        + """
x = torch.randn(800, 800)
x @ x  # OpenMP's threads, which a fork does not copy
notebook_launcher(main, (0.1,), num_processes=2)
print(wrote := [p.read_text() for p in sorted(Path().glob("rank-*"))])
debug_launcher(main, args=(0.1,), num_processes=3, strategy="zero3")
assert "SHARDWISE_STRATEGY" not in os.environ and "RANK" not in os.environ
""",
    )
    assert code == 0, err
    assert "shardwise: running on 2 ranks on the CPU" in err
    assert wrote(tmp_path) == [f"3 {rank} 3.0 zero3 no cpu {rank}" for rank in range(3)]


def test_launchers_values_win_and_one_process_runs_here(tmp_path: Path) -> None:
    code, _, err = ran(
        tmp_path,
        TRAINS
        + """
here = []
def cell():
    here.append(os.getpid())
    main(0.1)
notebook_launcher(cell, num_processes=1, mixed_precision="bf16", strategy="zero2")
assert here == [os.getpid()] and "SHARDWISE_STRATEGY" not in os.environ
""",
    )
    assert code == 0, err
    assert wrote(tmp_path) == ["1 0 1.0 zero2 bf16 cpu None"] or wrote(tmp_path) == [
        "1 0 1.0 zero2,param_dtype=bf16,autocast=true bf16 cpu None"
    ]


def test_a_failing_rank_ends_all_with_its_traceback_and_restarts_can_succeed(tmp_path: Path) -> None:
    code, out, err = ran(
        tmp_path,
        """
from shardwise.errors import RankFailed
def main(again):
    world = shardwise.init("cpu")
    model = shardwise.fully_shard(torch.nn.Linear(4, 4))
    Path(f"pid-{world.rank}").write_text(str(os.getpid()))
    if world.rank == 1 and not (again and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"):
        raise ValueError("no such row" + "." * 100_000)
    model(torch.ones(1, 4)).sum().backward()
notebook_launcher(main, (True,), num_processes=2, max_restarts=1)
print("restarted", flush=True)
begun = time.monotonic()
try:
    notebook_launcher(main, (False,), num_processes=2)
except RankFailed as error:
    print(f"{time.monotonic() - begun < 20} {str(error)[:80]!r} {str(error)[-60:]!r}")
""",
    )
    assert code == 0, err
    assert "rank 1 failed; starting all ranks anew (1 restart left)" in err
    assert out.startswith("restarted\nTrue 'rank 1 failed\\n") and "all ranks have ended" in out
    assert not any(alive(int(p.read_text())) for p in tmp_path.glob("pid-*"))
    assert "rank 1 failed outside the model: ValueError: no such row" in err  # what rank 0 reports


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 failed\nit was ended by SIGKILL"),
        ("sys.exit(3)", "rank 1 failed\nit ended with exit code 3"),
        ("os._exit(0) if False else sys.exit(0)", None),
    ],
)
def test_how_a_rank_ended_is_said(end: str, message: str | None, tmp_path: Path) -> None:
    code, _, err = ran(
        tmp_path,
        f"def main():\n    if os.environ['RANK'] == '1':\n        {end}\ndebug_launcher(main)\n",
        new_interpreter=message is None,
    )
    assert (code == 0) is (message is None), err
    assert message is None or message in err


SLEEPS = """
def main():
    Path("pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
try:
    notebook_launcher(main, num_processes=2)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_an_interrupted_or_killed_notebook(number: int, tmp_path: Path) -> None:
    process = notebook(tmp_path, SLEEPS)
    process.until(lambda: len([p for p in tmp_path.glob("pid-*") if p.read_text()]) == 2)
    pids = [int(p.read_text()) for p in tmp_path.glob("pid-*")]
    process.send_signal(number)
    code, out, err = process.finish()
    if number == signal.SIGINT:
        assert out == "interrupted\n" and code == 0, err
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


def test_what_forked_ranks_could_not_use_is_refused(tmp_path: Path) -> None:
    code, out, err = ran(
        tmp_path,
        """
def refused(**kw):
    try:
        notebook_launcher(print, num_processes=2, **kw)
    except shardwise.ShardwiseError as error:
        print(str(error).replace("\\n", " "))
before = device.in_use
device.in_use = lambda: "cuda"  # this machine may have none to use
refused()
device.in_use = before
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
refused()
torch.distributed.destroy_process_group()
shardwise.Accelerator(cpu=True)
refused()
""",
    )
    assert code == 0, err
    first, second, third = out.splitlines()
    assert "cuda was used in this process before" in first and "restart the notebook" in first
    assert "has a process group already" in second
    assert "an Accelerator was created in this process before" in third and "inside the function" in third


def test_a_launched_process_just_calls_the_function(tmp_path: Path) -> None:
    code, out, err = ran(
        tmp_path,
        """
notebook_launcher(print, ("one of two",))
debug_launcher(print, ("two of two",), 2)
try:
    notebook_launcher(print, ("never",), num_processes=3)
except shardwise.ShardwiseError as error:
    print(error)
""",
        WORLD_SIZE="2", RANK="0",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("one of two\ntwo of two\nnum_processes=3 is asked for in a process that is one of 2 ranks")


def test_lines_can_carry_a_prefix_and_two_hosts_meet(tmp_path: Path) -> None:
    port = processes.free_port()
    body = f"""
def main():
    world = shardwise.init("cpu")
    print("of", world.size)
notebook_launcher(
    main, num_processes=1, num_nodes=2, node_rank=int(os.environ["HOST"]), use_port="{port}", cpu=True,
    log_line_prefix_template="<${{rank}}> ",
)
"""
    hosts = [notebook(tmp_path, body, HOST=str(host)) for host in range(2)]
    for number, host in enumerate(hosts):
        code, out, err = host.finish()
        assert code == 0, err
        assert out == f"<{number}> of 2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 0}, "num_processes=0"),
        ({"mixed_precision": "fp8"}, "one of no, fp16, bf16"),
        ({"strategy": "zero9"}, "one of ddp"),
        ({"strategy": "zero3,offload_params=disk"}, "offload_params='disk' is not known"),
        ({"args": "text"}, "args is a str"),
        ({"function": 3}, "a int cannot be called"),
        ({"node_rank": 2, "num_nodes": 2}, "node_rank=2 is not a host of 2"),
        ({"num_nodes": 2, "rdzv_backend": "c10d"}, "rdzv_backend=c10d on several hosts"),
        ({"num_nodes": 2, "max_restarts": 1}, "max_restarts=1 on several hosts"),
        ({"rdzv_conf": {"read_timeout": 3}}, "rdzv_conf has no key read_timeout"),
        ({"rdzv_endpoint": "host0"}, "ranks cannot meet at"),
        ({"max_restarts": -1}, "max_restarts=-1"),
    ],
)
def test_wrong_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ShardwiseError, match=message):
        notebook_launcher(**{"function": print, "num_processes": 2, "cpu": True, **arguments})  # type: ignore[arg-type]


def test_more_ranks_than_devices_need_the_cpu_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers.device, "count", lambda: 1)
    with pytest.raises(ShardwiseError, match="more ranks than there are devices"):
        notebook_launcher(print, num_processes=2)


def test_the_arguments_are_accelerates() -> None:
    theirs = pytest.importorskip("accelerate.launchers")
    for ours, other in ((notebook_launcher, theirs.notebook_launcher), (debug_launcher, theirs.debug_launcher)):
        names = list(inspect.signature(other).parameters)
        assert list(inspect.signature(ours).parameters)[: len(names)] == names
