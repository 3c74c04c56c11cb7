"""``import accelerate`` means Shardwise where it was asked for: in this process and those that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import processes
import shardwise
from shardwise import aliases
from shardwise.aliases.users import OLDEST
from shardwise.errors import ConfigError
from test_launch import command, refused, script

SRC = str(Path(shardwise.__file__).parent.parent)

HERE = """
import importlib.metadata, importlib.util, os, pickle, subprocess, sys
import shardwise
shardwise.install_as("accelerate", "deepspeed")
shardwise.install_as("accelerate")  # changes nothing, says nothing

import accelerate, accelerate.utils.modeling, accelerate.data_loader, accelerate.parallelism_config
import deepspeed.ops.adam
from accelerate import Accelerator, PartialState, load_checkpoint_in_model
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, set_seed
from accelerate.utils.dataclasses import DistributedType as again
import shardwise.utils, shardwise.data_loader, shardwise.deepspeed

# The same modules, so that a class has one identity
assert Accelerator is shardwise.Accelerator and again is DistributedType is shardwise.DistributedType
assert accelerate.utils is shardwise.utils and accelerate.data_loader is shardwise.data_loader
assert accelerate.utils.modeling is shardwise.utils.modeling is sys.modules["accelerate.utils.modeling"]
assert deepspeed is shardwise.deepspeed and deepspeed.ops.adam is shardwise.deepspeed.ops.adam
assert importlib.util.find_spec("accelerate.utils.operations") is not None
assert importlib.util.find_spec("accelerate.utils.no_such") is None
assert importlib.util.find_spec("accelerate.no_such") is None
assert shardwise.utils.__spec__.name == "shardwise.compat"  # not changed by the other name
assert pickle.loads(pickle.dumps(accelerate.DataLoaderConfiguration())) == accelerate.DataLoaderConfiguration()
assert "Accelerator" in dir(accelerate)

for name, module in (("accelerate", accelerate), ("deepspeed", deepspeed)):
    assert importlib.metadata.version(name) == module.__version__ == shardwise.aliases.VERSIONS[name]
    assert importlib.metadata.packages_distributions()[name][0] == name
    assert importlib.util.find_spec(name) is not None

def error_of(code, kind=ImportError):
    try:
        exec(code, {"accelerate": accelerate})
    except kind as error:
        return str(error)
    raise AssertionError(code)

assert "zero3" in error_of("from accelerate.utils import MegatronEngine")
assert "bf16" in error_of("from accelerate.utils.ao import convert_model_to_fp8_ao")
assert "dispatch_model" in error_of("from accelerate import prepare_pippy")
assert "no_such" in error_of("from accelerate import no_such")
assert "no_such" in error_of("import accelerate.utils.no_such")
assert "save_state" in error_of("accelerate.utils.save_fsdp_model(1, 2)", shardwise.ShardwiseError)
namespace = {}
exec("from accelerate import *", namespace)
assert namespace["Accelerator"] is Accelerator and "prepare_pippy" not in namespace

seen = "import accelerate, sys; print(accelerate.Accelerator.__module__, file=open(sys.argv[1], 'w'))"
subprocess.run([sys.executable, "-c", seen, sys.argv[1]], check=True)
assert open(sys.argv[1]).read() == "shardwise.accelerator\\n"
"""


def test_this_process_and_a_child(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(HERE)
    started = processes.program(str(tmp_path / "job.py"), str(tmp_path / "said"), environment=with_sources())
    code, out, err = started.finish()
    assert code == 0, f"{out}\n{err}"
    line = "'import accelerate' and 'import deepspeed' mean Shardwise in this run and the processes it starts"
    assert [text for text in err.splitlines() if "shardwise:" in text] == [
        f"shardwise: {line} (as accelerate 1.15.0, deepspeed 0.19.8)"
    ]


def with_sources() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": SRC}


def alone(code: str, path: str = SRC) -> str:
    """What an interpreter without any installed package prints: a name costs no import of torch."""
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_it_is_there_where_the_real_one_is_not() -> None:
    code = """
