"""``shardwise launch`` through the command line, with real rank processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

import processes
from processes import Process, alive
from shardwise import ShardwiseError, Strategy, cli, environment
from shardwise.errors import ConfigError

SRC = str(Path(__file__).parent.parent / "src")


def start(*args: object, cwd: Path, new_interpreters: bool = False, **variables: str) -> Process:
    """The command, in a process of its own that has imported torch already, and so have the ranks that it starts.

    Unless they are ``new_interpreters``.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SHARDWISE_", "OMP_"))}
    environment = {**inherited, "PYTHONPATH": SRC, "XDG_CONFIG_HOME": str(cwd), **variables}
    return processes.module("shardwise", *args, cwd=cwd, environment=environment, new_interpreters=new_interpreters)


def command(*args: object, cwd: Path, new_interpreters: bool = False, **variables: str) -> tuple[int, str, str]:
    return start(*args, cwd=cwd, new_interpreters=new_interpreters, **variables).finish()


def script(folder: Path, text: str, name: str = "job.py") -> str:
    (folder / name).write_text(text)
    return name


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a command that ends with 2 before anything starts."""
    monkeypatch.setattr(sys, "argv", ["shardwise", *args])
    monkeypatch.setenv("XDG_CONFIG_HOME", os.getcwd())  # not the settings of whoever runs the tests
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


ECHO = """
import json, os, sys
keys = ("RANK", "WORLD_SIZE", "SHARDWISE_STRATEGY", "SHARDWISE_MIXED_PRECISION", "SHARDWISE_CPU", "OMP_NUM_THREADS")
with open(f"said-{os.environ['RANK']}", "w") as f:
    json.dump([{k: os.environ.get(k) for k in keys}, sys.argv[1:]], f)
"""


def said(folder: Path) -> list[tuple[dict[str, str | None], list[str]]]:
    import json

    return [tuple(json.loads(p.read_text())) for p in sorted(folder.glob("said-*"))]


def test_as_many_run_as_were_asked_for_and_arguments_arrive_untouched(tmp_path: Path) -> None:
    own = ["--lr", "3", "-n", "7", "--strategy=ddp", "--", "$x ${local_rank} $$", "two words", "--help"]
    code, _, err = command(
        "launch", "--nproc", 3, "--strategy", "zero2, reduce_dtype=bf16", "--mixed-precision", "bf16", "--cpu",
        script(tmp_path, ECHO), *own, cwd=tmp_path, OMP_NUM_THREADS="5",
    )  # fmt: skip
    assert code == 0, err
    found = said(tmp_path)
    assert [e["RANK"] for e, _ in found] == ["0", "1", "2"]
    for variables, args in found:
        assert args == own
        assert variables["WORLD_SIZE"] == "3"
        assert variables["SHARDWISE_STRATEGY"] == "zero2,reduce_dtype=bf16"
        assert variables["SHARDWISE_MIXED_PRECISION"] == "bf16"
        assert variables["SHARDWISE_CPU"] == "1"
        assert variables["OMP_NUM_THREADS"] == "5"
    assert err == ""


def test_a_module_with_defaults_says_how_many_ranks_and_sets_nothing(tmp_path: Path) -> None:
    script(tmp_path, ECHO, "job.py")
    code, _, err = command("launch", "--cpu", "-m", "job", "-m", cwd=tmp_path)
    assert code == 0, err
    assert err == "shardwise: 1 rank on the CPU (--nproc chooses how many)\n"
    [(variables, args)] = said(tmp_path)
    assert args == ["-m"]
    assert variables["SHARDWISE_STRATEGY"] is None
    assert int(variables["OMP_NUM_THREADS"] or 0) >= 1


FAILS = """
import os, signal, sys, torch, shardwise
world = shardwise.init("cpu")
model = shardwise.fully_shard(torch.nn.Linear(4, 4))
for step in range(5):
    if step == 2 and world.rank == 1:
        {end}
    model(torch.ones(1, 4)).sum().backward()
"""


def test_a_rank_that_raises_is_named_first_and_the_launcher_adds_one_line_per_rank(tmp_path: Path) -> None:
    code, _, err = command(
        "launch", "-n", 2, "--cpu", script(tmp_path, FAILS.format(end="raise ValueError('no such row')")), cwd=tmp_path,
        new_interpreters=True,  # forked ones end within one look of the launcher's: who was first is not known then
    )  # fmt: skip
    assert code == 1
    assert "ValueError: no such row" in err
    summary = [line for line in err.splitlines() if line.startswith("shardwise: rank ") and "exit code" in line]
    assert summary[0] == "shardwise: rank 1 ended with exit code 1, the first to fail"
    assert "ChildFailedError" not in err and "torch/distributed/elastic" not in err
    assert err.count("shardwise report") <= 1


def test_a_killed_rank_is_named_with_its_signal_and_the_others_report_where_they_waited(tmp_path: Path) -> None:
    code, _, err = command(
        "launch", "-n", 2, "--cpu",
        script(tmp_path, FAILS.format(end="os.kill(os.getpid(), signal.SIGKILL)")), cwd=tmp_path,
    )  # fmt: skip
    assert code == 1
    assert "shardwise: rank 1 was ended by SIGKILL" in err
    assert err.count("shardwise report") == 1
    assert "rank 0 was waiting for" in err


def test_a_killed_rank_is_named_before_those_that_end_because_of_it(tmp_path: Path) -> None:
    """Within milliseconds: the launcher sees both at once."""
    code, _, err = command("launch", "-n", 2, "--cpu", script(tmp_path, """
        import os, signal, sys, time
        if os.environ["RANK"] == "1":
            open("pid", "w").write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        while not os.path.exists("pid") or not (pid := open("pid").read()):
            time.sleep(0.001)
        while ") Z" not in open(f"/proc/{pid}/stat").read():
            time.sleep(0.001)
        sys.exit(3)
    """.replace("\n        ", "\n")), cwd=tmp_path)  # fmt: skip
    assert code == 1
    first, second = [line for line in err.splitlines() if line.startswith("shardwise: rank ")]
    assert first == "shardwise: rank 1 was ended by SIGKILL (often the kernel, out of memory), the first to fail"
    assert second == "shardwise: rank 0 ended with exit code 3"


def test_ctrl_c_ends_every_rank_with_one_message(tmp_path: Path) -> None:
    sleeps = "import os, time\nopen('pid-' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    process = start("launch", "--nproc", 2, "--cpu", script(tmp_path, sleeps), cwd=tmp_path)
    process.until(lambda: len([p for p in tmp_path.glob("pid-*") if p.read_text()]) == 2)
    pids = [int(p.read_text()) for p in tmp_path.glob("pid-*")]
    process.send_signal(signal.SIGINT)
    code, _, err = process.finish()
    assert code == 130
    assert err == "\nshardwise: stopped by Ctrl-C; all 2 ranks have ended\n"
    assert not any(alive(pid) for pid in pids)


def test_ctrl_c_while_ranks_are_being_started_leaves_none_behind(tmp_path: Path) -> None:
    says = "import os, time\nopen('pid-' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    process = start("launch", "--nproc", 12, "--cpu", script(tmp_path, says), cwd=tmp_path)
    process.until(lambda: any(p.read_text() for p in tmp_path.glob("pid-*")))
    process.send_signal(signal.SIGINT)
    code, _, err = process.finish()
    pids = [int(text) for p in tmp_path.glob("pid-*") if (text := p.read_text())]
    assert code == 130 and "all 12 ranks have ended" in err
    assert not any(alive(pid) for pid in pids)


def test_restarts_are_said_and_can_succeed(tmp_path: Path) -> None:
    once = "import os, sys\nsys.exit(3 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else 0)\n"
    code, _, err = command("launch", "-n", 1, "--cpu", "--max-restarts", 1, script(tmp_path, once), cwd=tmp_path)
    assert code == 0, err
    assert "rank 0 ended with exit code 3" in err and "starting all ranks anew (1 restart left)" in err


LOSES = """
import json, os, signal, sys
rank, attempt = (int(os.environ[k]) for k in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
keys = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHELASTIC_MAX_RESTARTS")
with open(f"said-{attempt}-{rank}", "w") as f:
    json.dump({k: os.environ[k] for k in keys}, f)
if (attempt, rank) in ((0, 1), (2, 0)):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3 if (attempt, rank) == (1, 0) else 0)
"""


def test_a_lost_rank_and_its_device_are_left_out_and_one_that_raised_is_not(tmp_path: Path) -> None:
    import json

    from shardwise.cli.host import cores

    code, _, err = command(
        "launch", "-n", 3, "--min-nproc", 1, "--max-restarts", 4, script(tmp_path, LOSES), cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="14,15,16,17",
    )  # fmt: skip
    assert code == 0, err
    assert [line for line in err.splitlines() if "starting" in line] == [
        "shardwise: starting anew with 2 ranks instead of 3, without device 15 (4 restarts left)",
        "shardwise: starting all ranks anew (3 restarts left)",
        "shardwise: starting anew with 1 rank instead of 2, without device 14 (2 restarts left)",
    ]
    for attempt, (size, devices) in enumerate([(3, "14,15,16,17"), (2, "14,16,17"), (2, "14,16,17"), (1, "16,17")]):
        found = [json.loads(p.read_text()) for p in tmp_path.glob(f"said-{attempt}-*")]
        assert found == size * [
            {
                "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "CUDA_VISIBLE_DEVICES": devices,
                "OMP_NUM_THREADS": str(max(1, cores() // size)), "TORCHELASTIC_MAX_RESTARTS": "4",
            }
        ]  # fmt: skip


KILLED, ABORTED, CRASHED, RAISED = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, 1


@pytest.mark.parametrize(
    ("ended", "sick", "lost"),
    [
        ([(2, KILLED), (0, RAISED), (1, RAISED)], [], [2]),
        ([(2, KILLED), (0, ABORTED), (1, ABORTED)], [], [2]),  # NCCL aborts survivors
        ([(0, ABORTED), (1, ABORTED), (2, KILLED)], [], [2]),
        ([(1, ABORTED), (0, RAISED)], [], [1]),
        ([(1, ABORTED), (0, ABORTED), (2, ABORTED)], [], [1]),
        ([(1, CRASHED), (0, RAISED)], [], [1]),
        ([(1, CRASHED), (0, CRASHED), (2, CRASHED)], [], []),
        ([(0, RAISED), (2, KILLED)], [], [2]),
        ([(1, KILLED), (0, KILLED)], [], [1, 0]),
        ([(0, KILLED), (1, KILLED), (2, KILLED)], [], []),  # no rank is the cause
        ([(0, RAISED), (1, RAISED), (2, RAISED)], [], []),
        ([(0, RAISED)], [], []),
        ([(0, RAISED), (1, RAISED)], [1], [1]),  # a device that fell off is an exception, or an abort of any rank
        ([(0, ABORTED), (1, ABORTED)], [1], [1]),
        ([(0, KILLED)], [1], [1, 0]),
        ([(0, KILLED)], [0, 1, 2], [0]),  # nothing answers: the driver's affair
    ],
)
def test_who_is_lost(ended: list[tuple[int, int]], sick: list[int], lost: list[int]) -> None:
    from shardwise.cli.restart_policy import lost_ranks

    assert lost_ranks(ended, 3, sick) == lost


def test_how_many_ranks_and_which_devices_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.cli import restart_policy
    from shardwise.cli.restart_policy import Attempt, RestartPolicy

    lost = [(1, KILLED), (2, KILLED)]
    four = Attempt(4, ("0", "1", "2", "3"))
    assert RestartPolicy(1).after(lost, four) == Attempt(2, ("0", "3"), ("1", "2"))
    assert RestartPolicy(3).after(lost, four) == Attempt(3, ("0", "2", "3"), ("1",)), "the first to fail is left out"
    assert RestartPolicy(2, multiple=2).after(lost[:1], four) == Attempt(2, ("0", "2", "3"), ("1",))
    assert RestartPolicy(1).after(lost, Attempt(4)) == Attempt(2)
    shared = RestartPolicy(1).after(lost, Attempt(4, ("0",)))
    assert shared == Attempt(2, ("0",)), "four ranks on one device are on the CPU"
    spare = RestartPolicy(2).after([(0, KILLED)], Attempt(2, ("5", "7", "9")))
    assert spare == Attempt(2, ("7", "9"), ("5",)) and spare.words(Attempt(2)) == "all ranks anew, without device 5"
    # Devices are tried in processes of their own; here one fails and one never answers.
    tries = "import os, sys, time\nname = os.environ['CUDA_VISIBLE_DEVICES']\ntime.sleep(60 * (name == '3'))\n"
    monkeypatch.setattr(restart_policy, "_TRY", f"{tries}sys.exit(name == '1')")
    monkeypatch.setattr(restart_policy, "_TRY_S", 4.0)
    raised = [(0, RAISED), (1, RAISED), (2, RAISED), (3, RAISED)]
    assert RestartPolicy(1, 1, "CUDA_VISIBLE_DEVICES", tried=True).after(raised, four) == Attempt(
        2, ("0", "2"), ("1", "3")
    )


@pytest.mark.gpu
def test_devices_are_tried() -> None:
    from shardwise import device
    from shardwise.cli.restart_policy import answering

    shown_by = device.visible_variable()
    if device.accelerator() is None or shown_by is None:
        pytest.skip("no device that a variable shows")
    assert answering(["0", "99"], shown_by) == [True, False]


@pytest.mark.parametrize("numbered", [True, False])
def test_two_hosts_meet(tmp_path: Path, numbered: bool) -> None:
    endpoint = f"127.0.0.1:{processes.free_port()}"
    name = script(tmp_path, ECHO)
    launchers = [
        start(
            "launch", "-n", 1, "--cpu", "--nnodes", 2, "--rdzv-endpoint", endpoint,
            *(["--node-rank", host] if numbered else []), name, cwd=tmp_path,
        )
        for host in range(2)
    ]  # fmt: skip
    for launcher in launchers:
        code, _, err = launcher.finish()
        assert code == 0, err
    assert [(e["RANK"], e["WORLD_SIZE"]) for e, _ in said(tmp_path)] == [("0", "2"), ("1", "2")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothere.py"], "there is no script 'nothere.py'"),
        (["-m", "no_such_module_here"], "there is no module"),
        (["--nproc", "0", "x.py"], "--nproc 0 is not a number of ranks"),
        (["--strategy", "zerro", "x.py"], "one of ddp, zero1"),
        (["--strategy", "zero3,offload_params=disk", "x.py"], "fix:"),
        (["--mixed-precision", "fp8", "x.py"], "one of no, fp16, bf16"),
        (["--nnodes", "2", "--nproc", "1", "x.py"], "--rdzv-endpoint"),
        (["--node-rank", "1", "--nproc", "1", "x.py"], "--node-rank 1"),
        (["--rdzv-endpoint", "host0", "x.py"], "is not host:port"),
        (["--rdzv-endpoint", "host0:99999", "x.py"], "no valid port"),
        (["--max-restarts", "-1", "x.py"], "--max-restarts -1"),
        (["--min-nproc", "1", "x.py"], "--min-nproc 1 is about restarts, and there are none\n  fix: --max-restarts"),
        (["--min-nproc", "0", "--max-restarts", "1", "x.py"], "--min-nproc 0 is not a number of ranks"),
        (["--min-nproc", "3", "-n", "2", "--max-restarts", "1", "x.py"], "--min-nproc 3 is more than the 2 ranks"),
        (
            ["--min-nproc", "1", "--max-restarts", "1", "--nnodes", "2", "--rdzv-endpoint", "host0:29400", "x.py"],
            "each host of several keeps its number of ranks\n  fix: leave it out",
        ),
        (
            ["--strategy", "hsdp,shard_size=2", "-n", "4", "--min-nproc", "1", "--max-restarts", "1", "x.py"],
            "shard_size=2 does not divide --min-nproc 1\n  fix: give a multiple of 2",
        ),
        (["--gradient-accumulation-steps", "0", "x.py"], "--gradient-accumulation-steps 0"),
        (["--devices", "0,0", "x.py"], "is not a list of devices"),
        (["--devices", "0", "--cpu", "x.py"], "contradict"),
        (["--devices", "0", "--nproc", "2", "x.py"], "more ranks than --devices 0 has"),
        (["--strategy", "hsdp,shard_size=2", "--nproc", "3", "x.py"], "does not divide 3 ranks"),
        (["--num_processes", "2", "x.py"], "no option --num_processes\n  fix: use --nproc"),
        (["--config_file=a.yaml", "x.py"], "use --config"),
        (["--multi_gpu", "x.py"], "every device is used"),
        (["--no-cpu", "x.py"], "there is no accelerator here"),
        (["--config", "nothere.yaml", "x.py"], "cannot read nothere.yaml"),
        (["--config", "x.py", "--no-config", "x.py"], "contradict"),
    ],
)
def test_a_wrong_request_is_refused_with_its_fix(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shardwise.device.accelerator", lambda: None)
    script(tmp_path, "", "x.py")
    err = refused(monkeypatch, capsys, "launch", *args)
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def accelerators(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As on a machine with so many of them."""
    monkeypatch.setattr("shardwise.device.accelerator", lambda: "cuda")
    monkeypatch.setattr("shardwise.device.count", lambda: count)