import importlib.metadata, importlib.util, sys
from shardwise.aliases import install_as
assert importlib.util.find_spec("accelerate") is None
install_as("accelerate")
print(importlib.util.find_spec("accelerate").origin, importlib.metadata.version("accelerate"))
import accelerate
print(accelerate.__version__, "torch" in sys.modules)
"""
    origin, *rest = alone(code).split()
    assert Path(origin).is_relative_to(SRC)
    assert rest == ["1.15.0", "1.15.0", "False"]


def test_a_child_that_is_told_of_nothing_else_finds_the_library() -> None:
    assert alone("import accelerate; print(accelerate.__version__)", str(aliases.folder("accelerate"))) == "1.15.0\n"


def test_an_import_that_was_first_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = list(sys.path), os.environ.get("PYTHONPATH")
    with pytest.raises(ConfigError, match=r"cannot stand in for 'acelerate'(.|\n)*did you mean 'accelerate'"):
        shardwise.install_as("acelerate")
    with pytest.raises(ConfigError, match="without a name"):
        shardwise.install_as()
    (tmp_path / "accelerate.py").write_text("")
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    import accelerate  # the script's own, here

    before = [str(tmp_path), *before[0]], before[1]
    with pytest.raises(
        ConfigError, match=r"imported already, from .*accelerate\.py(.|\n)*shardwise launch --as accelerate"
    ):
        shardwise.install_as("accelerate")
    assert (list(sys.path), os.environ.get("PYTHONPATH")) == before
    del accelerate


def test_who_looked_before_and_found_nothing_is_named() -> None:
    code = """
import sys, types
sys.modules["peft"] = types.ModuleType("peft")
from shardwise.aliases import install_as
try:
    install_as("accelerate")
except ValueError as error:
    print(error)
"""
    assert "call it before 'import peft'" in alone(code)


def test_a_version_that_is_too_old_is_one_error_at_its_import(tmp_path: Path) -> None:
    (tmp_path / "trl-0.9.dev1.dist-info").mkdir()
    (tmp_path / "trl-0.9.dev1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: trl\nVersion: 0.9.dev1\n"
    )
    (tmp_path / "trl.py").write_text("from accelerate import Accelerator")
    code = """
from shardwise.aliases import install_as
install_as("accelerate")
try:
    import trl
except ImportError as error:
    print(error)
"""
    said = alone(code, os.pathsep.join([SRC, str(tmp_path)]))
    assert "trl 0.9.dev1 is too old" in said and f"pip install 'trl>={OLDEST['trl'][1]}'" in said


RANK = """
import os, subprocess, sys
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(3)
import accelerate, torch
from accelerate import Accelerator
from accelerate.utils import gather_object

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        import accelerate
        return accelerate.Accelerator.__module__

if __name__ == "__main__":
    accelerator = Accelerator()
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    workers = next(iter(loader))[0] if accelerator.is_main_process else None
    child = subprocess.run([sys.executable, "-c", "import accelerate; print(accelerate.__file__)"], capture_output=True)
    said = [str(accelerator.strategy), Accelerator.__module__, workers, "shardwise" in child.stdout.decode()]
    said = gather_object([said])
    if accelerator.is_main_process:
        open("said", "w").write(repr(said))
    accelerator.end_training()