def test_more_ranks_than_devices_needs_cpu_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script(tmp_path, "", "x.py")
    accelerators(monkeypatch, 2)
    err = refused(monkeypatch, capsys, "launch", "--nproc", "4", "x.py")
    assert "cuda devices (2)" in err and "--cpu" in err
    err = refused(monkeypatch, capsys, "launch", "--min-nproc", "4", "--max-restarts", "1", "x.py")
    assert "--min-nproc 4 is more than the 2 ranks there are" in err


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import shardwise

    monkeypatch.setattr(sys, "argv", ["shardwise", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code in (0, None)
    assert capsys.readouterr().out == f"shardwise {shardwise.__version__}\n"


def test_the_number_of_a_rank_on_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (environment.local_rank(), environment.local_rank(3)) == (0, 3)
    monkeypatch.setenv("LOCAL_RANK", " 2")
    assert environment.local_rank(3) == 2
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ConfigError, match="LOCAL_RANK: 'one' is not the number"):
        environment.local_rank()


def test_the_launchers_word_wins_over_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.STRATEGY, raising=False)
    monkeypatch.delenv(environment.MIXED_PRECISION, raising=False)
    assert environment.strategy_from_environment() == Strategy("zero3")
    assert environment.strategy_from_environment("zero1") == Strategy("zero1")
    assert environment.mixed_precision_from_environment() is None
    monkeypatch.setenv(environment.STRATEGY, "zero2")
    assert environment.strategy_from_environment(Strategy("ddp")) == Strategy("zero2")
    monkeypatch.setenv(environment.MIXED_PRECISION, "bf16")
    assert environment.strategy_from_environment(Strategy("ddp")) == Strategy(
        "zero2", param_dtype="bf16", autocast=True
    )
    given = Strategy("zero3", param_dtype="bf16")
    monkeypatch.delenv(environment.STRATEGY)
    assert environment.strategy_from_environment(given) == given, "a script that says so itself means its own"
    monkeypatch.setenv(environment.MIXED_PRECISION, "no")
    assert environment.strategy_from_environment(given.replace(autocast=True)) == Strategy("zero3")
    monkeypatch.setenv(environment.MIXED_PRECISION, "bf16")
    assert environment.mixed_precision_from_environment("no") == "bf16"
    monkeypatch.setenv(environment.MIXED_PRECISION, "fp8")
    with pytest.raises(ShardwiseError, match="SHARDWISE_MIXED_PRECISION"):
        environment.mixed_precision_from_environment()


def test_named_devices_reach_the_ranks_as_what_this_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shardwise.cli.launch import choose_nproc, visible

    assert visible(["0", "2"], None) == ["0", "2"]
    assert visible(["1"], "4,5") == ["5"]
    assert visible(["GPU-1f"], "4,5") == ["GPU-1f"]
    accelerators(monkeypatch, 4)
    assert choose_nproc(None, False, devices=["1", "3"]) == 2
    assert "2 ranks of 2 cuda devices" in capsys.readouterr().err
    with pytest.raises(ShardwiseError, match="names 4, but there are 4 cuda devices"):
        choose_nproc(None, False, devices=["4"])


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    names = ("launch", "config", "doctor", "demo", "generate", "checkpoint", "report")
    commands = [["--help"], *([name, "--help"] for name in names)]
    commands += [["checkpoint", name, "--help"] for name in ("inspect", "verify", "export", "diff")]
    text = (
        "import sys\nfrom shardwise import cli\n"
        f"for args in {commands}:\n"
        "    sys.argv = ['shardwise', *args]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code\n"
        "print(sorted(m for m in ('torch', 'numpy') if m in sys.modules), file=sys.stderr)\n"
    )
    code, out, err = processes.program("-c", text, cwd=tmp_path, environment={**os.environ, "PYTHONPATH": SRC}).finish()
    assert code == 0, err
    assert out.count("Usage") == len(commands) and err == "[]\n"