"""


def test_ranks_that_are_launched_their_workers_and_their_children(tmp_path: Path) -> None:
    code, _, err = command(
        "launch", "--as", "accelerate", "--nproc", 2, "--cpu", "--strategy", "zero2", "--max-restarts", 1,
        script(tmp_path, RANK), cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    here = "shardwise.accelerator"
    assert eval((tmp_path / "said").read_text()) == [["zero2", here, here, True], ["zero2", here, None, True]]
    assert err.count("'import accelerate' means Shardwise in this run") == 1


def test_a_launch_that_cannot_stand_in_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    script(tmp_path, "print(1)")
    assert "cannot stand in for 'megatron'" in refused(monkeypatch, capsys, "launch", "--as", "megatron", "job.py")
    assert "without a name" in refused(monkeypatch, capsys, "launch", "--as", "", "job.py")
    script(tmp_path, "", "accelerate.py")
    said = refused(monkeypatch, capsys, "launch", "--as", "accelerate", "job.py")
    assert "accelerate.py comes first" in said and "rename it" in said


def test_the_folders_say_the_versions_that_are_claimed() -> None:
    for name, version in aliases.VERSIONS.items():
        (info,) = aliases.folder(name).glob("*.dist-info")
        assert info.name == f"{name}-{version}.dist-info"
        assert f"\nName: {name}\nVersion: {version}\n" in (info / "METADATA").read_text()
        assert (info / "top_level.txt").read_text() == f"{name}\n"


COMMANDS = """
import sys
import shardwise
shardwise.install_as("accelerate")
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser

open("settings.yaml", "w").write("nproc: 1\\ncpu: true\\n")
assert load_config_from_file("settings.yaml").to_dict() == {"nproc": 1, "cpu": True}
assert default_config_file.endswith(".yaml")
parser = launch_command_parser()
try:
    launch_command(parser.parse_args(["--num_processes", "2", "rank.py"]))
except shardwise.ShardwiseError as error:
    assert "use --nproc" in str(error)
launch_command(parser.parse_args(["--config", "settings.yaml", "rank.py", "--lr", "3"]))
try:
    launch_command(parser.parse_args(["--config", "settings.yaml", "rank.py", "fail"]))
except SystemExit as end:
    assert end.code == 1
"""


def test_a_library_that_launches_by_accelerates_command(tmp_path: Path) -> None:
    script(tmp_path, COMMANDS)
    text = "import sys, accelerate; sys.exit(3 if 'fail' in sys.argv else 0 * open('ran', 'w').write(str(sys.argv)))"
    script(tmp_path, text, "rank.py")
    started = processes.program(
        "job.py", cwd=tmp_path, environment={**with_sources(), "XDG_CONFIG_HOME": str(tmp_path)}
    )
    code, out, err = started.finish()
    assert code == 0, f"{out}\n{err}"
    assert (tmp_path / "ran").read_text() == "['rank.py', '--lr', '3']"


FOR_ACCELERATE = """
import sys, torch
from accelerate import Accelerator

folder, resume = sys.argv[1], len(sys.argv) > 2
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loader = torch.utils.data.DataLoader(torch.arange(12.0)[:, None], batch_size=2, shuffle=True)
steps = 6  # of two epochs
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / (steps * accelerator.num_processes))
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
first = 0
if resume:
    accelerator.load_state(f"{folder}/fourth")
    first = 4
seen, rates = [], []
for epoch in range(first // len(loader), 2):
    for step, batch in enumerate(loader):
        if epoch == first // len(loader) and step < first % len(loader):
            continue
        accelerator.backward(model(batch).mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen.append(batch.flatten().tolist())
        rates.append(round(schedule.get_last_lr()[0], 6))
        if len(seen) == 4 and not resume and accelerator.is_main_process:
            accelerator.save_state(f"{folder}/fourth")
accelerator.wait_for_everyone()
open(f"{folder}/{'resumed' if resume else 'straight'}-{accelerator.process_index}", "w").write(repr((seen, rates)))
accelerator.end_training()
"""


def test_a_script_counts_on_what_accelerate_does(tmp_path: Path) -> None:
    """It multiplies its schedule, saves on the main process only, and passes over batches itself when it goes on."""
    path = script(tmp_path, FOR_ACCELERATE)
    for more in ((), ("resume",)):
        code, _, err = command("launch", "--as", "accelerate", "--nproc", 2, path, tmp_path, *more, cwd=tmp_path)
        assert code == 0, err
    for rank in range(2):
        straight, resumed = (eval((tmp_path / f"{run}-{rank}").read_text()) for run in ("straight", "resumed"))
        assert straight[1] == [pytest.approx(1 - n / 6, abs=1e-5) for n in range(1, 7)]
        assert [part[4:] for part in straight] == list(resumed)
